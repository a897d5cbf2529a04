"""STAGE 1: teachers that depend on seed and index alone, whatever happens on the way."""

import contextlib
import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpp import data, models, runs, seeds, store, teachers, training, trajectories
from ddpp.config import AugmentConfig, Config, DataConfig, ModelConfig, RunConfig, TeachersConfig
from ddpp.data import Dataset
from ddpp.errors import UserError
from ddpp.models import flat
from ddpp.training import Recipe
from ddpp.trajectories import Begun, Trajectory

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Bytes are the same for the same number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """A tenth of the digits."""
    whole = data.load(DataConfig())
    return replace(whole, train_images=data.Images(whole.train_images[::10]), train_labels=whole.train_labels[::10])


def settings(folder: Path, *, seed: int = 0, strategy: str = "auto", width: int = 4, **options: object) -> Config:
    return Config(
        model=ModelConfig(width=width),
        augment=AugmentConfig(strategy=strategy),
        teachers=replace(TeachersConfig(folder=str(folder), count=2, epochs=3, lr=0.1, batch=32), **options),
        run=RunConfig(seed=seed),
    )


def train(config: Config, dataset: Dataset) -> Path:
    return teachers.train(config, dataset, CPU, progress=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def open_all(folder: Path, config: Config, dataset: Dataset) -> list[Trajectory]:
    network = models.build(config.model, dataset.shape, len(dataset.classes), seed=0)
    return store.open_all(folder, config, dataset, network)


def test_snapshots_follow_the_training(tmp_path: Path, dataset: Dataset) -> None:
    """Row e is the network after e epochs, and no row aliases a later one."""
    config = settings(tmp_path, count=1, strategy="none")
    (found,) = open_all(train(config, dataset), config, dataset)
    model = models.build(config.model, dataset.shape, 10, seed=seeds.derive(0, "teacher", 0, "network"))
    rows = [flat.flatten(model)]
    training.fit(
        model,
        dataset.train_images,
        dataset.train_labels,
        Recipe(3, lr=0.1, batch=32),
        seed=seeds.derive(0, "teacher", 0, "training"),
        on_epoch=lambda _: rows.append(flat.flatten(model)),
    )
    for epoch, row in enumerate(rows):
        assert torch.equal(found.rows(epoch, 0)[0], row)
    last = training.accuracy(model, dataset.val_images, dataset.val_labels)
    assert found.accuracy()[-1] == pytest.approx(last)


def test_without_a_held_out_part_accuracy_is_of_the_training_part(tmp_path: Path, dataset: Dataset) -> None:
    without = replace(dataset, val_images=data.Images(dataset.val_images[:0]), val_labels=dataset.val_labels[:0])
    config = settings(tmp_path, count=1)
    (found,) = open_all(train(config, without), config, without)
    model = models.build(config.model, dataset.shape, 10, seed=0)
    flat.load_flat_(model, found.rows(0, 3)[1])
    expected = training.accuracy(model, dataset.train_images, dataset.train_labels)
    assert found.accuracy()[-1] == pytest.approx(expected)


def test_a_sample_tells_the_accuracy_of_many_training_images(
    tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = replace(dataset, val_images=data.Images(dataset.val_images[:0]), val_labels=dataset.val_labels[:0])
    found = []
    for name, sample in (("all", teachers._SAMPLE), ("sample", 16)):
        monkeypatch.setattr(teachers, "_SAMPLE", sample)
        config = settings(tmp_path / name, count=1)
        found += open_all(train(config, without), config, without)
    everything, sampled = found
    assert torch.equal(everything.rows(0, 3)[1], sampled.rows(0, 3)[1])
    assert everything.accuracy() != sampled.accuracy()
    assert all(16 * share / 100 == round(16 * share / 100) for share in sampled.accuracy())


def test_a_seed_gives_the_same_bytes(tmp_path: Path, dataset: Dataset) -> None:
    first, again, other = (
        contents(train(settings(tmp_path / name, seed=seed), dataset)) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert list(first) == ["teacher-000.safetensors", "teacher-001.safetensors"]
    assert first == again
    assert first != other
    assert first["teacher-000.safetensors"] != first["teacher-001.safetensors"]


def test_missing_teachers_are_added_and_finished_ones_kept(tmp_path: Path, dataset: Dataset) -> None:
    whole = contents(train(settings(tmp_path / "whole", count=3), dataset))
    folder = train(settings(tmp_path / "parts", count=1), dataset)
    before = (folder / "teacher-000.safetensors").stat().st_mtime_ns
    (folder / f"{runs.TEMPORARY}teacher-001-killed.safetensors").write_bytes(b"half")
    train(settings(folder, count=3), dataset)
    assert contents(folder) == whole
    assert (folder / "teacher-000.safetensors").stat().st_mtime_ns == before
    (folder / "teacher-001.safetensors").unlink()
    train(settings(folder, count=3, seed=9), dataset)
    assert contents(folder) == whole, "a folder keeps the seed that it was begun with"


def test_more_teachers_than_asked_for_are_left_aside(tmp_path: Path, dataset: Dataset) -> None:
    train(settings(tmp_path, count=2), dataset)
    config = settings(tmp_path, count=1)
    assert [t.meta["index"] for t in open_all(train(config, dataset), config, dataset)] == [0]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lr": 0.2}, r"another recipe: lr is 0\.1 there and 0\.2 here"),
        ({"width": 8}, "another model: width is 4 there and 8 here"),
        ({"strategy": "none"}, r"another augmentation: groups is \['crop', .*\] there and \[\] here"),
    ],
)
def test_a_folder_of_other_teachers_is_refused(
    tmp_path: Path, dataset: Dataset, changed: dict[str, object], message: str
) -> None:
    train(settings(tmp_path, count=1), dataset)
    with pytest.raises(UserError, match=message):
        train(settings(tmp_path, count=1, **changed), dataset)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"name": "cifar10", "fingerprint": "0"}, "another dataset: name is 'digits' there and 'cifar10' here"),
        ({"preprocessing": "zca"}, "another dataset: preprocessing is 'channel' there and 'zca' here"),
        ({"fingerprint": "0"}, "another dataset: fingerprint is"),
    ],
)
def test_teachers_of_other_data_are_refused(
    tmp_path: Path, dataset: Dataset, changed: dict[str, str], message: str
) -> None:
    config = settings(tmp_path, count=1)
    train(config, dataset)
    with pytest.raises(UserError, match=message):
        open_all(tmp_path, config, replace(dataset, **changed))


