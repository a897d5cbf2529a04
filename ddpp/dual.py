"""A student step of a ConvNet and its adjoint, for the unroll and for training; see :mod:`ddpp.ops.convnet`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from ddpp.models import Network, flat
from ddpp.ops import convnet
from ddpp.ops.convnet import StepAdjoint

_BLOCK = 4  # modules, and parameters, of a block


class Step(Protocol):
    """One student step of some network, by flat parameters [P], augmented images [n, C, H, W] and their labels.

    A step of one's own inherits from this and gives ``gradient`` and ``adjoint``.
    """

    def gradient(self, theta: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """d/dtheta of the mean cross-entropy. [P]"""

    def adjoint(self, theta: Tensor, adjoint: Tensor, images: Tensor, labels: Tensor) -> StepAdjoint:
        """phi = <gradient(theta, images, labels), adjoint> and its derivatives."""

    def on(self, device: torch.device) -> Step:
        """The same for vectors in the order of parameters that suits it best there; see :meth:`pack`."""
        return self

    def pack(self, vector: Tensor) -> Tensor:
        """A vector in the order of ``parameters()`` in this step's own order. [P]"""
        return vector

    def unpack(self, vector: Tensor) -> Tensor:
        """The inverse of :meth:`pack`. [P]"""
        return vector


class ConvNetStep(Step):
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
        self._order: Tensor | None = None  # of its vectors, if not that of parameters()
        self._inverse: Tensor | None = None
        self._packed: dict[torch.device, ConvNetStep] = {}
        self._identities: dict[tuple[torch.dtype, torch.device], Tensor] = {}  # kept, since graphs read them

    @staticmethod
    def suits(network: nn.Module) -> bool:
        """Whether the network is made of the blocks that are written out there."""
        if not isinstance(network, Network) or not isinstance(network.features, nn.Sequential):
            return False
        if (type(network).forward, type(network).embed) != (Network.forward, Network.embed):
            return False
        if not isinstance(network.classifier, nn.Linear) or network.classifier.bias is None:
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
        soft = labels.is_floating_point()
        found = convnet.adjoint(self.architecture, theta, adjoint, images, targets, self.account, soft=soft)
        return found if soft else found._replace(labels=None)

    def on(self, device: torch.device) -> Step:
        """See :class:`Step`; where nothing compiled does the whole step, weights are kept channels last."""
        if self._order is not None or (device.type == "cpu" and self.architecture.compiled):
            return self
        if device not in self._packed:  # made once, since graphs know a step by its identity
            packed, order = copy.copy(self), _channels_last_order(self.layout, self.architecture.filters)
            packed.architecture = self.architecture._replace(channels_last=True)
            packed._order = order.to(device)
            packed._inverse = packed._order.argsort()
            self._packed[device] = packed
        return self._packed[device]

    def pack(self, vector: Tensor) -> Tensor:
        """See :class:`Step`."""
        return vector if self._order is None else vector[self._order]

    def unpack(self, vector: Tensor) -> Tensor:
        """See :class:`Step`."""
        return vector if self._inverse is None else vector[self._inverse]

    def _targets(self, labels: Tensor, theta: Tensor) -> Tensor:
        if labels.is_floating_point():
            return labels.softmax(1)
        kind = theta.dtype, theta.device
        if kind not in self._identities:
            self._identities[kind] = torch.eye(self.classes, dtype=theta.dtype, device=theta.device)
        return self._identities[kind][labels]


def _channels_last_order(layout: flat.Layout, filters: int) -> Tensor:
    """The places in a vector of parameters, one after the other, that make it one with weights channels last. [P]"""
    places = flat.unflatten(torch.arange(flat.size(layout)), layout)
    parts = []
    for name, shape in layout:
        view = places[name]
        if len(shape) == 4:  # a convolution's [O, I, 3, 3]
            view = view.permute(0, 2, 3, 1)
        elif len(shape) == 2:  # the linear layer's [K, C h w]
            view = view.view(shape[0], filters, -1).transpose(1, 2)
        parts.append(view.flatten())
    return torch.cat(parts)


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
