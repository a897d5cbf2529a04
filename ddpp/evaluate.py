"""STAGE 3: trains networks from scratch on a distilled set and tests them, beside random real images and all real data.

``python -m ddpp.evaluate RUN --models convnet alexnet vgg11 resnet18 --networks 5``
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ddpp import augment, cli, data, models, networks, runs, scores, seeds, store, synthetic, training
from ddpp.config import Config, ModelConfig, value_type
from ddpp.data import Dataset, Images, policies
from ddpp.errors import UserError, nearest
from ddpp.models import flat
from ddpp.networks import Job, Trainings
from ddpp.synthetic import Synthetic
from ddpp.training import Backend, Recipe

_WITHOUT_POLICY = ("none", "dsa")  # augmentations that training itself knows
_AS_IN = "as in convnet:norm=batch,width=256"
_PARTS = "evaluated.jsonl"  # in a run folder: what single networks reached, while not all are done
RATES = (0.001, 0.005, 0.01, 0.05, 0.1)  # searched, as DD-Ranking does (arXiv 2505.13300)


class Scores(NamedTuple):
    """Accuracies of one trained network, in percent."""

    test: float
    val: float | None
    finite: bool  # whether its parameters were, after training


class Searched(NamedTuple):
    """Networks trained at a rate that was searched."""

    lr: float
    distilled: list[Scores]
    random: list[Scores]

    @property
    def finite(self) -> bool:
        return all(tested.finite for tested in (*self.distilled, *self.random))


class Tried(NamedTuple):
    """Networks trained on one of the sets to choose from."""

    path: Path
    step: int
    lr: float
    tested: list[Scores]


class Evaluation:
    """Trains and tests networks of one run; each depends only on the seed, its training images and its number.

    Attributes:
        groups: of DSA, none for no augmentation.
        policy: one of :data:`ddpp.data.policies.POLICIES`, or None.
        teacher: whose answers networks on few images learn, or None.
    """

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        groups: tuple[str, ...],
        trainings: Trainings,
        teacher: nn.Module | None = None,
        policy: str | None = None,
    ) -> None:
        self.config, self.dataset, self.groups, self.trainings = config, dataset, groups, trainings
        self.teacher, self.policy = teacher, policy
        self._asked = networks.digest(flat.flatten(teacher)) if teacher else []

    def augmented_by(self, name: str) -> Evaluation:
        """The same with another augmentation: ``none``, ``dsa`` or a policy."""
        groups = augment.parse_strategy(self.dataset.strategy) if name == "dsa" else ()
        policy = None if name in _WITHOUT_POLICY else name
        return Evaluation(self.config, self.dataset, groups, self.trainings, self.teacher, policy)

    def network(self, model: str, images: Tensor | Images, labels: Tensor, recipe: Recipe, *key: str | int) -> Scores:
        """Trains one network from scratch and tests it."""
        seed, backend = seeds.derive(self.config.run.seed, "evaluate", model, *key), self.trainings.backend
        chosen = _model(self.config, model)
        network = models.build(chosen, self.dataset.shape, len(self.dataset.classes), seed=seed)
        finite = training.fit(
            network,
            images,
            labels,
            recipe,
            backend,
            groups=self.groups,
            mode=self.config.augment.mode,
            policy=self._policy(seed),
            teacher=self.teacher,
            seed=seed,
            on_step=self.trainings.advance,
        )
        held_out, dataset = None, self.dataset
        if len(dataset.val_labels):
            held_out = training.accuracy(network, dataset.val_images, dataset.val_labels, backend)
        tested = training.accuracy(network, dataset.test_images, dataset.test_labels, backend)
        return Scores(tested, held_out, finite)

    def _policy(self, seed: int) -> policies.Policy | None:
        if not self.policy:
            return None
        flip, side = "flip" in self.dataset.strategy, self.dataset.shape[-1]
        return policies.Policy(self.policy, self.dataset.transform, side=side, flip=flip, seed=seed)

    def networks(self, jobs: Sequence[tuple[Any, ...]]) -> list[Scores]:
        """:meth:`network` for each of the arguments, or what was kept of it."""
        return [Scores(*tested) for tested in self.trainings.run([self._job(*job) for job in jobs])]

    def _job(self, model: str, images: Tensor | Images, labels: Tensor, recipe: Recipe, *key: str | int) -> Job:
        part = self._part(model, recipe, *key, *networks.digest(images, labels))
        train = partial(self.network, model, images, labels, recipe, *key)
        return Job(part, recipe.epochs * len(images), train)

    def _part(self, model: str, recipe: Recipe, *key: Any) -> str:
        return networks.part_of(recipe, model, self.policy, self.groups, *self._asked, *key)

    def random(self, model: str, ipc: int, recipe: Recipe) -> list[Scores]:
        """As many real images as there are synthetic ones, another random choice for each network."""
        images = recipe.epochs * ipc * len(self.dataset.classes)
        jobs = []
        for n in range(self.config.evaluate.networks):
            part = self._part(model, recipe, "random", n, ipc)
            jobs.append(Job(part, images, partial(self._on_random, model, ipc, recipe, n)))
        return [Scores(*tested) for tested in self.trainings.run(jobs)]

    def _on_random(self, model: str, ipc: int, recipe: Recipe, number: int) -> Scores:
        """Chosen when it is their turn, since the images of all networks may be many."""
        chosen = synthetic.real_images(self.dataset, ipc, "random", number, seed=self.config.run.seed)
        return self.network(model, chosen.images, chosen.labels, recipe, "random", number)

    def distilled(self, model: str, trained_on: Synthetic, recipe: Recipe) -> list[Scores]:
        """Networks on a synthetic set."""
        images, labels = trained_on.images, trained_on.labels
        numbers = range(self.config.evaluate.networks)
        return self.networks([(model, images, labels, recipe, "distilled", n) for n in numbers])

    def tried(self, model: str, path: Path) -> Tried:
        """Networks on the set of a file."""
        step, held = _loaded(path, self.dataset)
        recipe = self.recipe(held)
        return Tried(path, step, recipe.lr, self.distilled(model, held, recipe))

    def searched(self, model: str, trained_on: Synthetic) -> Searched:
        """The rate of :data:`RATES` with which one network does best, among those at which no network diverges."""
        recipes = [replace(self.recipe(trained_on), lr=lr) for lr in RATES]
        images, labels = trained_on.images, trained_on.labels
        tried = self.networks([(model, images, labels, recipe, "search", 0) for recipe in recipes])
        ranked = sorted(zip(recipes, tried, strict=True), key=lambda pair: _preference(pair[1]), reverse=True)
        best = self._at(model, trained_on, ranked[0][0])
        for recipe, _ in ranked[1:]:
            if best.finite:
                return best
            of_both = len(images) + self.config.distill.ipc * len(self.dataset.classes)
            self.trainings.bar.total += self.config.evaluate.networks * recipe.epochs * of_both
            other = self._at(model, trained_on, recipe)
            best = other if other.finite else best
        return best

    def _at(self, model: str, trained_on: Synthetic, recipe: Recipe) -> Searched:
        ipc = self.config.distill.ipc
        return Searched(recipe.lr, self.distilled(model, trained_on, recipe), self.random(model, ipc, recipe))

    def full(self, model: str) -> list[Scores]:
        """All real training images."""
        recipe, count = networks.recipe_on_all(self.config), self.config.evaluate.networks
        images, labels = self.dataset.train_images, self.dataset.train_labels
        return self.networks([(model, images, labels, recipe, "full", n) for n in range(count)])

    def recipe(self, trained_on: Synthetic) -> Recipe:
        """How networks are trained on a synthetic set: at its learned step size unless a rate is given."""
        return networks.recipe(self.config, float(trained_on.step_size))


def _preference(tested: Scores) -> tuple[bool, float]:
    """On held-out images if there are any; a network that diverged comes last."""
    return tested.finite, tested.test if tested.val is None else tested.val


def networks_on(
    held: Synthetic,
    dataset: Dataset,
    config: Config | None = None,
    *,
    device: torch.device | str = "cpu",
) -> list[Scores]:
    """Networks trained from scratch on a set that is no run's, and tested; for a method in a program of one's own.

    They are those that a run of the same options has: initial weights and draws depend on ``config.run.seed`` alone.

    Args:
        held: images in the data set's space [N, C, H, W], their labels, and the step size to train at unless
            ``config.evaluate.lr`` gives one.
        config: sections ``evaluate`` (the first of its models), ``model``, ``augment`` and ``run``; without, defaults.

    Raises:
        UserError: what :func:`check` refuses, or a set that does not fit the data set.
    """
    config = config or Config()
    check(config, dataset)
    images, labels = held.images.detach(), held.labels.detach()
    if images.shape[1:] != dataset.shape or images.dtype != torch.float32:
        shape = ", ".join(map(str, dataset.shape))
        raise UserError(f"images must be float32 [N, {shape}], got {images.dtype} {list(images.shape)}")
    held = Synthetic(images, labels, torch.as_tensor(held.step_size).detach())
    groups = augment.groups_for(config.augment.strategy, dataset.strategy)
    count = config.evaluate.networks * config.evaluate.epochs * len(images)
    with networks.images_bar("evaluate", count) as progress, torch.enable_grad():
        trainings = Trainings(Backend.of(config.run, torch.device(device)), progress)
        evaluation = Evaluation(config, dataset, groups, trainings, _teacher(config, dataset, torch.device(device)))
        recipe, model = evaluation.recipe(held), next(iter(config.evaluate.models), config.model.model)
        if not recipe.lr > 0:
            raise UserError(f"the step size must be positive, got {recipe.lr}; it is the networks' learning rate")
        return evaluation.distilled(model, held, recipe)


def check(config: Config, dataset: Dataset) -> None:
    """Refuses options that cannot be evaluated.

    Raises:
        UserError: an unknown architecture or augmentation, an architecture that does not suit the images or whose
            options are wrong, ``--select val`` without a held-out part, an optimiser without a rate, or ``--cutmix``
            without a teacher.
    """
    networks.check_rate(config)
    if config.evaluate.cutmix and config.evaluate.labels == "own":
        raise UserError("--cutmix mixes images, whose labels a teacher then gives; it needs --labels teacher")
    for name in config.evaluate.models:
        try:
            models.build(_model(config, name), dataset.shape, len(dataset.classes), seed=0)
        except UserError as e:
            raise UserError(f"--models {name}: {e}") from e
    for name in config.evaluate.augmentations:
        policies.check_policy(name, *_WITHOUT_POLICY)
        if name not in _WITHOUT_POLICY and dataset.shape[0] not in (1, 3):
            raise UserError(f"augmentation {name} is for images of 1 or 3 channels, and these have {dataset.shape[0]}")
    if config.evaluate.select == "val" and not len(dataset.val_labels):
        raise UserError("--select val needs a held-out part: distil with --validation above 0")


def _model(config: Config, name: str) -> ModelConfig:
    """The architecture of a name such as ``vgg11``, ``convnet:1024`` for that width or ``convnet:norm=batch,depth=4``.

    Options that are not named are those of ``config``.
    """
    model, colon, text = name.partition(":")
    base = replace(config.model, model=model)
    if not colon:
        return base
    if not models.reads_options(model):
        those = " and ".join(filter(models.reads_options, models.MODELS.names()))
        raise UserError(f"{model} reads no options; {those} do, {_AS_IN}")
    return Config(model=base).with_values({"model": _options(text)}, f"options {_AS_IN}").model


def _options(text: str) -> dict[str, Any]:
    """The values of ``norm=batch,width=256``; a number by itself is the width."""
    known, found = [f.name for f in fields(ModelConfig) if f.name != "model"], {}
    for part in text.split(","):
        key, _, value = ("width", "", part) if part.isdecimal() else part.partition("=")
        if key not in known:
            names = ", ".join(known)
            raise UserError(f"options {_AS_IN}: unknown option {key!r}{nearest(key, known)} Known: {names}")
        if key in found:
            raise UserError(f"options {_AS_IN}: {key} is given twice, name it once")
        whole = value_type(ModelConfig, key)[0] is int and value.removeprefix("-").isdecimal()
        found[key] = int(value) if whole else value
    return found


def compare(
    config: Config, dataset: Dataset, folder: Path, groups: tuple[str, ...], device: torch.device
) -> dict[str, Any]:
    """Accuracy of a run's synthetic set, of random real images and of all real data, for each architecture.

    The run is this process's alone meanwhile, and until :func:`forget_parts` (:func:`ddpp.runs.alone`).

    Returns:
        ``accuracy`` of the first architecture and ``models`` of all: for each of ``random``, the method's name and
        ``full`` the ``mean`` and ``std`` (ddof 1) over ``networks``, the accuracies of the single networks, all in
        percent, and how many of these ``diverged``, if any did; and ``protocol``, which says what was selected and
        how, and with a teacher's answers its own accuracy. With ``select`` "all" the method's name stands for the last
        step, and beside it ``<method>/val`` and ``<method>/test`` for the snapshots that were best there; with
        ``search_lr`` there are ``<method>/searched`` and
        ``random/searched``, with a teacher's answers ``<method>/own`` and ``random/own`` for networks that learn the
        images' own labels, with ``augmentations`` ``<method>/<name>`` and ``random/<name>`` for each, and
        ``robustness``, see :func:`robustness`. Where there were several snapshots to choose from, ``snapshots`` of each
        architecture: what each of them reached, in the order of the outer steps; its ``step``, ``mean``, ``std`` and
        ``networks``, and ``val``, their mean on held-out images if there are any.

    Raises:
        UserError: what :func:`check` refuses, a missing snapshot, or a missing teacher whose answers are asked.
    """
    check(config, dataset)
    settings = config.evaluate
    teacher = _teacher(config, dataset, device)
    candidates = _candidates(folder, settings.select)
    names = settings.models or (config.model.model,)
    images = len(names) * _images_trained_on(config, dataset, candidates)
    with networks.images_bar("evaluate", images) as progress:
        ledger = runs.Ledger(folder / _PARTS, networks.about(config, dataset))
        trainings = Trainings(Backend.of(config.run, device), progress, ledger)
        evaluation = Evaluation(config, dataset, groups, trainings, teacher)
        tables, snapshots = {}, {}
        for model in names:
            tried = [evaluation.tried(model, path) for path in candidates]
            tables[model], snapshots[model] = _table(evaluation, model, tried), [_reached(each) for each in tried]
    protocol = {"select": settings.select, "networks": settings.networks, "ddof": 1, "epochs": settings.epochs}
    if teacher:
        protocol |= {name: getattr(settings, name) for name in ("labels", "temperature", "cutmix")}
        backend = Backend.of(config.run, device)
        protocol["teacher"] = training.accuracy(teacher, dataset.test_images, dataset.test_labels, backend)
    if settings.search_lr:
        protocol["searched_on"] = "held-out" if len(dataset.val_labels) else "test"
    results = {"accuracy": next(iter(tables.values())), "models": tables, "protocol": protocol}
    if len(candidates) > 1:
        results["snapshots"] = snapshots
    if settings.augmentations:
        results["robustness"] = {model: robustness(table, settings.augmentations) for model, table in tables.items()}
    return results


def _teacher(config: Config, dataset: Dataset, device: torch.device) -> nn.Module | None:
    """The first of the configuration's teachers, where its answers are asked for."""
    if config.evaluate.labels == "own":
        return None
    folder = store.folder_of(config, dataset)
    first = store.opened(folder, config, dataset, 1).get(0)
    if first is None:
        raise UserError(
            f"{folder} holds no first teacher of {config.teachers.epochs} epochs, whose answers could be learned. "
            "Train one: python -m ddpp.teachers --config with the run's config.toml"
        )
    return store.ended(first, config, dataset, device)


