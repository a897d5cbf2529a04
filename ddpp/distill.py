"""STAGE 2: distils a data set into a few synthetic images a class, evaluates them and reports.

``python -m ddpp.distill`` trains teachers first where they are missing. The loop is the same for every method: the
method gives gradients, SGD with momentum or Adam moves pixels and soft labels, SGD with momentum the step size, and a
step that is not finite is undone.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ddpp import (
    augment,
    cli,
    data,
    evaluate,
    models,
    optimizers,
    parameterization,
    report,
    runs,
    store,
    synthetic,
    teachers,
)
from ddpp.config import SECTIONS, Config, DistillConfig
from ddpp.data import Dataset
from ddpp.errors import UserError
from ddpp.methods import METHODS, Memory, Method, Predictor, Problem, Selection, Update, own_options
from ddpp.methods.bptt import BPTT
from ddpp.methods.ddpp import DDPP
from ddpp.parameterization import PIXELS, Parameterization
from ddpp.synthetic import Synthetic
from ddpp.trajectories import Trajectory

UNDONE_IN_A_ROW = 10
# Options that some methods alone have, but for their defaults, and what these methods do.
_OF_SOME: dict[tuple[str, ...], tuple[tuple[type[Method], ...], str]] = {
    ("prune", "lr_importance", "nearest_step", "min_start_epoch", "first_max_start_epoch"): (
        (DDPP,),
        "matches trajectories (ddpp, mtt)",
    ),
    ("engine",): ((DDPP, BPTT), "differentiates a student's training (ddpp, mtt, bptt)"),
    ("inner_optimizer", "student_steps"): ((BPTT,), "trains students from scratch (bptt)"),
}
SMALLEST_STEP_SIZE = 1e-3  # of the first one


class _Moving(NamedTuple):
    """A tensor that outer steps move; all of one shape."""

    value: Tensor
    velocity: Tensor  # of SGD with momentum, or Adam's first moment
    squares: Tensor | None = None  # Adam's second moment, from the first step on


def _sgd(moving: _Moving, gradient: Tensor, lr: float, momentum: float) -> _Moving:
    velocity = momentum * moving.velocity + gradient
    return _Moving(moving.value - lr * velocity, velocity)


def _adam(moving: _Moving, gradient: Tensor, lr: float, momentum: float, step: int) -> _Moving:
    """A step, counted from 1, of Adam (arXiv 1412.6980) with decays ``momentum`` and 0.999."""
    before = torch.zeros_like(gradient) if moving.squares is None else moving.squares
    decays = momentum, 0.999
    corrections = [1 / (1 - decay**step) for decay in decays]
    return _Moving(*optimizers.adam(moving.value, moving.velocity, before, gradient, lr, decays, corrections))


@dataclass(frozen=True)
class State:
    """All that an outer step changes; what a checkpoint holds."""

    step: int
    synthetic: Synthetic  # its images are those of the numbers
    numbers: Tensor  # what is learned of the images, the pixels by default; see ddpp.parameterization
    numbers_velocity: Tensor  # as the numbers; of Adam, the first moment
    labels_velocity: Tensor  # as the labels; the same
    step_size_velocity: Tensor  # []
    space: Parameterization = PIXELS
    numbers_squares: Tensor | None = None  # as the numbers: Adam's second moment
    labels_squares: Tensor | None = None  # as the labels: the same
    average: Tensor | None = None  # of the numbers over the steps, with --ema
    memory: Memory = field(default_factory=dict)
    undone: int = 0
    undone_in_a_row: int = 0
    skipped: int = 0
    seconds: float = 0.0

    @classmethod
    def begin(cls, first: Synthetic, space: Parameterization = PIXELS) -> State:
        numbers = space.encode(first.images)
        of_numbers, of_labels, of_step_size = (torch.zeros_like(t) for t in (numbers, first.labels, first.step_size))
        held = replace(first, images=space.decode(numbers))
        return cls(0, held, numbers, of_numbers, of_labels, of_step_size, space)

    @property
    def learned(self) -> Tensor:
        """The numbers whose images are evaluated and saved."""
        return self.numbers if self.average is None else self.average

    @property
    def result(self) -> Synthetic:
        """What is evaluated and saved."""
        held = self.synthetic
        return held if self.average is None else replace(held, images=self.space.decode(self.average))

    def moved(self, update: Update, settings: DistillConfig) -> State:
        """One step on pixels or other numbers and on soft labels, and one of SGD with momentum on the step size.

        The step size stays above a thousandth of its first value.
        """
        now, taken = self.synthetic, self.step - self.undone - self.skipped
        stepped = partial(_adam, step=taken + 1) if settings.optimizer == "adam" else _sgd
        numbers = _Moving(self.numbers, self.numbers_velocity, self.numbers_squares)
        numbers = stepped(numbers, self.space.pull_back(update.images), settings.lr_pixels, settings.momentum)
        labels = _Moving(now.labels, self.labels_velocity, self.labels_squares)
        if update.labels is not None:
            labels = stepped(labels, update.labels, settings.lr_labels, settings.labels_momentum)
        step_size = _Moving(now.step_size, self.step_size_velocity)
        step_size = _sgd(step_size, update.step_size, settings.lr_step_size, settings.momentum)
        floor = settings.step_size * SMALLEST_STEP_SIZE
        return replace(
            self,
            step=self.step + 1,
            synthetic=Synthetic(self.space.decode(numbers.value), labels.value, step_size.value.clamp_min(floor)),
            numbers=numbers.value,
            numbers_velocity=numbers.velocity,
            numbers_squares=numbers.squares,
            labels_velocity=labels.velocity,
            labels_squares=labels.squares,
            step_size_velocity=torch.where(step_size.value > floor, step_size.velocity, 0),
            average=torch.lerp(numbers.value, self.learned, settings.ema) if settings.ema else None,
            memory=update.memory,
            undone_in_a_row=0,
        )

    def finite(self) -> Tensor:
        moving = [t for t in self._tensors().values() if t.is_floating_point()]
        return torch.stack([torch.isfinite(t).all() for t in moving]).all()

    def _tensors(self) -> dict[str, Tensor]:
        held = {
            "numbers": self.numbers,
            "labels": self.synthetic.labels,
            "step_size": self.synthetic.step_size,
            "numbers_velocity": self.numbers_velocity,
            "labels_velocity": self.labels_velocity,
            "step_size_velocity": self.step_size_velocity,
        } | {_MEMORY + name: t for name, t in self.memory.items()}
        optional = {
            "numbers_squares": self.numbers_squares,
            "labels_squares": self.labels_squares,
            "average": self.average,
        }
        return held | {name: t for name, t in optional.items() if t is not None}

    def save(self, path: Path) -> None:
        tensors = self._tensors() | {_MEMORY + name: t.clone() for name, t in self.memory.items()}  # may share theirs
        tensors |= {_FIXED + name: t for name, t in self.space.fixed.items()}
        runs.write_tensors(path, tensors, {name: getattr(self, name) for name in _COUNTERS})

    @classmethod
    def load(cls, path: Path, device: torch.device, space: Parameterization = PIXELS) -> State:
        tensors, counters = runs.read_tensors(path, "checkpoint")
        if "numbers" not in tensors:
            raise UserError(f"{path} was written by another version of ddpp; go on with that, or begin another --out")
        tensors = {name: t.to(device) for name, t in tensors.items()}
        numbers = tensors["numbers"]
        space = space.with_fixed(_beginning(tensors, _FIXED))
        held = Synthetic(space.decode(numbers), tensors["labels"], tensors["step_size"])
        return cls(
            synthetic=held,
            numbers=numbers,
            numbers_velocity=tensors["numbers_velocity"],
            space=space,
            labels_velocity=tensors["labels_velocity"],
            step_size_velocity=tensors["step_size_velocity"],
            numbers_squares=tensors.get("numbers_squares"),
            labels_squares=tensors.get("labels_squares"),
            average=tensors.get("average"),
            memory=_beginning(tensors, _MEMORY),
            **counters,
        )


def _beginning(tensors: dict[str, Tensor], prefix: str) -> Memory:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


_MEMORY, _FIXED = "memory.", "fixed."
_COUNTERS = ("step", "undone", "undone_in_a_row", "skipped", "seconds")


class Diverged(UserError):
    """Ten steps in a row were not finite; ``state`` is the last good one."""

    def __init__(self, text: str, state: State) -> None:
        super().__init__(text)
        self.state = state


def distill(
    settings: DistillConfig, first: Synthetic, method: Method, folder: Path, space: Parameterization = PIXELS
) -> State:
    """Runs the outer steps that are left, from the folder's checkpoint if it has one, else from ``first`` in ``space``.

    Writes ``log.jsonl``, ``checkpoint.safetensors`` and ``snapshots/``. The same configuration gives the same bytes,
    interrupted or not.

    Raises:
        runs.Stopped: a signal asked to stop; the state is saved.
        Diverged: ten steps in a row were not finite; the last good state is saved.
    """
    checkpoint = folder / "checkpoint.safetensors"
    if checkpoint.is_file():
        state = State.load(checkpoint, first.images.device, space)
    else:
        state = State.begin(first, space)
        _save_snapshot(state, folder)
    _remove_snapshots(folder, state.step, settings.snapshot_every)
    log = runs.Log(folder / "log.jsonl", state.step)
    began = time.perf_counter() - state.seconds
    progress = tqdm(total=settings.steps, initial=state.step, desc=f"distil ({settings.method})", unit="step")

    def save(state: State) -> None:
        log.flush()
        replace(state, seconds=time.perf_counter() - began).save(checkpoint)

    with runs.Interruption() as interruption, progress:
        while state.step < settings.steps:
            state, row = outer_step(state, method, settings)
            log.add(row)
            progress.update()
            progress.set_postfix(loss=row["loss"], step_size=row["step_size"], refresh=False)
            if state.undone_in_a_row >= UNDONE_IN_A_ROW:
                save(state)
                raise Diverged(_diverged(state, folder), state)
            if state.step % settings.snapshot_every == 0:
                _save_snapshot(state, folder)
            if state.step % settings.checkpoint_every == 0:
                save(state)
            if interruption.signal is not None:
                save(state)
                text = (
                    f"stopped after step {state.step} of {settings.steps}; continue with --out {folder} --resume, or "
                    f"let it end here with --steps {state.step} beside"
                )
                raise runs.Stopped(text, interruption.signal)
    state = replace(state, seconds=time.perf_counter() - began)
    if state.step % settings.snapshot_every:
        _save_snapshot(state, folder)
    save(state)
    return state


def select(choose: Callable[[], object], problem: Problem, folder: Path) -> State:
    """A set that needs no outer step. Writes ``log.jsonl``, without a line, and ``snapshots/``.

    Raises:
        UserError: the set that was chosen is not one of the problem's; the message says why.
    """
    settings, dataset, began = problem.config.distill, problem.dataset, time.perf_counter()
    chosen = choose()
    if not isinstance(chosen, Synthetic):
        raise UserError(f"the method must choose a ddpp.synthetic.Synthetic, got {type(chosen).__name__}")
    if fault := chosen.fault(dataset.shape, len(dataset.classes), settings.ipc, soft=settings.labels == "soft"):
        raise UserError(f"the set that the method chose {fault}")
    state = replace(State.begin(chosen.to(problem.device)), seconds=time.perf_counter() - began)
    _save_snapshot(state, folder)
    runs.Log(folder / "log.jsonl", 0).flush()
    return state


def outer_step(state: State, method: Method, settings: DistillConfig) -> tuple[State, dict[str, Any]]:
    """The state after one update, and its line of the log.

    The update is taken; skipped where nothing could be matched or too little was; undone where it is not finite.
    """
    update = method.update(state.synthetic, state.step, state.memory)
    if not isinstance(update, Update):
        raise UserError(f"the method's update must be a ddpp.methods.Update, got {type(update).__name__}")
    update = update.checked(state.synthetic)
    proposed = state.moved(update, settings)
    finite = proposed.finite() & torch.isfinite(update.loss)
    # The one place where an outer step waits for the device.
    read = update.loss, update.kept, finite, proposed.synthetic.step_size, state.synthetic.step_size
    loss, kept, usable, step_size, unchanged = torch.stack([x.to(update.loss) for x in read]).tolist()
    if not usable:
        outcome, step_size = "undone", unchanged
        state = replace(state, step=state.step + 1, undone=state.undone + 1, undone_in_a_row=state.undone_in_a_row + 1)
    elif kept == 0 or (settings.max_loss is not None and loss > settings.max_loss):
        outcome, step_size = "skipped", unchanged
        state = replace(state, step=state.step + 1, skipped=state.skipped + 1)
    else:
        outcome, state = "taken", proposed
    row = {
        "step": state.step - 1,
        "loss": loss if usable else None,
        "step_size": step_size,
        "kept": kept,
        "outcome": outcome,
        **update.note,
    }
    return state, row


def _diverged(state: State, folder: Path) -> str:
    return (
        f"{UNDONE_IN_A_ROW} steps in a row were not finite, the last of them step {state.step - 1}; the result before "
        f"them is in {folder}/synthetic.safetensors. Lower --lr-pixels, --lr-step-size or --step-size, or take fewer "
        "--inner-steps."
    )


def _save_snapshot(state: State, folder: Path) -> None:
    state.result.save(folder / "snapshots" / f"step-{state.step:06d}.safetensors", {"step": state.step})


def _remove_snapshots(folder: Path, after: int, every: int) -> None:
    """Removes snapshots that a run which ends elsewhere has left: those after a step, and the last one's."""
    for step, path in synthetic.snapshots(folder).items():
        if step > after or step % every:
            path.unlink()


