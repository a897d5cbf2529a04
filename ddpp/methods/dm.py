"""DM: dataset condensation with distribution matching (Zhao and Bilen, arXiv 2110.04181)."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpp import augment, models, seeds
from ddpp.config import Config
from ddpp.gpu import send
from ddpp.methods import METHODS, Memory, Problem, Update
from ddpp.methods._real import ByClass, check_class_by_class
from ddpp.ops import dsa_augment
from ddpp.synthetic import Synthetic


@METHODS.register("dm")
class DM:
    """At each outer step a network with random weights: the classes' mean embeddings of real and synthetic images.

    The loss is the squared distance of the means, summed over the classes (equation 4 of the paper). All images of a
    class, real and synthetic, are augmented by one draw. Nothing is trained, so the step size is not learned: networks
    are evaluated at its first value, for which the paper takes 0.01.
    """

    needs_teachers = False
    learns_labels = False

    @staticmethod
    def check(config: Config) -> None:
        """Refuses what :func:`check_class_by_class` does."""
        check_class_by_class(config)

    def __init__(self, problem: Problem) -> None:
        self.problem, self.by_class = problem, ByClass(problem)

    def update(self, synthetic: Synthetic, step: int, memory: Memory) -> Update:
        problem, seed = self.problem, self.problem.config.run.seed
        dataset, classes = problem.dataset, len(problem.dataset.classes)
        network = models.build(
            problem.config.model, dataset.shape, classes, seed=seeds.derive(seed, "dm network", step)
        ).to(problem.device)
        draw = seeds.generator(seed, "dm", step)
        drawn = augment.draw(
            classes,
            1,
            *dataset.shape[1:],
            groups=problem.groups,
            mode=problem.config.augment.mode,
            siamese=True,
            generator=draw,
        )
        plans = send(drawn, problem.device)
        loss, gradient = synthetic.step_size.new_zeros(()), torch.zeros_like(synthetic.images)
        for label, mine in enumerate(self.by_class.places(synthetic.labels)):
            with torch.no_grad():
                real = self.by_class.draw(label, problem.config.distill.real_batch, draw)
                theirs = self._mean(network, real, plans[label])
            images = synthetic.images[mine].detach().requires_grad_()
            distance = (self._mean(network, images, plans[label]) - theirs).square().sum()
            (gradient[mine],) = torch.autograd.grad(distance, images)  # class by class: a graph of all takes gigabytes
            loss = loss + distance.detach()
        everything = torch.ones((), device=loss.device)
        return Update(loss, gradient, torch.zeros_like(synthetic.step_size), everything, {})

    def _mean(self, network: models.Network, images: Tensor, plan: Tensor) -> Tensor:
        """Mean embedding of images [n, C, H, W] under one row of a plan [1, 16]. [F]"""
        rows = plan.expand(len(images), -1).contiguous()
        augmented = dsa_augment(images, rows, fused=self.problem.config.run.use_fused_kernels)
        return network.embed(augmented).mean(0)
