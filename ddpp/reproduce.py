"""STAGE 5: the tables of the paper (DDPP, arXiv 2209.14609), every method distilled and evaluated alike.

``python -m ddpp.reproduce table1 --budget quick --out runs/table1``

A cell is a run folder of :mod:`ddpp.distill`. A finished one is kept, a cut one resumed, a missing one run.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import shlex
import sys
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib import figure as pictures
from matplotlib.image import imread

from ddpp import accuracies, cli, compare, data, distill, runs
from ddpp import config as configuration
from ddpp.accuracies import Row
from ddpp.config import Config, DataConfig
from ddpp.errors import UserError
from ddpp.methods import METHODS

WIDTHS = ("convnet:128", "convnet:1024")
ARCHITECTURES = ("convnet", "alexnet", "vgg11", "resnet18")
QUICK = {  # by images per class, over the method's quick preset: one run is a minute or two on two cores
    1: {"evaluate": {"epochs": 300}},
    10: {"distill": {"batch": 25, "steps": 100}, "evaluate": {"epochs": 100}},
    50: {"distill": {"batch": 50, "steps": 60}, "evaluate": {"epochs": 40}},
}


Given = dict[str, dict[str, Any]]  # by section and option


@dataclass(frozen=True)
class Table:
    """What a target shows."""

    title: str
    methods: tuple[str, ...]
    ipcs: tuple[int, ...]
    architectures: tuple[str, ...] = ()
    search_lr: bool = False


SECTIONS = ("data", "evaluate", "run")  # whose options reach every run
_NOT_OF_THE_PAPER = ("given", "bptt", "rded", "sre2l")  # whose tables the targets are
# What does not change a figure, or is trained for one cell of a table alone.
_MAY_DIFFER = (*runs.OF_THE_MACHINE, "evaluate.full_epochs")
TARGETS = {
    "table1": Table(
        "Test accuracy by images per class",
        tuple(n for n in METHODS.names() if n not in _NOT_OF_THE_PAPER),
        (1, 10, 50),
    ),
    "table2": Table("Test accuracy on ConvNets of two widths", ("kip", "mtt", "ddpp"), (1,), WIDTHS),
    "table3": Table("Test accuracy on other architectures", ("dsa", "mtt", "ddpp"), (10,), ARCHITECTURES, True),
    "figure2": Table("Images distilled with MTT and DDPP", ("mtt", "ddpp"), (1,)),
}


@dataclass(frozen=True)
class Cell:
    """One run of the table."""

    method: str
    ipc: int
    seed: int
    folder: Path
    full: bool  # also trained on all real data, which is the same for all

    @property
    def name(self) -> str:
        return f"{self.method}, {self.ipc} images per class, seed {self.seed}"

    @property
    def results(self) -> dict[str, Any] | None:
        path = self.folder / "results.json"
        return runs.read_json(path) if path.is_file() else None


def reproduce(target: Table, cells: Sequence[Cell], config: Config, budget: str, given: Given) -> list[str]:
    """Runs what is missing. A run that fails does not stop the others, and one that another process runs is waited for.

    Returns:
        What failed, one line each.

    Raises:
        UserError: a run that is there has other options.
    """
    wanted, failed = {}, []
    for cell in cells:
        try:
            wanted[cell] = _configuration(target, cell, config, budget, given)
        except UserError as e:
            failed.append(str(e))
            continue
        if (cell.folder / "config.toml").is_file():
            runs.check_same_run(cell.folder, wanted[cell], _MAY_DIFFER)
            _check_data(cell, wanted[cell])
    began, total = time.perf_counter(), sum(cell.results is None for cell in wanted)
    tried: set[Cell] = set()
    waiting = False
    while missing := [cell for cell in wanted if cell not in tried and cell.results is None]:
        free = next((cell for cell in missing if not _in_use(cell)), None)
        if free is None:
            if not waiting:
                print(f"\nwaiting for other processes: {'; '.join(cell.name for cell in missing)}", flush=True)
            waiting = True
            time.sleep(1)
            continue
        print(_headline(free, total - len(missing), total, time.perf_counter() - began), flush=True)
        code = distill.main(_arguments_of(free, wanted[free]))
        if code >= 128:
            raise runs.Stopped(f"stopped in {free.folder}; the same command continues", code - 128)
        if code not in (0, cli.IN_USE):
            tried.add(free)
            failed.append(f"{free.name}: exit code {code}, see above")
    return failed


def _check_data(cell: Cell, settings: Config) -> None:
    """Refuses a finished run of other data where --data-root names another place than its own."""
    saved = runs.saved_config(cell.folder)
    if cell.results and saved.data.data_root != settings.data.data_root:
        runs.check_same_data(cell.folder, runs.read_json(cell.folder / "data.json"), _fingerprint(settings.data))


@functools.cache
def _fingerprint(settings: DataConfig) -> str:
    return data.load(settings).fingerprint


def _headline(cell: Cell, done: int, total: int, seconds: float) -> str:
    remaining = f", about {seconds / done * (total - done) / 60:.0f} min left" if done else ""
    return f"\n[{done + 1}/{total}] {cell.name}{remaining}"


def _in_use(cell: Cell) -> bool:
    """Whether another process runs or evaluates it."""
    if not cell.folder.is_dir():
        return False
    with (
        runs.claimed(runs.lock_of(cell.folder, "distill")) as to_run,
        runs.claimed(runs.lock_of(cell.folder, "evaluate")) as to_evaluate,
    ):
        return not (to_run and to_evaluate)


def _configuration(target: Table, cell: Cell, config: Config, budget: str, given: Given) -> Config:
    """The options of a cell: of its preset, of the budget and of the target, then those given."""
    values = _preset(cell, config, budget)
    values.setdefault("distill", {}).update(method=cell.method, ipc=cell.ipc)
    if budget == "quick":
        for section, table in QUICK.get(cell.ipc, {}).items():
            values.setdefault(section, {}).update(table)
        values.setdefault("evaluate", {}).update({} if cell.full else {"full_epochs": 0})
    if target.architectures:
        values.setdefault("evaluate", {}).update(models=list(target.architectures), search_lr=target.search_lr)
    settings = Config().with_values(values, cell.name).with_values(given, "reproduce")
    return settings.with_values({"run": {"seed": cell.seed}}, "--seeds")


def _arguments_of(cell: Cell, settings: Config) -> list[str]:
    """The command line of :mod:`ddpp.distill`. One that was cut goes on with this process's options of the machine."""
    resume = (cell.folder / "config.toml").is_file()
    if resume:
        machine: Given = {}
        for section, name in (option.split(".") for option in runs.OF_THE_MACHINE):
            if section not in SECTIONS:
                continue  # a run knows its teachers
            machine.setdefault(section, {})[name] = getattr(getattr(settings, section), name)
        settings = runs.saved_config(cell.folder).with_values(machine, "reproduce")
    file = cell.folder.parent / f"{cell.folder.name}.toml"
    runs.write_text(file, settings.to_toml())
    return ["--config", str(file), "--out", str(cell.folder), *(["--resume"] if resume else [])]


