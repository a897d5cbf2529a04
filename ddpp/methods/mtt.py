"""MTT: matching training trajectories, the distance over all parameters (arXiv 2203.11932)."""

from __future__ import annotations

from ddpp.methods import METHODS, Problem
from ddpp.methods.ddpp import DDPP


@METHODS.register("mtt")
class MTT(DDPP):
    """DDPP that prunes nothing."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.epsilon = None
