"""A student step of a ConvNet as one op: the gradient of its cross-entropy, and the adjoint of that on dual numbers.

The adjoint of a student step needs phi = <g, lambda> with g the gradient of the cross-entropy by the parameters, and
the derivatives of phi. phi is also the derivative of the cross-entropy along lambda, so it comes out of one forward
sweep in which every number carries its derivative along lambda, and its derivatives out of one reverse sweep over that:
two sweeps of twice the numbers instead of a graph of a graph. With p the softmax of the outputs z of an image, z' their
tangent and q its target, of n images::

    phi = sum (p - q) z' / n     dphi/dz' = (p - q) / n     dphi/dz = p (z' - <p, z'>) / n

and, where q is itself a softmax of label logits, dphi/dl = q (<q, z'> - z') / n.

For blocks of 3x3 convolution, instance normalisation, ReLU and 2x2 average pooling under one linear layer. A
convolution's bias is cancelled by the normalisation that follows: it is left out, and its gradient is 0.

On a CPU the compiled step gives every thread images of its own, which it takes through all layers and back: threads
share the parameters and nothing else, and wait for each other once. Its convolutions are Winograd's F(m x m, 3 x 3),
m = 2 or 4 (Lavin and Gray, arXiv 1509.09308), with sums in parts: a convolution of 128 channels in float32 differs from
float64 by 2.0e-7 of its length at m = 2 and by 1.4e-6 at m = 4. Elsewhere the vendor's library convolves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpp.ops import norm_pool
from ddpp.ops._library import define, ops, references

TILES = (0, 2, 4)
#: What the seconds of a compiled step go into, and its bytes.
TIMES = (
    "layout of the first layer",
    "convolutions",
    "norm, activation, pooling",
    "transforms of weights",
    "gradients of weights",
    "linear layer",
)
BYTES = ("planes", "transformed tiles", "transformed weights and gradients", "layout of the first layer", "parameters")
_MICRO_PIXELS = 10 * 32 * 32  # at a time on the CPU: a ConvNet's first layer of width 128 is then 5 MB


class StepAdjoint(NamedTuple):
    """phi = <g, lambda> of one student step and its derivatives."""

    phi: Tensor  # []
    theta: Tensor  # [P]
    images: Tensor  # [n, C, H, W]
    labels: Tensor | None  # [n, K], by the logits of soft labels


class Architecture(NamedTuple):
    """What a ConvNet's parameters do not tell.

    Attributes:
        pad_y, pad_x: zero pixels around the images; around later planes there is one.
        depth: blocks.
        filters: outputs of each convolution.
        eps: of the normalisation.
        tile: side m of the Winograd tiles of the compiled step: 2 (as exact as a direct convolution), 4 (faster), or 0,
            which takes torch's own convolutions.
    """

    pad_y: int
    pad_x: int
    depth: int
    filters: int
    eps: float
    tile: int

    def call(self, name: str, *inputs: Tensor, outputs: Sequence[Tensor | None]) -> None:
        """Calls one of the operators below, compiled unless the tile is 0."""
        face = getattr(ops(), name).default if self.tile else references[name]
        parts = min(torch.get_num_threads(), len(inputs[-1]))
        face(*(x.detach().contiguous() for x in inputs), *self, parts, *outputs)


def logits(architecture: Architecture, theta: Tensor, images: Tensor, classes: int) -> Tensor:
    """The network's outputs for parameters [P] and images [n, C, H, W]. [n, K]"""
    result = theta.new_empty(len(images), classes)
    architecture.call("convnet_logits", theta, images, outputs=[result])
    return result


def gradient(
    architecture: Architecture, theta: Tensor, images: Tensor, targets: Tensor, account: Tensor | None = None
) -> Tensor:
    """d/dtheta of the mean of -sum targets log_softmax(outputs).

    Args:
        theta: flat, in ``parameters()`` order. [P]
        images: [n, C, H, W]
        targets: probabilities. [n, K]
        account: takes the seconds of a compiled step, which are added, and its bytes; float64, in the order of
            :data:`TIMES` and :data:`BYTES`. [11]

    Returns:
        [P]
    """
    result = torch.empty_like(theta)
    architecture.call("convnet_gradient", theta, images, targets, outputs=[account, result])
    return result


def adjoint(
    architecture: Architecture,
    theta: Tensor,
    tangent: Tensor,
    images: Tensor,
    targets: Tensor,
    account: Tensor | None = None,
) -> StepAdjoint:
    """phi = <gradient(theta, images, targets), tangent> and its derivatives; that of labels by their logits.

    Args:
        tangent: [P]
        theta, images, targets, account: as for :func:`gradient`.
    """
    found = StepAdjoint(
        theta.new_empty(()), torch.empty_like(theta), images.new_empty(images.shape), torch.empty_like(targets)
    )
    outputs = [account, found.theta, found.images, found.labels, found.phi]
    architecture.call("convnet_adjoint", theta, tangent, images, targets, outputs=outputs)
    return found


