"""LeNet-5 for small images, as dataset distillation uses it: with ReLU and max pooling."""

from __future__ import annotations

from torch import nn

from ddpp.config import ModelConfig
from ddpp.errors import UserError
from ddpp.models.base import MODELS, Network, Shape, border

_PADDED_BELOW = 12  # pixels: the convolutions would leave too few of them


@MODELS.register("lenet")
def lenet(config: ModelConfig, shape: Shape, classes: int) -> Network:
    """Two 5x5 convolutions, each with a pooling, and two layers of 120 and 84 under the classifier.

    Convolutions have no padding, but where one-channel images of 28 pixels come in, as the first network's did, and
    where planes are small.
    """
    width, size, _ = shape
    layers: list[nn.Module] = []
    if size < 4:
        raise UserError(f"lenet halves the image twice and needs 4 pixels a side or more, got {size}")
    for wider in (6, 16):
        padding = 2 if size < _PADDED_BELOW else border(width, size)
        layers += [nn.Conv2d(width, wider, 5, padding=padding), nn.ReLU(), nn.MaxPool2d(2)]
        width, size = wider, (size + 2 * padding - 4) // 2
    layers += [nn.Flatten(), nn.Linear(width * size * size, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU()]
    return Network(nn.Sequential(*layers), 84, classes)
