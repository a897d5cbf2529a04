"""SRe2L: images of a trained network's own idea of the classes (arXiv 2306.13092)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpp import seeds, store
from ddpp.config import Config
from ddpp.errors import UserError
from ddpp.gpu import send
from ddpp.methods import METHODS, Memory, Problem, Update
from ddpp.models import Network
from ddpp.synthetic import Synthetic

_FIRST_LAYER = 10  # times as much as the others
_JITTER = 8  # an image moves by up to this part of its side


class Moments(NamedTuple):
    """Mean and variance of each channel over images and places."""

    mean: Tensor  # [C]
    variance: Tensor  # [C]


@METHODS.register("sre2l")
class SRe2L:
    """Moves images until the first teacher, after its last epoch, knows them, for networks that learn its answers.

    The loss of an outer step is the teacher's cross-entropy for the images, all of them moved around by the same few
    pixels, and ``sre2l_statistics`` times the distances of means and of variances of what each convolution gives to
    those of real images, ten times that for the first one. The paper looks at inputs of batch normalisation, which are
    the same, and which other networks do not have.
    """

    needs_teachers = True
    learns_labels = False

    @staticmethod
    def check(config: Config) -> None:
        """Every configuration suits."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        if not any(isinstance(m, nn.Conv2d) for m in problem.network.modules()):
            raise UserError("--method sre2l follows statistics of convolutions, and this network has none")
        if problem.teachers:
            self.teacher = store.ended(problem.teachers[0], problem.config, problem.dataset, problem.device)
            self.teacher.requires_grad_(False)
            self.real = self._of_real_images()

    def update(self, synthetic: Synthetic, step: int, memory: Memory) -> Update:
        draw = seeds.generator(self.problem.config.run.seed, "sre2l", step)
        count, most = len(synthetic.images), synthetic.images.shape[-1] // _JITTER
        asked = self.problem.config.distill.batch
        chosen = send(torch.randperm(count, generator=draw)[:asked], synthetic.images.device)
        shift = torch.randint(most + 1, (2,), generator=draw).tolist()
        images = synthetic.images.detach().requires_grad_()
        with _moments(self.teacher) as found:
            answers = self.teacher(images[chosen].roll(shift, dims=(2, 3)))
        loss = F.cross_entropy(answers, synthetic.labels[chosen]) + self._apart(found)
        (gradient,) = torch.autograd.grad(loss, images)
        everything = torch.ones((), device=loss.device)
        return Update(loss.detach(), gradient, torch.zeros_like(synthetic.step_size), everything, {})

    def _apart(self, found: Sequence[Moments]) -> Tensor:
        """[]"""
        weights = [_FIRST_LAYER, *[1] * (len(found) - 1)]
        terms = [
            weight * sum((a - b).norm() for a, b in zip(of_images, real, strict=True))
            for weight, of_images, real in zip(weights, found, self.real, strict=True)
        ]
        return self.problem.config.distill.sre2l_statistics * torch.stack(terms).sum()

    @torch.no_grad()
    def _of_real_images(self) -> list[Moments]:
        draw = seeds.generator(self.problem.config.run.seed, "sre2l statistics")
        count, parts = 0, []  # of each layer the sums of means and mean squares, [2, C]
        for images in store.sampled(self.problem.dataset, draw):
            with _moments(self.teacher) as found:
                self.teacher(images.to(self.problem.device))
            count += len(images)
            parts.append([len(images) * torch.stack([m.mean, m.variance + m.mean.square()]) for m in found])
        means = [torch.stack(of_layer).sum(0) / count for of_layer in zip(*parts, strict=True)]
        return [Moments(mean, square - mean.square()) for mean, square in means]


@contextmanager
def _moments(network: Network) -> Iterator[list[Moments]]:
    """Within the block, those of what each convolution gives; differentiable."""
    found: list[Moments] = []

    def seen(module: nn.Module, given: object, output: Tensor) -> None:
        variance, mean = torch.var_mean(output, dim=(0, 2, 3), correction=0)
        found.append(Moments(mean, variance))

    handles = [m.register_forward_hook(seen) for m in network.modules() if isinstance(m, nn.Conv2d)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
