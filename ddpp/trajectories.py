"""The teachers' files: one safetensors file a trajectory, whole or absent, read two rows at a time.

What a teacher in training has reached stands in a hidden folder beside them, from which it goes on if it is cut. A file
holds ``snapshots`` [E + 1, P], the flat parameters before the first epoch and after each one,
``accuracy`` [E + 1] in percent, under ``state.`` what more epochs go on from, and as metadata what the teacher was:
layout, model, data set, recipe, augmentation, seed and index, and ``imported`` of which file of another code it is,
where it is of one. Nothing there depends on the number of epochs: a longer trajectory begins as a shorter one.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ddpp import runs
from ddpp.errors import UserError
from ddpp.models import flat
from ddpp.models.flat import Layout

FORMAT = 1
KIND = "trajectory"

_KEPT_EVERY = 60  # seconds
_STATE = "state."
_ABOUT = "about.json"

_NAME = re.compile(r"teacher-(\d+)\.safetensors")
_TYPES = {torch.float32: ("F32", "<f4"), torch.int64: ("I64", "<i8")}


@dataclass(frozen=True)
class Trajectory:
    """One teacher's file. Only its header is in memory."""

    path: Path
    epochs: int
    layout: Layout
    meta: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> Trajectory:
        """Reads the header.

        Raises:
            UserError: the file is missing, cut short, or no trajectory of this format.
        """
        advice = "Remove it, or restore it from a copy; a missing teacher is trained again."
        try:
            with safe_open(str(path), framework="pt") as file:
                meta = json.loads((file.metadata() or {}).get("ddpp", "{}"))
                shapes = {n: file.get_slice(n).get_shape() for n in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError, ValueError) as e:
            raise UserError(f"{path} is damaged or no trajectory: {e}. {advice}") from e
        if not isinstance(meta, dict) or meta.get("kind") != KIND or meta.get("format") != FORMAT:
            raise UserError(f"{path} is no trajectory of format {FORMAT} written by ddpp. {advice}")
        layout = tuple((name, tuple(shape)) for name, shape in meta["layout"])
        rows = shapes.get("accuracy", [0])[0]
        if not rows or shapes.get("snapshots") != [rows, flat.size(layout)]:
            raise UserError(f"{path} is damaged: its tensors have other shapes than it says. {advice}")
        return cls(Path(path), rows - 1, layout, meta)

    def rows(self, start: int, target: int) -> tuple[Tensor, Tensor]:
        """The parameters after ``start`` and after ``target`` epochs, float32 on the CPU. [P], [P]

        Nothing else of the file is read.

        Raises:
            UserError: an epoch beyond the trajectory, or the file changed since it was opened.
        """
        for name, epoch in (("start", start), ("target", target)):
            if not 0 <= epoch <= self.epochs:
                raise UserError(f"{self.path}: {name} epoch must be between 0 and {self.epochs}, got {epoch}")
        with self._file() as file:
            snapshots = file.get_slice("snapshots")
            return snapshots[start : start + 1][0].clone(), snapshots[target : target + 1][0].clone()

    def accuracy(self) -> list[float]:
        """Before and after each epoch, in percent: of held-out images, or of a sample of training images if none were.

        Raises:
            UserError: the file changed since it was opened.
        """
        with self._file() as file:
            return [float(a) for a in file.get_tensor("accuracy")]

    def whole(self) -> tuple[list[Tensor], list[float], dict[str, Tensor]]:
        """All that more epochs go on from: snapshots, accuracies, and the state. E + 1 of [P]; E + 1

        Raises:
            UserError: the file changed since it was opened.
        """
        with self._file() as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        return list(tensors["snapshots"]), tensors["accuracy"].tolist(), _states(tensors)

    def check(self, expected: dict[str, dict[str, Any]]) -> None:
        """Compares parts of the metadata, such as ``model``, ``dataset`` and ``recipe``.

        Raises:
            UserError: a difference; the first one is named.
        """
        for part, values in expected.items():
            found = self.meta.get(part, {})
            for key in _differing(part, found, values):
                raise UserError(
                    f"{self.path} holds a teacher of another {part}: {key} is {found.get(key)!r} there "
                    f"and {values.get(key)!r} here. Give the same options, or another folder of teachers."
                )

    @contextlib.contextmanager
    def _file(self) -> Iterator[Any]:
        try:
            with safe_open(str(self.path), framework="pt") as file:
                yield file
        except (SafetensorError, OSError) as e:
            raise UserError(f"{self.path} cannot be read any more: {e}. Train the teacher again.") from e


