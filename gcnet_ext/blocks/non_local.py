"""The non-local block in its four modes, on PyTorch's own attention and matrix products: no kernel of this package is needed.

Symbols: N samples, C channels, P positions, Q of them that are attended to (P, or fewer after max-pooling), D = C / reduction.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from .. import _torch
from .._torch import children
from ..ops import _checks
from ..ops._autograd import in_plain_pytorch, through_plain_pytorch
from . import _attention, _layers, _state_dict

MODES = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")
NORMS = (None, "batch")
# Size of the max-pooling window of sub_sample by the number of spatial dimensions; the first of three is time.
POOLS: dict[int, tuple[Callable[..., Tensor], Any]] = {1: (F.max_pool1d, 2), 2: (F.max_pool2d, 2), 3: (F.max_pool3d, (1, 2, 2))}


class NonLocalBlock(nn.Module):
    """The non-local block: ``out = x + conv_out(y)`` with ``y_p = sum_q f(x_p, x_q) g(x_q)``.

    Source: X. Wang et al., "Non-local Neural Networks", 2018, https://arxiv.org/abs/1711.07971, equations 1 to 6.
    Signature, parameter names, scaling and initialisation are those of mmcv's ``NonLocal1d``, ``2d`` and ``3d``.

    None of the modes forms a large matrix of P x P weights, but for second derivatives, in forward mode and in transforms of
    torch.func, and where ``concat_project`` is hooked:

    * ``"embedded_gaussian"``: ``f = softmax_q(theta(x_p) . phi(x_q) / sqrt(D))``, by ``scaled_dot_product_attention``.
    * ``"gaussian"``: ``f = softmax_q(x_p . x_q)``, also by ``scaled_dot_product_attention``; on a CPU in float32 and float64 in
      runs of max(C, 32) positions.
    * ``"dot_product"``: ``f = theta(x_p) . phi(x_q) / Q``, as ``theta(x_p) . (sum_q phi(x_q) g(x_q) / Q)``: linear in P. The
      weights come first where P and Q are less than D, as they are less to compute then.
    * ``"concatenation"``: ``f = relu(w . [theta(x_p), phi(x_q)]) / Q``, by sums over the sorted halves of the dot product, in
      ``O(P log P)``. (Exported to ONNX, which has no search in sorted numbers, it does form them.)

    Args:
        inplanes: C, the channels of the input and of the output.
        reduction: C / D; D is at least 1.
        mode: one of the four.
        sub_sample: whether phi and g are max-pooled, by 2 along every spatial dimension (not along the time of a video).
        use_scale: whether ``"embedded_gaussian"`` divides by ``sqrt(D)``.
        norm: None, or ``"batch"`` for a BatchNorm after ``conv_out``, which then has no bias.
        in_channels: mmcv's name for inplanes.
        device, dtype: of the parameters, as in every nn.Module.

    Shapes:
        Input ``[N, C, *spatial]`` with one, two or three spatial dimensions; the output is like it, in its dtype. What lies
        between is computed in the dtype of the parameters. Unlike the other blocks this one takes neither a residual nor valid
        positions.

    Raises:
        ValueError: an argument of the constructor is not valid. The message says what is valid.
        TypeError: inplanes is missing, or both inplanes and in_channels are given.
        RuntimeError: the input has a wrong shape, dtype or device. The message says which.

    The block starts as the identity.
    """

    if TYPE_CHECKING:  # nn.Module.__call__ takes and returns Any

        def __call__(self, x: Tensor) -> Tensor: ...

    def __init__(
        self,
        inplanes: int | None = None,
        reduction: int = 2,
        mode: str = "embedded_gaussian",
        sub_sample: bool = False,
        use_scale: bool = True,
        norm: str | None = None,
        *,
        in_channels: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _layers.check_choice("mode", mode, MODES)
        _layers.check_choice("norm", norm, NORMS)
        inplanes = _layers.count_channels(inplanes, in_channels)
        _layers.check_count("reduction", reduction)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.inplanes, self.reduction, self.mode = inplanes, reduction, mode
        self.sub_sample, self.use_scale, self.norm = sub_sample, use_scale, norm
        self.planes = planes = max(inplanes // reduction, 1)

        def layer(inputs: int, outputs: int, *, bias: bool = True, **more: nn.Module) -> Any:
            return nn.Sequential(OrderedDict(conv=nn.Conv2d(inputs, outputs, 1, bias=bias, **factory), **more))

        self.g = layer(inplanes, planes)
        absent: Any = None
        self.theta = self.phi = self.concat_project = absent
        if mode != "gaussian":
            self.theta, self.phi = layer(inplanes, planes), layer(inplanes, planes)
        if mode == "concatenation":
            self.concat_project = layer(2 * planes, 1, bias=False)
        normalisation = {"bn": nn.BatchNorm2d(inplanes, **factory)} if norm else {}
        self.conv_out = layer(planes, inplanes, bias=norm is None, **normalisation)
        self.register_load_state_dict_pre_hook(partial(_state_dict.accept, _state_dict.NON_LOCAL))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as mmcv does; the last layer with zeros."""
        for layer in (self.g, self.theta, self.phi):
            if layer is not None:
                nn.init.normal_(layer.conv.weight, std=0.01)
                nn.init.zeros_(layer.conv.bias)
        if self.concat_project is not None:
            self.concat_project.conv.reset_parameters()
        if self.norm is None:
            nn.init.zeros_(self.conv_out.conv.weight)
            nn.init.zeros_(self.conv_out.conv.bias)
        else:
            self.conv_out.conv.reset_parameters()
            self.conv_out.bn.reset_running_stats()
            nn.init.zeros_(self.conv_out.bn.weight)
            nn.init.zeros_(self.conv_out.bn.bias)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            return _layers.of_no_tensor(self, x)
        _layers.check_channels(x, self.inplanes)
        self._check(x)
        image = (x if x.dim() == 4 else x.flatten(2).unsqueeze(3)).to(self._dtype(x))
        g = self._attended(self.g(image), x)
        if self.mode == "gaussian":
            theta, phi = image, self._attended(image, x)
        else:
            theta, phi = self.theta(image), self._attended(self.phi(image), x)
        if self.mode == "concatenation" and not _is_one_pointwise(self.concat_project):
            y = _called_concatenation(theta.flatten(2), phi.flatten(2), g.flatten(2), self.concat_project)
            return self._added(x, y, image)
        weight = self.concat_project.conv.weight if self.mode == "concatenation" else None
        y = weighted_values(self.mode, theta, phi, g, weight, self.mode == "embedded_gaussian" and self.use_scale)
        return self._added(x, y, image)

    def _added(self, x: Tensor, y: Tensor, image: Tensor) -> Tensor:
        out = self.conv_out(y.reshape(y.shape[:2] + image.shape[2:]))
        return x + out.reshape(x.shape).to(x.dtype)

    def __prepare_scriptable__(self) -> NoReturn:
        _layers.not_scriptable(self)

    def _check(self, x: Tensor) -> None:
        if x.dim() - 2 not in POOLS:
            raise RuntimeError(f"x must have 1 to 3 spatial dimensions [N, C, *spatial], got shape {list(x.shape)}")
        _checks.feature_map("non_local", x)
        own = next(self.g.parameters(), x).device.type
        if x.device.type != own:  # meta parameters refuse nothing
            raise RuntimeError(f"x must be on the device of the parameters ({own}), got {x.device.type}")
        if self.sub_sample and any(size < 2 for size in x.shape[2 if x.dim() < 5 else 3 :]):
            raise RuntimeError(f"x must have at least 2 positions wherever sub_sample pools them, got shape {list(x.shape)}")

    def _dtype(self, x: Tensor) -> torch.dtype:
        """The dtype g computes in: its weight's for torch's Conv2d; otherwise x's, or a wider one of the parameters of g."""
        conv = next(iter(children(self.g).values()), None)
        if isinstance(conv, nn.Conv2d) and type(conv).forward is nn.Conv2d.forward:
            return conv.weight.dtype
        return _layers.input_dtype(self.g, x.dtype)

    def extra_repr(self) -> str:
        names = ("reduction", "mode", "sub_sample", "use_scale", "norm")
        return ", ".join([str(self.inplanes), *(f"{name}={getattr(self, name)!r}" for name in names)])

    def _attended(self, image: Tensor, x: Tensor) -> Tensor:
        """The positions that are attended to, [N, D, *], of an image of x's positions."""
        if not self.sub_sample:
            return image
        pool, window = POOLS[x.dim() - 2]
        return pool(image.reshape(image.shape[:2] + x.shape[2:]), window)


