"""A student step of a ConvNet and its adjoint, for the unroll and for training; see :mod:`ddpp.ops.convnet`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from ddpp.models import Network, flat
from ddpp.ops import convnet
from ddpp.ops.convnet import StepAdjoint

_BLOCK = 4  # modules, and parameters, of a block


class Step(Protocol):
    """One student step of some network, by flat parameters [P], augmented images [n, C, H, W] and their labels."""

    def gradient(self, theta: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """d/dtheta of the mean cross-entropy. [P]"""

    def adjoint(self, theta: Tensor, adjoint: Tensor, images: Tensor, labels: Tensor) -> StepAdjoint:
        """phi = <gradient(theta, images, labels), adjoint> and its derivatives."""


class ConvNetStep:
    """Gradient of a ConvNet's cross-entropy, and phi with its derivatives; see :mod:`ddpp.unroll`.

    Args:
        network: one that :meth:`suits`; its own parameters are not used.
        tile: side of the Winograd tiles on the CPU; see :class:`ddpp.ops.convnet.Architecture`.
        plane_dtype: see there.

    Attributes:
        account: if a tensor, it takes the times and bytes of compiled steps; see :func:`ddpp.ops.convnet.gradient`.
    """

    def __init__(self, network: Network, tile: int = 2, plane_dtype: torch.dtype | None = None) -> None:
        blocks = cast(nn.Sequential, network.features)
        convolution, norm = cast(nn.Conv2d, blocks[0]), cast(nn.GroupNorm, blocks[1])
        pad_y, pad_x = cast(tuple[int, int], convolution.padding)
        self.architecture = convnet.Architecture(
            pad_y, pad_x, len(blocks) // _BLOCK, convolution.out_channels, norm.eps, tile, plane_dtype
        )
        self.classes, self.layout = network.classifier.out_features, flat.layout(network)
        self.account: Tensor | None = None

    @staticmethod
    def suits(network: nn.Module) -> bool:
        """Whether the network is made of the blocks that are written out there."""
        if not isinstance(network, Network) or not isinstance(network.features, nn.Sequential):
            return False
        modules = list(network.features)
        starts = range(0, len(modules), _BLOCK)
        if not modules or not all(_is_block(modules[i : i + _BLOCK], first=i == 0) for i in starts):
            return False
        alike = {(cast(nn.Conv2d, modules[i]).out_channels, cast(nn.GroupNorm, modules[i + 1]).eps) for i in starts}
        return len(alike) == 1

    def logits(self, theta: Tensor, images: Tensor) -> Tensor:
        """The network's outputs. [n, K]"""
        return convnet.logits(self.architecture, theta, images, self.classes)

    def gradient(self, theta: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """d/dtheta of the mean cross-entropy; labels are class indices or the logits of soft ones. [P]"""
        return convnet.gradient(self.architecture, theta, images, self._targets(labels, theta), self.account)

    def adjoint(self, theta: Tensor, adjoint: Tensor, images: Tensor, labels: Tensor) -> StepAdjoint:
        """phi = <gradient(theta, images, labels), adjoint> and its derivatives."""
        targets = self._targets(labels, theta)
        found = convnet.adjoint(self.architecture, theta, adjoint, images, targets, self.account)
        return found if labels.is_floating_point() else found._replace(labels=None)

    def _targets(self, labels: Tensor, theta: Tensor) -> Tensor:
        if labels.is_floating_point():
            return labels.softmax(1)
        return theta.new_zeros(len(labels), self.classes).scatter_(1, labels[:, None], 1)


def _is_block(modules: Sequence[nn.Module], first: bool) -> bool:
    if len(modules) != _BLOCK:
        return False
    convolution, norm, activation, pooling = modules
    return (
        isinstance(convolution, nn.Conv2d)
        and convolution.kernel_size == (3, 3)
        and convolution.stride == convolution.dilation == (1, 1)
        and convolution.groups == 1
        and convolution.bias is not None
        and convolution.padding_mode == "zeros"
        and not isinstance(convolution.padding, str)
        and (first or convolution.padding == (1, 1))
        and isinstance(norm, nn.GroupNorm)
        and norm.num_groups == norm.num_channels
        and norm.affine
        and isinstance(activation, nn.ReLU)
        and isinstance(pooling, nn.AvgPool2d)
        and pooling.kernel_size in (2, (2, 2))
        and pooling.stride in (2, (2, 2))
        and pooling.padding in (0, (0, 0))
        and not pooling.ceil_mode
    )