def _save_result(state: State, config: Config, dataset: Dataset, groups: tuple[str, ...], folder: Path) -> None:
    meta: dict[str, Any] = {
        "dataset": dataset.name,
        "fingerprint": dataset.fingerprint,
        "classes": list(dataset.classes),
        "ipc": config.distill.ipc,
        "method": config.distill.method,
        "model": asdict(config.model),
        "augmentation": {"groups": list(groups), "mode": config.augment.mode},
        "steps": state.step,
        "seed": config.run.seed,
        "undone": state.undone,
        "skipped": state.skipped,
    }
    learned = {}
    if state.space is not PIXELS:
        learned = {"numbers": state.learned, **state.space.fixed}
        meta |= {name: getattr(config.distill, name) for name in ("parameterization", "images_in_one")}
    state.result.save(folder / "synthetic.safetensors", meta, dataset.transform, learned)


def _teachers_of(problem: Problem, method: type[Method] | type[Selection]) -> list[Trajectory]:
    """The teachers, and of each the epochs that this run reads, trained where they are missing.

    Trains, too, the one whose answers an evaluation asks for.
    """
    config, dataset, found = problem.config, problem.dataset, []
    if method.needs_teachers:
        read, whole = _epochs_read(config, method), config.teachers.epochs
        if read < whole:
            print(f"this run reads the first {read} of its teachers' {whole} epochs; no more are trained for it")
        of_run = replace(config, teachers=replace(config.teachers, epochs=read))
        folder = teachers.train(of_run, dataset, problem.device)
        found = store.open_all(folder, of_run, dataset, problem.network)
    if config.evaluate.labels == "teacher":
        teachers.train(replace(config, teachers=replace(config.teachers, count=1)), dataset, problem.device)
    return found


