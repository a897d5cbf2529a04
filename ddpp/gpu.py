"""What keeps a GPU from waiting for the host: copies that nobody waits for, and steps replayed as graphs.

An inner step and the way back through it are some fifty kernels each, of a few microseconds. Launched one by one they
cost the host more time than the GPU; captured once as a CUDA graph, one launch replays them all on the same memory, and
those that need not wait for each other on streams beside each other.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from ddpp.config import RunConfig
from ddpp.ops._streams import SIDES, side_streams

MOST_GRAPHS = 8  # each holds the memory of a whole step
_WARM_UP = 3  # calls before a capture: libraries choose their algorithms, and buffers are allocated


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device. The host does not wait for a GPU to have it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


Results = Tensor | tuple[Tensor | None, ...]
#: From a call without arguments to what it gave and what repeats it, with results in the same memory.
Capture = Callable[[Callable[[], Results]], tuple[Results, Callable[[], None]]]


class CudaGraphs:
    """Captures calls as CUDA graphs. They must neither wait for the GPU nor look at a value there.

    Graphs share the memory of what lies between arguments and results, so that no two of them may run at the same time.

    Args:
        sides: streams beside the main one; without, all kernels of a graph follow each other.
    """

    #: Of any capture in this process. Torch's allocator does not get over one that broke off, so no other is tried.
    failed = False
    _pools: ClassVar[weakref.WeakSet[Any]] = weakref.WeakSet()  # of all captures
    #: Pools that are there when a capture breaks off: torch 2.11 ends the process where one is given back after that.
    _for_good: ClassVar[list[Any]] = []

    def __init__(self, sides: int = SIDES) -> None:
        self.sides = sides
        self._pool: Any = None

    def __call__(self, call: Callable[[], Results]) -> tuple[Results, Callable[[], None]]:
        if CudaGraphs.failed:
            raise RuntimeError("an earlier capture failed in this process")
        current = torch.cuda.current_stream()
        main, *sides = _streams(current.device, 1 + self.sides)
        with side_streams(sides):
            self._warm_up(call, main, current)
            graph = torch.cuda.CUDAGraph()
            try:
                with _no_collection(), torch.cuda.graph(graph, pool=self._pool.id, stream=main):
                    results = call()
            except RuntimeError as error:
                CudaGraphs.failed = True
                CudaGraphs._for_good.extend(CudaGraphs._pools)
                torch.cuda.set_stream(current)  # one that broke off leaves its own
                if isinstance(error.__context__, KeyboardInterrupt):  # which is what broke it off
                    raise error.__context__ from None
                raise
        return results, graph.replay

    def _warm_up(self, call: Callable[[], Results], main: torch.cuda.Stream, current: torch.cuda.Stream) -> None:
        """On the graphs' memory, or else it would be needed twice."""
        torch.cuda.empty_cache()  # a pool that lacks memory does not ask for what is cached elsewhere
        self._pool = self._pool or torch.cuda.MemPool()
        CudaGraphs._pools.add(self._pool)
        main.wait_stream(current)
        try:
            with torch.cuda.stream(main), torch.cuda.use_mem_pool(self._pool):
                for _ in range(_WARM_UP):
                    call()
        except RuntimeError:
            self._pool = None  # or what it has taken so far would never be given back
            raise
        finally:
            current.wait_stream(main)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Within the block no garbage is collected: an older graph's memory must not be given back during a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@cache
def _streams(device: torch.device, count: int) -> list[torch.cuda.Stream]:
    """The same for all graphs: memory belongs to a stream, and libraries keep some for each they ever worked on."""
    return [torch.cuda.Stream(device) for _ in range(count)]


class _Slot:
    """A graph's own memory for one argument."""

    def __init__(self, given: Tensor) -> None:
        self.own, self.given, self.version = given.detach().clone(), given, given._version

    def takes(self, given: Tensor) -> bool:
        """Whether it must be copied here: what stays from step to step, such as the images, is so once."""
        changed = given is not self.given or given._version != self.version
        self.given, self.version = given, given._version
        return changed


@dataclass(frozen=True)
class _Recording:
    """A function at arguments of certain shapes, with memory of its own for them and for the results."""

    slots: dict[int, _Slot]  # by the argument's place
    results: Results
    replay: Callable[[], None]

    @classmethod
    def make(cls, function: Callable[..., Any], arguments: tuple[Any, ...], capture: Capture) -> _Recording:
        slots = {i: _Slot(a) for i, a in enumerate(arguments) if isinstance(a, Tensor)}
        own = [slots[i].own if i in slots else a for i, a in enumerate(arguments)]
        with torch.cuda.device_of(next(iter(slots.values())).own):
            return cls(slots, *capture(lambda: function(*own)))

    def __call__(self, arguments: tuple[Any, ...]) -> Results:
        changed = [(slot.own, arguments[i].detach()) for i, slot in self.slots.items() if slot.takes(arguments[i])]
        for dtype in {own.dtype for own, _ in changed}:  # one kernel for all of a type
            own, given = zip(*(pair for pair in changed if pair[0].dtype == dtype), strict=True)
            torch._foreach_copy_(own, given)
        self.replay()
        # New tensors on the same memory: given back as an argument, the slot must see that they have changed.
        if isinstance(self.results, Tensor):
            return self.results.detach()
        return tuple(None if r is None else r.detach() for r in self.results)


def captured(run: RunConfig, device: torch.device) -> bool:
    """Whether student steps and trainings are captured, as a run's options and its device allow it."""
    return run.cuda_graphs and run.use_fused_kernels and device.type == "cuda"


def graphs_for(run: RunConfig, device: torch.device) -> Graphs | None:
    """What student steps are captured by, if they are."""
    return Graphs() if captured(run, device) else None


class Graphs:
    """Functions of tensors, captured once for arguments of the same shapes, and replayed.

    A function must change nothing, and neither wait for the GPU nor look at a value there. Beyond :data:`MOST_GRAPHS`
    combinations of shapes, and after a capture that failed, it is called plainly.

    Args:
        capture: another way to capture and replay than as CUDA graphs.
    """

    def __init__(self, capture: Capture | None = None) -> None:
        self._recordings: dict[tuple[Any, ...], _Recording] = {}  # first, so that their memory's pool outlives them
        self.capture = capture or CudaGraphs()
        self._works = True

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The function's results, without gradients. A later call, of this function or another, may overwrite them.

        Arguments that are no tensors must be hashable; they are part of the graph.
        """
        recording = self._recording(function, arguments)
        return recording(arguments) if recording else function(*arguments)

    def _recording(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> _Recording | None:
        key = function, *((a.shape, a.dtype, a.device) if isinstance(a, Tensor) else a for a in arguments)
        if key not in self._recordings and self._works and len(self._recordings) < MOST_GRAPHS:
            try:
                self._recordings[key] = _Recording.make(function, arguments, self.capture)
            except RuntimeError as error:
                self._works = False
                reason = str(error).splitlines()[0]
                warnings.warn(f"ddpp: steps run without CUDA graphs: {reason}", RuntimeWarning, stacklevel=3)
        return self._recordings.get(key)
