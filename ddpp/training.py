"""Training and testing of networks on images; teachers and evaluation share it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from ddpp import augment, seeds
from ddpp.config import RunConfig
from ddpp.data import Images
from ddpp.dual import ConvNetStep
from ddpp.errors import UserError
from ddpp.gpu import Graphs, captured, send
from ddpp.models import Network, flat
from ddpp.ops import dsa_augment
from ddpp.ops._library import implementation

_CPU = torch.device("cpu")
_STEPS_DRAWN_AT_ONCE = 64


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        epochs: passes over the images.
        momentum: of SGD alone; Adam has its usual decays, 0.9 and 0.999.
        decay: once, after epoch ``epochs // 2 + 1`` counted from 0, the rate falls to a tenth and momentum, or what
            Adam keeps, begins at 0. Source: the published code of Cazenavette et al. (arXiv 2203.11932).
        sharpness_radius: of the adaptive ball in which GSAM (arXiv 2203.08065) looks for the worst parameters, as FTD's
            teachers do (arXiv 2211.11004); 0 is plain SGD.
        sharpness_weight: of GSAM's surrogate gap.
        optimizer: ``"sgd"``, ``"adam"`` (arXiv 1412.6980) or ``"adamw"`` (arXiv 1711.05101).
        temperature: at which a teacher's answers are learned in place of the labels; 0 where the labels are.
        cutmix: whether a batch's images get a part of each other (arXiv 1905.04899) before the teacher answers.
    """

    epochs: int
    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    batch: int = 256
    decay: bool = False
    sharpness_radius: float = 0.0
    sharpness_weight: float = 0.0
    optimizer: str = "sgd"
    temperature: float = 0.0
    cutmix: bool = False

    def rate(self, epoch: int) -> float:
        """The learning rate in an epoch, counted from 0."""
        return self.lr * (0.1 if self.decay and epoch >= self.epochs // 2 + 2 else 1)


@dataclass(frozen=True)
class Backend:
    """Where networks are calculated, and by which code.

    Attributes:
        fused: compiled kernels for the augmentation and for the gradient of a ConvNet that :mod:`ddpp.dual` suits,
            whose parameters become views of one flat vector; False is pure PyTorch.
        tile: side of that ConvNet's Winograd tiles on the CPU: 2, 4 (faster, less exact) or 0, none.
        graphs: makes what captures that ConvNet's gradient in one training; None where nothing is captured.
    """

    device: torch.device = _CPU
    fused: bool = True
    tile: int = 2
    graphs: Callable[[], Graphs] | None = None

    @classmethod
    def of(cls, run: RunConfig, device: torch.device) -> Backend:
        """What a run's options say of it."""
        return cls(device, run.use_fused_kernels, run.winograd, Graphs if captured(run, device) else None)


ON_CPU = Backend()


class Standing(NamedTuple):
    """Where a training stands after an epoch: beside the network, all that it goes on from."""

    epochs: int = 0  # that are done
    velocity: Tensor | None = None  # of SGD with momentum, after the first step; None with Adam. [P]


BEGINNING = Standing()


def fit(
    model: nn.Module,
    images: Tensor | Images,
    labels: Tensor,
    recipe: Recipe,
    backend: Backend = ON_CPU,
    *,
    seed: int,
    groups: Collection[str] = (),
    mode: str = "one",
    policy: Callable[[Tensor], Tensor] | None = None,
    teacher: nn.Module | None = None,
    start: Standing = BEGINNING,
    on_step: Callable[[int], object] | None = None,
    on_epoch: Callable[[Standing], None] | None = None,
) -> bool:
    """Trains a network in place. Every draw depends on ``seed`` alone.

    Args:
        model: the network; moved to the backend's device.
        images: normalised or whitened images. [N, C, H, W]
        labels: class indices int64 [N], or soft labels as logits, floating point [N, K]: the loss is then
            -sum softmax(labels) log_softmax(outputs), as in DATM (arXiv 2310.05773).
        groups: augmentation groups, none for no augmentation.
        mode: ``"one"`` group a batch, or ``"all"`` of them.
        policy: what else is done to each batch.
        teacher: a network on the backend's device, set to evaluate; with the recipe's ``temperature`` T the loss is T^2
            times the cross-entropy of outputs / T with softmax(answers / T) (arXiv 1503.02531), whatever the labels.
        start: where an earlier training of this network by SGD stood; the rest of it gives the same bytes as the whole.
        on_step: called after each update with the number of its images.
        on_epoch: called after each epoch.

    Returns:
        Whether every parameter is finite: one that once was not stays so. A network that diverged keeps what it became.

    Raises:
        UserError: no images, not as many labels, or labels that the network has no output for; a temperature without
            a teacher.
    """
    _check_labels(model, images, labels)
    if recipe.temperature and teacher is None:
        raise UserError(f"temperature {recipe.temperature} is that of a teacher's answers, and there is no teacher")
    answers = _answers(teacher, recipe, seed, backend) if teacher and recipe.temperature else None
    device = backend.device
    model.to(device).train()
    kind = next(model.parameters()).dtype if labels.is_floating_point() else labels.dtype
    images, labels = images.to(device), labels.to(device, kind)
    gradients = _gradients(model, backend, recipe.temperature or 1.0)
    optimizer = _optimizer(gradients.parameters, recipe, recipe.rate(start.epochs))
    _set_velocity(optimizer, gradients.parameters, start.velocity)
    for epoch, batches in _epochs(images.shape, recipe, seed, device, groups, mode, start.epochs):
        if recipe.rate(epoch) != recipe.rate(epoch - 1):
            optimizer = _optimizer(gradients.parameters, recipe, recipe.rate(epoch))
        for chosen, plan in batches:
            batch = images[chosen] if plan is None else dsa_augment(images[chosen], plan, fused=backend.fused)
            batch = policy(batch) if policy else batch
            batch, targets = answers(batch) if answers else (batch, labels[chosen])
            gradients.set(batch, targets)
            if recipe.sharpness_radius:
                _flatten_gradient(gradients, batch, targets, recipe)
            optimizer.step()
            if on_step:
                on_step(len(chosen))
        if on_epoch:
            on_epoch(Standing(epoch + 1, _velocity(optimizer, gradients.parameters)))
    return bool(torch.stack([torch.isfinite(p).all() for p in gradients.parameters]).all())


def _check_labels(model: nn.Module, images: Tensor | Images, labels: Tensor) -> None:
    if len(images) == 0 or len(labels) != len(images):
        raise UserError(f"training needs one label an image, got {len(images)} and {len(labels)}")
    classes = model.classes if isinstance(model, Network) else None
    soft = labels.is_floating_point()
    if soft:
        fits, found = labels.ndim == 2 and classes in (None, labels.shape[1]), list(labels.shape)
    else:
        found = [int(labels.min()), int(labels.max())]
        fits = labels.ndim == 1 and found[0] >= 0 and (classes is None or found[1] < classes)
    if not fits or labels.dtype not in (torch.int64, torch.float32, torch.float64):
        raise UserError(
            f"labels must be classes [N] int64 from 0 to {classes - 1 if classes else 'K - 1'}, or soft ones "
            f"[N, {classes or 'K'}], got {labels.dtype} {'soft ones' if soft else 'from and to'} {found}"
        )


class _Autograd:
    """Sets the gradients of T^2 times the mean cross-entropy of any network's outputs / T, by its parameters."""

    def __init__(self, model: nn.Module, temperature: float) -> None:
        self.model, self.parameters, self.temperature = model, list(model.parameters()), temperature

    def set(self, images: Tensor, labels: Tensor) -> None:
        self.model.zero_grad()
        targets = labels.softmax(1) if labels.is_floating_point() else labels
        loss = F.cross_entropy(self.model(images) / self.temperature, targets)
        (self.temperature**2 * loss).backward()


class _Fused:
    """The same for a ConvNet, by one flat vector, of which the network's parameters become views.

    Its outputs / T are the outputs of a network whose classifier, the last of its parameters, is divided by T.
    """

    def __init__(self, model: Network, backend: Backend, temperature: float) -> None:
        self.step, self.theta = ConvNetStep(model, backend.tile), nn.Parameter(flat.flatten(model))
        self.temperature, self.below = temperature, flat.size(flat.layout(model.features))
        self.gradient = partial(backend.graphs(), self.step.gradient) if backend.graphs else self.step.gradient
        self.parameters = [self.theta]
        views = flat.unflatten(self.theta.detach(), self.step.layout)
        for name, parameter in model.named_parameters():
            parameter.data = views[name]

    def set(self, images: Tensor, labels: Tensor) -> None:
        theta = self.theta.detach()
        if self.temperature == 1:
            self.theta.grad = self.gradient(theta, images, labels)
            return
        scaled = torch.cat([theta[: self.below], theta[self.below :] / self.temperature])
        gradient = self.temperature * self.gradient(scaled, images, labels)
        gradient[: self.below] *= self.temperature
        self.theta.grad = gradient


def _gradients(model: nn.Module, backend: Backend, temperature: float) -> _Autograd | _Fused:
    return _Fused(model, backend, temperature) if _suits(model, backend) else _Autograd(model, temperature)


def _suits(model: nn.Module, backend: Backend) -> TypeGuard[Network]:
    kind = backend.device.type
    known = backend.fused and kind in ("cpu", "cuda")
    compiled = known and implementation("norm_relu_pool", kind)[0] != "pure PyTorch"  # else autograd is faster
    return compiled and isinstance(model, Network) and ConvNetStep.suits(model)


def _flatten_gradient(gradients: _Autograd | _Fused, images: Tensor, labels: Tensor, recipe: Recipe) -> None:
    """Replaces the gradients g by GSAM's: h - weight (g - its part along h), h the gradient at the worst place near.

    That place is theta + radius theta^2 g / |theta g| (adaptive). Equations 4 to 6 of arXiv 2203.08065.
    """
    plain = [(p, p.grad.clone()) for p in gradients.parameters if p.grad is not None]
    with torch.no_grad():
        scale = recipe.sharpness_radius / (_norm([p * g for p, g in plain]) + 1e-12)
        before = [p.clone() for p, _ in plain]
        for p, g in plain:
            p.add_(scale * p.square() * g)
    gradients.set(images, labels)
    with torch.no_grad():
        worst = [(g, p.grad) for p, g in plain if p.grad is not None]
        along = torch.stack([(g * h).sum() for g, h in worst]).sum() / (_norm([h for _, h in worst]).square() + 1e-12)
        for g, h in worst:
            h.sub_(recipe.sharpness_weight * (g - along * h))
        for (p, _), value in zip(plain, before, strict=True):
            p.copy_(value)


def _norm(parts: list[Tensor]) -> Tensor:
    return torch.stack([part.norm() for part in parts]).norm()


@torch.no_grad()
def accuracy(
    model: nn.Module,
    images: Tensor | Images,
    labels: Tensor,
    backend: Backend = ON_CPU,
    *,
    batch: int = 500,
) -> float:
    """Share of images [N, C, H, W] that a network classifies as their labels [N] say, in percent.

    A network whose outputs are not numbers has the accuracy of always answering the first class.
    """
    training = model.training
    model.eval()
    outputs, device = _outputs(model, backend), backend.device
    images, labels = images.to(device), labels.to(device)
    right = torch.zeros((), dtype=torch.int64, device=device)
    for part, truth in zip(images.split(batch), labels.split(batch), strict=True):
        right += (outputs(part).argmax(1) == truth).sum()
    model.train(training)
    return 100 * int(right) / len(labels)


def _outputs(model: nn.Module, backend: Backend) -> Callable[[Tensor], Tensor]:
    """What gives a network's outputs fastest; those that it has now."""
    if _suits(model, backend):
        return partial(ConvNetStep(model, backend.tile).logits, flat.flatten(model))
    return model


def _answers(
    teacher: nn.Module, recipe: Recipe, seed: int, backend: Backend
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """From a batch to what is shown of it, and the teacher's answers to that at the recipe's temperature, as logits."""
    outputs, numbers = _outputs(teacher, backend), itertools.count()

    @torch.no_grad()
    def asked(images: Tensor) -> tuple[Tensor, Tensor]:
        if recipe.cutmix:
            images = _cutmix(images, seeds.generator(seed, "cutmix", next(numbers)))
        return images, outputs(images) / recipe.temperature

    return asked


def _cutmix(images: Tensor, draw: torch.Generator) -> Tensor:
    """Each image [n, C, H, W] with a box of another one, of an area uniform in [0, 1], cut at the borders."""
    count, _, height, width = images.shape
    order = send(torch.randperm(count, generator=draw), images.device)
    area, *centre = torch.rand(3, generator=draw, dtype=torch.float64).tolist()
    spans = []
    for at, size in zip(centre, (height, width), strict=True):
        middle, half = int(at * size), int(size * area**0.5) // 2
        spans.append(slice(max(middle - half, 0), middle + half))
    mixed = images.clone()
    mixed[:, :, spans[0], spans[1]] = images[order, :, spans[0], spans[1]]
    return mixed


def _optimizer(parameters: list[nn.Parameter], recipe: Recipe, lr: float) -> Optimizer:
    if recipe.optimizer in ("adam", "adamw"):
        rule = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
        return rule(parameters, lr, weight_decay=recipe.weight_decay, fused=True)
    return torch.optim.SGD(parameters, lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, fused=True)


def _set_velocity(optimizer: Optimizer, parameters: list[nn.Parameter], velocity: Tensor | None) -> None:
    if velocity is not None:
        parts = velocity.split([p.numel() for p in parameters])
        for p, part in zip(parameters, parts, strict=True):
            optimizer.state[p]["momentum_buffer"] = part.view_as(p).to(p, copy=True)


def _velocity(optimizer: Optimizer, parameters: list[nn.Parameter]) -> Tensor | None:
    """Of all parameters; of those that never had a gradient it is 0."""
    parts = [optimizer.state[p].get("momentum_buffer") for p in parameters]
    if all(part is None for part in parts):
        return None
    pairs = zip(parameters, parts, strict=True)
    return torch.cat([torch.zeros_like(p).flatten() if part is None else part.flatten() for p, part in pairs])


def _epochs(
    shape: torch.Size,
    recipe: Recipe,
    seed: int,
    device: torch.device,
    groups: Collection[str],
    mode: str,
    start: int,
) -> Iterator[tuple[int, list[tuple[Tensor, Tensor | None]]]]:
    """Each epoch from ``start`` on with its batches: the chosen images and their augmentation plan.

    Draws are made on the CPU for many steps at once: a synthetic set of one batch would otherwise wait for
    the device in each epoch. They do not depend on the number of epochs, so that a teacher can go on to more.
    """
    count, _, height, width = shape
    steps = -(-count // recipe.batch)
    together = max(1, _STEPS_DRAWN_AT_ONCE // steps)  # epochs
    for first in range(start - start % together, recipe.epochs, together):
        draw = seeds.generator(seed, "epochs", first)
        orders = torch.stack([torch.randperm(count, generator=draw) for _ in range(together)]).to(device)
        plans: list[Tensor | None] = [None] * (together * steps)
        if groups:
            size = together * steps, min(recipe.batch, count), height, width
            plans = list(augment.draw(*size, groups=groups, mode=mode, generator=draw).to(device))
        for epoch in range(max(start - first, 0), min(together, recipe.epochs - first)):
            batches = zip(orders[epoch].split(recipe.batch), plans[epoch * steps :], strict=False)
            yield first + epoch, [(chosen, plan if plan is None else plan[: len(chosen)]) for chosen, plan in batches]
