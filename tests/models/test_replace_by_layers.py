"""Blocks of the family that are known by their layers alone, as repositories hold them under names of their own."""

from __future__ import annotations

import copy
import pickle

import eager
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gcnet_ext import replace_blocks
from gcnet_ext.models.peer import Peer

pytestmark = pytest.mark.usefixtures("libraries")


class OfLinears(nn.Module):
    """The SE layer of a thousand repositories."""

    def __init__(self, channels: int = 16, reduction: int = 4) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channels, channels // reduction, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(channels // reduction, channels, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        samples, channels = x.shape[:2]
        return x * self.fc(self.avg_pool(x).view(samples, channels)).view(samples, channels, 1, 1).expand_as(x)


class InOneSequential(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.se = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 4, 1), nn.SiLU(), nn.Conv2d(4, 16, 1), nn.Hardsigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return self.se(x) * x


class Flattened(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(16, 5), nn.GELU(), nn.Linear(5, 16), nn.Sigmoid(),
            nn.Unflatten(1, (16, 1, 1)),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class OfFunctions(nn.Module):
    """Everything but the layers is a function, and only the name of the class tells."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(x, 1)))))


OfFunctions.__name__ = "SELayer"


class OfSequences(nn.Module):
    """As in speech models."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.relu = nn.Conv1d(16, 8, 1), nn.ReLU(inplace=True)
        self.conv2, self.sigmoid = nn.Conv1d(8, 16, 1), nn.Sigmoid()

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        assert lengths is None
        return self.sigmoid(self.conv2(self.relu(self.conv1(x.mean(dim=2, keepdim=True))))) * x


class OfSequencesByLinears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear1, self.linear2, self.act = nn.Linear(16, 8), nn.Linear(8, 16), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.act(self.linear2(F.relu(self.linear1(x.mean(2))))).unsqueeze(2)


class OfVolumes(nn.Module):
    """As MONAI's ChannelSELayer."""

    def __init__(self) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool3d(1)
        self.fc = nn.Sequential(nn.Linear(16, 8), nn.LeakyReLU(0.2), nn.Linear(8, 16), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(self.avg_pool(x).flatten(1)).view(len(x), 16, 1, 1, 1)


class ChannelAttention(nn.Module):
    """As RTMDet's."""

    def __init__(self) -> None:
        super().__init__()
        self.global_avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc, self.act = nn.Conv2d(16, 16, 1), nn.Hardsigmoid(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.act(self.fc(self.global_avgpool(x)))


class WithBatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool, self.sigmoid = nn.AdaptiveAvgPool2d(1), nn.Sigmoid()
        self.down, self.norm, self.act = nn.Conv2d(16, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU()
        self.up = nn.Conv2d(4, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.sigmoid(self.up(self.act(self.norm(self.down(self.pool(x))))))


class PastedGlobalContext(nn.Module):
    """timm's GlobalContext as tutorials paste it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_attn, self.mlp_add, self.gate = nn.Conv2d(16, 1, 1), None, nn.Sigmoid()
        self.mlp_scale = nn.Sequential(
            nn.Conv2d(16, 4, 1), nn.LayerNorm([4, 1, 1]), nn.ReLU(), nn.Dropout(0.0), nn.Conv2d(4, 16, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        attention = self.conv_attn(x).flatten(2).softmax(-1)
        context = (x.flatten(2) * attention).sum(2)[..., None, None]
        return x * self.gate(self.mlp_scale(context))


KINDS = {
    OfLinears: 2, InOneSequential: 2, Flattened: 2, OfFunctions: 2, OfSequences: 1, OfSequencesByLinears: 1, OfVolumes: 3,
    ChannelAttention: 2, WithBatchNorm: 2, PastedGlobalContext: 2,
}  # fmt: skip


def feature_map(dims: int, samples: int = 3) -> Tensor:
    return torch.randn(samples, 16, *(5, 6, 2)[:dims], generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def results(block: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of x and of the parameters."""
    x = x.clone().requires_grad_()
    out = block(x)
    weighted = out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad(weighted.sum(), [x, *block.parameters()])]


def never(*_args: object, **_options: object) -> None:
    raise AssertionError("the former forward was called")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_computed_by_ours(kind, training, monkeypatch):
    block = eager.randomise(kind()).double().train(training)
    x = feature_map(KINDS[kind])
    want = results(copy.deepcopy(block), x)
    report = replace_blocks(nn.Sequential(block))
    assert list(report.replaced) == ["0"], str(report)
    assert not report.left
    assert bool(report.called) == (training and kind is WithBatchNorm)
    monkeypatch.setattr(Peer, "_as_before", never)
    for got, expected in zip(results(block, x), want, strict=True):
        assert torch.allclose(got, expected, rtol=1e-6, atol=1e-6)
    assert (block._plain_layers() is None) == (training and kind is WithBatchNorm)


@pytest.mark.parametrize("kind", KINDS)
def test_what_changes_later_counts(kind):
    """A hook on any submodule."""
    block = eager.randomise(kind()).double().eval()
    x = feature_map(KINDS[kind])
    replaced = copy.deepcopy(block)
    replace_blocks(nn.Sequential(replaced))
    for name, _ in list(block.named_modules())[1:]:
        handles = [
            each.get_submodule(name).register_forward_hook(lambda _module, _given, found: found * 1.5)
            for each in (block, replaced)
        ]
        assert torch.allclose(replaced(x), block(x), rtol=1e-6, atol=1e-6), name
        for handle in handles:
            handle.remove()
    assert torch.allclose(replaced(x), block(x), rtol=1e-6, atol=1e-6)


class MaxPooled(OfLinears):
    def __init__(self) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveMaxPool2d(1)


class Doubled(OfLinears):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class WithResidual(InOneSequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class InTrainingOnly(OfLinears):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.training else x


class AnotherGate(OfFunctions):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tanh(self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(x, 1)))))


AnotherGate.__name__ = "SEWithTanh"


class SumPooled(OfSequences):
    def forward(self, x: Tensor) -> Tensor:
        return self.sigmoid(self.conv2(self.relu(self.conv1(x.sum(dim=2, keepdim=True))))) * x


class LeftOver(OfLinears):
    def __init__(self) -> None:
        super().__init__()
        self.max_pool = nn.AdaptiveMaxPool2d(1)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Doubled, "computes something else"),
        (WithResidual, "computes something else"),
        (InTrainingOnly, "computes something else"),
        (AnotherGate, "computes something else"),
        (SumPooled, "computes something else"),
        (LeftOver, "its submodule max_pool (AdaptiveMaxPool2d) has no counterpart in ours"),
        (MaxPooled, "its submodule avg_pool (AdaptiveMaxPool2d) has no counterpart in ours"),
    ],
)
def test_what_computes_something_else_is_left(kind, why):
    model = nn.Sequential(eager.randomise(kind()))
    report = replace_blocks(model)
    assert not report.replaced
    assert report.left["0"].endswith(why)
    assert type(model[0]) is kind


