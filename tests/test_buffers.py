"""Teachers of other codes: their files become trajectories, of networks with the same outputs."""

import os
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddpp import data, distill, models, runs, store, teachers, training, trajectories
from ddpp.config import Config, DataConfig, ModelConfig, TeachersConfig
from ddpp.data import Dataset, Images
from ddpp.errors import UserError
from ddpp.models import flat
from ddpp.trajectories import Trajectory

CPU = torch.device("cpu")
WIDTH, CLASSES = 8, 10
Buffer = list[list[list[Tensor]]]


def convnet(norm: str, depth: int, channels: int, size: int) -> nn.Module:
    """As the code of MTT builds it; one-channel images of 28 pixels become 32."""
    layers: list[nn.Module] = []
    side = 32 if size == 28 else size
    for block in range(depth):
        padding = 3 if channels == 1 and block == 0 and size == 28 else 1
        layers.append(nn.Conv2d(WIDTH if block else channels, WIDTH, 3, padding=padding))
        norms = {
            "instance": lambda side: [nn.GroupNorm(WIDTH, WIDTH)],
            "group": lambda side: [nn.GroupNorm(4, WIDTH)],
            "layer": lambda side: [nn.LayerNorm([WIDTH, side, side])],
            "none": lambda side: [],
        }
        layers += [*norms[norm](side), nn.ReLU(), nn.AvgPool2d(2)]
        side //= 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(WIDTH * side * side, CLASSES))


def trajectory(network: nn.Module, epochs: int, seed: int) -> list[list[Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    return [[0.3 * torch.randn(p.shape, generator=draw) for p in network.parameters()] for _ in range(epochs + 1)]


def buffer(count: int = 2, epochs: int = 3, first: int = 0) -> Buffer:
    """Random networks for the digits."""
    return [trajectory(convnet("instance", 2, 1, 8), epochs, first + i) for i in range(count)]


def settings(folder: Path, *, count: int = 2, epochs: int = 3, lr: float = 0.02, **model: Any) -> Config:
    recipe = TeachersConfig(folder=str(folder), count=count, epochs=epochs, lr=lr)
    return Config(model=ModelConfig(**{"width": WIDTH, **model}), teachers=recipe)


def bring(config: Config, dataset: Dataset, *files: Path) -> Path:
    return teachers.bring(config, dataset, files, CPU, progress=False)


def saved(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def digits() -> Dataset:
    whole = data.load(DataConfig())
    return replace(whole, val_images=Images(whole.val_images[:20]), val_labels=whole.val_labels[:20])


def random_images(digits: Dataset, channels: int, size: int) -> Dataset:
    images = Images(torch.randn(20, channels, size, size, generator=torch.Generator().manual_seed(0)))
    return replace(digits, train_images=images, val_images=images)


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32)])
@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("norm", ["instance", "group", "layer", "none"])
def test_outputs_are_those_of_the_other_code(
    norm: str, depth: int, channels: int, size: int, tmp_path: Path, digits: Dataset
) -> None:
    theirs = convnet(norm, depth, channels, size).double()
    held = [trajectory(theirs, 3, seed) for seed in (0, 1)]
    dataset, config = random_images(digits, channels, size), settings(tmp_path / "teachers", norm=norm, depth=depth)
    folder = bring(config, dataset, saved(tmp_path / "replay_buffer_0.pt", held))
    ours = models.build(config.model, dataset.shape, CLASSES, seed=0).double()
    images = dataset.train_images[:5].double()
    for found, expected in zip(store.open_all(folder, config, dataset, ours), held, strict=True):
        for epoch, snapshot in enumerate(expected):
            flat.load_flat_(ours, found.rows(epoch, 0)[0].double())
            for parameter, value in zip(theirs.parameters(), snapshot, strict=True):
                parameter.data = value.double()
            torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=1e-10)


def as_buffer(found: Trajectory) -> list[list[Tensor]]:
    rows = [found.rows(epoch, 0)[0] for epoch in range(found.epochs + 1)]
    return [list(flat.unflatten(row, found.layout).values()) for row in rows]


