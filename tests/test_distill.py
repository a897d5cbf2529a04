"""The whole job at toy size: reproducible, resumable, safe against divergence, and clear about wrong input."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch

from ddpp import distill, evaluate, report, runs, synthetic
from ddpp.config import Config, DistillConfig, ModelConfig
from ddpp.data import pictures
from ddpp.errors import UserError
from ddpp.methods import METHODS, Memory, Problem, Update
from ddpp.methods import ddpp as ddpp_method
from ddpp.synthetic import Synthetic
from ddpp.teachers import main as train_teachers
from ddpp.trajectories import Trajectory

TOY = [
    *("--width", "8", "--threads", "1"),
    *("--teachers-count", "2", "--teachers-epochs", "3", "--max-start-epoch", "2", "--teacher-span", "1"),
    *("--steps", "6", "--inner-steps", "3", "--snapshot-every", "2", "--checkpoint-every", "2"),
    *("--evaluate-networks", "2", "--evaluate-epochs", "3", "--evaluate-full-epochs", "1"),
]
FILES = ["config.toml", "synthetic.safetensors", "images.png", "curves.png", "results.json", "report.md", "log.jsonl"]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("teachers") / "digits"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, teachers: Path) -> Path:
    """A run that was never interrupted."""
    out = tmp_path_factory.mktemp("run") / "whole"
    assert distill.main([*TOY, "--teachers-folder", str(teachers), "--out", str(out)]) == 0
    return out


def test_a_run_leaves_everything(finished: Path) -> None:
    assert {name for name in FILES if (finished / name).stat().st_size > 0} == set(FILES)
    results = json.loads((finished / "results.json").read_text())
    assert set(results["accuracy"]) == {"random", "ddpp", "full"}
    for figures in results["accuracy"].values():
        assert len(figures["networks"]) == 2 and all(0 <= a <= 100 for a in figures["networks"])
        assert figures["mean"] == pytest.approx(sum(figures["networks"]) / 2) and figures["std"] >= 0
    assert results["config"]["distill"]["steps"] == 6
    assert results["seconds"]["distill"] > 0 and results["peak_memory_mb"] > 0
    rows = runs.read_log(finished / "log.jsonl")
    assert [row["step"] for row in rows] == list(range(6))
    assert all(0 < row["kept"] <= 1 and row["loss"] > 0 and row["outcome"] == "taken" for row in rows)


@pytest.mark.parametrize(
    ("options", "trained"),
    [([], 2), (["--labels", "soft"], 9), (["--init", "correct"], 9)],
    ids=["own", "soft", "correct"],
)
def test_teachers_are_trained_as_far_as_a_run_reads_them(
    options: list[str], trained: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ends with the bytes of a run on whole teachers."""
    longer = [*TOY, *options, "--teachers-epochs", "9", "--evaluate-networks", "1", "--evaluate-full-epochs", "0"]
    whole = ["--width", "8", "--threads", "1", "--count", "2", "--epochs", "9", "--folder", str(tmp_path / "whole")]
    assert train_teachers(whole) == 0
    results = []
    for name in ("whole", "read"):
        capsys.readouterr()
        out = tmp_path / f"run-{name}"
        assert distill.main([*longer, "--teachers-folder", str(tmp_path / name), "--out", str(out)]) == 0
        assert ("reads the first 2 of its teachers' 9 epochs" in capsys.readouterr().out) == (trained == 2)
        results.append((out / "synthetic.safetensors").read_bytes() + (out / "log.jsonl").read_bytes())
    assert results[0] == results[1]
    for path in (tmp_path / "read").iterdir():
        assert Trajectory.open(path).epochs == trained


def test_a_start_that_teachers_cannot_give_leaves_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*TOY, "--teachers-folder", str(tmp_path / "teachers"), "--init", "correct", "--ipc", "120"]
    assert distill.main([*argv, "--out", str(tmp_path / "run")]) == 2
    assert "--init correct finds" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_result_can_be_used_without_the_run(finished: Path) -> None:
    found, meta = synthetic.load(finished / "synthetic.safetensors")
    assert found.images.shape == (10, 1, 8, 8) and found.labels.tolist() == list(range(10))
    assert float(found.step_size) > 0
    assert meta["classes"] == [str(n) for n in range(10)] and meta["method"] == "ddpp" and meta["steps"] == 6
    first, _ = synthetic.load(finished / "snapshots" / "step-000000.safetensors")
    assert not torch.equal(first.images, found.images)


def test_the_same_seed_gives_the_same_bytes(finished: Path, teachers: Path, tmp_path: Path) -> None:
    distill.main([*TOY, "--teachers-folder", str(teachers), "--out", str(tmp_path / "again")])
    for name in ("synthetic.safetensors", "log.jsonl", "images.png", "curves.png", "config.toml"):
        assert (tmp_path / "again" / name).read_bytes() == (finished / name).read_bytes(), name
    one, other = (json.loads((f / "results.json").read_text())["models"] for f in (finished, tmp_path / "again"))
    assert one == other


