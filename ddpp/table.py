"""STAGE 5: one table of any finished runs, as ablations and papers need it.

``python -m ddpp.table runs/epsilon-0.1-seed0 runs/epsilon-0.1-seed1 runs/epsilon-0.3-seed0 --out tables/epsilon``
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ddpp import accuracies, cli, runs
from ddpp.accuracies import OF_OTHER_ROWS, Row
from ddpp.config import Config
from ddpp.errors import UserError

# What two runs of one row may differ in, beside options of other rows: seed, machine, and where teachers are kept.
_OF_NO_ROW = {"run.seed", *runs.OF_THE_MACHINE}
_ROOT = "data.data_root"
# Told in any case, and told elsewhere: by names, columns and the protocol.
_ALWAYS = {"data.dataset", "distill.ipc", "model.model", "evaluate.epochs", "evaluate.full_epochs"}
_ELSEWHERE = {"distill.method", *(f"evaluate.{name}" for name in ("models", "augmentations", "networks", "select"))}
# Options of an evaluation that networks on real images are trained by.
_ON_REAL = ("networks", "momentum", "weight_decay", "batch")
_ON_FEW = (*_ON_REAL, "epochs", "lr", "optimizer", "labels", "temperature", "cutmix")
_ON_RANDOM = {"distill.ipc", *(f"evaluate.{name}" for name in _ON_FEW)}
_ON_FULL = {f"evaluate.{name}" for name in (*_ON_REAL, "full_epochs", "full_lr", "full_weight_decay")}

Options = dict[str, Any]  # by section.name


class Table(NamedTuple):
    """What runs show together."""

    columns: list[str]  # architectures
    rows: list[Row]
    text: str  # in Markdown, with the protocol


@dataclass(frozen=True, eq=False)
class _Run:
    folder: Path
    results: dict[str, Any]
    options: Options

    @property
    def method(self) -> str:
        return str(self.options["distill.method"])

    def figure(self, model: str, condition: str) -> accuracies.Figure:
        return self.results["models"].get(model, {}).get(condition)

    def has(self, condition: str) -> bool:
        return any(self.figure(model, condition) for model in self.results["models"])

    def rates(self, condition: str) -> set[str]:
        """The learning rates of networks on random real images: the run's own, or what was searched for a model."""
        settings, found = self.options, set()
        given = settings["distill.step_size"] if settings["evaluate.lr"] is None else settings["evaluate.lr"]
        for model in self.results["models"]:
            if figure := self.figure(model, condition):
                learned = (self.figure(model, self.method) or {}).get("lr", given)
                found.add(f"{figure['lr']:.6g} of {model}" if "lr" in figure else f"{learned:.6g}")
        return found


_Group = list[_Run]  # that differ in nothing but the seed


@dataclass(frozen=True)
class _Line:
    """A row before it is filled: of which runs, and what networks were trained on."""

    name: str
    condition: str
    runs: list[_Run]

    @property
    def real(self) -> bool:
        return _trained_on(self.condition) in ("random", "full")

    @property
    def distillations(self) -> int:
        return len({self._counted(run) for run in self.runs})

    def figure(self, model: str) -> accuracies.Figure:
        found: dict[Any, accuracies.Figure] = {}
        for run in self.runs:
            if figure := run.figure(model, self.condition):
                found.setdefault(self._counted(run), figure)
        return accuracies.merged(list(found.values()))

    def _counted(self, run: _Run) -> Any:
        """Runs count once for each; networks on real images of the same evaluation's seed and rate are the same."""
        evaluated = run.results["config"]["run"]["seed"]
        if self.condition == "full":
            return evaluated
        return (evaluated, frozenset(run.rates(self.condition))) if self.real else run.results["seed"]


