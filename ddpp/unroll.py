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
from collections.abc import Callable, Collection, Iterator, Sequence
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
from ddpp.ops import masked_match_loss, norm_relu_pool
from ddpp.ops.convnet import TILES
from ddpp.optimizers import OPTIMIZERS, Batch, Pulled, Rule, augmented, backward, forward
from ddpp.pruning import Distance


class Gradients(NamedTuple):
    """The loss of one unroll and its exact gradients; ``labels`` is None for class indices."""

    loss: Tensor  # []
    images: Tensor  # [N, C, H, W]
    lr: Tensor  # []
    labels: Tensor | None  # [N, K]
    kept: Tensor  # [] int64, of the parameters in a matching loss
    end: Tensor  # [P]


#: From a student's last parameters [P] to a loss [] and how much it is of [].
Objective = Callable[[Tensor], tuple[Tensor, Tensor]]


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
    """Everything an engine needs; see :func:`training_gradients`."""

    network: nn.Module
    start: Tensor
    images: Tensor
    labels: Tensor
    lr: Tensor
    batches: Sequence[Tensor]
    plans: Sequence[Tensor | None]
    objective: Objective
    fused: bool
    step: Step
    rule: Rule
    corrections: Sequence[Tensor | None]
    first: int
    checkpoint_every: int
    graphs: Graphs | None

    def check(self) -> None:
        _check_flat("start", self.start, self.network)
        for name, tensor in (("images", self.images), ("lr", self.lr)):
            _check_alike(name, tensor, self.start)
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
        if not 0 <= self.first < len(self.batches):
            raise UserError(f"first must be from 0 to below the {len(self.batches)} inner steps, got {self.first}")
        for batch in self.batches:
            if not isinstance(batch, Tensor) or batch.dtype != torch.int64 or batch.ndim != 1 or not len(batch):
                told = f"{list(batch.shape)} {batch.dtype}" if isinstance(batch, Tensor) else repr(batch)
                raise UserError(f"batches must be indices of images, each a tensor [n] int64, got {told}")
        if _may_be_read(self.batches[0]) and not _within(torch.cat(list(self.batches)), len(self.images)):
            raise UserError(f"batches must hold indices from 0 to {len(self.images) - 1} of the images")

    def batch(self, step: int) -> Batch:
        """What an inner step takes beside the student's state."""
        return Batch(self.images, self.labels, self.lr, self.batches[step], self.plans[step], self.corrections[step])

    def next(self, state: Tensor, step: int) -> Tensor:
        arguments = self.step, self.rule, self.fused, state, *self.batch(step)
        return self.graphs(forward, *arguments).clone() if self.graphs else forward(*arguments)

    def back(self, state: Tensor, after: Tensor, adjoint: Tensor, step: int) -> Pulled:
        """See :data:`ddpp.optimizers.Pulled`; with graphs, the next call of one may overwrite the results."""
        arguments = self.step, self.rule, self.fused, state, self.rule.told(after), adjoint, *self.batch(step)
        if not self.graphs:
            return backward(*arguments)
        before, *rest = self.graphs(backward, *arguments)
        # Unless a step forward lies between, the next call takes it before anything is overwritten.
        return before if self.checkpoint_every == 1 else before.clone(), *rest

    def begin(self) -> Tensor:
        """The state of the student before its first step."""
        return self.rule.begin(self.step.pack(self.start.detach()))

    def until_nearest(self, target: Tensor) -> _Unroll:
        """The same without the inner steps after the one whose parameters are nearest to the target, by L1."""
        state, target, distances = self.begin(), self.step.pack(target), []
        for step in range(len(self.batches)):
            state = self.next(state, step)
            distances.append((self.rule.parameters(state) - target).abs().sum())
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
) -> Gradients:
    """Loss and exact gradients of matching a teacher's trajectory (DDPP, arXiv 2209.14609, equations 1 to 8).

    Args:
        start: the teacher's parameters, with which the student begins, flat in ``parameters()`` order. [P]
        target: the teacher's parameters some epochs later. [P]
        epsilon: DDPP's pruning bound on the ratio of parameters; None prunes nothing (MTT).
        distance: another distance than DDPP's, from (end, target, start) to (loss, kept); see :mod:`ddpp.pruning`.
        nearest_step: match after the inner step that is nearest to the target by L1, the later one of equals; the
            gradient is of the steps up to it (ATT, arXiv 2407.14245).

    All others, results and errors are those of :func:`training_gradients`.
    """
    for name, tensor in (("start", start), ("target", target)):
        _check_tensor(name, tensor)
    _check_flat("target", target, network)
    _check_alike("target", target, start)
    apart = distance or partial(masked_match_loss, epsilon=epsilon, fused=fused)
    with torch.inference_mode(False):
        begin, aim = _cut(start), _cut(target)
    return training_gradients(
        network,
        begin,
        images,
        labels,
        lr,
        batches,
        plans,
        lambda end: apart(end, aim, begin),
        engine,
        fused=fused,
        step=step,
        checkpoint_every=checkpoint_every,
        nearest_to=aim if nearest_step else None,
        graphs=graphs,
    )