@pytest.mark.parametrize("validation", ["0.1", "0"])
def test_teachers_come_back_and_are_distilled_from(
    validation: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, folder = tmp_path / "own", tmp_path / "brought"
    network = ["--width", "8", "--threads", "1", "--device", "cpu", "--validation", validation]
    recipe = ["--count", "2", "--epochs", "2", "--lr", "0.1"]
    assert teachers.main([*network, *recipe, "--folder", str(own)]) == 0
    trained = [Trajectory.open(own / trajectories.file_name(i)) for i in range(2)]
    files = [str(saved(tmp_path / f"replay_buffer_{i}.pt", [as_buffer(t)])) for i, t in enumerate(trained)]
    capsys.readouterr()
    assert teachers.main([*network, *recipe, "--folder", str(folder), "--from-buffers", *files]) == 0
    told = capsys.readouterr().out
    assert re.search(r"2 teachers in .*, right on \d\d\.\d % of (the held-out|a sample)", told)
    assert "chance" not in told and ("--validation 0" in told) == (validation != "0")
    for index, teacher in enumerate(trained):
        found = Trajectory.open(folder / trajectories.file_name(index))
        assert found.accuracy() == teacher.accuracy()
        assert torch.equal(torch.stack(found.rows(0, 2)), torch.stack(teacher.rows(0, 2)))
        imported = {"file": f"replay_buffer_{index}.pt", "trajectory": 0}
        assert found.meta == {**teacher.meta, "imported": {**found.meta["imported"], **imported}}
    before = contents(folder)
    arguments = [
        *network,
        *("--teachers-folder", str(folder), "--out", str(tmp_path / "run"), "--max-start-epoch", "1"),
    ]
    arguments += ["--teachers-count", "2", "--teachers-epochs", "2", "--teachers-lr", "0.1", "--teacher-span", "1"]
    small = ["--steps", "1", "--inner-steps", "2", "--evaluate-networks", "1", "--evaluate-epochs", "1"]
    assert distill.main([*arguments, *small, "--evaluate-full-epochs", "0"]) == 0
    assert contents(folder) == before


def test_buffers_of_other_data_are_doubted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = saved(tmp_path / "replay_buffer_0.pt", buffer())
    options = [
        "--width",
        "8",
        "--count",
        "2",
        "--epochs",
        "3",
        "--device",
        "cpu",
        "--folder",
        str(tmp_path / "teachers"),
    ]
    assert teachers.main([*options, "--from-buffers", str(file)]) == 0
    told = capsys.readouterr()
    assert f"bringing 2 teachers into {tmp_path / 'teachers'}, of 2 that the buffers hold" in told.out
    assert "near chance, 10.0 %: these buffers are probably of other data, or of another whitening" in told.out
    assert "teacher-001" in told.err and "100%" in told.err


def test_the_first_teachers_of_the_files_are_brought(tmp_path: Path, digits: Dataset, bars: list[Any]) -> None:
    files = [saved(tmp_path / f"replay_buffer_{i}.pt", buffer(2, 3, first=2 * i)) for i in range(3)]
    folder = teachers.bring(settings(tmp_path / "teachers", count=3), digits, files, CPU)
    assert bars[-1].n == bars[-1].total == 3 * 4 * 20
    first = contents(folder)
    assert list(first) == [trajectories.file_name(i) for i in range(3)]
    third = Trajectory.open(folder / trajectories.file_name(2))
    assert third.meta["imported"].items() > {"file": "replay_buffer_1.pt", "trajectory": 0}.items()
    assert torch.equal(third.rows(1, 1)[0], torch.cat([p.flatten() for p in buffer(1, 3, first=2)[0][1]]))
    assert bring(settings(folder, count=3), digits, *files) == folder
    teachers.bring(settings(folder, count=6), digits, files, CPU)
    assert bars[-1].n == bars[-1].total == 3 * 4 * 20
    assert {name: contents(folder)[name] for name in first} == first
    assert contents(folder) == contents(bring(settings(tmp_path / "whole", count=6), digits, *files))


@pytest.mark.parametrize("killed", [True, False])
def test_what_was_cut_goes_on(killed: bool, tmp_path: Path, digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    file = saved(tmp_path / "replay_buffer_0.pt", buffer(3))
    config, seen = settings(tmp_path / "cut", count=3), []
    accuracy = training.accuracy

    def cut(*arguments: Any) -> float:
        seen.append(arguments)
        if len(seen) == 6:  # the second snapshot of the second teacher
            if killed:
                raise RuntimeError("killed")
            os.kill(os.getpid(), signal.SIGTERM)
        return accuracy(*arguments)

    monkeypatch.setattr(training, "accuracy", cut)
    with pytest.raises(RuntimeError if killed else runs.Stopped, match="killed" if killed else "ask again"):
        bring(config, digits, file)
    assert list(contents(tmp_path / "cut")) == [trajectories.file_name(0)]
    bring(config, digits, file)
    assert len(seen) == 6 + 2 * 4
    assert contents(tmp_path / "cut") == contents(bring(settings(tmp_path / "whole", count=3), digits, file))


def test_files_of_an_older_torch_are_read(tmp_path: Path, digits: Dataset) -> None:
    file = tmp_path / "replay_buffer_0.pt"
    torch.save(buffer(), file, _use_new_zipfile_serialization=False)
    older = contents(bring(settings(tmp_path / "older"), digits, file))
    assert older == contents(bring(settings(tmp_path / "newer"), digits, saved(file, buffer())))


class Code:
    """Runs when it is read by a reader that lets it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


def test_code_in_a_file_is_not_run(tmp_path: Path, digits: Dataset) -> None:
    file = saved(tmp_path / "replay_buffer_0.pt", Code(tmp_path / "it ran"))
    with pytest.raises(UserError, match=r"cannot read .*replay_buffer_0\.pt: it holds more than tensors"):
        bring(settings(tmp_path / "teachers"), digits, file)
    assert not (tmp_path / "it ran").exists()


def changed(value: float | None) -> Buffer:
    """The second teacher's last snapshot holds a value, or all its snapshots are one."""
    held = buffer()
    if value is None:
        held[1] = [held[1][0]] * 4
    else:
        held[1][3][0][0, 0, 0, 0] = value
    return held


UNEQUAL = [*buffer(1, 3), *buffer(1, 4)]
WRONG: dict[str, tuple[Any, str]] = {
    "a state": (
        convnet("none", 1, 1, 8).state_dict(),
        "is no buffer: it holds no list of lists of lists of parameters",
    ),
    "empty": ([], "is no buffer"),
    "a trajectory": (buffer()[0], "is no buffer"),
    "a snapshot": ([[[torch.zeros(3)]]], "is no buffer"),
    "numbers": ([[[1.0], [2.0]]], "is no buffer"),
    "fewer": (
        buffer(1),
        "hold 1 teachers of 3 epochs, .*Give --count 1 --epochs 3, .*--teachers-count 1 --teachers-ep",
    ),
    "longer": (buffer(5, 7), r"hold 5 teachers of 7 epochs, and --count 2 --epochs 3 ask .*Give --count 2 --epochs 7,"),
    "unequal": (UNEQUAL, r"trajectory 0 of .* has 3 epochs and trajectory 1 of .* has 4"),
    "sparse": ([[[torch.eye(3).to_sparse()]] * 2], "is no buffer"),
    "on no device": ([[[torch.zeros(3, device="meta")]] * 2], "is no buffer"),
    "whole numbers": ([[[torch.zeros(3, dtype=torch.int64)]] * 2], "is no buffer"),
    "complex": ([[[torch.zeros(3, dtype=torch.complex64)]] * 2], "is no buffer"),
    "no parameters": ([[[], []]], "is no buffer"),
    "not finite": (changed(torch.nan), r"trajectory 1 of .*_0\.pt holds parameters that are not finite"),
    "infinite": (changed(torch.inf), "that teacher diverged"),
    "aliases": (changed(None), r"trajectory 1 of .*_0\.pt holds the same parameters before and after training"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_buffers_are_named(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    value, message = WRONG[case]
    file, folder = saved(tmp_path / "replay_buffer_0.pt", value), tmp_path / "teachers"
    options = ["--width", "8", "--count", "2", "--epochs", "3", "--device", "cpu", "--folder", str(folder)]
    assert teachers.main([*options, "--from-buffers", str(file)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("ddpp.teachers: error: ") and re.search(message, line), line
    assert not folder.exists()


def test_other_buffers_of_the_same_name_are_others(tmp_path: Path, digits: Dataset) -> None:
    first, other = (tmp_path / name / "replay_buffer_0.pt" for name in ("first", "other"))
    for seed, path in enumerate((first, other)):
        path.parent.mkdir()
        saved(path, buffer(first=10 * seed))
    bring(settings(tmp_path / "teachers"), digits, first)
    with pytest.raises(UserError, match=r"teacher-000\S* holds another teacher than trajectory 0 of .*other"):
        bring(settings(tmp_path / "teachers"), digits, other)
    with pytest.raises(UserError, match="names a file twice"):
        bring(settings(tmp_path / "more", count=4), digits, first, first.parent / ".." / "first" / first.name)


def test_files_that_cannot_be_read_are_named(tmp_path: Path, digits: Dataset) -> None:
    whole, cut, text = saved(tmp_path / "replay_buffer_0.pt", buffer()), tmp_path / "cut.pt", tmp_path / "text.pt"
    cut.write_bytes(whole.read_bytes()[:5000])
    text.write_text("no tensors")
    for file in (cut, text, tmp_path, tmp_path / "none.pt"):
        with pytest.raises(
            UserError, match=r"cannot read .*\. Give replay_buffer_\*\.pt as the code of MTT writes them"
        ):
            bring(settings(tmp_path / "teachers"), digits, whole, file)
    assert not (tmp_path / "teachers").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 4}, r"0\.weight is \[8, 1, 3, 3\] there and \[4, 1, 3, 3\] here.*Give the --dataset, --width"),
        ({"depth": 1}, "it has 10 parameters there and 6 here"),
        ({"norm": "none"}, "it has 10 parameters there and 6 here"),
        ({"pooling": "none"}, r"classifier\.weight is \[10, 32\] there and \[10, 512\] here"),
        ({"model": "convnet-kip"}, "is for --model convnet, .*got 'convnet-kip'. Train its teachers here"),
        ({"model": "resnet18"}, "is for --model convnet, .*got 'resnet18'. Train its teachers here"),
        ({"norm": "batch"}, "is for --norm instance, group, layer or none, got 'batch'"),
    ],
)
def test_other_networks_are_refused(options: dict[str, Any], message: str, tmp_path: Path, digits: Dataset) -> None:
    file = saved(tmp_path / "replay_buffer_0.pt", buffer())
    with pytest.raises(UserError, match=message):
        bring(settings(tmp_path / "teachers", **options), digits, file)
    assert not (tmp_path / "teachers").exists()


def test_a_folder_of_other_teachers_is_refused(tmp_path: Path, digits: Dataset) -> None:
    one, two = (saved(tmp_path / f"replay_buffer_{i}.pt", buffer(2, 3, first=2 * i)) for i in range(2))
    folder, trained = bring(settings(tmp_path / "teachers"), digits, one), settings(tmp_path / "trained", epochs=3)
    teachers.train(replace(trained, teachers=replace(trained.teachers, count=1)), digits, CPU, progress=False)
    before = contents(folder)
    with pytest.raises(UserError, match=r"teacher-000.* holds another teacher than trajectory 0 of .*buffer_1\.pt"):
        bring(settings(folder, count=3), digits, two, one)
    with pytest.raises(UserError, match=r"another recipe: lr is 0\.02 there and 0\.1 here"):
        bring(settings(folder, lr=0.1), digits, one)
    with pytest.raises(UserError, match="holds another teacher than trajectory 0 of"):
        bring(trained, digits, one)
    with pytest.raises(UserError, match=r"teacher-000.* holds 3 epochs of another code's teacher, of 5 that are asked"):
        teachers.train(settings(folder, epochs=5), digits, CPU, progress=False)
    assert contents(folder) == before


def test_first_epochs_of_a_teacher_in_training_are_not_lost(tmp_path: Path, digits: Dataset) -> None:
    file, config = saved(tmp_path / "replay_buffer_0.pt", buffer()), settings(tmp_path / "teachers")
    with trajectories.begin(tmp_path / "teachers", 1, 3, store.describe(config, digits), 0) as begun:
        assert begun
        begun.add(torch.zeros(3), 10.0, {})
        begun.keep()
    with pytest.raises(UserError, match="holds the first epochs of a teacher in training"):
        bring(config, digits, file)
    with trajectories.begin(tmp_path / "teachers", 1, 3, store.describe(config, digits), 0) as begun:
        assert begun and begun.epochs == 0
