"""k-center: real images that leave none of their class far away (Sener and Savarese, arXiv 1708.00489)."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpp.config import Config
from ddpp.methods import METHODS, Problem
from ddpp.methods._real import choose_by_class, embedder, trained_network
from ddpp.synthetic import Synthetic


@METHODS.register("kcenter")
class KCenter:
    """The greedy rule: first the image nearest to the class's mean, then always the one farthest from all chosen."""

    needs_teachers = False
    learns_labels = False

    @staticmethod
    def check(config: Config) -> None:
        """Every configuration suits."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def choose(self) -> Synthetic:
        embedded, ipc = embedder(trained_network(self.problem), self.problem), self.problem.config.distill.ipc
        return choose_by_class(self.problem, lambda members: centers(embedded(members), ipc))


def centers(embeddings: Tensor, count: int) -> Tensor:
    """Positions of ``count`` rows [n, F] in the order of choice. [count]"""
    chosen = [int((embeddings - embeddings.mean(0)).square().sum(1).argmin())]
    nearest = torch.full((len(embeddings),), torch.inf)
    while len(chosen) < count:
        nearest = torch.minimum(nearest, (embeddings - embeddings[chosen[-1]]).square().sum(1))
        nearest[chosen] = -torch.inf  # also where images are equal, none is chosen twice
        chosen.append(int(nearest.argmax()))
    return torch.tensor(chosen)
