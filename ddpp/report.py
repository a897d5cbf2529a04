"""STAGE 4: pictures and tables of a run, from its files alone.

``python -m ddpp.report RUN``
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from ddpp import accuracies, cli, data, runs, synthetic
from ddpp.config import Config

COLUMNS, ROWS = 20, 10  # of the picture of the images
_READ = ("accuracy", "models", "protocol", "steps", "seconds", "peak_memory_mb", "config")  # of the results


def write(folder: Path, results: dict[str, Any]) -> list[str]:
    """Writes ``report.md`` and its pictures from the results and the run's other files.

    These are ``images.png`` and ``curves.png``; where several snapshots were evaluated also their accuracy over the
    outer steps: ``accuracy.png`` of the results, ``evaluation.png`` of ``evaluation.json``.

    Returns:
        The names of what was written.
    """
    held, meta = synthetic.of_run(folder)
    _draw_images(folder, held.images, meta["classes"])
    log = folder / "log.jsonl"
    _draw_curves(runs.read_log(log, runs.OF_A_STEP) if log.is_file() else [], folder / "curves.png")
    pictures = {"images.png": "start above result", "curves.png": "curves", **_draw_snapshots(folder, results)}
    runs.write_text(folder / "report.md", _text(results, meta["dataset"], synthetic.size_text(meta), pictures))
    return ["report.md", *pictures]


def _draw_images(folder: Path, result: Tensor, classes: Sequence[str]) -> None:
    """The start above the result, one column a class."""
    transform = synthetic.transform_of(folder / "synthetic.safetensors")
    starts = list(synthetic.snapshots(folder).values())[:1]  # none where they were cleared away
    shown = [*(("start", synthetic.load(path)[0].images) for path in starts), ("result", result)]
    names = classes[:COLUMNS]
    panels = [(title, _canvas(x, transform, len(classes))) for title, x in shown]
    height, width = panels[0][1].shape[:2]
    size = 10.0, len(panels) * 10.0 * height / width + 0.8  # inches
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)
    for axis, (title, canvas) in zip(axes[:, 0], panels, strict=True):
        axis.imshow(canvas, interpolation="nearest", vmin=0, vmax=1)
        axis.set_ylabel(title)
        axis.set_yticks([])
        axis.set_xticks(
            (np.arange(len(names)) + 0.5) * width / len(names), names, rotation=30 if len(names) > 10 else 0
        )
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    runs.write_figure(folder / "images.png", figure)


def _canvas(images: Tensor, transform: data.Transform, classes: int) -> NDArray[np.float32]:
    """Images [classes * ipc, C, H, W], class by class, as one picture [height, width, 3] of limited size.

    Of two channels the first is shown, of more than three the first three.
    """
    ipc, (channels, height, width) = len(images) // classes, images.shape[1:]
    chosen = images.reshape(classes, ipc, channels, height, width)[:COLUMNS, :ROWS]
    grid = data.to_pixels_from(transform, chosen.flatten(0, 1)).view_as(chosen)
    grid = grid[:, :, :3] if channels > 2 else grid[:, :, :1].expand(-1, -1, 3, -1, -1)
    framed = np.ones((*grid.shape[:3], height + 2, width + 2), np.float32)
    framed[..., 1:-1, 1:-1] = grid.cpu().numpy()
    tall, wide = grid.shape[1] * (height + 2), grid.shape[0] * (width + 2)
    return framed.transpose(1, 3, 0, 4, 2).reshape(tall, wide, 3)


def _draw_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Matching loss, step size and share of parameters kept over the outer steps."""
    steps = [row["step"] for row in rows]
    curves = (("loss", "matching loss"), ("step_size", "step size"), ("kept", "share of parameters kept"))
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, (name, title) in zip(axes, curves, strict=True):
        axis.plot(steps, [np.nan if row[name] is None else row[name] for row in rows], linewidth=0.8)
        axis.set_xlabel("outer step")
        axis.set_title(title)
        axis.grid(alpha=0.3)
    runs.write_figure(path, figure)


def _draw_snapshots(folder: Path, results: dict[str, Any]) -> dict[str, str]:
    """What each snapshot reached, in the results and in the last evaluation: the pictures' names and what they show."""
    evaluation, shown = folder / "evaluation.json", "accuracy over the outer steps"
    evaluated = runs.read_json(evaluation) if evaluation.is_file() else {}
    drawn = {}
    for name, found, title in (
        ("accuracy.png", results, shown),
        ("evaluation.png", evaluated, f"{shown}, by the last ddpp.evaluate"),
    ):
        if "snapshots" in found:
            _draw_accuracy(found, folder / name)
            drawn[name] = title
        else:
            (folder / name).unlink(missing_ok=True)  # of an evaluation before
    return drawn


def _draw_accuracy(results: dict[str, Any], path: Path) -> None:
    """Test accuracy over the outer steps, a line an architecture, beside that of random real images."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    for model, reached in results["snapshots"].items():
        steps, means, stds = ([point[key] for point in reached] for key in ("step", "mean", "std"))
        line = axis.errorbar(steps, means, stds, marker="o", markersize=3, capsize=3, label=model).lines[0]
        random = results["models"][model]["random"]["mean"]
        axis.axhline(random, color=line.get_color(), linestyle="--")
    axis.plot([], [], color="black", linestyle="--", label="random real images")
    axis.set_xlabel("outer step")
    axis.set_ylabel("test accuracy, percent")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    runs.write_figure(path, figure)


def _text(results: dict[str, Any], data_name: str, size: str, pictures: dict[str, str]) -> str:
    steps, seconds, method = results["steps"], results["seconds"], results["config"]["distill"]["method"]
    lines = [
        f"# {data_name}, {method}, {size}",
        "",
        runs.accuracy_table(results),
        "",
        *(line for name, title in pictures.items() for line in (f"![{title}]({name})", "")),
        steps_text(steps),
        "",
        *(line for text in results.get("advice", []) for line in (text, "")),
        "| stage | seconds |",
        "|---|---|",
        *(f"| {name} | {value:.1f} |" for name, value in seconds.items()),
        "",
        f"Peak memory {results['peak_memory_mb']:.0f} MB. Every option stands in `config.toml`.",
        "",
    ]
    return "\n".join(lines)


def steps_text(steps: dict[str, int]) -> str:
    """How many outer steps were taken, and what became of the others."""
    return (
        f"{steps['taken']} outer steps taken, {steps['skipped']} skipped because nothing could be matched or the loss "
        f"was above --max-loss, {steps['undone']} undone because a number was not finite."
    )


def _run(config: Config, args: argparse.Namespace) -> None:
    folder = Path(args.folder)
    absent, again = "the run is not finished; continue it with --resume", f"ddpp.distill --out {folder} --resume"
    results = accuracies.results_in(folder / "results.json", absent, again, _READ)
    print(f"written: {args.folder}/{', '.join(write(folder, results))}")


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(
        "report",
        "Write a run's pictures and tables anew from its files.",
        "report",
        (),
        _run,
        argv,
        arguments=lambda parser: parser.add_argument("folder", metavar="RUN", help="Run folder of ddpp.distill."),
    )


if __name__ == "__main__":
    sys.exit(main())