def write(
    path: Path,
    snapshots: Sequence[Tensor],
    accuracy: Sequence[float],
    meta: dict[str, Any],
    state: dict[str, Tensor] | None = None,
) -> None:
    """Writes one trajectory, without a second copy of it in memory.

    Args:
        snapshots: float32 vectors on the CPU. E + 1 of [P]
        accuracy: one for each snapshot, in percent.
        meta: ``layout``, and whatever :meth:`Trajectory.check` is to compare.
        state: what training goes on from beside the last snapshot; float32 or int64, on the CPU.

    Raises:
        UserError: the file cannot be written; nothing is left of it.
    """
    parts = {"snapshots": snapshots, "accuracy": [torch.tensor(accuracy)]}
    parts |= {_STATE + name: [value] for name, value in sorted((state or {}).items())}
    ordered = sorted(parts.items(), key=lambda part: -part[1][0].element_size())  # each begins at a multiple of its own
    header: dict[str, Any] = {
        "__metadata__": {"ddpp": json.dumps({"format": FORMAT, "kind": KIND, **meta}, sort_keys=True)}
    }
    end = 0
    for name, tensors in ordered:
        begin, end = end, end + sum(t.nbytes for t in tensors)
        shape = [len(tensors), tensors[0].numel()] if name == "snapshots" else list(tensors[0].shape)
        header[name] = {"dtype": _TYPES[tensors[0].dtype][0], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    with runs.replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in (t for _, tensors in ordered for t in tensors):
            file.write(tensor.contiguous().numpy().astype(_TYPES[tensor.dtype][1], copy=False).data)


@contextlib.contextmanager
def begin(
    folder: Path, count: int, epochs: int, description: dict[str, dict[str, Any]], seed: int
) -> Iterator[Begun | None]:
    """One of the first ``count`` teachers that lack epochs and are not in training, this process's within the block.

    It is None where other processes train all that are missing. A folder keeps the seed that it was begun with.

    Args:
        description: what must be equal for all teachers of the folder.
        seed: of a folder that is new.

    Raises:
        UserError: a foreign or damaged file, a teacher, finished or begun, that is not as described, or the folder
            cannot be written.
    """
    description = json.loads(json.dumps(description))  # as files tell it
    with contextlib.ExitStack() as held:
        with _changing(folder):
            _tidy(folder)
            metas = [found.meta for found in open_folder(folder, description).values()]
            for path in sorted(folder.glob(f".teacher-*/{_ABOUT}")):
                metas.append(runs.read_json(path))
                _check_begun(path.parent, metas[-1], description)
            seed = next((meta["seed"] for meta in metas), seed)
            index = next((i for i in missing(folder, count, epochs) if _claim(folder, i, epochs, held)), None)
            begun = None if index is None else Begun(folder, index, {**description, "seed": seed, "index": index})
        yield begun


def _changing(folder: Path) -> contextlib.AbstractContextManager[bool]:
    """Within the block no other process begins a teacher there or removes what it had begun."""
    return runs.claimed(folder / ".lock", wait=True)


def _claim(folder: Path, index: int, epochs: int, held: contextlib.ExitStack) -> bool:
    """Claims a teacher as long as ``held`` is, unless another process has it or has just finished it."""
    ours = held.enter_context(runs.claimed(_hidden(folder, index, ".lock")))
    return ours and _epochs(folder / file_name(index)) < epochs


class Begun:
    """A teacher in training: its rows so far, kept so that one that was cut goes on with the last that was kept.

    Rows are kept a minute after the last ones, or on :meth:`keep`, each time as a file of those that are new. A
    finished teacher that is to have more epochs begins with its file's.

    Args:
        folder: of the teachers.
        index: the teacher's.
        meta: all that its bytes depend on.

    Raises:
        UserError: rows of a teacher of other options are there, or the folder cannot be written.

    Attributes:
        snapshots: float32 vectors on the CPU. [P] each
        accuracy: one for each, in percent.
        state: what training goes on from beside the last snapshot.
        finished: epochs of the teacher's file; -1 where there is none.
    """

    def __init__(self, folder: Path, index: int, meta: dict[str, Any]) -> None:
        self.folder, self.meta = _hidden(folder, index), json.loads(json.dumps(meta))
        self.snapshots: list[Tensor] = []
        self.accuracy: list[float] = []
        self.state: dict[str, Tensor] = {}
        about = self.folder / _ABOUT
        if about.is_file():
            _check_begun(self.folder, runs.read_json(about), self.meta)
        else:
            runs.write_json(about, self.meta)
        whole = folder / file_name(index)
        runs.remove_partial(whole)
        if whole.is_file():
            self.snapshots, self.accuracy, self.state = Trajectory.open(whole).whole()
        self.finished = self.epochs
        for path in sorted(self.folder.glob("rows-*.safetensors")):
            self._take(path)
        self._kept, self._when = len(self.snapshots), time.monotonic()

    @property
    def epochs(self) -> int:
        """That are done; -1 before the first row."""
        return len(self.snapshots) - 1

    def add(self, snapshot: Tensor, accuracy: float, state: dict[str, Tensor]) -> None:
        """Adds a row.

        Raises:
            UserError: rows cannot be written.
        """
        self.snapshots.append(snapshot)
        self.accuracy.append(accuracy)
        self.state = state
        if time.monotonic() - self._when >= _KEPT_EVERY:
            self.keep()

    def keep(self) -> None:
        """Writes the rows that are new."""
        if self._kept < len(self.snapshots):
            new = {"snapshots": torch.stack(self.snapshots[self._kept :])}
            new["accuracy"] = torch.tensor(self.accuracy[self._kept :], dtype=torch.float64)
            state = {_STATE + name: value for name, value in self.state.items()}
            runs.write_tensors(self._path(self._kept), new | state, {"first": self._kept})
        self._kept, self._when = len(self.snapshots), time.monotonic()

    def discard(self) -> None:
        """Removes what was kept."""
        with _changing(self.folder.parent):
            shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, first: int) -> Path:
        return self.folder / f"rows-{first:06d}.safetensors"

    def _take(self, path: Path) -> None:
        """Adds a file's rows, or removes the file where it is damaged or what it follows is missing."""
        try:
            tensors, found = runs.read_tensors(path, "teacher in training")
        except UserError:
            path.unlink()
            return
        if found["first"] != len(self.snapshots):
            path.unlink()
            return
        self.snapshots += tensors.pop("snapshots").unbind()
        self.accuracy += tensors.pop("accuracy").tolist()
        self.state = _states(tensors)