def _preset(cell: Cell, config: Config, budget: str) -> dict[str, dict[str, Any]]:
    """The settings of a cell. Quick ones of a folder suit other colour images too.

    A selection, which has no preset, goes by those of DDPP's teachers and evaluation.

    Raises:
        UserError: there are none.
    """
    dataset, selects = config.data.dataset, hasattr(METHODS.get(cell.method), "choose")
    kinds = [f"{dataset}-quick", "folder-quick"] if budget == "quick" else [f"{dataset}-ipc{cell.ipc}"]
    for method, kind in itertools.product([cell.method, "ddpp"] if selects else [cell.method], kinds):
        if f"{method}-{kind}" in configuration.preset_names():
            values = configuration.read_preset(f"{method}-{kind}")
            values["data"]["dataset"] = dataset
            if method != cell.method:
                values.pop("distill")
            return values
    which = "quick" if budget == "quick" else "published"
    raise UserError(f"no {which} setting for {cell.method} on {dataset} with {cell.ipc} images per class")


def write(target: Table, cells: Sequence[Cell], folder: Path, dataset: str, command: str) -> str:
    """Writes ``table.md``, ``table.csv``, ``table.tex`` and ``table.png`` from the cells' results.

    Returns:
        The Markdown text.
    """
    columns = target.architectures or tuple(f"ipc {n}" for n in dict.fromkeys(cell.ipc for cell in cells))
    rows = _rows(target, cells, dataset)
    _draw(rows, columns, target.title, folder / "table.png")
    runs.write_text(folder / "table.csv", accuracies.csv_text(rows, columns))
    runs.write_text(folder / "table.tex", accuracies.latex(rows, columns))
    text = _markdown(rows, columns, target, cells, command)
    runs.write_text(folder / "table.md", text)
    return text


