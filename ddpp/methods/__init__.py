"""Distillation methods: one file and one registration each.

A method gives, at each outer step, the gradients of the synthetic images and of the step size; the loop in
:mod:`ddpp.distill` applies, checks and saves them. A selection gives a set, of real images or one that is there, once,
and there is no loop.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ddpp.config import Config
from ddpp.data import Dataset
from ddpp.errors import UserError, nearest
from ddpp.registry import Registry
from ddpp.synthetic import Synthetic
from ddpp.trajectories import Trajectory


@dataclass(frozen=True)
class Problem:
    """What a method works on."""

    config: Config
    dataset: Dataset
    network: nn.Module
    teachers: list[Trajectory]  # none when a method is built to see what it refuses; then it is built again
    groups: tuple[str, ...]
    device: torch.device
    own: dict[str, Any] = field(default_factory=dict)  # what --own gave of the method's ``options``, and their defaults


Memory = dict[str, Tensor]  # what a method hands on from one outer step to the next, finite; checkpoints hold it


class Update(NamedTuple):
    """Gradients of one outer step, without a graph."""

    loss: Tensor  # []
    images: Tensor  # [N, C, H, W]
    step_size: Tensor  # []
    kept: Tensor  # [] share of parameters kept, 0 for a degenerate step
    note: dict[str, int]  # what was drawn, for the log
    labels: Tensor | None = None  # [N, K] by the logits of soft labels
    memory: Memory = {}  # noqa: RUF012 (never changed)

    def checked(self, now: Synthetic) -> Update:
        """The same, cut off from any graph.

        Raises:
            UserError: a field that does not fit the set, or is of another kind; the message names it.
        """
        wanted = {"loss": (), "images": now.images.shape, "step_size": (), "kept": ()}
        if self.labels is not None:
            if not now.labels.is_floating_point():
                raise UserError("the method's update has labels, but the set's are fixed; they need --labels soft")
            wanted["labels"] = now.labels.shape
        for name, shape in wanted.items():
            value = getattr(self, name)
            if not isinstance(value, Tensor) or value.shape != shape:
                raise UserError(f"the method's update must have {name} as a tensor {list(shape)}, got {_told(value)}")
            if name in ("images", "labels", "step_size") and value.dtype != now.images.dtype:
                raise UserError(f"the method's update must have {name} as {now.images.dtype}, got {value.dtype}")
            if name == "loss" and not value.is_floating_point():
                raise UserError(f"the method's update must have loss as a floating point number, got {value.dtype}")
        for name in ("memory", "note"):
            if not isinstance(getattr(self, name), dict):
                raise UserError(f"the method's update must have {name} as a dict, got {_told(getattr(self, name))}")
        for name in (*self.memory, *self.note):
            if not isinstance(name, str):
                raise UserError(f"the method's memory and note must have names as keys, got {_told(name)}")
        for name, value in self.memory.items():
            if not isinstance(value, Tensor):
                raise UserError(f"the method's memory must hold tensors, got {_told(value)} as {name!r}")
        for name, value in self.note.items():
            if not isinstance(value, int | float | str | None):
                raise UserError(f"the method's note must hold numbers and words, got {_told(value)} as {name!r}")
        cut = {name: getattr(self, name).detach() for name in wanted}
        return self._replace(**cut, memory={name: t.detach() for name, t in self.memory.items()})


def _told(value: object) -> str:
    return f"{list(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__} {value!r}"


class Method(Protocol):
    """Built for a run, once more when its teachers are there; ``update`` depends on its arguments and the seed alone.

    One of a plugin may have ``options``, a table of names and defaults, for ``--own``. Its teachers have all epochs of
    the configuration, or where there is an ``epochs_read(config)``, so many.
    """

    needs_teachers: bool
    learns_labels: bool

    @staticmethod
    def check(config: Config) -> None:
        """Refuses, before anything is trained, options that cannot work together."""

    def __init__(self, problem: Problem) -> None: ...

    def update(self, synthetic: Synthetic, step: int, memory: Memory) -> Update: ...


@runtime_checkable
class Predictor(Protocol):
    """A method that predicts with the synthetic images itself, without a trained network."""

    def accuracy(self, synthetic: Synthetic) -> float:
        """Its test accuracy, in percent."""


class Selection(Protocol):
    """Built once for a run; what it chooses depends on the problem and the seed alone. Known by its ``choose``."""

    needs_teachers: bool
    learns_labels: bool

    @staticmethod
    def check(config: Config) -> None:
        """Refuses, before anything is trained, options that cannot work together."""

    def __init__(self, problem: Problem) -> None: ...

    def choose(self) -> Synthetic:
        """``ipc`` images of each class, class by class, with the step size to train networks at, on the CPU."""


def own_options(method: type[Method] | type[Selection], given: Sequence[str]) -> dict[str, Any]:
    """The ``options`` of a method, with those replaced that ``--own`` gives as ``name=value``.

    Raises:
        UserError: the method has no such option, or the value is not of its default's type.
    """
    found = dict(getattr(method, "options", {}))
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--own {text} must be NAME=VALUE")
        if name not in found:
            known = ", ".join(found) or "none"
            raise UserError(f"--own {text}: the method has no option {name!r}{nearest(name, found)} Known: {known}")
        kind = type(found[name])
        if kind not in (bool, int, float, str):
            raise UserError(f"--own {name}: the default must be of type bool, int, float or str, got {found[name]!r}")
        try:
            found[name] = {"true": True, "false": False}[value] if kind is bool else kind(value)
        except (ValueError, KeyError) as e:
            raise UserError(f"--own {name} must be of type {kind.__name__}, got {value!r}") from e
    return found


METHODS: Registry[type[Method] | type[Selection]] = Registry("method")

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
