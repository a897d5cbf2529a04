"""A table of any runs: what differs between rows stands in their names, and what is shared is told once."""

import csv
import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpp import distill, evaluate, reproduce, runs, table
from ddpp.config import Config
from ddpp.synthetic import Synthetic

RANDOM, FULL = [20.0, 22.0], [90.0, 92.0]


def figure(networks: list[float], **more: Any) -> dict[str, Any]:
    return {"mean": statistics.fmean(networks), "std": statistics.stdev(networks), "networks": networks, **more}


def run(
    folder: Path,
    networks: list[float],
    *,
    seed: int = 0,
    data: str = "pixels",
    rate: float = 0.02,
    models: tuple[str, ...] = ("convnet",),
    random: list[float] | None = None,
    **options: Any,
) -> Path:
    """A finished run; an option's name is its section and its own, as distill_epsilon."""
    settings = Config().with_values({"run": {"seed": seed}, "evaluate": {"networks": 2}}, "test")
    for name, value in options.items():
        section, _, option = name.partition("_")
        settings = settings.with_values({section: {option: value}}, "test")
    own = {settings.distill.method: figure(networks, lr=rate), "random": figure(random or RANDOM)}
    found = {**own, "full": figure(FULL) if settings.evaluate.full_epochs else None}
    protocol = {"select": settings.evaluate.select, "networks": 2, "ddof": 1, "epochs": settings.evaluate.epochs}
    meta = {"fingerprint": data, "seed": seed}
    held = Synthetic(torch.zeros(1, 1, 2, 2), torch.zeros(1).long(), torch.tensor(rate))
    held.save(folder / "synthetic.safetensors", meta)
    results = {"accuracy": found, "models": dict.fromkeys(models, found), "protocol": protocol}
    runs.write_json(folder / "results.json", {**results, "config": asdict(settings)})
    runs.write_text(folder / "config.toml", settings.to_toml())
    return folder


