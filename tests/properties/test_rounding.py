"""16-bit numbers in the CPU kernels, with every capability: how they are rounded, and that no more of them are read or written.

Rounding is torch's own, bit by bit: channel_fuse of x = -0 with a float32 shift rounds the shift. Of NaN only that it is one.
"""

from __future__ import annotations

HEAD = """
import torch
import grid
import gcnet_ext
from gcnet_ext import _load
import reference

HALF = (torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last")
capability = _load.compiled.cpu_capability()

def as_layout(x, layout):
    return x if layout == "contiguous" else x.movedim(1, -1).contiguous().movedim(-1, 1)

def floats(bits):
    return torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)
"""

ROUNDING = """
def numbers(dtype):
    \"\"\"Every finite number of the dtype, what lies half-way to the next, and the floats beside that; some overflow.\"\"\"
    bits = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    exact = bits[bits.isfinite()].float()
    beyond = 2.0**128 if dtype == torch.bfloat16 else 2.0**16
    ties = ((exact.double() + torch.cat([exact[1:].double(), torch.tensor([beyond], dtype=torch.float64)])) / 2).float()
    infinity = torch.tensor([torch.inf])
    values = torch.cat([exact, ties, torch.nextafter(ties, infinity), torch.nextafter(ties, -infinity), infinity])
    if capability == "avx512_bf16" and dtype == torch.bfloat16:  # it takes what is below the normal numbers for zero
        values = values[values >= torch.finfo(torch.float32).tiny]
    return torch.cat([values, -values[values != 0]])  # a shift of -0 is the same as 0

for dtype in HALF:
    values = numbers(dtype)
    want = values.to(dtype)
    assert (want.isinf() & values.isfinite()).sum() >= 4, "no number overflows"
    for layout in LAYOUTS:
        for positions in (2, 19):
            x = as_layout(torch.full((1, len(values), positions), -0.0, dtype=dtype), layout)
            got = gcnet_ext.channel_fuse(x, shift=values[None])
            for p in (0, positions - 1):
                wrong = (got[0, :, p].view(torch.int16) != want.view(torch.int16)).nonzero().flatten()
                assert not len(wrong), (dtype, layout, positions, values[wrong[:5]], got[0, wrong[:5], p], want[wrong[:5]])

# NaN of both signs, quiet and signalling: single bits, all bits below one, and all above one
payloads = {1 << i for i in range(23)} | {(1 << i) - 1 for i in range(1, 24)} | {0x7fffff ^ ((1 << i) - 1) for i in range(23)}
nan = floats([sign | 0x7f800000 | payload for payload in sorted(payloads) for sign in (0, 1 << 31)])
assert nan.isnan().all()
for dtype in HALF:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isnan()]
    for layout in LAYOUTS:
        for positions in (1, 19):
            x = torch.zeros((1, len(nan), positions), dtype=dtype)
            assert gcnet_ext.channel_fuse(as_layout(x, layout), shift=nan[None]).isnan().all(), (dtype, layout)
            assert gcnet_ext.channel_fuse(as_layout(x + 1, layout), scale=nan[None]).isnan().all(), (dtype, layout)
            x = as_layout(every[None, :, None].expand(1, -1, positions).clone(), layout)
            assert gcnet_ext.channel_fuse(x).isnan().all(), (dtype, layout)
            got = gcnet_ext.channel_fuse(x[:, ::2], scale=torch.ones(1, x.shape[1])[:, ::2])
            assert got.isnan().all(), (dtype, layout)
print("as torch rounds, with", capability)
"""

TAILS = """
def with_guards(values, layout):
    \"\"\"The values in the middle of a tensor that is NaN on both sides of every row.\"\"\"
    rows = values if layout == "contiguous" else values.movedim(1, -1)
    larger = torch.full((*rows.shape[:-1], rows.shape[-1] + 80), torch.nan, dtype=values.dtype)
    inside = larger[..., 40:-40]
    inside.copy_(rows)
    return (inside if layout == "contiguous" else inside.movedim(-1, 1)), larger

NORM = tuple(f"{branch}_norm_{name}" for branch in ("scale", "shift") for name in ("weight", "bias"))
LONGEST = 2 * 16 + 1  # a vector is 16 numbers at most
for dtype in HALF:
    for layout in LAYOUTS:
        for length in range(1, LONGEST + 1):
            shape = (2, 3, length) if layout == "contiguous" else (2, length, 3)
            random = grid.Random(length)
            x, guarded = with_guards(random.feature_map(shape, dtype), layout)
            scale = random.normal(*shape[:2])
            want = (x.float() * scale[:, :, None]).to(dtype)  # one rounding to float32, and one to 16 bits
            what = (dtype, layout, length)
            assert torch.equal(gcnet_ext.channel_fuse(x, scale), want), what
            # Without a norm: that of one or two units leaves their gradients nothing but rounding errors.
            case = grid.Case(shape, dtype, hidden=length, missing=NORM)
            inputs, grad = (x.clone(), *case.inputs()[1:]), random.feature_map(shape, dtype)
            functions = [grid.flat(module.global_context, norm=False) for module in (gcnet_ext, reference)]
            grid.check(*functions, inputs, grad, grid.GLOBAL_CONTEXT_INPUTS, vanishing=case.vanishing)
            assert torch.equal(functions[0](x, *inputs[1:]), functions[0](*inputs)), what
            outside = guarded.isnan()
            gcnet_ext.channel_fuse(x, scale, inplace=True)
            assert torch.equal(x, want), what
            assert torch.equal(guarded.isnan(), outside), what
print("no more than asked for, with", capability)
"""


def test_rounding(python, capability):
    """Every 16-bit number, every tie between two of them and the floats beside it, in vectors and in the rest of a row."""
    assert python(HEAD + ROUNDING, GCNET_EXT_CPU_CAPABILITY=capability).stdout == f"as torch rounds, with {capability}\n"


def test_every_length_of_a_row(python, capability):
    """From one number to two vectors and one, in rows between NaN: nothing beside a row is read, or written to."""
    assert python(HEAD + TAILS, GCNET_EXT_CPU_CAPABILITY=capability).stdout == f"no more than asked for, with {capability}\n"
