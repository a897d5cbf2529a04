"""Instance normalisation, ReLU and 2x2 average pooling as one op, on numbers and on dual numbers.

On one plane y, with scale g and shift b, xh the normalised plane, s = [z > 0], ' for tangents, and u, v the cotangents
of out and out' spread over their windows (1/4 each) and masked by s::

    forward        r = 1/sqrt(var y + eps)   xh = r (y - mean y)            z = g xh + b             out = pool(s z)
    dual           m = mean(xh y')    xh' = r (y' - mean y' - xh m)    z' = g' xh + g xh' + b'    out' = pool(s z')
    dual backward  q = mean(g v xh)   dL/dy' = r (g v - mean(g v) - xh q)
                   t = g u + g' v - r m g v - r q y'
                   dL/dy = r (t - mean t - xh (mean(t xh) + mean(g v xh')))
                   dL/dg = sum(u xh + v xh')   dL/db = sum u

The ordinary backward is dL/dy', sum(v xh), sum v. Double backward is dual, with the cotangents of the gradients as
tangents, and dual backward with u = 0. Each face reads a plane once from memory. All planes are channels last in
memory; other layouts are converted.

Planes may be bfloat16, which halves the memory that is moved: y, out, their tangents and their gradients. All else is
float32 then, also the arithmetic, so that each result is rounded once. Kernels for that are CUDA's; a CPU runs plain
torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpp.ops._library import define, function, ops

MEAN, REST, RSTD, TANGENT_MEAN, TANGENT_REST, COVARIANCE = range(6)  # the rows of statistics
STATISTICS, DUAL_STATISTICS = 3, 6


class Forward(NamedTuple):
    """What :func:`norm_relu_pool_forward` gives."""

    out: Tensor  # [N, C, H // 2, W // 2]
    statistics: Tensor  # [3, N, C]


class Backward(NamedTuple):
    """What :func:`norm_relu_pool_backward` gives."""

    y: Tensor  # [N, C, H, W]
    scale: Tensor  # [C]
    shift: Tensor  # [C]


class Dual(NamedTuple):
    """What :func:`norm_relu_pool_dual` gives."""

    out: Tensor  # [N, C, H // 2, W // 2]
    out_tangent: Tensor  # [N, C, H // 2, W // 2]
    statistics: Tensor  # [6, N, C]


class DualBackward(NamedTuple):
    """What :func:`norm_relu_pool_dual_backward` gives."""

    y: Tensor  # [N, C, H, W]
    y_tangent: Tensor  # [N, C, H, W]
    scale: Tensor  # [C]
    shift: Tensor  # [C]


def norm_relu_pool(y: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-5, *, fused: bool = True) -> Tensor:
    """Average-pools (2x2) the ReLU of the instance norm of y.

    The same as ``avg_pool2d(relu(group_norm(y, C, scale, shift, eps)), 2)``. An odd last row or column is normalised
    but not pooled. ReLU has derivative 0 at 0. A NaN makes its plane NaN.

    Twice differentiable in y, scale and shift; forward mode once. With ``fused=False`` any number of times.

    Args:
        y: float32, float64 or bfloat16, H and W at least 2 (and at most 32768 for compiled kernels). Channels last is
            fastest. [N, C, H, W]
        scale: float32 where y is bfloat16, else as y. [C]
        shift: as scale. [C]
        eps: added to the variance; above 0.
        fused: use the fused operator; False is the same in plain torch, differentiated by autograd.

    Returns:
        The pooled planes in y's dtype, channels last in memory if fused. [N, C, H // 2, W // 2]

    Raises:
        TypeError: not tensors, or y of another dtype.
        ValueError: shapes, dtypes or devices that do not fit y, planes below 2x2, or eps not above 0.
        RuntimeError: on a third derivative of the fused operator, and on a reverse derivative of its forward mode.
    """
    _check(y, scale, shift, eps)
    if not fused:
        z = F.group_norm(y.to(scale.dtype), y.shape[1], scale, shift, eps)
        return F.avg_pool2d(F.relu(z), 2).to(y.dtype)
    form = function(_NormReluPool, _NormReluPoolWithJvp, _NormReluPoolWithContext)
    channels_last = y.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # vmap lacks contiguous(memory_format)
    result: Tensor = form.apply(channels_last, scale, shift, eps)[0]
    return result


def _check(y: Tensor, scale: Tensor, shift: Tensor, eps: float) -> None:
    if not isinstance(y, Tensor):
        raise TypeError(f"y must be a tensor [N, C, H, W], got {type(y).__name__}")
    if y.dim() != 4 or min(y.shape[2:]) < 2:
        raise ValueError(f"y must be [N, C, H, W] with H and W at least 2, got {list(y.shape)}")
    if y.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        raise TypeError(f"y must be float32, float64 or bfloat16, got {y.dtype}; convert it with .float()")
    dtype = torch.float32 if y.dtype == torch.bfloat16 else y.dtype
    for name, value in (("scale", scale), ("shift", shift)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor [C], got {type(value).__name__}")
        if value.shape != y.shape[1:2]:
            raise ValueError(f"{name} must be [{y.shape[1]}], a value for each channel of y, got {list(value.shape)}")
        if value.dtype != dtype:
            raise ValueError(f"{name} must be {dtype} where y is {y.dtype}, got {value.dtype}")
        if value.device != y.device:
            raise ValueError(f"{name} must be on the device of y, {y.device}, got {value.device}")
    if not eps > 0:
        raise ValueError(f"eps must be above 0, got {eps}")


# ---- the faces, for code that does its own differentiation ----


def _ops(y: Tensor) -> Any:
    """The operators in use; the compiled ones of the CPU lack bfloat16, so that plain torch stands in for them."""
    lacking = y.dtype == torch.bfloat16 and y.device.type == "cpu"
    return torch.ops.ddpp_reference if lacking and ops() is torch.ops.ddpp else ops()


def norm_relu_pool_forward(
    y: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-5, *, out: Forward | None = None
) -> Forward:
    """:func:`norm_relu_pool` and the statistics that its backward needs. Autograd does not record it.

    Args:
        y, scale, shift, eps: as in :func:`norm_relu_pool`; trusted to be so.
        out: the result of an earlier call on the same shapes, to be written over; its planes must be channels last.
    """
    if out is None:
        out = Forward(_pooled_like(y), scale.new_empty(STATISTICS, *y.shape[:2]))
    _ops(y).norm_relu_pool.default(y, scale, shift, eps, *out)
    return out


def norm_relu_pool_backward(
    grad_out: Tensor,
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    statistics: Tensor,
    *,
    out: Backward | None = None,
) -> Backward:
    """The gradients of y, scale and shift from that of out. Sums over images and pixels are deterministic.

    Args:
        grad_out: [N, C, H // 2, W // 2]
        y, scale, shift: what :func:`norm_relu_pool_forward` was called with.
        statistics: what it gave. [3, N, C]
        out: as there; its planes may be y, which they are then written over.
    """
    if out is None:
        out = Backward(_planes_like(y), torch.empty_like(scale), torch.empty_like(shift))
    _ops(y).norm_relu_pool_backward.default(grad_out, y, scale, shift, statistics, *out)
    return out


def norm_relu_pool_dual(
    y: Tensor,
    y_tangent: Tensor,
    scale: Tensor,
    scale_tangent: Tensor,
    shift: Tensor,
    shift_tangent: Tensor,
    eps: float = 1e-5,
    *,
    out: Dual | None = None,
) -> Dual:
    """:func:`norm_relu_pool` on dual numbers: also the derivative along the tangents. Autograd does not record it.

    Args:
        y, scale, shift, eps: as in :func:`norm_relu_pool`; trusted to be so.
        y_tangent, scale_tangent, shift_tangent: as the values.
        out: the result of an earlier call on the same shapes, to be written over; its planes must be channels last.
            They may be parts of larger tensors, such as the two halves of one batch.
    """
    if out is None:
        out = Dual(_pooled_like(y), _pooled_like(y), scale.new_empty(DUAL_STATISTICS, *y.shape[:2]))
    _ops(y).norm_relu_pool_dual.default(y, y_tangent, scale, scale_tangent, shift, shift_tangent, eps, *out)
    return out


def norm_relu_pool_dual_backward(
    grad_out: Tensor,
    grad_out_tangent: Tensor,
    y: Tensor,
    y_tangent: Tensor,
    scale: Tensor,
    scale_tangent: Tensor,
    shift: Tensor,
    statistics: Tensor,
    *,
    out: DualBackward | None = None,
) -> DualBackward:
    """The gradients of y, its tangent, scale and shift from those of out and its tangent.

    The gradients of the tangents of scale and shift are not computed: they are those of
    :func:`norm_relu_pool_backward` at ``grad_out_tangent``.

    Args:
        grad_out, grad_out_tangent: [N, C, H // 2, W // 2]
        y, y_tangent, scale, scale_tangent, shift: what :func:`norm_relu_pool_dual` was called with.
        statistics: what it gave. [6, N, C]
        out: as there; its planes may be y and y_tangent.
    """
    if out is None:
        out = DualBackward(_planes_like(y), _planes_like(y), torch.empty_like(scale), torch.empty_like(shift))
    _ops(y).norm_relu_pool_dual_backward.default(
        grad_out, grad_out_tangent, y, y_tangent, scale, scale_tangent, shift, statistics, *out
    )
    return out


def _planes_like(y: Tensor) -> Tensor:
    return torch.empty_like(y, memory_format=torch.channels_last)


def _pooled_like(y: Tensor) -> Tensor:
    n, c, h, w = y.shape
    return torch.empty((n, c, h // 2, w // 2), dtype=y.dtype, device=y.device, memory_format=torch.channels_last)


# ---- the meaning, in plain torch; bfloat16 planes are promoted where they meet a float32 statistic ----


def _mean(x: Tensor) -> Tensor:
    return x.mean((2, 3))  # [N, C]


def _planes(x: Tensor) -> Tensor:
    """A value for each plane, [N, C], or for each channel, [C], as one for each pixel."""
    return x[..., None, None]


def _deviation(x: Tensor, mean: Tensor, rest: Tensor) -> Tensor:
    """x - mean - rest: precise also where the mean is large, of which rest is what its dtype cannot hold."""
    return (x - _planes(mean)) - _planes(rest)


def _mean_in_parts(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = _mean(x)
    return mean, _mean(x - _planes(mean))


def _where_active(z: Tensor, x: Tensor) -> Tensor:
    return torch.where(z <= 0, 0, x)  # a NaN is active


def _spread(grad_out: Tensor, z: Tensor) -> Tensor:
    """The gradient of the pooled planes, [N, C, H // 2, W // 2], as that of the planes z, [N, C, H, W]."""
    grad = (grad_out.to(z.dtype) * 0.25).repeat_interleave(2, 2).repeat_interleave(2, 3)
    return F.pad(grad, (0, z.shape[3] % 2, 0, z.shape[2] % 2))


@define("norm_relu_pool(Tensor y, Tensor scale, Tensor shift, float eps, Tensor(a!) out, Tensor(b!) statistics) -> ()")
def _forward(y: Tensor, scale: Tensor, shift: Tensor, eps: float, out: Tensor, statistics: Tensor) -> None:
    mean, rest = _mean_in_parts(y.to(scale.dtype))
    deviation = _deviation(y, mean, rest)
    rstd = (_mean(deviation.square()) + eps).rsqrt()
    z = deviation * _planes(scale * rstd) + _planes(shift)
    out.copy_(F.avg_pool2d(z.relu(), 2))
    statistics.copy_(torch.stack([mean, rest, rstd]))


@define(
    "norm_relu_pool_backward(Tensor grad_out, Tensor y, Tensor scale, Tensor shift, Tensor statistics, "
    "Tensor(a!) grad_y, Tensor(b!) grad_scale, Tensor(c!) grad_shift) -> ()"
)
def _backward(
    grad_out: Tensor,
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    statistics: Tensor,
    grad_y: Tensor,
    grad_scale: Tensor,
    grad_shift: Tensor,
) -> None:
    mean, rest, rstd = statistics
    xh = _deviation(y, mean, rest) * _planes(rstd)
    z = xh * _planes(scale) + _planes(shift)
    v = _where_active(z, _spread(grad_out, z))
    w = v * _planes(scale)
    grad_y.copy_((w - _planes(_mean(w)) - xh * _planes(_mean(w * xh))) * _planes(rstd))
    grad_scale.copy_((v * xh).sum((0, 2, 3)))
    grad_shift.copy_(v.sum((0, 2, 3)))


@define(
    "norm_relu_pool_dual(Tensor y, Tensor y_tangent, Tensor scale, Tensor scale_tangent, Tensor shift, "
    "Tensor shift_tangent, float eps, Tensor(a!) out, Tensor(b!) out_tangent, Tensor(c!) statistics) -> ()"
)
def _dual(
    y: Tensor,
    y_tangent: Tensor,
    scale: Tensor,
    scale_tangent: Tensor,
    shift: Tensor,
    shift_tangent: Tensor,
    eps: float,
    out: Tensor,
    out_tangent: Tensor,
    statistics: Tensor,
) -> None:
    _forward(y, scale, shift, eps, out, statistics[:STATISTICS])
    mean, rest, rstd = statistics[:STATISTICS]
    xh = _deviation(y, mean, rest) * _planes(rstd)
    tangent_mean, tangent_rest = _mean_in_parts(y_tangent.to(scale.dtype))
    deviation = _deviation(y_tangent, tangent_mean, tangent_rest)
    covariance = _mean(xh * deviation)
    xh_tangent = (deviation - xh * _planes(covariance)) * _planes(rstd)
    z = xh * _planes(scale) + _planes(shift)
    z_tangent = xh * _planes(scale_tangent) + xh_tangent * _planes(scale) + _planes(shift_tangent)
    out_tangent.copy_(F.avg_pool2d(_where_active(z, z_tangent), 2))
    statistics[STATISTICS:].copy_(torch.stack([tangent_mean, tangent_rest, covariance]))


@define(
    "norm_relu_pool_dual_backward(Tensor grad_out, Tensor grad_out_tangent, Tensor y, Tensor y_tangent, Tensor scale, "
    "Tensor scale_tangent, Tensor shift, Tensor statistics, Tensor(a!) grad_y, Tensor(b!) grad_y_tangent, "
    "Tensor(c!) grad_scale, Tensor(d!) grad_shift) -> ()"
)
def _dual_backward(
    grad_out: Tensor,
    grad_out_tangent: Tensor,
    y: Tensor,
    y_tangent: Tensor,
    scale: Tensor,
    scale_tangent: Tensor,
    shift: Tensor,
    statistics: Tensor,
    grad_y: Tensor,
    grad_y_tangent: Tensor,
    grad_scale: Tensor,
    grad_shift: Tensor,
) -> None:
    mean, rest, rstd, tangent_mean, tangent_rest, covariance = statistics
    r, m = _planes(rstd), _planes(covariance)
    xh = _deviation(y, mean, rest) * r
    deviation = _deviation(y_tangent, tangent_mean, tangent_rest)
    xh_tangent = (deviation - xh * m) * r
    z = xh * _planes(scale) + _planes(shift)
    u, v = _where_active(z, _spread(grad_out, z)), _where_active(z, _spread(grad_out_tangent, z))
    w = v * _planes(scale)
    q = _planes(_mean(w * xh))
    grad_y_tangent.copy_((w - _planes(_mean(w)) - xh * q) * r)
    t = u * _planes(scale) + v * _planes(scale_tangent) - w * m * r - deviation * q * r
    grad_y.copy_((t - _planes(_mean(t)) - xh * _planes(_mean(t * xh) + _mean(w * xh_tangent))) * r)
    grad_scale.copy_((u * xh + v * xh_tangent).sum((0, 2, 3)))
    grad_shift.copy_(u.sum((0, 2, 3)))


# ---- derivatives ----


def _in_channels(
    inputs: tuple[int, ...], outputs: tuple[int, ...]
) -> Callable[[type[torch.autograd.Function]], type[torch.autograd.Function]]:
    """Decorator that gives a Function its vmap: channels are independent, so the mapped dimension joins them.

    Args:
        inputs: the axis of the channels in each of the Function's tensors, which come before its other arguments.
        outputs: the same for its results.
    """

    def vmap(function: Any, info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        size = info.batch_size
        folded = []
        for x, dim, axis in zip(arguments, in_dims, inputs, strict=False):
            x = x.expand(size, *x.shape).movedim(0, axis) if dim is None else x.movedim(dim, axis)
            folded.append(x.flatten(axis, axis + 1))
        results = function.apply(*folded, *arguments[len(inputs) :])
        return tuple(x.unflatten(axis, (size, -1)) for x, axis in zip(results, outputs, strict=True)), outputs

    def decorate(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
        function.vmap = staticmethod(lambda *arguments: vmap(function, *arguments))  # type: ignore[method-assign]
        # apply binds its arguments through inspect.signature at each call; a stored one saves microseconds.
        function.forward.__signature__ = inspect.signature(function.forward)  # type: ignore[attr-defined]
        return function

    return decorate


@_in_channels(inputs=(1, 1, 1, 0, 0, 0, 0), outputs=(1, 1, 0, 0))
class _DoubleBackward(torch.autograd.Function):
    """The gradients of (grad_out, y, scale, shift) from the cotangents of the gradients of y, scale and shift."""

    @staticmethod
    def forward(
        grad_out: Tensor,
        y: Tensor,
        y_cotangent: Tensor,
        scale: Tensor,
        scale_cotangent: Tensor,
        shift: Tensor,
        shift_cotangent: Tensor,
        eps: float,
    ) -> tuple[Tensor, ...]:
        dual = norm_relu_pool_dual(y, y_cotangent, scale, scale_cotangent, shift, shift_cotangent, eps)
        grads = norm_relu_pool_dual_backward(
            torch.zeros_like(grad_out),
            grad_out,
            y,
            y_cotangent,
            scale,
            scale_cotangent,
            shift,
            dual.statistics,
        )
        return dual.out_tangent, grads.y, grads.scale, grads.shift

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("norm_relu_pool has no third derivative in its fused form; pass fused=False")


@_in_channels(inputs=(1, 1, 0, 0, 2), outputs=(1, 0, 0))
class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(
        grad_out: Tensor, y: Tensor, scale: Tensor, shift: Tensor, statistics: Tensor, eps: float
    ) -> tuple[Tensor, ...]:
        return tuple(norm_relu_pool_backward(grad_out, y, scale, shift, statistics))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *arguments, _, ctx.eps = inputs
        ctx.save_for_backward(*arguments)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        grad_out, y, scale, shift = ctx.saved_tensors
        of_y, of_scale, of_shift = cotangents
        grads = _DoubleBackward.apply(grad_out, y, of_y, scale, of_scale, shift, of_shift, ctx.eps)
        return *grads, None, None


@_in_channels(inputs=(1, 1, 0, 0, 0, 0), outputs=(1,))
class _Tangent(torch.autograd.Function):
    """The tangent alone, as a Function of its own, so that differentiating it raises instead of giving zeros."""

    @staticmethod
    def forward(
        y: Tensor,
        y_tangent: Tensor,
        scale: Tensor,
        scale_tangent: Tensor,
        shift: Tensor,
        shift_tangent: Tensor,
        eps: float,
    ) -> tuple[Tensor]:
        return (norm_relu_pool_dual(y, y_tangent, scale, scale_tangent, shift, shift_tangent, eps).out_tangent,)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "norm_relu_pool has no reverse derivative of its forward mode in its fused form; pass fused=False"
        )


@_in_channels(inputs=(1, 0, 0), outputs=(1, 2))
class _NormReluPool(torch.autograd.Function):
    @staticmethod
    def forward(y: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, ...]:
        return tuple(norm_relu_pool_forward(y, scale, shift, eps))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        y, scale, shift, ctx.eps = inputs
        ctx.set_materialize_grads(False)  # statistics have none
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(y, scale, shift, output[1])
        ctx.save_for_forward(y, scale, shift)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, _: Any) -> Any:
        if grad_out is None:
            return None, None, None, None
        if torch.is_grad_enabled():
            return *_Backward.apply(grad_out, *ctx.saved_tensors, ctx.eps), None
        # A Function costs microseconds; nothing is recorded where gradients are off.
        return *norm_relu_pool_backward(grad_out, *ctx.saved_tensors), None


class _NormReluPoolWithJvp(_NormReluPool):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, None]:
        pairs = []
        for value, tangent in zip(ctx.saved_tensors, tangents, strict=False):
            pairs += [value, torch.zeros_like(value) if tangent is None else tangent]
        return _Tangent.apply(*pairs, ctx.eps)[0], None


class _NormReluPoolWithContext(torch.autograd.Function):
    """The same in the form that costs less; see :func:`ddpp.ops._library.function`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Any:
        output = tuple(norm_relu_pool_forward(y, scale, shift, eps))
        _NormReluPool.setup_context(ctx, (y, scale, shift, eps), output)
        return output

    backward = _NormReluPool.backward
    jvp = _NormReluPoolWithJvp.jvp
