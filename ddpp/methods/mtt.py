"""MTT: matching training trajectories, the distance over all parameters (arXiv 2203.11932)."""

from __future__ import annotations

from ddpp.config import Config
from ddpp.errors import UserError
from ddpp.methods import METHODS
from ddpp.methods.ddpp import DDPP


@METHODS.register("mtt")
class MTT(DDPP):
    """DDPP that prunes nothing."""

    rule = "none"

    @staticmethod
    def check(config: Config) -> None:
        """Refuses a rule of pruning, besides what DDPP refuses of starts.

        Raises:
            UserError: it is there.
        """
        if config.distill.prune not in ("ratio", "none"):  # ratio is what stands there unasked
            raise UserError(f"--prune {config.distill.prune} needs --method ddpp: mtt prunes nothing")
        DDPP.check_starts(config)
