"""STAGE 1: trains teachers on the real data and keeps their parameters after each epoch.

``python -m ddpp.teachers --dataset cifar10 --zca --count 200 --epochs 50``
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ddpp import augment, cli, data, models, runs, seeds, training, trajectories
from ddpp.config import Config
from ddpp.data import Dataset
from ddpp.errors import UserError
from ddpp.models import flat
from ddpp.training import Recipe
from ddpp.trajectories import Trajectory

_SAMPLE = 5_000  # training images that stand for all of them where none are held out


def train(config: Config, dataset: Dataset, device: torch.device, *, progress: bool = True) -> Path:
    """Trains the teachers that the folder lacks; those that are there stay.

    A teacher depends only on its seed and index, so that an interrupted stage ends with the bytes of an
    uninterrupted one. A folder keeps the seed that it was begun with.

    Returns:
        The folder: ``config.teachers.folder``, or one named after data set and architecture.

    Raises:
        UserError: the folder holds other teachers or foreign files, cannot be written, or a teacher diverged.
        runs.Stopped: a signal asked to stop; finished teachers are kept.
    """
    folder, count = folder_of(config, dataset), config.teachers.count
    description = _describe(config, dataset)
    trajectories.remove_leftovers(folder)
    present = trajectories.open_folder(folder, description)
    missing = [index for index in range(count) if index not in present]
    seed = next((t.meta["seed"] for t in present.values()), config.run.seed)
    epochs = config.teachers.epochs
    if missing:
        runs.check_writable(folder)
        kept = f", beside {len(present)} that are there (seed {seed})" if present else ""
        print(f"training {len(missing)} teachers for {epochs} epochs into {folder}{kept}")
    bar = tqdm(total=len(missing) * epochs, desc="teachers", unit="epoch", disable=not (progress and missing))
    with runs.Interruption() as interruption, bar:
        for index in missing:
            stop = partial(_stop_if_asked, interruption, index, folder)
            snapshots, accuracy, layout = _train_one(config, dataset, device, seed, index, stop, bar.update)
            meta = {**description, "layout": layout, "seed": seed, "index": index}
            trajectories.write(folder / trajectories.file_name(index), snapshots, accuracy, meta)
    if interruption.signal is not None:
        raise runs.Stopped(f"stopped; all teachers are finished and kept in {folder}", interruption.signal)
    return folder


def open_all(folder: Path, config: Config, dataset: Dataset, network: nn.Module) -> list[Trajectory]:
    """The first ``config.teachers.count`` teachers of a folder, checked to fit data set and network.

    Raises:
        UserError: one is missing, damaged, foreign, or of another data set, architecture or recipe.
    """
    count = config.teachers.count
    found = trajectories.open_folder(folder, _describe(config, dataset), count)
    if len(found) < count:
        raise UserError(f"{folder} holds {len(found)} of {count} teachers. Train them: python -m ddpp.teachers")
    wanted = flat.layout(network)
    for trajectory in found.values():
        if trajectory.layout != wanted:
            raise UserError(f"{trajectory.path} holds other parameters than the network has")
    return list(found.values())


def folder_of(config: Config, dataset: Dataset) -> Path:
    """Where the teachers of a configuration are."""
    if config.teachers.folder:
        return Path(config.teachers.folder)
    parts = [dataset.name, *(["zca"] if dataset.preprocessing == "zca" else [])]
    options = models.describe(config.model, dataset.shape)
    parts.append(options.pop("model"))
    if options:
        parts += [f"d{options.pop('depth')}", f"w{options.pop('width')}"]
    usual = asdict(type(config.model)())
    parts += [value for name, value in options.items() if value != usual[name]]
    if config.teachers.sharpness_radius:
        parts.append(f"flat{config.teachers.sharpness_radius:g}-{config.teachers.sharpness_weight:g}")
    return Path("teachers") / "-".join(parts)


def _describe(config: Config, dataset: Dataset) -> dict[str, dict[str, Any]]:
    """What makes teachers equal but for seed and index."""
    return {
        "dataset": dataset.describe(),
        "model": models.describe(config.model, dataset.shape),
        "recipe": _recipe_by_name(config),
        "augmentation": {"groups": list(_groups(config, dataset)), "mode": config.augment.mode},
    }


def _groups(config: Config, dataset: Dataset) -> tuple[str, ...]:
    return augment.groups_for(config.augment.strategy, dataset.strategy)


def _recipe(config: Config) -> Recipe:
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


def _recipe_by_name(config: Config) -> dict[str, Any]:
    """The sharpness stands there only where it is searched, so that older teachers still fit."""
    recipe = asdict(_recipe(config))
    flat_minima = config.teachers.sharpness_radius > 0
    return {name: value for name, value in recipe.items() if flat_minima or not name.startswith("sharpness")}


def _stop_if_asked(interruption: runs.Interruption, index: int, folder: Path) -> None:
    if interruption.signal is not None:
        text = f"stopped; teacher {index} in training is lost, the finished ones before it are kept in {folder}"
        raise runs.Stopped(text, interruption.signal)


def _train_one(
    config: Config,
    dataset: Dataset,
    device: torch.device,
    seed: int,
    index: int,
    on_step: Callable[[], None],
    on_epoch: Callable[[], object],
) -> tuple[list[Tensor], list[float], flat.Layout]:
    """One teacher: its E + 1 snapshots, their accuracies, and the layout of the parameters."""
    key = seed, "teacher", index
    model = models.build(config.model, dataset.shape, len(dataset.classes), seed=seeds.derive(*key, "network"))
    model.to(device)
    images, labels = (t.to(device) for t in _tested(dataset, seed))  # once, and not at each epoch
    snapshots: list[Tensor] = []
    accuracy: list[float] = []

    def keep() -> None:
        snapshots.append(flat.flatten(model).cpu())
        accuracy.append(
            training.accuracy(
                model, images, labels, device=device, fused=config.run.use_fused_kernels, tile=config.run.winograd
            )
        )

    def end_epoch() -> None:
        keep()
        on_epoch()

    keep()
    finite = training.fit(
        model,
        dataset.train_images,
        dataset.train_labels,
        _recipe(config),
        seed=seeds.derive(*key, "training"),
        device=device,
        groups=_groups(config, dataset),
        mode=config.augment.mode,
        fused=config.run.use_fused_kernels,
        tile=config.run.winograd,
        on_step=on_step,
        on_epoch=end_epoch,
    )
    if not finite:
        raise UserError(f"teacher {index} diverged: its parameters are not finite. Lower the teachers' lr.")
    return snapshots, accuracy, flat.layout(model)


def _tested(dataset: Dataset, seed: int) -> tuple[Tensor, Tensor]:
    """Images and labels that tell a teacher's accuracy: those held out, or else a sample of the training images."""
    if len(dataset.val_labels):
        return dataset.val_images, dataset.val_labels
    draw = seeds.generator(seed, "teachers' accuracy")
    chosen = torch.randperm(len(dataset.train_labels), generator=draw)[:_SAMPLE]
    return dataset.train_images[chosen], dataset.train_labels[chosen]


def _run(config: Config, args: argparse.Namespace) -> None:
    dataset = data.load(config.data)
    folder = train(config, dataset, cli.device(config))
    found = trajectories.open_folder(folder, _describe(config, dataset), config.teachers.count)
    last = [t.accuracy()[-1] for t in found.values()]
    part = "the held-out images" if len(dataset.val_labels) else "a sample of the training images"
    print(f"{len(last)} teachers in {folder}, right on {statistics.fmean(last):.1f} % of {part}")


def main(argv: Sequence[str] | None = None) -> int:
    description = "Train teachers on the real data and keep their parameters after each epoch."
    sections = ("data", "model", "augment", "teachers", "run")
    return cli.run("teachers", description, "teachers", sections, _run, argv)


if __name__ == "__main__":
    sys.exit(main())
