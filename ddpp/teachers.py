"""STAGE 1: trains teachers on the real data and keeps their parameters after each epoch.

``python -m ddpp.teachers --dataset cifar10 --zca --count 200 --epochs 50``
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ddpp import augment, cli, data, models, networks, runs, seeds, training, trajectories
from ddpp.config import Config
from ddpp.data import Dataset, Images
from ddpp.errors import UserError
from ddpp.models import flat
from ddpp.training import Backend, Recipe, Standing
from ddpp.trajectories import Begun, Trajectory

_BUFFER, _VELOCITY = "buffer.", "velocity"
_FEW_STEPS = 5  # in an epoch
_SAMPLE = 5_000  # training images that stand for all of them where none are held out


def train(config: Config, dataset: Dataset, device: torch.device, *, progress: bool = True) -> Path:
    """Trains the teachers that the folder lacks; those that are there stay, and one that was cut goes on.

    Several processes may do so at once: each trains teachers that no other does, and at the end waits for the others.
    A teacher depends only on its seed and index, so that an interrupted stage ends with the bytes of an uninterrupted
    one. A folder keeps the seed that it was begun with.

    Returns:
        The folder: ``config.teachers.folder``, or one named after data set and architecture.

    Raises:
        UserError: the folder holds other teachers or their first epochs, or foreign files, cannot be written, or a
            teacher diverged.
        runs.Stopped: a signal asked to stop; finished teachers and epochs are kept.
    """
    folder, count = folder_of(config, dataset), config.teachers.count
    description = _describe(config, dataset)
    present = trajectories.open_folder(folder, description)
    missing = trajectories.missing(folder, count)
    if not missing:
        trajectories.remove_leftovers(folder)
        return folder
    epochs, images = config.teachers.epochs, config.teachers.epochs * len(dataset.train_labels)
    seed = next((t.meta["seed"] for t in present.values()), config.run.seed)
    kept = f", beside {len(present)} that are there (seed {seed})" if present else ""
    print(f"training {len(missing)} teachers for {epochs} epochs into {folder}{kept}")
    if (steps := -(-len(dataset.train_labels) // config.teachers.batch)) < _FEW_STEPS:
        many = f"{len(dataset.train_labels)} images in batches of {config.teachers.batch}"
        print(f"{many} are {steps} steps per epoch, too coarse a trajectory to follow well: lower the teachers' batch")
    bar = networks.images_bar("teachers", len(missing) * images, shown=progress)
    with runs.Interruption() as interruption, bar:
        while missing:
            with trajectories.begin(folder, count, description, seed) as begun:
                if begun is None:
                    _wait(bar, interruption)
                else:
                    _train(config, dataset, device, begun, bar, interruption)
            left = trajectories.missing(folder, count)
            networks.skip(bar, (len(missing) - len(left) - (begun is not None)) * images)
            missing = left
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


def _train(
    config: Config,
    dataset: Dataset,
    device: torch.device,
    begun: Begun,
    bar: tqdm[NoReturn],
    interruption: runs.Interruption,
) -> None:
    """Trains one teacher, from its last epoch that was kept on, and writes its file."""
    path = begun.folder.parent / trajectories.file_name(begun.meta["index"])
    bar.set_postfix_str(path.stem)
    networks.skip(bar, max(begun.epochs, 0) * len(dataset.train_labels))
    layout = _train_one(config, dataset, device, begun, partial(_advance, bar, interruption, begun))
    trajectories.write(path, begun.snapshots, begun.accuracy, {**begun.meta, "layout": layout})
    begun.discard()


def _wait(bar: tqdm[NoReturn], interruption: runs.Interruption) -> None:
    """For a second, for teachers in training elsewhere."""
    bar.set_postfix_str("waiting for other processes")
    time.sleep(1)
    if interruption.signal is not None:
        raise runs.Stopped("stopped; other processes go on with the teachers that are missing", interruption.signal)


def _advance(bar: tqdm[NoReturn], interruption: runs.Interruption, begun: Begun, images: int) -> None:
    """After an update: tells how far it is, and stops where that was asked."""
    bar.update(images)
    if interruption.signal is not None:
        begun.keep()
        text = (
            f"stopped; teacher {begun.meta['index']} goes on after epoch {begun.epochs} when asked for again, and "
            f"finished ones are kept in {begun.folder.parent}"
        )
        raise runs.Stopped(text, interruption.signal)


def _train_one(
    config: Config, dataset: Dataset, device: torch.device, begun: Begun, on_step: Callable[[int], None]
) -> flat.Layout:
    """Adds to a teacher's snapshots those that are missing of E + 1. Returns the layout of the parameters."""
    key = begun.meta["seed"], "teacher", begun.meta["index"]
    model = models.build(config.model, dataset.shape, len(dataset.classes), seed=seeds.derive(*key, "network"))
    model.to(device)
    images, labels = _tested(dataset, key[0])
    images, labels = images.to(device), labels.to(device)  # once, and not at each epoch
    backend = Backend.of(config.run, device)

    def keep(standing: Standing) -> None:
        found = training.accuracy(model, images, labels, backend)
        begun.add(flat.flatten(model).cpu(), found, _state(model, standing))

    start = _go_on(model, begun) if begun.snapshots else training.BEGINNING
    if not begun.snapshots:
        keep(start)
    finite = training.fit(
        model,
        dataset.train_images,
        dataset.train_labels,
        _recipe(config),
        backend,
        seed=seeds.derive(*key, "training"),
        groups=_groups(config, dataset),
        mode=config.augment.mode,
        start=start,
        on_step=on_step,
        on_epoch=keep,
    )
    if not finite:
        begun.discard()
        raise UserError(f"teacher {key[-1]} diverged: its parameters are not finite. Lower the teachers' lr.")
    return flat.layout(model)


def _state(model: nn.Module, standing: Standing) -> dict[str, Tensor]:
    """What training goes on from beside the parameters: the network's buffers, and the velocity if there is one."""
    buffers = {_BUFFER + name: value.cpu().clone() for name, value in model.named_buffers()}
    return buffers if standing.velocity is None else {**buffers, _VELOCITY: standing.velocity.cpu()}


def _go_on(model: nn.Module, begun: Begun) -> Standing:
    """Brings a network to where its teacher was cut."""
    flat.load_flat_(model, begun.snapshots[-1])
    for name, value in model.named_buffers():
        value.copy_(begun.state[_BUFFER + name])
    return Standing(begun.epochs, begun.state.get(_VELOCITY))


def _tested(dataset: Dataset, seed: int) -> tuple[Tensor | Images, Tensor]:
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
