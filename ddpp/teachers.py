"""STAGE 1: trains teachers on the real data and keeps their parameters after each epoch.

``python -m ddpp.teachers --dataset cifar10 --zca --count 200 --epochs 50``

With ``--from-buffers`` it brings teachers that other codes trained; see :mod:`ddpp.buffers`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ddpp import buffers, cli, data, models, networks, runs, seeds, store, training, trajectories
from ddpp.buffers import Source
from ddpp.config import Config
from ddpp.data import Dataset, Images
from ddpp.errors import UserError
from ddpp.models import flat
from ddpp.training import Backend, Standing
from ddpp.trajectories import Begun, Trajectory

_BUFFER, _VELOCITY = "buffer.", "velocity"
_FEW_STEPS = 5  # in an epoch
_Make = Callable[[Begun, "tqdm[NoReturn]", runs.Interruption], None]
_Images = Callable[[int], int]  # on the bar, of a teacher that lacks so many epochs
_SAMPLE = 5_000  # training images that stand for all of them where none are held out


def train(config: Config, dataset: Dataset, device: torch.device, *, progress: bool = True) -> Path:
    """Trains the teachers that the folder lacks; those that are there stay, and one that was cut goes on.

    One that has fewer epochs than are asked for goes on as well, and ends as if it had been trained in one go.
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
    folder, count = store.folder_of(config, dataset), config.teachers.count
    description = store.describe(config, dataset)
    present, epochs = trajectories.open_folder(folder, description), config.teachers.epochs
    missing = trajectories.missing(folder, count, epochs)
    if not missing:
        trajectories.remove_leftovers(folder)
        return folder
    longer = [present[index] for index in missing if index in present]
    _check_go_on(longer, epochs)
    seed = next((t.meta["seed"] for t in present.values()), None)
    kept = f", beside {len(present)} that are there (seed {seed})" if present else ""
    if new := len(missing) - len(longer):
        print(f"training {new} teachers for {epochs} epochs into {folder}{kept}")
    if longer:
        print(f"{len(longer)} teachers in {folder} go on to epoch {epochs}")
    if (steps := -(-len(dataset.train_labels) // config.teachers.batch)) < _FEW_STEPS:
        many = f"{len(dataset.train_labels)} images in batches of {config.teachers.batch}"
        print(f"{many} are {steps} steps per epoch, too coarse a trajectory to follow well: lower the teachers' batch")
    number = len(dataset.train_labels)
    _complete(config, dataset, partial(_train, config, dataset, device), lambda lacks: lacks * number, progress)
    return folder


def _check_go_on(teachers: Sequence[Trajectory], epochs: int) -> None:
    """Refuses to train on what another code has trained."""
    for found in teachers:
        if "imported" in found.meta:
            raise UserError(
                f"{found.path} holds {found.epochs} epochs of another code's teacher, of {epochs} that are asked for, "
                "and cannot go on from there. Ask for fewer, or name another folder of teachers."
            )


def bring(
    config: Config, dataset: Dataset, files: Sequence[Path], device: torch.device, *, progress: bool = True
) -> Path:
    """Brings the first ``config.teachers.count`` teachers of other codes' buffers into the folder.

    Each snapshot's accuracy is measured here. Teachers that are there stay, so that what was cut goes on. What the
    configuration says of their training is taken on trust, but for the epochs.

    Args:
        files: buffers, in the order of the teachers; see :mod:`ddpp.buffers`.

    Returns:
        The folder, as of :func:`train`.

    Raises:
        UserError: a file cannot be used or does not fit the configuration, or the folder holds other teachers or their
            first epochs, or foreign files, or cannot be written.
        runs.Stopped: a signal asked to stop; teachers that were brought are kept.
    """
    buffers.check(config.model)
    folder, settings = store.folder_of(config, dataset), config.teachers
    layout = flat.layout(models.build(config.model, dataset.shape, len(dataset.classes), seed=config.run.seed))
    sources = buffers.find(files, layout, count=settings.count, epochs=settings.epochs)
    present = trajectories.open_folder(folder, store.describe(config, dataset), settings.count)
    for index, found in present.items():
        buffers.check_same(found.path, found.meta, sources[index])
    if len(present) == settings.count:
        trajectories.remove_leftovers(folder)
        return folder
    print(f"bringing {settings.count - len(present)} teachers into {folder}, of {len(sources)} that the buffers hold")
    images = (settings.epochs + 1) * _number_tested(dataset)
    _complete(config, dataset, partial(_bring, config, dataset, device, sources), lambda _: images, progress)
    return folder


def _complete(config: Config, dataset: Dataset, make: _Make, images: _Images, progress: bool) -> None:
    """Makes the teachers that the folder lacks, beside others that make some."""
    folder, settings = store.folder_of(config, dataset), config.teachers
    description = store.describe(config, dataset)
    missing = trajectories.missing(folder, settings.count, settings.epochs)
    bar = networks.images_bar("teachers", sum(map(images, missing.values())), shown=progress)
    with runs.Interruption() as interruption, bar:
        while missing:
            with trajectories.begin(folder, settings.count, settings.epochs, description, config.run.seed) as begun:
                if begun is None:
                    _wait(bar, interruption)
                else:
                    make(begun, bar, interruption)
            left = trajectories.missing(folder, settings.count, settings.epochs)
            ours = None if begun is None else begun.meta["index"]
            elsewhere = [lacks for index, lacks in missing.items() if index not in left and index != ours]
            networks.skip(bar, sum(map(images, elsewhere)))
            missing = left
    if interruption.signal is not None:
        raise runs.Stopped(f"stopped; all teachers are finished and kept in {folder}", interruption.signal)


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
    networks.skip(bar, (max(begun.epochs, 0) - max(begun.finished, 0)) * len(dataset.train_labels))
    layout = _train_one(config, dataset, device, begun, partial(_advance, bar, interruption, begun))
    trajectories.write(path, begun.snapshots, begun.accuracy, {**begun.meta, "layout": layout}, begun.state)
    begun.discard()


def _bring(
    config: Config,
    dataset: Dataset,
    device: torch.device,
    sources: Sequence[Source],
    begun: Begun,
    bar: tqdm[NoReturn],
    interruption: runs.Interruption,
) -> None:
    """Writes one teacher's file from a buffer."""
    if begun.snapshots:
        raise UserError(
            f"{begun.folder} holds the first epochs of a teacher in training. Finish it without --from-buffers, remove "
            "it, or name another folder of teachers."
        )
    path, source = begun.folder.parent / trajectories.file_name(begun.meta["index"]), sources[begun.meta["index"]]
    bar.set_postfix_str(path.stem)
    model = models.build(config.model, dataset.shape, len(dataset.classes), seed=begun.meta["seed"]).to(device)
    accuracy_of = _measure(dataset, begun.meta["seed"], Backend.of(config.run, device))
    try:
        snapshots, accuracy = buffers.read(source), []
        for snapshot in snapshots:
            flat.load_flat_(model, snapshot)
            accuracy.append(accuracy_of(model))
            bar.update(_number_tested(dataset))
            if interruption.signal is not None:
                text = f"stopped; teachers that were brought are kept in {path.parent}, ask again for the others"
                raise runs.Stopped(text, interruption.signal)
        meta = {**begun.meta, "layout": flat.layout(model), "imported": source.meta()}
        trajectories.write(path, snapshots, accuracy, meta)
    finally:
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
    backend = Backend.of(config.run, device)
    accuracy_of = _measure(dataset, key[0], backend)

    def keep(standing: Standing) -> None:
        begun.add(flat.flatten(model).cpu(), accuracy_of(model), _state(model, standing))

    start = _go_on(model, begun) if begun.snapshots else training.BEGINNING
    if not begun.snapshots:
        keep(start)
    finite = training.fit(
        model,
        dataset.train_images,
        dataset.train_labels,
        store.recipe(config),
        backend,
        seed=seeds.derive(*key, "training"),
        groups=store.groups(config, dataset),
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
    """Brings a network to where its teacher was cut, or ended.

    Raises:
        UserError: it ended in a file of an earlier version, without what training goes on from.
    """
    needed = {_BUFFER + name for name, _ in model.named_buffers()}
    needed |= {_VELOCITY} if begun.epochs and begun.meta["recipe"]["momentum"] else set()
    if needed - begun.state.keys():
        raise UserError(
            f"{begun.folder.parent / trajectories.file_name(begun.meta['index'])} cannot go on after epoch "
            f"{begun.epochs}: an earlier version of ddpp wrote it, without its momentum or running statistics. Name "
            "another folder of teachers, or remove it to train it again."
        )
    flat.load_flat_(model, begun.snapshots[-1])
    for name, value in model.named_buffers():
        value.copy_(begun.state[_BUFFER + name])
    return Standing(begun.epochs, begun.state.get(_VELOCITY))


def _measure(dataset: Dataset, seed: int, backend: Backend) -> Callable[[nn.Module], float]:
    """What tells a teacher's accuracy."""
    images, labels = _tested(dataset, seed)
    images, labels = images.to(backend.device), labels.to(backend.device)  # once, and not at each epoch
    return lambda model: training.accuracy(model, images, labels, backend)


def _tested(dataset: Dataset, seed: int) -> tuple[Tensor | Images, Tensor]:
    """Images and labels that tell a teacher's accuracy: those held out, or else a sample of the training images."""
    if len(dataset.val_labels):
        return dataset.val_images, dataset.val_labels
    draw = seeds.generator(seed, "teachers' accuracy")
    chosen = torch.randperm(len(dataset.train_labels), generator=draw)[:_SAMPLE]
    return dataset.train_images[chosen], dataset.train_labels[chosen]


def _number_tested(dataset: Dataset) -> int:
    return len(dataset.val_labels) or min(len(dataset.train_labels), _SAMPLE)


def _run(config: Config, args: argparse.Namespace) -> None:
    dataset, device = data.load(config.data), cli.device(config)
    files = [Path(name) for name in args.from_buffers]
    folder = bring(config, dataset, files, device) if files else train(config, dataset, device)
    found = trajectories.open_folder(folder, store.describe(config, dataset), config.teachers.count)
    last = statistics.fmean(t.accuracy()[config.teachers.epochs] for t in found.values())
    part = "the held-out images" if len(dataset.val_labels) else "a sample of the training images"
    if files and len(dataset.val_labels):
        part += ", on which other codes train too (--validation 0 holds out none)"
    print(f"{len(found)} teachers in {folder}, right on {last:.1f} % of {part}")
    if files and (doubt := buffers.doubt(last, len(dataset.classes))):
        print(doubt)


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--from-buffers",
        nargs="+",
        default=(),
        metavar="FILE",
        help="Bring teachers that the code of MTT, TESLA, FTD or DATM trained, replay_buffer_*.pt, and train none. "
        "--count and --epochs must be theirs; other options of training are kept as what you say of it.",
    )


def main(argv: Sequence[str] | None = None) -> int:
    description = "Train teachers on the real data and keep their parameters after each epoch."
    sections = ("data", "model", "augment", "teachers", "run")
    return cli.run("teachers", description, "teachers", sections, _run, argv, arguments=_arguments)


if __name__ == "__main__":
    sys.exit(main())
