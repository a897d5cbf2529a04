"""The linear layer of a student step under its softmax cross-entropy, and what the step needs back from it.

Of images with features x, outputs z = W x + b, p their softmax, q the targets, n the images that the cross-entropy is a
mean of, ' for tangents::

    plain    z* = (p - q) / n
    dual     z' = W x' + W' x + b'      phi = sum (p - q) z' / n      the tangent of the cross-entropy
             z'* = (p - q) / n          z* = p (z' - <p, z'>) / n     l* = q (<q, z'> - z') / n

where * marks the derivative of the cross-entropy, in the dual case that of phi, and l are the logits of soft targets.
Then W* = sum z* x + z'* x', b* = sum z*, x* = z* W + z'* W', x'* = z'* W.

Dual rows are stacked: those of values, then those of tangents. There are kernels for CUDA, for few images and classes,
of tensors without gaps; the rest is the library's work, and on a CPU the head is part of the whole step's kernel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpp.ops._library import define, ops
from ddpp.ops._streams import ALONG, OF_WEIGHTS, Beside

#: The kernels are used up to so many products of features and weights, and so many weights: each image reads all
#: weights for itself, on one multiprocessor, which costs more than launches beyond.
MOST_PRODUCTS, MOST_WEIGHTS = 2**23, 2**17
_MOST_ROWS, _MOST_CLASSES = 2**18, 2**10  # that the kernels' grid and shared memory hold


class Linear(NamedTuple):
    """A linear layer, its tangent or its gradient."""

    weight: Tensor  # [K, F]
    bias: Tensor  # [K]


def _ops(features: Tensor, weight: Tensor) -> Any:
    """The operators in use, but for problems that the library is better at."""
    rows, classes, weights = len(features), len(weight), weight.numel()
    few = rows * weights <= MOST_PRODUCTS and weights <= MOST_WEIGHTS
    return ops() if few and rows <= _MOST_ROWS and classes <= _MOST_CLASSES else torch.ops.ddpp_reference


def cotangents(features: Tensor, linear: Linear, targets: Tensor, count: int) -> Tensor:
    """The derivative by the outputs of some images' cross-entropy, a mean over ``count`` of them. [n, K]

    Args:
        features: [n, F]
        linear: the layer.
        targets: probabilities. [n, K]
    """
    found = torch.empty_like(targets)
    arguments = features, *linear, None, None, targets, count, found, None, None
    _ops(features, linear.weight).head_cotangents.default(*arguments)
    return found


def dual_cotangents(
    features: Tensor,
    linear: Linear,
    tangent: Linear,
    targets: Tensor,
    count: int,
    phis: Tensor,
    d_labels: Tensor | None = None,
) -> Tensor:
    """The derivatives of phi by the outputs and by their tangents, stacked. [2 n, K]

    Args:
        features: values and tangents. [2 n, F]
        linear, tangent: the layer.
        targets: probabilities. [n, K]
        count: the images that the cross-entropy is a mean of.
        phis: takes each image's share of phi. [n]
        d_labels: takes the derivative by the logits of the targets, if it is wanted. [n, K]
    """
    found = targets.new_empty(len(features), targets.shape[1])
    arguments = features, *linear, *tangent, targets, count, found, d_labels, phis
    _ops(features, linear.weight).head_cotangents.default(*arguments)
    return found


def gradients(cotangents: Tensor, features: Tensor, weight: Tensor, tangent: Tensor | None, out: Linear) -> Tensor:
    """The gradient of the features, and in ``out`` that of the layer. [n, F], dual [2 n, F]

    Args:
        cotangents, features: of the outputs as found above, and what went in; both stacked where there is a tangent.
        weight, tangent: of the layer. [K, F]
        out: takes the gradients of weight and bias.
    """
    found = torch.empty_like(features)
    _ops(features, weight).head_gradients.default(cotangents, features, weight, tangent, *out, found)
    return found


# ---- the meaning ----


@define(
    "head_cotangents(Tensor features, Tensor weight, Tensor bias, Tensor? weight_tangent, Tensor? bias_tangent, "
    "Tensor targets, int count, Tensor(a!) cotangents, Tensor(b!)? d_labels, Tensor(c!)? phis) -> ()"
)
def _cotangents(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    weight_tangent: Tensor | None,
    bias_tangent: Tensor | None,
    targets: Tensor,
    count: int,
    cotangents: Tensor,
    d_labels: Tensor | None,
    phis: Tensor | None,
) -> None:
    if weight_tangent is None or bias_tangent is None or phis is None:
        softmax = torch.addmm(bias, features, weight.t()).softmax(1)
        torch.sub(softmax, targets, out=cotangents).div_(count)
        return
    value, along = features.chunk(2)
    by_value, by_tangent = cotangents.chunk(2)
    beside = Beside(ALONG)
    tangents = beside(_outputs_along, value, along, weight, weight_tangent, bias_tangent)
    softmax = torch.addmm(bias, value, weight.t()).softmax(1)
    beside.wait()
    _softmax_backward(tangents, softmax, out=by_value)
    torch.sub(softmax, targets, out=by_tangent)
    cotangents.div_(count)
    torch.sum(by_tangent * tangents, 1, out=phis)
    if d_labels is not None:
        _softmax_backward(tangents, targets, out=d_labels)
        d_labels.div_(-count)


def _outputs_along(
    value: Tensor, along: Tensor, weight: Tensor, weight_tangent: Tensor, bias_tangent: Tensor
) -> Tensor:
    return torch.addmm(bias_tangent, along, weight.t()).addmm_(value, weight_tangent.t())


def _softmax_backward(grad: Tensor, probabilities: Tensor, out: Tensor) -> None:
    """out = p (grad - <p, grad>). [n, K]"""
    torch.ops.aten._softmax_backward_data.out(grad, probabilities, 1, grad.dtype, grad_input=out)


@define(
    "head_gradients(Tensor cotangents, Tensor features, Tensor weight, Tensor? weight_tangent, "
    "Tensor(a!) d_weight, Tensor(b!) d_bias, Tensor(c!) d_features) -> ()"
)
def _gradients(
    cotangents: Tensor,
    features: Tensor,
    weight: Tensor,
    weight_tangent: Tensor | None,
    d_weight: Tensor,
    d_bias: Tensor,
    d_features: Tensor,
) -> None:
    n = len(features) if weight_tangent is None else len(features) // 2
    beside = Beside(OF_WEIGHTS)
    beside(_gradients_of_layer, cotangents, features, n, d_weight, d_bias)
    torch.mm(cotangents, weight, out=d_features)
    if weight_tangent is not None:
        d_features[:n].addmm_(cotangents[n:], weight_tangent)
    beside.wait()


def _gradients_of_layer(cotangents: Tensor, features: Tensor, n: int, d_weight: Tensor, d_bias: Tensor) -> None:
    torch.mm(cotangents.t(), features, out=d_weight)
    torch.sum(cotangents[:n], 0, out=d_bias)
