"""What a call of an op allocates, and how much it may."""

from __future__ import annotations

import torch

SHAPE = (4, 96, 40, 50)
SAMPLES, CHANNELS, POSITIONS = 4, 96, 2000
# [N, C] several times, [N, P] twice, and the gradients of the parameters
BUFFERS = 4 * (8 * SAMPLES * CHANNELS + 2 * SAMPLES * POSITIONS) + 4 * 8 * CHANNELS * 8


def allocated(call) -> tuple[int, object]:
    """The most bytes that torch's allocator had given out during the call, and what the call returned."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    current = most = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            current += event.nbytes()
            most = max(most, current)
    return most, result