def forget_parts(folder: Path) -> None:
    """Removes what :func:`compare` kept of single networks, once its results are written."""
    (folder / _PARTS).unlink(missing_ok=True)


def _images_trained_on(config: Config, dataset: Dataset, candidates: list[Path]) -> int:
    """By all networks of one architecture, unless a searched rate is searched again."""
    settings, epochs, augmented = config.evaluate, config.evaluate.epochs, len(config.evaluate.augmentations)
    synthetic_images, real = len(_loaded(candidates[-1], dataset)[1].images), config.distill.ipc * len(dataset.classes)
    asked, selected = settings.labels == "teacher", config.distill.method == "random"
    on_synthetic = len(candidates) + settings.search_lr + (augmented + asked) * (not selected)
    on_real = 1 + settings.search_lr + augmented + asked
    images = epochs * (on_synthetic * synthetic_images + on_real * real)
    tried = settings.search_lr * len(RATES) * epochs * synthetic_images
    return settings.networks * (images + settings.full_epochs * len(dataset.train_labels)) + tried


def _table(evaluation: Evaluation, model: str, tried: list[Tried]) -> dict[str, Any]:
    """The figures of one architecture by condition."""
    settings, ipc = evaluation.config.evaluate, evaluation.config.distill.ipc
    method = evaluation.config.distill.method
    table: dict[str, Any] = {}
    best = {part: max(tried, key=lambda each: _mean(each.tested, part)) for part in ("val", "test")}
    best["final"] = best["all"] = tried[-1]
    _, chosen = _loaded(best[settings.select].path, evaluation.dataset)
    learned = evaluation.recipe(chosen)
    table["random"] = _summary(evaluation.random(model, ipc, learned))
    if method != "random":  # the spread of random images is that of the draw, not that of networks on one draw
        table[method] = _entry(best[settings.select])
    if settings.select == "all":
        parts = ("val", "test") if len(evaluation.dataset.val_labels) else ("test",)
        table |= {f"{method}/{part}": _entry(best[part]) for part in parts}
    if settings.search_lr:
        searched = evaluation.searched(model, chosen)
        table["random/searched"] = {**_summary(searched.random), "lr": searched.lr}
        if method != "random":
            table[f"{method}/searched"] = {**_summary(searched.distilled), "lr": searched.lr}
    if evaluation.teacher:
        plain = replace(learned, temperature=0.0, cutmix=False)
        table["random/own"] = _summary(evaluation.random(model, ipc, plain))
        if method != "random":
            table[f"{method}/own"] = _summary(evaluation.distilled(model, chosen, plain))
    for name in settings.augmentations:
        other = evaluation.augmented_by(name)
        table[f"random/{name}"] = _summary(other.random(model, ipc, learned))
        if method != "random":
            table[f"{method}/{name}"] = _summary(other.distilled(model, chosen, learned))
    table["full"] = _summary(evaluation.full(model)) if settings.full_epochs else None
    return table


