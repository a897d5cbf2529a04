"""Architectures: one file and one registration each. Parameters as a flat vector: :mod:`ddpp.models.flat`."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch

from ddpp import seeds
from ddpp.config import ModelConfig
from ddpp.errors import UserError
from ddpp.models import alexnet, convnet, lenet, mlp, resnet, vgg
from ddpp.models.base import MODELS, Network, Shape

__all__ = [
    "MODELS",
    "Network",
    "alexnet",
    "build",
    "convnet",
    "describe",
    "lenet",
    "mlp",
    "reads_options",
    "resnet",
    "vgg",
]


def build(config: ModelConfig, shape: Shape, classes: int, *, seed: int) -> Network:
    """A network with random parameters (PyTorch's default initialisation), on the CPU.

    Equal seeds give equal networks; torch's global random state is left as it was.

    Args:
        shape: C, H and W of one image.
        classes: number of classes K.

    Raises:
        UserError: unknown architecture, images that are not square, options that do not fit their size, or a plugin's
            network that does not give logits of such images, or draws random numbers on the way to them.
    """
    _check_square(shape)
    builder = MODELS.get(config.model)
    with seeds.in_global_generator(seed):
        network = builder(config, shape, classes)
    if MODELS.source(config.model):
        _check_network(network, config.model, shape, classes)
    return network


def reads_options(name: str) -> bool:
    """Whether an architecture follows width, depth, norm, activation and pooling, as one of a plugin may.

    Raises:
        UserError: unknown architecture.
    """
    MODELS.get(name)
    return name in convnet.NAMES or bool(MODELS.source(name))


def describe(config: ModelConfig, shape: Shape) -> dict[str, Any]:
    """The options that shape the network, defaults filled in: equal descriptions mean equal architectures.

    Of a plugin's all options count, and a digest of its file.
    """
    if source := MODELS.source(config.model):
        return {"plugin": source, **asdict(config)}
    if not reads_options(config.model):
        return {"model": config.model}
    return asdict(replace(config, depth=config.depth or convnet.default_depth(shape[1])))


def _check_network(network: Network, name: str, shape: Shape, classes: int) -> None:
    """What an architecture of one's own may get wrong."""
    if not isinstance(network, Network):
        raise UserError(f"model {name!r} must give a ddpp.models.Network, got {type(network).__name__}")
    statistics = [(b, b.clone()) for b in network.buffers()]  # which a batch may change
    with seeds.in_global_generator(0), torch.no_grad():
        before = torch.get_rng_state()
        try:
            logits = network(torch.zeros(2, *shape))
        except (RuntimeError, ValueError, TypeError, IndexError) as e:
            reason = (str(e) or type(e).__name__).splitlines()[0]
            raise UserError(f"model {name!r} fails on images {[2, *shape]}: {reason}") from e
        drawn = not torch.equal(before, torch.get_rng_state())
        for buffer, value in statistics:
            buffer.copy_(value)
    if logits.shape != (2, classes):
        raise UserError(f"model {name!r} must give logits [2, {classes}] of 2 images, got {list(logits.shape)}")
    if drawn:
        raise UserError(
            f"model {name!r} draws random numbers, as dropout does: gradients through the steps would be of other "
            "draws than the steps, and no run could be repeated. Leave them out; augmentation is drawn by ddpp."
        )


def _check_square(shape: Shape) -> None:
    _, height, width = shape
    if height != width:
        raise UserError(f"images must be square, got {height}x{width}; crop them with --image-size")
