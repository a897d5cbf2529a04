"""DC: dataset condensation with gradient matching (Zhao, Mopuri and Bilen, arXiv 2006.05929)."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpp import augment, seeds
from ddpp.config import Config
from ddpp.gpu import send
from ddpp.methods import METHODS, Memory, Problem, Update
from ddpp.methods._real import ByClass, check_class_by_class
from ddpp.methods._students import fresh, step_of
from ddpp.models import flat
from ddpp.models.flat import Layout
from ddpp.ops import dsa_augment
from ddpp.synthetic import Synthetic

_LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}  # of the published code
_NETWORK_BATCH = 256


@METHODS.register("dc")
class DC:
    """At each outer step, class by class, the gradients of real and of synthetic images under one network.

    A fresh network lives for ``loops`` outer steps and is trained for ``loop_epochs`` on the synthetic images between
    them (algorithm 1 of the paper); its parameters are the method's memory. The derivative of the distance by the
    synthetic images is that of <g, d distance / d g>: the adjoint of a student step, without a graph of a graph.
    Nothing learns a step size: networks are evaluated at its first value, for which the paper takes 0.01.
    """

    needs_teachers = False
    learns_labels = False
    augments = False

    @staticmethod
    def check(config: Config) -> None:
        """Refuses what :func:`check_class_by_class` does."""
        check_class_by_class(config)

    def __init__(self, problem: Problem) -> None:
        config = problem.config
        self.problem, self.settings, self.seed = problem, config.distill, config.run.seed
        self.by_class, self.classes = ByClass(problem), len(problem.dataset.classes)
        self.layout = flat.layout(problem.network)
        self.step = step_of(problem)
        nearest = min(_LOOPS, key=lambda ipc: abs(ipc - config.distill.ipc))
        self.loops = config.distill.loops or _LOOPS[nearest][0]
        epochs = config.distill.loop_epochs
        self.epochs = _LOOPS[nearest][1] if epochs is None else epochs

    def update(self, synthetic: Synthetic, step: int, memory: Memory) -> Update:
        theta = memory.get("network")
        if theta is None or step % self.loops == 0:
            theta = self._fresh(step // self.loops)
        else:
            theta = self._trained(theta, synthetic, step)
        images, gradient = synthetic.images, torch.zeros_like(synthetic.images)
        total = images.new_zeros(())
        draw = seeds.generator(self.seed, "dc", step)
        for label, mine in enumerate(self.by_class.places(synthetic.labels)):
            real = self.by_class.draw(label, self.settings.real_batch, draw)
            plan = self._plan(1, siamese=True, draw=draw)
            target = self._gradient(theta, real, label, plan)
            loss, gradient[mine] = self._match(theta, images[mine], label, plan, target)
            total += loss
        unlearned, everything = torch.zeros_like(synthetic.step_size), torch.ones((), device=images.device)
        return Update(total, gradient, unlearned, everything, {}, memory={"network": theta})

    def _fresh(self, number: int) -> Tensor:
        """The parameters of a network with random weights. [P]"""
        return fresh(self.problem, "dc network", number)

    def _trained(self, theta: Tensor, synthetic: Synthetic, step: int) -> Tensor:
        """``theta`` after ``loop_epochs`` on the synthetic images. [P]"""
        draw = seeds.generator(self.seed, "dc training", step)
        for _ in range(self.epochs):
            theta = self._epoch(theta, synthetic, draw)
        return theta

    def _epoch(self, theta: Tensor, synthetic: Synthetic, draw: torch.Generator) -> Tensor:
        """``theta`` after an epoch of SGD. [P]"""
        order = send(torch.randperm(len(synthetic.images), generator=draw), theta.device)
        for batch in order.split(_NETWORK_BATCH):
            images = self._augmented(synthetic.images[batch], self._plan(len(batch), siamese=False, draw=draw))
            gradient = self.step.gradient(theta, images, synthetic.labels[batch])
            theta = theta - self.settings.lr_network * gradient
        return theta

    def _plan(self, images: int, *, siamese: bool, draw: torch.Generator) -> Tensor | None:
        """One row a batch, for all of its images, or one an image. [1 or n, 16]"""
        if not self.augments or not self.problem.groups:
            return None
        size = self.problem.dataset.shape[1:]
        mode = self.problem.config.augment.mode
        rows = 1 if siamese else images
        groups = self.problem.groups
        drawn = augment.draw(1, rows, *size, groups=groups, mode=mode, siamese=siamese, generator=draw)[0]
        return send(drawn, self.problem.device)

    def _augmented(self, images: Tensor, plan: Tensor | None) -> Tensor:
        if plan is None:
            return images
        rows = plan.expand(len(images), -1).contiguous()
        return dsa_augment(images, rows, fused=self.problem.config.run.use_fused_kernels)

    def _gradient(self, theta: Tensor, images: Tensor, label: int, plan: Tensor | None) -> Tensor:
        """Of the cross-entropy of one class's images. [P]"""
        labels = torch.full((len(images),), label, device=images.device)
        return self.step.gradient(theta, self._augmented(images, plan), labels)

    def _match(
        self, theta: Tensor, images: Tensor, label: int, plan: Tensor | None, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Distance of the images' gradient to the target, and its derivative by the images. [], [n, C, H, W]"""
        found = self._gradient(theta, images, label, plan).requires_grad_()
        loss = row_distance(found, target, self.layout)
        (adjoint,) = torch.autograd.grad(loss, found)
        leaves = images.detach().requires_grad_()
        augmented = self._augmented(leaves, plan)
        labels = torch.full((len(images),), label, device=images.device)
        parts = self.step.adjoint(theta, adjoint, augmented.detach(), labels)
        d_images = parts.images if augmented is leaves else torch.autograd.grad(augmented, leaves, parts.images)[0]
        return loss.detach(), d_images


def row_distance(found: Tensor, target: Tensor, layout: Layout) -> Tensor:
    """Sum of 1 - cos over the output rows of all weights; biases and normalisations count nothing. []

    The paper's matching loss, with the denominator plus 1e-6 of its published code.

    Args:
        found: gradient by the flat parameters. [P]
        target: another one. [P]
    """
    total = found.new_zeros(())
    ours, theirs = flat.unflatten(found, layout), flat.unflatten(target, layout)
    for name, shape in layout:
        if len(shape) > 1:
            a, b = ours[name].flatten(1), theirs[name].flatten(1)  # [out, in]
            total = total + (1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-6)).sum()
    return total
