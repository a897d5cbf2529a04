"""STAGE 5: ranks ConvNets by training on a distilled set, and says how well that ranks them as all real data does.

``python -m ddpp.search RUN``. The grid is depth x width x norm x activation x pooling, as in FTD (arXiv 2211.11004) and
DC (arXiv 2006.05929). Networks that are done stand in ``search.jsonl``: a search that was cut, or one of a larger grid,
trains those that are missing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ddpp import augment, cli, data, models, networks, runs, seeds, synthetic, training
from ddpp.config import Config, ModelConfig
from ddpp.data import Dataset, Images
from ddpp.errors import UserError
from ddpp.networks import Job, Trainings
from ddpp.training import Backend, Recipe

PROXIES = ("distilled", "random", "full")
_OPTIONS = ("depth", "width", "norm", "activation", "pooling")


def grid(
    base: ModelConfig,
    dataset: Dataset,
    depths: Sequence[int],
    widths: Sequence[int],
    norms: Sequence[str],
    activations: Sequence[str],
    poolings: Sequence[str],
) -> list[ModelConfig]:
    """All combinations; those whose poolings the image has no room for are refused.

    Raises:
        UserError: a network that cannot be built, or fewer than three in all.
    """
    product = itertools.product(depths, widths, norms, activations, poolings)
    options = [{"model": "convnet", **dict(zip(_OPTIONS, values, strict=True))} for values in product]
    found = [Config(model=base).with_values({"model": o}, "a network of the grid").model for o in options]
    if len(found) < 3:
        raise UserError(f"a ranking needs three networks or more, the grid has {len(found)}")
    for model in found:
        models.build(model, dataset.shape, len(dataset.classes), seed=0)
    return found


def search(
    config: Config, dataset: Dataset, folder: Path, candidates: Sequence[ModelConfig], device: torch.device
) -> dict[str, Any]:
    """Trains every candidate on the distilled set, on random real images of its storage and on all real images.

    Returns:
        ``networks``: for each its options and for each of :data:`PROXIES` ``accuracy`` in percent and ``seconds`` of
        its training, beside others where there are several threads;
        ``rank_correlation``: Spearman's, of the distilled set's and of random images' accuracies with those of all real
        images; ``best``: the accuracy on all real images of the candidate that each proxy ranks first.
    """
    distilled, _ = synthetic.load(folder / "synthetic.safetensors")
    random = synthetic.real_images(dataset, config.distill.ipc, "search", seed=config.run.seed)
    few, many = networks.recipe(config, float(distilled.step_size)), networks.recipe_on_all(config)
    sets: dict[str, tuple[Tensor | Images, Tensor, Recipe]] = {
        "distilled": (distilled.images, distilled.labels, few),
        "random": (random.images, random.labels, few),
        "full": (dataset.train_images, dataset.train_labels, many),
    }
    of_each = sum(recipe.epochs * len(labels) for _, labels, recipe in sets.values())
    with networks.images_bar("search", len(candidates) * of_each) as bar:
        ledger = runs.Ledger(folder / "search.jsonl", networks.about(config, dataset))
        trainings = Trainings(Backend.of(config.run, device), bar, ledger)
        jobs = []
        for model, (images, labels, recipe) in itertools.product(candidates, sets.values()):
            part = networks.part_of(recipe, _options(model), *networks.digest(images, labels))
            train = partial(_trained, config, dataset, model, images, labels, recipe, trainings)
            jobs.append(Job(part, recipe.epochs * len(labels), train))
        found = iter(trainings.run(jobs))
    done = [{"model": _options(model), **{proxy: next(found) for proxy in sets}} for model in candidates]
    result = {"protocol": _protocol(config), "networks": done, **_summary(done)}
    runs.write_json(folder / "search.json", result)
    return result


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation, equal values sharing their mean rank; 0 where one side does not vary."""
    ranks = [_ranks(np.asarray(values, dtype=float)) for values in (first, second)]
    centred = [r - r.mean() for r in ranks]
    scale = float(np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    return float((centred[0] * centred[1]).sum()) / scale if scale else 0.0


def _ranks(values: Any) -> Any:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[place]


def _trained(
    config: Config,
    dataset: Dataset,
    model: ModelConfig,
    images: Tensor | Images,
    labels: Tensor,
    recipe: Recipe,
    trainings: Trainings,
) -> dict[str, float]:
    """Test accuracy of one network and the seconds of its training."""
    seed = seeds.derive(config.run.seed, "search network", json.dumps(_options(model)))
    network = models.build(model, dataset.shape, len(dataset.classes), seed=seed)
    began = time.perf_counter()
    training.fit(
        network,
        images,
        labels,
        recipe,
        trainings.backend,
        seed=seed,
        groups=augment.groups_for(config.augment.strategy, dataset.strategy),
        mode=config.augment.mode,
        on_step=trainings.advance,
    )
    seconds = time.perf_counter() - began
    found = training.accuracy(network, dataset.test_images, dataset.test_labels, trainings.backend)
    return {"accuracy": found, "seconds": seconds}


def _summary(done: list[dict[str, Any]]) -> dict[str, Any]:
    accuracy = {proxy: [row[proxy]["accuracy"] for row in done] for proxy in PROXIES}
    first = {proxy: max(range(len(done)), key=lambda i: accuracy[proxy][i]) for proxy in PROXIES}
    return {
        "rank_correlation": {p: spearman(accuracy[p], accuracy["full"]) for p in ("distilled", "random")},
        "best": {proxy: {"accuracy": accuracy["full"][i], "model": done[i]["model"]} for proxy, i in first.items()},
        "seconds": {proxy: sum(row[proxy]["seconds"] for row in done) for proxy in PROXIES},
    }


def _protocol(config: Config) -> dict[str, Any]:
    names = ("epochs", "lr", "momentum", "weight_decay", "batch", "full_epochs", "full_lr", "full_weight_decay")
    return {"optimizer": config.networks_optimizer, **{name: getattr(config.evaluate, name) for name in names}}


def _options(model: ModelConfig) -> dict[str, Any]:
    return {name: getattr(model, name) for name in _OPTIONS}


def _draw(result: dict[str, Any], path: Path) -> None:
    """Accuracy on all real images over that on each proxy."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    full = [row["full"]["accuracy"] for row in result["networks"]]
    for axis, proxy in zip(axes, ("distilled", "random"), strict=True):
        axis.scatter([row[proxy]["accuracy"] for row in result["networks"]], full, s=14)
        axis.set_xlabel(f"trained on {proxy} images, percent")
        axis.set_title(f"rank correlation {result['rank_correlation'][proxy]:.2f}")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("trained on all real images, percent")
    runs.write_figure(path, figure)


def _table(result: dict[str, Any]) -> str:
    lines = ["| ranked by | rank correlation | its best network, trained on all | seconds |", "|---|---|---|---|"]
    for proxy in PROXIES:
        correlation = result["rank_correlation"].get(proxy, 1.0)
        best, seconds = result["best"][proxy], result["seconds"][proxy]
        words = " ".join(f"{name} {value}" for name, value in best["model"].items())
        lines.append(f"| {proxy} | {correlation:.2f} | {best['accuracy']:.1f} % ({words}) | {seconds:.0f} |")
    return "\n".join([*lines, "", f"{len(result['networks'])} networks, one training each."])


def _run(config: Config, args: argparse.Namespace) -> None:
    folder = Path(args.folder)
    if not config.evaluate.full_epochs:
        raise UserError("a search ranks beside all real images: give --full-epochs above 0")
    networks.check_rate(config)
    networks.check_own_labels(config, "search")
    dataset = data.load(config.data)
    synthetic.of_run(folder, dataset)
    usual = models.describe(replace(config.model, model="convnet", depth=None), dataset.shape)["depth"]
    depths = args.depths or [usual - 1, usual]
    candidates = grid(config.model, dataset, depths, args.widths, args.norm, args.activation, args.pooling)
    with runs.alone(folder, "search"):
        result = search(config, dataset, folder, candidates, cli.device(config))
        _draw(result, folder / "search.png")
    print(_table(result))
    print(f"\nwritten: {folder}/search.json, search.png")


def _arguments(parser: argparse.ArgumentParser) -> None:
    cli.add_run_folder(parser)
    parser.add_argument(
        "--depths",
        nargs="+",
        type=int,
        metavar="N",
        help="Blocks; by default what suits the image's size, and one less.",
    )
    parser.add_argument("--widths", nargs="+", type=int, default=[32, 64], metavar="N", help="Channels.")
    parser.add_argument(
        "--norm", nargs="+", default=["none", "instance", "layer"], metavar="NAME", help="Normalisations."
    )
    parser.add_argument("--activation", nargs="+", default=["relu", "sigmoid"], metavar="NAME", help="Activations.")
    parser.add_argument("--pooling", nargs="+", default=["avg", "max"], metavar="NAME", help="Poolings.")


def main(argv: Sequence[str] | None = None) -> int:
    description = "Rank a grid of ConvNets on a distilled set and compare the ranking with that of all real data."
    unread = ("models", "networks", "select", "search_lr", "augmentations")
    return cli.run_on_run("search", description, _run, argv, arguments=_arguments, without=unread)


if __name__ == "__main__":
    sys.exit(main())