def _epochs_read(config: Config, method: type[Method] | type[Selection]) -> int:
    ended = config.distill.init == "correct" or config.distill.labels == "soft"  # ask teachers at their end
    read = None if ended else getattr(method, "epochs_read", None)
    return read(config) if read else config.teachers.epochs


def _check_same_teachers(folder: Path, found: list[Trajectory]) -> None:
    """Refuses to go on with teachers of another seed or file than those that a run began with."""
    told = {"teachers": [{"seed": t.meta["seed"], "imported": t.meta.get("imported")} for t in found]}
    path = folder / "teachers.json"
    if path.is_file() and runs.read_json(path) != told:
        raise UserError(
            f"{folder} was begun with other teachers than {found[0].path.parent} holds now; see {path}. Give "
            "--teachers-folder, or choose another --out."
        )
    if found:
        runs.write_json(path, told)


def _check(config: Config, method: type[Method] | type[Selection]) -> None:
    """Refuses options that this method cannot follow, before anything is trained."""
    settings = config.distill
    if settings.method == "full" or "/" in settings.method:
        raise UserError(
            f"--method {settings.method}: a method's name must not be 'full' or hold '/', which tables of results give "
            "another meaning; register it under another name"
        )
    if settings.method == "given":  # the other options, such as a preset's, say how the set was made
        return method.check(config)
    if settings.parameterization != "pixels" and hasattr(method, "choose"):
        raise UserError(
            f"--parameterization {settings.parameterization} says what is learned, and {settings.method} learns nothing"
        )
    if settings.given:
        raise UserError(f"--given names a set for --method given, got it with {settings.method}; leave one out")
    if settings.labels == "soft" and not method.learns_labels:
        learning = ", ".join(name for name in METHODS.names() if METHODS.get(name).learns_labels)
        raise UserError(f"--labels soft needs a method that learns labels ({learning}), and {settings.method} does not")
    usual = DistillConfig()
    for names, (methods, what) in _OF_SOME.items():
        for name in names:
            if getattr(settings, name) != getattr(usual, name) and not issubclass(method, methods):
                option = f"--{name.replace('_', '-')} {getattr(settings, name)}"
                raise UserError(f"{option} needs a method that {what}, and {settings.method} does not")
    for name in ("momentum", *(["labels_momentum"] if settings.labels == "soft" else [])):
        if settings.optimizer == "adam" and getattr(settings, name) == 1:
            raise UserError(f"--optimizer adam needs a --{name.replace('_', '-')} below 1, got 1; give 0.9")
    if settings.init == "correct" and not method.needs_teachers:
        raise UserError(f"--init correct asks teachers, and method {settings.method} has none; give --init real")
    if check := getattr(method, "check", None):  # one of a plugin may do without
        check(config)


