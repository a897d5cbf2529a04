"""J student steps on synthetic images, and the exact gradient of the matching loss through all of them.

Student: theta_{j+1} = theta_j - lr g_j with g_j = d/dtheta CE(network(A_j(X[b_j]); theta_j), y[b_j]), j = 0..J-1.
Two engines give the same gradients. ``unrolled`` keeps the graph of all J steps, as trajectory matching is usually
written. ``adjoint`` keeps theta_0..theta_J only and walks back with lambda = dL/dtheta, one step's graph at a time:

    phi_j     = <g_j, lambda_{j+1}>
    dL/dX    += -lr dphi_j/dX,   dL/dlr += -phi_j,   dL/dy += -lr dphi_j/dy
    lambda_j  = lambda_{j+1} - lr dphi_j/dtheta
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import grad

from ddpp.errors import UserError, nearest
from ddpp.models import flat
from ddpp.ops import dsa_augment, masked_match_loss


class Matching(NamedTuple):
    """The matching loss of one unroll and its exact gradients; ``labels`` is None for class indices."""

    loss: Tensor  # []
    images: Tensor  # [N, C, H, W]
    lr: Tensor  # []
    labels: Tensor | None  # [N, K]
    kept: Tensor  # [] int64
    end: Tensor  # [P]


class _Unroll(NamedTuple):
    """Everything an engine needs, checked."""

    network: nn.Module
    start: Tensor
    target: Tensor
    images: Tensor
    labels: Tensor
    lr: Tensor
    batches: Sequence[Tensor]
    plans: Sequence[Tensor | None]
    epsilon: float | None
    fused: bool

    def cross_entropy(self, theta: Tensor, images: Tensor, labels: Tensor, step: int) -> Tensor:
        """Loss of one inner step on its batch, augmented by the step's plan."""
        plan = self.plans[step]
        if plan is not None:
            images = dsa_augment(images, plan, fused=self.fused)
        soft = labels.softmax(1) if labels.is_floating_point() else labels
        return F.cross_entropy(flat.call(self.network, theta, images), soft)

    def match(self, end: Tensor) -> tuple[Tensor, Tensor]:
        return masked_match_loss(end, self.target, self.start, self.epsilon, fused=self.fused)

    def leaves(self, batch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Images and labels, of all or of one batch, cut off from any graph; what can be learned requires gradients."""
        images, labels = self.images.detach(), self.labels.detach()
        if batch is not None:
            images, labels = images[batch], labels[batch]
        return images.requires_grad_(), labels.requires_grad_(labels.is_floating_point())


def matching_gradients(
    network: nn.Module,
    start: Tensor,
    target: Tensor,
    images: Tensor,
    labels: Tensor,
    lr: Tensor,
    batches: Sequence[Tensor],
    plans: Sequence[Tensor] | None = None,
    epsilon: float | None = 0.1,
    engine: str = "adjoint",
    *,
    fused: bool = True,
) -> Matching:
    """Loss and exact gradients of matching a teacher's trajectory (DDPP, arXiv 2209.14609, equations 1 to 8).

    Args:
        network: a model; its own parameters are not used.
        start: the student's first parameters, flat in ``parameters()`` order. [P]
        target: the teacher's parameters some epochs later. [P]
        images: synthetic images, normalised as the real ones. [N, C, H, W]
        labels: class indices [N] int64, or soft labels as logits [N, K] of the images' dtype.
        lr: the student's step size, positive. []
        batches: for each of the J inner steps the indices of its images, without repeats. [n_j] int64
        plans: for each inner step an augmentation plan (:mod:`ddpp.augment`), or None. [n_j, 16]
        epsilon: DDPP's pruning bound on the ratio of parameters; None prunes nothing (MTT).
        engine: ``adjoint`` (memory does not grow with J but by the P parameters of a step) or ``unrolled``.
        fused: compiled kernels for loss and augmentation; False is pure PyTorch.

    Returns:
        First-order quantities without a graph: the loss, its gradients by images, step size and soft labels, the number
        of parameters kept by the mask, and the student's last parameters. kept = 0 marks a degenerate step.

    Raises:
        UserError: shapes, dtypes or the engine's name do not fit.
    """
    unroll = _checked(network, start, target, images, labels, lr, batches, plans, epsilon, fused)
    if engine not in ENGINES:
        raise UserError(f"unknown engine {engine!r}{nearest(engine, ENGINES)} Known: {', '.join(ENGINES)}")
    return ENGINES[engine](unroll)


def _unrolled(u: _Unroll) -> Matching:
    (images, labels), lr = u.leaves(), u.lr.detach().requires_grad_()
    theta = u.start.detach().requires_grad_()
    for step, batch in enumerate(u.batches):
        loss = u.cross_entropy(theta, images[batch], labels[batch], step)
        theta = theta - lr * grad(loss, theta, create_graph=True)[0]
    loss, kept = u.match(theta)
    d_lr, d_images, *d_labels = grad(loss, [lr, *_learned(images, labels)])
    return Matching(loss.detach(), d_images, d_lr, d_labels[0] if d_labels else None, kept, theta.detach())


def _adjoint(u: _Unroll) -> Matching:
    lr = u.lr.detach()
    states = [u.start.detach()]
    for step, batch in enumerate(u.batches):
        theta = states[-1].detach().requires_grad_()
        loss = u.cross_entropy(theta, u.images[batch], u.labels[batch], step)
        states.append(states[-1] - lr * grad(loss, theta)[0])
    end = states.pop().requires_grad_()
    loss, kept = u.match(end)
    adjoint = grad(loss, end)[0]  # [P]

    d_lr = torch.zeros_like(lr)
    totals = [torch.zeros_like(t) for t in _learned(*u.leaves())]
    for step in reversed(range(len(u.batches))):
        batch, theta = u.batches[step], states.pop().requires_grad_()
        images, labels = u.leaves(batch)
        gradient = grad(u.cross_entropy(theta, images, labels, step), theta, create_graph=True)[0]
        phi = gradient @ adjoint
        d_theta, *parts = grad(phi, [theta, *_learned(images, labels)])
        for total, part in zip(totals, parts, strict=True):
            total.index_add_(0, batch, -lr * part)
        d_lr -= phi.detach()
        adjoint = adjoint - lr * d_theta
    return Matching(loss.detach(), totals[0], d_lr, totals[1] if len(totals) > 1 else None, kept, end.detach())


def _learned(*leaves: Tensor) -> list[Tensor]:
    return [t for t in leaves if t.requires_grad]


ENGINES: dict[str, Callable[[_Unroll], Matching]] = {"adjoint": _adjoint, "unrolled": _unrolled}


def _checked(
    network: nn.Module,
    start: Tensor,
    target: Tensor,
    images: Tensor,
    labels: Tensor,
    lr: Tensor,
    batches: Sequence[Tensor],
    plans: Sequence[Tensor] | None,
    epsilon: float | None,
    fused: bool,
) -> _Unroll:
    parameters = sum(p.numel() for p in network.parameters())
    for name, vector in (("start", start), ("target", target)):
        if vector.shape != (parameters,):
            raise UserError(
                f"{name} must be flat with the network's {parameters} parameters, got {tuple(vector.shape)}"
            )
    if len(labels) != len(images):
        raise UserError(f"labels must be as many as images ({len(images)}), got {len(labels)}")
    if not batches:
        raise UserError("batches must hold at least one inner step, got none")
    if plans is not None and len(plans) != len(batches):
        raise UserError(f"plans must be one an inner step ({len(batches)}), got {len(plans)}")
    for name, tensor in (("target", target), ("images", images), ("lr", lr)):
        if tensor.dtype != start.dtype or tensor.device != start.device:
            raise UserError(
                f"{name} must be {start.dtype} on {start.device} like start, got {tensor.dtype} on {tensor.device}"
            )
    steps = list(plans) if plans is not None else [None] * len(batches)
    return _Unroll(network, start, target, images, labels, lr, batches, steps, epsilon, fused)