def weighted_values(mode: str, theta: Tensor, phi: Tensor, g: Tensor, weight: Tensor | None, scaled: bool) -> Tensor:
    """y_p = sum_q f(x_p, x_q) g(x_q), [N, D of g, P], in one of the modes, of theta [N, D, *], phi and g; the weight is that of
    "concatenation"."""
    if mode in ("gaussian", "embedded_gaussian"):
        return _softmax(theta, phi, g, scaled)
    theta, phi, g = theta.flatten(2), phi.flatten(2), g.flatten(2)
    if mode == "dot_product":
        return _dot_product(theta, phi, g)
    assert weight is not None
    return _concatenation(theta, phi, g, weight)


def _softmax(theta: Tensor, phi: Tensor, g: Tensor, scaled: bool) -> Tensor:
    """y_p = sum_q softmax_q(theta_p . phi_q) g_q."""
    scale = theta.shape[1] ** -0.5 if scaled else 1.0
    if _torch.is_traced() and torch.onnx.is_in_onnx_export():  # opsets below 14 have no name for this attention
        theta, phi, g = theta.flatten(2), phi.flatten(2), g.flatten(2)
        attention = (torch.matmul(theta.transpose(1, 2), phi) * scale).softmax(2)
        return torch.matmul(g, attention.transpose(1, 2))
    captured = is_compiling() or _torch.is_tracing()
    in_every_way = not captured and _are_in_every_way(theta, phi, g)
    if not captured and not in_every_way and not scaled and _attention.suits(theta, phi, g):
        return _attention.attention(theta.flatten(2), phi.flatten(2), g.flatten(2))
    # The kernels that form no matrix want [N, 1, P or Q, D] with the D next to each other, and values as wide as the keys.
    query, key, value = _rows(theta), _rows(phi), _rows(g)
    if in_every_way:
        return _attention.with_all_weights(query, key, value, scale).squeeze(1).mT
    width = value.shape[-1]
    missing = key.shape[-1] - width
    value = F.pad(value, (0, missing)) if missing > 0 else value
    y = F.scaled_dot_product_attention(query, key, value, scale=scale)
    y = y[..., :width] if missing > 0 else y
    if not captured and y.requires_grad:
        return _torch.apply_to_results(_WithSecondDerivatives, scale, y, query, key, value)
    return y.squeeze(1).mT