def training_gradients(
    network: nn.Module,
    start: Tensor,
    images: Tensor,
    labels: Tensor,
    lr: Tensor,
    batches: Sequence[Tensor],
    plans: Sequence[Tensor] | None,
    objective: Objective,
    engine: str = "adjoint",
    *,
    optimizer: str = "sgd",
    first: int = 0,
    fused: bool = True,
    step: Step | None = None,
    checkpoint_every: int = 1,
    nearest_to: Tensor | None = None,
    graphs: Graphs | None = None,
) -> Gradients:
    """Loss and exact gradients of what a student's training on synthetic images leads to.

    Args:
        network: a model; its own parameters are not used.
        start: the student's first parameters, flat in ``parameters()`` order. [P]
        images: synthetic images, normalised as the real ones. [N, C, H, W]
        labels: class indices [N] int64, or soft labels as logits [N, K] of the images' dtype.
        lr: the student's step size, positive. []
        batches: for each of the J inner steps the indices of its images, without repeats. [n_j] int64
        plans: for each inner step an augmentation plan (:mod:`ddpp.augment`), or None. [n_j, 16]
        objective: from the student's last parameters [P], in a graph, to the loss [] and a number that tells how much
            it is of, 0 where there is nothing to learn from.
        engine: ``adjoint`` (memory does not grow with J but by the parameters of a step), ``unrolled``, or ``tesla``,
            which is not exact.
        optimizer: ``sgd``, or ``adam`` with its usual constants; see :mod:`ddpp.optimizers`.
        first: the first inner step that the gradient is of; those before are taken only (RaT-BPTT, arXiv 2311.07025).
        fused: compiled kernels; False is pure PyTorch.
        step: what computes a student step for the ``adjoint`` engine, as :func:`provider` gives it; by default
            the fastest one, or reverse over reverse without ``fused``.
        checkpoint_every: the ``adjoint`` engine keeps the state of every so many steps and computes those between
            again, which gives the same bits.
        nearest_to: end after the inner step whose parameters are nearest to these by L1, the later one of equals. [P]
        graphs: holds the ``adjoint`` engine's inner steps as CUDA graphs, from one call to the next; needs ``fused``
            and the same ``step`` at each call.

    Returns:
        First-order quantities without a graph: the loss, its gradients by images, step size and soft labels, what the
        objective told beside the loss, and the student's last parameters.

    Raises:
        UserError: shapes, dtypes or the name of engine or optimizer do not fit, or the network has dropout; on the CPU
            also labels or indices out of range, and a step size that is not positive.
    """
    _check_name("engine", engine, ENGINES)
    _check_name("optimizer", optimizer, OPTIMIZERS)
    if engine == "tesla" and optimizer != "sgd":
        raise UserError(f"engine 'tesla' is an approximation for SGD, got it with optimizer {optimizer!r}")
    if nearest_to is not None and first:
        raise UserError(f"first must be 0 with nearest_to, which may end before it, got {first}")
    for name, tensor in (("start", start), ("images", images), ("labels", labels), ("lr", lr)):
        _check_tensor(name, tensor)
    rule, drawn = OPTIMIZERS[optimizer], [None] * len(batches) if plans is None else plans
    step = (step or provider(network, "auto" if fused else "autograd")).on(start.device)
    with torch.inference_mode(False), torch.enable_grad():  # also where the caller records nothing
        given = _cut(start), _cut(images), _cut(labels), _cut(lr), batches, drawn
        corrections = rule.corrections(len(batches), start)
        u = _Unroll(network, *given, objective, fused, step, rule, corrections, first, checkpoint_every, graphs)
        u.check()
        return ENGINES[engine](u if nearest_to is None else u.until_nearest(nearest_to))