def _states(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(_STATE): value for name, value in tensors.items() if name.startswith(_STATE)}


def file_name(index: int) -> str:
    return f"teacher-{index:03d}.safetensors"


def open_folder(folder: Path, expected: dict[str, dict[str, Any]], count: int | None = None) -> dict[int, Trajectory]:
    """The first ``count`` trajectories of a folder by their index, each checked against ``expected``.

    Left-overs of a killed run are ignored.

    Raises:
        UserError: a foreign or damaged file, or a teacher that is not what is expected; the message names it.
    """
    if (folder / "config.toml").is_file():
        raise UserError(f"{folder} is a run folder of ddpp.distill. Name another folder for teachers.")
    found = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        name = _NAME.fullmatch(path.name)
        if path.name.startswith("."):
            continue
        if not name:
            raise UserError(f"{path} is no teacher's file. Name another folder of teachers, or move it away.")
        if count is None or int(name[1]) < count:
            found[int(name[1])] = Trajectory.open(path)
            found[int(name[1])].check(expected)
    return dict(sorted(found.items()))


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes had begun of teachers that are finished, where the folder can be written."""
    if any(folder.glob(".teacher-*")):
        with contextlib.suppress(UserError), _changing(folder):
            _tidy(folder)


def _tidy(folder: Path) -> None:
    """Removes what nobody goes on from: rows that a finished teacher has, and folders without rows; locks too."""
    for path in {*folder.glob(".teacher-*/"), *(lock.with_suffix("") for lock in folder.glob(".teacher-*.lock"))}:
        finished = _epochs(path.with_name(f"{path.name[1:]}.safetensors"))
        begun = [int(path.stem.removeprefix("rows-")) for path in path.glob("rows-*.safetensors")]
        if not ((path / _ABOUT).is_file() and max(begun, default=-1) > finished):
            with runs.claimed(path.with_name(f"{path.name}.lock")) as unused:
                if unused:
                    shutil.rmtree(path, ignore_errors=True)


def missing(folder: Path, count: int, epochs: int) -> dict[int, int]:
    """Which of the first ``count`` teachers are not finished, and how many of so many epochs each lacks."""
    lacking = {index: epochs - max(_epochs(folder / file_name(index)), 0) for index in range(count)}
    return {index: lacks for index, lacks in lacking.items() if lacks > 0}


def _epochs(path: Path) -> int:
    """That a teacher's file holds; -1 where there is none."""
    return Trajectory.open(path).epochs if path.is_file() else -1


def _hidden(folder: Path, index: int, suffix: str = "") -> Path:
    return folder / f".{Path(file_name(index)).stem}{suffix}"


def _differing(part: str, found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """What tells a teacher's part from the one that is expected."""
    keys = [key for key in {**expected, **found} if found.get(key) != expected.get(key)]
    if part == "recipe":  # older files tell their epochs there
        keys = [key for key in keys if key != "epochs"]
    # A folder of images is called as it is named, and may have been renamed.
    return [] if part == "dataset" and keys == ["name"] else keys


def _check_begun(folder: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    for part, value in expected.items():
        differs = _differing(part, found.get(part, {}), value) if isinstance(value, dict) else found.get(part) != value
        if differs:
            raise UserError(
                f"{folder} holds the first epochs of a teacher of another {part}. Give the same options, "
                "remove it, or name another folder of teachers."
            )
