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
        are, "networks" or "distillations"; and ``score``, the mean LRS of each side where all real data was trained on
        with hard labels.

    Raises:
        UserError: not as many runs on both sides, one of them twice, an unfinished run, or runs of different data,
            images a class or protocol; the message names the first difference.
    """
    if len(first) != len(second):
        raise UserError(f"--first and --second must name as many runs, got {len(first)} and {len(second)}")
    for option, folders in (("--first", first), ("--second", second)):
        if len({path.resolve() for path in folders}) < len(folders):
            raise UserError(f"{option} names a run twice, which would count as two; name each once")
    pairs = [(accuracies.read(a, evaluated), accuracies.read(b, evaluated)) for a, b in zip(first, second, strict=True)]
    for (a, b), names in zip(pairs, zip(first, second, strict=True), strict=True):
        _check_alike(a, b, names)
    shared = [name for name in pairs[0][0]["models"] if all(name in run["models"] for pair in pairs for run in pair)]
    differences = {}
    for name in shared:
        sides = [[_networks(pair[side], name) for pair in pairs] for side in (0, 1)]
        before, after = (found[0] if len(pairs) == 1 else list(map(statistics.fmean, found)) for found in sides)
        differences[name] = scores.paired_difference(before, after)._asdict()
    return {
        "first": [str(path) for path in first],
        "second": [str(path) for path in second],
        "difference": differences,
        "of": "networks" if len(pairs) == 1 else "distillations",
        "score": {side: _score([pair[i] for pair in pairs]) for i, side in enumerate(("first", "second"))},
    }


def _check_alike(a: dict[str, Any], b: dict[str, Any], names: tuple[Path, Path]) -> None:
    between = f"{names[0]} and {names[1]} cannot be compared"
    if a["fingerprint"] != b["fingerprint"]:
        raise UserError(f"{between}: they were distilled from different data")
    ipcs = a["config"]["distill"]["ipc"], b["config"]["distill"]["ipc"]
    if ipcs[0] != ipcs[1]:
        raise UserError(f"{between}: {ipcs[0]} and {ipcs[1]} images per class")
    seeds = a["config"]["run"]["seed"], b["config"]["run"]["seed"]
    if seeds[0] != seeds[1]:
        raise UserError(f"{between}: networks are paired by seed, and these have {seeds[0]} and {seeds[1]}")
    for section in _EQUAL:
        for key, value in a["config"][section].items():
            other = b["config"][section][key]
            if value != other and f"{section}.{key}" not in _MAY_DIFFER:
                raise UserError(f"{between}: {section}.{key} is {value!r} and {other!r}")


def _networks(run: dict[str, Any], model: str) -> list[float]:
    found: list[float] = run["models"][model][run["config"]["distill"]["method"]]["networks"]
    return found


def _score(side: list[dict[str, Any]]) -> float | None:
    """Mean LRS of runs with hard labels and an upper bound, None where one lacks it."""
    found = []
    for run in side:
        table, settings = run["accuracy"], run["config"]["distill"]
        if not table.get("full") or settings.get("labels") == "soft":
            return None
        own = table[settings["method"]]["mean"] / 100
        full, random = table["full"]["mean"] / 100, table["random"]["mean"] / 100
        found.append(scores.label_robust_score(full_hard=full, synthetic_hard=own, synthetic=own, random=random))
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
