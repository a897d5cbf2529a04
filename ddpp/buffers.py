"""Teachers that other codes trained: their files ``replay_buffer_*.pt``, checked and read.

The published code of MTT (arXiv 2203.11932) writes them, and after it those of TESLA, FTD and DATM. A file is a list of
trajectories, a trajectory a list of snapshots, before the first epoch and after each one, a snapshot the list of a
network's ``parameters()``. Layers, their order and the order of the features are those of our ConvNet, so that the
parameters one after another are its flat vector.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpp import runs
from ddpp.config import ModelConfig
from ddpp.errors import UserError
from ddpp.models.flat import Layout

_ADVICE = "Give replay_buffer_*.pt as the code of MTT writes them."
_CLEAR = 0.1  # share of the way from chance to 100 % that even poor teachers have gone


class Source(NamedTuple):
    """Where a trajectory is, and what tells it from others there."""

    path: Path
    place: int  # in the file, from 0
    digest: int  # of the parameters at its end

    def __str__(self) -> str:
        return f"trajectory {self.place} of {self.path}"

    def meta(self) -> dict[str, Any]:
        """What a teacher's file says of it."""
        return {"file": self.path.name, "trajectory": self.place, "digest": self.digest}


def check(model: ModelConfig) -> None:
    """Refuses networks that buffers cannot be of.

    Raises:
        UserError: another architecture than the ConvNet, or batch normalisation.
    """
    if model.model != "convnet":
        raise UserError(
            f"--from-buffers is for --model convnet, which other codes build alike, got {model.model!r}. Train its "
            "teachers here, without --from-buffers."
        )
    if model.norm == "batch":
        raise UserError(
            "--from-buffers is for --norm instance, group, layer or none, got 'batch', whose running statistics no "
            "buffer holds. Train its teachers here, without --from-buffers."
        )


def find(files: Sequence[Path], layout: Layout, *, count: int, epochs: int) -> list[Source]:
    """All trajectories of files, in the order in which these are given.

    Args:
        layout: of the network that they must be of.
        count: how many there must be, or more.
        epochs: that each must have.

    Raises:
        UserError: a file cannot be read, is no buffer, of another network or of a teacher that diverged, is named
            twice, or they are not so many or so long.
    """
    if len({path.resolve() for path in files}) < len(files):
        raise UserError("--from-buffers names a file twice, whose teachers would count as others; name each once")
    found: dict[Source, int] = {}
    for path in files:
        for place, trajectory in enumerate(_load(path)):
            end = _flat(trajectory[-1])
            source = Source(path, place, zlib.crc32(end.numpy().data))
            for snapshot in trajectory:
                _check_shapes(source, snapshot, layout)
            _check_trained(source, _flat(trajectory[0]), end)
            found[source] = len(trajectory) - 1
    (first, held), *others = found.items()
    for source, other in others:
        if other != held:
            raise UserError(f"{first} has {held} epochs and {source} has {other}. Give files of equal ones.")
    if len(found) < count or held != epochs:
        options = f"--count {min(count, len(found))} --epochs {held}"
        raise UserError(
            f"the buffers hold {len(found)} teachers of {held} epochs, and --count {count} --epochs {epochs} ask for "
            f"others. Give {options}, and to ddpp.distill {options.replace('--', '--teachers-')}."
        )
    return list(found)


def read(source: Source) -> list[Tensor]:
    """A trajectory's snapshots, float32. E + 1 of [P]

    Raises:
        UserError: the file cannot be read any more.
    """
    return [_flat(snapshot) for snapshot in _load(source.path)[source.place]]


def _flat(snapshot: list[Tensor]) -> Tensor:
    return torch.cat([p.detach().flatten() for p in snapshot]).float()


def _check_trained(source: Source, start: Tensor, end: Tensor) -> None:
    if not torch.isfinite(end).all():  # and what once was not stays so
        raise UserError(f"{source} holds parameters that are not finite: that teacher diverged. Leave the file out.")
    if torch.equal(start, end):
        raise UserError(
            f"{source} holds the same parameters before and after training, as MTT's code writes them of a training on "
            "a CPU. Leave the file out."
        )


def check_same(path: Path, meta: dict[str, Any], source: Source) -> None:
    """Refuses a teacher's file that holds another one than a trajectory.

    Raises:
        UserError: it does.
    """
    if meta.get("imported") != source.meta():
        raise UserError(
            f"{path} holds another teacher than {source}. Give the same files in the same order, or another folder of "
            "teachers."
        )


def doubt(accuracy: float, classes: int) -> str | None:
    """What is to be said of teachers whose accuracy, in percent, is hardly above chance."""
    chance = 100 / classes
    if accuracy >= chance + _CLEAR * (100 - chance):
        return None
    return (
        f"that is near chance, {chance:.1f} %: these buffers are probably of other data, or of another whitening or "
        "normalisation (--zca, --constants published)"
    )


def _load(path: Path) -> list[list[list[Tensor]]]:
    """The trajectories of a file, which stay in it until they are used."""
    found = runs.read_pickle(path, _ADVICE, mapped=True)
    if not (isinstance(found, list) and found and all(map(_is_trajectory, found))):
        raise UserError(f"{path} is no buffer: it holds no list of lists of lists of parameters. {_ADVICE}")
    return found


def _is_trajectory(found: Any) -> bool:
    return isinstance(found, list) and len(found) >= 2 and all(map(_is_snapshot, found))


def _is_snapshot(found: Any) -> bool:
    return isinstance(found, list) and bool(found) and all(map(_is_parameter, found))


def _is_parameter(found: Any) -> bool:
    usual = isinstance(found, Tensor) and found.layout is torch.strided and found.device.type == "cpu"
    return usual and found.is_floating_point()


def _check_shapes(source: Source, snapshot: list[Tensor], layout: Layout) -> None:
    found = [tuple(p.shape) for p in snapshot]
    differences = [
        f"{name} is {list(there)} there and {list(here)} here"
        for (name, here), there in zip(layout, found, strict=False)
        if here != there
    ]
    if len(found) != len(layout):
        differences = [f"it has {len(found)} parameters there and {len(layout)} here"]
    if differences:
        raise UserError(
            f"{source} is of another network: {differences[0]}. Give the --dataset, --width, --depth, --norm and "
            "--pooling of its training."
        )
