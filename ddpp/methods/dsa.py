"""DSA: gradient matching under differentiable Siamese augmentation (Zhao and Bilen, arXiv 2102.08259)."""

from __future__ import annotations

from ddpp.methods import METHODS
from ddpp.methods.dc import DC


@METHODS.register("dsa")
class DSA(DC):
    """DC with augmentation: one draw for the real and synthetic images of a class, one an image for the network's."""

    augments = True
