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
m = 2 or 4 (Lavin and Gray, arXiv 1509.09308), with compensated sums and, at m = 4, interpolated at points of its own: a
convolution of 128 channels in float32 differs from float64 by 1.9e-7 of its length at m = 2 and by 5.9e-7 at m = 4,
and a network's outputs by less than those of the plain network do. Elsewhere the vendor's library convolves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpp.ops import head, norm_pool
from ddpp.ops._library import define, ops, references
from ddpp.ops._streams import ALONG, OF_WEIGHTS, Beside

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
        tile: side m of the Winograd tiles of the compiled step: 2, 4 (faster, less exact), or 0, which takes torch's
            own convolutions.
        plane_dtype: of the planes between the layers, if not that of the parameters: torch.bfloat16 halves what
            a GPU moves. Statistics, the linear layer, parameters and their gradients keep theirs.
        channels_last: parameters, tangents and gradients hold weights as the planes hold pixels, channels last: a
            convolution's as [O, 3, 3, I], the linear layer's as [K, h, w, C]. Nothing is brought into another layout
            then, of which a GPU that has few images would feel every launch.
    """

    pad_y: int
    pad_x: int
    depth: int
    filters: int
    eps: float
    tile: int
    plane_dtype: torch.dtype | None = None
    channels_last: bool = False

    @property
    def compiled(self) -> bool:
        """Whether a compiled operator can do it, where there is one."""
        return self.tile > 0 and self.plane_dtype is None and not self.channels_last

    @property
    def arguments(self) -> tuple[int | float, ...]:
        """What the operators below take of it."""
        return self.pad_y, self.pad_x, self.depth, self.filters, self.eps, self.tile

    def check(self, theta: Tensor, images: Tensor, classes: int) -> None:
        """Refuses parameters of a network for other images or classes.

        Raises:
            ValueError: they are.
        """
        channels, height, width = images.shape[1:]
        height, width = height + 2 * self.pad_y - 2, width + 2 * self.pad_x - 2
        blocks = self.filters * (9 * channels + 3) + (self.depth - 1) * self.filters * (9 * self.filters + 3)
        features = self.filters * (height >> self.depth) * (width >> self.depth)
        wanted = blocks + classes * (features + 1)
        if len(theta) != wanted:
            raise ValueError(
                f"images {list(images.shape)} and {classes} classes need {wanted} parameters of such a network, got "
                f"{len(theta)}; it was made for images of another size"
            )

    def call(self, name: str, *inputs: Tensor, outputs: Sequence[Tensor | None]) -> None:
        """Calls one of the operators below."""
        parts = min(torch.get_num_threads(), len(inputs[-1]))
        arguments = *(x.detach().contiguous() for x in inputs), *self.arguments, parts
        if self.compiled:
            getattr(ops(), name).default(*arguments, *outputs)
        else:
            options = {"plane_dtype": self.plane_dtype, "channels_last": self.channels_last}
            references[name](*arguments, *outputs, **options)


def logits(architecture: Architecture, theta: Tensor, images: Tensor, classes: int) -> Tensor:
    """The network's outputs for parameters [P] and images [n, C, H, W]. [n, K]"""
    architecture.check(theta, images, classes)
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
    architecture.check(theta, images, targets.shape[1])
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
    *,
    soft: bool = True,
) -> StepAdjoint:
    """phi = <gradient(theta, images, targets), tangent> and its derivatives; that of labels by their logits.

    Args:
        tangent: [P]
        theta, images, targets, account: as for :func:`gradient`.
        soft: whether the derivative by the labels is wanted; otherwise it may be None.
    """
    architecture.check(theta, images, targets.shape[1])
    of_labels = torch.empty_like(targets) if soft or architecture.compiled else None
    found = StepAdjoint(theta.new_empty(()), torch.empty_like(theta), images.new_empty(images.shape), of_labels)
    outputs = [account, found.theta, found.images, found.labels, found.phi]
    architecture.call("convnet_adjoint", theta, tangent, images, targets, outputs=outputs)
    return found


