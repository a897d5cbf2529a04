"""J student steps on synthetic images, and the exact gradient of the matching loss through all of them.

Student: theta_{j+1} = theta_j - lr g_j with g_j = d/dtheta CE(network(A_j(X[b_j]); theta_j), y[b_j]), j = 0..J-1.
Two engines give the same gradients. ``unrolled`` keeps the graph of all J steps, as trajectory matching is usually
written. ``adjoint`` keeps theta_0..theta_J only and walks back with lambda = dL/dtheta, one step at a time:

    phi_j     = <g_j, lambda_{j+1}>
    dL/dX    += -lr dphi_j/dX,   dL/dlr += -phi_j,   dL/dy += -lr dphi_j/dy
    lambda_j  = lambda_{j+1} - lr dphi_j/dtheta

``tesla`` is the same walk with lambda_j = lambda_J, which is what TESLA (arXiv 2211.10586) computes: an
approximation, to compare with.

The walk knows no network: a :class:`ddpp.dual.Step` gives g_j, and phi_j with its derivatives.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn.modules.dropout import _DropoutNd as _Dropout

from ddpp.dual import ConvNetStep, Step, StepAdjoint
from ddpp.errors import UserError, nearest
from ddpp.gpu import Graphs
from ddpp.models import Network, flat
from ddpp.ops import dsa_augment, masked_match_loss, norm_relu_pool
from ddpp.ops.convnet import TILES
from ddpp.ops.dsa import dsa_adjoint
from ddpp.pruning import Distance


class Matching(NamedTuple):
    """The matching loss of one unroll and its exact gradients; ``labels`` is None for class indices."""

    loss: Tensor  # []
    images: Tensor  # [N, C, H, W]
    lr: Tensor  # []
    labels: Tensor | None  # [N, K]
    kept: Tensor  # [] int64
    end: Tensor  # [P]


class AutogradStep(Step):
    """Reverse over reverse, for any twice differentiable network."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def gradient(self, theta: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        theta = theta.detach().requires_grad_()
        return grad(_cross_entropy(self.network, theta, images, labels), theta)[0]

    def adjoint(self, theta: Tensor, adjoint: Tensor, images: Tensor, labels: Tensor) -> StepAdjoint:
        theta, images = theta.detach().requires_grad_(), images.detach().requires_grad_()
        labels = labels.detach().requires_grad_(labels.is_floating_point())
        loss = _cross_entropy(self.network, theta, images, labels)
        phi = grad(loss, theta, create_graph=True)[0] @ adjoint
        d_theta, *parts = grad(phi, [theta, *_learned(images, labels)])
        return StepAdjoint(phi.detach(), d_theta, parts[0], parts[1] if len(parts) > 1 else None)


