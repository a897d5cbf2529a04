"""Test accuracies of finished runs: read from their folders, merged over distillations, written as tables."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from ddpp import runs, synthetic
from ddpp.config import Config
from ddpp.errors import UserError

#: Options that change no figure of a run's own set: of rows on all real data, and of what else was evaluated.
OF_OTHER_ROWS = (
    *("evaluate.full_epochs", "evaluate.full_lr", "evaluate.full_weight_decay"),
    *("evaluate.models", "evaluate.augmentations"),
)
_LATEX = str.maketrans(
    {c: f"\\{c}" for c in "_%&#${}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
)

Figure = dict[str, Any] | None  # mean, std, networks; None where nothing was run


class Row(NamedTuple):
    """A line of a table."""

    name: str
    figures: list[Figure]  # a column each
    published: Sequence[str] = ()  # what papers report there, in a table that shows it


def results_in(path: Path, absent: str, again: str, needed: Collection[str] = ("models", "protocol")) -> dict[str, Any]:
    """The results that a stage wrote.

    Args:
        absent: what it means that there are none.
        again: the command that writes them again.
        needed: what must be told.

    Raises:
        UserError: there are none, or they are damaged or another version's.
    """
    found = runs.read_json(path, absent)
    if lacking := [name for name in needed if name not in found]:
        raise UserError(f"{path} does not tell {', '.join(lacking)}: damaged, or of another version; run {again} again")
    return found


def read(folder: Path, evaluated: bool = False) -> dict[str, Any]:
    """The results of a finished run, with every option in ``config``, its data's ``fingerprint`` and its ``seed``.

    Of a run with plugins also ``plugins``, digests of the code of its method and architecture.

    Args:
        evaluated: what ``python -m ddpp.evaluate`` has written last of the run, not the run's own results. The options
            are then those of that evaluation; ``seed`` is the distillation's in both cases.

    Raises:
        UserError: there is no such run, it is not finished or not evaluated, or of a version that kept no options.
    """
    if not (folder / "config.toml").is_file():
        raise UserError(f"{folder} is no run folder of ddpp.distill; check its name")
    path = folder / ("evaluation.json" if evaluated else "results.json")
    resuming, evaluating = f"ddpp.distill --out {folder} --resume", f"ddpp.evaluate {folder}"
    unfinished = f"it is no finished run; continue it with {resuming}"
    unevaluated = f"it was not evaluated; do so with {evaluating}, or leave out --evaluated"
    absent, again = (unevaluated, evaluating) if evaluated else (unfinished, resuming)
    results = results_in(path, absent, again)
    if "config" not in results:
        raise UserError(
            f"{path} is of an earlier version and does not say how; evaluate the run again with {evaluating}"
            + ("" if evaluated else ", and give --evaluated")
        )
    _, meta = synthetic.load(folder / "synthetic.safetensors", ["fingerprint", "seed"])
    # A run of an earlier version lacks options; they are what they are by default.
    config = Config().with_values(results["config"], str(path))
    config = config.with_values({"evaluate": {"optimizer": config.networks_optimizer}}, str(path))
    data = runs.read_json(folder / "data.json") if (folder / "data.json").is_file() else {}
    code = {"plugins": data["plugins"]} if "plugins" in data else {}
    return {**results, **code, "config": asdict(config), "fingerprint": meta["fingerprint"], "seed": meta["seed"]}


def merged(found: Sequence[Figure]) -> Figure:
    """The figure of several distillations: mean and standard deviation of their means, and of how many."""
    figures = [figure for figure in found if figure]
    if len(figures) < 2:
        return {**figures[0], "distillations": 1} if figures else None
    means = [figure["mean"] for figure in figures]
    diverged = sum(figure.get("diverged", 0) for figure in figures)
    return {
        "mean": statistics.fmean(means),
        "std": statistics.stdev(means),
        "networks": [accuracy for figure in figures for accuracy in figure["networks"]],
        "distillations": len(figures),
        **({"diverged": diverged} if diverged else {}),
    }


def figure_text(figure: Figure, distillations: int) -> str:
    """A figure in words, which say so where it is of fewer distillations than its row."""
    there = (figure or {}).get("distillations", distillations)
    few = f" ({there} of {distillations} distillations)" if there < distillations else ""
    return runs.figure_text(figure) + few


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    lines = [" | ".join(cell.replace("|", r"\|") for cell in cells) for cells in (head, *body)]
    first, *others = (f"| {line} |" for line in lines)
    return [first, "|---" * len(head) + "|", *others]


def csv_text(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """A line for each row and column, with the figures in full."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    papers = any(row.published for row in rows)
    head = ["trained on", "column", "mean", "std", "networks", "distillations"]
    writer.writerow([*head, "published"] if papers else head)
    for row in rows:
        for i, (column, figure) in enumerate(zip(columns, row.figures, strict=True)):
            ours: tuple[Any, ...] = ("", "", "", "")
            if figure:
                ours = figure["mean"], figure["std"], len(figure["networks"]), figure.get("distillations", 1)
            writer.writerow([row.name, column, *ours, *row.published[i : i + 1]])
    return text.getvalue()


def latex(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """A ``tabular`` of means and standard deviations."""
    lines = [rf"\begin{{tabular}}{{l{'c' * len(columns)}}}", r"\hline"]
    lines += [" & ".join(["", *(column.translate(_LATEX) for column in columns)]) + r" \\", r"\hline"]
    for row in rows:
        of = max(((figure or {}).get("distillations", 1) for figure in row.figures), default=1)
        lines.append(" & ".join([row.name.translate(_LATEX), *(_latex_figure(f, of) for f in row.figures)]) + r" \\")
    return "\n".join([*lines, r"\hline", r"\end{tabular}", ""])


def _latex_figure(figure: Figure, distillations: int) -> str:
    """With what Markdown says of networks that diverged, and of fewer distillations than the row's."""
    if not figure:
        return "--"
    spread = rf" \pm {figure['std']:.1f}" if len(figure["networks"]) > 1 else ""
    notes = f" ({figure['diverged']} diverged)" if "diverged" in figure else ""
    if (there := figure.get("distillations", 1)) < distillations:
        notes += f" ({there} of {distillations})"
    return f"${figure['mean']:.1f}{spread}${notes}"
