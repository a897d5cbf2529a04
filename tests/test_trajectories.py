"""The teachers' files: what is written is read, two rows at a time, and everything unfit is named."""

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ddpp import runs, trajectories
from ddpp.errors import UserError
from ddpp.trajectories import Trajectory

LAYOUT = (("weight", (3, 4)), ("bias", (5,)))
SIZE = 17


def meta(**parts: Any) -> dict[str, Any]:
    return {
        "layout": LAYOUT,
        "recipe": {"lr": 0.1},
        "model": {"model": "convnet", "width": 128},
        "dataset": {"name": "digits", "preprocessing": "channel"},
        "seed": 0,
        "index": 0,
        **parts,
    }


def snapshots(rows: int = 5, size: int = SIZE) -> list[Tensor]:
    return list(torch.randn(rows, size, generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    target = tmp_path / "teachers" / trajectories.file_name(0)
    trajectories.write(target, snapshots(), [10.0, 20.0, 30.0, 40.0, 50.0], meta())
    return target


def test_what_is_written_is_read(path: Path) -> None:
    found = Trajectory.open(path)
    assert (found.epochs, found.layout, found.meta["seed"]) == (4, LAYOUT, 0)
    for i in range(5):
        for j in range(5):
            start, target = found.rows(i, j)
            assert torch.equal(start, snapshots()[i])
            assert torch.equal(target, snapshots()[j])
    assert found.accuracy() == [10.0, 20.0, 30.0, 40.0, 50.0]


def test_any_safetensors_reader_opens_it(path: Path) -> None:
    with safe_open(str(path), framework="np") as file:
        assert file.get_tensor("snapshots").shape == (5, SIZE)
        assert file.get_tensor("accuracy").tolist() == [10.0, 20.0, 30.0, 40.0, 50.0]


def test_the_same_trajectory_gives_the_same_bytes(path: Path, tmp_path: Path) -> None:
    trajectories.write(tmp_path / "again.safetensors", snapshots(), [10.0, 20.0, 30.0, 40.0, 50.0], meta())
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


STATES = {
    "none": {},
    "running statistics": {
        "buffer.seen": torch.tensor(7),
        "buffer.mean": torch.arange(3.0),
        "velocity": torch.ones(SIZE),
    },
}


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_the_whole_of_a_file_is_what_was_written(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / trajectories.file_name(0)
    trajectories.write(path, snapshots(4), [10.0, 20.0, 30.0, 40.0], meta(), state)
    rows, accuracy, found = Trajectory.open(path).whole()
    assert torch.equal(torch.stack(rows), torch.stack(snapshots(4))) and accuracy == [10.0, 20.0, 30.0, 40.0]
    assert found.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(found[name], value) and found[name].dtype == value.dtype
    assert Trajectory.open(path).epochs == 3 and torch.equal(Trajectory.open(path).rows(0, 3)[1], snapshots(4)[3])


def test_two_rows_are_read_without_the_rest(tmp_path: Path) -> None:
    """A process that may not hold the file can read two of its 64 rows of 4 MB."""
    path = tmp_path / trajectories.file_name(0)
    size = 2**20
    layout = (("weight", (size,)),)
    rows = [torch.full((size,), float(i)) for i in range(64)]
    trajectories.write(path, rows, [0.0] * 64, meta(layout=layout))
    program = (
        "import sys, resource; from pathlib import Path; from ddpp.trajectories import Trajectory\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); found = Trajectory.open(Path(sys.argv[1])); a, b = found.rows(3, 60)\n"
        "assert a.eq(3).all() and b.eq(60).all(); print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    kilobytes = int(done.stdout)
    assert path.stat().st_size > 2**28
    assert kilobytes < 2**16


def test_rows_do_not_hang_on_the_file(path: Path) -> None:
    start, _ = Trajectory.open(path).rows(2, 3)
    with open(path, "r+b") as file:
        file.truncate(8)
    assert torch.equal(start, snapshots()[2])


@pytest.mark.parametrize(("start", "target", "name"), [(3, 5, "target"), (-1, 2, "start"), (5, 4, "start")])
def test_epochs_beyond_the_trajectory(path: Path, start: int, target: int, name: str) -> None:
    with pytest.raises(UserError, match=f"{name} epoch must be between 0 and 4, got"):
        Trajectory.open(path).rows(start, target)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def other_tensors(path: Path) -> None:
    save_file({"weights": torch.zeros(3)}, str(path))


def other_stage(path: Path) -> None:
    runs.write_tensors(path, {"images": torch.zeros(3)}, {"format": 1})


def other_shapes(path: Path) -> None:
    trajectories.write(path, snapshots(rows=4), [0.0] * 5, meta())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shorten, "is damaged or no trajectory"),
        (lambda path: path.write_bytes(b""), "is damaged or no trajectory"),
        (lambda path: torch.save({"a": torch.zeros(3)}, path), "is damaged or no trajectory"),
        (other_tensors, "is no trajectory of format 1"),
        (other_stage, "is no trajectory of format 1"),
        (other_shapes, "is damaged: its tensors have other shapes"),
        (lambda path: path.unlink(), "is damaged or no trajectory"),
    ],
)
def test_an_unfit_file_is_named(path: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(path)
    with pytest.raises(UserError, match=rf"teacher-000\.safetensors {message}.*Remove it"):
        Trajectory.open(path)


def test_a_file_that_vanishes_after_opening(path: Path) -> None:
    found = Trajectory.open(path)
    path.unlink()
    with pytest.raises(UserError, match="cannot be read any more"):
        found.rows(0, 1)


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("model", {"width": 64}, "another model: width is 128 there and 64 here"),
        ("dataset", {"name": "cifar10"}, "another dataset: name is 'digits' there and 'cifar10' here"),
        (
            "dataset",
            {"preprocessing": "zca"},
            "another dataset: preprocessing is 'channel' there and 'zca' here",
        ),
        ("recipe", {"lr": 0.2}, r"another recipe: lr is 0\.1 there and 0\.2 here"),
    ],
)
def test_another_teacher_than_asked(path: Path, part: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"teacher-000\.safetensors .*{message}"):
        trajectories.open_folder(path.parent, {part: values})