def _rows(target: Table, cells: Sequence[Cell], dataset: str) -> list[Row]:
    """One row for each method and protocol. Random images are taken from the run that its own method is."""
    published = tomllib.loads((resources.files("ddpp") / "published.toml").read_text(encoding="utf-8"))
    rows: list[Row] = []
    for method in dict.fromkeys(cell.method for cell in cells):
        own = [cell for cell in cells if cell.method == method]
        if target.architectures:
            theirs = published.get(f"{dataset}-architectures", {}).get(method, {})
            found = [(cell.results or {}).get("models", {}) for cell in own]
            keys = [method, "random", *([f"{method}/searched", "random/searched"] if target.search_lr else [])]
            for key in keys:
                figures = [
                    accuracies.merged([models.get(name, {}).get(key) for models in found])
                    for name in target.architectures
                ]
                shown = [theirs.get(name, "") if key == method else "" for name in target.architectures]
                rows.append(Row(_named(method, own) if key == method else _with(method, key), figures, shown))
            continue
        theirs, ipcs = published.get(dataset, {}).get(method, {}), dict.fromkeys(cell.ipc for cell in own)
        tables = [[(cell.results or {}).get("accuracy", {}) for cell in own if cell.ipc == ipc] for ipc in ipcs]
        for key in (method, f"{method}/own", f"{method}/test"):
            figures = [accuracies.merged([table.get(key) for table in of_seeds]) for of_seeds in tables]
            if key == method:
                rows.append(Row(_named(method, own), figures, [theirs.get(str(ipc), "") for ipc in ipcs]))
            elif any(figures):
                rows.append(Row(runs.condition_name(key), figures, [""] * len(ipcs)))
    if not target.architectures:
        first = next((cell for cell in cells if (cell.results or {}).get("accuracy", {}).get("full")), None)
        if first and first.results:
            count, seeds = len({cell.ipc for cell in cells}), {cell.seed for cell in cells}
            name = "all real data" if len(seeds) == 1 else f"all real data (networks of seed {first.seed})"
            rows.append(Row(name, [first.results["accuracy"]["full"]] * count, [""] * count))
    return rows


def _named(method: str, cells: Sequence[Cell]) -> str:
    asked = any((cell.results or {}).get("protocol", {}).get("labels") == "teacher" for cell in cells)
    return f"{method} (a teacher's answers)" if asked else method


def _with(method: str, condition: str) -> str:
    name = runs.condition_name(condition)
    return f"{name} beside {method}" if condition.startswith("random") else name


def _markdown(rows: list[Row], columns: Sequence[str], target: Table, cells: Sequence[Cell], command: str) -> str:
    papers, seeds = any(any(row.published) for row in rows), len({cell.seed for cell in cells})
    head, body = ["trained on", *columns], []
    if papers:
        head[1:] = [title for column in columns for title in (column, f"{column}, papers")]
    for name, figures, shown in rows:
        texts = [accuracies.figure_text(figure, seeds) for figure in figures]
        body.append([name, *(itertools.chain(*zip(texts, shown, strict=True)) if papers else texts)])
    finished = [cell.results for cell in cells if cell.results]
    networks = finished[0]["protocol"]["networks"] if finished else 0
    over = runs.spread_text(networks, seeds)
    minutes = sum(sum(found["seconds"].values()) for found in finished) / 60
    return "\n".join(
        [
            f"# {target.title}",
            "",
            *accuracies.markdown(head, body),
            "",
            f"Test accuracy in percent, mean ± standard deviation (ddof 1) over {over}, synthetic images of the last "
            "outer step unless a row says otherwise.",
            f"{len(finished)} of {len(cells)} runs, {minutes:.0f} minutes in all: `{command}`.",
            "",
            *_against_mtt(cells),
            "![the table](table.png)",
            "",
        ]
    )


def _against_mtt(cells: Sequence[Cell]) -> list[str]:
    """What pruning changes, where both methods were run: the difference of DDPP to MTT, with its interval."""
    lines: list[str] = []
    for ipc in dict.fromkeys(cell.ipc for cell in cells):
        done = {(c.method, c.seed): c.folder for c in cells if c.ipc == ipc and c.results}
        seeds = [seed for method, seed in done if method == "mtt" and ("ddpp", seed) in done]
        sides = ([done[method, seed] for seed in seeds] for method in ("mtt", "ddpp"))
        with contextlib.suppress(UserError):  # other options were given to one of them
            lines += compare.rows(compare.compare(*sides), f"{ipc} | ") if seeds else []
    head = ["ddpp - mtt, paired by the seed:", "", f"| images per class {compare.HEAD}", "|---" * 5 + "|"]
    return [*head, *lines, ""] if lines else []