def shown(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[dict[str, list[str]], str]:
    """The printed table's cells by the rows' names, and the text under it."""
    assert table.main([str(arg) for arg in argv]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("|")]
    del cells[1]  # the rule under the head
    assert len({row[0] for row in cells}) == len(cells)
    return {row[0]: row[1:] for row in cells}, "\n".join(line for line in lines if not line.startswith("|"))


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The error's one line."""
    assert table.main([str(arg) for arg in argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_runs_that_differ_by_seed_are_one_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each distillation counts once; where it ran and where its teachers lie is no difference."""
    first = run(tmp_path / "a", [50.0, 54.0], seed=0, teachers_folder="one", run_device="cuda:3")
    second = run(tmp_path / "b", [56.0, 60.0], seed=1, teachers_folder="two", data_data_root="elsewhere")
    rows, text = shown(capsys, first, second, "--out", tmp_path / "out")
    assert rows["ddpp"] == ["55.0 ± 4.2"]  # of 52 and 58
    assert rows["random real images"] == ["21.0 ± 0.0"] and rows["all real data"] == ["91.0 ± 0.0"]
    assert "(ddof 1) over 2 distillations, each the mean of 2 networks trained from scratch; synthetic" in text
    assert "images of the last outer step" in text and "written: " in text
    with open(tmp_path / "out" / "table.csv", encoding="utf-8") as file:
        line = next(row for row in csv.DictReader(file) if row["trained on"] == "ddpp")
    assert float(line["std"]) == pytest.approx(statistics.stdev([52, 58]))
    assert (line["column"], line["networks"], line["distillations"]) == ("convnet", "4", "2")
    assert r"ddpp & $55.0 \pm 4.2$ \\" in (tmp_path / "out" / "table.tex").read_text()
    assert "| ddpp | 55.0 ± 4.2 |" in (tmp_path / "out" / "table.md").read_text()


def test_one_run_has_the_spread_of_its_networks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, text = shown(capsys, run(tmp_path / "a", [50.0, 54.0], evaluate_select="test"))
    assert rows["ddpp"] == ["52.0 ± 2.8"] and "(ddof 1) over 2 networks trained from scratch; " in text
    assert "the snapshot best on the test images themselves, as papers often do: too high" in text


def test_rows_are_named_by_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = {"model_width": 8, "evaluate_epochs": 7}
    folders = [
        run(tmp_path / f"{e}-{seed}", [50 + 100 * e, 51.0], seed=seed, distill_epsilon=e, **common)
        for e in (0.1, 0.3)
        for seed in (0, 1)
    ]
    rows, text = shown(capsys, *folders)
    assert list(rows) == [
        "trained on",
        "random real images",
        "ddpp, epsilon 0.1",
        "ddpp, epsilon 0.3",
        "all real data",
    ]
    assert "In all rows: dataset digits, model convnet, width 8, ipc 1, evaluate-epochs 7, " in text
    assert "epsilon" not in text


def test_a_row_says_where_it_has_fewer_distillations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [
        run(tmp_path / "a", [50.0, 54.0], seed=0, distill_epsilon=0.1),
        run(tmp_path / "b", [50.0, 54.0], seed=1, distill_epsilon=0.1, models=("convnet", "mlp")),
        run(tmp_path / "c", [60.0, 64.0], seed=0, distill_epsilon=0.3),
    ]
    rows, text = shown(capsys, *folders, "--out", tmp_path / "out")
    assert rows["trained on"] == ["convnet", "mlp"]
    assert r"$52.0 \pm 0.0$ & $52.0 \pm 2.8$ (1 of 2) \\" in (tmp_path / "out" / "table.tex").read_text()
    assert rows["ddpp, epsilon 0.1"] == ["52.0 ± 0.0", "52.0 ± 2.8 (1 of 2 distillations)"]
    assert rows["ddpp, epsilon 0.3"] == ["62.0 ± 2.8", "not run"]
    assert "over 2 distillations, each the mean of 2 networks trained from scratch (in " in text
    assert "2 networks trained from scratch (in `ddpp, epsilon 0.3`)" in text


def test_what_tells_methods_apart_alone_stands_under_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [
        run(tmp_path / "a", [50.0, 54.0], distill_epsilon=0.1, distill_steps=30),
        run(tmp_path / "b", [50.0, 54.0], distill_epsilon=0.3, distill_steps=30),
        run(tmp_path / "c", [50.0, 54.0], distill_method="dm", distill_steps=40),
    ]
    rows, text = shown(capsys, *folders)
    assert list(rows)[2:5] == ["ddpp, epsilon 0.1", "ddpp, epsilon 0.3", "dm"]
    assert "Of ddpp: steps 30." in text and "Of dm: steps 40, epsilon 0.1." in text


@pytest.mark.parametrize(
    ("option", "values", "names"),
    [
        ("distill_ipc", (1, 10), ("ipc 1", "ipc 10")),
        ("data_zca", (True, False), ("zca", "no-zca")),
        ("evaluate_epochs", (7, 300), ("evaluate-epochs 7", "evaluate-epochs 300")),
        ("evaluate_optimizer", ("sgd", "adam"), ("evaluate-optimizer sgd", "evaluate-optimizer adam")),
        ("evaluate_lr", (None, 0.5), ("evaluate-lr by default", "evaluate-lr 0.5")),
        ("evaluate_select", ("final", "val"), ("evaluate-select final", "evaluate-select val")),
        ("data_classes", (("cat", "dog"), ()), ("classes cat dog", "classes by default")),
    ],
)
def test_data_and_evaluation_differ_never_silently(
    option: str, values: tuple[Any, Any], names: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of different methods too, and in the rows of real images if these depend on it."""
    data_of_each = ("first", "second") if option.startswith("data") else ("same", "same")
    folders = [
        run(tmp_path / method, [50.0, 54.0], data=data, distill_method=method, **{option: value})
        for method, value, data in zip(("mtt", "ddpp"), values, data_of_each, strict=True)
    ]
    rows, text = shown(capsys, *folders)
    assert {f"mtt, {names[0]}", f"ddpp, {names[1]}"} <= set(rows)
    of_random = {name for name in rows if name.startswith("random")}
    of_full = {name for name in rows if name.startswith("all real")}
    apart = {f"random real images, {name}" for name in names}
    assert of_random == ({"random real images"} if option == "evaluate_select" else apart)
    assert of_full == ({f"all real data, {n}" for n in names} if option.startswith("data") else {"all real data"})
    if option == "evaluate_select":
        assert "best on held-out training images (in `ddpp, evaluate-select val`)" in text


def test_random_images_are_shared_at_one_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dm = run(tmp_path / "dm", [50.0, 54.0], distill_method="dm")
    dc = run(tmp_path / "dc", [40.0, 44.0], distill_method="dc")
    alone = run(tmp_path / "r", [20.0, 22.0], distill_method="random")
    ddpp = run(tmp_path / "ddpp", [60.0, 64.0], rate=0.07, random=[30.0, 32.0])
    rows, _ = shown(capsys, dm, dc, alone)
    assert list(rows)[1:] == ["random real images", "dm", "dc", "all real data"]
    rows, _ = shown(capsys, dm, dc, alone, ddpp)
    assert rows["random real images, rate 0.02"] == ["21.0 ± 1.4"]
    assert rows["random real images beside ddpp"] == ["31.0 ± 1.4"]
    assert list(rows)[2:] == ["dm", "dc", "ddpp", "random real images beside ddpp", "all real data"]


def test_random_images_of_one_evaluations_seed_count_once_only_at_one_rate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the order of the runs."""
    folders = []
    for seed, (random, rate) in enumerate((([20.0, 22.0], 0.02), ([30.0, 32.0], 0.03), ([20.0, 22.0], 0.02))):
        folder = run(tmp_path / str(seed), [50.0, 54.0], seed=seed, random=random, rate=rate)
        results = json.loads((folder / "results.json").read_text())
        results["config"]["run"]["seed"] = 7  # of the evaluation
        runs.write_json(folder / "evaluation.json", results)
        folders.append(folder)
    for order in (folders, folders[::-1]):
        rows, _ = shown(capsys, *order, "--evaluated")
        assert rows["random real images"] == ["26.0 ± 7.1"] and rows["ddpp"] == ["52.0 ± 0.0"]  # of 21 and 31


def test_methods_of_other_plugins_are_other_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [run(tmp_path / name, [50.0, 54.0], seed=i, run_plugins=(name,)) for i, name in enumerate("ab")]
    assert {"ddpp, plugin a", "ddpp, plugin b"} <= set(shown(capsys, *folders)[0])


def test_a_plugin_is_known_by_its_code_and_not_by_its_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And a method of one leaves networks on real images what they are."""

    def of(name: str, code: dict[str, str], **options: Any) -> Path:
        folder = run(tmp_path / name, [50.0, 54.0], run_plugins=(name,), distill_method="mtt", **options)
        runs.write_json(folder / "data.json", {"plugins": code})
        return folder

    own = {"method": "0123456789"}
    same = [of("a", own, seed=0), of("b", own, seed=1), run(tmp_path / "c", [60.0, 64.0])]
    rows, _ = shown(capsys, *same)
    assert list(rows)[1:] == ["random real images", "mtt", "ddpp", "all real data"]
    rows, _ = shown(capsys, *same, of("d", {"method": "987654321"}, seed=2))
    assert {"mtt, plugin 01234567", "mtt, plugin 98765432", "all real data"} <= set(rows)
    rows, _ = shown(capsys, *same, of("e", {**own, "model": "abcdefabcd"}, seed=2))
    assert {"mtt, plugin by default", "mtt, plugin abcdefab", "all real data, plugin abcdefab"} <= set(rows)


def test_random_images_are_those_of_one_teachers_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = {"evaluate_labels": "teacher", "teachers_count": 1}
    few = [run(tmp_path / f"{m}", [50.0, 54.0], distill_method=m, **asked) for m in ("rded", "sre2l")]
    own = run(tmp_path / "own", [50.0, 54.0], distill_method="dm", teachers_epochs=3)
    other = run(tmp_path / "other", [50.0, 54.0], distill_method="random", teachers_epochs=9, **asked)
    rows, _ = shown(capsys, *few, own, other)
    assert [name for name in rows if name.startswith("random")] == [
        "random real images, teachers-epochs 7, evaluate-labels teacher",
        "random real images, evaluate-labels own",
        "random real images, teachers-epochs 9, evaluate-labels teacher",
    ]


def test_all_real_data_that_only_some_runs_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As in a folder of ddpp.reproduce, whose other runs share it; no two rows of it look alike."""
    folders = [
        run(tmp_path / f"{seed}", [50.0, 54.0], seed=seed, evaluate_full_epochs=epochs)
        for seed, epochs in ((0, 30), (1, 0))
    ]
    rows, text = shown(capsys, *folders)
    assert list(rows)[1:] == ["random real images", "ddpp", "all real data"]
    assert rows["all real data"] == ["91.0 ± 1.4"] and "evaluate-full-epochs 30" in text
    assert "2 networks trained from scratch (in `all real data`)" in text
    rows, _ = shown(capsys, *folders, run(tmp_path / "2", [50.0, 54.0], seed=2, evaluate_full_epochs=40))
    assert list(rows)[3:] == ["all real data, evaluate-full-epochs 30", "all real data, evaluate-full-epochs 40"]


def test_folders_of_different_images_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cats = run(tmp_path / "a", [50.0, 54.0], data="cats", data_dataset="folder", data_data_root="cats")
    dogs = run(tmp_path / "b", [60.0, 64.0], data="dogs", data_dataset="folder", data_data_root="dogs")
    rows, _ = shown(capsys, cats, dogs)
    assert {"ddpp, data-root cats", "ddpp, data-root dogs"} <= set(rows)
    grown = run(tmp_path / "c", [70.0, 74.0], data="more cats", data_dataset="folder", data_data_root="cats")
    assert f"{cats} and {grown} have different data by the same options; make a table of each" in refused(
        capsys, cats, dogs, grown
    )


def test_names_are_text_in_every_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [
        run(tmp_path / name, [50.0, 54.0], distill_method="given", distill_given=(name,)) for name in ("a|b", "50%_&")
    ]
    assert table.main([*map(str, folders), "--out", str(tmp_path / "out")]) == 0
    assert r"| given, given a\|b | 52.0 ± 2.8 |" in capsys.readouterr().out
    assert r"given, given 50\%\_\& & $52.0" in (tmp_path / "out" / "table.tex").read_text()


def test_runs_that_would_count_twice_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, copy = run(tmp_path / "a", [50.0, 54.0]), run(tmp_path / "b", [50.0, 54.0])
    assert f"{first} is named twice" in refused(capsys, first, first)
    assert f"{first} and {copy} are one run, of the same options and seed 0" in refused(capsys, first, copy)


def test_what_is_no_finished_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(tmp_path / "a", [50.0, 54.0])
    assert f"{tmp_path}/b is no run folder of ddpp.distill; check its name" in refused(capsys, folder, tmp_path / "b")
    message = refused(capsys, folder, "--evaluated")
    assert f"{folder} holds no evaluation.json: it was not evaluated; do so with ddpp.evaluate {folder}" in message
    old = json.loads((folder / "results.json").read_text())
    del old["config"]
    runs.write_json(folder / "results.json", old)
    message = refused(capsys, folder)
    assert "results.json is of an earlier version" in message
    assert f"evaluate the run again with ddpp.evaluate {folder}, and give --evaluated" in message
    (folder / "results.json").unlink()
    assert f"it is no finished run; continue it with ddpp.distill --out {folder} --resume" in refused(capsys, folder)


@pytest.mark.parametrize("found", [{}, {"config": {}}])
@pytest.mark.parametrize(
    ("name", "more", "again"),
    [("results.json", [], "ddpp.distill --out {} --resume"), ("evaluation.json", ["--evaluated"], "ddpp.evaluate {}")],
)
def test_results_that_lack_figures_are_one_line(
    name: str, more: list[str], again: str, found: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(tmp_path / "a", [50.0, 54.0])
    runs.write_json(folder / name, found)
    line = refused(capsys, folder, *more)
    assert f"{folder}/{name} does not tell models, protocol: damaged, or of another version" in line
    assert f"run {again.format(folder)} again" in line


def test_runs_of_ddpp(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Distilled, evaluated anew, and shown with the figures that these stages wrote."""
    tiny = ["--method", "dm", "--width", "8", "--threads", "1", "--real-batch", "8", "--steps", "2"]
    tiny += ["--evaluate-networks", "2", "--evaluate-epochs", "2", "--evaluate-full-epochs", "0"]
    folders = [tmp_path / f"dm-{seed}" for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        assert distill.main([*tiny, "--seed", str(seed), "--out", str(folder)]) == 0
        again = ["--models", "mlp", "--networks", "2", "--epochs", "1", "--select", "all", "--search-lr"]
        assert evaluate.main([str(folder), *again, "--full-epochs", "1"]) == 0
    capsys.readouterr()
    for stage, options in (("results.json", []), ("evaluation.json", ["--evaluated"])):
        found = [runs.read_json(folder / stage)["accuracy"] for folder in folders]
        rows, _ = shown(capsys, *folders, *options)
        for name, condition in (("dm", "dm"), ("random real images", "random")):
            means = [accuracy[condition]["mean"] for accuracy in found]
            assert rows[name] == [f"{statistics.fmean(means):.1f} ± {statistics.stdev(means):.1f}"]
    assert {"dm (best on test, as papers do: too high)", "dm (searched rate)", "all real data"} <= set(rows)


def test_the_runs_of_a_table_of_the_paper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = {"run": {"threads": 1}, "distill": {"steps": 2}, "evaluate": {"epochs": 2, "networks": 2, "full_epochs": 1}}
    monkeypatch.setattr(reproduce, "QUICK", {1: {**tiny, "model": {"width": 8}}})
    argv = ["table1", "--methods", "random", "herding", "--ipc", "1"]
    assert reproduce.main([*argv, "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    rows, _ = shown(capsys, *sorted(path.parent for path in tmp_path.rglob("results.json")))
    assert list(rows) == ["trained on", "random real images", "herding", "all real data"]