def test_a_folder(path: Path) -> None:
    trajectories.write(path.with_name(trajectories.file_name(2)), snapshots(), [0.0] * 5, meta(index=2))
    expected = {"dataset": meta()["dataset"]}
    assert list(trajectories.open_folder(path.parent, expected)) == [0, 2]
    assert list(trajectories.open_folder(path.parent, expected, count=2)) == [0]
    assert trajectories.open_folder(path.parent / "none", expected) == {}
    assert trajectories.missing(path.parent, 4, 4) == {1: 4, 3: 4}
    assert trajectories.missing(path.parent, 2, 6) == {0: 2, 1: 6} and trajectories.missing(path.parent, 1, 3) == {}
    assert trajectories.missing(path.parent / "none", 1, 4) == {0: 4}


@pytest.mark.parametrize("name", ["replay_buffer_0.pt", "synthetic.safetensors", "teacher-1.pt"])
def test_a_foreign_file_in_the_folder(path: Path, name: str) -> None:
    (path.parent / name).write_bytes(b"")
    with pytest.raises(UserError, match=f"{name} is no teacher's file. Name another folder of teachers"):
        trajectories.open_folder(path.parent, {})


def test_a_run_folder_is_no_folder_of_teachers(path: Path) -> None:
    (path.parent / "config.toml").touch()
    (path.parent / "checkpoint.safetensors").touch()
    with pytest.raises(UserError, match=f"{path.parent} is a run folder of ddpp.distill. Name another folder"):
        trajectories.open_folder(path.parent, {})


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="the disk is full"):
        trajectories.write(tmp_path / trajectories.file_name(0), snapshots(), [0.0] * 5, meta())
    assert list(tmp_path.iterdir()) == []


def test_a_file_too_large_for_its_place_leaves_nothing(tmp_path: Path) -> None:
    """A real write that fails in the middle."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot write"):
            trajectories.write(tmp_path / "a.safetensors", snapshots(5, 2000), [0.0] * 5, meta())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert list(tmp_path.iterdir()) == []
