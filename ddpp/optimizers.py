"""Rules by which a student moves in an inner step, and the way back through such a move.

A rule's state is what one step hands on to the next: the parameters [P], for Adam with both moments [3, P]. Its adjoint
is dL/dstate, of the same shape. A :class:`ddpp.dual.Step` gives the gradient g of the student's loss and, for a vector
lambda [P], phi = <g, lambda> with its derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ddpp.dual import Step
from ddpp.gpu import send
from ddpp.ops import dsa_augment
from ddpp.ops.dsa import dsa_adjoint

EPSILON = 1e-8  # of Adam


class Batch(NamedTuple):
    """What an inner step takes beside the student's state."""

    images: Tensor  # [N, C, H, W], the whole set
    labels: Tensor  # [N] int64, or logits [N, K]
    lr: Tensor  # []
    chosen: Tensor  # [n] int64
    plan: Tensor | None  # [n, 16]
    corrections: Tensor | None  # of the rule, for this step

    def seen(self, fused: bool) -> tuple[Tensor, Tensor]:
        """The chosen images as the student sees them, and their labels. [n, C, H, W], [n] or [n, K]"""
        return augmented(self.images[self.chosen], self.plan, fused), self.labels[self.chosen]


#: dL/dstate before an inner step, and what the step adds to -dL/dX [n, C, H, W], -dL/dlr [] and -dL/dy [n, K] or None.
Pulled = tuple[Tensor, Tensor, Tensor, Tensor | None]


class Rule(Protocol):
    """How a student moves. There is one of each, since graphs know a rule by its identity."""

    def begin(self, theta: Tensor) -> Tensor:
        """The state of parameters [P] before the first step; also the adjoint of one of which only they count."""

    def parameters(self, state: Tensor) -> Tensor:
        """[P]"""

    def corrections(self, steps: int, like: Tensor) -> list[Tensor | None]:
        """What a step needs to know of its number."""

    def move(self, state: Tensor, gradient: Tensor, lr: Tensor, corrections: Tensor | None) -> Tensor:
        """The state after a step with this gradient; differentiable by the first three."""

    def told(self, after: Tensor) -> Tensor | None:
        """What :meth:`pull_back` needs of the state after the step."""

    def pull_back(
        self, step: Step, fused: bool, state: Tensor, told: Tensor | None, adjoint: Tensor, batch: Batch
    ) -> Pulled:
        """From dL/dstate after a step, which began at ``state``, to that before it."""


class SGD(Rule):
    """theta - lr g: lambda before a step is lambda - lr dphi/dtheta."""

    def begin(self, theta: Tensor) -> Tensor:
        return theta

    def parameters(self, state: Tensor) -> Tensor:
        return state

    def corrections(self, steps: int, like: Tensor) -> list[Tensor | None]:
        return [None] * steps

    def move(self, state: Tensor, gradient: Tensor, lr: Tensor, corrections: Tensor | None) -> Tensor:
        return torch.addcmul(state, gradient, lr, value=-1)

    def told(self, after: Tensor) -> None:
        """Nothing."""

    def pull_back(
        self, step: Step, fused: bool, state: Tensor, told: Tensor | None, adjoint: Tensor, batch: Batch
    ) -> Pulled:
        found, lr = step.adjoint(state, adjoint, *batch.seen(fused)), batch.lr
        d_images = found.images if batch.plan is None else dsa_adjoint(found.images, batch.plan, fused=fused)
        d_labels = None if found.labels is None else lr * found.labels
        return torch.addcmul(adjoint, found.theta, lr, value=-1), lr * d_images, found.phi, d_labels


