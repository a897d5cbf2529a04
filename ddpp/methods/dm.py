"""DM: dataset condensation with distribution matching (Zhao and Bilen, arXiv 2110.04181)."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpp import augment, models, seeds
from ddpp.config import Config
from ddpp.methods import METHODS, Memory, Problem, Update
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
        """Every configuration suits."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        labels = problem.dataset.train_labels
        self.members = [torch.nonzero(labels == k).flatten() for k in range(len(problem.dataset.classes))]

    def update(self, synthetic: Synthetic, step: int, memory: Memory) -> Update:
        problem, seed = self.problem, self.problem.config.run.seed
        dataset = problem.dataset
        network = models.build(
            problem.config.model, dataset.shape, len(dataset.classes), seed=seeds.derive(seed, "dm network", step)
        ).to(problem.device)
        draw = seeds.generator(seed, "dm", step)
        plans = augment.draw(
            len(self.members),
            1,
            *dataset.shape[1:],
            groups=problem.groups,
            mode=problem.config.augment.mode,
            siamese=True,
            generator=draw,
        )
        images = synthetic.images.detach().requires_grad_()
        loss = images.new_zeros(())
        for label, members in enumerate(self.members):
            chosen = members[torch.randperm(len(members), generator=draw)[: problem.config.distill.real_batch]]
            with torch.no_grad():
                real = self._mean(network, dataset.train_images[chosen].to(problem.device), plans[label])
            learned = self._mean(network, images[synthetic.labels == label], plans[label])
            loss = loss + (learned - real).square().sum()
        (gradient,) = torch.autograd.grad(loss, images)
        everything = torch.ones((), device=loss.device)
        return Update(loss.detach(), gradient, torch.zeros_like(synthetic.step_size), everything, {})

    def _mean(self, network: models.Network, images: Tensor, plan: Tensor) -> Tensor:
        """Mean embedding of images [n, C, H, W] under one row of a plan [1, 16]. [F]"""
        rows = plan.expand(len(images), -1).contiguous().to(images.device)
        augmented = dsa_augment(images, rows, fused=self.problem.config.run.use_fused_kernels)
        return network.embed(augmented).mean(0)
