"""Architectures: one file and one registration each. Parameters as a flat vector: :mod:`ddpp.models.flat`."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from ddpp import seeds
from ddpp.config import ModelConfig
from ddpp.errors import UserError
from ddpp.models import alexnet, convnet, resnet, vgg
from ddpp.models.base import MODELS, Network, Shape

__all__ = ["MODELS", "Network", "alexnet", "build", "convnet", "describe", "resnet", "vgg"]


def build(config: ModelConfig, shape: Shape, classes: int, *, seed: int) -> Network:
    """A network with random parameters (PyTorch's default initialisation), on the CPU.

    Equal seeds give equal networks; torch's global random state is left as it was.

    Args:
        shape: C, H and W of one image.
        classes: number of classes K.

    Raises:
        UserError: unknown architecture, images that are not square, or options that do not fit their size.
    """
    _check_square(shape)
    builder = MODELS.get(config.model)
    with seeds.in_global_generator(seed):
        return builder(config, shape, classes)


def describe(config: ModelConfig, shape: Shape) -> dict[str, Any]:
    """The options that shape the network, defaults filled in: equal descriptions mean equal architectures."""
    if config.model != "convnet":
        return {"model": config.model}
    return asdict(replace(config, depth=config.depth or convnet.default_depth(shape[1])))


def _check_square(shape: Shape) -> None:
    _, height, width = shape
    if height != width:
        raise UserError(f"images must be square, got {height}x{width}; crop them with --image-size")