def make(folders: Sequence[Path], *, evaluated: bool = False) -> Table:
    """A row for each set of runs that differ in nothing but the seed, named by the options in which rows differ.

    A row of several runs has mean and standard deviation over distillations, each of which counts with the mean over
    its networks; a row of one run has them over its networks. Options that belong to a method differ between methods:
    where they do so between methods alone, they stand under the table and not in the names.

    Networks on real images are trained alike for all runs of the same data, evaluation and, where their number is that
    of the synthetic ones, images per class: these share a row. Random real images are trained on at a run's own rate:
    where rates differ, rows of one rate share a row, and a row that has learned its own has random images beside it.

    Args:
        evaluated: by what ``python -m ddpp.evaluate`` has written last of each run, not by the runs' own results.

    Raises:
        UserError: a run twice, an unfinished one or one of an earlier version, or different data by the same options.
    """
    groups = _groups(_read(folders, evaluated))
    everything = [run for group in groups for run in group]
    columns = list(dict.fromkeys(model for run in everything for model in run.results["models"]))
    lines = _lines(groups)
    rows = [Row(line.name, [line.figure(model) for model in columns]) for line in lines]
    body = [
        [line.name, *(accuracies.figure_text(figure, line.distillations) for figure in row.figures)]
        for row, line in zip(rows, lines, strict=True)
    ]
    told = "\n\n".join([_protocol(lines), _in_all_rows(everything), *_of_methods(groups)])
    return Table(columns, rows, "\n".join([*accuracies.markdown(["trained on", *columns], body), "", told]))


def _read(folders: Sequence[Path], evaluated: bool) -> list[_Run]:
    seen: set[Path] = set()
    for folder in folders:
        if folder.resolve() in seen:
            raise UserError(f"{folder} is named twice, which would count as two distillations; name it once")
        seen.add(folder.resolve())
    found = [accuracies.read(folder, evaluated) for folder in folders]
    ignored = _OF_NO_ROW - ({_ROOT} if _several_data(found, ignoring=_ROOT) else set())
    if several := _several_data(found):
        first, second = (folders[i] for i in several)
        raise UserError(f"{first} and {second} have different data by the same options; make a table of each")
    return [
        _Run(folder, results, {name: value for name, value in _options(results).items() if name not in ignored})
        for folder, results in zip(folders, found, strict=True)
    ]


def _options(results: dict[str, Any]) -> Options:
    """With the code of plugins in place of where it stood, which runs of earlier versions alone tell."""
    found = {f"{section}.{name}": value for section, t in results["config"].items() for name, value in t.items()}
    code = {what: digest[:8] for what, digest in results["plugins"].items()} if "plugins" in results else None
    code = {"method": " ".join(found["run.plugins"]) or None} if code is None else code
    return {**found, "distill.plugin": code.get("method"), "model.plugin": code.get("model")}


def _several_data(found: Sequence[dict[str, Any]], ignoring: str = "") -> tuple[int, int] | None:
    """Two results whose data differ though their options of the data do not."""
    first: dict[tuple[Any, ...], int] = {}
    for i, results in enumerate(found):
        same = [(name, value) for name, value in _options(results).items() if name.startswith("data.")]
        j = first.setdefault(tuple(pair for pair in same if pair[0] not in (ignoring, "data.download")), i)
        if found[j]["fingerprint"] != results["fingerprint"]:
            return j, i
    return None


def _groups(found: Sequence[_Run]) -> list[_Group]:
    groups: dict[tuple[Any, ...], dict[int, _Run]] = {}
    for run in found:
        own = tuple(value for name, value in run.options.items() if name not in OF_OTHER_ROWS)
        seed = run.results["seed"]
        other = groups.setdefault(own, {}).setdefault(seed, run)
        if other is not run:
            raise UserError(
                f"{other.folder} and {run.folder} are one run, of the same options and seed {seed}, and would count as "
                "two distillations; name one of them, or distil with another --seed"
            )
    return [list(group.values()) for group in groups.values()]


def _lines(groups: Sequence[_Group]) -> list[_Line]:
    """Random real images that groups share, the groups with those of their own, and all real data."""
    everything, names = [run for group in groups for run in group], _names(groups)
    conditions = list(dict.fromkeys(c for run in everything for t in run.results["models"].values() for c in t))
    lines, beside = _random(groups, names, [c for c in conditions if _trained_on(c) == "random"])
    for i, group in enumerate(groups):
        own = [c for c in conditions if _trained_on(c) == group[0].method and any(run.has(c) for run in group)]
        lines += [_Line(_named(c, names[i]), c, group) for c in own if group[0].method != "random"]
        lines += beside.get(i, [])
    for alike in _trained_alike(everything, "full"):
        lines.append(_Line(_of_real(everything, alike[0], "full"), "full", alike))
    return lines