def robustness(table: dict[str, Any], augmentations: Sequence[str]) -> dict[str, Any]:
    """What the figures of an architecture say over all augmentations.

    Returns:
        ``best`` and ``average`` of the means over the augmentations (DC-BENCH, arXiv 2207.09639), in percent, by what
        was trained on; and ``ars``, DD-Ranking's score from 0 to 1 of each augmentation beside none, if that is there.
    """
    rows = {name.partition("/")[0] for name in table if name.endswith(f"/{augmentations[0]}")}
    means = {row: {name: table[f"{row}/{name}"]["mean"] for name in augmentations} for row in sorted(rows)}
    found: dict[str, Any] = {
        "best": {row: max(figures.values()) for row, figures in means.items()},
        "average": {row: statistics.fmean(figures.values()) for row, figures in means.items()},
        "ars": {},
    }
    method = next((row for row in means if row != "random"), None)
    if method and "none" in augmentations:
        for name in (name for name in augmentations if name != "none"):
            found["ars"][name] = scores.augmentation_robust_score(
                synthetic=means[method][name] / 100,
                random=means["random"][name] / 100,
                synthetic_plain=means[method]["none"] / 100,
                random_plain=means["random"]["none"] / 100,
            )
    return found


def _mean(tested: list[Scores], part: str) -> float:
    return statistics.fmean(s.val if part == "val" and s.val is not None else s.test for s in tested)