def _check_steps(folder: Path, steps: int) -> None:
    """Refuses to end a run before the step that it is at."""
    path = folder / "checkpoint.safetensors"
    at = runs.read_tensors(path, "checkpoint")[1].get("step", 0) if path.is_file() else 0
    if at > steps:
        raise UserError(f"{folder} is at step {at} already; give --steps {at} or more")


def prepare(
    config: Config, device: torch.device, name: str | None = None
) -> tuple[Problem, Method | Selection, Synthetic, Parameterization]:
    """What a run begins with: the problem, without teachers; the method; the first set; and what is learned of it.

    Args:
        name: of the data set where a run began with the same images under another.

    Raises:
        UserError: options that cannot work together, or data that cannot be read; there is no folder or teacher yet.
    """
    settings, seed = config.distill, config.run.seed
    method = METHODS.get(settings.method)
    own = own_options(method, settings.own)
    _check(config, method)
    dataset = data.load(config.data)
    dataset = replace(dataset, name=name or dataset.name)
    evaluate.check(config, dataset)
    network = models.build(config.model, dataset.shape, len(dataset.classes), seed=seed).to(device)
    groups = augment.groups_for(config.augment.strategy, dataset.strategy)
    of_pixels = replace(settings, parameterization="pixels", images_in_one=1)
    learned = of_pixels if settings.method == "given" else settings
    space = parameterization.make(learned, dataset, device)
    in_one = learned.images_in_one
    first = synthetic.start(dataset, settings.ipc, settings.init, settings.step_size, seed, in_one).to(device)
    problem = Problem(config, dataset, network, [], groups, device, own)
    return problem, method(problem), first, space


