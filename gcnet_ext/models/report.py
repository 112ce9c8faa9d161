"""What `replace_blocks` did and did not do, to be read by a person."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import nn

KNOWN = (
    "mmcv's ContextBlock and NonLocal1d to 3d, timm's GlobalContext, SEModule, SqueezeExcite, EffectiveSEModule, EseModule, "
    "EcaModule and GlobalResponseNorm, torchvision's SqueezeExcitation, and classes with the layers of the GC block or of "
    "squeeze-excitation"
)
NAMES_IN_A_LINE = 4


@dataclass(frozen=True, repr=False)
class Report:
    """What `replace_blocks` did. It prints itself as a list, grouped by class.

    Attributes:
        model: the model, which is the same object.
        replaced: name of each module that has a forward of ours now, and its class before.
        called: those of them whose layers are called as the modules they are, and why; pooling and fusion are compiled. The
            others are computed by one operator.
        left: name of each module that looks like attention over channels or positions and was left as it is, and why.
        kinds: the class of each module that is left.
        tails: name of each block of ours, and why it does not take the addition and the ReLU of a residual block along; empty
            where it does. Without ``fuse_tail`` no block is named.
    """

    model: nn.Module
    replaced: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    called: dict[str, str] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    tails: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} replaced, {len(self.left)} left"]
        for names in _alike(self.replaced, lambda name: (self.replaced[name], self.called.get(name), self.tails.get(name))):
            kind, why, tail = self.replaced[names[0]], self.called.get(names[0]), self.tails.get(names[0])
            how = "fused" if why is None else f"pooling and fusion compiled, but {why} is called"
            how += " with the addition and the ReLU behind it" if tail == "" else ""
            how += f", alone, because {tail}" if tail and why is None else ""
            lines.append(f"  replaced  {_counted(names)}{kind}, {how}: {_listed(names)}")
        for names in _alike(self.left, lambda name: (self.kinds.get(name), self.left[name])):
            kind = self.kinds.get(names[0], "")
            lines.append(f"  left      {_counted(names)}{kind}, because {self.left[names[0]]}: {_listed(names)}")
        if not self.replaced:
            hint = "" if self.left or self._has_ours() else "; insert_blocks puts blocks into a model that has none"
            lines.append(f"  {'the blocks of this package stay; ' if self._has_ours() else ''}known are {KNOWN}{hint}")
        return "\n".join(lines)

    __repr__ = __str__

    def _has_ours(self) -> bool:
        return any(type(part).__module__.startswith("gcnet_ext.") for part in self.model.modules())


def _alike(names: Iterable[str], key: Callable[[str], object]) -> list[list[str]]:
    groups: dict[object, list[str]] = {}
    for name in names:
        groups.setdefault(key(name), []).append(name)
    return list(groups.values())


def _counted(names: list[str]) -> str:
    return f"{len(names)} x " if len(names) > 1 else ""


def _listed(names: list[str]) -> str:
    shown = [name or "(the model)" for name in names[:NAMES_IN_A_LINE]]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")