def _entry(chosen: Tried) -> dict[str, Any]:
    return {**_summary(chosen.tested), "step": chosen.step, "lr": chosen.lr}


def _reached(tried: Tried) -> dict[str, Any]:
    """A point of the accuracy over the outer steps."""
    held_out = [s.val for s in tried.tested if s.val is not None]
    return {"step": tried.step, **_summary(tried.tested), **({"val": statistics.fmean(held_out)} if held_out else {})}


def _candidates(folder: Path, select: str) -> list[Path]:
    """The snapshots to choose from, the last one last; the result alone if nothing is selected."""
    if select == "final":
        return [folder / "synthetic.safetensors"]
    found = list(synthetic.snapshots(folder).values())
    if not found:
        raise UserError(f"--select {select} needs snapshots, and {folder}/snapshots holds none")
    return found


def _loaded(path: Path, dataset: Dataset) -> tuple[int, Synthetic]:
    """The outer step of a snapshot or of a result, and the set."""
    told = "steps" if path.name == "synthetic.safetensors" else "step"
    held, meta = synthetic.load(path, [told])
    synthetic.check_fits(path, held, dataset.shape, len(dataset.classes))
    return int(meta[told]), held


def _summary(tested: list[Scores]) -> dict[str, Any]:
    accuracies = [s.test for s in tested]
    spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
    diverged = sum(not s.finite for s in tested)
    told = {"diverged": diverged} if diverged else {}
    return {"mean": statistics.fmean(accuracies), "std": spread, "networks": accuracies, **told}


def _run(config: Config, args: argparse.Namespace) -> None:
    device = cli.device(config)
    dataset = data.load(config.data)
    folder = Path(args.folder)
    synthetic.of_run(folder, dataset)
    groups = augment.groups_for(config.augment.strategy, dataset.strategy)
    with runs.alone(folder, "evaluate"):
        results = compare(config, dataset, folder, groups, device)
        runs.write_json(folder / "evaluation.json", {**results, "config": asdict(config)})
        forget_parts(folder)
    print(runs.accuracy_table(results))
    print(f"\nwritten: {folder}/evaluation.json")
    if "snapshots" in results:
        print(f"python -m ddpp.report {folder} draws the accuracy over the outer steps")


def main(argv: Sequence[str] | None = None) -> int:
    description = "Train networks from scratch on a distilled set and test them."
    return cli.run_on_run("evaluate", description, _run, argv, arguments=cli.add_run_folder)


if __name__ == "__main__":
    sys.exit(main())
