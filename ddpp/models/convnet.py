"""ConvNet: equal blocks of convolution, normalisation, activation and pooling.

Source: Gidaris and Komodakis (arXiv 1804.09458), as dataset distillation uses it since Zhao, Mopuri and Bilen
(arXiv 2006.05929).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn

from ddpp.config import ModelConfig
from ddpp.errors import UserError
from ddpp.models.base import MODELS, Network, Shape, choose, first_convolution, instance_norm

NAMES = ("convnet", "convnet-kip")  # which follow all options of the configuration
_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leakyrelu": nn.LeakyReLU,
    "sigmoid": nn.Sigmoid,
    "swish": nn.SiLU,
}
_POOLINGS: dict[str, Callable[[], nn.Module]] = {
    "avg": lambda: nn.AvgPool2d(2),
    "max": lambda: nn.MaxPool2d(2),
    "none": nn.Identity,
}
_NORMS: dict[str, Callable[[int, int], nn.Module]] = {
    "instance": lambda width, size: instance_norm(width),
    "group": lambda width, size: nn.GroupNorm(4, width),
    "layer": lambda width, size: nn.LayerNorm([width, size, size]),
    "batch": lambda width, size: nn.BatchNorm2d(width),
    "none": lambda width, size: nn.Identity(),
}


def default_depth(size: int) -> int:
    """Blocks for images of ``size`` pixels a side: 3 at 28 and 32, one more at each doubling, 2 below."""
    return max(2, round(math.log2(size)) - 2)


@MODELS.register("convnet")
def convnet(config: ModelConfig, shape: Shape, classes: int) -> Network:
    """The ConvNet of ``config``'s depth, width, norm, activation and pooling.

    Raises:
        UserError: more poolings than the image has halvings, or a width that groups of 4 do not divide.
    """
    first, size = first_convolution(shape, config.width, kernel=3)
    return _convnet(config, [], first, size, classes)


@MODELS.register("convnet-kip")
def convnet_kip(config: ModelConfig, shape: Shape, classes: int) -> Network:
    """The ConvNet with a convolution and an activation before its blocks, as KIP's networks have (arXiv 2107.13034).

    Raises:
        UserError: as :func:`convnet`.
    """
    first, size = first_convolution(shape, config.width, kernel=3)
    before = [first, choose("activation", _ACTIVATIONS, config.activation)()]
    return _convnet(config, before, _convolution(config.width), size, classes)


def _convolution(width: int) -> nn.Conv2d:
    return nn.Conv2d(width, width, 3, padding=1)


def _convnet(config: ModelConfig, before: list[nn.Module], first: nn.Conv2d, size: int, classes: int) -> Network:
    """The blocks, whose first convolution is given, after what comes before them; ``size`` pixels a side."""
    depth = config.depth or default_depth(size)
    if config.pooling != "none" and size >> depth < 1:
        most = int(math.log2(size))
        advice = f"Take a depth of at most {most}, larger images" if most else "Take larger images"
        raise UserError(f"depth {depth} pools images of {size} pixels below one pixel. {advice} or no pooling.")
    if config.norm == "group" and config.width % 4:
        raise UserError(f"width must be divisible by 4, the groups of the normalisation, got {config.width}")
    layers = before
    for block in range(depth):
        layers += [
            _convolution(config.width) if block else first,
            choose("norm", _NORMS, config.norm)(config.width, size),
            choose("activation", _ACTIVATIONS, config.activation)(),
            choose("pooling", _POOLINGS, config.pooling)(),
        ]
        size = size if config.pooling == "none" else size // 2
    return Network(nn.Sequential(*layers), config.width * size * size, classes)