def test_a_part_of_a_block_is_none():
    """What stands in a block and gives no feature map is neither replaced nor listed beside the block."""
    report = replace_blocks(nn.Sequential(nn.Sequential(OfLinears(), nn.ReLU()), WithResidual()))
    assert list(report.replaced) == ["0.0"]
    assert list(report.left) == ["1"]


def test_layers_without_weights_yet_are_no_block():
    """torch's lazy layers learn their sizes in the first call."""
    model = nn.Sequential(nn.LazyConv2d(16, 1), nn.LazyLinear(4), nn.Sigmoid(), OfLinears())
    report = replace_blocks(model)
    assert list(report.replaced) == ["3"]
    assert not report.left


def test_networks_and_mlps_are_not_tried():
    """A look at each module must not take long in a model of thousands."""
    layer = nn.TransformerEncoderLayer(16, 2, 64)
    autoencoder = nn.Sequential(nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 16), nn.Sigmoid())
    report = replace_blocks(nn.ModuleDict({"layer": layer, "autoencoder": autoencoder}))
    assert not report.replaced
    assert "layer.linear1" not in report.left


def test_a_residual_block_named_after_its_block_is_not_listed():
    class SEBottleneck(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.se = nn.Conv2d(16, 16, 3, padding=1), OfLinears()

        def forward(self, x: Tensor) -> Tensor:
            return self.se(self.conv(x)) + x

    report = replace_blocks(nn.Sequential(SEBottleneck()))
    assert list(report.replaced) == ["0.se"]
    assert not report.left
    assert not report.kinds


def test_copies_and_pickles():
    block = eager.randomise(OfLinears())
    x = feature_map(2).float()
    want = block(x)
    replace_blocks(nn.Sequential(block))
    for each in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert isinstance(each, Peer)
        assert torch.allclose(each(x), want, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("affine", [False, True])
def test_a_batch_norm_is_folded_in_evaluation(dtype, affine):
    """In each call: statistics that change between two calls count."""
    block = eager.randomise(WithBatchNorm())
    if not affine:
        block.norm = nn.BatchNorm2d(4, affine=False)
    block.eval()
    truth = copy.deepcopy(block).double()
    block.to(dtype)
    replace_blocks(nn.Sequential(block))
    x = feature_map(2)
    with torch.no_grad():
        for mean in (0.5, -2.0):
            for each in (block, truth):
                each.norm.running_mean.fill_(mean)
            assert block._plain_layers() is not None
            tolerance = 8 * torch.finfo(dtype).eps
            assert torch.allclose(block(x.to(dtype)).double(), truth(x.to(dtype).double()), rtol=tolerance, atol=10 * tolerance)


def test_a_batch_norm_without_statistics_is_called():
    block = eager.randomise(WithBatchNorm()).double().eval()
    block.norm = nn.BatchNorm2d(4, track_running_stats=False).double().eval()
    x = feature_map(2)
    want = block(x)
    report = replace_blocks(nn.Sequential(block))
    assert list(report.called) == ["0"]
    assert torch.allclose(block(x), want)


def test_training_with_a_batch_norm_updates_its_statistics():
    block = eager.randomise(WithBatchNorm()).double()
    other = copy.deepcopy(block)
    replace_blocks(nn.Sequential(block))
    for each in (block, other):
        each(feature_map(2))
    assert int(block.norm.num_batches_tracked) == 1
    assert torch.allclose(block.norm.running_mean, other.norm.running_mean)
    assert torch.allclose(block.norm.running_var, other.norm.running_var)