def test_teachers_of_earlier_versions_fit(tmp_path: Path, dataset: Dataset) -> None:
    """What they say of their training are these options, whatever a recipe has been given since."""
    config = settings(tmp_path, count=1)
    (found,) = open_all(train(config, dataset), config, dataset)
    recipe = {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "batch": 32, "decay": False}
    assert found.meta["recipe"] == recipe
    rows, accuracy, _ = found.whole()
    trajectories.write(found.path, rows, accuracy, {**found.meta, "recipe": {**recipe, "epochs": 3}})  # as once
    assert len(open_all(train(config, dataset), config, dataset)) == 1


def test_flat_teachers_are_not_taken_for_plain_ones(tmp_path: Path, dataset: Dataset) -> None:
    train(settings(tmp_path, count=1, sharpness_radius=0.01), dataset)
    with pytest.raises(UserError, match=r"another recipe: sharpness_radius is 0\.01 there and None here"):
        train(settings(tmp_path, count=1), dataset)


def test_teachers_of_another_network_are_refused(tmp_path: Path, dataset: Dataset) -> None:
    config = settings(tmp_path, count=1)
    train(config, dataset)
    network = models.build(ModelConfig(width=8), dataset.shape, 10, seed=0)
    with pytest.raises(UserError, match="holds other parameters than the network has"):
        store.open_all(tmp_path, config, dataset, network)