def _run(config: Config, args: argparse.Namespace) -> None:
    settings, seed = config.distill, config.run.seed
    problem, method, first, space = prepare(config, cli.device(config), _name_of(args))
    dataset = problem.dataset
    if method.needs_teachers or config.evaluate.labels == "teacher":  # which a run finds from any folder
        teachers_folder = str(store.folder_of(config, dataset).resolve())
        config = config.with_values({"teachers": {"folder": teachers_folder}}, "--teachers-folder")
        problem = replace(problem, config=config)
    base = Path("runs") / f"{dataset.name}-{settings.method}-ipc{settings.ipc}-seed{seed}"
    out = Path(args.out) if args.out else runs.unused_folder(base)
    if args.resume:
        _check_steps(out, settings.steps)
    with runs.open_folder(out, config, dataset.describe() | _code(config), resume=args.resume) as folder:
        print(f"run folder: {folder}")
        _run_in(folder, problem, method, first, space, resumed=args.resume)


def _code(config: Config) -> dict[str, dict[str, str]]:
    """Under ``plugins``, digests of their files that the method and the architecture are of."""
    sources = {"method": METHODS.source(config.distill.method), "model": models.MODELS.source(config.model.model)}
    code = {what: digest for what, digest in sources.items() if digest}
    return {"plugins": code} if code or config.run.plugins else {}