def _trained_on(condition: str) -> str:
    return condition.partition("/")[0]


def _named(condition: str, name: str) -> str:
    """The name of a group, which begins with its method, with how its condition was chosen."""
    return runs.condition_name(condition) + name.removeprefix(_trained_on(condition))


def _random(
    groups: Sequence[_Group], names: Sequence[str], conditions: Sequence[str]
) -> tuple[list[_Line], dict[int, list[_Line]]]:
    """Lines of random real images that groups share, and by a group's place those that are beside it alone."""
    everything = [run for group in groups for run in group]
    place = {run: i for i, group in enumerate(groups) for run in group}
    shared, beside = [], defaultdict(list)
    for condition in conditions:
        for alike in _trained_alike(everything, condition):
            name, by_rates = _of_real(everything, alike[0], condition), defaultdict(list)
            for i in dict.fromkeys(place[run] for run in alike):
                by_rates[frozenset[str]().union(*(run.rates(condition) for run in groups[i]))].append(i)
            for rates, places in by_rates.items():
                first, found = places[0], [run for i in places for run in groups[i]]
                if len(by_rates) == 1:
                    shared.append(_Line(name, condition, found))
                elif len(places) > 1 or groups[first][0].method == "random":
                    shared.append(_Line(f"{name}, rate {' and '.join(sorted(rates))}", condition, found))
                else:
                    told = f"{runs.condition_name(condition)} beside {names[first]}"
                    beside[first].append(_Line(told, condition, found))
    return shared, beside


def _trained_alike(found: Sequence[_Run], condition: str) -> list[list[_Run]]:
    """Those that have a condition of real images, by the options that its networks are trained by."""
    recipes: dict[tuple[Any, ...], list[_Run]] = {}
    for run in found:
        if run.has(condition):
            recipe = tuple(value for name, value in run.options.items() if _is_of(condition, name, run))
            recipes.setdefault(recipe, []).append(run)
    return list(recipes.values())


def _is_of(condition: str, name: str, run: _Run) -> bool:
    """Whether an option reaches a run's networks of a condition of real images."""
    section = name.partition(".")[0]
    if section in ("data", "model", "augment", "run"):
        return True
    if section == "teachers":  # of which the first alone is asked
        asked = run.options["evaluate.labels"] == "teacher" and condition not in ("full", "random/own")
        return asked and name != "teachers.count"
    return name in (_ON_FULL if condition == "full" else _ON_RANDOM)


def _of_real(everything: Sequence[_Run], run: _Run, condition: str) -> str:
    """A line's name, with those of its options that are others in another run."""
    pools = {name: _that_read(everything, name) for name in run.options if _is_of(condition, name, run)}
    return _with(runs.condition_name(condition), run, [name for name, pool in pools.items() if _differs(pool, name)])


def _that_read(found: Sequence[_Run], name: str) -> list[_Run]:
    """The runs that an option says something of: those of all real data, where it was trained on."""
    return [run for run in found if name not in OF_OTHER_ROWS or run.has("full")]


def _differs(found: Sequence[_Run], name: str) -> bool:
    return len({run.options[name] for run in found}) > 1


def _names(groups: Sequence[_Group]) -> list[str]:
    """Method and options: any in which groups differ, but a method's own only if groups of that method do."""
    names = []
    for first in (group[0] for group in groups):
        differing = _differing([group[0] for group in groups])
        among = _differing([group[0] for group in groups if group[0].method == first.method])
        names.append(_with(first.method, first, [n for n in differing if n in among or not _is_method_s(n)]))
    return names


def _differing(found: Sequence[_Run]) -> list[str]:
    told = {"distill.method", *OF_OTHER_ROWS}
    return [name for name in found[0].options if name not in told and _differs(found, name)]


def _is_method_s(name: str) -> bool:
    return name.partition(".")[0] in ("distill", "teachers") and name != "distill.ipc"


