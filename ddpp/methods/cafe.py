"""CAFE: learning to condense a data set by aligning features (Wang et al., arXiv 2203.01531)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpp import seeds
from ddpp.methods import METHODS, Memory, Update
from ddpp.methods.dc import DC
from ddpp.models import flat
from ddpp.synthetic import Synthetic

_ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.Sigmoid, nn.SiLU)
_AT_ONCE = 500  # images
_WINDOW = 10  # outer steps over which a network must still have changed
_EARLIER, _LAST, _EMBEDDING = 0.1, 1.0, 2.0  # weights of activations and of the embedding, which the code takes twice


@METHODS.register("cafe")
class CAFE(DC):
    """At each outer step, class by class and layer by layer, the mean features of real and of synthetic images.

    The loss is the squared distance of the means, summed over features, layers and classes, plus ``discrimination``
    times the cross-entropy, summed over the real images, of classifying them by their products with the synthetic
    images' mean embeddings (section 3 of the paper); the layers' weights are those of its published code. The loops are
    dynamic: after an outer step the network is trained on the synthetic images until an epoch changes its accuracy on
    the real images of that step by less than ``inner_change``, at most for ``loop_epochs``; where the accuracy moved by
    less than ``outer_change`` over the last ten outer steps, a fresh network follows. With augmentation, of a class's
    real and synthetic images by one draw, it is the paper's CAFE+DSA. Networks are evaluated at the first step size.
    """

    augments = True

    def update(self, synthetic: Synthetic, step: int, memory: Memory) -> Update:
        theta, history = memory.get("network"), memory.get("accuracy")
        if theta is None or history is None or _settled(history, self.settings.outer_change):
            theta, history = self._fresh(step), synthetic.images.new_empty(0)
        draw = seeds.generator(self.seed, "cafe", step)
        parts = [self.by_class.draw(label, self.settings.real_batch, draw) for label in range(self.classes)]
        labels = torch.cat([torch.full((len(part),), k, device=part.device) for k, part in enumerate(parts)])
        images = synthetic.images.detach().requires_grad_()
        loss = self._loss(theta, images, synthetic.labels, parts, labels, draw)
        (gradient,) = torch.autograd.grad(loss, images)
        theta, accuracy = self._trained_until_settled(theta, synthetic, torch.cat(parts), labels, draw)
        history = torch.cat([history, history.new_tensor([accuracy])])[-_WINDOW:]
        unlearned, everything = torch.zeros_like(synthetic.step_size), torch.ones((), device=images.device)
        memory = {"network": theta, "accuracy": history}
        return Update(loss.detach(), gradient, unlearned, everything, {}, memory=memory)

    def _loss(
        self,
        theta: Tensor,
        images: Tensor,
        truth: Tensor,
        real: Sequence[Tensor],
        labels: Tensor,
        draw: torch.Generator,
    ) -> Tensor:
        """``real`` holds the images of each class, and ``labels`` those of all. []"""
        distance = images.new_zeros(())
        embedded, centres = [], []
        for part, mine in zip(real, self.by_class.places(truth), strict=True):
            plan = self._plan(1, siamese=True, draw=draw)
            with torch.no_grad():
                theirs = self._features(theta, self._augmented(part, plan))
            ours = self._features(theta, self._augmented(images[mine], plan))
            weights = *[_EARLIER] * (len(ours) - 2), _LAST, _EMBEDDING
            for weight, a, b in zip(weights, ours, theirs, strict=True):
                distance = distance + weight * (a.mean(0) - b.mean(0)).square().sum()
            embedded.append(theirs[-1])
            centres.append(ours[-1].mean(0))
        answers = torch.cat(embedded) @ torch.stack(centres).T  # [N, K]
        return distance + self.settings.discrimination * F.cross_entropy(answers, labels, reduction="sum")

    def _features(self, theta: Tensor, images: Tensor) -> list[Tensor]:
        """What each activation gives, the embedding last. Each [n, F]"""
        found: list[Tensor] = []
        network = self.problem.network

        def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            found.append(output.flatten(1))

        def keep_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found.append(inputs[0])

        hooks = [m.register_forward_hook(keep) for m in network.modules() if isinstance(m, _ACTIVATIONS)]
        hooks.append(network.get_submodule("classifier").register_forward_pre_hook(keep_input))
        try:
            flat.call(network, theta, images)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def _trained_until_settled(
        self, theta: Tensor, synthetic: Synthetic, real: Tensor, labels: Tensor, draw: torch.Generator
    ) -> tuple[Tensor, float]:
        """Parameters [P] after at most ``loop_epochs``, and the share of real images they classify right."""
        before = self._accuracy(theta, real, labels)
        for _ in range(self.epochs):
            theta = self._epoch(theta, synthetic, draw)
            after = self._accuracy(theta, real, labels)
            if abs(after - before) < self.settings.inner_change:
                return theta, after
            before = after
        return theta, before

    @torch.no_grad()
    def _accuracy(self, theta: Tensor, images: Tensor, labels: Tensor) -> float:
        parts = images.split(_AT_ONCE)
        answers = torch.cat([flat.call(self.problem.network, theta, part).argmax(1) for part in parts])
        return float((answers == labels).float().mean())


def _settled(history: Tensor, change: float) -> bool:
    return len(history) >= _WINDOW and float(history.max() - history.min()) < change
