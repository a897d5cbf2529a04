"""Back-propagation through training: what a student learns of real images from the synthetic ones, without teachers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpp import seeds
from ddpp.config import Config
from ddpp.dual import ConvNetStep, Step
from ddpp.errors import UserError
from ddpp.gpu import graphs_for
from ddpp.methods import METHODS, Memory, Problem, Update
from ddpp.methods._real import ByClass, check_class_by_class
from ddpp.methods._students import draw_batches, draw_plans, fresh, step_of
from ddpp.models import flat
from ddpp.ops import dsa_augment
from ddpp.synthetic import Synthetic
from ddpp.unroll import training_gradients

_AT_ONCE = 256  # real images
_NORM = "norm"  # in the memory
_NORM_DECAY, _MOST = 0.9, 2  # of its moving average; times that a gradient's norm may be


@METHODS.register("bptt")
class BPTT:
    """At each outer step a fresh student is trained on the synthetic set; the loss is its cross-entropy on real images.

    The gradient is the exact one of the student's last ``inner_steps``. Students take as many, or with
    ``student_steps`` a random number of up to so many, of which the first are not differentiated: RaT-BPTT (Feng,
    Vedantam and Kempe, arXiv 2311.07025). As in its authors' code a gradient of the images longer than twice the moving
    average of its length is shortened to that; the average is the method's memory.
    """

    needs_teachers = False
    learns_labels = True

    @staticmethod
    def check(config: Config) -> None:
        """Refuses students that end before what is differentiated, an approximation, and batch normalisation.

        Raises:
            UserError: one of them is asked for.
        """
        check_class_by_class(config)
        settings = config.distill
        if settings.student_steps is not None and settings.student_steps < settings.inner_steps:
            raise UserError(
                f"--student-steps {settings.student_steps} must be at least --inner-steps {settings.inner_steps}, "
                "which are the last of them"
            )
        if settings.engine == "tesla":
            raise UserError("--engine tesla approximates trajectory matching; for bptt give adjoint or unrolled")

    def __init__(self, problem: Problem) -> None:
        self.problem, self.by_class = problem, ByClass(problem)
        self.step = step_of(problem).on(problem.device)
        self.graphs = graphs_for(problem.config.run, problem.device)

    def update(self, synthetic: Synthetic, step: int, memory: Memory) -> Update:
        problem, settings = self.problem, self.problem.config.distill
        first = self._draw_first(step)
        batches = draw_batches(problem, len(synthetic.images), first + settings.inner_steps, step)
        found = training_gradients(
            problem.network,
            self._fresh(step),
            synthetic.images,
            synthetic.labels,
            synthetic.step_size,
            batches,
            draw_plans(problem, [len(b) for b in batches], step),
            self._objective(step),
            settings.engine,
            optimizer=settings.inner_optimizer,
            first=first,
            fused=problem.config.run.use_fused_kernels,
            step=self.step,
            checkpoint_every=settings.keep_every,
            graphs=self.graphs,
        )
        norm = found.images.norm()
        average = torch.lerp(norm, memory.get(_NORM, norm), _NORM_DECAY)
        images = found.images * (_MOST * average / norm).clamp_max(1).nan_to_num(1)  # 0 / 0 where it is 0
        return Update(found.loss, images, found.lr, found.kept, {"first": first}, found.labels, {_NORM: average})

    def _draw_first(self, step: int) -> int:
        """How many steps of the student are not differentiated."""
        settings = self.problem.config.distill
        most = (settings.student_steps or settings.inner_steps) - settings.inner_steps
        return seeds.derive(self.problem.config.run.seed, "window", step) % (most + 1)

    def _fresh(self, step: int) -> Tensor:
        """The parameters of a network with random weights. [P]"""
        return fresh(self.problem, "student", step)

    def real(self, step: int) -> tuple[Tensor, Tensor]:
        """The real images of an outer step, augmented as the synthetic ones are, and their labels."""
        problem, count = self.problem, self.problem.config.distill.real_batch
        draw = seeds.generator(problem.config.run.seed, "real", step)
        of_classes = [self.by_class.draw(label, count, draw) for label in range(len(problem.dataset.classes))]
        labels = torch.cat([torch.full((len(x),), k, device=problem.device) for k, x in enumerate(of_classes)])
        images = torch.cat(of_classes)
        plans = draw_plans(problem, [len(images)], step, "real")
        if plans:
            images = dsa_augment(images, plans[0], fused=problem.config.run.use_fused_kernels)
        return images, labels

    def _objective(self, step: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """From a student's parameters to its loss on real images."""
        images, labels = self.real(step)

        def objective(end: Tensor) -> tuple[Tensor, Tensor]:
            loss, gradient = _loss(self.step, self.problem.network, end.detach(), images, labels)
            return _Known.apply(end, loss, gradient), torch.ones_like(loss)

        return objective


def _loss(step: Step, network: nn.Module, theta: Tensor, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The mean cross-entropy and its gradient by the parameters, of few images at once. [], [P]"""
    loss, gradient = theta.new_zeros(()), torch.zeros_like(theta)
    for part, truth in zip(images.split(_AT_ONCE), labels.split(_AT_ONCE), strict=True):
        share = len(part) / len(images)
        if isinstance(step, ConvNetStep):
            packed = step.pack(theta)
            of_part = F.cross_entropy(step.logits(packed, part), truth)
            by_theta = step.unpack(step.gradient(packed, part, truth))
        else:
            leaf = theta.detach().requires_grad_()
            of_part = F.cross_entropy(flat.call(network, leaf, part), truth)
            by_theta = torch.autograd.grad(of_part, leaf)[0]
        loss, gradient = loss + share * of_part.detach(), gradient + share * by_theta
    return loss, gradient


class _Known(torch.autograd.Function):
    """A value of a vector whose gradient is known."""

    @staticmethod
    def forward(ctx: Any, vector: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return grad * gradient, None, None
