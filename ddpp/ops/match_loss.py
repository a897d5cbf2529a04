"""The masked trajectory-matching loss of DDPP and MTT, over flat parameter vectors [P]."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor

from ddpp.ops._library import define, function, ops


def masked_match_loss(
    student: Tensor, target: Tensor, start: Tensor, epsilon: float | None = 0.1, *, fused: bool = True
) -> tuple[Tensor, Tensor]:
    r"""Squared distance from the student to the target over that from the start, on the parameters kept.

    .. math:: \frac{\sum_x m_x (student_x - target_x)^2}{\sum_x m_x (start_x - target_x)^2}

    Parameter x is pruned (m = 0) when student/target < epsilon or target/student < epsilon. No division is
    done: opposite signs and a zero against a non-zero are pruned, 0/0 is kept, and a NaN is never pruned, so
    that divergence shows. The mask is a constant of the derivative.

    Where the denominator is 0, or nothing is kept, loss, gradient and kept are 0 (a NaN stays a NaN): such a
    step says nothing and should be skipped.

    Differentiable once, in ``student``; forward mode too. With ``fused=False`` any number of times.

    Args:
        student: parameters after the inner steps, [P], float32 or float64.
        target: the later teacher point, as student; a constant.
        start: the earlier teacher point, as student; a constant.
        epsilon: 0 < epsilon <= 1, or None to prune nothing (MTT).
        fused: use the fused operator; False is the same in plain torch, differentiated by autograd.

    Returns:
        The loss, a scalar of the vectors' dtype (compiled kernels accumulate in float64), and the number of
        parameters kept, an int64 scalar. Both are on the vectors' device, which is not waited for.

    Raises:
        TypeError: not tensors, or not float32 or float64.
        ValueError: another shape, dtype or device than the student's, epsilon out of range, or a constant
            that requires grad.
        RuntimeError: on a second derivative of the fused operator.

    Source: DDPP's masked matching loss; with ``epsilon=None`` that of MTT (Cazenavette et al., arXiv
    2203.11932, eq. 2).
    """
    _check(student, target, start, epsilon)
    if not fused:
        loss, kept, _ = _match_loss(student, target, start, epsilon)
    else:
        form = function(_MatchLoss, _MatchLossWithJvp, _MatchLossWithContext)
        loss, kept, _ = form.apply(student, target, start, epsilon)
    return loss, kept


def _check(student: Tensor, target: Tensor, start: Tensor, epsilon: float | None) -> None:
    for name, value in (("student", student), ("target", target), ("start", start)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor [P], got {type(value).__name__}")
        if name == "student":
            if value.dim() != 1:
                raise ValueError(f"student must be a flat vector [P], got shape {list(value.shape)}; use .flatten()")
            if value.dtype not in (torch.float32, torch.float64):
                raise TypeError(f"student must be float32 or float64, got {value.dtype}; convert it with .float()")
            continue
        if value.shape != student.shape:
            raise ValueError(f"{name} must have the shape of student {list(student.shape)}, got {list(value.shape)}")
        if value.dtype != student.dtype:
            raise ValueError(f"{name} must have the dtype of student {student.dtype}, got {value.dtype}")
        if value.device != student.device:
            raise ValueError(f"{name} must be on the device of student, {student.device}, got {value.device}")
        if value.requires_grad:
            raise ValueError(f"{name} is a constant of the loss but requires grad; pass {name}.detach()")
    if epsilon is not None and not 0 < epsilon <= 1:
        raise ValueError(f"epsilon must satisfy 0 < epsilon <= 1, or be None to prune nothing, got {epsilon}")


def _prune(student: Tensor, target: Tensor, epsilon: float) -> Tensor:
    """True where pruned, [P]. Comparisons with a NaN are false."""
    low, high = torch.minimum(student, target), torch.maximum(student, target)
    signs_differ = torch.sign(low) < torch.sign(high)  # also where epsilon * x underflows
    return ((low < epsilon * high) & (high > epsilon * low)).logical_or_(signs_differ)


@define("match_loss(Tensor student, Tensor target, Tensor start, float? epsilon) -> (Tensor, Tensor, Tensor)")
def _match_loss(student: Tensor, target: Tensor, start: Tensor, epsilon: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, number kept and denominator (float64; infinite in place of 0)."""
    far, span = student - target, start - target  # [P]
    if epsilon is None:
        kept = torch.full((), student.numel(), dtype=torch.int64, device=student.device)
    else:
        pruned = _prune(student.detach(), target, epsilon)
        far, span = far.masked_fill(pruned, 0), span.masked_fill(pruned, 0)
        kept = student.numel() - pruned.sum()
    denominator = torch.dot(span, span).double()
    degenerate = denominator == 0
    denominator = denominator.masked_fill(degenerate, math.inf)
    return (torch.dot(far, far) / denominator).to(student.dtype), kept.masked_fill(degenerate, 0), denominator


