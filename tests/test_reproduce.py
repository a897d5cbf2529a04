"""The tables: what is missing is run, what is done is kept, and the papers' figures stand beside ours."""

import contextlib
import csv
import json
import re
import statistics
import time
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpp import cli, data, distill, reproduce, runs
from ddpp import config as configuration

TINY = {
    1: {
        "model": {"width": 8},
        "run": {"threads": 1},
        "distill": {"steps": 2, "real_batch": 8},
        "evaluate": {"epochs": 2, "networks": 2},
    }
}


def pictures(root: Path, seed: int) -> str:
    """A folder of images of two classes."""
    draw = torch.Generator().manual_seed(seed)
    for part in ("train", "test"):
        data.pictures.write(root / part, torch.rand(40, 3, 8, 8, generator=draw), ["cat", "dog"])
    return str(root)


def figure(mean: float) -> dict[str, Any]:
    return {"mean": mean, "std": 1.5, "networks": [mean - 1.5, mean + 1.5]}


def finished(folder: Path, table: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    results = {"accuracy": table, "models": {"convnet": table}, "protocol": {"networks": 2}, "seconds": {"distill": 60}}
    runs.write_json(folder / "results.json", results)


def test_a_finished_run_of_other_images_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reproduce, "QUICK", TINY)
    here, copy, other = (pictures(tmp_path / name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    argv = ["table1", "--dataset", "folder", "--methods", "random", "--ipc", "1", "--out", str(tmp_path / "table")]
    assert reproduce.main([*argv, "--data-root", here]) == 0
    monkeypatch.setattr(distill, "main", lambda argv: pytest.fail("it is there"))
    assert reproduce.main([*argv, "--data-root", copy]) == 0
    assert reproduce.main([*argv, "--data-root", other]) == 2
    assert "was distilled from other data than its data set holds now" in capsys.readouterr().err


def test_a_table_is_run_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reproduce, "QUICK", TINY)
    argv = ["table1", "--methods", "random", "dm", "--ipc", "1", "--out", str(tmp_path)]
    assert reproduce.main(argv) == 0
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines if line.startswith("|")][2:] == [
        "random",
        "dm",
        "all real data",
    ]
    assert "2 of 2 runs" in (tmp_path / "table.md").read_text() and (tmp_path / "table.png").stat().st_size > 1000
    with open(tmp_path / "table.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    results = json.loads((tmp_path / "digits-dm-ipc1-seed0" / "results.json").read_text())
    assert float(rows[1]["mean"]) == results["accuracy"]["dm"]["mean"] and rows[1]["networks"] == "2"
    assert results["accuracy"]["full"] is None  # once a table is enough
    monkeypatch.setattr(distill, "main", lambda argv: pytest.fail("it is there"))
    assert reproduce.main([*argv, "--threads", "2"]) == 0  # changes no figure
    assert reproduce.main(["figure2", *argv[1:]]) == 0
    assert (tmp_path / "figure2.png").stat().st_size > 1000
    capsys.readouterr()
    assert reproduce.main([*argv, "--evaluate-epochs", "3"]) == 2
    assert "other options (evaluate.epochs is 2 there and 3 here)" in capsys.readouterr().err


def test_a_row_says_that_its_networks_learned_a_teachers_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside rows that did not."""
    monkeypatch.setattr(reproduce, "QUICK", TINY)
    monkeypatch.chdir(tmp_path)
    assert reproduce.main(["table1", "--methods", "random", "rded", "--ipc", "1", "--out", "out"]) == 0
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines if line.startswith("|")][2:] == [
        "random",
        "rded (a teacher's answers)",
        "rded (own labels)",
        "all real data",
    ]


def test_a_run_that_was_cut_goes_on_where_its_data_are_by_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduce, "QUICK", TINY)
    for part in ("train", "test"):
        data.pictures.write(tmp_path / "old" / part, torch.rand(40, 3, 8, 8), ["cat", "dog"])
    argv = ["table1", "--methods", "dm", "--ipc", "1", "--dataset", "folder", "--out", str(tmp_path / "out")]
    assert reproduce.main([*argv, "--data-root", str(tmp_path / "old")]) == 0
    (cut,) = (tmp_path / "out").rglob("results.json")
    whole = runs.read_json(cut)["accuracy"]
    cut.unlink()
    (tmp_path / "old").rename(tmp_path / "new")
    assert reproduce.main([*argv, "--data-root", str(tmp_path / "new")]) == 0
    assert runs.read_json(cut)["accuracy"] == whole


def test_options_of_the_evaluation_reach_every_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduce, "QUICK", TINY)
    argv = ["table3", "--methods", "dm", "--ipc", "1", "--out", str(tmp_path), "--evaluate-networks", "3"]
    assert reproduce.main([*argv, "--evaluate-models", "convnet", "--no-evaluate-search-lr"]) == 0
    results = json.loads((tmp_path / "digits-dm-ipc1-seed0" / "results.json").read_text())
    assert len(results["accuracy"]["dm"]["networks"]) == 3 and "dm/searched" not in results["accuracy"]
    assert results["accuracy"]["full"] is None  # the table does not show it
    text = (tmp_path / "table.md").read_text()
    own = "--evaluate-models convnet --evaluate-networks 3 --no-evaluate-search-lr"
    assert f"`python -m ddpp.reproduce table3 --budget quick --methods dm --ipc 1 --out {tmp_path} {own}`" in text
    assert [line for line in text.splitlines() if "| trained on" in line] == ["| trained on | convnet |"]


def test_a_table_of_other_architectures_has_their_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduce, "QUICK", TINY)
    argv = ["table2", "--methods", "dm", "--ipc", "1", "--out", str(tmp_path / "a b"), "--evaluate-models"]
    assert reproduce.main([*argv, "convnet:4", "mlp"]) == 0
    text = (tmp_path / "a b" / "table.md").read_text()
    assert "| trained on | convnet:4 | mlp |" in text and "not run" not in text
    assert f"--out '{tmp_path / 'a b'}' --evaluate-models convnet:4 mlp`" in text


def test_options_of_a_file_hold_where_they_are_the_usual_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The target's own, 2 epochs and 2 networks, are not the usual ones."""
    monkeypatch.setattr(reproduce, "QUICK", TINY)
    usual, file = configuration.Config().evaluate, tmp_path / "own.toml"
    file.write_text(f"[evaluate]\nnetworks = {usual.networks}\n[data]\ndataset = 'digits'\n")
    argv = ["table1", "--methods", "random", "--ipc", "1", "--config", str(file), "--out", str(tmp_path / "out")]
    assert reproduce.main(argv) == 0
    found = runs.saved_config(tmp_path / "out" / "digits-random-ipc1-seed0").evaluate
    assert (found.networks, found.epochs) == (usual.networks, 2)


def test_several_distillations_of_a_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The spread is theirs, and pruning is judged pair by pair."""
    teachers = {"count": 1, "epochs": 2, "folder": str(tmp_path / "teachers")}
    moved = {"steps": 2, "inner_steps": 2, "max_start_epoch": 1}
    monkeypatch.setattr(reproduce, "QUICK", {1: {**TINY[1], "teachers": teachers, "distill": moved}})
    argv = ["table1", "--methods", "mtt", "ddpp", "--ipc", "1", "--out", str(tmp_path), "--seeds", "3", "5"]
    assert reproduce.main(argv) == 0
    results = {
        (method, seed): runs.read_json(tmp_path / f"digits-{method}-ipc1-seed{seed}" / "results.json")
        for method in ("mtt", "ddpp")
        for seed in (3, 5)
    }
    assert [found["config"]["run"]["seed"] for found in results.values()] == [3, 5, 3, 5]
    means = {key: found["accuracy"][key[0]]["mean"] for key, found in results.items()}
    text = (tmp_path / "table.md").read_text()
    assert "over 2 distillations, each the mean of 2 networks" in text and "--ipc 1 --seeds 3 5" in text
    with open(tmp_path / "table.csv", encoding="utf-8") as file:
        rows = {row["trained on"]: row for row in csv.DictReader(file)}
    for method in ("mtt", "ddpp"):
        own = [means[method, seed] for seed in (3, 5)]
        assert float(rows[method]["mean"]) == pytest.approx(statistics.fmean(own))
        assert float(rows[method]["std"]) == pytest.approx(statistics.stdev(own)) and (
            rows[method]["networks"],
            rows[method]["distillations"],
        ) == ("4", "2")
    difference = statistics.fmean(means["ddpp", seed] - means["mtt", seed] for seed in (3, 5))
    assert f"| 1 | convnet | {difference:+.2f} | " in text and "| 2 distillations |" in text
    assert "| all real data (networks of seed 3) |" in text
    (tmp_path / "digits-ddpp-ipc1-seed5" / "results.json").unlink()
    cells = [
        reproduce.Cell(method, 1, seed, tmp_path / f"digits-{method}-ipc1-seed{seed}", full=False)
        for method, seed in results
    ]
    text = reproduce.write(reproduce.TARGETS["table1"], cells, tmp_path, "digits", "command")
    assert re.search(r"\| ddpp \| [\d.]+ ± [\d.]+ \(1 of 2 distillations\) \|", text)
    assert reproduce.main([*argv[:-3], "--seeds", "3", "3"]) == 0
    assert "over 2 networks" in (tmp_path / "table.md").read_text()


def test_published_figures_stand_beside(tmp_path: Path) -> None:
    cells = [reproduce.Cell("ddpp", n, 0, tmp_path / f"ipc{n}", full=False) for n in (1, 10)]
    finished(cells[0].folder, {"random": figure(14), "ddpp": figure(45.25), "full": None, "ddpp/test": figure(46)})
    text = reproduce.write(reproduce.TARGETS["table1"], cells, tmp_path, "cifar10", "command")
    assert "| ddpp | 45.2 ± 1.5 | 46.4 ± 0.6 | not run | 65.5 ± 0.3 |" in text
    assert "| ddpp (best on test, as papers do: too high) | 46.0 ± 1.5 |  | not run |  |" in text
    assert r"ddpp & $45.2 \pm 1.5$ & -- \\" in (tmp_path / "table.tex").read_text()


def test_other_architectures_with_both_rates(tmp_path: Path) -> None:
    cell = reproduce.Cell("mtt", 10, 0, tmp_path / "run", full=False)
    finished(cell.folder, {"random": figure(20), "mtt": figure(60), "mtt/searched": figure(62), "full": None})
    text = reproduce.write(reproduce.TARGETS["table3"], [cell], tmp_path, "cifar10", "command")
    assert "| mtt | 60.0 ± 1.5 | 64.3 ± 0.7 | not run | 34.2 ± 2.6 |" in text
    assert "| mtt (searched rate) | 62.0 ± 1.5 |" in text


def test_a_run_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(argv: list[str]) -> int:
        out = Path(argv[argv.index("--out") + 1])
        if "herding" in out.name:
            return 2
        finished(out, {"random": figure(10), "full": figure(90)})
        return 0

    monkeypatch.setattr(distill, "main", main)
    argv = ["table1", "--methods", "herding", "random", "--ipc", "1", "--out", str(tmp_path)]
    assert reproduce.main(argv) == 2
    assert "herding, 1 images per class, seed 0: exit code 2" in capsys.readouterr().err
    assert "| herding | not run |" in (tmp_path / "table.md").read_text()


def test_processes_share_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that another process has is left to it; one that it takes first is no failure, and both are waited for."""
    folders = {name: tmp_path / f"digits-{name}-ipc1-seed0" for name in ("dm", "herding", "random")}
    elsewhere, ran = contextlib.ExitStack(), []

    def begun_elsewhere(name: str) -> None:
        folders[name].mkdir()
        stage = "distill" if name == "dm" else "evaluate"
        assert elsewhere.enter_context(runs.claimed(runs.lock_of(folders[name], stage)))

    def main(argv: list[str]) -> int:
        out = Path(argv[argv.index("--out") + 1])
        if out == folders["herding"]:  # while this process read the data set
            begun_elsewhere("herding")
            return cli.IN_USE
        ran.append(out)
        finished(out, {"random": figure(10), "full": figure(90)})
        return 0

    def wait(seconds: float) -> None:
        elsewhere.close()
        for name in ("dm", "herding"):
            runs.write_json(folders[name] / "results.json", {**result, "accuracy": {name: figure(50)}})

    finished(tmp_path / "result", {"random": figure(10), "full": None})
    result = runs.read_json(tmp_path / "result" / "results.json")
    begun_elsewhere("dm")
    monkeypatch.setattr(distill, "main", main)
    monkeypatch.setattr(time, "sleep", wait)
    argv = ["table1", "--methods", "dm", "herding", "random", "--ipc", "1", "--out", str(tmp_path)]
    assert reproduce.main(argv) == 0
    assert ran == [folders["random"]]
    told = "waiting for other processes: dm, 1 images per class, seed 0; herding, 1 images per class, seed 0"
    assert capsys.readouterr().out.count(told) == 1
    text = (tmp_path / "table.md").read_text()
    assert "| dm | 50.0 ± 1.5 |" in text and "| herding | 50.0 ± 1.5 |" in text and "3 of 3 runs" in text


def test_a_run_taken_over_goes_on_on_this_process_s_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And with its threads; what the run is stays as it was."""
    monkeypatch.setattr(reproduce, "QUICK", TINY)
    argv = ["table1", "--methods", "dm", "--ipc", "1", "--out", str(tmp_path)]
    assert reproduce.main([*argv, "--device", "cpu"]) == 0
    folder = tmp_path / "digits-dm-ipc1-seed0"
    (folder / "results.json").unlink()
    saved = runs.saved_config(folder)
    elsewhere = saved.with_values({"run": {"device": "cuda:7"}}, "test")
    runs.write_text(folder / "config.toml", elsewhere.to_toml())
    assert reproduce.main([*argv, "--device", "cpu"]) == 0
    assert runs.saved_config(folder) == saved and (folder / "results.json").is_file()


def test_what_has_no_published_setting_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(argv: list[str]) -> int:
        finished(Path(argv[argv.index("--out") + 1]), {"dm": figure(26), "full": None})
        return 0

    monkeypatch.setattr(distill, "main", main)
    argv = ["table1", "--budget", "paper", "--dataset", "cifar10", "--methods", "cafe", "dm", "--ipc", "1"]
    assert reproduce.main([*argv, "--out", str(tmp_path)]) == 2
    assert "no published setting for cafe on cifar10" in capsys.readouterr().err
    assert "| dm | 26.0 ± 1.5 |" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["table1", "--methods", "herdin"], "unknown method 'herdin'; did you mean 'herding'"),
        (["table1", "--budget", "paper", "--methods", "dm"], "no published setting for dm on digits"),
        (["table9"], "invalid choice: 'table9'"),
        (["table3", "--ipc", "1", "10"], "table3 shows one number of images per class, got --ipc 1 10"),
    ],
)
def test_wrong_requests_are_named(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = reproduce.main([*argv, "--out", str(tmp_path)])
    except SystemExit as stop:
        code = int(str(stop.code))
    assert code == 2 and message in capsys.readouterr().err


def test_every_quick_preset_is_a_cell() -> None:
    for method in ("dc", "dsa", "dm", "mtt", "ddpp"):  # cafe and kip have one for digits only
        cell = reproduce.Cell(method, 1, 0, Path("absent"), full=False)
        for dataset in ("digits", "folder", "svhn"):
            values = reproduce._preset(
                cell, reproduce.Config().with_values({"data": {"dataset": dataset}}, ""), "quick"
            )
            assert values["distill"]["method"] == method and values["data"]["dataset"] == dataset


def test_presets_and_tables_tell_the_same_published_figures() -> None:
    tables = tomllib.loads((resources.files("ddpp") / "published.toml").read_text(encoding="utf-8"))
    shared = 0
    for name in configuration.preset_names():
        method, dataset, ipc = name.split("-")
        figure = tables.get(dataset, {}).get(method, {}).get(ipc.removeprefix("ipc"))
        if figure:
            shared += 1
            told = tomllib.loads((resources.files("ddpp") / "presets" / f"{name}.toml").read_text(encoding="utf-8"))
            assert told["published"].startswith(f"{figure} %"), name
    assert shared > 50
