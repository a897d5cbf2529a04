"""AlexNet for small images, without normalisation, as dataset distillation uses it."""

from __future__ import annotations

from torch import nn

from ddpp.config import ModelConfig
from ddpp.models.base import MODELS, Network, Shape, first_convolution


@MODELS.register("alexnet")
def alexnet(config: ModelConfig, shape: Shape, classes: int) -> Network:
    """Five convolutions and three poolings; a pooling that would leave no pixel is left out."""
    first, size = first_convolution(shape, 128, kernel=5)
    layers: list[nn.Module] = [first, nn.ReLU()]
    size = _pool(layers, size)
    layers += [nn.Conv2d(128, 192, 5, padding=2), nn.ReLU()]
    size = _pool(layers, size)
    for width, wider in ((192, 256), (256, 192), (192, 192)):
        layers += [nn.Conv2d(width, wider, 3, padding=1), nn.ReLU()]
    size = _pool(layers, size)
    return Network(nn.Sequential(*layers), 192 * size * size, classes)


def _pool(layers: list[nn.Module], size: int) -> int:
    if size < 2:
        return size
    layers.append(nn.MaxPool2d(2))
    return size // 2