def _with(first: str, run: _Run, names: Iterable[str]) -> str:
    return ", ".join([first, *(_option_text(name, run.options[name]) for name in names)])


def _option_text(name: str, value: Any) -> str:
    """An option as ddpp.distill takes it, without dashes."""
    section, _, option = name.partition(".")
    flag = cli.flag(section, option, "distill")
    if isinstance(value, bool):
        return flag if value else f"no-{flag}"
    if value is None or value == ():
        return f"{flag} by default"
    text = " ".join(value) if isinstance(value, tuple) else str(value)
    return f"{flag} {text.removesuffix('.0') if isinstance(value, float) else text}"


def _protocol(lines: Sequence[_Line]) -> str:
    """What means and deviations are over, and which snapshot was evaluated."""
    over, chosen = defaultdict(list), defaultdict(list)
    for line in lines:
        options = line.runs[0].options
        spread = runs.spread_text(options["evaluate.networks"], line.distillations)
        over[spread + runs.answers_text(line.runs[0].results["protocol"])].append(line.name)
        if not line.real:
            chosen[runs.selection_text(options["evaluate.select"])].append(line.name)
    images = f"; synthetic images of {_each(chosen)}" if chosen else ""
    by_seed = any(line.real and line.distillations > 1 for line in lines)
    real = " Networks on real images count by their seed as those of a distillation do." if by_seed else ""
    ddof = lines[0].runs[0].results["protocol"]["ddof"]
    return f"Test accuracy in percent, mean ± standard deviation (ddof {ddof}) over {_each(over)}{images}.{real}"


def _each(texts: dict[str, list[str]]) -> str:
    """A text, or where there are several each with the rows that it is of."""
    if len(texts) == 1:
        return next(iter(texts))
    return "; ".join(f"{text} (in {', '.join(f'`{name}`' for name in names)})" for text, names in texts.items())


def _in_all_rows(everything: Sequence[_Run]) -> str:
    usual, told = _options({"config": asdict(Config())}), []
    for name in everything[0].options:
        values = {run.options[name] for run in _that_read(everything, name)}
        if len(values) == 1 and name not in _ELSEWHERE and (name in _ALWAYS or values != {usual[name]}):
            told.append(_option_text(name, values.pop()))
    return (
        f"In all rows: {', '.join(told)}. Other options have their defaults, but for seeds, folders and the machine's."
    )


def _of_methods(groups: Sequence[_Group]) -> list[str]:
    """Options that tell methods apart and not the rows of one."""
    firsts = [group[0] for group in groups]
    lines = []
    for method in dict.fromkeys(run.method for run in firsts):
        own = [run for run in firsts if run.method == method]
        names = [name for name in _differing(firsts) if _is_method_s(name) and not _differs(own, name)]
        if names:
            lines.append(f"Of {method}: {', '.join(_option_text(name, own[0].options[name]) for name in names)}.")
    return lines


def _write(table: Table, folder: Path) -> None:
    runs.write_text(folder / "table.md", f"{table.text}\n")
    runs.write_text(folder / "table.csv", accuracies.csv_text(table.rows, table.columns))
    runs.write_text(folder / "table.tex", accuracies.latex(table.rows, table.columns))


def _run(config: Config, args: argparse.Namespace) -> None:
    table = make([Path(name) for name in args.folders], evaluated=args.evaluated)
    print(table.text)
    if args.out:
        _write(table, Path(args.out))
        print(f"\nwritten: {args.out}/table.md, table.csv, table.tex")


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders", nargs="+", metavar="RUN", help="Finished runs; those that differ by seed share a row."
    )
    parser.add_argument(
        "--evaluated",
        action="store_true",
        help="Show what ddpp.evaluate has written last of each run, its evaluation.json.",
    )
    parser.add_argument("--out", metavar="DIR", help="Also write table.md, table.csv and table.tex there.")


def main(argv: Sequence[str] | None = None) -> int:
    description = "Show finished runs in one table: a row for each set of runs that differ in nothing but the seed."
    return cli.run("table", description, "table", (), _run, argv, arguments=_arguments)


if __name__ == "__main__":
    sys.exit(main())