def test_missing_damaged_and_foreign_files(tmp_path: Path, dataset: Dataset) -> None:
    config = settings(tmp_path)
    with pytest.raises(UserError, match=r"holds 0 of 2 teachers of 3 epochs. Train them: python -m ddpp\.teachers"):
        open_all(tmp_path, config, dataset)
    train(config, dataset)
    last = tmp_path / trajectories.file_name(1)
    last.write_bytes(last.read_bytes()[:1000])
    for use in (lambda: open_all(tmp_path, config, dataset), lambda: train(config, dataset)):
        with pytest.raises(UserError, match=r"teacher-001\.safetensors is damaged"):
            use()
    last.unlink()
    (tmp_path / "replay_buffer_0.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"replay_buffer_0\.pt is no teacher's file"):
        train(config, dataset)


def test_a_teacher_that_diverges_is_not_kept(tmp_path: Path, dataset: Dataset) -> None:
    with pytest.raises(UserError, match=r"teacher 0 diverged.*Lower"):
        train(settings(tmp_path, lr=1e30), dataset)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_said_before_training(
    tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teachers, "_train_one", lambda *_: pytest.fail("a teacher was trained for nothing"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/teachers"):
        teachers.train(settings(tmp_path / "file" / "teachers"), dataset, CPU)


def test_the_folders_name_tells_data_set_and_architecture(dataset: Dataset) -> None:
    def name(**options: object) -> str:
        return str(store.folder_of(Config(model=ModelConfig(**options)), dataset))

    assert name() == "teachers/digits-convnet-d2-w128"
    assert name(width=32, depth=1, norm="batch", pooling="max") == "teachers/digits-convnet-d1-w32-batch-max"
    assert name(model="vgg11") == "teachers/digits-vgg11"
    whitened = replace(dataset, preprocessing="zca")
    assert str(store.folder_of(Config(), whitened)) == "teachers/digits-zca-convnet-d2-w128"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_and_started_again_ends_with_the_same_bytes(tmp_path: Path, number: signal.Signals) -> None:
    folder, whole = tmp_path / "stopped", data.load(DataConfig())
    options = ["--width", "4", "--count", "3", "--epochs", "5", "--lr", "0.1", "--batch", "32"]
    command = [sys.executable, "-m", "ddpp.teachers", "--folder", str(folder), *options, "--device", "cpu"]
    process = subprocess.Popen([*command, "--threads", "1"], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (folder / "teacher-000.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number
        assert re.search(r"stopped; teacher \d goes on after epoch \d when asked for again, and finished", errors)
    assert not (folder / "teacher-002.safetensors").exists()
    train(settings(folder, count=3, epochs=5), whole)
    uninterrupted = train(settings(tmp_path / "whole", count=3, epochs=5), whole)
    assert contents(folder) == contents(uninterrupted)


def test_a_lock_that_a_killed_process_left_goes_with_the_next(tmp_path: Path, dataset: Dataset) -> None:
    """Killed between a teacher's file and the end of its lock."""
    folder = train(settings(tmp_path / "killed", count=1), dataset)
    (folder / ".teacher-000.lock").touch()
    train(settings(folder, count=2), dataset)
    assert {path.name for path in folder.iterdir()} == {"teacher-000.safetensors", "teacher-001.safetensors"}


CUTS = {
    "momentum": {"momentum": 0.9},
    "sharpness": {"sharpness_radius": 0.05, "sharpness_weight": 0.5},
    "running statistics": {"norm": "batch"},
    "another network": {"model": "alexnet"},
}


def cut_settings(folder: Path, options: dict[str, object], **more: object) -> Config:
    named = {name: value for name, value in options.items() if name in ("norm", "model")}
    found = settings(folder, **more, **{name: value for name, value in options.items() if name not in named})
    return replace(found, model=replace(found.model, **named))


@pytest.mark.parametrize("options", CUTS.values(), ids=CUTS)
def test_finished_teachers_go_on_to_more_epochs(
    options: dict[str, object],
    tmp_path: Path,
    dataset: Dataset,
    bars: list[Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, config = (cut_settings(tmp_path / name, options, epochs=4) for name in ("whole", "parts"))
    train(whole, dataset)
    shorter = replace(config, teachers=replace(config.teachers, count=1, epochs=2))
    train(shorter, dataset)
    capsys.readouterr()
    teachers.train(config, dataset, CPU)
    folder = tmp_path / "parts"
    assert capsys.readouterr().out.splitlines() == [
        f"training 1 teachers for 4 epochs into {folder}, beside 1 that are there (seed 0)",
        f"1 teachers in {folder} go on to epoch 4",
    ]
    assert bars[-1].n == bars[-1].total == (2 + 4) * 130 and bars[-1].initial == 0
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    train(shorter, dataset)
    (found,) = open_all(tmp_path / "parts", shorter, dataset)
    assert found.epochs == 2, "what is beyond the epochs that were asked for says nothing"
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    longer = replace(config, teachers=replace(config.teachers, epochs=9))
    with pytest.raises(UserError, match="holds 0 of 2 teachers of 9 epochs"):
        open_all(tmp_path / "parts", longer, dataset)


def test_a_teacher_that_was_cut_while_it_went_on(
    tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file stays until there is a longer one, and it goes on from the rows that were kept."""
    whole, config = (settings(tmp_path / name, count=1, epochs=5, momentum=0.9) for name in ("whole", "cut"))
    train(whole, dataset)
    shorter = replace(config, teachers=replace(config.teachers, epochs=2))
    before = contents(train(shorter, dataset))
    assert [path.name for path in cut_after_training(config, dataset, monkeypatch)] == [
        f"rows-{first:06d}.safetensors" for first in (3, 4, 5)
    ]
    assert (tmp_path / "cut" / "teacher-000.safetensors").read_bytes() == before["teacher-000.safetensors"]
    train(shorter, dataset)
    fit, starts = training.fit, []
    monkeypatch.setattr(
        training, "fit", lambda *a, start, **k: starts.append(start.epochs) or fit(*a, start=start, **k)
    )
    train(config, dataset)
    assert starts == [5] and contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_teacher_of_an_earlier_version_goes_on_where_it_can(tmp_path: Path, dataset: Dataset) -> None:
    """Its file holds no state, and plain SGD has none."""
    for options in ({}, {"momentum": 0.9}):
        whole, config = (settings(tmp_path / f"{name}{options}", count=1, **options) for name in ("whole", "old"))
        train(whole, dataset)
        shorter = replace(config, teachers=replace(config.teachers, epochs=1))
        (found,) = open_all(train(shorter, dataset), shorter, dataset)
        rows, accuracy, _ = found.whole()
        trajectories.write(found.path, rows, accuracy, found.meta)
        if options:
            with pytest.raises(
                UserError, match=r"teacher-000.* cannot go on after epoch 1: an earlier version .*remove"
            ):
                train(config, dataset)
        else:
            assert contents(train(config, dataset)) == contents(Path(whole.teachers.folder))


@pytest.mark.parametrize("options", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("killed", [True, False])
def test_a_teacher_that_was_cut_goes_on_after_its_last_epoch(
    killed: bool,
    options: dict[str, object],
    tmp_path: Path,
    dataset: Dataset,
    monkeypatch: pytest.MonkeyPatch,
    bars: list[Any],
) -> None:
    whole, config = (cut_settings(tmp_path / name, options, count=1, epochs=4) for name in ("whole", "cut"))
    train(whole, dataset)
    monkeypatch.setattr(trajectories, "_KEPT_EVERY", 0 if killed else 1e9)
    advance, seen = teachers._advance, []

    def cut(bar: Any, interruption: runs.Interruption, begun: Begun, images: int) -> None:
        seen.append(images)
        if len(seen) == 11:  # the first step of the third of 5 an epoch
            if killed:
                raise RuntimeError("killed")
            interruption.signal = signal.SIGTERM
        advance(bar, interruption, begun, images)

    monkeypatch.setattr(teachers, "_advance", cut)
    with pytest.raises(RuntimeError if killed else runs.Stopped, match="killed" if killed else "goes on after epoch 2"):
        teachers.train(config, dataset, CPU)
    seen[:] = [-1] * 20
    teachers.train(config, dataset, CPU)
    assert seen[20:] == 2 * [32, 32, 32, 32, 2]
    assert bars[-1].n == bars[-1].total == 4 * 130 and bars[-1].initial == 2 * 130
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def cut_after_training(config: Config, dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The rows of a teacher that was killed before its file was written."""
    with monkeypatch.context() as patch:
        patch.setattr(trajectories, "_KEPT_EVERY", 0)
        patch.setattr(trajectories, "write", lambda *_: pytest.fail("cut"))
        with pytest.raises(pytest.fail.Exception, match="cut"):
            train(config, dataset)
    return sorted((Path(config.teachers.folder) / ".teacher-000").glob("rows-*"))


@pytest.mark.parametrize("file", [0, 1, 2])
@pytest.mark.parametrize("change", ["damaged", "lost"])
def test_rows_that_cannot_be_used_are_computed_again(
    change: str, file: int, tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, config = (settings(tmp_path / name, count=1) for name in ("whole", "cut"))
    train(whole, dataset)
    rows = cut_after_training(config, dataset, monkeypatch)
    assert len(rows) == 4
    if change == "damaged":
        rows[file].write_bytes(rows[file].read_bytes()[:500])
    else:
        rows[file].unlink()
    begun = Begun(tmp_path / "cut", 0, {**store.describe(config, dataset), "seed": 0, "index": 0})
    assert begun.epochs == file - 1
    assert contents(train(config, dataset)) == contents(tmp_path / "whole")


@pytest.mark.parametrize(("changed", "named"), [({"lr": 0.2}, "recipe"), ({"width": 8}, "model")])
def test_first_epochs_of_another_teacher_are_not_lost(
    changed: dict[str, object], named: str, tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = cut_after_training(settings(tmp_path, count=1), dataset, monkeypatch)
    with pytest.raises(UserError, match=f"holds the first epochs of a teacher of another {named}. Give the same"):
        train(settings(tmp_path, count=1, **changed), dataset)
    assert all(path.exists() for path in rows)


def test_a_folder_keeps_the_seed_of_a_teacher_that_was_begun(
    tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = contents(train(settings(tmp_path / "whole"), dataset))
    cut_after_training(settings(tmp_path / "cut"), dataset, monkeypatch)
    assert contents(train(settings(tmp_path / "cut", seed=1), dataset)) == whole


def test_rows_of_a_finished_teacher_do_not_stay(tmp_path: Path, dataset: Dataset) -> None:
    config = settings(tmp_path, count=1)
    before = contents(train(config, dataset))
    (tmp_path / ".teacher-000").mkdir()
    (tmp_path / ".teacher-000" / "rows-000000.safetensors").write_bytes(b"")
    assert contents(train(config, dataset)) == before


def test_processes_share_a_folder(tmp_path: Path) -> None:
    """Each trains what no other does, and all see the end."""
    folder, options = tmp_path / "shared", ["--width", "4", "--count", "4", "--epochs", "3", "--lr", "0.1"]
    command = [sys.executable, "-m", "ddpp.teachers", "--folder", str(folder), *options, "--batch", "32"]
    words = [*command, "--device", "cpu", "--threads", "1"]
    processes = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for process in processes:
        output, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        assert "4 teachers in" in output
    assert contents(folder) == contents(train(settings(tmp_path / "alone", count=4), data.load(DataConfig())))


class Elsewhere:
    """Another process that trains a teacher: it holds its lock, and finishes it or dies while this one waits."""

    def __init__(self, config: Config, dataset: Dataset, monkeypatch: pytest.MonkeyPatch, dies: bool = False) -> None:
        self.folder = Path(config.teachers.folder)
        self.result = train(replace(config, teachers=replace(config.teachers, folder=f"{self.folder}-whole")), dataset)
        self.dies, self.waited, self.held = dies, 0, contextlib.ExitStack()
        description = store.describe(config, dataset)
        self.begun = self.held.enter_context(trajectories.begin(self.folder, 1, 3, description, config.run.seed))
        monkeypatch.setattr(time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.waited += 1
        if self.waited == 3:
            if not self.dies:
                self.finish()
            self.held.close()

    def finish(self) -> None:
        """In the order in which a process does it; the claim is given back after that."""
        first = trajectories.file_name(0)
        (self.folder / first).write_bytes((self.result / first).read_bytes())
        assert self.begun
        self.begun.discard()


@pytest.mark.parametrize("dies", [False, True])
def test_a_teacher_of_another_process_is_waited_for(
    dies: bool, tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch, bars: list[Any]
) -> None:
    config = settings(tmp_path / "shared", seed=5)
    elsewhere = Elsewhere(config, dataset, monkeypatch, dies)
    own = replace(config, run=RunConfig(seed=0))  # the folder was begun with another
    teachers.train(own, dataset, CPU)
    assert elsewhere.waited == 3
    assert contents(elsewhere.folder) == contents(elsewhere.result)
    assert bars[-1].n == bars[-1].total == 2 * 3 * 130


def test_a_teacher_that_was_just_finished_is_not_trained_again(
    tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another process, after this one listed what is missing."""
    config = settings(tmp_path / "shared")
    elsewhere = Elsewhere(config, dataset, monkeypatch)
    listed = trajectories.missing

    def missing(folder: Path, count: int, epochs: int) -> dict[int, int]:
        found = listed(folder, count, epochs)
        if elsewhere.begun and 0 in found:
            first = trajectories.file_name(0)
            (folder / first).write_bytes((elsewhere.result / first).read_bytes())
            elsewhere.held.close()
        return found

    monkeypatch.setattr(trajectories, "missing", missing)
    with trajectories.begin(elsewhere.folder, 2, 3, store.describe(config, dataset), 0) as begun:
        assert begun and begun.meta["index"] == 1


def test_processes_that_start_after_a_crash_tidy_up_together(tmp_path: Path, dataset: Dataset) -> None:
    """Threads that each open a lock are to the system what processes are."""
    description = store.describe(settings(tmp_path), dataset)
    for _ in range(20):
        for index in range(4):
            (tmp_path / f".teacher-{index:03d}").mkdir()

        def start(_: int) -> int:
            trajectories.remove_leftovers(tmp_path)
            with trajectories.begin(tmp_path, 4, 3, description, 0) as begun:
                assert begun
                time.sleep(0.01)
                begun.discard()
                return int(begun.meta["index"])

        with ThreadPoolExecutor(4) as together:
            assert set(together.map(start, range(4))) <= {0, 1, 2, 3}
        assert list(tmp_path.iterdir()) == []


def test_teachers_that_are_there_may_be_read_where_nothing_can_be_written(
    tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While their owner trains another."""
    config = settings(tmp_path)
    train(config, dataset)
    (tmp_path / ".teacher-002").mkdir()

    def refuses(path: Path, wait: bool) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(runs, "_locked", refuses)
    assert train(config, dataset) == tmp_path


def test_who_waits_can_be_stopped(tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(tmp_path / "shared", count=1)
    elsewhere = Elsewhere(config, dataset, monkeypatch)
    monkeypatch.setattr(time, "sleep", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(runs.Stopped, match="other processes go on"):
        train(config, dataset)
    elsewhere.held.close()


def test_a_process_with_other_options_is_refused(
    tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = Elsewhere(settings(tmp_path / "shared"), dataset, monkeypatch)
    with pytest.raises(UserError, match=r"\.teacher-000 holds the first epochs of a teacher of another recipe"):
        train(settings(tmp_path / "shared", lr=0.2), dataset)
    elsewhere.held.close()
    train(settings(tmp_path / "shared", lr=0.2), dataset)  # no epoch was lost by it


def test_the_command_trains_and_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--folder",
        str(tmp_path),
        "--width",
        "4",
        "--count",
        "2",
        "--epochs",
        "1",
        "--device",
        "cpu",
    ]
    assert teachers.main(arguments) == 0
    first = capsys.readouterr()
    assert f"training 2 teachers for 1 epochs into {tmp_path}" in first.out
    assert re.search(r"2 teachers in .*, right on \d+\.\d % of the held-out images", first.out)
    assert "teacher-001" in first.err and "100%" in first.err
    assert teachers.main(arguments) == 0
    assert "training" not in capsys.readouterr().out


def test_wrong_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("")
    assert teachers.main(["--folder", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ddpp.teachers: error: ")
    assert "notes.txt is no teacher's file" in line