def test_another_seed_gives_another_result(finished: Path, teachers: Path, tmp_path: Path) -> None:
    out = tmp_path / "other"
    assert distill.main([*TOY, "--teachers-folder", str(teachers), "--out", str(out), "--seed", "1"]) == 0
    one, other = (synthetic.load(f / "synthetic.safetensors")[0] for f in (finished, out))
    assert not torch.equal(one.images, other.images)


LONG = [*TOY, "--steps", "300", "--snapshot-every", "100"]


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory, teachers: Path) -> Path:
    """A run long enough to be cut, but not cut."""
    out = tmp_path_factory.mktemp("long") / "whole"
    assert distill.main([*LONG, "--teachers-folder", str(teachers), "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_killed_run_continues_to_the_same_bytes(
    number: signal.Signals, long: Path, teachers: Path, tmp_path: Path
) -> None:
    out = tmp_path / "cut"
    argv = [*LONG, "--teachers-folder", str(teachers), "--out", str(out)]
    process = subprocess.Popen([sys.executable, "-m", "ddpp.distill", *argv], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (out / "checkpoint.safetensors").is_file() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, error = process.communicate(timeout=120)
    assert not (out / "synthetic.safetensors").exists()
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number and b"continue with --out" in error, error.decode()
    assert distill.main(argv) == 2  # not without --resume
    assert distill.main(["--out", str(out), "--resume"]) == 0
    for name in ("synthetic.safetensors", "log.jsonl"):
        assert (out / name).read_bytes() == (long / name).read_bytes(), name


def test_a_run_goes_on_from_another_folder_with_its_own_teachers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which have another seed than those that it would train."""
    monkeypatch.chdir(tmp_path)
    same = ["--width", "8", "--threads", "1", "--epochs", "3", "--count", "2"]
    assert train_teachers([*same, "--seed", "5"]) == 0
    assert distill.main([*TOY, "--steps", "4", "--out", "whole"]) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    assert distill.main(["--out", "whole", "--resume", "--steps", "6"]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    capsys.readouterr()
    assert distill.main(["--out", "../cut", "--resume", "--steps", "6"]) == 0
    assert "training" not in capsys.readouterr().out
    one, other = (tmp_path / name / "synthetic.safetensors" for name in ("whole", "cut"))
    assert one.read_bytes() == other.read_bytes()
    assert train_teachers([*same, "--seed", "6"]) == 0
    (folder,) = (tmp_path / "elsewhere" / "teachers").iterdir()
    others = ["--teachers-folder", str(folder)]
    assert distill.main(["--out", "../cut", "--resume", "--steps", "7", *others]) == 2
    assert f"cut was begun with other teachers than {folder} holds now" in capsys.readouterr().err
    moved = tmp_path / "moved"
    (tmp_path / "teachers").rename(moved)
    (folder,) = moved.iterdir()
    assert distill.main(["--out", "../cut", "--resume", "--steps", "7", "--teachers-folder", str(folder)]) == 0


def test_a_run_goes_on_where_its_folder_of_images_has_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And so have the teachers that were begun for it, in the folder that is named after it."""
    monkeypatch.chdir(tmp_path)
    draw = torch.Generator().manual_seed(0)
    for part in ("train", "test"):
        pictures.write(tmp_path / "birds" / part, torch.rand(40, 3, 8, 8, generator=draw), ["crow", "wren"])
    argv = [*TOY, "--dataset", "folder", "--teachers-batch", "4", "--out", "run"]
    assert distill.main([*argv, "--data-root", "birds"]) == 0
    whole = (tmp_path / "run" / "synthetic.safetensors").read_bytes()
    for name in ("results.json", "synthetic.safetensors"):
        (tmp_path / "run" / name).unlink()
    (tmp_path / "birds").rename("crows")
    capsys.readouterr()
    assert distill.main(["--out", "run", "--resume", "--data-root", "crows"]) == 0
    assert "training" not in capsys.readouterr().out
    assert (tmp_path / "run" / "synthetic.safetensors").read_bytes() == whole
    (folder,) = (tmp_path / "teachers").iterdir()
    other = ["--data-root", "crows", "--teachers-folder", str(folder), "--out", "other"]
    assert distill.main([*argv, *other]) == 0
    assert "training" not in capsys.readouterr().out


class _Scripted:
    """A method whose losses are given; used to see what the loop does with them."""

    needs_teachers = False
    learns_labels = False

    @staticmethod
    def check(config: Config) -> None: ...

    def __init__(self, losses: list[float], kept: float = 1.0, first_is_nan: bool = False) -> None:
        self.losses, self.kept = losses[1:] if first_is_nan else losses, kept

    def update(self, held: Synthetic, step: int, memory: Memory) -> Update:
        loss = torch.tensor(self.losses[step % len(self.losses)])
        images = torch.full_like(held.images, float(loss))
        return Update(loss, images, torch.zeros(()), torch.tensor(self.kept), {})


def scripted(losses: list[float], steps: int, tmp_path: Path, **more: Any) -> distill.State:
    settings = DistillConfig(steps=steps, lr_pixels=1.0, momentum=0.0)
    first = Synthetic(torch.zeros(2, 1, 4, 4), torch.arange(2), torch.tensor(0.02))
    return distill.distill(settings, first, _Scripted(losses, **more), tmp_path)


def test_a_step_that_is_not_finite_is_undone(tmp_path: Path) -> None:
    state = scripted([1.0, float("nan"), 2.0, float("inf")], 4, tmp_path)
    first, _ = synthetic.load(tmp_path / "snapshots" / "step-000000.safetensors")
    assert (state.undone, state.skipped) == (2, 0)
    assert torch.allclose(state.synthetic.images, first.images - 3)
    assert [row["outcome"] for row in runs.read_log(tmp_path / "log.jsonl")] == ["taken", "undone", "taken", "undone"]


def test_snapshots_of_other_names_are_let_be(tmp_path: Path) -> None:
    scripted([1.0], 2, tmp_path)
    foreign = tmp_path / "snapshots" / "step-best.safetensors"
    foreign.touch()
    assert scripted([1.0], 3, tmp_path).step == 3 and foreign.is_file()
    assert list(synthetic.snapshots(tmp_path)) == [0, 3]


def test_ten_undone_in_a_row_end_with_the_last_good_result(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"10 steps in a row .* Lower --lr-pixels"):
        scripted([1.0] + [float("nan")] * 10, 50, tmp_path)
    state = distill.State.load(tmp_path / "checkpoint.safetensors", torch.device("cpu"))
    assert state.step == 11 and bool(torch.isfinite(state.synthetic.images).all())
    assert len(runs.read_log(tmp_path / "log.jsonl")) == 11
    with pytest.raises(UserError, match="steps in a row"):  # continued unchanged, it ends again instead of going on
        scripted([1.0] + [float("nan")] * 10, 50, tmp_path, first_is_nan=True)


def test_a_run_that_diverged_leaves_a_set_that_can_be_used(
    teachers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    argv = ["--teachers-folder", str(teachers), "--step-size", "1e30", "--steps", "50", "--out", str(out)]
    assert distill.main([*TOY, *argv]) == 2
    assert f"the result before them is in {out}/synthetic.safetensors. Lower --lr-pixels" in capsys.readouterr().err
    held, meta = synthetic.load(out / "synthetic.safetensors")
    assert meta["undone"] == 10 and bool(torch.isfinite(held.images).all())


def test_steps_that_were_not_taken_are_told(teachers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--teachers-folder", str(teachers), "--max-loss", "1e-6", "--out", str(tmp_path / "run")]
    assert distill.main([*TOY, *argv]) == 0
    steps = json.loads((tmp_path / "run" / "results.json").read_text())["steps"]
    assert steps["taken"] == 0 and steps["skipped"] > 0
    assert f"0 outer steps taken, {steps['skipped']} skipped because" in capsys.readouterr().out


def test_a_degenerate_step_is_skipped_and_counted(tmp_path: Path) -> None:
    state = scripted([1.0], 3, tmp_path, kept=0.0)
    first, _ = synthetic.load(tmp_path / "snapshots" / "step-000000.safetensors")
    assert state.skipped == 3 and torch.equal(state.synthetic.images, first.images)


def test_the_step_size_stays_positive() -> None:
    held = Synthetic(torch.zeros(1, 1, 2, 2), torch.zeros(1, dtype=torch.int64), torch.tensor(0.02))
    update = Update(torch.ones(()), torch.zeros(1, 1, 2, 2), torch.tensor(1e9), torch.ones(()), {})
    moved = distill.State.begin(held).moved(update, DistillConfig(step_size=0.02))
    assert float(moved.synthetic.step_size) == pytest.approx(2e-5) and float(moved.step_size_velocity) == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--ipc", "1000"], "--ipc 1000 is more than the"),
        (["--max-start-epoch", "9"], "needs teachers of 9 epochs, got --teachers-epochs 3."),
        (["--epsilon", "0"], "--epsilon must be above 0, got 0; to prune nothing, give --prune none or --method mtt"),
        (["--method", "dpp"], "unknown method 'dpp'; did you mean 'ddpp'?"),
        (["--model", "convent"], "unknown model 'convent'; did you mean 'convnet'?"),
        (["--dataset", "digit"], "'digit'; did you mean 'digits'?"),
        (["--strategy", "colour_crop"], "did you mean 'color'?"),
        (["--evaluate-models", "alexnt"], "unknown model 'alexnt'; did you mean 'alexnet'?"),
        (["--evaluate-select", "val", "--validation", "0"], "--select val needs a held-out part"),
        (["--norm", "batch", "--bf16"], "--bf16 is there for a ConvNet with instance normalisation"),
        (["--method", "dm", "--norm", "batch"], "--norm batch takes away what tells classes apart"),
        (["--method", "cafe", "--norm", "batch"], "--method cafe passes each class through the network by itself"),
        (["--device", "cuda:99"], "CUDA devices. Use --device cpu"),
        (["--device", "meta"], "--device must be auto, cpu, cuda or cuda:N, got 'meta'"),
        (["--device", "warp"], "--device must be auto, cpu, cuda or cuda:N, got 'warp'"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_lost(
    argv: list[str], message: str, teachers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: Path
) -> None:
    folder = [] if "--model" in argv or "--validation" in argv else ["--teachers-folder", str(teachers)]
    code = distill.main([*TOY, *folder, "--out", str(tmp_path / "run"), *argv])
    assert code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_an_output_folder_with_another_run_is_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "results.json").read_bytes()
    assert distill.main([*TOY, "--out", str(finished), "--ipc", "2"]) == 2
    assert "was made with other options" in capsys.readouterr().err
    assert (finished / "results.json").read_bytes() == before


def test_batches_pass_through_the_set_again_and_again(
    teachers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each image once in a pass, the batch that is not full first, as in the published code."""
    seen, wanted = [], ddpp_method.matching_gradients

    def recorded(*args: Any, **options: Any) -> Any:
        seen.append([batch.tolist() for batch in args[6]])
        return wanted(*args, **options)

    monkeypatch.setattr(ddpp_method, "matching_gradients", recorded)
    folder = ["--teachers-folder", str(teachers), "--out", str(tmp_path / "run")]
    assert distill.main([*TOY, *folder, "--steps", "2", "--inner-steps", "5", "--ipc", "2", "--batch", "8"]) == 0
    for batches in seen:
        assert [len(batch) for batch in batches] == [4, 8, 8, 4, 8]
        assert sorted(image for batch in batches[:3] for image in batch) == list(range(20))
        assert not set(batches[3]) & set(batches[4])
    assert seen[0] != seen[1]


def test_methods_differ_by_the_mask_alone(finished: Path, teachers: Path, tmp_path: Path) -> None:
    out = tmp_path / "mtt"
    distill.main([*TOY, "--teachers-folder", str(teachers), "--out", str(out), "--method", "mtt"])
    mtt, ddpp = (runs.read_log(f / "log.jsonl") for f in (out, finished))
    assert all(row["kept"] == 1 for row in mtt) and all(row["kept"] < 1 for row in ddpp)
    assert [(r["teacher"], r["start"]) for r in mtt] == [(r["teacher"], r["start"]) for r in ddpp]
    assert set(METHODS.names()) >= {"ddpp", "mtt"} and Problem.__doc__


def test_pure_pytorch_gives_the_same_result_to_rounding(finished: Path, teachers: Path, tmp_path: Path) -> None:
    out = tmp_path / "pure"
    distill.main([*TOY, "--no-use-fused-kernels", "--teachers-folder", str(tmp_path / "t"), "--out", str(out)])
    fused, pure = (synthetic.load(f / "synthetic.safetensors")[0] for f in (finished, out))
    assert torch.allclose(fused.images, pure.images, atol=1e-2)
    assert float(pure.step_size) == pytest.approx(float(fused.step_size), rel=1e-3)


def test_the_last_snapshot_of_a_million_steps_is_last(tmp_path: Path) -> None:
    names = [f"step-{step:06d}.safetensors" for step in (0, 999_000, 1_000_000)]
    (tmp_path / "snapshots").mkdir()
    for name in names:
        (tmp_path / "snapshots" / name).touch()
    (tmp_path / "snapshots" / "step-best.safetensors").touch()  # foreign
    assert [path.name for path in evaluate._candidates(tmp_path, "all")] == names


@pytest.mark.parametrize("select", ["final", "val", "test"])
def test_evaluate_says_what_it_selected(select: str, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [str(finished), "--models", "convnet", "alexnet", "--networks", "1", "--epochs", "1", "--full-epochs", "0"]
    assert evaluate.main([*argv, "--select", select]) == 0
    results = json.loads((finished / "evaluation.json").read_text())
    assert results["protocol"]["select"] == select and set(results["models"]) == {"convnet", "alexnet"}
    assert results["models"]["alexnet"]["full"] is None
    step = results["models"]["convnet"]["ddpp"]["step"]
    assert step == 6 if select == "final" else step in (0, 2, 4, 6)
    text = {"final": "last outer step", "val": "held-out", "test": "too high"}[select]
    assert text in capsys.readouterr().out


@pytest.mark.usefixtures("two_threads")
def test_networks_side_by_side_are_those_one_after_the_other(finished: Path) -> None:
    argv = [str(finished), "--models", "convnet", "alexnet", "--networks", "3", "--epochs", "4", "--full-epochs", "1"]
    argv += ["--augmentations", "randaugment"]  # draws from the global generator
    found = []
    for threads in ("1", "2"):
        assert evaluate.main([*argv, "--threads", threads]) == 0
        assert torch.get_num_threads() == int(threads)
        found.append(json.loads((finished / "evaluation.json").read_text())["models"])
    assert found[0] == found[1]


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("threads", ["1", "2"])
def test_the_bar_of_an_evaluation_reaches_its_end(threads: str, finished: Path, bars: list[Any]) -> None:
    argv = [str(finished), "--networks", "2", "--epochs", "2", "--full-epochs", "1", "--threads", threads]
    several = ["--models", "convnet", "alexnet", "--select", "all", "--augmentations", "none", "dsa"]
    for more in ([], ["--search-lr"], several):
        assert evaluate.main([*argv, *more]) == 0
    assert [bar.n for bar in bars] == [bar.total for bar in bars]
    assert bars[0].total == 2 * (2 * 2 * 10 + 1295)  # networks; distilled and random images, and all


def test_architectures_may_have_options_of_their_own(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Over those of the run."""
    build, built = evaluate.models.build, set()

    def noted(config: ModelConfig, *rest: Any, **seed: int) -> Any:
        built.add(config)
        return build(config, *rest, **seed)

    monkeypatch.setattr(evaluate.models, "build", noted)
    names = ["convnet", "convnet:16", "convnet-kip:norm=batch,pooling=max", "convnet:4,depth=1,activation=sigmoid"]
    argv = ["--networks", "1", "--epochs", "1", "--full-epochs", "0", "--models", *names]
    assert evaluate.main([str(finished), *argv]) == 0
    run = ModelConfig(width=8)
    assert built == {
        run,
        replace(run, width=16),
        replace(run, model="convnet-kip", norm="batch", pooling="max"),
        replace(run, width=4, depth=1, activation="sigmoid"),
    }
    assert list(json.loads((finished / "evaluation.json").read_text())["models"]) == names
    assert f"| trained on | {' | '.join(names)} |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vgg11:64", "vgg11 reads no options; convnet and convnet-kip do, as in convnet:norm=batch,width=256"),
        ("convnt:64", "unknown model 'convnt'; did you mean 'convnet'?"),
        ("convnet:nrom=batch", "as in convnet:norm=batch,width=256: unknown option 'nrom'; did you mean 'norm'?"),
        ("convnet:norm=bacth", "batch, none, got 'bacth'; did you mean 'batch'?"),
        ("convnet:width=wide", "as in convnet:norm=batch,width=256: model.width must be of type int, got 'wide'"),
        ("convnet:0", "model.width must be at least 1, got 0"),
        ("convnet:wide", "unknown option 'wide'; did you mean 'width'? Known: width, depth, norm, activation, pooling"),
        ("convnet:model=vgg11", "unknown option 'model'"),
        ("convnet:", "unknown option ''"),
        ("convnet:64,width=32", "width is given twice, name it once"),
        ("convnet:depth=9", "depth 9 pools images of 8 pixels below one pixel"),
    ],
)
def test_wrong_options_of_architectures_are_named(
    name: str, message: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main([str(finished), "--models", "convnet", name]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ddpp.evaluate: error: --models {name}: ") and message in line


def test_protocols_stand_side_by_side(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [str(finished), "--networks", "2", "--epochs", "2", "--full-epochs", "0", "--select", "all", "--search-lr"]
    assert evaluate.main(argv) == 0
    results = json.loads((finished / "evaluation.json").read_text())
    table = results["accuracy"]
    rows = {"random", "ddpp", "ddpp/val", "ddpp/test", "random/searched", "ddpp/searched", "full"}
    assert set(table) == rows and table["ddpp"]["step"] == 6
    assert table["ddpp/test"]["mean"] >= max(table["ddpp"]["mean"], table["ddpp/val"]["mean"])
    assert table["ddpp/searched"]["lr"] in evaluate.RATES and results["protocol"]["searched_on"] == "held-out"
    shown = capsys.readouterr().out
    assert "ddpp (searched rate)" in shown and "ddpp (best on test, as papers do: too high)" in shown


def test_networks_that_diverged_are_counted(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [str(finished), "--networks", "2", "--epochs", "4", "--full-epochs", "0", "--lr", "1e30"]
    assert evaluate.main(argv) == 0
    table = json.loads((finished / "evaluation.json").read_text())["accuracy"]
    assert table["ddpp"]["diverged"] == table["random"]["diverged"] == 2
    assert "(2 diverged)" in capsys.readouterr().out


def test_a_searched_rate_is_one_at_which_no_network_diverges(
    finished: Path, monkeypatch: pytest.MonkeyPatch, bars: list[Any]
) -> None:
    argv = [str(finished), "--networks", "2", "--epochs", "2", "--full-epochs", "0", "--search-lr", "--threads", "1"]

    def searched() -> tuple[dict[str, Any], dict[str, Any]]:
        assert evaluate.main(argv) == 0
        table = json.loads((finished / "evaluation.json").read_text())["accuracy"]
        return table["ddpp/searched"], table["random/searched"]

    first, _ = searched()
    fit, calls = evaluate.training.fit, []

    def diverging(network: Any, images: Any, labels: Any, recipe: Any, *backend: Any, **options: Any) -> bool:
        """At the best rate the network of the search does well and one of those after it does not."""
        calls.append(recipe.lr)
        stayed = fit(network, images, labels, recipe, *backend, **options)
        return stayed and not (recipe.lr == first["lr"] and len(calls) > 10)

    monkeypatch.setattr(evaluate.training, "fit", diverging)
    distilled, random = searched()
    assert distilled["lr"] != first["lr"] and "diverged" not in distilled and "diverged" not in random
    monkeypatch.setattr(evaluate.training, "fit", lambda *args, **options: fit(*args, **options) and False)
    distilled, random = searched()
    assert distilled["diverged"] == random["diverged"] == 2
    assert [bar.n for bar in bars] == [bar.total for bar in bars]


def test_augmentations_stand_side_by_side(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [str(finished), "--networks", "2", "--epochs", "2", "--full-epochs", "0", "--augmentations"]
    grid = ["none", "dsa", "autoaugment", "randaugment", "imagenet"]
    assert evaluate.main([*argv, *grid]) == 0
    results = json.loads((finished / "evaluation.json").read_text())
    table, found = results["accuracy"], results["robustness"]["convnet"]
    means = [table[f"ddpp/{name}"]["mean"] for name in grid]
    assert table["ddpp/dsa"]["networks"] == table["ddpp"]["networks"]  # what digits are trained with anyway
    assert found["best"]["ddpp"] == max(means) and found["average"]["ddpp"] == pytest.approx(sum(means) / 5)
    assert set(found["ars"]) == set(grid[1:]) and all(0 < score < 1 for score in found["ars"].values())
    assert "| ddpp (AutoAugment) |" in capsys.readouterr().out
    assert evaluate.main([*argv, "randomaugment"]) == 2
    assert "unknown augmentation 'randomaugment'; did you mean 'randaugment'?" in capsys.readouterr().err


def test_accuracy_over_the_outer_steps(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    argv = [
        str(run),
        "--models",
        "convnet",
        "mlp",
        "--networks",
        "2",
        "--epochs",
        "2",
        "--full-epochs",
        "0",
        "--select",
    ]
    assert evaluate.main([*argv, "all"]) == 0
    found = json.loads((run / "evaluation.json").read_text())
    assert list(found["snapshots"]) == ["convnet", "mlp"]
    for model, reached in found["snapshots"].items():
        table = found["models"][model]
        assert [point["step"] for point in reached] == [0, 2, 4, 6]
        assert reached[-1]["networks"] == table["ddpp"]["networks"] and reached[-1]["std"] == table["ddpp"]["std"]
        assert max(point["mean"] for point in reached) == table["ddpp/test"]["mean"]
        assert max(reached, key=lambda point: point["val"])["step"] == table["ddpp/val"]["step"]
    assert report.main([str(run)]) == 0
    assert (run / "evaluation.png").stat().st_size > 1000 and "(evaluation.png)" in (run / "report.md").read_text()
    assert evaluate.main([*argv, "final"]) == 0
    assert "snapshots" not in json.loads((run / "evaluation.json").read_text())
    assert report.main([str(run)]) == 0
    assert not (run / "evaluation.png").exists() and "(evaluation.png)" not in (run / "report.md").read_text()


def test_a_run_that_selects_shows_its_accuracy_over_the_outer_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, argv = tmp_path / "run", [*TOY, "--evaluate-select", "test", "--validation", "0"]
    assert distill.main([*argv, "--method", "dm", "--real-batch", "16", "--out", str(run)]) == 0
    (reached,) = json.loads((run / "results.json").read_text())["snapshots"].values()
    assert [point["step"] for point in reached] == [0, 2, 4, 6] and not any("val" in point for point in reached)
    drawn = (run / "accuracy.png").read_bytes()
    (run / "accuracy.png").unlink()
    assert report.main([str(run)]) == 0
    assert f"{run}/report.md, images.png, curves.png, accuracy.png" in capsys.readouterr().out
    assert (run / "accuracy.png").read_bytes() == drawn and "(accuracy.png)" in (run / "report.md").read_text()


def test_what_needs_no_outer_step_has_no_accuracy_over_them(tmp_path: Path) -> None:
    argv = [*TOY, "--evaluate-select", "all", "--method", "random", "--out", str(tmp_path)]
    assert distill.main(argv) == 0
    assert "snapshots" not in json.loads((tmp_path / "results.json").read_text())
    assert not (tmp_path / "accuracy.png").exists()


def test_the_picture_of_accuracy_over_the_outer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line with error bars for each architecture, and a dashed one of its colour for random real images."""
    drawn: list[Any] = []
    monkeypatch.setattr(runs, "write_figure", lambda path, figure: drawn.append(figure))
    points = [{"step": 0, "mean": 20.0, "std": 1.0}, {"step": 50, "mean": 40.0, "std": 2.0}]
    models = {"convnet": 25.0, "convnet:64": 30.0}
    results = {
        "snapshots": dict.fromkeys(models, points),
        "models": {name: {"random": {"mean": mean}} for name, mean in models.items()},
    }
    report._draw_accuracy(results, Path("accuracy.png"))
    (axis,) = drawn[0].axes
    bars, dashed = (
        axis.containers,
        [line for line in axis.lines if line.get_linestyle() == "--" and len(line.get_xdata())],
    )
    assert [bar.get_label() for bar in bars] == list(models)
    assert [line.get_ydata()[0] for line in dashed] == list(models.values())
    assert [line.get_color() for line in dashed] == [bar.lines[0].get_color() for bar in bars]
    for bar in bars:
        assert bar.lines[0].get_xydata().tolist() == [[0, 20], [50, 40]]
        (whiskers,) = bar.lines[2]
        assert [segment[:, 1].tolist() for segment in whiskers.get_segments()] == [[19, 21], [38, 42]]


def test_report_is_made_from_files_alone(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "images.png").read_bytes()
    (finished / "images.png").unlink()
    assert report.main([str(finished)]) == 0
    assert (finished / "images.png").read_bytes() == before
    assert report.main([str(finished / "snapshots")]) == 2
    assert "not finished" in capsys.readouterr().err


def test_a_report_leaves_out_lines_that_are_no_steps(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    with open(tmp_path / "run" / "log.jsonl", "a") as file:
        file.write('{"a": 1}\n')
    assert report.main([str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "curves.png").read_bytes() == (finished / "curves.png").read_bytes()


def test_a_report_needs_no_snapshots_and_no_log(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "snapshots")
    (tmp_path / "run" / "log.jsonl").unlink()
    assert report.main([str(tmp_path / "run")]) == 0
    there, here = (plt.imread(folder / "images.png") for folder in (finished, tmp_path / "run"))
    assert here.shape[1] == there.shape[1] and here.shape[0] < there.shape[0]  # the result alone


def test_an_evaluation_that_was_cut_goes_on(finished: Path, monkeypatch: pytest.MonkeyPatch, bars: list[Any]) -> None:
    """Networks that are done are not trained again, and the figures are those of an evaluation that was not cut."""
    argv = [str(finished), "--models", "convnet", "alexnet", "--networks", "2", "--epochs", "2", "--full-epochs", "1"]
    argv += ["--augmentations", "none", "dsa", "--threads", "1"]
    train, trained = evaluate.Evaluation.network, 0

    def evaluated(most: int, *more: str) -> bool:
        """Whether it ended, and not at the network after ``most``."""
        nonlocal trained
        trained = 0

        def counted(self: evaluate.Evaluation, *job: Any) -> evaluate.Scores:
            nonlocal trained
            if trained == most:
                raise KeyboardInterrupt
            trained += 1
            return train(self, *job)

        monkeypatch.setattr(evaluate.Evaluation, "network", counted)
        return evaluate.main([*argv, *more]) == 0

    def figures() -> Any:
        return json.loads((finished / "evaluation.json").read_text())["models"]

    assert evaluated(most=10_000)
    whole, needed = figures(), trained
    assert not evaluated(most=9) and (finished / "evaluated.jsonl").exists()
    assert evaluated(10_000, "--data-root", "elsewhere") and trained == needed - 9 and bars[-1].n == bars[-1].total
    assert figures() == whole and not (finished / "evaluated.jsonl").exists()

    # Asked for otherwise, it keeps networks that are of both: here all but AlexNet's, on distilled and random images
    # with DSA, as the plain ones are, and without.
    assert not evaluated(most=9)
    assert evaluated(10_000, "--models", "alexnet", "convnet", "--networks", "1", "--full-epochs", "0") and trained == 4


def test_a_run_may_end_early_and_be_extended(long: Path, teachers: Path, tmp_path: Path) -> None:
    """To the bytes of a run that was begun with as many steps."""
    few, cut = tmp_path / "few", tmp_path / "cut"
    options = ["--teachers-folder", str(teachers), "--out"]
    steps = runs.saved_config(long).distill.steps
    assert distill.main([*LONG, *options, str(few), "--steps", "3"]) == 0
    assert evaluate.main([str(few)]) == 0
    shutil.copytree(few, cut)
    with pytest.MonkeyPatch.context() as patch:
        begin = runs.Interruption.__init__
        patch.setattr(runs.Interruption, "__init__", lambda self: (begin(self), setattr(self, "signal", 2))[0])
        assert distill.main(["--out", str(few), "--resume", "--steps", str(steps)]) == 130
    assert not (few / "results.json").exists() and not (few / "evaluation.json").exists()  # of fewer steps
    assert distill.main(["--out", str(few), "--resume", "--steps", "3"]) == 2  # it is at the fourth
    assert distill.main(["--out", str(few), "--resume", "--steps", "4"]) == 0
    assert (few / "results.json").exists()
    assert json.loads((few / "results.json").read_text())["steps"]["taken"] == 4
    assert sorted(path.name for path in (few / "snapshots").iterdir()) == [f"step-00000{i}.safetensors" for i in (0, 4)]
    later = cut / "snapshots" / "step-000900.safetensors"  # of a run that was killed after its last checkpoint
    shutil.copy(cut / "snapshots" / "step-000003.safetensors", later)
    assert distill.main(["--out", str(cut), "--resume", "--steps", str(steps)]) == 0
    snapshots = sorted(path.relative_to(long) for path in (long / "snapshots").iterdir())
    assert sorted(path.relative_to(cut) for path in (cut / "snapshots").iterdir()) == snapshots
    for name in ("synthetic.safetensors", "log.jsonl", *snapshots):
        assert (cut / name).read_bytes() == (long / name).read_bytes(), name


def test_advice_where_the_loss_or_the_step_size_says_that_steps_are_too_large() -> None:
    settings = DistillConfig(step_size=0.02)
    good = [{"loss": 2.0, "step_size": 0.02}] * 5 + [{"loss": 0.5, "step_size": 0.01}] * 10
    assert distill._advice(good, settings) == [] == distill._advice([], settings)
    above = distill._advice([*good, *[{"loss": 3.0, "step_size": 0.01}] * 20], settings)
    assert len(above) == 1 and "loss is above 1 in most of the later steps" in above[0]
    floor = distill._advice([*good, {"loss": None, "step_size": 0.02 * distill.SMALLEST_STEP_SIZE}], settings)
    assert len(floor) == 1 and "lower --lr-step-size" in floor[0]


def test_an_evaluation_ends_at_ctrl_c(finished: Path) -> None:
    """Networks in training on threads end too."""
    argv = [str(finished), "--networks", "4", "--epochs", "1000000", "--full-epochs", "0", "--threads", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ddpp.evaluate", *argv],
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where tests run in the background
    )
    assert process.stderr is not None
    while b"images/s" not in process.stderr.read(100):
        pass
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130 and b"ddpp.evaluate: stopped" in error


def test_a_run_is_finished_when_all_its_files_are_there(
    teachers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut between its evaluation and its last file, it goes on without training a network again."""
    out = tmp_path / "run"

    def cut(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "write", cut)
    assert distill.main([*TOY, "--teachers-folder", str(teachers), "--out", str(out)]) == 130
    assert not (out / "results.json").exists()
    monkeypatch.undo()
    monkeypatch.setattr(evaluate.Evaluation, "network", lambda *_: pytest.fail("it is done"))
    assert distill.main(["--out", str(out), "--resume"]) == 0
    assert all((out / name).is_file() for name in FILES) and not (out / "evaluated.jsonl").exists()


def test_a_searched_rate_of_random_images_is_of_a_draw_a_network(tmp_path: Path) -> None:
    options = [
        "--method",
        "random",
        "--evaluate-search-lr",
        "--evaluate-full-epochs",
        "0",
        "--out",
        str(tmp_path / "a"),
    ]
    assert distill.main([*TOY, *options]) == 0
    found = json.loads((tmp_path / "a" / "results.json").read_text())["accuracy"]
    assert list(found) == ["random", "random/searched", "full"] and found["random/searched"]["lr"] in evaluate.RATES
    dm = [
        *TOY,
        "--method",
        "dm",
        *options[2:-1],
        str(tmp_path / "b"),
        "--evaluate-lr",
        str(found["random/searched"]["lr"]),
    ]
    assert distill.main(dm) == 0
    same = json.loads((tmp_path / "b" / "results.json").read_text())["accuracy"]["random"]
    assert found["random/searched"]["networks"] == same["networks"]


def test_a_run_whose_teachers_do_not_fit_leaves_no_folder(
    teachers: Path, tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert distill.main([*TOY, "--width", "9", "--teachers-folder", str(teachers), "--out", str(out)]) == 2
    assert str(teachers) in capsys.readouterr().err and not out.exists()
