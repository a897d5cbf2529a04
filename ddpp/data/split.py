"""Holding out a share of each class."""

from __future__ import annotations

import torch
from torch import Tensor


def stratified(labels: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices of two parts, in ascending order; the second gets ``share`` of each class, rounded.

    With a share above 0, a class of two images or more has one at least in either part.
    """
    first, second = [], []
    for label in labels.unique():
        members = torch.nonzero(labels == label).flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        held_out = round(share * len(members))
        if share > 0:
            held_out = min(max(held_out, 1), len(members) - 1)
        second.append(members[:held_out])
        first.append(members[held_out:])
    return torch.cat(first).sort().values, torch.cat(second).sort().values
