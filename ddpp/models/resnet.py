"""ResNet18 for small images, with instance normalisation, as dataset distillation uses it."""

from __future__ import annotations

from torch import Tensor, nn

from ddpp.config import ModelConfig
from ddpp.models.base import MODELS, Network, Shape, instance_norm

_WIDTHS = (64, 128, 256, 512)


class Block(nn.Module):
    """Two convolutions beside a shortcut.

    Args:
        halve: halves the side, by convolutions of stride 2.
        pool: halves by average pooling instead.
    """

    def __init__(self, width: int, wider: int, *, halve: bool, pool: bool) -> None:
        super().__init__()
        stride = 2 if halve and not pool else 1
        shrink = nn.AvgPool2d(2) if halve and pool else nn.Identity()
        self.residual = nn.Sequential(
            nn.Conv2d(width, wider, 3, stride, padding=1, bias=False),
            instance_norm(wider),
            nn.ReLU(),
            shrink,
            nn.Conv2d(wider, wider, 3, padding=1, bias=False),
            instance_norm(wider),
        )
        self.shortcut: nn.Module = nn.Identity()
        if halve or width != wider:
            convolution = nn.Conv2d(width, wider, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, shrink, instance_norm(wider))

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.relu(self.residual(images) + self.shortcut(images))


@MODELS.register("resnet18")
def resnet18(config: ModelConfig, shape: Shape, classes: int) -> Network:
    """Four stages of two blocks and a mean over the pixels."""
    features, _ = _stages(shape, pool=False)
    return Network(nn.Sequential(*features, nn.AdaptiveAvgPool2d(1)), _WIDTHS[-1], classes)


@MODELS.register("resnet18_ap")
def resnet18_ap(config: ModelConfig, shape: Shape, classes: int) -> Network:
    """ResNet18 that halves by average pooling, and whose classifier sees all pixels of the last stage."""
    features, size = _stages(shape, pool=True)
    return Network(nn.Sequential(*features), _WIDTHS[-1] * size * size, classes)


def _stages(shape: Shape, *, pool: bool) -> tuple[list[nn.Module], int]:
    """All layers before the classifier, and the side of their output.

    A stage does not halve where a single pixel would be left, which instance normalisation makes a constant.
    """
    channels, size, _ = shape
    width = _WIDTHS[0]
    first = nn.Conv2d(channels, width, 3, padding=1, bias=False)
    layers: list[nn.Module] = [first, instance_norm(width), nn.ReLU()]
    for stage, wider in enumerate(_WIDTHS):
        half = size // 2 if pool else (size + 1) // 2
        halve = stage > 0 and half >= 2
        layers += [Block(width, wider, halve=halve, pool=pool), Block(wider, wider, halve=False, pool=pool)]
        width, size = wider, half if halve else size
    return layers, size
