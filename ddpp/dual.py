"""One step of a ConvNet and its adjoint, written out with dual numbers (value, tangent).

The adjoint of a student step needs phi = <g, lambda> with g the gradient of the cross-entropy by the parameters, and
the derivatives of phi. phi is also the derivative of the cross-entropy along lambda, so it comes out of one forward
sweep in which every number carries its derivative along lambda, and its derivatives out of one reverse sweep over that:
two sweeps of twice the numbers instead of a graph of a graph.

For blocks of 3x3 convolution, instance normalisation, ReLU and 2x2 average pooling under one linear layer. A
convolution's bias is cancelled by the normalisation that follows: it is left out, and its gradient is 0.

Every buffer is allocated once and used again by the next step. On the CPU a batch is worked through in micro-batches
that stay in cache: all operations but the sums of the parameters' gradients are image by image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpp.models import Network, flat
from ddpp.ops import norm_pool, winograd
from ddpp.ops._library import ops

MICRO_PIXELS = 10 * 32 * 32  # at a time on the CPU: a ConvNet's first layer of width 128 is then 5 MB
_BLOCK = 4  # modules, and parameters, of a block


class StepAdjoint(NamedTuple):
    """phi = <g, lambda> of one student step and its derivatives."""

    phi: Tensor  # []
    theta: Tensor  # [P]
    images: Tensor  # [n, C, H, W]
    labels: Tensor | None  # [n, K], by the logits of soft labels


class Step(Protocol):
    """One student step of some network, by flat parameters [P], augmented images [n, C, H, W] and their labels."""

    def gradient(self, theta: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """d/dtheta of the mean cross-entropy. [P]"""

    def adjoint(self, theta: Tensor, adjoint: Tensor, images: Tensor, labels: Tensor) -> StepAdjoint:
        """phi = <gradient(theta, images, labels), adjoint> and its derivatives."""


class Convolution(Protocol):
    """A 3x3 convolution without bias, of values and of values stacked on tangents along the batch.

    ``load`` comes first; the backward faces use what the last forward face saw and add to the gradient of the weight,
    which ``finish`` writes.
    """

    def load(self, weight: Tensor, tangent: Tensor | None) -> None: ...
    def forward(self, x: Tensor) -> Tensor: ...
    def backward(self, grad: Tensor) -> Tensor | None: ...
    def dual(self, x: Tensor) -> Tensor: ...
    def dual_backward(self, grad: Tensor) -> Tensor: ...
    def finish(self, grad_weight: Tensor) -> None: ...


class _Buffers:
    """Memory by name, as large as was ever asked for, and views of its beginning by shape.

    Views are kept: making them anew in every step costs more than some of the kernels that work on them.
    """

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}
        self._views: dict[tuple[Any, ...], Tensor] = {}

    def megabytes(self) -> dict[str, float]:
        """What is held, by name."""
        return {name: held.nbytes / 1e6 for name, held in self._memory.items()}

    def rows(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """A contiguous tensor: zeros, or what was written there."""
        return self._view(name, like, shape, lambda take: take(math.prod(shape)).view(shape))

    def planes(self, name: str, like: Tensor, n: int, c: int, h: int, w: int) -> Tensor:
        """Channels-last planes. [N, C, H, W]"""
        return self._view(
            name, like, ("planes", n, c, h, w), lambda take: take(n * c * h * w).view(n, h, w, c).permute(0, 3, 1, 2)
        )

    def matrices(self, name: str, like: Tensor, m: int, rows: int, columns: int) -> Tensor:
        """A transformed tensor of :mod:`ddpp.ops.winograd`. [(m + 2)^2, rows, columns]"""
        return self._view(
            name, like, ("matrices", m, rows, columns), lambda take: winograd.transformed(m, rows, columns, take)
        )

    def _view(
        self, name: str, like: Tensor, shape: tuple[Any, ...], make: Callable[[Callable[[int], Tensor]], Tensor]
    ) -> Tensor:
        key = name, like.dtype, like.device, shape
        found = self._views.get(key)
        if found is None:
            found = self._views[key] = make(lambda size: self._take(name, like, size))
        return found

    def _take(self, name: str, like: Tensor, size: int) -> Tensor:
        held = self._memory.get(name)
        if held is None or held.numel() < size or held.dtype != like.dtype or held.device != like.device:
            self._views = {key: view for key, view in self._views.items() if key[0] != name}
            held = self._memory[name] = like.new_zeros(size)
        return held[:size]


class VendorConvolution:
    """Through torch's own convolution; for any device."""

    def __init__(self, module: nn.Conv2d, first: bool) -> None:
        self.padding, self.first = cast(tuple[int, int], module.padding), first

    def load(self, weight: Tensor, tangent: Tensor | None) -> None:
        self.weight, self.tangent, self.sum = weight, tangent, torch.zeros_like(weight)

    def forward(self, x: Tensor) -> Tensor:
        self.x = x.contiguous(memory_format=torch.channels_last)
        return F.conv2d(self.x, self.weight, padding=self.padding)

    def backward(self, grad: Tensor) -> Tensor | None:
        d_x, d_weight = self._backward(grad, self.x, self.weight, not self.first, True)
        self.sum += d_weight
        return d_x

    def dual(self, x: Tensor) -> Tensor:
        assert self.tangent is not None
        self.x = x = x.contiguous(memory_format=torch.channels_last)
        by_tangent = F.conv2d(x if self.first else x[: len(x) // 2], self.tangent, padding=self.padding)
        y = F.conv2d(x, self.weight, padding=self.padding)
        if self.first:
            return torch.cat([y, by_tangent])
        y[len(x) // 2 :] += by_tangent
        return y

    def dual_backward(self, grad: Tensor) -> Tensor:
        assert self.tangent is not None
        n = len(grad) // 2
        seen = grad[:n] if self.first else grad  # the tangent of the images is 0
        d_x, d_weight = self._backward(seen, self.x, self.weight, True, True)
        self.sum += d_weight
        through, _ = self._backward(grad[n:], self.x[:n], self.tangent, True, False)
        d_x[:n] += through
        return d_x

    def finish(self, grad_weight: Tensor) -> None:
        grad_weight.copy_(self.sum)

    def _backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, of_input: bool, of_weight: bool
    ) -> tuple[Tensor, Tensor]:
        mask = [of_input, of_weight, False]
        d_x, d_weight, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, [1, 1], self.padding, [1, 1], False, [0, 0], 1, mask
        )
        return d_x, d_weight


class WinogradConvolution:
    """Through :mod:`ddpp.ops.winograd`; one zero pixel around the image.

    Weights are transformed where they are used: into memory that all layers share, they are in cache then.
    """

    def __init__(self, m: int, buffers: _Buffers, name: str) -> None:
        self.m, self.buffers, self.name = m, buffers, name

    def load(self, weight: Tensor, tangent: Tensor | None) -> None:
        self.weight, self.tangent = weight, tangent
        self.sum = self.buffers.matrices(self.name + " sum", weight, self.m, *weight.shape[:2])
        self.begun = False

    def forward(self, x: Tensor) -> Tensor:
        self.tiles = self._tiles(self.name + " tiles", x)
        return self._convolve(x, self.tiles, backward=False)

    def backward(self, grad: Tensor) -> Tensor:
        self._add_to_sum(grad)
        return self._convolve(grad, None, backward=True)

    dual, dual_backward = forward, backward

    def finish(self, grad_weight: Tensor) -> None:
        ops().winograd_weight_transposed.default(self.sum, self.m, grad_weight)

    def _convolve(self, x: Tensor, tiles: Tensor | None, backward: bool) -> Tensor:
        weight = self._transformed("weight", self.weight, backward)
        tangent = None if self.tangent is None else self._transformed("tangent", self.tangent, backward)
        y = self.buffers.planes(f"{self.name} {'d_x' if backward else 'y'}", x, len(x), weight.shape[2], *x.shape[2:])
        ops().winograd_convolve.default(x, weight, tangent, backward, self.m, tiles, y)
        return y

    def _transformed(self, name: str, weight: Tensor, backward: bool) -> Tensor:
        outputs, inputs = weight.shape[:2]
        rows, columns = (outputs, inputs) if backward else (inputs, outputs)
        matrices = self.buffers.matrices(name, weight, self.m, rows, columns)
        ops().winograd_weight.default(weight, self.m, backward, matrices)
        return matrices

    def _add_to_sum(self, grad: Tensor) -> None:
        grads = self._tiles("grads", grad)
        ops().winograd_output_transposed.default(grad, self.m, grads)
        ops().multiply_matrices.default(grads, self.tiles, True, self.begun, self.sum)
        self.begun = True

    def _tiles(self, name: str, images: Tensor) -> Tensor:
        down, across = winograd.tile_grid(images.shape[2], images.shape[3], self.m)
        return self.buffers.matrices(name, images, self.m, len(images) * down * across, images.shape[1])


class ColumnConvolution:
    """The first layer on the CPU: few inputs, whose 3x3 neighbourhoods are laid out as rows of one matrix."""

    def __init__(self, module: nn.Conv2d, buffers: _Buffers) -> None:
        self.padding, self.buffers = cast(tuple[int, int], module.padding), buffers
        self.taps = module.in_channels * 9
        self.row = -(-self.taps // 16) * 16  # a whole number of registers

    def load(self, weight: Tensor, tangent: Tensor | None) -> None:
        self.outputs = len(weight)
        self.weight = self._matrix(weight, "weight")
        self.tangent = None if tangent is None else self._matrix(tangent, "tangent")
        self.sum = self.buffers.rows("columns sum", weight, 1, self.row, self.outputs)
        self.begun = False

    def forward(self, x: Tensor) -> Tensor:
        self._lay_out(x)
        y = self._planes(x, len(x))
        self._apply(self.weight, y)
        return y

    def backward(self, grad: Tensor) -> None:
        self._add_to_sum(grad)

    def dual(self, x: Tensor) -> Tensor:
        assert self.tangent is not None
        self._lay_out(x)
        y = self._planes(x, 2 * len(x))
        self._apply(self.weight, y[: len(x)])
        self._apply(self.tangent, y[len(x) :])
        return y

    def dual_backward(self, grad: Tensor) -> Tensor:
        assert self.tangent is not None
        n = len(grad) // 2
        self._add_to_sum(grad[:n])
        d_columns = self.buffers.rows("d_columns", grad, *self.columns.shape)
        for part, weight, accumulate in ((grad[:n], self.weight, False), (grad[n:], self.tangent, True)):
            by_output = weight.transpose(1, 2).contiguous()
            ops().multiply_matrices.default(
                self._rows(part), by_output, False, accumulate, d_columns.flatten(0, 1)[None]
            )
        d_x = self.buffers.rows("columns d_x", grad, *self.shape)
        ops().images_of_columns.default(d_columns, *self.padding, d_x)
        return d_x

    def finish(self, grad_weight: Tensor) -> None:
        grad_weight.flatten(1).copy_(self.sum[0, : self.taps].t())

    def _matrix(self, weight: Tensor, name: str) -> Tensor:
        matrix = self.buffers.rows("columns " + name, weight, 1, self.row, self.outputs)
        matrix[0, : self.taps].copy_(weight.flatten(1).t())
        return matrix

    def _lay_out(self, x: Tensor) -> None:
        self.shape = x.shape
        self.columns = self.buffers.rows("columns", x, len(x), math.prod(self._sides()), self.row)
        ops().columns_of_images.default(x.contiguous(), *self.padding, self.columns)

    def _sides(self) -> tuple[int, int]:
        height, width = (side + 2 * pad - 2 for side, pad in zip(self.shape[2:], self.padding, strict=True))
        return height, width

    def _planes(self, x: Tensor, n: int) -> Tensor:
        return self.buffers.planes("columns y", x, n, self.outputs, *self._sides())

    def _rows(self, planes: Tensor) -> Tensor:
        return planes.permute(0, 2, 3, 1).flatten(0, 2)[None]  # [1, pixels, O]

    def _apply(self, weight: Tensor, y: Tensor) -> None:
        ops().multiply_matrices.default(self.columns.flatten(0, 1)[None], weight, False, False, self._rows(y))

    def _add_to_sum(self, grad: Tensor) -> None:
        columns = self.columns.flatten(0, 1)[None]
        ops().multiply_matrices.default(columns, self._rows(grad), True, self.begun, self.sum)
        self.begun = True


class _Weights(NamedTuple):
    """Views into a flat vector: a block's parameters without the convolution's bias."""

    weight: Tensor  # [O, I, 3, 3]
    scale: Tensor  # [O]
    shift: Tensor  # [O]


class _Block:
    """Convolution, instance normalisation, ReLU and pooling."""

    def __init__(self, convolution: Convolution, eps: float, buffers: _Buffers, name: str) -> None:
        self.convolution, self.eps, self.buffers, self.name = convolution, eps, buffers, name

    def load(self, own: _Weights, tangent: _Weights | None = None) -> None:
        self.own, self.tangent = own, tangent
        self.convolution.load(own.weight, None if tangent is None else tangent.weight)

    def forward(self, x: Tensor) -> Tensor:
        self.y = self.convolution.forward(x)
        n, c = self.y.shape[:2]
        out = norm_pool.Forward(
            self._pooled(n), self.buffers.rows(self.name + " statistics", x, norm_pool.STATISTICS, n, c)
        )
        self.statistics = out.statistics
        norm_pool.norm_relu_pool_forward(self.y, self.own.scale, self.own.shift, self.eps, out=out)
        return out.out

    def backward(self, grad: Tensor, grads: _Weights) -> Tensor | None:
        out = norm_pool.Backward(self._grad(), *self.buffers.rows("d_norm", grad, 2, self.y.shape[1]))
        norm_pool.norm_relu_pool_backward(grad, self.y, self.own.scale, self.own.shift, self.statistics, out=out)
        grads.scale.add_(out.scale)
        grads.shift.add_(out.shift)
        return self.convolution.backward(out.y)

    def dual(self, x: Tensor) -> Tensor:
        assert self.tangent is not None
        self.y = self.convolution.dual(x)
        n, c = len(self.y) // 2, self.y.shape[1]
        pooled = self._pooled(2 * n)
        statistics = self.buffers.rows(self.name + " dual statistics", x, norm_pool.DUAL_STATISTICS, n, c)
        self.statistics = statistics
        norm_pool.norm_relu_pool_dual(
            self.y[:n],
            self.y[n:],
            self.own.scale,
            self.tangent.scale,
            self.own.shift,
            self.tangent.shift,
            self.eps,
            out=norm_pool.Dual(pooled[:n], pooled[n:], statistics),
        )
        return pooled

    def dual_backward(self, grad: Tensor, grads: _Weights) -> Tensor:
        assert self.tangent is not None
        n, c = len(self.y) // 2, self.y.shape[1]
        both = self._grad()
        out = norm_pool.DualBackward(both[:n], both[n:], *self.buffers.rows("d_norm", grad, 2, c))
        norm_pool.norm_relu_pool_dual_backward(
            grad[:n],
            grad[n:],
            self.y[:n],
            self.y[n:],
            self.own.scale,
            self.tangent.scale,
            self.own.shift,
            self.statistics,
            out=out,
        )
        grads.scale.add_(out.scale)
        grads.shift.add_(out.shift)
        return self.convolution.dual_backward(both)

    def _pooled(self, n: int) -> Tensor:
        _, c, h, w = self.y.shape
        return self.buffers.planes(self.name + " pooled", self.y, n, c, h // 2, w // 2)

    def _grad(self) -> Tensor:
        """Where the gradient of y goes: over y itself where the kernels allow it, which spares the cache."""
        over = self.y.device.type == "cpu" and self.y.is_contiguous(memory_format=torch.channels_last)
        return self.y if over else self.buffers.planes("d_y", self.y, *self.y.shape)


class ConvNetStep:
    """Gradient of a ConvNet's cross-entropy, and phi with its derivatives; see :mod:`ddpp.unroll`.

    Args:
        network: one that :meth:`suits`; its own parameters are not used.
        tile: side m of the Winograd tiles on the CPU: 2 (as exact as a direct convolution), 4 (faster; see
            :mod:`ddpp.ops.winograd` for its error) or 0, torch's convolutions.

    Holds buffers: one object at a time works on one problem.
    """

    def __init__(self, network: Network, tile: int = 2) -> None:
        self.network, self.tile, self.layout = network, tile, flat.layout(network)
        self.buffers = _Buffers()
        self.blocks: list[_Block] | None = None

    @staticmethod
    def suits(network: nn.Module) -> bool:
        """Whether the network is made of the blocks that are written out here."""
        if not isinstance(network, Network) or not isinstance(network.features, nn.Sequential):
            return False
        modules = list(network.features)
        starts = range(0, len(modules), _BLOCK)
        return bool(modules) and all(_is_block(modules[i : i + _BLOCK], first=i == 0) for i in starts)

    def logits(self, theta: Tensor, images: Tensor) -> Tensor:
        """The network's outputs. [n, K]"""
        blocks, (own, (weight, bias)) = self._blocks(theta), self._views(theta)
        for block, parameters in zip(blocks, own, strict=True):
            block.load(parameters)
        parts = images.split(self._size(images))
        return torch.cat([torch.addmm(bias, _through(blocks, x).flatten(1), weight.t()) for x in parts])

    def gradient(self, theta: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """d/dtheta of the mean cross-entropy; labels are class indices or the logits of soft ones. [P]"""
        gradient = torch.zeros_like(theta)
        blocks, targets = self._blocks(theta), self._targets(labels, theta)
        own, (weight, bias) = self._views(theta)
        grads, (d_weight, d_bias) = self._views(gradient)
        for block, parameters in zip(blocks, own, strict=True):
            block.load(parameters)
        for x, target in self._micro_batches(images, targets):
            x = _through(blocks, x)
            features = x.flatten(1)
            d_logits = (torch.addmm(bias, features, weight.t()).softmax(1) - target) / len(images)
            d_weight.addmm_(d_logits.t(), features)
            d_bias.add_(d_logits.sum(0))
            grad: Tensor | None = (d_logits @ weight).view(x.shape)
            for block, sums in zip(reversed(blocks), reversed(grads), strict=True):
                assert grad is not None
                grad = block.backward(grad, sums)
        self._finish(blocks, grads)
        return gradient

    def adjoint(self, theta: Tensor, adjoint: Tensor, images: Tensor, labels: Tensor) -> StepAdjoint:
        """phi = <gradient(theta, images, labels), adjoint> and its derivatives."""
        gradient, d_images = torch.zeros_like(theta), torch.empty_like(images)
        blocks, targets, phi = self._blocks(theta), self._targets(labels, theta), theta.new_zeros(())
        own, (weight, bias) = self._views(theta)
        tangents, (weight_tangent, bias_tangent) = self._views(adjoint)
        grads, (d_weight, d_bias) = self._views(gradient)
        d_labels = []
        for block, parameters, along in zip(blocks, own, tangents, strict=True):
            block.load(parameters, along)
        for part, (x, target) in zip(
            d_images.split(self._size(images)), self._micro_batches(images, targets), strict=True
        ):
            n = len(x)
            for block in blocks:
                x = block.dual(x)
            features = x.flatten(1)
            value, tangent = features[:n], features[n:]
            logits_tangent = torch.addmm(bias_tangent, tangent, weight.t()).addmm_(value, weight_tangent.t())
            softmax = torch.addmm(bias, value, weight.t()).softmax(1)
            by_tangent = (softmax - target) / len(images)
            by_value = softmax * (logits_tangent - _inner(softmax, logits_tangent)) / len(images)
            phi = phi + (by_tangent * logits_tangent).sum()
            d_labels.append(target * (_inner(target, logits_tangent) - logits_tangent) / len(images))
            d_weight.addmm_(by_value.t(), value).addmm_(by_tangent.t(), tangent)
            d_bias.add_(by_value.sum(0))
            grad = torch.cat([(by_value @ weight).addmm_(by_tangent, weight_tangent), by_tangent @ weight]).view(
                x.shape
            )
            for block, sums in zip(reversed(blocks), reversed(grads), strict=True):
                grad = block.dual_backward(grad, sums)
            part.copy_(grad)
        self._finish(blocks, grads)
        return StepAdjoint(phi, gradient, d_images, torch.cat(d_labels) if labels.is_floating_point() else None)

    def _blocks(self, theta: Tensor) -> list[_Block]:
        """The blocks, made when the device is known: on the CPU with own convolutions where those are compiled."""
        if self.blocks is None:
            modules = list(cast(nn.Sequential, self.network.features))
            own = theta.device.type == "cpu" and self.tile > 0 and winograd.is_compiled()
            self.blocks = []
            for i in range(0, len(modules), _BLOCK):
                convolution, norm = cast(nn.Conv2d, modules[i]), cast(nn.GroupNorm, modules[i + 1])
                name = f"block {i // _BLOCK}"
                layer: Convolution
                if not own:
                    layer = VendorConvolution(convolution, first=i == 0)
                elif i == 0:
                    layer = ColumnConvolution(convolution, self.buffers)
                else:
                    layer = WinogradConvolution(self.tile, self.buffers, name)
                self.blocks.append(_Block(layer, norm.eps, self.buffers, name))
        return self.blocks

    def _views(self, theta: Tensor) -> tuple[list[_Weights], tuple[Tensor, Tensor]]:
        """The blocks' parameters, and weight and bias of the linear layer."""
        *parts, weight, bias = flat.unflatten(theta, self.layout).values()
        blocks = [_Weights(*(parts[i + k] for k in (0, 2, 3))) for i in range(0, len(parts), _BLOCK)]
        return blocks, (weight, bias)

    def _targets(self, labels: Tensor, theta: Tensor) -> Tensor:
        if labels.is_floating_point():
            return labels.softmax(1)
        return theta.new_zeros(len(labels), self.network.classifier.out_features).scatter_(1, labels[:, None], 1)

    def _size(self, images: Tensor) -> int:
        """Images of a micro-batch."""
        return max(1, MICRO_PIXELS // images[0, 0].numel()) if images.device.type == "cpu" else len(images)

    def _micro_batches(self, images: Tensor, targets: Tensor) -> zip[tuple[Tensor, Tensor]]:
        size = self._size(images)
        return zip(images.split(size), targets.split(size), strict=True)

    def _finish(self, blocks: Sequence[_Block], grads: Sequence[_Weights]) -> None:
        for block, sums in zip(blocks, grads, strict=True):
            block.convolution.finish(sums.weight)


def _through(blocks: Sequence[_Block], x: Tensor) -> Tensor:
    for block in blocks:
        x = block.forward(x)
    return x  # [n, C, H, W]


def _inner(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(1, keepdim=True)  # [n, 1]


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
