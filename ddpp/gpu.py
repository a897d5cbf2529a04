"""What keeps a GPU from waiting for the host: copies that nobody waits for, and student steps replayed as graphs.

A student step is some sixty kernels of a few microseconds each. Launched one by one they cost the host more time than
the GPU; captured once as a CUDA graph, one launch replays them all on the same memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpp.dual import Step, StepAdjoint

MOST_GRAPHS = 8  # each holds the memory of a whole step
_WARM_UP = 3  # calls before a capture: libraries choose their algorithms, and buffers are allocated


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device. The host does not wait for a GPU to have it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


Call = Callable[[], tuple[Tensor | None, ...]]
#: From a call without arguments to what it gave and what repeats it, with results in the same memory.
Capture = Callable[[Call], tuple[tuple[Tensor | None, ...], Callable[[], None]]]


def cuda_graph(call: Call) -> tuple[tuple[Tensor | None, ...], Callable[[], None]]:
    """Captures a call as a CUDA graph. The call must neither wait for the GPU nor look at a value there."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return results, graph.replay


@dataclass(frozen=True)
class _Recording:
    """One method on arguments of certain shapes: its own memory for arguments and results, and what computes them."""

    step: Step  # what it holds is part of the graph
    arguments: tuple[Tensor, ...]
    results: tuple[Tensor | None, ...]
    replay: Callable[[], None]

    @classmethod
    def make(cls, step: Step, method: str, arguments: tuple[Tensor, ...], capture: Capture) -> _Recording:
        own = tuple(a.detach().clone() for a in arguments)
        run = getattr(step, method)

        def call() -> tuple[Tensor | None, ...]:
            found = run(*own)
            return found if isinstance(found, tuple) else (found,)

        with torch.cuda.device_of(own[0]):
            return cls(step, own, *capture(call))

    def __call__(self, arguments: tuple[Tensor, ...]) -> tuple[Any, ...]:
        for own, given in zip(self.arguments, arguments, strict=True):
            own.copy_(given.detach())
        self.replay()
        return tuple(None if r is None else r.clone() for r in self.results)


class GraphedStep:
    """A :class:`ddpp.dual.Step` whose methods are captured once for arguments of the same shapes, and replayed.

    Results are copies: they stay as they are at the next call. Beyond :data:`MOST_GRAPHS` combinations of shapes, and
    after a capture that failed, arguments of new shapes are computed without a graph.

    Args:
        build: makes the step. Each graph has a step of its own, so that none finds another's memory changed.
        capture: another way to capture and replay.
    """

    def __init__(self, build: Callable[[], Step], capture: Capture = cuda_graph) -> None:
        self.build, self.capture = build, capture
        self.plain = build()
        self._recordings: dict[tuple[Any, ...], _Recording] = {}
        self._works = True

    def gradient(self, theta: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """As the step's."""
        recording = self._recording("gradient", theta, images, labels)
        return recording((theta, images, labels))[0] if recording else self.plain.gradient(theta, images, labels)

    def adjoint(self, theta: Tensor, adjoint: Tensor, images: Tensor, labels: Tensor) -> StepAdjoint:
        """As the step's."""
        arguments = theta, adjoint, images, labels
        recording = self._recording("adjoint", *arguments)
        return StepAdjoint(*recording(arguments)) if recording else self.plain.adjoint(*arguments)

    def _recording(self, method: str, *arguments: Tensor) -> _Recording | None:
        key = method, *((a.shape, a.dtype, a.device) for a in arguments)
        if key not in self._recordings and self._works and len(self._recordings) < MOST_GRAPHS:
            try:
                self._recordings[key] = _Recording.make(self.build(), method, arguments, self.capture)
            except RuntimeError as error:
                self._works = False
                reason = str(error).splitlines()[0]
                warnings.warn(f"ddpp: student steps run without CUDA graphs: {reason}", RuntimeWarning, stacklevel=3)
        return self._recordings.get(key)
