"""Analytic kernels of infinitely wide ReLU networks, in the neural tangent parameterisation.

A layer computes ``sqrt(w / fan_in) * weight @ input + sqrt(b) * bias`` of unit normal weights and biases, with ``w`` of
:data:`WEIGHT_VARIANCE` and ``b`` of :data:`BIAS_VARIANCE`. Sources: arc-cosine kernels of Cho and Saul (NeurIPS 2009);
neural tangent kernel of Jacot et al. (arXiv 1806.07572); convolutions of Arora et al. (arXiv 1904.11955).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ddpp.errors import UserError

WEIGHT_VARIANCE = 2.0
BIAS_VARIANCE = 0.01  # above 0: else a blank patch has no angle to another
KINDS = ("fc", "conv", "conv-gap", "convnet")

_COINCIDENT = 1e-13  # cosines this close to 1 or -1 are rounding
_BLOCK_BYTES = 2**28
_NUMBERS_KEPT = 24  # for each pair of images, position and layer, with the backward pass; 20 to 30 measured


class Kernels(NamedTuple):
    """Of the network with random weights (a Gaussian process), and of its training by gradient descent."""

    nngp: Tensor  # [n, m]
    ntk: Tensor  # [n, m]


@dataclass(frozen=True)
class WideNetwork:
    """A ReLU network of infinite width with one output.

    Attributes:
        kind: ``"fc"``, fully connected on the flattened image; ``"conv"``, 3x3 convolutions padded with zeros, then
            flattened; ``"conv-gap"``, the same with the mean over all positions (global average pooling) in place of
            flattening; or ``"convnet"``, one convolution, then blocks of a convolution and the mean over 2x2 positions,
            then flattened: the ConvNet of KIP (arXiv 2107.13034).
        depth: layers before the output layer, each with a ReLU, or blocks of ``"convnet"``; at least 1.

    Flattened, a position of one image meets only the same position of the other, in every layer below as well. So
    covariances of n and m images are [n, m, H, W]; pooling mixes positions and needs all pairs, [n, m, H, W, H, W].

    Raises:
        UserError: another kind, or a depth below 1.
    """

    kind: str
    depth: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.depth < 1:
            raise UserError(f"depth must be at least 1, got {self.depth}")

    def memory(self, shape: tuple[int, ...]) -> int:
        """Bytes that the kernel of two images [C, H, W] takes until its derivative is computed.

        Raises:
            UserError: the images are too small to be pooled as often.
        """
        sides, smallest = self._sides(shape), min(shape[1:])
        if smallest >> sum(self._pools) < 1:
            most = int(math.log2(smallest))
            advice = f"a depth of at most {most}, or larger images" if most else "larger images"
            raise UserError(
                f"depth {self.depth} pools images of {shape[1]}x{shape[2]} pixels below one pixel; take {advice}"
            )
        pairs = sum((height * width) ** (2 if self._mixes else 1) for height, width in sides)
        return pairs * _NUMBERS_KEPT * torch.float64.itemsize

    def ntk(self, first: Tensor, second: Tensor) -> Tensor:
        """Tangent kernel of images [n, C, H, W] and [m, C, H, W], in float64. [n, m]

        Computed in blocks of both; with gradients a block is computed again in the backward pass, so memory does not
        grow with n and m. Differentiable; see :meth:`kernels`.
        """
        at_once = max(1, _BLOCK_BYTES // self.memory(first.shape[1:]))  # pairs
        columns = min(at_once, len(second))
        rows = at_once // columns
        if len(first) <= rows and len(second) <= columns:
            return self.kernels(first, second).ntk
        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        one, other = (torch.cat([again(self._variances, part) for part in x.split(at_once)]) for x in (first, second))
        columns_of_second = list(zip(second.split(columns), other.split(columns), strict=True))
        kernel = [
            torch.cat([again(self._ntk, x, y, of_x, of_y) for y, of_y in columns_of_second], 1)
            for x, of_x in zip(first.split(rows), one.split(rows), strict=True)
        ]
        return torch.cat(kernel)

    def kernels(self, first: Tensor, second: Tensor) -> Kernels:
        """Both kernels of images [n, C, H, W] and [m, C, H, W], in float64 and all at once. [n, m]

        The tangent kernel has a kink where two images coincide; its derivative there is the mean of both sides, which
        is exact for an image with itself.
        """
        return self._kernels(first, second, self._variances(first), self._variances(second))

    def _ntk(self, first: Tensor, second: Tensor, one: Tensor, other: Tensor) -> Tensor:
        return self._kernels(first, second, one, other).ntk

    def _kernels(self, first: Tensor, second: Tensor, one: Tensor, other: Tensor) -> Kernels:
        """Both kernels of images whose :meth:`_variances` are [n, V] and [m, V]."""
        of_first, of_second = (self._by_layer(v, x.shape[1:]) for v, x in ((one, first), (other, second)))
        first, second = self._arranged(first), self._arranged(second)
        nngp = ntk = self._layer(self._pairs(first, second, "c") / first.shape[1])
        begin, *layers = zip(self._pools, of_first, of_second, strict=True)
        active, tangent = self._activated(nngp, ntk, *begin)
        for layer in layers:
            nngp = self._layer(active)
            ntk = nngp + WEIGHT_VARIANCE * self._neighbours(tangent)
            active, tangent = self._activated(nngp, ntk, *layer)
        nngp = WEIGHT_VARIANCE * self._seen_at_last(active) + BIAS_VARIANCE
        return Kernels(nngp, nngp + WEIGHT_VARIANCE * self._seen_at_last(tangent))

    def _activated(self, nngp: Tensor, ntk: Tensor, pools: bool, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """Both kernels after a ReLU, by variances [n, H, W] and [m, H, W], and after the pooling if there is one."""
        active, slopes = _relu(nngp, self._pairs(one, other).sqrt())
        tangent = slopes * ntk
        return (_pooled(active), _pooled(tangent)) if pools else (active, tangent)

    def _variances(self, images: Tensor) -> Tensor:
        """Of what the ReLUs of images [n, C, H, W] see at each position, layer after layer. [n, V]"""
        images, found = self._arranged(images), []
        if not any(self._pools):
            variance = self._layer(images.square().mean(1))  # [n, H, W]
            for _ in self._pools:
                found.append(variance.flatten(1))
                variance = self._layer(variance / 2)
            return torch.cat(found, 1)
        # A mean has the variance of all that it is of: an image's positions with one another.
        covariance = self._layer(torch.einsum("nchw,ncij->nhwij", images, images)[:, None] / images.shape[1])
        for pools in self._pools:
            variance = torch.einsum("nmhwhw->nhw", covariance)
            found.append(variance.flatten(1))
            scale = torch.einsum("nhw,nij->nhwij", variance, variance)[:, None].sqrt()
            active, _ = _relu(covariance, scale)
            covariance = self._layer(_pooled(active) if pools else active)
        return torch.cat(found, 1)

    @property
    def _mixes(self) -> bool:
        """Whether each position of one image meets all of the other."""
        return self.kind in ("conv-gap", "convnet")

    @property
    def _pools(self) -> tuple[bool, ...]:
        """Of each layer, whether pooling comes after its ReLU."""
        return (False, *[True] * self.depth) if self.kind == "convnet" else (False,) * self.depth

    def _sides(self, shape: tuple[int, ...]) -> list[tuple[int, int]]:
        """Height and width at each layer's ReLU of images [C, H, W]."""
        height, width = (1, 1) if self.kind == "fc" else shape[1:]
        halvings = accumulate(self._pools[:-1], initial=0)
        return [(height >> halved, width >> halved) for halved in halvings]

    def _by_layer(self, variances: Tensor, shape: tuple[int, ...]) -> list[Tensor]:
        """The parts of :meth:`_variances` for images [C, H, W]. Each [n, H, W]"""
        sides = self._sides(shape)
        parts = variances.split([height * width for height, width in sides], 1)
        return [part.unflatten(1, side) for part, side in zip(parts, sides, strict=True)]

    def _arranged(self, images: Tensor) -> Tensor:
        """In float64, all numbers as channels of one position where the network is fully connected."""
        return (images.flatten(1)[:, :, None, None] if self.kind == "fc" else images).double()

    def _pairs(self, first: Tensor, second: Tensor, channels: str = "") -> Tensor:
        """Products of images at the positions that meet, summed over channels. [n, m, H, W] or [n, m, H, W, H, W]"""
        other, both = ("ij", "hwij") if self._mixes else ("hw", "hw")
        return torch.einsum(f"n{channels}hw,m{channels}{other}->nm{both}", first, second)

    def _seen_at_last(self, x: Tensor) -> Tensor:
        """Mean over the positions that meet in the output layer. [n, m]"""
        if self.kind == "convnet":
            return torch.einsum("nmhwhw->nm", x) / math.prod(x.shape[-2:])
        return x.flatten(2).mean(2)

    def _layer(self, covariance: Tensor) -> Tensor:
        """Covariance of a layer's outputs from that of its inputs. [..., H, W]"""
        return WEIGHT_VARIANCE * self._neighbours(covariance) + BIAS_VARIANCE

    def _neighbours(self, x: Tensor) -> Tensor:
        """Mean over what a position's filter sees, zeros beyond the border. [..., H, W]"""
        if self.kind == "fc":
            return x
        return _NeighboursOfPairs.apply(x) if x.dim() == 6 else F.avg_pool2d(x, 3, stride=1, padding=1)


