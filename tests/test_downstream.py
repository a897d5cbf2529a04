"""Scores against the worked example, paired differences, continual learning and architecture search at toy size."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from ddpp import (
    cli,
    compare,
    continual,
    data,
    distill,
    evaluate,
    export,
    report,
    runs,
    scores,
    search,
    synthetic,
    training,
)
from ddpp.config import Config
from ddpp.errors import UserError

TOY = [
    *("--method", "dm", "--width", "8", "--threads", "1", "--real-batch", "16", "--lr-pixels", "1", "--steps", "2"),
    *("--evaluate-networks", "3", "--evaluate-epochs", "3", "--evaluate-full-epochs", "1"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "dm"
    assert distill.main([*TOY, "--out", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("stage", [evaluate, continual, search])
def test_a_stage_that_runs_elsewhere_is_not_run_twice(
    stage: Any, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = stage.__name__.rpartition(".")[2]
    with runs.alone(finished, name):
        assert stage.main([str(finished), "--threads", "1"]) == cli.IN_USE
    (line,) = (row for row in capsys.readouterr().err.splitlines() if "error" in row)
    assert line == f"ddpp.{name}: error: another process runs ddpp.{name} on {finished}. Wait for it, or stop it."


def lrs(own: float, random: float = 0.31, full: float = 0.848) -> float:
    return scores.label_robust_score(full_hard=full, synthetic_hard=own, synthetic=own, random=random)


def test_the_label_robust_score_of_the_worked_example() -> None:
    """CIFAR-10, 10 images a class: all data 84.8, random 31.0, three methods."""
    assert [round(lrs(own), 4) for own in (0.655, 0.653, 0.674)] == [0.3025, 0.3016, 0.3113]
    assert round(lrs(0.5, 0.5, 0.5), 4) == 0.2689


def test_the_augmentation_robust_score() -> None:
    none = scores.augmentation_robust_score(synthetic=0.3, random=0.3, synthetic_plain=0.2, random_plain=0.2)
    better = scores.augmentation_robust_score(synthetic=0.6, random=0.3, synthetic_plain=0.2, random_plain=0.2)
    assert round(none, 4) == 0.2689
    assert better == pytest.approx((math.exp(0.15) - math.exp(-1)) / (math.e - math.exp(-1)))


def test_percent_is_not_taken_for_a_fraction() -> None:
    with pytest.raises(UserError, match=r"synthetic_hard must be a fraction .* 65\.5; that looks like percent"):
        lrs(65.5)


def test_the_paired_difference_has_students_interval() -> None:
    found = scores.paired_difference([10, 20, 30], [12, 21, 33])
    assert found.mean == 2 and found.pairs == 3
    assert found.margin == pytest.approx(4.303 * 1.0 / 3**0.5)
    with pytest.raises(UserError, match="two or more pairs"):
        scores.paired_difference([1], [2])


@pytest.mark.parametrize("pairs", [2, 10, 31, 32, 41, 200])
def test_the_interval_of_any_number_of_pairs(pairs: int) -> None:
    """Against scipy's quantiles, to the rounding of a printed table."""
    second = torch.randn(pairs, generator=torch.Generator().manual_seed(pairs)).tolist()
    found = scores.paired_difference([0.0] * pairs, second)
    wanted = stats.t.ppf(0.975, pairs - 1) * np.std(second, ddof=1) / math.sqrt(pairs)
    assert found.margin == pytest.approx(wanted, rel=3e-4)