def _run_in(
    folder: Path,
    problem: Problem,
    method: Method | Selection,
    first: Synthetic,
    space: Parameterization,
    *,
    resumed: bool,
) -> None:
    """Trains teachers that are missing, distils, evaluates and reports."""
    config, began = problem.config, time.perf_counter()
    runs.forget_peak_memory(problem.device)
    with _discarding(folder, resumed):
        problem = replace(problem, teachers=_teachers_of(problem, type(method)))
    teachers_seconds = time.perf_counter() - began
    _check_same_teachers(folder, problem.teachers)
    if problem.teachers:
        method = type(method)(problem)
    try:
        with _discarding(folder, resumed):  # unless steps were taken
            if hasattr(method, "choose"):
                state = select(method.choose, problem, folder)
            else:
                state = distill(config.distill, _first(problem, first, space), method, folder, space)
    except Diverged as e:
        _save_result(e.state, config, problem.dataset, problem.groups, folder)
        raise
    _save_result(state, config, problem.dataset, problem.groups, folder)
    with runs.alone(folder, "evaluate"):
        results = _evaluated(folder, problem, method, state, teachers_seconds)
        report.write(folder, results)
        runs.write_json(folder / "results.json", results)  # the last file: with it a run is finished
        evaluate.forget_parts(folder)
    _tell(folder, results)


@contextlib.contextmanager
def _discarding(folder: Path, resumed: bool) -> Iterator[None]:
    """Removes the folder of a run that wrong input ends before it has anything to keep."""
    try:
        yield
    except UserError:
        if not resumed:
            runs.discard(folder)
        raise


