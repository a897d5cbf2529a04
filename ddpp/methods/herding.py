"""Herding: real images whose mean embedding follows the class's (Welling 2009; iCaRL, arXiv 1611.07725)."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpp.config import Config
from ddpp.methods import METHODS, Problem
from ddpp.methods._real import choose_by_class, embedder, trained_network
from ddpp.synthetic import Synthetic


@METHODS.register("herding")
class Herding:
    """The next image of a class is the one that brings the mean of those chosen nearest to the mean of all."""

    needs_teachers = False
    learns_labels = False

    @staticmethod
    def check(config: Config) -> None:
        """Every configuration suits."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def choose(self) -> Synthetic:
        embedded, ipc = embedder(trained_network(self.problem), self.problem), self.problem.config.distill.ipc
        return choose_by_class(self.problem, lambda members: herd(embedded(members), ipc))


def herd(embeddings: Tensor, count: int) -> Tensor:
    """Positions of ``count`` rows [n, F] in the order of choice, none twice. [count]"""
    mean, total = embeddings.mean(0), torch.zeros_like(embeddings[0])
    chosen: list[int] = []
    for k in range(1, count + 1):
        distances = ((total + embeddings) / k - mean).square().sum(1)
        distances[chosen] = torch.inf
        chosen.append(int(distances.argmin()))
        total = total + embeddings[chosen[-1]]
    return torch.tensor(chosen)