# ---- the meaning, in plain torch around the fused normalisation; also what runs on a GPU ----

_ARCHITECTURE = "int pad_y, int pad_x, int depth, int filters, float eps, int m, int parts"


class _Layers(NamedTuple):
    """Views into a flat vector: weight, scale and shift of each block, weight and bias of the linear layer."""

    blocks: list[tuple[Tensor, Tensor, Tensor]]  # [O, I, 3, 3], [O], [O]
    weight: Tensor  # [K, features]
    bias: Tensor  # [K]

    @classmethod
    def of(cls, vector: Tensor, channels: int, depth: int, filters: int, classes: int) -> _Layers:
        blocks, inputs = [], channels
        for _ in range(depth):
            size = filters * inputs * 9
            weight, _, scale, shift, vector = vector.split([size, *3 * [filters], len(vector) - size - 3 * filters])
            blocks.append((weight.view(filters, inputs, 3, 3), scale, shift))
            inputs = filters
        return cls(blocks, vector[:-classes].view(classes, -1), vector[-classes:])


def _micro_batches(images: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    size = max(1, _MICRO_PIXELS // images[0, 0].numel()) if images.device.type == "cpu" else len(images)
    return zip(*(t.split(size) for t in (images, *others)), strict=True)


def _padding(block: int, pad_y: int, pad_x: int) -> tuple[int, int]:
    return (1, 1) if block else (pad_y, pad_x)


def _convolved(x: Tensor, weight: Tensor, padding: tuple[int, int]) -> Tensor:
    return F.conv2d(x.contiguous(memory_format=torch.channels_last), weight, padding=padding)


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, padding: tuple[int, int], of: tuple[bool, bool]
) -> tuple[Any, Any]:
    """The gradients of input and weight, or of one of them."""
    found = torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], padding, [1, 1], False, [0, 0], 1, [*of, False]
    )
    return found[0], found[1]