def _first(problem: Problem, first: Synthetic, space: Parameterization) -> Synthetic:
    """The set to begin with: with what teachers say of images and labels, or soft labels without them."""
    settings, dataset = problem.config.distill, problem.dataset
    if problem.teachers:
        return synthetic.start_from_teachers(
            first,
            dataset,
            problem.network,
            problem.teachers,
            init=settings.init,
            labels=settings.labels,
            seed=problem.config.run.seed,
            space=space,
        )
    return synthetic.with_soft_labels(first, len(dataset.classes)) if settings.labels == "soft" else first


def _tell(folder: Path, results: dict[str, Any]) -> None:
    """What a person is to see of a run at its end."""
    print(runs.accuracy_table(results))
    if results["steps"]["undone"] or results["steps"]["skipped"]:
        print(f"\n{report.steps_text(results['steps'])}")
    for text in results["advice"]:
        print(f"\n{text}")
    print(f"\nresult: {folder}/synthetic.safetensors, pictures and tables beside it")


def _advice(rows: list[dict[str, Any]], settings: DistillConfig) -> list[str]:
    """What the log of a trajectory's matching says to a person who looks for a reason."""
    losses = [row["loss"] for row in rows[len(rows) // 2 :] if row["loss"] is not None]
    found = []
    if losses and statistics.median(losses) > 1:
        found.append(
            "The matching loss is above 1 in most of the later steps: students end further from the teacher than they "
            "began. Lower --lr-pixels, --lr-step-size or --step-size; where teachers take few steps an epoch, give "
            "them smaller batches."
        )
    if rows and rows[-1]["step_size"] <= settings.step_size * SMALLEST_STEP_SIZE * 1.001 and settings.lr_step_size:
        found.append(
            "The learned step size reached its lower bound, a thousandth of --step-size: lower --lr-step-size."
        )
    return found


def _evaluated(
    folder: Path, problem: Problem, method: Method | Selection, state: State, teachers_seconds: float
) -> dict[str, Any]:
    """What ``results.json`` holds."""
    config, dataset, device = problem.config, problem.dataset, problem.device
    own = method.accuracy(state.result) if isinstance(method, Predictor) else None
    began = time.perf_counter()
    results = evaluate.compare(config, dataset, folder, problem.groups, device)
    evaluate_seconds = time.perf_counter() - began
    results["seconds"] = {"teachers": teachers_seconds, "distill": state.seconds, "evaluate": evaluate_seconds}
    taken = state.step - state.undone - state.skipped
    results["steps"] = {"taken": taken, "undone": state.undone, "skipped": state.skipped}
    results["peak_memory_mb"] = runs.peak_memory_mb(device)
    if own is not None:
        results["accuracy_of_method"] = own
        print(f"{config.distill.method} itself, without a network: {own:.1f} % of the test images")
    results["config"] = asdict(config)
    matched = isinstance(method, DDPP)
    results["advice"] = _advice(runs.read_log(folder / "log.jsonl", runs.OF_A_STEP), config.distill) if matched else []
    return results


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="DIR", help="Run folder (default: runs/<dataset>-<method>-ipc<n>-seed<s>).")
    parser.add_argument("--resume", action="store_true", help="Continue the run in --out where it stopped.")


def _name_of(args: argparse.Namespace) -> str | None:
    """The data set's name when the run to resume was begun: a folder of images may have been renamed since."""
    path = Path(args.out or "") / "data.json"
    return runs.read_json(path).get("name") if args.resume and path.is_file() else None


def _saved(args: argparse.Namespace) -> Config | None:
    if not args.resume:
        return None
    if not args.out:
        raise UserError("--resume needs --out DIR: the run folder to continue")
    return runs.saved_config(Path(args.out))


def main(argv: Sequence[str] | None = None) -> int:
    description = "Distil a data set into a few synthetic images a class; trains missing teachers, evaluates, reports."
    return cli.run("distill", description, "distill", SECTIONS, _run, argv, arguments=_arguments, base=_saved)


if __name__ == "__main__":
    sys.exit(main())
