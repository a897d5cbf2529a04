"""The teachers that a configuration means: where they are, what they must be, and the networks that they ended as."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddpp import augment, models, seeds, trajectories
from ddpp.config import Config
from ddpp.data import Dataset
from ddpp.errors import UserError
from ddpp.models import Network, flat
from ddpp.training import Recipe
from ddpp.trajectories import Trajectory

_SAMPLE = 5_000  # training images that tell the statistics of all
_AT_ONCE = 500  # images


def folder_of(config: Config, dataset: Dataset) -> Path:
    """Where the teachers of a configuration are."""
    if config.teachers.folder:
        return Path(config.teachers.folder)
    parts = [dataset.name, *([dataset.preprocessing] if dataset.preprocessing != "channel" else [])]
    options = models.describe(config.model, dataset.shape)
    parts.append(options.pop("model"))
    if source := options.pop("plugin", None):
        parts.append(source[:8])
    parts += [f"{name[0]}{value}" for name in ("depth", "width") if (value := options.pop(name, None))]
    usual = asdict(type(config.model)())
    parts += [value for name, value in options.items() if value != usual[name]]
    if config.teachers.sharpness_radius:
        parts.append(f"flat{config.teachers.sharpness_radius:g}-{config.teachers.sharpness_weight:g}")
    return Path("teachers") / "-".join(parts)


def describe(config: Config, dataset: Dataset) -> dict[str, dict[str, Any]]:
    """What makes teachers equal but for seed and index, and for how far they were trained."""
    return {
        "dataset": dataset.describe(),
        "model": models.describe(config.model, dataset.shape),
        "recipe": _recipe_by_name(config),
        "augmentation": {"groups": list(groups(config, dataset)), "mode": config.augment.mode},
    }


def groups(config: Config, dataset: Dataset) -> tuple[str, ...]:
    """The augmentation that teachers are trained with."""
    return augment.groups_for(config.augment.strategy, dataset.strategy)


def recipe(config: Config) -> Recipe:
    """How teachers are trained."""
    settings = config.teachers
    return Recipe(
        settings.epochs,
        settings.lr,
        settings.momentum,
        settings.weight_decay,
        settings.batch,
        sharpness_radius=settings.sharpness_radius,
        sharpness_weight=settings.sharpness_weight if settings.sharpness_radius else 0.0,
    )


def opened(folder: Path, config: Config, dataset: Dataset, count: int) -> dict[int, Trajectory]:
    """Of the first ``count`` teachers of a folder those that have the epochs asked for, and no more of their epochs.

    Raises:
        UserError: one is damaged, foreign, or of another data set, architecture or recipe.
    """
    epochs, found = config.teachers.epochs, trajectories.open_folder(folder, describe(config, dataset), count)
    return {index: replace(teacher, epochs=epochs) for index, teacher in found.items() if teacher.epochs >= epochs}


def open_all(folder: Path, config: Config, dataset: Dataset, network: nn.Module) -> list[Trajectory]:
    """The first ``config.teachers.count`` teachers of a folder and their first ``config.teachers.epochs`` epochs.

    They are checked to fit data set and network.

    Raises:
        UserError: one is missing, shorter, damaged, foreign, or of another data set, architecture or recipe.
    """
    count = config.teachers.count
    found = opened(folder, config, dataset, count)
    if len(found) < count:
        many = f"{len(found)} of {count} teachers of {config.teachers.epochs} epochs"
        raise UserError(f"{folder} holds {many}. Train them: python -m ddpp.teachers")
    wanted = flat.layout(network)
    for trajectory in found.values():
        if trajectory.layout != wanted:
            raise UserError(f"{trajectory.path} holds other parameters than the network has")
    return list(found.values())


def ended(teacher: Trajectory, config: Config, dataset: Dataset, device: torch.device) -> Network:
    """The network that a teacher was after its last epoch, for answers.

    A trajectory holds parameters alone: batch normalisation gets its statistics from 5,000 training images.
    """
    network = models.build(config.model, dataset.shape, len(dataset.classes), seed=config.run.seed).to(device)
    flat.load_flat_(network, teacher.rows(teacher.epochs, teacher.epochs)[0])
    if any(isinstance(m, nn.BatchNorm2d) for m in network.modules()):
        _find_statistics(network, dataset, device)
    return network.eval()


@torch.no_grad()
def _find_statistics(network: Network, dataset: Dataset, device: torch.device) -> None:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the mean over all batches
    for images in sampled(dataset, seeds.generator(0, "statistics")):
        network.train()(images.to(device))


def sampled(dataset: Dataset, draw: torch.Generator) -> Iterator[Tensor]:
    """5,000 random training images, or all where there are fewer, in parts. [n, C, H, W] each"""
    chosen = torch.randperm(len(dataset.train_labels), generator=draw)[:_SAMPLE]
    return (dataset.train_images[part] for part in chosen.split(_AT_ONCE))


def _recipe_by_name(config: Config) -> dict[str, Any]:
    """So that older teachers still fit, the sharpness stands there only where it is searched, and no later option."""
    found = asdict(recipe(config))
    for name in ("epochs", "optimizer", "temperature", "cutmix"):
        del found[name]
    flat_minima = config.teachers.sharpness_radius > 0
    return {name: value for name, value in found.items() if flat_minima or not name.startswith("sharpness")}
