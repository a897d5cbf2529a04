"""Rules that leave parameters out of the matching distance.

| rule | left out | source |
|---|---|---|
| ratio | student / target or target / student below epsilon | DDPP, arXiv 2209.14609 |
| none | nothing | MTT, arXiv 2203.11932 |
| difference | the share furthest from the target | DPD, PMLR 304:415-430, by the abstract: its code is not public |
| lowest | the share nearest to the target | PAD, arXiv 2408.03360, by loss |
| depth | the first share of the layers | PAD, by depth |

The first two are one fused operator; the others are a mask [P] that is a constant of the loss.
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
        share: left out by ``difference`` and ``lowest`` of the parameters, by ``depth`` of the layers, rounded down.
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
    """False for the parameters of the first share of the layers. [P] bool"""
    layers = list(dict.fromkeys(_layer(name) for name, _ in layout))
    shallow = set(layers[: int(share * len(layers))])
    parts = [torch.full((size(((name, shape),)),), _layer(name) not in shallow) for name, shape in layout]
    return torch.cat(parts).to(device)


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def _by_difference(
    student: Tensor, target: Tensor, start: Tensor, *, share: float, furthest: bool
) -> tuple[Tensor, Tensor]:
    mask = keep_by_difference(student.detach(), target, share, furthest=furthest)
    return masked_distance(student, target, start, mask)
