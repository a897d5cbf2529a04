"""VGG11 for small images, with instance normalisation, as dataset distillation uses it."""

from __future__ import annotations

from torch import nn

from ddpp.config import ModelConfig
from ddpp.models.base import MODELS, Network, Shape, first_convolution, instance_norm

_BLOCKS = ((64,), (128,), (256, 256), (512, 512), (512, 512))


@MODELS.register("vgg11")
def vgg11(config: ModelConfig, shape: Shape, classes: int) -> Network:
    """Eight convolutions in five blocks, each with a pooling.

    Below 32 pixels a pooling is left out where the next block would get a single pixel, which instance
    normalisation makes a constant.
    """
    width = shape[0]
    layers: list[nn.Module] = []
    convolution, size = first_convolution(shape, _BLOCKS[0][0], kernel=3)
    for number, widths in enumerate(_BLOCKS, start=1):
        for wider in widths:
            if layers:
                convolution = nn.Conv2d(width, wider, 3, padding=1)
            layers += [convolution, instance_norm(wider), nn.ReLU()]
            width = wider
        if size // 2 >= (2 if number < len(_BLOCKS) else 1):
            layers.append(nn.MaxPool2d(2))
            size //= 2
    return Network(nn.Sequential(*layers), width * size * size, classes)