def _inner(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(1, keepdim=True)  # [n, 1]


@define(f"convnet_logits(Tensor theta, Tensor images, {_ARCHITECTURE}, Tensor(a!) logits) -> ()")
def _logits(
    theta: Tensor,
    images: Tensor,
    pad_y: int,
    pad_x: int,
    depth: int,
    filters: int,
    eps: float,
    m: int,
    parts: int,
    logits: Tensor,
) -> None:
    layers = _Layers.of(theta, images.shape[1], depth, filters, logits.shape[1])
    for x, out in _micro_batches(images, logits):
        for k, (weight, scale, shift) in enumerate(layers.blocks):
            y = _convolved(x, weight, _padding(k, pad_y, pad_x))
            x = norm_pool.norm_relu_pool_forward(y, scale, shift, eps).out
        out.copy_(torch.addmm(layers.bias, x.flatten(1), layers.weight.t()))


@define(
    f"convnet_gradient(Tensor theta, Tensor images, Tensor targets, {_ARCHITECTURE}, Tensor(a!)? account, "
    "Tensor(b!) gradient) -> ()"
)
def _gradient(
    theta: Tensor,
    images: Tensor,
    targets: Tensor,
    pad_y: int,
    pad_x: int,
    depth: int,
    filters: int,
    eps: float,
    m: int,
    parts: int,
    account: Tensor | None,
    gradient: Tensor,
) -> None:
    size = images.shape[1], depth, filters, targets.shape[1]
    layers, sums = _Layers.of(theta, *size), _Layers.of(gradient.zero_(), *size)
    for x, target in _micro_batches(images, targets):
        seen = []
        for k, (weight, scale, shift) in enumerate(layers.blocks):
            y = _convolved(x, weight, _padding(k, pad_y, pad_x))
            out = norm_pool.norm_relu_pool_forward(y, scale, shift, eps)
            seen.append((x, y, out.statistics))
            x = out.out
        features = x.flatten(1)
        d_logits = (torch.addmm(layers.bias, features, layers.weight.t()).softmax(1) - target) / len(images)
        sums.weight.addmm_(d_logits.t(), features)
        sums.bias.add_(d_logits.sum(0))
        grad = (d_logits @ layers.weight).view(x.shape)
        for k in reversed(range(depth)):
            (weight, scale, shift), (x, y, statistics) = layers.blocks[k], seen.pop()
            back = norm_pool.norm_relu_pool_backward(grad, y, scale, shift, statistics)
            grad, d_weight = _convolution_backward(back.y, x, weight, _padding(k, pad_y, pad_x), of=(k > 0, True))
            for total, part in zip(sums.blocks[k], (d_weight, back.scale, back.shift), strict=True):
                total.add_(part)


@define(
    f"convnet_adjoint(Tensor theta, Tensor tangent, Tensor images, Tensor targets, {_ARCHITECTURE}, "
    "Tensor(a!)? account, Tensor(b!) gradient, Tensor(c!) d_images, Tensor(d!) d_labels, Tensor(e!) phi) -> ()"
)
def _adjoint(
    theta: Tensor,
    tangent: Tensor,
    images: Tensor,
    targets: Tensor,
    pad_y: int,
    pad_x: int,
    depth: int,
    filters: int,
    eps: float,
    m: int,
    parts: int,
    account: Tensor | None,
    gradient: Tensor,
    d_images: Tensor,
    d_labels: Tensor,
    phi: Tensor,
) -> None:
    size = images.shape[1], depth, filters, targets.shape[1]
    layers, tangents, sums = (_Layers.of(v, *size) for v in (theta, tangent, gradient.zero_()))
    phi.zero_()
    for x, target, d_x, d_label in _micro_batches(images, targets, d_images, d_labels):
        dual, seen = _dual_forward(x, layers, tangents, (pad_y, pad_x), eps)
        (value, along), n = (face.flatten(1) for face in dual), len(images)
        logits_tangent = torch.addmm(tangents.bias, along, layers.weight.t()).addmm_(value, tangents.weight.t())
        softmax = torch.addmm(layers.bias, value, layers.weight.t()).softmax(1)
        by_tangent = (softmax - target) / n
        by_value = softmax * (logits_tangent - _inner(softmax, logits_tangent)) / n
        phi.add_((by_tangent * logits_tangent).sum())
        d_label.copy_(target * (_inner(target, logits_tangent) - logits_tangent) / n)
        sums.weight.addmm_(by_value.t(), value).addmm_(by_tangent.t(), along)
        sums.bias.add_(by_value.sum(0))
        grads = (by_value @ layers.weight).addmm_(by_tangent, tangents.weight), by_tangent @ layers.weight
        shape = dual[0].shape
        d_x.copy_(
            _dual_backward((grads[0].view(shape), grads[1].view(shape)), layers, tangents, sums, seen, (pad_y, pad_x))
        )


#: Values and tangents, one after the other.
Faces = tuple[Tensor, Tensor]


def _dual_forward(
    images: Tensor, layers: _Layers, tangents: _Layers, pad: tuple[int, int], eps: float
) -> tuple[Faces, list[tuple[Tensor, Faces, Tensor]]]:
    """The last pooled planes, and of each block its input, stacked, the planes and the statistics."""
    x, seen = images, []
    for k, ((weight, scale, shift), along) in enumerate(zip(layers.blocks, tangents.blocks, strict=True)):
        padding = _padding(k, *pad)
        n = len(x) // 2 if k else len(x)
        y = _convolved(x, weight, padding)
        by_tangent = _convolved(x[:n], along[0], padding)
        faces = (y[:n], y[n:] + by_tangent) if k else (y, by_tangent)
        out = norm_pool.norm_relu_pool_dual(*faces, scale, along[1], shift, along[2], eps)
        seen.append((x, faces, out.statistics))
        x = torch.cat([out.out, out.out_tangent])
    n = len(images)
    return (x[:n], x[n:]), seen


def _dual_backward(
    grads: Faces,
    layers: _Layers,
    tangents: _Layers,
    sums: _Layers,
    seen: list[tuple[Tensor, Faces, Tensor]],
    pad: tuple[int, int],
) -> Tensor:
    """The gradient of the images from that of the last pooled planes; those of parameters are added to ``sums``."""
    for k in reversed(range(len(layers.blocks))):
        (weight, scale, shift), along, (x, faces, statistics) = layers.blocks[k], tangents.blocks[k], seen.pop()
        padding = _padding(k, *pad)
        back = norm_pool.norm_relu_pool_dual_backward(*grads, *faces, scale, along[1], shift, statistics)
        n = len(back.y)
        stacked = torch.cat([back.y, back.y_tangent]) if k else back.y  # the images' tangent is 0
        d_x, d_weight = _convolution_backward(stacked, x, weight, padding, of=(True, True))
        through, _ = _convolution_backward(back.y_tangent, x[:n], along[0], padding, of=(True, False))
        grads = d_x[:n] + through, d_x[n:]
        for total, part in zip(sums.blocks[k], (d_weight, back.scale, back.shift), strict=True):
            total.add_(part)
    return grads[0]