def _draw(rows: list[Row], columns: Sequence[str], title: str, path: Path) -> None:
    """Bars of each row, grouped by column; a line a published figure."""
    figure = pictures.Figure(figsize=(max(7.0, 2.2 * len(columns) + 4), 4.2), layout="constrained")
    axis = figure.subplots()
    width = 0.85 / max(1, len(rows))
    colours = colormaps["tab20"]
    for i, (name, figures, _) in enumerate(rows):
        places = [column + (i - len(rows) / 2 + 0.5) * width for column in range(len(columns))]
        means, stds = ([f[key] if f else 0.0 for f in figures] for key in ("mean", "std"))
        axis.bar(places, means, width, yerr=stds, label=name, color=colours(i % 20), error_kw={"linewidth": 0.8})
    axis.set_xticks(range(len(columns)), columns)
    axis.set_ylabel("test accuracy, percent")
    axis.set_title(title)
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize="small")
    axis.grid(axis="y", alpha=0.3)
    runs.write_figure(path, figure)


def _draw_images(cells: Sequence[Cell], path: Path) -> None:
    """The runs' pictures above each other."""
    figure = pictures.Figure(figsize=(10, 3.2 * len(cells)), layout="constrained")
    axes = figure.subplots(len(cells), 1, squeeze=False)
    for axis, cell in zip(axes[:, 0], cells, strict=True):
        if (cell.folder / "images.png").is_file():
            axis.imshow(imread(cell.folder / "images.png"))
        axis.set_title(cell.name)
        axis.set_axis_off()
    runs.write_figure(path, figure)


def _run(config: Config, args: argparse.Namespace) -> None:
    given = _given(config, args)
    target = _as_given(TARGETS[args.target], given)
    methods = tuple(args.methods or target.methods)
    for name in methods:
        METHODS.get(name)
    dataset, ipcs = config.data.dataset, tuple(args.ipc or target.ipcs)
    seeds = tuple(dict.fromkeys(args.seeds or [config.run.seed]))
    if target.architectures and len(ipcs) > 1:
        raise UserError(f"{args.target} shows one number of images per class, got --ipc {' '.join(map(str, ipcs))}")
    folder = Path(args.out or f"runs/{args.target}-{dataset}-{args.budget}")
    wanted = list(itertools.product(methods, ipcs, seeds))
    cells = [
        Cell(
            method,
            ipc,
            seed,
            folder / f"{dataset}-{method}-ipc{ipc}-seed{seed}",
            full=not target.architectures and (method, ipc, seed) == wanted[0],
        )
        for method, ipc, seed in wanted
    ]
    failed = reproduce(target, cells, config, args.budget, given)
    print("\n" + write(target, cells, folder, dataset, _command(args, given)))
    if args.target == "figure2":
        _draw_images(cells, folder / "figure2.png")
    print(f"written: {folder}/table.md, table.csv, table.tex, table.png")
    if failed:
        raise UserError("some runs failed:\n  " + "\n  ".join(failed))


def _given(config: Config, args: argparse.Namespace) -> Given:
    """The options that were given, in whatever way."""
    given: Given = {}
    for section, name in (option.split(".") for option in sorted(args.given)):
        given.setdefault(section, {})[name] = getattr(getattr(config, section), name)
    return given


def _as_given(target: Table, given: Given) -> Table:
    """A table of architectures shows those that were asked for."""
    if not target.architectures:
        return target
    asked = given.get("evaluate", {})
    architectures = asked.get("models") or target.architectures
    return replace(target, architectures=architectures, search_lr=asked.get("search_lr", target.search_lr))


def _command(args: argparse.Namespace, given: Given) -> str:
    """The command line that gave a table."""
    words = ["python", "-m", "ddpp.reproduce", args.target, "--budget", args.budget]
    for name in ("methods", "ipc", "seeds"):
        words += [f"--{name}", *getattr(args, name)] if getattr(args, name) else []
    words += ["--out", args.out] if args.out else []
    for section, table in given.items():
        for name, value in table.items():
            flag = f"--{cli.flag(section, name, 'reproduce')}"
            if isinstance(value, bool):
                words.append(flag if value else flag.replace("--", "--no-", 1))
            else:
                words += [flag, *(value if isinstance(value, tuple) else [value])]
    return shlex.join(map(str, words))


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", choices=list(TARGETS), help="What to show.")
    parser.add_argument(
        "--budget", choices=("quick", "paper"), default="quick", help="Settings: minutes on two cores, or as published."
    )
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="By default the target's.")
    parser.add_argument(
        "--ipc", nargs="+", type=_positive, metavar="N", help="Images per class (default: the target's)."
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=_whole,
        metavar="N",
        help="Distillations of each cell, a seed each; the table then shows their spread (default: that of --seed).",
    )
    parser.add_argument("--out", metavar="DIR", help="Folder of the runs (default: runs/<target>-<dataset>-<budget>).")


def _whole(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    description = "Run what a table of the paper is missing and write the table beside the published figures."
    return cli.run("reproduce", description, "reproduce", SECTIONS, _run, argv, arguments=_arguments)


if __name__ == "__main__":
    sys.exit(main())
