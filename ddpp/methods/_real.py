"""What methods share that look at real images: a network trained on all of them, and one class at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ddpp import models, networks, seeds, training
from ddpp.config import Config
from ddpp.errors import UserError
from ddpp.gpu import send
from ddpp.methods import Problem
from ddpp.models import Network
from ddpp.synthetic import Synthetic
from ddpp.training import Backend, Recipe

_AT_ONCE = 500  # images


def check_class_by_class(config: Config) -> None:
    """Refuses batch normalisation, which takes from one class's images what tells them from another's.

    Raises:
        UserError: the network has it.
    """
    if config.model.norm == "batch":
        raise UserError(
            f"--method {config.distill.method} passes each class through the network by itself, where --norm "
            "batch takes away what tells classes apart; take --norm instance or group"
        )


class ByClass:
    """Draws of real images from each class, and the places of synthetic ones, for which no host waits.

    The training images are on the problem's device.
    """

    def __init__(self, problem: Problem) -> None:
        self._device, self._classes = problem.device, len(problem.dataset.classes)
        self._images = problem.dataset.train_images.to(problem.device)
        self._members = self._where(problem.dataset.train_labels)
        self._labels: Tensor | None = None
        self._places: list[Tensor] = []

    def draw(self, label: int, count: int, draw: torch.Generator) -> Tensor:
        """At most ``count`` real images of a class. [n, C, H, W]"""
        members = self._members[label]
        chosen = members[torch.randperm(len(members), generator=draw)[:count]]
        return self._images[send(chosen, self._device)]

    def places(self, labels: Tensor) -> list[Tensor]:
        """Where the images of each class stand among those labelled so; found once for labels that stay. K of [n]"""
        if labels is not self._labels:
            self._labels, self._places = labels, [send(where, labels.device) for where in self._where(labels.cpu())]
        return self._places

    def _where(self, labels: Tensor) -> list[Tensor]:
        return [torch.nonzero(labels == k).flatten() for k in range(self._classes)]


def trained_network(problem: Problem, on_epoch: Callable[[Network], None] | None = None) -> Network:
    """A network trained on all real images as the teachers are, without augmentation.

    Args:
        on_epoch: called with the network after each epoch.

    Raises:
        UserError: its parameters did not stay finite.
    """
    config, dataset = problem.config, problem.dataset
    settings, seed = config.teachers, seeds.derive(config.run.seed, "selection")
    network = models.build(config.model, dataset.shape, len(dataset.classes), seed=seed)
    recipe = Recipe(settings.epochs, settings.lr, settings.momentum, settings.weight_decay, settings.batch)
    with networks.images_bar("network to select by", recipe.epochs * len(dataset.train_labels)) as bar:
        finite = training.fit(
            network,
            dataset.train_images,
            dataset.train_labels,
            recipe,
            Backend.of(config.run, problem.device),
            seed=seed,
            on_step=bar.update,
            on_epoch=None if on_epoch is None else lambda _: on_epoch(network),
        )
    if not finite:
        raise UserError(f"the network to select by diverged at --teachers-lr {settings.lr}; lower it")
    return network.eval()


def embedder(network: Network, problem: Problem) -> Callable[[Tensor], Tensor]:
    """From indices of real training images [n] to what the classifier sees of them, on the CPU [n, F]."""
    images = problem.dataset.train_images.to(problem.device)

    @torch.no_grad()
    def embedded(members: Tensor) -> Tensor:
        parts = members.to(problem.device).split(_AT_ONCE)
        return torch.cat([network.embed(images[part]).cpu() for part in parts])

    return embedded


@torch.no_grad()
def right(network: Network, problem: Problem) -> Tensor:
    """Which real training images the network classifies right, on the CPU. [N] bool"""
    parts = problem.dataset.train_images.to(problem.device).split(_AT_ONCE)
    answers = torch.cat([network(part).argmax(1).cpu() for part in parts])
    return answers == problem.dataset.train_labels


def choose_by_class(problem: Problem, rule: Callable[[Tensor], Tensor]) -> Synthetic:
    """Real images that a rule chooses of each class; they have no step size of their own and get ``--step-size``.

    Args:
        rule: from the indices of a class's images to positions among them, the chosen ones first.

    Raises:
        UserError: a class has fewer than ``ipc`` images.
    """
    dataset, settings, chosen = problem.dataset, problem.config.distill, []
    for label, name in enumerate(dataset.classes):
        members = torch.nonzero(dataset.train_labels == label).flatten()
        if len(members) < settings.ipc:
            raise UserError(f"--ipc {settings.ipc} is more than the {len(members)} training images of class {name!r}")
        chosen.append(members[rule(members)[: settings.ipc]])
    index = torch.cat(chosen)
    return Synthetic(dataset.train_images[index], dataset.train_labels[index], torch.tensor(settings.step_size))