@define("match_loss_backward(Tensor grad, Tensor denominator, Tensor student, Tensor target, float? epsilon) -> Tensor")
def _match_loss_backward(
    grad: Tensor, denominator: Tensor, student: Tensor, target: Tensor, epsilon: float | None
) -> Tensor:
    slope = (student - target) * (2 * grad / denominator).to(student.dtype)
    return slope if epsilon is None else slope.masked_fill_(_prune(student, target, epsilon), 0)


class _Gradient(torch.autograd.Function):
    """The gradient as a Function of its own, so that its derivative is refused and not silently zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, denominator: Tensor, student: Tensor, target: Tensor, epsilon: float | None) -> Tensor:
        return ops().match_loss_backward.default(grad, denominator, student, target, epsilon)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("masked_match_loss has no second derivative in its fused form; pass fused=False")


class _MatchLoss(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(student: Tensor, target: Tensor, start: Tensor, epsilon: float | None) -> tuple[Tensor, ...]:
        return ops().match_loss.default(student, target, start, epsilon)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        student, target, _, ctx.epsilon = inputs
        _, kept, denominator = output
        ctx.mark_non_differentiable(kept, denominator)
        ctx.set_materialize_grads(False)  # these two have none
        ctx.save_for_backward(student, target, denominator)
        ctx.save_for_forward(student, target, denominator)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, None, None, None]:
        if grad is None:
            return None, None, None, None
        student, target, denominator = ctx.saved_tensors
        # Where no graph is recorded nobody can differentiate the gradient; a Function costs microseconds.
        gradient = _Gradient.apply if torch.is_grad_enabled() else ops().match_loss_backward.default
        return gradient(grad, denominator, student, target, ctx.epsilon), None, None, None


class _MatchLossWithJvp(_MatchLoss):
    @staticmethod
    def jvp(ctx: Any, tangent: Tensor | None, *constants: Any) -> tuple[Tensor, None, None]:
        if tangent is None or any(t is not None for t in constants):
            raise RuntimeError("target and start are constants of masked_match_loss, but have a tangent; detach them")
        student, target, denominator = ctx.saved_tensors
        one = torch.ones((), dtype=student.dtype, device=student.device)
        return torch.dot(_Gradient.apply(one, denominator, student, target, ctx.epsilon), tangent), None, None


class _MatchLossWithContext(torch.autograd.Function):
    """The same in the form that costs less; see :func:`ddpp.ops._library.function`."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, target: Tensor, start: Tensor, epsilon: float | None) -> tuple[Tensor, ...]:
        output = _MatchLoss.forward(student, target, start, epsilon)
        _MatchLoss.setup_context(ctx, (student, target, start, epsilon), output)
        return output

    backward = _MatchLoss.backward
    jvp = _MatchLossWithJvp.jvp


# Function.apply binds its arguments through inspect.signature at each call; a stored one saves microseconds.
for _forward in (_Gradient.forward, _MatchLoss.forward):
    setattr(_forward, "__signature__", inspect.signature(_forward))  # noqa: B010
