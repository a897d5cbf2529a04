"""Analytic kernels of infinitely wide ReLU networks, in the neural tangent parameterisation.

A layer computes ``sqrt(w / fan_in) * weight @ input + sqrt(b) * bias`` of unit normal weights and biases, with ``w`` of
:data:`WEIGHT_VARIANCE` and ``b`` of :data:`BIAS_VARIANCE`. Sources: arc-cosine kernels of Cho and Saul (NeurIPS 2009);
neural tangent kernel of Jacot et al. (arXiv 1806.07572); convolutions of Arora et al. (arXiv 1904.11955).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ddpp.errors import UserError

WEIGHT_VARIANCE = 2.0
BIAS_VARIANCE = 0.01  # above 0: else a blank patch has no angle to another
KINDS = ("fc", "conv")

_COINCIDENT = 1e-13  # cosines this close to 1 or -1 are rounding
_BLOCK_BYTES = 2**28
_NUMBERS_KEPT = 12  # for each pair of images, position and layer, until the backward pass


class Kernels(NamedTuple):
    """Of the network with random weights (a Gaussian process), and of its training by gradient descent."""

    nngp: Tensor  # [n, m]
    ntk: Tensor  # [n, m]


@dataclass(frozen=True)
class WideNetwork:
    """A ReLU network of infinite width with one output.

    Attributes:
        kind: ``"fc"``, fully connected on the flattened image; or ``"conv"``, 3x3 convolutions padded with zeros,
            without pooling, then flattened.
        depth: layers before the output layer, each with a ReLU; at least 1.

    Without pooling an output position sees a pair of images at equal positions only. So covariances of n and m images
    are kept as [n, m, H, W] and not as [n, m, H * W, H * W].

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

    def ntk(self, first: Tensor, second: Tensor) -> Tensor:
        """Tangent kernel of images [n, C, H, W] and [m, C, H, W], in float64. [n, m]

        Computed in blocks of the first images; with gradients a block is computed again in the backward pass, so memory
        does not grow with n. Differentiable; see :meth:`kernels`.
        """
        positions = 1 if self.kind == "fc" else first[0, 0].numel()
        row = len(second) * positions * self.depth * _NUMBERS_KEPT * 8
        blocks = first.split(max(1, _BLOCK_BYTES // row))
        if len(blocks) == 1:
            return self.kernels(first, second).ntk
        return torch.cat([checkpoint(self._ntk, block, second, use_reentrant=False) for block in blocks])

    def kernels(self, first: Tensor, second: Tensor) -> Kernels:
        """Both kernels of images [n, C, H, W] and [m, C, H, W], in float64 and all at once. [n, m]

        The tangent kernel has a kink where two images coincide; its derivative there is the mean of both sides, which
        is exact for an image with itself.
        """
        if self.kind == "fc":
            first, second = (x.flatten(1)[:, :, None, None] for x in (first, second))
        first, second = first.double(), second.double()
        nngp = self._layer(torch.einsum("nchw,mchw->nmhw", first, second) / first.shape[1])  # [n, m, H, W]
        ntk = nngp
        variances = [self._layer(x.square().mean(1)) for x in (first, second)]  # [n, H, W], [m, H, W]
        for _ in range(self.depth - 1):
            active, slopes = _relu(nngp, *variances)
            nngp = self._layer(active)
            ntk = nngp + WEIGHT_VARIANCE * self._neighbours(slopes * ntk)
            variances = [self._layer(v / 2) for v in variances]
        active, slopes = _relu(nngp, *variances)
        nngp = WEIGHT_VARIANCE * active.mean((2, 3)) + BIAS_VARIANCE
        return Kernels(nngp, nngp + WEIGHT_VARIANCE * (slopes * ntk).mean((2, 3)))

    def _ntk(self, first: Tensor, second: Tensor) -> Tensor:
        return self.kernels(first, second).ntk

    def _layer(self, covariance: Tensor) -> Tensor:
        """Covariance of a layer's outputs from that of its inputs. [..., H, W]"""
        return WEIGHT_VARIANCE * self._neighbours(covariance) + BIAS_VARIANCE

    def _neighbours(self, x: Tensor) -> Tensor:
        """Mean over what a position's filter sees, zeros beyond the border. [..., H, W]"""
        return x if self.kind == "fc" else F.avg_pool2d(x, 3, stride=1, padding=1)


def _relu(covariance: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """E[relu(u) relu(v)] and E[relu'(u) relu'(v)] of normal u, v with a covariance and their variances.

    Args:
        covariance: of u and v. [n, m, H, W]
        first: variances of u. [n, H, W]
        second: variances of v. [m, H, W]
    """
    scale = (first[:, None] * second[None]).sqrt()  # [n, m, H, W]
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
