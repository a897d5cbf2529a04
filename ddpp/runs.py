"""Run folders: files that are whole or absent, checkpoints, and stopping without losing anything."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import pickle
import resource
import shutil
import signal
import sys
import tempfile
import threading
import warnings
import zipfile
from collections.abc import Collection, Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ddpp import config as configuration
from ddpp.config import SECTIONS, Config
from ddpp.errors import UserError

TEMPORARY = ".partial-"
_FIRST_FILES = {"config.toml", "data.json", "teachers.json"}  # of a run folder
#: Options of the machine: a run may go on with others, though not to the same bytes.
OF_THE_MACHINE = (
    *("run.device", "run.threads", "run.plugins", "run.cuda_graphs", "data.data_root", "data.download"),
    "teachers.folder",
)

OF_A_STEP = ("step", "loss", "step_size", "kept")  # what is read of an outer step's line in a log


class Unwritable(UserError):
    """A file could not be written."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place, flushed to disk, once the block has ended well.

    Raises:
        Unwritable: full disk, no permission; whatever stood at ``path`` is still there.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f"{TEMPORARY}{path.stem}-", suffix=path.suffix, dir=path.parent)
        os.close(handle)
    except OSError as e:
        raise _unwritable(path, e) from e
    try:
        yield Path(name)
        with open(name, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
        _sync_folder(path.parent)
    except OSError as e:
        raise _unwritable(path, e) from e
    except SafetensorError as e:
        raise Unwritable(f"cannot write {path}: {e}. Free some space or choose another folder.") from e
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def remove_partial(path: Path) -> None:
    """Removes what a process that was killed has left of a file. No other may be writing it."""
    for left in path.parent.glob(f"{TEMPORARY}{path.stem}-*"):
        left.unlink(missing_ok=True)


@contextlib.contextmanager
def claimed(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether this process alone holds ``path``, a lock, within the block; with ``wait`` it waits until it does.

    A process that has ended, in whatever way, holds nothing. Where a file system keeps no locks, all hold everything,
    with a warning.

    Raises:
        Unwritable: the file cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _locked(path, wait)
    except OSError as e:
        raise _unwritable(path, e) from e
    if file is None:
        yield False
        return
    with file:
        try:
            yield True
        finally:
            if _stands_at(file, path):
                path.unlink(missing_ok=True)


def _locked(path: Path, wait: bool) -> IO[str] | None:
    """The open file of a lock, or None if another process has it."""
    while True:
        file = open(path, "a")  # noqa: SIM115 (its lock lasts until it is closed)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.close()
            return None
        except OSError as e:
            warnings.warn(f"{path.parent} keeps no locks ({e.strerror}): run one process there at a time", stacklevel=5)
            return file
        if _stands_at(file, path):
            return file
        file.close()  # of a process that has just removed it


def _stands_at(file: IO[str], path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


class InUse(UserError):
    """Another process has what is asked for; it may be asked for again later."""


@contextlib.contextmanager
def alone(folder: Path, stage: str) -> Iterator[None]:
    """Keeps other processes from running a stage on a run folder within the block.

    Raises:
        InUse: one does.
    """
    with claimed(lock_of(folder, stage)) as ours:
        if not ours:
            raise InUse(f"another process runs ddpp.{stage} on {folder}. Wait for it, or stop it.")
        yield


def lock_of(folder: Path, stage: str) -> Path:
    return folder / f".{stage}.lock"


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_figure(path: Path, figure: Any) -> None:
    """Saves a figure of matplotlib as PNG, the same bytes each time."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130, metadata={"Software": None})


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
    """Saves tensors and JSON metadata as one safetensors file."""
    whole = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    with replacing(path) as temporary:
        save_file(whole, str(temporary), metadata={"ddpp": json.dumps(meta, sort_keys=True)})


def read_tensors(path: Path, what: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What :func:`write_tensors` saved.

    Raises:
        UserError: the file is missing, cut short, or not ours; ``what`` names its purpose.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no {what} at {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            meta = (file.metadata() or {}).get("ddpp")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path} is damaged or no {what}: {e}. Remove it, or restore it from a copy.") from e
    if meta is None:
        raise UserError(f"{path} is a safetensors file, but no {what} written by ddpp")
    return tensors, json.loads(meta)


def read_pickle(path: Path, advice: str, known: Collection[Any] = (), *, mapped: bool = False) -> Any:
    """What torch.save wrote; code in a file is not run.

    Args:
        advice: what to do about a file that cannot be read.
        known: what may stand there beside tensors and plain values.
        mapped: tensors stay in the file until they are used, where its format lets them.

    Raises:
        UserError: the file is missing, damaged, or holds anything else.
    """
    try:
        with torch.serialization.safe_globals(list(known)):
            maps = mapped and zipfile.is_zipfile(path)  # torch before 1.6 wrote others
            return torch.load(path, map_location="cpu", weights_only=True, mmap=maps)
    except pickle.UnpicklingError as e:
        reason = "it holds more than tensors and numbers, or is of another kind"
        raise UserError(f"cannot read {path}: {reason}. {advice}") from e
    except Exception as e:  # a damaged file may end in any
        reason = f"{type(e).__name__}: {e}".splitlines()[0]
        raise UserError(f"cannot read {path} ({reason}). {advice}") from e


def read_json(path: Path, absent: str = "restore it from a copy") -> dict[str, Any]:
    """The table that :func:`write_json` saved.

    Raises:
        UserError: the file is damaged or missing; ``absent`` says what that means.
    """
    if not path.is_file():
        raise UserError(f"{path.parent} holds no {path.name}: {absent}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise UserError(f"{path} is damaged: {e}. Remove it, or restore it from a copy.") from e
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it holds no table. Remove it, or restore it from a copy.")
    return found


class Log:
    """A file of JSON lines, one an outer step; reopened for a resumed run at the step of its checkpoint."""

    def __init__(self, path: Path, first_step: int) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path.exists() and first_step > 0:
            self.rows = [row for row in read_log(path, ["step"]) if row["step"] < first_step]
        self._written = 0

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def flush(self) -> None:
        """Writes what is new; the first time the whole file, so that lines after the checkpoint vanish.

        Raises:
            UserError: the file cannot be written.
        """
        if self._written == 0:
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
        else:
            _append(self.path, self.rows[self._written :])
        self._written = len(self.rows)


def read_log(path: Path, needed: Collection[str] = ()) -> list[dict[str, Any]]:
    """The lines of a log that tell what is ``needed``; one cut short by a crash, or damaged, is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and row.keys() >= set(needed)]


def _append(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Adds lines to a file, on disk when this returns: a checkpoint that comes after them must not outlive them."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
    except OSError as e:
        raise _unwritable(path, e) from e


class Ledger:
    """A file of JSON lines that holds what parts of a long computation gave, so that one that was cut goes on.

    ``about`` tells one computation from another: a file that another one left is begun anew.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path, self._found = path, {}
        head = {"about": json.loads(json.dumps(about))}
        rows = read_log(path) if path.is_file() else []
        if rows and rows[0] == head:
            self._found = {row["part"]: row["found"] for row in rows[1:] if row.keys() >= {"part", "found"}}
        lines = [head, *({"part": part, "found": found} for part, found in self._found.items())]
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines))  # without a line that was cut short

    def get(self, part: str) -> Any:
        """What a part gave, or None."""
        return self._found.get(part)

    def add(self, part: str, found: Any) -> None:
        """Keeps what a part gave, unless that is kept already.

        Raises:
            UserError: the file cannot be written.
        """
        if part in self._found:
            return
        self._found[part] = found
        _append(self.path, [{"part": part, "found": found}])


class Interruption:
    """Within the block, Ctrl-C and SIGTERM set ``signal`` instead of ending the process; a second one ends it."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> Interruption:
        # Python lets the main thread alone set handlers; elsewhere signals keep their meaning.
        caught = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        self._previous = {number: signal.signal(number, self._note) for number in caught}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number


class Stopped(Exception):
    """The run stopped because a signal asked it to; everything is saved."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.exit_code = 128 + number


@contextlib.contextmanager
def open_folder(path: Path, config: Config, data: dict[str, Any], *, resume: bool) -> Iterator[Path]:
    """Makes a run folder and saves the resolved configuration, or checks that it holds this very run.

    A run that goes on with other :data:`OF_THE_MACHINE`, or to another number of outer steps, saves those. Within the
    block no other process can open it.

    Args:
        data: describes the run's data set; its ``fingerprint`` must not change, nor the digests of ``plugins``.

    Raises:
        UserError: it holds another run, an unfinished one without ``resume``, or foreign files.
        InUse: another process has it.
    """
    if not (path / "config.toml").is_file():
        if resume:
            raise UserError(f"{path} holds no run to resume")
        # Another process may be writing the first two files just now.
        if path.exists() and (not path.is_dir() or _contents(path) - _FIRST_FILES):
            raise UserError(f"{path} exists and is not a run folder. Choose another --out.")
    with alone(path, "distill"):
        for left in path.glob(f"{TEMPORARY}*"):
            left.unlink(missing_ok=True)
        _check_folder(path, config, data, resume)
        write_text(path / "config.toml", config.to_toml())
        write_json(path / "data.json", data)
        yield path


def _check_folder(path: Path, config: Config, data: dict[str, Any], resume: bool) -> None:
    """Refuses a run folder that holds another run, or this one without ``resume``."""
    if (path / "config.toml").is_file():
        check_same_run(path, config, (*OF_THE_MACHINE, "distill.steps") if resume else ("run.plugins",))
        if not resume:
            finished = (path / "results.json").is_file()
            advice = "a finished run. Choose" if finished else "an unfinished run. Continue it with --resume, or choose"
            raise UserError(f"{path} holds {advice} another --out.")
        if saved_config(path).distill.steps != config.distill.steps:  # what is told of it will be of another set
            for name in ("results.json", "evaluation.json"):
                (path / name).unlink(missing_ok=True)
        if (path / "data.json").is_file():
            saved = read_json(path / "data.json")
            check_same_data(path, saved, data["fingerprint"])
            if saved.get("plugins", data.get("plugins")) != data.get("plugins"):
                raise UserError(
                    f"{path} was begun with a plugin that was edited since. Restore it, or choose another --out."
                )


def _contents(folder: Path) -> set[str]:
    """What stands there, but for locks and what a process that was killed has left of a file."""
    names = {entry.name for entry in folder.iterdir() if not entry.name.startswith(TEMPORARY)}
    return names - {lock_of(folder, "distill").name}


def saved_config(folder: Path) -> Config:
    """The options of a run.

    Raises:
        UserError: the folder holds none.
    """
    path = folder / "config.toml"
    if not path.is_file():
        raise UserError(f"{folder} is no run folder of ddpp.distill: it holds no config.toml")
    return configuration.load(path)


def discard(folder: Path) -> None:
    """Removes a run folder that holds no more than what stands there before the first step."""
    if _contents(folder) <= _FIRST_FILES:
        shutil.rmtree(folder)


def check_same_run(path: Path, config: Config, but: Collection[str] = ()) -> None:
    """Refuses a run folder whose options are others, apart from those named in ``but`` as ``section.option``.

    Raises:
        UserError: they are; the message names them.
    """
    saved, rows = saved_config(path), []
    for section in SECTIONS:
        old, new = getattr(saved, section), getattr(config, section)
        for name in (f"{section}.{f.name}" for f in fields(old)):
            there, here = (getattr(table, name.partition(".")[2]) for table in (old, new))
            if there != here and name not in but:
                rows.append(f"{name} is {there!r} there and {here!r} here")
    if rows:
        raise UserError(f"{path} was made with other options ({', '.join(rows)}). Choose another --out.")


def unused_folder(base: Path) -> Path:
    """``base``, or ``base-2``, ``base-3``, ... : the first that does not exist."""
    path, number = base, 2
    while path.exists():
        path, number = base.with_name(f"{base.name}-{number}"), number + 1
    return path


def check_same_data(folder: Path, meta: dict[str, Any], fingerprint: str) -> None:
    """Refuses a run whose synthetic set came from other data.

    Raises:
        UserError: it did.
    """
    if meta.get("fingerprint") != fingerprint:
        raise UserError(f"{folder} was distilled from other data than its data set holds now; check --data-root")


def accuracy_table(results: dict[str, Any]) -> str:
    """Test accuracy in percent, mean and standard deviation, as a Markdown table with its protocol."""
    tables, protocol = results["models"], results["protocol"]
    rows = [f"| trained on | {' | '.join(tables)} |", "|---" * (len(tables) + 1) + "|"]
    for condition in results["accuracy"]:
        cells = [figure_text(table[condition]) for table in tables.values()]
        rows.append(f"| {condition_name(condition)} | {' | '.join(cells)} |")
    over = spread_text(protocol["networks"]) + answers_text(protocol)
    return "\n".join([*rows, *_robustness_lines(results)]) + (
        f"\n\nTest accuracy in percent, mean ± standard deviation (ddof {protocol['ddof']}) over {over}; synthetic "
        f"images of {selection_text(protocol['select'])}."
    )


def spread_text(networks: int, distillations: int = 1) -> str:
    """What a mean and its standard deviation are over, in words."""
    over = f"{networks} networks trained from scratch"
    return f"{distillations} distillations, each the mean of {over}" if distillations > 1 else over


def answers_text(evaluation: dict[str, Any]) -> str:
    """What those networks learned that see few images, in words, where it was not the images' labels."""
    if evaluation.get("labels", "own") == "own":
        return ""
    mixed = " with CutMix" if evaluation["cutmix"] else ""
    teacher = f"a teacher's answers (itself right on {evaluation['teacher']:.1f} %)"
    return f", on few images{mixed} by {teacher} at temperature {evaluation['temperature']:g}"


def selection_text(select: str) -> str:
    """Which snapshot ``--select`` reports, in words."""
    return {
        "final": "the last outer step",
        "val": "the snapshot best on held-out training images",
        "test": "the snapshot best on the test images themselves, as papers often do: too high",
        "all": "the last outer step where nothing else is said",
    }[select]


def _robustness_lines(results: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for model, found in results.get("robustness", {}).items():
        for what in ("best", "average"):
            shown = ", ".join(f"{condition_name(row)} {value:.1f}" for row, value in found[what].items())
            lines += ["", f"{model}, {what} over the augmentations: {shown}"]
        if found["ars"]:
            shown = ", ".join(f"{name} {value:.4f}" for name, value in found["ars"].items())
            lines[-1] += f"; ARS (0 to 1): {shown}"
    return lines


def condition_name(condition: str) -> str:
    """A condition in words."""
    trained_on, _, chosen = condition.partition("/")
    name = {"random": "random real images", "full": "all real data"}.get(trained_on, trained_on)
    how = {
        "val": "best on held-out",
        "test": "best on test, as papers do: too high",
        "searched": "searched rate",
        "own": "own labels",
        "none": "no augmentation",
        "dsa": "DSA",
        "autoaugment": "AutoAugment",
        "randaugment": "RandAugment",
        "imagenet": "ImageNet's augmentation",
    }
    return f"{name} ({how[chosen]})" if chosen else name


def figure_text(figures: dict[str, Any] | None) -> str:
    """Mean and, of more than one, standard deviation; and how many networks diverged."""
    if not figures:
        return "not run"
    spread = f" ± {figures['std']:.1f}" if len(figures["networks"]) > 1 else ""
    diverged = f" ({figures['diverged']} diverged)" if "diverged" in figures else ""
    return f"{figures['mean']:.1f}{spread}{diverged}"


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory since :func:`forget_peak_memory`, of this process or of torch's allocations on a CUDA device.

    Of a process whose system cannot forget, since it began.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def forget_peak_memory(device: torch.device) -> None:
    """Begins a new peak for :func:`peak_memory_mb`, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # VmHWM alone; see proc(5)


def _unwritable(path: Path, error: OSError) -> Unwritable:
    if error.errno == errno.ENOSPC:
        return Unwritable(f"the disk is full: {path} was not written. Free some space and continue.")
    return Unwritable(f"cannot write {path}: {error.strerror or error}")


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):  # as of file systems that sync no folders
            raise
    finally:
        os.close(handle)
