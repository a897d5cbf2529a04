"""STAGE 5: class-incremental learning with a distilled memory, beside herding and random real images.

``python -m ddpp.continual RUN --steps 5``. Classes arrive in groups. After each group a network is trained from scratch
on the memory of all classes so far, the same number of images of each, and tested on the test images of those classes:
the protocol of DM (arXiv 2110.04181) after GDumb.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ddpp import augment, cli, data, models, networks, runs, seeds, synthetic, training
from ddpp.config import Config
from ddpp.data import Dataset, Images
from ddpp.errors import UserError
from ddpp.methods import METHODS, Problem
from ddpp.networks import Job, Trainings
from ddpp.synthetic import Synthetic
from ddpp.training import Backend, Recipe

_PARTS = "continual.jsonl"  # in a run folder: what single networks reached, while not all are done


def continual(
    config: Config, dataset: Dataset, folder: Path, steps: int, orders: int, device: torch.device
) -> dict[str, Any]:
    """Accuracy over the classes seen after each step, for a distilled memory, herding and random real images.

    Args:
        folder: the run whose synthetic set is the memory.
        steps: groups of classes, of sizes that differ by one at most.
        orders: random orders of the classes, one network each.

    Returns:
        ``classes``: how many are seen after each step; ``accuracy``: for the run's method, ``herding`` and ``random``
        a list of ``mean``, ``std`` (ddof 1) and ``networks`` by step, in percent.

    Raises:
        UserError: more steps than classes, no order, or soft labels, which spread over classes that are not there yet.
    """
    classes = len(dataset.classes)
    if not 2 <= steps <= classes:
        raise UserError(f"--steps must be between 2 and the {classes} classes, got {steps}")
    if orders < 1:
        raise UserError(f"--orders must be at least 1, got {orders}")
    distilled, _ = synthetic.load(folder / "synthetic.safetensors")
    if distilled.labels.is_floating_point():
        raise UserError(f"{folder} has soft labels, which speak of classes that have not come yet; distil hard ones")
    groups = augment.groups_for(config.augment.strategy, dataset.strategy)
    memories = {config.distill.method: [distilled] * orders, **_real(config, dataset, groups, orders, device)}
    ends = [classes * (k + 1) // steps for k in range(steps)]
    recipe = networks.recipe(config, float(distilled.step_size))
    order = [
        torch.randperm(classes, generator=seeds.generator(config.run.seed, "class order", n)) for n in range(orders)
    ]
    cases = [(name, end, n) for name in memories for end in ends for n in range(orders)]
    of_a_class = sum(len(held[0].images) // classes for held in memories.values())
    with networks.images_bar("continual", orders * sum(ends) * of_a_class * recipe.epochs) as bar:
        ledger = runs.Ledger(folder / _PARTS, networks.about(config, dataset))
        trainings = Trainings(Backend.of(config.run, device), bar, ledger)
        jobs = []
        for name, end, n in cases:
            memory, seen = memories[name][n], order[n][:end]
            part = networks.part_of(recipe, n, seen.tolist(), *networks.digest(memory.images, memory.labels))
            train = partial(_network, config, dataset, memory, seen, recipe, groups, trainings, n)
            jobs.append(Job(part, recipe.epochs * len(memory.images) // classes * end, train))
        found = dict(zip(cases, trainings.run(jobs), strict=True))
    accuracy = {name: [_summary([found[name, end, n] for n in range(orders)]) for end in ends] for name in memories}
    return {"classes": ends, "orders": orders, "accuracy": accuracy}


def _real(
    config: Config, dataset: Dataset, groups: tuple[str, ...], orders: int, device: torch.device
) -> dict[str, list[Synthetic]]:
    """Memories of as many real images: herding's, and another random draw for each order."""
    network = models.build(config.model, dataset.shape, len(dataset.classes), seed=config.run.seed).to(device)
    selection = METHODS.get("herding")(Problem(config, dataset, network, [], groups, device))
    assert hasattr(selection, "choose")
    ipc, seed = config.distill.ipc, config.run.seed
    draws = [synthetic.real_images(dataset, ipc, "continual", n, seed=seed) for n in range(orders)]
    return {"herding": [selection.choose()] * orders, "random": draws}


