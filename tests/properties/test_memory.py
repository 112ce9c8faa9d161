"""What is allocated and what is saved for backward: x, and buffers of N*P or N*C elements; nothing else of the size of x."""

from __future__ import annotations

import ctypes

import grid
import pytest
import torch
from allocations import BUFFERS, SHAPE, allocated
from grid import Case
from registry import OPS

pytestmark = pytest.mark.usefixtures("kernels")

CASES = [
    Case(SHAPE, dtype, layout, fusion=fusion)
    for dtype in (torch.float32, torch.bfloat16)
    for layout in ("contiguous", "channels_last", "cropped_channels_last")
    for fusion in grid.FUSIONS
]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_saved_for_backward(case, op):
    """x itself, not a copy, the parameters themselves, and small buffers."""
    function, inputs = OPS[op].ours, OPS[op].inputs_of(case)
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in inputs]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        out = function(*leaves)
    assert out.requires_grad
    assert saved
    given = {leaf.untyped_storage().data_ptr() for leaf in leaves if leaf is not None}
    own = {tensor.untyped_storage().data_ptr(): tensor for tensor in saved}
    assert sum(tensor.nbytes for pointer, tensor in own.items() if pointer not in given) <= BUFFERS


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", [case for case in CASES if "cropped" not in case.layout], ids=str)
def test_allocated(case, op):
    """Forward: the output and small buffers. Backward: grad_x and small buffers. Both seen by torch's allocator."""
    function, inputs = OPS[op].ours, OPS[op].inputs_of(case)
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in inputs]
    size = leaves[0].numel() * leaves[0].element_size()
    forward, out = allocated(lambda: function(*leaves))
    assert out.nbytes <= forward <= out.nbytes + BUFFERS, "bytes that forward allocates: its output and small buffers"
    grad = torch.ones_like(out)
    given = [leaf for leaf in leaves if leaf is not None]
    backward, _ = allocated(lambda: torch.autograd.grad(out, given, grad))
    assert size <= backward <= size + BUFFERS, "bytes that backward allocates: the gradient of x and small buffers"


RESIDENT = """
import torch, grid
from grid import Case
from registry import OPS

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024

def grown(call):
    before, result = status("VmRSS"), call()
    return status("VmHWM") - before, result

torch.set_num_threads(2)
(n, c, *s), dtype, layout = {shape}, torch.{dtype}, "{layout}"
op = OPS["{op}"]
function, inputs = op.ours, op.inputs_of(Case((n, c, 8, 8), dtype, layout))
grid.run(function, inputs, function(*inputs))  # what is imported, started and allocated once

def feature_map():
    sizes = (n, *s, c) if layout == "channels_last" else (n, c, *s)
    full = torch.empty(sizes, dtype=dtype).fill_(0.5)  # not a random number more than once: that would need memory, too
    return full.movedim(-1, 1) if layout == "channels_last" else full

x = feature_map()
grad = torch.ones(n, c, dtype=dtype) if not op.is_map else feature_map()
assert status("VmHWM") - status("VmRSS") < x.nbytes // 20, "the peak lies before the measurement"
leaves = [None if t is None else t.detach().requires_grad_() for t in (x, *inputs[1:])]
given = [leaf for leaf in leaves if leaf is not None]
forward, out = grown(lambda: function(*leaves))
backward, _ = grown(lambda: torch.autograd.grad(out, given, grad))
print(forward / x.nbytes, backward / x.nbytes)
"""


@pytest.mark.parametrize("layout", grid.LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", OPS)
def test_resident(python, layout, dtype, op):
    """The peak of the process's memory, scratch of the kernels included: x forward, and x backward, and a little."""
    if not grid.available_memory() > 3 * 2**30:
        pytest.skip("less than 3 GiB of memory are free")
    shape = (2, 128, 640, 512) if dtype == "bfloat16" else (2, 128, 320, 512)
    forward, backward = map(float, python(RESIDENT.format(op=op, dtype=dtype, layout=layout, shape=shape)).stdout.split())
    attention = 4 / (128 * (2 if dtype == "bfloat16" else 4))  # [N, P] of float32, in units of x
    assert forward <= OPS[op].is_map + 2 * attention + 0.06, "memory that forward takes, in sizes of x"
    assert 0.9 <= backward <= 1 + 2 * attention + 0.06, "memory that backward takes, in sizes of x"


LEAK = """
import ctypes, gc, torch
from grid import Case
from registry import OPS

class Heap(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Heap

def used():
    gc.collect()
    heap = libc.mallinfo2()
    return heap.uordblks + heap.hblkhd

def grown(call, calls=500):
    for _ in range(100):  # what is allocated once
        call()
    before = used()
    for _ in range(calls):
        call()
    return (used() - before) / calls

torch.set_num_threads(1)  # mallinfo2 sees the arena of the main thread
op = OPS["{op}"]
function, inputs = op.ours, op.inputs_of(Case((2, 16, 4, 4)))
with torch.no_grad():
    forward = grown(lambda: function(*inputs))
leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
given = [leaf for leaf in leaves if leaf is not None]
both = grown(lambda: torch.autograd.grad(function(*leaves).sum(), given))
print(forward, both)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs the heap statistics of glibc 2.33")
@pytest.mark.parametrize("op", OPS)
def test_no_leak(python, op):
    """Bytes on the heap that a call leaves behind. A str argument of a stable-ABI operator once left 48 in every call."""
    forward, both = map(float, python(LEAK.format(op=op)).stdout.split())
    assert forward < 4
    assert both < 4
