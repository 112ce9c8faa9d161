"""A user's script with every public name, for `mypy --strict`; it also runs (tests/integration/test_types.py)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import gcnet_ext
from gcnet_ext import (
    Branch,
    EffectiveSqueezeExcitation,
    EfficientChannelAttention,
    GlobalContextBlock,
    GlobalResponseNorm,
    NonLocalBlock,
    Report,
    SimplifiedNonLocalBlock,
    SqueezeExcitation,
    attention_map,
    attention_pool,
    channel_fuse,
    decompositions,
    freeze,
    global_context,
    global_response_norm,
    insert_blocks,
    plain,
    replace_blocks,
    timm_layer,
    to_peer_state_dict,
    to_plain,
)


class Net(nn.Module):
    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.gc = GlobalContextBlock(
            channels, 1 / 4, "att", ("channel_mul", "channel_add"), activation="silu", device=device, dtype=torch.float32
        )
        self.se = SqueezeExcitation(channels, planes=2, gate="hard_sigmoid", bias=False, device=device)
        self.snl = SimplifiedNonLocalBlock(channels, device=device)
        self.ese = EffectiveSqueezeExcitation(channels, "sigmoid", device=device)
        self.eca = EfficientChannelAttention(channels, 3, device=device)
        self.grn = GlobalResponseNorm(channels, 1e-6, channels_last=False, device=device)
        self.nl = NonLocalBlock(channels, reduction=2, mode="dot_product", norm="batch", device=device)

    def forward(self, x: Tensor) -> Tensor:
        return self.nl(self.grn(self.snl(self.eca(self.ese(self.se(self.gc(x)))))))

    def where(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.gc.attention_map(x), self.snl.attention_map(x)


def functions(x: Tensor) -> Tensor:
    samples, channels = x.shape[:2]
    weight, bias = torch.randn(channels), torch.zeros(1)
    context = attention_pool(x, weight, bias) + attention_pool(x)
    branch = Branch(torch.randn(4, channels), torch.zeros(4), w2=torch.randn(channels, 4), b2=None)
    out: Tensor = global_context(x, weight, bias, scale=branch, shift=None, norm=False, gate="sigmoid", eps=1e-6)
    out = global_response_norm(out, weight, torch.zeros(channels), 1e-6)
    mean: float = attention_map(x, weight).mean().item()
    assert branch.norm_weight is None
    return channel_fuse(out, scale=context, shift=torch.full((samples, channels), mean), inplace=True)


def other_models(model: nn.Module) -> dict[str, Tensor]:
    names: list[str] = insert_blocks(model, ratio=1 / 4, kind="gc", modules={"0": 8}, fusion_types="channel_mul")
    insert_blocks(model, (2,), 1 / 2, kind="se", modules=["1"])
    report: Report = replace_blocks(model)
    replaced: dict[str, str] = report.replaced
    changed: nn.Module = report.model
    assert len(names) == 1
    assert not {**replaced, **report.called, **report.kinds}
    assert str(report)
    return to_peer_state_dict(changed, "mmcv", spatial_dims=2)


def elsewhere(model: nn.Module, x: Tensor) -> Tensor:
    with plain(), plain(False), plain(enabled=True):
        program = torch.export.export(model, (x,)).run_decompositions(decompositions())
    copied: nn.Module = to_plain(model)
    frozen: list[str] = freeze(model.eval())
    assert len(frozen) < len(list(model.modules()))
    out: Tensor = program.module()(x) - copied(x)
    return out


def main() -> None:
    version: str = gcnet_ext.__version__
    x = torch.randn(2, 8, 3, 5)
    net = Net(8)
    out = net.forward(x)
    maps = net.where(x)
    made: nn.Module = timm_layer("se", bias=False)(8, rd_ratio=1 / 4, act_layer=nn.SiLU)
    net.se.load_state_dict(made.state_dict())
    state = other_models(nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)))
    print(version, out.shape, functions(x).shape, elsewhere(net, x).shape, maps[0].shape, maps[1].shape, len(state))


if __name__ == "__main__":
    main()