def _rows(image: Tensor) -> Tensor:
    """[N, D, *positions] -> [N, 1, P, D], with the D next to each other."""
    rows = image.movedim(1, -1)
    return rows.reshape(rows.shape[0], 1, prod(rows.shape[1:-1]), rows.shape[-1]).contiguous()


def _are_in_every_way(theta: Tensor, phi: Tensor, g: Tensor) -> bool:
    """Whether the attention must be of operations that can be differentiated and batched in every way, and that a tensor of a
    class with ways of its own can know: scaled_dot_product_attention has no tangent, and its gradient no gradient."""
    if _torch.inside_transform() or (_torch.forward_level() >= 0 and _torch.has_tangent(theta, phi, g)):
        return True
    plain = type(theta) is Tensor and type(phi) is Tensor and type(g) is Tensor
    return not plain and _torch.has_own_ways(theta, phi, g)


def _of_width(query: Tensor, key: Tensor, value: Tensor, *, width: int, scale: float) -> Tensor:
    """The attention without what the values were padded with."""
    return _attention.with_all_weights(query, key, value[..., :width], scale)


class _WithSecondDerivatives(torch.autograd.Function):
    """(y [N, 1, P, D], query, key, value) -> [N, D, P], for the attention y of the other three.

    Without create_graph the gradient goes into y, and so through torch's kernels, whose backward has no derivative. With
    create_graph it goes past y, through plain PyTorch.
    """

    @staticmethod
    def forward(ctx, scale: float, y: Tensor, *inputs: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.scale = scale
        ctx.save_for_backward(*inputs)
        return y.squeeze(1).mT

    @staticmethod
    def backward(ctx, grad: Tensor | None):
        if grad is None:
            return (None,) * 5
        grad = grad.mT.unsqueeze(1)
        if not in_plain_pytorch(grad):
            return None, grad, None, None, None
        function = partial(_of_width, width=grad.shape[-1], scale=ctx.scale)
        return None, None, *through_plain_pytorch(function, ctx.saved_tensors, ctx.needs_input_grad[2:], grad)


def _dot_product(theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
    """y_p = theta_p . (sum_q phi_q g_q / Q): the sum first, so that no weight of a pair is formed, unless there are few."""
    captured = is_compiling() or _torch.is_tracing()  # there the sizes may be symbols
    if not captured and max(theta.shape[2], phi.shape[2]) < phi.shape[1]:
        return torch.matmul(g / phi.shape[2], torch.matmul(theta.transpose(1, 2), phi).transpose(1, 2))
    summed = torch.matmul(g / phi.shape[2], phi.transpose(1, 2))  # [N, D of g, D of phi]
    return torch.matmul(summed, theta)


def _is_one_pointwise(layer: nn.Module) -> bool:
    """Whether the layer is one 1x1 convolution in a Sequential, and nothing else happens where it is called."""
    return _layers.is_plain(layer, nn.Sequential) and len(layer) == 1 and _layers.is_pointwise(layer[0])


def _called_concatenation(theta: Tensor, phi: Tensor, g: Tensor, project: nn.Module) -> Tensor:
    """What `_concatenation` computes, with the projection called as the module it is, on all pairs of positions."""
    pairs = theta.shape[2], phi.shape[2]
    of_pairs = torch.cat(
        [theta.unsqueeze(3).expand(-1, -1, *pairs), phi.unsqueeze(2).expand(-1, -1, *pairs)], 1
    )  # [N, 2 D, P, Q]
    weights = project(of_pairs).flatten(1, 2).relu()
    return torch.matmul(g / phi.shape[2], weights.mT)


def _concatenation(theta: Tensor, phi: Tensor, g: Tensor, weight: Tensor) -> Tensor:
    """y_p = sum_q relu(a_p + b_q) g_q / Q with a = w_theta . theta and b = w_phi . phi.

    With the q sorted by falling b, those with a_p + b_q > 0 are the first k_p of them, and y_p = a_p G_k + B_k with the running
    sums G of g and B of b g.
    """
    own, attended = weight.flatten().to(theta.dtype).chunk(2)
    a, b = torch.matmul(own, theta), torch.matmul(attended, phi)
    if torch.onnx.is_in_onnx_export():  # ONNX can sort, but not search
        return torch.matmul(g / g.shape[2], (a.unsqueeze(1) + b.unsqueeze(2)).relu())
    b, order = b.sort(dim=1, descending=True)
    g = g.gather(2, order.unsqueeze(1).expand_as(g)) / g.shape[2]
    sums = F.pad(torch.stack([g, b.unsqueeze(1) * g]).cumsum(3), (1, 0))  # [2, N, D, Q + 1]
    first = torch.searchsorted(-b.detach(), a.detach().contiguous())  # k_p: how many -b_q are below a_p
    at_k = sums.gather(3, first.unsqueeze(1).expand(2, *g.shape[:2], -1))
    return a.unsqueeze(1) * at_k[0] + at_k[1]