def _pooled(x: Tensor) -> Tensor:
    """Means over 2x2 positions of either image. [n, m, H, W, H, W] -> [n, m, H / 2, W / 2, H / 2, W / 2]"""
    for _ in range(2):
        x = F.avg_pool2d(x.flatten(0, 3), 2).unflatten(0, x.shape[:4]).movedim((4, 5), (2, 3))
    return x


class _NeighboursOfPairs(torch.autograd.Function):
    """Mean over pairs of positions shifted together, zeros beyond the border: its own transpose. [n, m, H, W, H, W]"""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        for one, other in ((2, 4), (3, 5)):  # rows, then columns
            total, length = x.clone(), x.shape[one] - 1
            upper, lower = (t.narrow(one, 0, length).narrow(other, 0, length) for t in (total, x))
            upper += x.narrow(one, 1, length).narrow(other, 1, length)
            total.narrow(one, 1, length).narrow(other, 1, length).add_(lower)
            x = total
        return x.div_(9)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _NeighboursOfPairs.apply(gradient)


def _relu(covariance: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """E[relu(u) relu(v)] and E[relu'(u) relu'(v)] of normal u, v by their covariance and product of deviations."""
    ramps, steps = _Moments.apply(covariance / scale)
    return scale * ramps, steps


class _Moments(torch.autograd.Function):
    """(sine + (pi - angle) cosine) / 2 pi and (pi - angle) / 2 pi by the cosine of two signals.

    The second one's derivative is taken as 0 at 1 and -1, where it is infinite on one side. Through sine and angle the
    first one's would be inf - inf near 1. Once differentiable.
    """

    @staticmethod
    def forward(ctx: Any, cosine: Tensor) -> tuple[Tensor, Tensor]:
        cosine = torch.where(cosine.abs() < 1 - _COINCIDENT, cosine, cosine.sign())
        steps = cosine.acos().sub_(math.pi).div_(-2 * math.pi)
        ctx.save_for_backward(cosine, steps)
        return _sine(cosine).div_(2 * math.pi).addcmul_(steps, cosine), steps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_ramps: Tensor, of_steps: Tensor) -> Tensor:
        cosine, steps = ctx.saved_tensors
        slope = _sine(cosine).mul_(2 * math.pi).reciprocal_()
        slope.masked_fill_(cosine.abs() == 1, 0)
        return slope.mul_(of_steps).addcmul_(of_ramps, steps)


def _sine(cosine: Tensor) -> Tensor:
    """Without the loss of digits that 1 - cosine * cosine has near 1."""
    return (1 - cosine).mul_(1 + cosine).sqrt_()
