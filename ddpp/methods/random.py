"""Random real images."""

from __future__ import annotations

import torch

from ddpp import seeds
from ddpp.config import Config
from ddpp.methods import METHODS, Problem
from ddpp.methods._real import choose_by_class
from ddpp.synthetic import Synthetic


@METHODS.register("random")
class Random:
    """One draw is the run's file; its figures, like those beside every method, are over a draw for each network."""

    needs_teachers = False
    learns_labels = False

    @staticmethod
    def check(config: Config) -> None:
        """Every configuration suits."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def choose(self) -> Synthetic:
        draw = seeds.generator(self.problem.config.run.seed, "random selection")
        return choose_by_class(self.problem, lambda members: torch.randperm(len(members), generator=draw))
