"""What only a GPU can show: streams, graphs, no waiting for the device, memory, more than 2^31 elements, a second device."""

from __future__ import annotations

import eager
import grid
import pytest
import reference
import torch
from grid import Case, Random
from torch import nn

import gcnet_ext
from gcnet_ext import _load
from gcnet_ext._tuning import CudaTuning, cuda_tuning

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or "cuda" not in _load.kernel_devices,
    reason="needs a GPU and a build with CUDA kernels",
)

BLOCK = grid.flat(gcnet_ext.global_context)
# The transform in the last block of the pool, and in launches of its own; whole tiles, and none
SHAPES = ((3, 64, 20, 20), (2, 100, 7, 9), (5, 2048, 7, 7))
CASES = [
    Case(shape, dtype, layout, fusion=grid.FUSIONS[index % 3], hidden=64)
    for index, shape in enumerate(SHAPES)
    for layout in grid.LAYOUTS
    for dtype in (torch.float32, torch.float16)
]


def inputs_and_gradient(case: Case, seed: int = 0, device: str = "cuda") -> tuple[list[torch.Tensor | None], torch.Tensor]:
    """In the layout of the case; x and the gradient first made on the CPU."""
    move = lambda tensor: tensor.to(device)  # noqa: E731
    return list(case.inputs(move, seed)), Random(seed + 1, move).feature_map(case.shape, case.dtype, case.layout)


def assert_same_bits(got: grid.Result, want: grid.Result) -> None:
    assert torch.equal(got.out, want.out)
    for index, (ours, theirs) in enumerate(zip(got.grads, want.grads, strict=True)):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs), f"gradient of input {index}"


@pytest.fixture(params=["v1", "v2", "tickets"])
def engine(request):
    """Each CUDA engine."""
    with cuda_tuning(CudaTuning(engine=request.param)):
        yield request.param


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(engine, case):
    inputs, grad = inputs_and_gradient(case)
    truth = grid.flat(reference.global_context)
    grid.check(BLOCK, truth, inputs, grad, grid.GLOBAL_CONTEXT_INPUTS, vanishing=case.vanishing, sums=case.sums)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_graph_replay(engine, case):
    """A captured forward and backward pass gives, for new numbers in the same memory, what a call gives; again and again."""
    inputs, grad = inputs_and_gradient(case)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        grid.run(BLOCK, inputs, grad)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = grid.run(BLOCK, inputs, grad)
    for seed in (10, 20, 20):
        new_inputs, new_grad = inputs_and_gradient(case, seed)
        for old, new in zip([*inputs, grad], [*new_inputs, new_grad], strict=True):
            if old is not None:
                old.copy_(new)
        captured.out.fill_(torch.nan)
        graph.replay()
        assert_same_bits(captured, grid.run(BLOCK, new_inputs, new_grad))