class _NormReluPool(nn.Module):
    """Takes the place of an instance normalisation whose ReLU and pooling follow; the parameters keep their names."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return norm_relu_pool(x, self.weight, self.bias, self.eps)


def _with_fused_blocks(network: nn.Module) -> nn.Module:
    """The same network with each instance normalisation, ReLU and 2x2 average pooling in a row as one operator."""
    network = copy.deepcopy(network)
    for parent in [m for m in network.modules() if isinstance(m, nn.Sequential)]:
        for i in range(len(parent) - 2):
            norm, activation, pooling = parent[i], parent[i + 1], parent[i + 2]
            if (
                isinstance(norm, nn.GroupNorm)
                and _normalises_planes(norm)
                and isinstance(activation, nn.ReLU)
                and _halves(pooling)
            ):
                parent[i], parent[i + 1], parent[i + 2] = _NormReluPool(norm), nn.Identity(), nn.Identity()
    return network


def _normalises_planes(norm: nn.GroupNorm) -> bool:
    return norm.num_groups == norm.num_channels and norm.affine


def _halves(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.AvgPool2d)
        and module.kernel_size in (2, (2, 2))
        and module.stride in (2, (2, 2))
        and module.padding in (0, (0, 0))
        and not module.ceil_mode
    )


PROVIDERS = ("auto", "autograd", "fused", "dual")


def provider(network: nn.Module, name: str = "auto", *, tile: int = 2, bf16: bool = False) -> Step:
    """What computes a student step and its adjoint. Built once, it keeps its buffers from one unroll to the next.

    Args:
        network: a model; its own parameters are not used.
        name: ``autograd``, reverse over reverse of the plain network; ``fused``, the same with instance normalisation,
            ReLU and pooling as one operator; ``dual``, the ConvNet's step written out on dual numbers
            (:mod:`ddpp.dual`), several times faster; ``auto``, the last one that suits the network.
        tile: side of the Winograd tiles that ``dual`` convolves with on the CPU: 2, 4 (faster, less exact) or 0, none.
        bf16: ``dual`` keeps planes in bfloat16; see :class:`ddpp.ops.convnet.Architecture`.

    Raises:
        UserError: an unknown name or tile, or ``dual`` or ``bf16`` for a network of other blocks.
    """
    if name not in PROVIDERS:
        raise UserError(f"unknown provider {name!r}{nearest(name, PROVIDERS)} Known: {', '.join(PROVIDERS)}")
    if tile not in TILES:
        raise UserError(f"tile must be 2, 4, or 0 for no Winograd convolution, got {tile}")
    suits = ConvNetStep.suits(network)
    if name == "dual" and not suits:
        raise UserError(
            "provider 'dual' needs a ConvNet of 3x3 convolutions, instance normalisation, ReLU and 2x2 average "
            "pooling; give 'auto' or 'fused' for this network"
        )

    if isinstance(network, Network) and suits and name in ("auto", "dual"):
        return ConvNetStep(network, tile, torch.bfloat16 if bf16 else None)
    if bf16:
        raise UserError(
            "--bf16 is there for a ConvNet with instance normalisation and fused kernels, whose step is written out; "
            "leave it out for others"
        )
    return AutogradStep(network if name == "autograd" else _with_fused_blocks(network))


def _augmented(images: Tensor, plan: Tensor | None, fused: bool) -> Tensor:
    return images if plan is None else dsa_augment(images, plan, fused=fused)


def _forward(
    step: Step,
    fused: bool,
    theta: Tensor,
    images: Tensor,
    labels: Tensor,
    lr: Tensor,
    batch: Tensor,
    plan: Tensor | None,
) -> Tensor:
    """An inner step's parameters from those before it. [P]"""
    gradient = step.gradient(theta, _augmented(images[batch], plan, fused), labels[batch])
    return torch.addcmul(theta, gradient, lr, value=-1)


