"""The parameters of a network as one flat vector [P], in the order of ``parameters()``."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ddpp.errors import UserError

Layout = tuple[tuple[str, tuple[int, ...]], ...]  # name and shape of each parameter


def layout(model: nn.Module) -> Layout:
    """Name and shape of each parameter."""
    return tuple((name, tuple(p.shape)) for name, p in model.named_parameters())


def size(layout: Layout) -> int:
    """Number of parameters P."""
    return sum(math.prod(shape) for _, shape in layout)


def flatten(model: nn.Module) -> Tensor:
    """A copy of all parameters, cut off from any graph. [P]"""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def unflatten(flat: Tensor, layout: Layout) -> dict[str, Tensor]:
    """Views into a flat vector [P], one for each parameter. Differentiable any number of times.

    Raises:
        UserError: the vector does not have the layout's number of parameters.
    """
    if flat.shape != (size(layout),):
        raise UserError(f"flat must have the shape [{size(layout)}] of its layout, got {list(flat.shape)}")
    parts = flat.split([math.prod(shape) for _, shape in layout])
    return {name: part.view(shape) for (name, shape), part in zip(layout, parts, strict=True)}


def call(model: nn.Module, flat: Tensor, images: Tensor) -> Tensor:
    """The model's logits of images [N, C, H, W] with the parameters of a flat vector [P]. [N, K]

    Differentiable in both any number of times. The model's own parameters are neither read nor changed.
    """
    return functional_call(model, unflatten(flat, layout(model)), (images,))


@torch.no_grad()
def load_flat_(model: nn.Module, flat: Tensor) -> None:
    """Copies a flat vector [P] into the model's parameters."""
    parts = unflatten(flat, layout(model))
    for name, parameter in model.named_parameters():
        parameter.copy_(parts[name])
