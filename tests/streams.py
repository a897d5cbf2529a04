"""A stand-in for CUDA streams that finds races, without a GPU.

Operators run on the CPU, one after the other, and are noted with the stream they belong to. Two that touch the same
memory, one of them to write, must be ordered by what streams wait for. Memory belongs to the stream that allocated it;
once nobody holds it, that stream takes it again, and must then have waited for every use.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Race(AssertionError):
    """Two uses of memory that no wait puts in order."""


class Stream:
    """In place of ``torch.cuda.Stream``: how far it is itself, and how far it knows others to be."""

    device = torch.device("cpu")

    def __init__(self, name: str) -> None:
        self.name = name
        self.clock: dict[Stream, int] = {self: 0}

    def wait_stream(self, other: Stream) -> None:
        for stream, time in other.clock.items():
            self.clock[stream] = max(time, self.clock.get(stream, 0))


class Use(NamedTuple):
    stream: Stream
    time: int
    operator: str
    first: int  # bytes in its storage
    last: int
    writes: bool

    def known_to(self, stream: Stream) -> bool:
        return self.time <= stream.clock.get(self.stream, 0)


@dataclass
class Memory:
    storage: StorageWeakRef
    owner: Stream
    uses: list[Use] = field(default_factory=list)


class Streams(TorchDispatchMode):
    """Within it streams are these; raises :class:`Race`.

    Attributes:
        sides: to give to :func:`ddpp.ops._streams.side_streams`.
        beside: the names of the operators that ran on them.
    """

    def __init__(self, sides: int) -> None:
        super().__init__()
        self.sides = [Stream(f"side {i}") for i in range(sides)]
        self.beside: list[str] = []
        self._current = self._main = Stream("main")
        self._memory: dict[int, Memory] = {}

    def __enter__(self) -> Streams:
        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(torch.cuda, "current_stream", lambda device=None: self._current)
        self._patch.setattr(torch.cuda, "stream", self._switched)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.undo()

    @contextmanager
    def _switched(self, stream: Stream) -> Iterator[None]:
        before, self._current = self._current, stream
        yield
        self._current = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._allocate()
        found = func(*args, **kwargs)
        self._current.clock[self._current] += 1
        if _only_views(func):
            return found
        if self._current is not self._main:
            self.beside.append(func.name())
        named = {a.name: a for a in func._schema.arguments}
        given = {**dict(zip(named, args, strict=False)), **kwargs}
        for name, value in given.items():
            alias = named[name].alias_info
            self._use(func.name(), value, writes=alias is not None and alias.is_write)
        self._use(func.name(), found, writes=True)
        return found

    def _use(self, operator: str, values: Any, writes: bool) -> None:
        stream = self._current
        for tensor in (t for t in tree_leaves(values) if isinstance(t, Tensor) and t.numel()):
            storage = StorageWeakRef(tensor.untyped_storage())
            memory = self._memory.setdefault(storage.cdata, Memory(storage, stream))
            use = Use(stream, stream.clock[stream], operator, *_extent(tensor), writes)
            for other in memory.uses:
                apart = use.last < other.first or other.last < use.first
                if not (apart or other.known_to(stream)) and (writes or other.writes):
                    raise Race(f"{operator} on {stream.name} does not wait for {other.operator} on {other.stream.name}")
            memory.uses.append(use)

    def _allocate(self) -> None:
        """The current stream may take any of its own memory that was given back."""
        stream = self._current
        for key in [k for k, m in self._memory.items() if m.owner is stream and m.storage.expired()]:
            for use in self._memory.pop(key).uses:
                if not use.known_to(stream):
                    raise Race(f"{stream.name} takes memory that {use.operator} on {use.stream.name} may still use")


def _only_views(func: Any) -> bool:
    returns = func._schema.returns
    views = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return views or func.name() == "aten::detach"


def _extent(tensor: Tensor) -> tuple[int, int]:
    reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    size, first = tensor.element_size(), tensor.storage_offset()
    return first * size, (first + reach + 1) * size - 1