def _network(
    config: Config,
    dataset: Dataset,
    memory: Synthetic,
    seen: Tensor,
    recipe: Recipe,
    groups: tuple[str, ...],
    trainings: Trainings,
    number: int,
) -> float:
    """Accuracy of one network that was trained on the memory of the classes seen, over those classes."""
    seed = seeds.derive(config.run.seed, "continual network", number, len(seen))
    network = models.build(config.model, dataset.shape, len(seen), seed=seed)
    images, labels = _of_classes(memory.images, memory.labels, seen)
    training.fit(
        network,
        images,
        labels,
        recipe,
        trainings.backend,
        seed=seed,
        groups=groups,
        mode=config.augment.mode,
        on_step=trainings.advance,
    )
    images, labels = _of_classes(dataset.test_images, dataset.test_labels, seen)
    return training.accuracy(network, images, labels, trainings.backend)


def _of_classes(images: Tensor | Images, labels: Tensor, seen: Tensor) -> tuple[Tensor | Images, Tensor]:
    """The images of some classes, labelled by the classes' places in ``seen``."""
    matches = labels[:, None] == seen.to(labels.device)  # [N, classes]
    inside = torch.nonzero(matches.any(1)).flatten()
    chosen = images[inside] if isinstance(images, Tensor) else images.take(inside)
    return chosen, matches[inside].int().argmax(1)


def _summary(networks: list[float]) -> dict[str, Any]:
    spread = statistics.stdev(networks) if len(networks) > 1 else 0.0
    return {"mean": statistics.fmean(networks), "std": spread, "networks": networks}


def _draw(result: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for name, steps in result["accuracy"].items():
        means, stds = [s["mean"] for s in steps], [s["std"] for s in steps]
        axis.errorbar(result["classes"], means, stds, marker="o", capsize=3, label=name)
    axis.set_xlabel("classes seen")
    axis.set_ylabel("test accuracy over them, percent")
    axis.grid(alpha=0.3)
    axis.legend(title="memory")
    runs.write_figure(path, figure)


def _table(result: dict[str, Any]) -> str:
    lines = [f"| memory | {' | '.join(f'{n} classes' for n in result['classes'])} |"]
    lines.append("|---" * (len(result["classes"]) + 1) + "|")
    for name, steps in result["accuracy"].items():
        cells = [runs.figure_text(figures) for figures in steps]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(
        [
            *lines,
            "",
            "Test accuracy over the classes seen in percent, mean ± standard deviation (ddof 1) over "
            f"{result['orders']} orders of the classes, a network each.",
        ]
    )


def _run(config: Config, args: argparse.Namespace) -> None:
    folder = Path(args.folder)
    networks.check_rate(config)
    networks.check_own_labels(config, "continual")
    dataset = data.load(config.data)
    synthetic.of_run(folder, dataset)
    with runs.alone(folder, "continual"):
        result = continual(config, dataset, folder, args.steps, args.orders, cli.device(config))
        runs.write_json(folder / "continual.json", result)
        _draw(result, folder / "continual.png")
        (folder / _PARTS).unlink(missing_ok=True)
    print(_table(result))
    print(f"\nwritten: {folder}/continual.json, continual.png")


def _arguments(parser: argparse.ArgumentParser) -> None:
    cli.add_run_folder(parser)
    parser.add_argument(
        "--steps", type=int, default=5, metavar="N", help="Groups in which the classes arrive (default: 5)."
    )
    parser.add_argument(
        "--orders", type=int, default=5, metavar="N", help="Random orders of the classes, a network each (default: 5)."
    )


def main(argv: Sequence[str] | None = None) -> int:
    description = "Learn classes group by group with a distilled memory, beside herding and random real images."
    unread = (
        "models",
        "networks",
        "full_epochs",
        "full_lr",
        "full_weight_decay",
        "select",
        "search_lr",
        "augmentations",
    )
    return cli.run_on_run("continual", description, _run, argv, arguments=_arguments, without=unread)


if __name__ == "__main__":
    sys.exit(main())
