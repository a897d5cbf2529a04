"""What all architectures have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn

from ddpp.config import ModelConfig
from ddpp.errors import UserError, nearest
from ddpp.registry import Registry

Shape = tuple[int, int, int]  # C H W of one image

T = TypeVar("T")


class Network(nn.Module):
    """Features and one linear layer on top."""

    def __init__(self, features: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.features = features
        self.classifier = nn.Linear(width, classes)

    @property
    def classes(self) -> int | None:
        """K, where the classifier is one linear layer."""
        return getattr(self.classifier, "out_features", None)

    def embed(self, images: Tensor) -> Tensor:
        """What the classifier sees of images [N, C, H, W]. [N, F]"""
        return self.features(images).flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images [N, C, H, W]. [N, K]"""
        return self.classifier(self.embed(images))


Builder = Callable[[ModelConfig, Shape, int], Network]

MODELS: Registry[Builder] = Registry("model")


def choose(option: str, table: dict[str, T], name: str) -> T:
    """The entry that an option names.

    Raises:
        UserError: no such entry; the message lists the known ones.
    """
    if name not in table:
        raise UserError(f"{option} must be one of {', '.join(table)}, got {name!r}{nearest(name, table)}")
    return table[name]


def instance_norm(channels: int) -> nn.GroupNorm:
    """InstanceNorm with scale and shift, as the field writes it: one group a channel."""
    return nn.GroupNorm(channels, channels)


def border(channels: int, size: int) -> int:
    """Pixels that are put around images: one-channel ones of 28 pixels become 32."""
    return 2 if (channels, size) == (1, 28) else 0


def first_convolution(shape: Shape, width: int, kernel: int) -> tuple[nn.Conv2d, int]:
    """A first layer and the side of its output: the image's, but 32 for one-channel images of 28 pixels."""
    channels, size, _ = shape
    around = border(channels, size)
    return nn.Conv2d(channels, width, kernel, padding=kernel // 2 + around), size + 2 * around