def _check_name(what: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        raise UserError(f"unknown {what} {name!r}{nearest(name, known)} Known: {', '.join(known)}")


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise UserError(f"{name} must be a tensor, got {type(value).__name__}; give torch.tensor(...)")


def _check_flat(name: str, vector: Tensor, network: nn.Module) -> None:
    parameters = sum(p.numel() for p in network.parameters())
    if vector.shape != (parameters,):
        raise UserError(f"{name} must be flat with the network's {parameters} parameters, got {tuple(vector.shape)}")


def _check_alike(name: str, tensor: Tensor, start: Tensor) -> None:
    if tensor.dtype != start.dtype or tensor.device != start.device:
        raise UserError(
            f"{name} must be {start.dtype} on {start.device} like start, got {tensor.dtype} on {tensor.device}"
        )


def _cut(tensor: Tensor) -> Tensor:
    """Without a graph, where autograd may use it."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def _unrolled(u: _Unroll) -> Gradients:
    (images, labels), lr = u.leaves(), u.lr.detach().requires_grad_()
    state = u.rule.begin(u.start.detach().requires_grad_())
    for number, batch in enumerate(u.batches):
        recorded, theta = number >= u.first, u.rule.parameters(state)
        seen = augmented(images[batch], u.plans[number], u.fused)
        gradient = grad(_cross_entropy(u.network, theta, seen, labels[batch]), theta, create_graph=recorded)[0]
        state = u.rule.move(state, gradient, lr, u.corrections[number])
        state = state if recorded else state.detach().requires_grad_()
    end = u.rule.parameters(state)
    loss, kept = u.objective(end)
    d_lr, d_images, *d_labels = grad(loss, [lr, *_learned(images, labels)])
    return Gradients(loss.detach(), d_images, d_lr, d_labels[0] if d_labels else None, kept, end.detach())


def _adjoint(u: _Unroll, *, exact: bool = True) -> Gradients:
    state, checkpoints = u.begin(), []
    for number in range(len(u.batches)):
        if number >= u.first and (number - u.first) % u.checkpoint_every == 0:
            checkpoints.append(state)
        state = u.next(state, number)
    end = u.step.unpack(u.rule.parameters(state)).requires_grad_()
    loss, kept = u.objective(end)
    adjoint = u.rule.begin(u.step.pack(grad(loss, end)[0]))

    d_lr = torch.zeros_like(u.lr)
    d_images, d_labels = torch.zeros_like(u.images), torch.zeros_like(u.labels)
    after = state
    for number, state in _backwards(u, checkpoints):
        before, of_images, of_lr, of_labels = u.back(state, after, adjoint, number)
        d_images.index_add_(0, u.batches[number], of_images, alpha=-1)
        if of_labels is not None:
            d_labels.index_add_(0, u.batches[number], of_labels, alpha=-1)
        d_lr -= of_lr
        after = state
        if exact:
            adjoint = before
    learned = d_labels if u.labels.is_floating_point() else None
    return Gradients(loss.detach(), d_images, d_lr, learned, kept, end.detach())


def _backwards(u: _Unroll, checkpoints: list[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """The steps of the gradient from the last on, with the state they began at, computed from the checkpoint before."""
    while checkpoints:
        states = [checkpoints.pop()]
        first = u.first + len(checkpoints) * u.checkpoint_every
        for number in range(first, min(first + u.checkpoint_every, len(u.batches)) - 1):
            states.append(u.next(states[-1], number))
        while states:
            yield first + len(states) - 1, states.pop()


def _learned(*leaves: Tensor) -> list[Tensor]:
    return [t for t in leaves if t.requires_grad]


ENGINES: dict[str, Callable[[_Unroll], Gradients]] = {
    "adjoint": _adjoint,
    "unrolled": _unrolled,
    "tesla": partial(_adjoint, exact=False),
}
