"""STAGE 5: two sets of runs against each other, pair by pair: the difference and its interval.

``python -m ddpp.compare --first runs/mtt-seed0 runs/mtt-seed1 --second runs/ddpp-seed0 runs/ddpp-seed1``
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddpp import accuracies, cli, runs, scores
from ddpp.config import Config
from ddpp.errors import UserError
from ddpp.scores import Difference

_EQUAL = ("data", "model", "augment", "evaluate")  # sections that two runs must share to be compared
_MAY_DIFFER = (*runs.OF_THE_MACHINE, *accuracies.OF_OTHER_ROWS)
HEAD = "| network | second - first, points | 95 % interval | pairs |"


def compare(first: Sequence[Path], second: Sequence[Path], *, evaluated: bool = False) -> dict[str, Any]:
    """Second minus first in points of test accuracy, for each architecture that all runs evaluated.

    Network n of a run is paired with network n of the other: both began from the same weights and saw the same draws.
    Networks on one synthetic set tell of that set alone: of several runs a side, each pair counts once, with the mean
    over its networks, and the interval is one of distillations.

    Args:
        evaluated: by what ``python -m ddpp.evaluate`` has written last of each run, not by the runs' own results.

    Returns:
        ``difference`` by architecture: ``mean``, ``margin`` (half of the 95 % interval), ``pairs``; ``of``, what these
        are, "networks" or "distillations"; and ``score``, the mean LRS of each side on the first of these
        architectures, where all real data was trained on with hard labels.

    Raises:
        UserError: not as many runs on both sides, one of them twice, an unfinished run, or runs of different data,
            images a class or protocol, or without a common architecture; the message names what differs.
    """
    if len(first) != len(second):
        raise UserError(f"--first and --second must name as many runs, got {len(first)} and {len(second)}")
    for option, folders in (("--first", first), ("--second", second)):
        if len({path.resolve() for path in folders}) < len(folders):
            raise UserError(f"{option} names a run twice, which would count as two; name each once")
    sides = [[accuracies.read(path, evaluated) for path in paths] for paths in (first, second)]
    for a, b, *names in zip(*sides, first, second, strict=True):
        _check_alike(a, b, names)
    shared = _shared(dict(zip([*first, *second], [*sides[0], *sides[1]], strict=True)))
    differences = {}
    for name in shared:
        networks = [[_networks(run, name) for run in side] for side in sides]
        before, after = (found[0] if len(found) == 1 else list(map(statistics.fmean, found)) for found in networks)
        differences[name] = scores.paired_difference(before, after)._asdict()
    return {
        "first": [str(path) for path in first],
        "second": [str(path) for path in second],
        "difference": differences,
        "of": "networks" if len(first) == 1 else "distillations",
        "score": {name: _score(side, shared[0]) for name, side in zip(("first", "second"), sides, strict=True)},
    }


def _shared(found: dict[Path, dict[str, Any]]) -> list[str]:
    """The architectures that all runs evaluated, by folder, in the order of the first."""
    models = [run["models"] for run in found.values()]
    shared = [name for name in models[0] if all(name in others for others in models)]
    if not shared:
        each = "; ".join(f"{path}: {', '.join(run['models'])}" for path, run in found.items())
        raise UserError(f"no architecture was evaluated in all runs ({each}); evaluate one in all by ddpp.evaluate")
    return shared


def _check_alike(a: dict[str, Any], b: dict[str, Any], names: Sequence[Path]) -> None:
    between = f"{names[0]} and {names[1]} cannot be compared"
    if a["fingerprint"] != b["fingerprint"]:
        raise UserError(f"{between}: they were distilled from different data")
    ipcs = a["config"]["distill"]["ipc"], b["config"]["distill"]["ipc"]
    if ipcs[0] != ipcs[1]:
        raise UserError(f"{between}: {ipcs[0]} and {ipcs[1]} images per class")
    seeds = a["config"]["run"]["seed"], b["config"]["run"]["seed"]
    if seeds[0] != seeds[1]:
        raise UserError(f"{between}: networks are paired by seed, and these have {seeds[0]} and {seeds[1]}")
    found = [
        f"{section}.{key} is {value!r} and {b['config'][section][key]!r}"
        for section in _EQUAL
        for key, value in a["config"][section].items()
        if value != b["config"][section][key] and f"{section}.{key}" not in _MAY_DIFFER
    ]
    if found:
        raise UserError(f"{between}: {'; '.join(found)}")


def _networks(run: dict[str, Any], model: str) -> list[float]:
    found: list[float] = run["models"][model][run["config"]["distill"]["method"]]["networks"]
    return found


def _score(side: list[dict[str, Any]], model: str) -> float | None:
    """Mean LRS of runs that were evaluated with hard labels too and have an upper bound, None where one does not."""
    found = []
    for run in side:
        table, settings = run["models"][model], run["config"]["distill"]
        if not table.get("full") or settings.get("labels") == "soft":
            return None
        method = settings["method"]
        rows = table["full"], table.get(f"{method}/own", table[method]), table[method], table["random"]
        full, hard, any_labels, random = (row["mean"] / 100 for row in rows)
        score = scores.label_robust_score(full_hard=full, synthetic_hard=hard, synthetic=any_labels, random=random)
        found.append(score)
    return sum(found) / len(found)


def rows(result: dict[str, Any], prefix: str = "") -> list[str]:
    """Under :data:`HEAD`, a line of Markdown for each architecture."""
    lines = []
    for name, values in result["difference"].items():
        d, of = Difference(**values), result["of"]
        interval = f"{d.mean - d.margin:+.2f} to {d.mean + d.margin:+.2f}"
        lines.append(f"| {prefix}{name} | {d.mean:+.2f} | {interval} | {d.pairs} {of} |")
    return lines


def _table(result: dict[str, Any]) -> str:
    known = [f"{side} {value:.4f}" for side, value in result["score"].items() if value is not None]
    scored = ["DD-Ranking's LRS (0 to 1, higher is better): " + ", ".join(known)] if known else []
    return "\n".join([HEAD, "|---|---|---|---|", *rows(result), "", *scored])


def _run(config: Config, args: argparse.Namespace) -> None:
    result = compare([Path(p) for p in args.first], [Path(p) for p in args.second], evaluated=args.evaluated)
    print(_table(result))
    if args.json:
        runs.write_json(Path(args.json), result)


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--first", nargs="+", required=True, metavar="RUN", help="Runs of one method, one per seed of the distillation."
    )
    parser.add_argument(
        "--second",
        nargs="+",
        required=True,
        metavar="RUN",
        help="As many runs of the other method; the difference is second minus first.",
    )
    parser.add_argument(
        "--evaluated",
        action="store_true",
        help="Compare by each run's evaluation.json, which ddpp.evaluate wrote last.",
    )
    parser.add_argument("--json", metavar="FILE", help="Also write the result there.")


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(
        "compare",
        "Compare two sets of runs, pair by pair.",
        "compare",
        (),
        _run,
        argv,
        arguments=_arguments,
    )


if __name__ == "__main__":
    sys.exit(main())
