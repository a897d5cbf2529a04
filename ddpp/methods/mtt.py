"""MTT: matching training trajectories, the distance over all parameters (arXiv 2203.11932)."""

from __future__ import annotations

from ddpp import pruning
from ddpp.methods import METHODS
from ddpp.methods.ddpp import DDPP
from ddpp.pruning import Distance


@METHODS.register("mtt")
class MTT(DDPP):
    """DDPP that prunes nothing."""

    def _distance(self) -> Distance:
        return pruning.distance("none", (), fused=self.problem.config.run.use_fused_kernels)