def edited(finished: Path, to: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a run with other results."""
    shutil.copytree(finished, to)
    results = json.loads((to / "results.json").read_text())
    edit(results)
    (to / "results.json").write_text(json.dumps(results))
    return to


def changed(finished: Path, to: Path, section: str, key: str, value: object) -> Path:
    return edited(finished, to, lambda results: results["config"][section].update({key: value}))


def test_two_runs_are_compared_network_by_network(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:

    def better(results: dict[str, Any]) -> None:
        found = results["models"]["convnet"]["dm"]
        found["networks"] = [n + 3 for n in found["networks"]]

    other = edited(finished, tmp_path / "other", better)
    argv = ["--first", str(finished), "--second", str(other), "--json", str(tmp_path / "c.json")]
    assert compare.main(argv) == 0
    difference = json.loads((tmp_path / "c.json").read_text())["difference"]["convnet"]
    assert difference["mean"] == pytest.approx(3) and difference["margin"] == pytest.approx(0, abs=1e-9)
    shown = capsys.readouterr().out
    assert "| convnet | +3.00 |" in shown and "| 3 networks |" in shown


def test_a_reader_that_goes_away_is_one_line(finished: Path, tmp_path: Path) -> None:
    """As with ``| head``."""
    other = changed(finished, tmp_path / "other", "data", "data_root", "elsewhere")
    reading, writing = os.pipe()
    os.close(reading)
    argv = [sys.executable, "-m", "ddpp.compare", "--first", str(finished), "--second", str(other)]
    ended = subprocess.run(argv, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert ended.returncode == 141
    assert ended.stderr == "ddpp.compare: stopped: nobody reads what it prints\n"


def with_networks(folder: Path, to: Path, seed: int, gains: list[float]) -> Path:
    """A copy of a run, of another seed, whose networks are better by so much."""
    other = changed(folder, to, "run", "seed", seed)
    results = json.loads((other / "results.json").read_text())
    found = results["models"]["convnet"]["dm"]
    found["networks"] = [n + gain for n, gain in zip(found["networks"], gains, strict=True)]
    (other / "results.json").write_text(json.dumps(results))
    return other


def test_of_several_runs_each_counts_once(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Networks on one synthetic set are no independent trials of the method."""
    first = [with_networks(finished, tmp_path / f"first{seed}", seed, [0, 0, 0]) for seed in (0, 1)]
    gains = ([3, 3, 3], [-5, 1, 7])
    second = [with_networks(finished, tmp_path / f"second{seed}", seed, gain) for seed, gain in enumerate(gains)]
    found = compare.compare(first, second)
    assert found["of"] == "distillations" and found["difference"]["convnet"]["pairs"] == 2
    assert found["difference"]["convnet"]["mean"] == pytest.approx(2)
    assert found["difference"]["convnet"]["margin"] == pytest.approx(12.706)  # of 3 and 1
    argv = ["--first", *map(str, first), "--second", *map(str, second)]
    assert compare.main(argv) == 0
    assert "| convnet | +2.00 | -10.71 to +14.71 | 2 distillations |" in capsys.readouterr().out
    assert compare.main([*argv[:2], str(first[0]), *argv[3:]]) == 2
    assert "--first names a run twice" in capsys.readouterr().err


def test_runs_are_compared_by_their_last_evaluation(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs_of = [tmp_path / "first", tmp_path / "second"]
    for folder, epochs in zip(runs_of, ("2", "3"), strict=True):
        shutil.copytree(finished, folder)
        argv = [str(folder), "--models", "mlp", "lenet", "--networks", "2", "--epochs", epochs, "--full-epochs", "0"]
        assert evaluate.main(argv) == 0
    argv = ["--first", str(runs_of[0]), "--second", str(runs_of[1]), "--evaluated"]
    assert compare.main(argv) == 2
    assert "cannot be compared: evaluate.epochs is 2 and 3\n" in capsys.readouterr().err
    assert evaluate.main([str(runs_of[0]), "--models", "lenet", "--networks", "2", "--epochs", "3"]) == 0
    found = compare.compare(*([folder] for folder in runs_of), evaluated=True)
    assert list(found["difference"]) == ["lenet"] and found["difference"]["lenet"]["mean"] == 0
    assert compare.main(["--first", str(finished), "--second", str(runs_of[1]), "--evaluated"]) == 2
    assert "it was not evaluated" in capsys.readouterr().err
    assert (
        evaluate.main([str(runs_of[0]), "--models", "convnet", "--networks", "3", "--lr", "0.5", "--epochs", "4"]) == 0
    )
    assert compare.main(argv) == 2
    told = capsys.readouterr().err
    for difference in ("evaluate.networks is 3 and 2", "evaluate.epochs is 4 and 3", "evaluate.lr is 0.5 and None"):
        assert difference in told


def test_runs_without_a_common_architecture_are_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = edited(
        finished, tmp_path / "other", lambda results: results.update(models={"mlp": results["models"]["convnet"]})
    )
    assert compare.main(["--first", str(finished), "--second", str(other)]) == 2
    assert f"in all runs ({finished}: convnet; {other}: mlp)" in capsys.readouterr().err


def test_the_score_is_of_an_architecture_that_all_runs_share(finished: Path, tmp_path: Path) -> None:

    def with_another_first(results: dict[str, Any]) -> None:
        chance = {name: {**found, "mean": 10.0} for name, found in results["models"]["convnet"].items()}
        results["models"], results["accuracy"] = {"mlp": chance, **results["models"]}, chance

    other = edited(finished, tmp_path / "other", with_another_first)
    score = compare.compare([finished], [other])["score"]
    assert score["first"] is not None and score["first"] == score["second"]


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("distill", "ipc", 10, "1 and 10 images per class"),
        ("evaluate", "epochs", 7, "evaluate.epochs is 3 and 7"),
        ("evaluate", "optimizer", "adam", "evaluate.optimizer is 'sgd' and 'adam'"),
        ("run", "seed", 5, "paired by seed"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(
    finished: Path,
    tmp_path: Path,
    section: str,
    key: str,
    value: object,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = changed(finished, tmp_path / "other", section, key, value)
    assert compare.main(["--first", str(finished), "--second", str(other)]) == 2
    assert message in capsys.readouterr().err


def test_runs_of_two_machines_and_versions_are_compared(finished: Path, tmp_path: Path) -> None:
    other = changed(finished, tmp_path / "other", "data", "data_root", "elsewhere")
    results = json.loads((other / "results.json").read_text())
    results["config"]["data"]["download"] = True
    del results["config"]["data"]["classes"], results["config"]["distill"]["given"]  # as before they were options
    (other / "results.json").write_text(json.dumps(results))
    assert compare.main(["--first", str(finished), "--second", str(other)]) == 0
    assert compare.main(["--first", str(other), "--second", str(finished)]) == 0


def test_runs_of_different_data_are_refused(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    shutil.copytree(finished, other)
    held, meta = synthetic.load(other / "synthetic.safetensors")
    held.save(other / "synthetic.safetensors", {**meta, "fingerprint": "of other pixels"})
    assert compare.main(["--first", str(finished), "--second", str(other)]) == 2
    assert "cannot be compared: they were distilled from different data" in capsys.readouterr().err
    assert evaluate.main([str(other)]) == 2
    assert "distilled from other data than its data set holds now" in capsys.readouterr().err


Edit = Callable[[dict[str, torch.Tensor], dict[str, Any]], object]
DAMAGED: dict[str, tuple[Edit, str]] = {
    "no labels": (lambda t, m: t.pop("labels"), "is no synthetic set of format 1"),
    "no step size": (lambda t, m: t.pop("step_size"), "is no synthetic set of format 1"),
    "a flat set": (lambda t, m: t.update(images=t["images"].flatten(1)), "must hold images [N, C, H, W]"),
    "fewer labels": (lambda t, m: t.update(labels=t["labels"][1:]), "got images [10, 1, 8, 8], labels [9]"),
    "of a snapshot": (lambda t, m: m.clear(), "it does not tell dataset, fingerprint, classes, ipc, method"),
    "other size": (
        lambda t, m: t.update(images=t["images"][..., :4, :4].clone()),
        "must have images as torch.float32 [10, 1, 8, 8], got torch.float32 [10, 1, 4, 4]",
    ),
    "fewer images": (
        lambda t, m: t.update({name: t[name][:5] for name in ("images", "labels")}),
        "must have images as torch.float32 [10, 1, 8, 8], got torch.float32 [5, 1, 8, 8]",
    ),
    "classes beyond": (lambda t, m: t.update(labels=t["labels"] + 1), "must have labels class by class, 1 of each"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_set_is_one_line_of_every_stage(
    damage: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit, message = DAMAGED[damage]
    folder = edited(finished, tmp_path / "run", lambda results: None)
    path = folder / "synthetic.safetensors"
    tensors, meta = runs.read_tensors(path, "synthetic set")
    edit(tensors, meta)
    runs.write_tensors(path, tensors, {"format": 1, **meta})
    grid = ["--widths", "4", "--depths", "1", "--full-epochs", "1"]
    to = ["--to", str(tmp_path / "to")]
    for stage, options in ((evaluate, []), (continual, []), (search, grid), (export, to), (report, [])):
        assert stage.main([str(folder), *options]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"error: {path} is " in line and message in line
    assert not (tmp_path / "to").exists()


def test_a_snapshot_that_does_not_fit_is_one_line(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = edited(finished, tmp_path / "run", lambda results: None)
    path = folder / "snapshots" / "step-000001.safetensors"
    held, meta = synthetic.load(folder / "synthetic.safetensors")
    synthetic.Synthetic(held.images[..., :4, :4], held.labels, held.step_size).save(path, {"step": 1})
    assert evaluate.main([str(folder), "--select", "test"]) == 2
    assert f"{path} is damaged or foreign: it must have images" in capsys.readouterr().err
    held.save(path, meta)
    assert evaluate.main([str(folder), "--select", "test"]) == 2
    assert f"{path} is damaged or foreign: it does not tell step" in capsys.readouterr().err


@pytest.mark.parametrize("found", [{}, {"config": {}}])
def test_results_that_lack_figures_are_one_line(
    found: dict[str, Any], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = edited(finished, tmp_path / "run", lambda results: None)
    runs.write_json(folder / "results.json", found)
    for stage, options in ((report, [str(folder)]), (compare, ["--first", str(finished), "--second", str(folder)])):
        assert stage.main(options) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{folder}/results.json does not tell" in line
        assert f"run ddpp.distill --out {folder} --resume again" in line


def test_continual_learning_with_three_memories(
    finished: Path, capsys: pytest.CaptureFixture[str], bars: list[Any]
) -> None:
    argv = [str(finished), "--steps", "3", "--orders", "2", "--epochs", "3"]
    assert continual.main(argv) == 0
    result = json.loads((finished / "continual.json").read_text())
    assert result["classes"] == [3, 6, 10] and set(result["accuracy"]) == {"dm", "herding", "random"}
    assert all(len(step["networks"]) == 2 for steps in result["accuracy"].values() for step in steps)
    assert (finished / "continual.png").stat().st_size > 1000
    assert "| dm |" in capsys.readouterr().out
    assert [bar.n for bar in bars] == [bar.total for bar in bars]
    assert not (finished / "continual.jsonl").exists()
    for wrong in (["--steps", "11"], ["--orders", "0"]):
        assert continual.main([str(finished), *wrong]) == 2
        assert f"error: {wrong[0]} must be" in capsys.readouterr().err


def test_continual_learning_that_was_cut_goes_on(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = [str(finished), "--steps", "2", "--orders", "2", "--epochs", "2", "--threads", "1"]
    assert continual.main(argv) == 0
    whole = (finished / "continual.json").read_text()
    plain, trained = continual._network, []

    def cut(*job: Any) -> float:
        if len(trained) == 5:
            raise KeyboardInterrupt
        trained.append(job)
        return plain(*job)

    monkeypatch.setattr(continual, "_network", cut)
    assert continual.main(argv) == 130
    assert len((finished / "continual.jsonl").read_text().splitlines()) == 1 + 5
    monkeypatch.setattr(continual, "_network", lambda *job: (trained.append(job), plain(*job))[1])
    assert continual.main(argv) == 0 and len(trained) == 3 * 2 * 2
    assert (finished / "continual.json").read_text() == whole


def test_a_run_is_used_where_its_data_are_by_now(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("train", "test"):
        data.pictures.write(tmp_path / "old" / part, torch.rand(40, 3, 8, 8), ["cat", "dog"])
    made = ["--dataset", "folder", "--data-root", str(tmp_path / "old"), "--out", str(tmp_path / "run")]
    assert distill.main([*TOY, *made]) == 0
    (tmp_path / "old").rename(tmp_path / "new")
    few = [str(tmp_path / "run"), "--epochs", "1"]
    grid = ["--widths", "4", "--depths", "1", "--full-epochs", "1"]
    for stage, options in ((evaluate.main, []), (continual.main, ["--steps", "2"]), (search.main, grid)):
        assert stage([*few, *options]) == 2
        assert "Name the tree with --data-root" in capsys.readouterr().err
        assert stage([*few, *options, "--data-root", str(tmp_path / "new")]) == 0


def test_only_the_classes_seen_are_learned_and_tested() -> None:
    images, labels = torch.arange(6.0)[:, None, None, None], torch.tensor([0, 1, 2, 2, 1, 0])
    kept, places = continual._of_classes(images, labels, torch.tensor([2, 0]))
    assert kept.flatten().tolist() == [0, 2, 3, 5] and places.tolist() == [1, 0, 0, 1]


def test_rank_correlation() -> None:
    assert search.spearman([1, 2, 3, 4], [10, 20, 30, 45]) == pytest.approx(1)
    assert search.spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert search.spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(0.8660254)
    assert search.spearman([1, 1, 1], [1, 2, 3]) == 0


def test_a_search_ranks_and_goes_on_where_it_was_cut(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], bars: list[Any]
) -> None:
    argv = [str(finished), "--widths", "4", "8", "--norm", "instance", "none", "--activation", "relu"]
    argv += ["--pooling", "avg", "--depths", "2", "--epochs", "2", "--full-epochs", "1"]
    assert search.main(argv) == 0
    result = json.loads((finished / "search.json").read_text())
    assert len(result["networks"]) == 4 and -1 <= result["rank_correlation"]["distilled"] <= 1
    kept = (finished / "search.jsonl").read_text().splitlines(keepends=True)
    (finished / "search.jsonl").write_text("".join(kept[:-3]))
    trained = []
    plain = search._trained
    monkeypatch.setattr(search, "_trained", lambda *a: (trained.append(a[2]), plain(*a))[1])
    assert search.main(argv) == 0
    assert len(trained) == 3  # one network on three sets
    again = json.loads((finished / "search.json").read_text())
    assert [row["full"]["accuracy"] for row in again["networks"]] == [
        row["full"]["accuracy"] for row in result["networks"]
    ]
    assert "ranked by" in capsys.readouterr().out
    for other, missing in (
        (["--norm", "instance", "none", "layer"], 6),
        (["--momentum", "0.5"], 12),
        (["--seed", "1"], 12),
    ):
        trained.clear()
        assert search.main([*argv, *other]) == 0 and len(trained) == missing
    assert search.main([*argv, "--full-epochs", "0"]) == 2
    assert "a search ranks beside all real images: give --full-epochs above 0" in capsys.readouterr().err
    assert [bar.n for bar in bars] == [bar.total for bar in bars]
    assert search.main([str(finished), "--depths", "9"]) == 2
    assert "depth" in capsys.readouterr().err
    assert search.main([str(finished), "--widths", "0"]) == 2
    assert "a network of the grid: model.width must be at least 1, got 0" in capsys.readouterr().err


def test_adam_trains_on_few_images_and_sgd_on_all(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On all images, continual trains the network that herding selects by."""
    fit, seen = training.fit, set()

    def noted(network: Any, images: Any, labels: Any, recipe: training.Recipe, *rest: Any, **options: Any) -> bool:
        seen.add((len(images) > 100, recipe.optimizer))
        return fit(network, images, labels, recipe, *rest, **options)

    monkeypatch.setattr(training, "fit", noted)
    argv = [str(finished), "--optimizer", "adam", "--lr", "0.01", "--epochs", "1", "--threads", "1"]
    full, grid = ["--full-epochs", "1"], ["--widths", "4", "--depths", "1", "--activation", "relu"]
    for stage, options in (
        (evaluate, [*full, "--networks", "1", "--search-lr", "--augmentations", "none"]),
        (continual, ["--steps", "2", "--orders", "1"]),
        (search, [*full, *grid]),
    ):
        seen.clear()
        assert stage.main([*argv, *options]) == 0
        assert seen == {(False, "adam"), (True, "sgd")}, stage


def test_a_learned_step_size_is_no_rate_of_adam(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stage in (evaluate, continual, search):
        assert stage.main([str(finished), "--optimizer", "adam"]) == 2
        assert "networks by adam need a learning rate of their own (--lr" in capsys.readouterr().err


def test_a_run_of_an_earlier_version_is_evaluated_as_it_was(finished: Path, tmp_path: Path) -> None:
    """Its options lack those that came since."""
    old = tmp_path / "old"
    shutil.copytree(finished, old)
    lines = (old / "config.toml").read_text().splitlines(keepends=True)
    kept = [line for line in lines if "optimizer" not in line]
    assert len(lines) - len(kept) == 2  # of outer and of inner steps
    (old / "config.toml").write_text("".join(kept))
    results = json.loads((old / "results.json").read_text())
    for section, name in (("distill", "optimizer"), ("distill", "inner_optimizer"), ("evaluate", "optimizer")):
        del results["config"][section][name]
    (old / "results.json").write_text(json.dumps(results))
    found = []
    for folder in (finished, old):
        assert evaluate.main([str(folder), "--networks", "2", "--epochs", "2", "--full-epochs", "1"]) == 0
        found.append(json.loads((folder / "evaluation.json").read_text()))
    assert found[0] == found[1]
    assert compare.main(["--first", str(finished), "--second", str(old)]) == 0


def test_a_name_that_the_file_system_does_not_take_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["a" * 300]) == 2
    assert capsys.readouterr().err.startswith("ddpp.evaluate: error: File name too long: aaa")


def test_policies_are_for_grey_or_colour() -> None:
    of_two = SimpleNamespace(shape=(2, 8, 8), classes=("a", "b"), val_labels=torch.zeros(0))
    config = Config().with_values({"evaluate": {"augmentations": ["none", "randaugment"]}}, "test")
    with pytest.raises(UserError, match="randaugment is for images of 1 or 3 channels, and these have 2"):
        evaluate.check(config, of_two)


def test_an_option_of_another_stage_is_called_so(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evaluate.main([str(finished), "--norm", "none"])
    assert "unknown argument --norm, which is an option of another stage. See --help." in capsys.readouterr().err


def test_a_stage_takes_its_own_sections_of_a_file_or_preset(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a run is, it says itself."""
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "all.toml").write_text("[distill]\nmethod = 'ddpp'\nipc = 20\n[evaluate]\nnetworks = 2\n")
    argv = [str(tmp_path / "run"), "--full-epochs", "0", "--epochs", "2"]
    assert evaluate.main([*argv, "--config", str(tmp_path / "all.toml")]) == 0
    assert "all.toml: not for this stage, and ignored: [distill]" in capsys.readouterr().err
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert list(found["accuracy"]) == ["random", "dm", "full"] and len(found["accuracy"]["dm"]["networks"]) == 2
    assert found["config"]["distill"]["ipc"] == 1
    assert evaluate.main([*argv, "--preset", "mtt-digits-quick", "--networks", "1"]) == 0
    assert "| dm |" in capsys.readouterr().out
    (tmp_path / "all.toml").write_text("[distil]\nipc = 20\n")
    assert evaluate.main([*argv, "--config", str(tmp_path / "all.toml")]) == 2
    assert "unknown section [distil]" in capsys.readouterr().err


def test_a_name_that_is_no_text_is_one_line(tmp_path: Path) -> None:
    out = os.fsencode(tmp_path) + b"/caf\xe9"
    argv = [sys.executable, "-m", "ddpp.distill", *TOY, "--out"]
    ended = subprocess.run([*map(os.fsencode, argv), out], capture_output=True)
    assert ended.returncode == 2 and ended.stderr.count(b"\n") == 1
    assert b"is no UTF-8 text; rename that file or folder" in ended.stderr


def test_what_a_stage_does_not_read_is_no_option_of_it(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stage, option in ((continual.main, "--models"), (continual.main, "--full-epochs"), (search.main, "--networks")):
        with pytest.raises(SystemExit, match="2"):
            stage([str(finished), option, "1"])
        assert f"unknown argument {option}" in capsys.readouterr().err
    for stage, default in ((evaluate.main, "as the run or preset"), (distill.main, "300")):
        with pytest.raises(SystemExit, match="0"):
            stage(["--help"])
        told = " ".join(capsys.readouterr().out.split())
        assert f"the rate falls to a tenth halfway. (default: {default})" in told


def test_one_network_has_no_spread(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([str(finished), "--networks", "1", "--epochs", "1", "--full-epochs", "0"]) == 0
    assert continual.main([str(finished), "--orders", "1", "--steps", "2", "--epochs", "1"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == 10 and not any("±" in row for row in rows)
