"""Forgetting: real images that training learns and forgets most often (Toneva et al., arXiv 1812.05159)."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpp.config import Config
from ddpp.methods import METHODS, Problem
from ddpp.methods._real import choose_by_class, right, trained_network
from ddpp.synthetic import Synthetic


@METHODS.register("forgetting")
class Forgetting:
    """Counts, over the epochs of one training, how often an image goes from right to wrong.

    All images are classified after each epoch (the paper looks at a batch before it trains on it). One that was never
    right counts as forgotten once more than any other; equal counts stay in the data set's order.
    """

    needs_teachers = False
    learns_labels = False

    @staticmethod
    def check(config: Config) -> None:
        """Every configuration suits."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def choose(self) -> Synthetic:
        history: list[Tensor] = []
        trained_network(self.problem, lambda network: history.append(right(network, self.problem)))
        counts = forgotten(torch.stack(history))
        return choose_by_class(self.problem, lambda members: counts[members].argsort(descending=True, stable=True))


def forgotten(history: Tensor) -> Tensor:
    """How often each image was forgotten, from whether it was right after each epoch, [E, N] bool. [N] int64"""
    counts = (history[:-1] & ~history[1:]).sum(0)
    never = ~history.any(0)
    return torch.where(never, counts.amax() + 1, counts)