def _backward(
    step: Step,
    fused: bool,
    theta: Tensor,
    adjoint: Tensor,
    images: Tensor,
    labels: Tensor,
    lr: Tensor,
    batch: Tensor,
    plan: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dL/dtheta [P] before an inner step from that after it, and what it adds to -dL/dX, -dL/dlr and -dL/dy.

    The last three: [n, C, H, W], [], and [n, K] or None.
    """
    augmented = _augmented(images[batch], plan, fused)
    found = step.adjoint(theta, adjoint, augmented, labels[batch])
    d_images = found.images if plan is None else dsa_adjoint(found.images, plan, fused=fused)
    d_labels = None if found.labels is None else lr * found.labels
    return torch.addcmul(adjoint, found.theta, lr, value=-1), lr * d_images, found.phi, d_labels


def _may_be_read(tensor: Tensor) -> bool:
    """Whether its values can be looked at without waiting for a GPU."""
    return tensor.device.type == "cpu"


def _within(indices: Tensor, count: int | None) -> bool:
    """Whether all are from 0 to below a count, if there is one."""
    least, most = indices.aminmax()
    return bool(least >= 0) and (count is None or bool(most < count))


def _cross_entropy(network: nn.Module, theta: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    soft = labels.softmax(1) if labels.is_floating_point() else labels
    return F.cross_entropy(flat.call(network, theta, images), soft)


class _Unroll(NamedTuple):
    """Everything an engine needs; see :func:`matching_gradients`."""

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
    step: Step
    checkpoint_every: int
    distance: Distance | None
    graphs: Graphs | None

    def check(self) -> None:
        parameters = sum(p.numel() for p in self.network.parameters())
        for name, vector in (("start", self.start), ("target", self.target)):
            if vector.shape != (parameters,):
                raise UserError(
                    f"{name} must be flat with the network's {parameters} parameters, got {tuple(vector.shape)}"
                )
        dtype, device = self.start.dtype, self.start.device
        for name, tensor in (("target", self.target), ("images", self.images), ("lr", self.lr)):
            if tensor.dtype != dtype or tensor.device != device:
                raise UserError(f"{name} must be {dtype} on {device} like start, got {tensor.dtype} on {tensor.device}")
        if self.images.ndim != 4:
            raise UserError(f"images must be [N, C, H, W], got {list(self.images.shape)}")
        if self.lr.ndim or (_may_be_read(self.lr) and not self.lr > 0):
            raise UserError(f"lr must be one positive number [], got {self.lr.tolist()}")
        if self.checkpoint_every < 1:
            raise UserError(f"checkpoint_every must be at least 1, got {self.checkpoint_every}")
        if any(isinstance(m, _Dropout) and m.p > 0 and m.training for m in self.network.modules()):
            raise UserError(
                "network must not draw random numbers in its steps, since the way back would draw others. Set the p of "
                "its dropout to 0."
            )
        self._check_labels()
        self._check_steps()

    def _check_labels(self) -> None:
        labels, classes = self.labels, self.network.classes if isinstance(self.network, Network) else None
        if len(labels) != len(self.images):
            raise UserError(f"labels must be as many as images ({len(self.images)}), got {len(labels)}")
        soft = labels.is_floating_point()
        fits = labels.ndim == 2 and classes in (None, labels.shape[1]) if soft else labels.ndim == 1
        if not fits or labels.dtype not in (torch.int64, self.images.dtype):
            raise UserError(
                f"labels must be class indices [N] int64, or logits [N, {classes or 'K'}] {self.images.dtype}, got "
                f"{list(labels.shape)} {labels.dtype}"
            )
        if not soft and _may_be_read(labels) and not _within(labels, classes):
            allowed = f"from 0 to {classes - 1}" if classes else "0 or more"
            raise UserError(f"labels must be {allowed}, got {labels.unique().tolist()}")

    def _check_steps(self) -> None:
        if not self.batches:
            raise UserError("batches must hold at least one inner step, got none")
        if len(self.plans) != len(self.batches):
            raise UserError(f"plans must be one an inner step ({len(self.batches)}), got {len(self.plans)}")
        for batch in self.batches:
            if not isinstance(batch, Tensor) or batch.dtype != torch.int64 or batch.ndim != 1 or not len(batch):
                told = f"{list(batch.shape)} {batch.dtype}" if isinstance(batch, Tensor) else repr(batch)
                raise UserError(f"batches must be indices of images, each a tensor [n] int64, got {told}")
        if _may_be_read(self.batches[0]) and not _within(torch.cat(list(self.batches)), len(self.images)):
            raise UserError(f"batches must hold indices from 0 to {len(self.images) - 1} of the images")

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """What an inner step takes besides parameters: the set, the step size, its indices and its plan."""
        return self.images, self.labels, self.lr, self.batches[step], self.plans[step]

    def next(self, theta: Tensor, step: int) -> Tensor:
        arguments = self.step, self.fused, theta, *self.batch(step)
        return self.graphs(_forward, *arguments).clone() if self.graphs else _forward(*arguments)

    def back(self, theta: Tensor, adjoint: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """See :func:`_backward`; with graphs, the next call of one may overwrite the results."""
        arguments = self.step, self.fused, theta, adjoint, *self.batch(step)
        if not self.graphs:
            return _backward(*arguments)
        before, *rest = self.graphs(_backward, *arguments)
        # Unless a step forward lies between, the next call takes it before anything is overwritten.
        return before if self.checkpoint_every == 1 else before.clone(), *rest

    def match(self, end: Tensor) -> tuple[Tensor, Tensor]:
        if self.distance is not None:
            return self.distance(end, self.target, self.start)
        return masked_match_loss(end, self.target, self.start, self.epsilon, fused=self.fused)

    def until_nearest(self) -> _Unroll:
        """The same without the inner steps after the one whose parameters are nearest to the target, by L1."""
        theta, target, distances = self.step.pack(self.start.detach()), self.step.pack(self.target), []
        for step in range(len(self.batches)):
            theta = self.next(theta, step)
            distances.append((theta - target).abs().sum())
        latest_first = torch.stack(distances[::-1]).nan_to_num(nan=torch.inf)
        length = len(distances) - int(latest_first.argmin())
        return self._replace(batches=self.batches[:length], plans=self.plans[:length])

    def leaves(self) -> tuple[Tensor, Tensor]:
        """Images and labels cut off from any graph; what can be learned requires gradients."""
        images, labels = self.images.detach(), self.labels.detach()
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
    step: Step | None = None,
    checkpoint_every: int = 1,
    distance: Distance | None = None,
    nearest_step: bool = False,
    graphs: Graphs | None = None,
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
        engine: ``adjoint`` (memory does not grow with J but by the P parameters of a step), ``unrolled``, or ``tesla``,
            which is not exact.
        fused: compiled kernels; False is pure PyTorch.
        step: what computes a student step for the ``adjoint`` engine, as :func:`provider` gives it; by default
            the fastest one, or reverse over reverse without ``fused``.
        checkpoint_every: the ``adjoint`` engine keeps the parameters of every so many steps and computes those between
            again, which gives the same bits.
        distance: another distance than DDPP's, from (end, target, start) to (loss, kept); see :mod:`ddpp.pruning`.
        nearest_step: match after the inner step that is nearest to the target by L1, the later one of equals; the
            gradient is of the steps up to it (ATT, arXiv 2407.14245).
        graphs: holds the ``adjoint`` engine's inner steps as CUDA graphs, from one call to the next; needs ``fused``
            and the same ``step`` at each call.

    Returns:
        First-order quantities without a graph: the loss, its gradients by images, step size and soft labels, the number
        of parameters kept by the mask, and the student's last parameters. kept = 0 marks a degenerate step.

    Raises:
        UserError: shapes, dtypes or the engine's name do not fit, or the network has dropout; on the CPU also labels or
            indices out of range, and a step size that is not positive.
    """
    if engine not in ENGINES:
        raise UserError(f"unknown engine {engine!r}{nearest(engine, ENGINES)} Known: {', '.join(ENGINES)}")
    for name, tensor in (("start", start), ("target", target), ("images", images), ("labels", labels), ("lr", lr)):
        if not isinstance(tensor, Tensor):
            raise UserError(f"{name} must be a tensor, got {type(tensor).__name__}; give torch.tensor(...)")
    step = (step or provider(network, "auto" if fused else "autograd")).on(start.device)
    drawn = [None] * len(batches) if plans is None else plans
    with torch.inference_mode(False), torch.enable_grad():  # also where the caller records nothing
        given = _cut(start), _cut(target), _cut(images), _cut(labels), _cut(lr), batches, drawn
        u = _Unroll(network, *given, epsilon, fused, step, checkpoint_every, distance, graphs)
        u.check()
        return ENGINES[engine](u.until_nearest() if nearest_step else u)


def _cut(tensor: Tensor) -> Tensor:
    """Without a graph, where autograd may use it."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def _unrolled(u: _Unroll) -> Matching:
    (images, labels), lr = u.leaves(), u.lr.detach().requires_grad_()
    theta = u.start.detach().requires_grad_()
    for step, batch in enumerate(u.batches):
        loss = _cross_entropy(u.network, theta, _augmented(images[batch], u.plans[step], u.fused), labels[batch])
        theta = theta - lr * grad(loss, theta, create_graph=True)[0]
    loss, kept = u.match(theta)
    d_lr, d_images, *d_labels = grad(loss, [lr, *_learned(images, labels)])
    return Matching(loss.detach(), d_images, d_lr, d_labels[0] if d_labels else None, kept, theta.detach())


def _adjoint(u: _Unroll, *, exact: bool = True) -> Matching:
    theta, checkpoints = u.step.pack(u.start.detach()), []
    for step in range(len(u.batches)):
        if step % u.checkpoint_every == 0:
            checkpoints.append(theta)
        theta = u.next(theta, step)
    end = u.step.unpack(theta).requires_grad_()
    loss, kept = u.match(end)
    adjoint = u.step.pack(grad(loss, end)[0])  # [P]

    d_lr = torch.zeros_like(u.lr)
    d_images, d_labels = torch.zeros_like(u.images), torch.zeros_like(u.labels)
    for step, theta in _backwards(u, checkpoints):
        before, of_images, phi, of_labels = u.back(theta, adjoint, step)
        d_images.index_add_(0, u.batches[step], of_images, alpha=-1)
        if of_labels is not None:
            d_labels.index_add_(0, u.batches[step], of_labels, alpha=-1)
        d_lr -= phi
        if exact:
            adjoint = before
    learned = d_labels if u.labels.is_floating_point() else None
    return Matching(loss.detach(), d_images, d_lr, learned, kept, end.detach())


def _backwards(u: _Unroll, checkpoints: list[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """The steps from the last to the first with the parameters they began at, computed from the checkpoint before."""
    while checkpoints:
        states = [checkpoints.pop()]
        first = len(checkpoints) * u.checkpoint_every
        for step in range(first, min(first + u.checkpoint_every, len(u.batches)) - 1):
            states.append(u.next(states[-1], step))
        while states:
            yield first + len(states) - 1, states.pop()


def _learned(*leaves: Tensor) -> list[Tensor]:
    return [t for t in leaves if t.requires_grad]


ENGINES: dict[str, Callable[[_Unroll], Matching]] = {
    "adjoint": _adjoint,
    "unrolled": _unrolled,
    "tesla": partial(_adjoint, exact=False),
}