def test_a_graph_keeps_the_decisions_under_which_it_was_captured():
    """One block for a sample, or several: the last bits tell which it was."""
    move = lambda tensor: tensor.cuda()  # noqa: E731
    x, (weight, bias) = Random(0, move).normal(2, 16, 32, 32), Random(1, move).mask(16, torch.float32)
    usual = gcnet_ext.attention_pool(x, weight, bias)
    graph = torch.cuda.CUDAGraph()
    with cuda_tuning(CudaTuning(splits=1)):
        decided = gcnet_ext.attention_pool(x, weight, bias)
        with torch.cuda.graph(graph):
            captured = gcnet_ext.attention_pool(x, weight, bias)
    graph.replay()
    assert torch.equal(captured, decided)
    assert not torch.equal(captured, usual)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_streams_do_not_disturb_each_other(engine, case):
    """Calls on two streams at once, behind work that keeps the GPU busy: each sees its own numbers, whole."""
    given = [inputs_and_gradient(case, seed) for seed in (1, 2)]
    want = [grid.run(BLOCK, *one) for one in given]
    busy = torch.randn(2048, 2048, device="cuda")
    streams = [torch.cuda.Stream() for _ in given]
    torch.cuda.synchronize()
    got = [[], []]
    for _ in range(10):
        for index, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                busy @ busy
                late = [None if tensor is None else tensor + 0 for tensor in given[index][0]]  # on this stream, not before
                got[index].append(grid.run(BLOCK, late, given[index][1]))
    torch.cuda.synchronize()
    for results, expected in zip(got, want, strict=True):
        for result in results:
            assert_same_bits(result, expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_never_waits_for_the_device(engine, case):
    """Nothing in a call synchronises, so that the host runs ahead."""
    inputs, grad = inputs_and_gradient(case)
    grid.run(BLOCK, inputs, grad)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = grid.run(BLOCK, inputs, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(result.out.isfinite().all())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_bits_from_run_to_run_and_alone_or_in_a_batch(engine, case):
    """Aligned samples: a sample's bits depend on the alignment of its memory, and on nothing else beside its numbers."""
    inputs, grad = inputs_and_gradient(case)
    want = grid.run(BLOCK, inputs, grad)
    for _ in range(5):
        assert_same_bits(grid.run(BLOCK, inputs, grad), want)
    alone = [inputs[0][-1:].clone(), *inputs[1:]]
    got = grid.run(BLOCK, alone, grad[-1:].clone())
    if case.shape[1] * case.shape[2] * case.shape[3] % 8 == 0:
        assert torch.equal(got.out, want.out[-1:])
        assert torch.equal(got.grads[0], want.grads[0][-1:])
    else:
        grid.assert_close(got.out, want.out[-1:].cpu().double(), torch.float32)


@pytest.mark.parametrize("layout", grid.LAYOUTS)
def test_memory(layout):
    """Forward allocates the output and little besides, and keeps x alone; backward allocates grad_x."""
    shape = (4, 512, 64, 64)
    x = Random(0, lambda tensor: tensor.cuda()).feature_map(shape, torch.float16, layout).requires_grad_()
    block = gcnet_ext.GlobalContextBlock(512, 1 / 16, fusion_types=("channel_mul", "channel_add")).cuda().half()
    grad = torch.ones_like(x)
    block(x).backward(grad)  # the gradients of the parameters are there from now on
    x.grad = None
    size, side = x.nbytes, x.nbytes // 6
    start = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = block(x)
    assert torch.cuda.max_memory_allocated() - start < size + side
    out.backward(grad)
    assert torch.cuda.max_memory_allocated() - start < 2 * size + side


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_training_under_autocast(dtype):
    """A convolution and the block, with a GradScaler: the losses of the eager block in float32, nearly."""
    fusions = ("channel_add", "channel_mul")
    theirs = eager.randomise(nn.Sequential(nn.Conv2d(3, 32, 3), eager.ContextBlock(32, 1 / 4, "att", fusions)))
    ours = nn.Sequential(nn.Conv2d(3, 32, 3), gcnet_ext.GlobalContextBlock(32, 1 / 4, fusion_types=fusions))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)).cuda()
    losses = []
    for net, enabled in ((ours.cuda(), True), (theirs.cuda(), False)):
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cuda", enabled=enabled and dtype == torch.float16)
        losses.append([])
        for _ in range(10):
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype=dtype, enabled=enabled):
                out = net(x)
            loss = (out.float() - 1).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses[-1].append(float(loss))
        assert all(parameter.grad.dtype == torch.float32 for parameter in net.parameters())
    assert losses[0][-1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_compiled_with_cuda_graphs():
    """torch.compile(mode="reduce-overhead") captures the block like any other module."""
    torch._dynamo.reset()
    block = gcnet_ext.GlobalContextBlock(64, 1 / 8, fusion_types=("channel_mul", "channel_add")).cuda()
    eager.randomise(block)
    compiled = torch.compile(block, mode="reduce-overhead", fullgraph=True)
    for seed in range(4):
        x = Random(seed, lambda tensor: tensor.cuda()).normal(2, 64, 14, 14)
        with torch.no_grad():
            torch.compiler.cudagraph_mark_step_begin()
            assert torch.equal(compiled(x), block(x))


@pytest.mark.parametrize("layout", grid.LAYOUTS)
def test_more_than_32_bits(layout):
    """The last sample of 2^31 elements and more gets what it gets alone, forward and backward."""
    sample = (512, 1024, 1024)  # four of them are 2^31 elements
    needed = 5 * 4 * 512 * 2**20 * 2
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"{needed / 2**30:.0f} GiB of GPU memory are needed")
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (5, *sample) if layout == "contiguous" else (5, *sample[1:], sample[0])
    x = torch.randn(shape, device="cuda", dtype=torch.float16, generator=generator)
    x = x if layout == "contiguous" else x.movedim(-1, 1)
    assert x.numel() > 2**31
    parameters = Case((1, 512, 1), torch.float16, hidden=32).inputs(lambda tensor: tensor.cuda())[1:]
    grad = x.flip(0)
    got = grid.run(BLOCK, (x, *parameters), grad)
    last = x[-1:].clone(memory_format=torch.preserve_format)
    alone = grid.run(BLOCK, (last, *parameters), grad[-1:].clone(memory_format=torch.preserve_format))
    assert torch.equal(got.out[-1:], alone.out)
    assert torch.equal(got.grads[0][-1:], alone.grads[0])
    del got, grad, x
    truth = grid.flat(reference.global_context)(last.float(), *(p if p is None else p.float() for p in parameters))
    for position in (0, 1023):
        grid.assert_close(alone.out[0, :, position, position], truth[0, :, position, position].cpu().double(), torch.float32)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_second_device():
    """The kernels run where x is, whichever device is current."""
    case = CASES[0]
    first = grid.run(BLOCK, *inputs_and_gradient(case, device="cuda:0"))
    second = grid.run(BLOCK, *inputs_and_gradient(case, device="cuda:1"))
    assert second.out.device == torch.device("cuda:1")
    assert torch.equal(first.out.cpu(), second.out.cpu())
