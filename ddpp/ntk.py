"""Analytic kernels of infinitely wide ReLU networks, in the neural tangent parameterisation.

A layer computes ``sqrt(w / fan_in) * weight @ input + sqrt(b) * bias`` of unit normal weights and biases, with ``w`` of
:data:`WEIGHT_VARIANCE` and ``b`` of :data:`BIAS_VARIANCE`. Sources: arc-cosine kernels of Cho and Saul (NeurIPS 2009);
neural tangent kernel of Jacot et al. (arXiv 1806.07572); convolutions of Arora et al. (arXiv 1904.11955).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ddpp.errors import UserError

WEIGHT_VARIANCE = 2.0
BIAS_VARIANCE = 0.01  # above 0: else a blank patch has no angle to another
KINDS = ("fc", "conv", "conv-gap")

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
            flattened; or ``"conv-gap"``, the same with the mean over all positions (global average pooling) in place of
            flattening.
        depth: layers before the output layer, each with a ReLU; at least 1.

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

    def memory(self, count: int, shape: tuple[int, ...]) -> int:
        """Bytes that one image's kernel with ``count`` others takes until its derivative is computed.

        Args:
            count: images [count, C, H, W] in a row of the kernel.
            shape: C, H and W of an image.
        """
        positions = math.prod(shape[1:])
        pairs = {"fc": 1, "conv": positions, "conv-gap": positions**2}[self.kind]
        return count * pairs * self.depth * _NUMBERS_KEPT * torch.float64.itemsize

    def ntk(self, first: Tensor, second: Tensor) -> Tensor:
        """Tangent kernel of images [n, C, H, W] and [m, C, H, W], in float64. [n, m]

        Computed in blocks of the first images; with gradients a block is computed again in the backward pass, so memory
        does not grow with n. Differentiable; see :meth:`kernels`.
        """
        blocks = first.split(max(1, _BLOCK_BYTES // self.memory(len(second), first.shape[1:])))
        if len(blocks) == 1:
            return self.kernels(first, second).ntk
        again = partial(checkpoint, self._ntk, use_reentrant=False, preserve_rng_state=False)
        return torch.cat([again(block, second) for block in blocks])

    def kernels(self, first: Tensor, second: Tensor) -> Kernels:
        """Both kernels of images [n, C, H, W] and [m, C, H, W], in float64 and all at once. [n, m]

        The tangent kernel has a kink where two images coincide; its derivative there is the mean of both sides, which
        is exact for an image with itself.
        """
        if self.kind == "fc":
            first, second = (x.flatten(1)[:, :, None, None] for x in (first, second))
        first, second = first.double(), second.double()
        nngp = self._layer(self._pairs(first, second, "c") / first.shape[1])  # [n, m, H, W] or [n, m, H, W, H, W]
        ntk = nngp
        one, other = (self._layer(x.square().mean(1)) for x in (first, second))  # variances [n, H, W], [m, H, W]
        for _ in range(self.depth - 1):
            active, slopes = _relu(nngp, self._pairs(one, other).sqrt())
            nngp = self._layer(active)
            ntk = nngp + WEIGHT_VARIANCE * self._neighbours(slopes * ntk)
            one, other = self._layer(one / 2), self._layer(other / 2)
        active, slopes = _relu(nngp, self._pairs(one, other).sqrt())
        nngp = WEIGHT_VARIANCE * active.flatten(2).mean(2) + BIAS_VARIANCE
        return Kernels(nngp, nngp + WEIGHT_VARIANCE * (slopes * ntk).flatten(2).mean(2))

    def _pairs(self, first: Tensor, second: Tensor, channels: str = "") -> Tensor:
        """Products of images at the positions that meet, summed over channels. [n, m, H, W] or [n, m, H, W, H, W]"""
        other, both = ("ij", "hwij") if self.kind == "conv-gap" else ("hw", "hw")
        return torch.einsum(f"n{channels}hw,m{channels}{other}->nm{both}", first, second)

    def _ntk(self, first: Tensor, second: Tensor) -> Tensor:
        return self.kernels(first, second).ntk

    def _layer(self, covariance: Tensor) -> Tensor:
        """Covariance of a layer's outputs from that of its inputs. [..., H, W]"""
        return WEIGHT_VARIANCE * self._neighbours(covariance) + BIAS_VARIANCE

    def _neighbours(self, x: Tensor) -> Tensor:
        """Mean over what a position's filter sees, zeros beyond the border. [..., H, W]"""
        if self.kind == "fc":
            return x
        return _neighbours_of_pairs(x) if x.dim() == 6 else F.avg_pool2d(x, 3, stride=1, padding=1)


def _neighbours_of_pairs(x: Tensor) -> Tensor:
    """Mean over pairs of positions shifted together, zeros beyond the border. [n, m, H, W, H, W]"""
    height, width = x.shape[-2:]
    padded = F.pad(x, (1,) * 8)
    shifts = [(slice(a, a + height), slice(b, b + width)) for a in range(3) for b in range(3)]
    return reduce(torch.add, (padded[..., *shift, *shift] for shift in shifts)) / 9


def _relu(covariance: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """E[relu(u) relu(v)] and E[relu'(u) relu'(v)] of normal u, v by their covariance and product of deviations."""
    cosine = covariance / scale
    return scale * _Ramps.apply(cosine), _steps(cosine)


def _angle(cosine: Tensor) -> Tensor:
    """Arccos, whose derivative is taken as 0 at 1 and -1, where it is infinite on one side."""
    apart = cosine.abs() < 1 - _COINCIDENT
    return torch.where(apart, torch.where(apart, cosine, 0).acos(), cosine.detach().sign().acos())


def _steps(cosine: Tensor) -> Tensor:
    """(pi - angle) / 2 pi"""
    return (math.pi - _angle(cosine)) / (2 * math.pi)


class _Ramps(torch.autograd.Function):
    """(sine + (pi - angle) cosine) / 2 pi. Through sine and angle its derivative would be inf - inf near 1."""

    @staticmethod
    def forward(ctx: Any, cosine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine)
        return _angle(cosine).sin() / (2 * math.pi) + _steps(cosine) * cosine

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (cosine,) = ctx.saved_tensors
        return gradient * _steps(cosine)
