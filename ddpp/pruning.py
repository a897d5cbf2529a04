"""Rules that leave parameters out of the matching distance.

| rule | left out | source |
|---|---|---|
| ratio | student / target or target / student below epsilon | DDPP, arXiv 2209.14609 |
| none | nothing | MTT, arXiv 2203.11932 |
| difference | the share furthest from the target | DPD, PMLR 304:415-430, by the abstract: its code is not public |
| lowest | the share nearest to the target | PAD, arXiv 2408.03360, by loss |
| depth | the first share, layer after layer | PAD, by depth |

The first two are one fused operator; the others are a mask [P] that is a constant of the loss.
:class:`Importance` gives each parameter that a rule keeps a learned weight.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from ddpp.errors import UserError, nearest
from ddpp.models.flat import Layout, size
from ddpp.ops import masked_match_loss

RULES = ("ratio", "none", "difference", "lowest", "depth")

Distance = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def distance(rule: str, layout: Layout, *, epsilon: float = 0.1, share: float = 0.25, fused: bool = True) -> Distance:
    """The distance of student and target relative to start and target over the parameters that a rule keeps.

    Args:
        rule: one of :data:`RULES`.
        layout: of the parameters.
        epsilon: bound of ``ratio``.
        share: of the parameters, left out by ``difference``, ``lowest`` and ``depth``; their number is rounded down.
        fused: compiled kernels for ``ratio`` and ``none``.

    Returns:
        From (student, target, start), each [P], to (loss [], kept [] int64); first derivative by the student.

    Raises:
        UserError: an unknown rule, or a share that leaves nothing.
    """
    if rule not in RULES:
        raise UserError(f"unknown pruning rule {rule!r}{nearest(rule, RULES)} Known: {', '.join(RULES)}")
    if not 0 <= share < 1:
        raise UserError(f"the share that is pruned must be at least 0 and below 1, got {share}")
    if rule in ("ratio", "none"):
        bound = epsilon if rule == "ratio" else None
        return lambda student, target, start: masked_match_loss(student, target, start, bound, fused=fused)
    if rule == "depth":
        masks = cache(partial(keep_deep, layout, share))
        return lambda student, target, start: masked_distance(student, target, start, masks(student.device))
    return partial(_by_difference, share=share, furthest=rule == "difference")


def masked_distance(student: Tensor, target: Tensor, start: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """|mask (student - target)|^2 / |mask (start - target)|^2 and the number kept, 0 where the denominator is. [], []

    Args:
        mask: True where a parameter counts. [P] bool
    """
    far = (student - target).masked_fill(~mask, 0)
    span = (start - target).masked_fill(~mask, 0)
    denominator = torch.dot(span, span).double()
    degenerate = denominator == 0
    loss = torch.dot(far, far) / denominator.masked_fill(degenerate, torch.inf)
    return loss.to(student.dtype), mask.sum().masked_fill(degenerate, 0)


class Importance:
    """A learned weight for each parameter in the distance, as IADD (arXiv 2401.15863) by its abstract: its code is not
    public.

    With a = (student - target)^2, b = (start - target)^2 and the kept parameters' weights w, the loss is
    L = sum w a / sum w b. Parameters that match worse than the whole does (a > L b) lose weight, the others gain it.

    Args:
        keep: from (student, target), each [P], to what a rule keeps. [P] bool
        weights: positive. [P]
    """

    def __init__(self, keep: Callable[[Tensor, Tensor], Tensor], weights: Tensor) -> None:
        self.keep, self.weights = keep, weights
        self._change = torch.zeros_like(weights)

    def distance(self, student: Tensor, target: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """As what :func:`distance` returns, weighted."""
        mask = self.keep(student.detach(), target)
        root = self.weights.sqrt()
        loss, kept = masked_distance(root * student, root * target, root * start, mask)
        with torch.no_grad():
            far, span = ((x - target).square().masked_fill(~mask, 0) for x in (student, start))
            denominator = (self.weights * span).mean()
            self._change = torch.where(kept > 0, (far - loss * span) / denominator, 0)
        return loss, kept

    def learned(self, lr: float) -> Tensor:
        """The weights after a step against the last distance's derivative by their logarithms, of mean 1. [P]"""
        moved = self.weights * (-lr * self.weights * self._change).exp()
        return moved / moved.mean()


def keep(rule: str, layout: Layout, *, epsilon: float = 0.1, share: float = 0.25) -> Callable[[Tensor, Tensor], Tensor]:
    """What a rule keeps, as a function of (student, target), each [P]; arguments as for :func:`distance`. [P] bool"""
    if rule == "ratio":
        return partial(keep_by_ratio, epsilon=epsilon)
    if rule in ("difference", "lowest"):
        return partial(keep_by_difference, share=share, furthest=rule == "difference")
    mask = keep_deep(layout, share if rule == "depth" else 0.0)
    return lambda student, target: mask.to(student.device)


def keep_by_ratio(student: Tensor, target: Tensor, epsilon: float) -> Tensor:
    """True where student / target and target / student are at least epsilon, at 0 / 0 and at a NaN. [P] bool"""
    small, large = torch.minimum(student.abs(), target.abs()), torch.maximum(student.abs(), target.abs())
    return ~((student.sign() != target.sign()) | (small < epsilon * large)) | student.isnan() | target.isnan()


def keep_by_difference(student: Tensor, target: Tensor, share: float, *, furthest: bool) -> Tensor:
    """True but for the share of the parameters that is furthest from the target, or nearest to it. [P] bool

    A NaN counts as furthest and is never left out, so that divergence shows.
    """
    difference = (student - target).abs()
    dropped = int(share * difference.numel())
    order = difference.nan_to_num(nan=torch.inf).argsort(descending=furthest, stable=True)
    keep = torch.ones_like(difference, dtype=torch.bool)
    keep[order[:dropped]] = False
    return keep | difference.isnan()


def keep_deep(layout: Layout, share: float, device: torch.device | None = None) -> Tensor:
    """False for the first share of the parameters, which lie in the order of the layers. [P] bool"""
    count = size(layout)
    return torch.arange(count, device=device) >= int(share * count)


def _by_difference(
    student: Tensor, target: Tensor, start: Tensor, *, share: float, furthest: bool
) -> tuple[Tensor, Tensor]:
    mask = keep_by_difference(student.detach(), target, share, furthest=furthest)
    return masked_distance(student, target, start, mask)