# ---- the meaning, in plain torch around the fused normalisation; also what runs on a GPU ----
#
# There a step on few images takes as long as its kernels are many: what belongs together is stacked, results are
# written where they are wanted, and what nothing waits for, such as the gradients of weights, runs beside the rest.

_ARCHITECTURE = "int pad_y, int pad_x, int depth, int filters, float eps, int m, int parts"


class _Layers(NamedTuple):
    """Views into a flat vector: weight, scale and shift of each block, and the linear layer."""

    blocks: list[tuple[Tensor, Tensor, Tensor]]  # [O, I, 3, 3], [O], [O]
    linear: head.Linear
    channels_last: bool  # see Architecture

    @classmethod
    def of(cls, vector: Tensor, channels: int, depth: int, filters: int, classes: int, channels_last: bool) -> _Layers:
        blocks, inputs = [], channels
        for _ in range(depth):
            size = filters * inputs * 9
            weight, _, scale, shift, vector = vector.split([size, *3 * [filters], len(vector) - size - 3 * filters])
            planes = (
                weight.view(filters, 3, 3, inputs).permute(0, 3, 1, 2)
                if channels_last
                else weight.view(filters, inputs, 3, 3)
            )
            blocks.append((planes, scale, shift))
            inputs = filters
        return cls(blocks, head.Linear(vector[:-classes].view(classes, -1), vector[-classes:]), channels_last)

    def convolving(self, dtype: torch.dtype | None) -> _Layers:
        """The same with weights in layout and dtype of the planes, so that no convolution converts them again."""
        return self._replace(blocks=[(_planes(weight, dtype), scale, shift) for weight, scale, shift in self.blocks])

    def features(self, x: Tensor) -> Tensor:
        """The last planes as rows in the order and dtype of the linear layer's weight. [n, F]"""
        return (x.permute(0, 2, 3, 1) if self.channels_last else x).flatten(1).to(self.linear.weight.dtype)

    def planes(self, rows: Tensor, like: Tensor) -> Tensor:
        """The way back of :meth:`features`, for gradients. [n, C, h, w]"""
        n, c, h, w = like.shape
        planes = rows.view(n, h, w, c).permute(0, 3, 1, 2) if self.channels_last else rows.view(n, c, h, w)
        return _planes(planes, like.dtype)

    def write(self, gradient: Tensor, blocks: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Writes the blocks' parts of a gradient, given the last block first, to its vector by one copy."""
        in_order = blocks[::-1]
        weights = [(w.permute(0, 2, 3, 1) if self.channels_last else w).flatten() for w, *_ in in_order]
        if weights[0].dtype != gradient.dtype:  # of bfloat16 planes; mixed, each part would be a launch
            weights = list(torch.cat(weights).to(gradient.dtype).split([len(w) for w in weights]))
        zeros = torch.zeros_like(self.blocks[0][1])  # of the convolutions' biases
        parts = [part for w, (_, *norm) in zip(weights, in_order, strict=True) for part in (w, zeros, *norm)]
        torch.cat(parts, out=gradient[: sum(map(len, parts))])


def _planes(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """In the planes' layout, and in their dtype if they have one of their own."""
    return x.to(dtype or x.dtype, memory_format=torch.channels_last)


def _micro_batches(images: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    size = max(1, _MICRO_PIXELS // images[0, 0].numel()) if images.device.type == "cpu" else len(images)
    return zip(*(t.split(size) for t in (images, *others)), strict=True)


def _convolved(x: Tensor, weight: Tensor, padding: tuple[int, int]) -> Tensor:
    """In the planes' layout whatever the library chose, so that gradients can be written over it."""
    return F.conv2d(x, weight, padding=padding).contiguous(memory_format=torch.channels_last)


def _padding(block: int, pad_y: int, pad_x: int) -> tuple[int, int]:
    return (1, 1) if block else (pad_y, pad_x)


def _summed(gradient: Tensor, run: Callable[..., None], *batch: Tensor) -> None:
    """The sum over micro-batches of the gradients that ``run(gradient, *micro_batch)`` writes."""
    for k, micro_batch in enumerate(_micro_batches(*batch)):
        part = torch.empty_like(gradient) if k else gradient
        run(part, *micro_batch)
        if k:
            gradient.add_(part)


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, padding: tuple[int, int], of: tuple[bool, bool]
) -> tuple[Any, Any]:
    """The gradients of input and weight, or of one of them."""
    found = torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], padding, [1, 1], False, [0, 0], 1, [*of, False]
    )
    return found[0], found[1]


def _convolution_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, padding: tuple[int, int], of_input: bool, beside: Beside
) -> tuple[Any, Any]:
    """The gradients of input, if it is wanted, and of weight: that one beside what follows, or else in one call."""
    arguments = grad, x, weight, padding
    if not beside:
        return _convolution_backward(*arguments, (of_input, True))
    _, d_weight = beside(_convolution_backward, *arguments, (False, True))
    return (_convolution_backward(*arguments, (True, False))[0] if of_input else None), d_weight


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
    plane_dtype: torch.dtype | None = None,
    channels_last: bool = False,
) -> None:
    size = images.shape[1], depth, filters, logits.shape[1], channels_last
    layers = _Layers.of(theta, *size).convolving(plane_dtype)
    for x, out in _micro_batches(images, logits):
        x = _planes(x, plane_dtype)
        for k, (weight, scale, shift) in enumerate(layers.blocks):
            y = F.conv2d(x, weight, padding=_padding(k, pad_y, pad_x))
            x = norm_pool.norm_relu_pool_forward(y, scale, shift, eps).out
        out.copy_(torch.addmm(layers.linear.bias, layers.features(x), layers.linear.weight.t()))


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
    plane_dtype: torch.dtype | None = None,
    channels_last: bool = False,
) -> None:
    size, pad = (images.shape[1], depth, filters, targets.shape[1], channels_last), (pad_y, pad_x)
    layers = _Layers.of(theta, *size).convolving(plane_dtype)

    def run(part: Tensor, x: Tensor, target: Tensor) -> None:
        linear = _Layers.of(part, *size).linear
        layers.write(part, _gradient_of(_planes(x, plane_dtype), target, len(images), layers, linear, pad, eps))

    _summed(gradient, run, images, targets)