class Adam(Rule):
    """Adam (Kingma and Ba, arXiv 1412.6980) with its usual constants.

    With m' and v' the moments after the step and u = m' c1 / (sqrt(v' c2) + eps), theta' = theta - lr u. What lambda is
    sent through g depends on g itself, by v'; it is what m' has more than m.
    """

    decays = 0.9, 0.999

    def begin(self, theta: Tensor) -> Tensor:
        return torch.cat([theta[None], theta.new_zeros(2, len(theta))])

    def parameters(self, state: Tensor) -> Tensor:
        return state[0]

    def corrections(self, steps: int, like: Tensor) -> list[Tensor | None]:
        """c1 and c2, those of the moments' beginning at 0. [2] each"""
        decays, number = torch.tensor(self.decays, dtype=torch.float64), torch.arange(1, steps + 1)[:, None]
        return list(send((1 / (1 - decays**number)).to(like.dtype), like.device).unbind())

    def move(self, state: Tensor, gradient: Tensor, lr: Tensor, corrections: Tensor | None) -> Tensor:
        assert corrections is not None
        return torch.stack(adam(state[0], state[1], state[2], gradient, lr, self.decays, corrections.unbind()))

    def told(self, after: Tensor) -> Tensor:
        """m'. [P]"""
        return after[1]

    def pull_back(
        self, step: Step, fused: bool, state: Tensor, told: Tensor | None, adjoint: Tensor, batch: Batch
    ) -> Pulled:
        assert batch.corrections is not None and told is not None
        (c1, c2), lr = batch.corrections.unbind(), batch.lr
        gradient = torch.sub(told, state[1], alpha=self.decays[0]) / (1 - self.decays[0])
        (m, v), (of_theta, of_m, of_v) = moments(state[1], state[2], gradient, self.decays), adjoint.unbind()
        root = _root(v * c2)
        below = root + EPSILON
        by_u = lr * of_theta / below
        of_m = of_m - by_u * c1
        of_v = of_v + (by_u * m * c1 / below * c2 / (2 * root)).masked_fill(v == 0, 0)
        sent = (1 - self.decays[0]) * of_m + 2 * (1 - self.decays[1]) * gradient * of_v
        found = step.adjoint(state[0], sent, *batch.seen(fused))
        d_images = found.images if batch.plan is None else dsa_adjoint(found.images, batch.plan, fused=fused)
        before = torch.stack([of_theta + found.theta, self.decays[0] * of_m, self.decays[1] * of_v])
        d_labels = None if found.labels is None else -found.labels
        return before, -d_images, (m * c1 / below) @ of_theta, d_labels


OPTIMIZERS: dict[str, Rule] = {"sgd": SGD(), "adam": Adam()}


def adam(
    value: Tensor,
    first: Tensor,
    second: Tensor,
    gradient: Tensor,
    lr: Tensor | float,
    decays: tuple[float, float],
    corrections: Sequence[Tensor | float],
) -> tuple[Tensor, Tensor, Tensor]:
    """A value and its moments after a step of Adam; ``corrections`` are 1 / (1 - decay^t) of both at step t."""
    first, second = moments(first, second, gradient, decays)
    return value - lr * first * corrections[0] / (_root(second * corrections[1]) + EPSILON), first, second


def moments(first: Tensor, second: Tensor, gradient: Tensor, decays: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """The moving averages of the gradient and of its square, after a step."""
    return torch.lerp(gradient, first, decays[0]), torch.lerp(gradient.square(), second, decays[1])


def augmented(images: Tensor, plan: Tensor | None, fused: bool) -> Tensor:
    """Images after DSA's operations of a plan, if there is one. [n, C, H, W]"""
    return images if plan is None else dsa_augment(images, plan, fused=fused)


def forward(step: Step, rule: Rule, fused: bool, state: Tensor, *batch: Any) -> Tensor:
    """A student's state after an inner step on a :class:`Batch`."""
    b = Batch(*batch)
    return rule.move(state, step.gradient(rule.parameters(state), *b.seen(fused)), b.lr, b.corrections)


def backward(
    step: Step, rule: Rule, fused: bool, state: Tensor, told: Tensor | None, adjoint: Tensor, *batch: Any
) -> Pulled:
    """The way back through :func:`forward`."""
    return rule.pull_back(step, fused, state, told, adjoint, Batch(*batch))


def _root(x: Tensor) -> Tensor:
    """The square root, whose derivative at 0 is 0."""
    return x.masked_fill(x == 0, 1).sqrt().masked_fill(x == 0, 0)
