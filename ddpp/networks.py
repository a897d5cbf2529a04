"""The many networks of a stage: trained side by side, counted on one bar, each kept once it is done."""

from __future__ import annotations

import json
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from ddpp import __version__, registry, runs
from ddpp.config import Config, EvaluateConfig
from ddpp.data import Dataset, Images
from ddpp.errors import UserError
from ddpp.training import Backend, Recipe

Result = TypeVar("Result")


def check_rate(config: Config) -> None:
    """Refuses a learned step size as the rate of another optimiser than the students'.

    Raises:
        UserError: it would be.
    """
    own, asked = config.distill.inner_optimizer, config.networks_optimizer
    if config.evaluate.lr is None and asked != own:
        raise UserError(
            f"networks by {asked} need a learning rate of their own (--lr, or --evaluate-lr of ddpp.distill): the "
            f"set's step size is that of students by {own}"
        )


def check_own_labels(config: Config, stage: str) -> None:
    """Refuses a teacher's answers where a stage trains on the images' own labels.

    Raises:
        UserError: they are asked for.
    """
    if config.evaluate.labels != "own":
        raise UserError(f"ddpp.{stage} trains on the set's own labels: give --labels own and --no-cutmix")


def recipe(config: Config, step_size: float) -> Recipe:
    """How networks are trained on a set of few images, at its learned step size unless a rate is given."""
    s = config.evaluate
    found = replace(
        recipe_on_all(config),
        epochs=s.epochs,
        lr=step_size if s.lr is None else s.lr,
        weight_decay=s.weight_decay,
        optimizer=config.networks_optimizer,
    )
    return found if s.labels == "own" else replace(found, temperature=s.temperature, cutmix=s.cutmix)


def recipe_on_all(config: Config) -> Recipe:
    """How networks are trained on all real images."""
    s = config.evaluate
    decay = s.weight_decay if s.full_weight_decay is None else s.full_weight_decay
    return Recipe(s.full_epochs, s.full_lr, s.momentum, decay, s.batch, decay=True)


def images_bar(what: str, total: int, *, shown: bool = True) -> tqdm[NoReturn]:
    """A bar of the images that networks are trained on, so that time left is told long before the first is trained."""
    return tqdm(total=total, desc=what, unit=" images", unit_scale=True, disable=not shown)


def skip(bar: tqdm[NoReturn], images: int) -> None:
    """Counts images of an earlier training on a bar, where they say nothing of the speed of this one."""
    if not bar.disable:
        bar.initial += images
        bar.n += images
        bar.last_print_n += images
        bar.refresh()


def results_of(
    calls: Sequence[Callable[[], Result]], device: torch.device, stop: Callable[[], object] = lambda: None
) -> Iterator[Result]:
    """The results of calls that train or test a network each, in their order.

    On a CPU a call has a thread: they need not wait for each other, as threads within an operator do. Where not all
    results are taken, as after Ctrl-C, ``stop`` is called, upon which the calls that have begun should end.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or min(threads, len(calls)) <= 1:
        yield from (call() for call in calls)
        return
    pool = ThreadPoolExecutor(threads)
    torch.set_num_threads(1)  # also of the threads that begin from now on
    try:
        yield from pool.map(lambda call: call(), calls)
    except BaseException:
        stop()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


class Job(NamedTuple):
    """One of many trainings."""

    part: str  # its name in a ledger, see :func:`part_of`
    images: int  # that it counts on the bar
    call: Callable[[], Any]  # gives what JSON keeps


class Trainings:
    """The networks of a stage, side by side as :func:`results_of` has them; a stage that was cut goes on.

    Args:
        bar: counts images, as jobs call :meth:`advance`.
        ledger: keeps what each gave; may be left out.
    """

    def __init__(self, backend: Backend, bar: tqdm[NoReturn], ledger: runs.Ledger | None = None) -> None:
        self.backend, self.bar, self.ledger = backend, bar, ledger
        self._stopped, self._writing = threading.Event(), threading.Lock()

    def advance(self, images: int) -> None:
        """After an update on so many images."""
        if self._stopped.is_set():
            raise CancelledError  # of a network whose accuracy nobody will ask for
        with self.bar.get_lock():  # networks train in threads
            self.bar.update(images)

    def run(self, jobs: Sequence[Job]) -> list[Any]:
        """What each job gave, now or before, in their order."""
        calls = [partial(self._kept_or_called, job) for job in jobs]
        return list(results_of(calls, self.backend.device, self._stopped.set))

    def _kept_or_called(self, job: Job) -> Any:
        if self.ledger and (kept := self.ledger.get(job.part)) is not None:
            with self.bar.get_lock():
                skip(self.bar, job.images)
            return kept
        found = job.call()
        if self.ledger:
            with self._writing:
                self.ledger.add(job.part, found)
        return found


def about(config: Config, dataset: Dataset) -> dict[str, Any]:
    """What the networks of a stage depend on beside what :func:`part_of` names; for its ledger."""
    # Not what is asked for in all: each network's part names what it takes of that.
    same = replace(config, data=replace(config.data, data_root="", download=False), evaluate=EvaluateConfig())
    versions = {"ddpp": __version__, "torch": torch.__version__}
    found = {"config": asdict(same), "data": dataset.fingerprint, "threads": torch.get_num_threads(), **versions}
    return found | ({"plugins": of_plugins} if (of_plugins := registry.plugins()) else {})


def part_of(recipe: Recipe, *key: Any) -> str:
    """Names a network by all that it depends on beside :func:`about`: how and, by the key, on which images."""
    return json.dumps([*key, asdict(recipe)])


def digest(*held: Tensor | Images) -> list[Any]:
    """Names what a network is trained on by its values; the images of the data set all together."""
    if not all(isinstance(each, Tensor) for each in held):
        return ["all"]
    return [zlib.crc32(each.contiguous().cpu().numpy().data) for each in held if isinstance(each, Tensor)]