def _gradient_of(
    x: Tensor, target: Tensor, n: int, layers: _Layers, d_linear: head.Linear, pad: tuple[int, int], eps: float
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What some of n images add to the gradient of the blocks, the last one's first; the linear layer's is written."""
    seen = []
    for k, (weight, scale, shift) in enumerate(layers.blocks):
        y = _convolved(x, weight, _padding(k, *pad))
        out = norm_pool.norm_relu_pool_forward(y, scale, shift, eps)
        seen.append((x, y, out.statistics))
        x = out.out
    features = layers.features(x)
    cotangents = head.cotangents(features, layers.linear, target, n)
    grad = layers.planes(head.gradients(cotangents, features, layers.linear.weight, None, d_linear), x)
    of_weights, found = Beside(OF_WEIGHTS), []
    for k in reversed(range(len(seen))):
        (weight, scale, shift), (x, y, statistics) = layers.blocks[k], seen.pop()
        # Over the planes, which nothing else needs any more.
        back = norm_pool.Backward(y, torch.empty_like(scale), torch.empty_like(shift))
        norm_pool.norm_relu_pool_backward(grad, y, scale, shift, statistics, out=back)
        grad, d_weight = _convolution_gradients(y, x, weight, _padding(k, *pad), k > 0, of_weights)
        found.append((d_weight, back.scale, back.shift))
    of_weights.wait()
    return found


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
    d_labels: Tensor | None,
    phi: Tensor,
    plane_dtype: torch.dtype | None = None,
    channels_last: bool = False,
) -> None:
    size, pad, n = (images.shape[1], depth, filters, targets.shape[1], channels_last), (pad_y, pad_x), len(images)
    layers, tangents = (_Layers.of(v, *size).convolving(plane_dtype) for v in (theta, tangent))
    phis = phi.new_empty(n)

    def run(part: Tensor, x: Tensor, target: Tensor, d_x: Tensor, *shares: Tensor) -> None:
        d_linear = _Layers.of(part, *size).linear
        faces, seen = _dual_forward(_planes(x, plane_dtype), layers, tangents, pad, eps)
        features = layers.features(faces)
        cotangents = head.dual_cotangents(features, layers.linear, tangents.linear, target, n, *shares)
        grads = head.gradients(cotangents, features, layers.linear.weight, tangents.linear.weight, d_linear)
        d_planes, blocks = _dual_backward(layers.planes(grads, faces), layers, tangents, seen, pad)
        layers.write(part, blocks)
        d_x.copy_(d_planes)

    _summed(gradient, run, images, targets, d_images, phis, *([] if d_labels is None else [d_labels]))
    torch.sum(phis, 0, out=phi)


# Dual numbers are stacked: n values, then n tangents.


def _stacked(n: int, y: Tensor, height: int, width: int) -> Tensor:
    """Memory for 2 n planes of another size than y's. [2 n, C, height, width]"""
    size = 2 * n, y.shape[1], height, width
    return torch.empty(size, dtype=y.dtype, device=y.device, memory_format=torch.channels_last)


def _dual_forward(
    images: Tensor, layers: _Layers, tangents: _Layers, pad: tuple[int, int], eps: float
) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor, Tensor]]]:
    """The last pooled planes, stacked, and of each block its input and planes, stacked, its tangents and statistics."""
    x, n, seen, beside = images, len(images), [], Beside(ALONG)  # the images' tangent is 0: it is left out
    for k, ((weight, scale, shift), along) in enumerate(zip(layers.blocks, tangents.blocks, strict=True)):
        padding = _padding(k, *pad)
        by_tangent, both = beside(_convolved, x[:n], along[0], padding), _convolved(x, weight, padding)
        beside.wait()
        y, y_tangent = (both[:n], both[n:].add_(by_tangent)) if k else (both, by_tangent)
        pooled = _stacked(n, y, y.shape[2] // 2, y.shape[3] // 2)
        out = norm_pool.Dual(pooled[:n], pooled[n:], scale.new_empty(norm_pool.DUAL_STATISTICS, *y.shape[:2]))
        norm_pool.norm_relu_pool_dual(y, y_tangent, scale, along[1], shift, along[2], eps, out=out)
        seen.append((x, both, y_tangent, out.statistics))
        x = pooled
    return x, seen


def _dual_backward(
    grads: Tensor,
    layers: _Layers,
    tangents: _Layers,
    seen: list[tuple[Tensor, Tensor, Tensor, Tensor]],
    pad: tuple[int, int],
) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
    """From the gradient of the last pooled planes that of the images, and of the blocks, the last one's first."""
    beside, of_weights, found = Beside(ALONG), Beside(OF_WEIGHTS), []
    for k in reversed(range(len(seen))):
        (weight, scale, shift), along = layers.blocks[k], tangents.blocks[k]
        x, both, y_tangent, statistics = seen.pop()
        n, padding = len(y_tangent), _padding(k, *pad)
        y = both[:n]
        # Over the planes, as in the plain step.
        back = norm_pool.DualBackward(y, y_tangent, torch.empty_like(scale), torch.empty_like(shift))
        norm_pool.norm_relu_pool_dual_backward(
            grads[:n], grads[n:], y, y_tangent, scale, along[1], shift, statistics, out=back
        )
        through, _ = beside(_convolution_backward, y_tangent, x[:n], along[0], padding, (True, False))
        grads, d_weight = _convolution_gradients(both, x, weight, padding, True, of_weights)
        beside.wait()
        grads[:n].add_(through)
        found.append((d_weight, back.scale, back.shift))
    of_weights.wait()
    return grads, found
