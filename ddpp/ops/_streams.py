"""Kernels beside each other: one of a few images fills a small part of a GPU, and the gradients of weights can wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch

T = TypeVar("T")
SIDES = 2
OF_WEIGHTS, ALONG = range(SIDES)  # what runs there: gradients of weights, and tangents
_sides: ContextVar[Sequence[torch.cuda.Stream]] = ContextVar("sides", default=())


@contextmanager
def side_streams(streams: Sequence[torch.cuda.Stream]) -> Iterator[None]:
    """Within it :class:`Beside` has these, :data:`SIDES` of one device, besides the current stream."""
    before = _sides.set(streams)
    try:
        yield
    finally:
        _sides.reset(before)


class Beside:
    """Runs calls, one after the other, beside those that follow on the current stream; without streams, at once.

    Until :meth:`wait` nothing may change what a call reads, nor look at what it writes or gives back.

    Args:
        side: which of the side streams.
    """

    def __init__(self, side: int) -> None:
        streams = _sides.get()
        self._stream = streams[side] if streams else None
        self._running: list[Any] = []

    def __bool__(self) -> bool:
        """Whether there is a stream for it."""
        return self._stream is not None

    def __call__(self, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
        if self._stream is None:
            return function(*arguments, **options)
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            result = function(*arguments, **options)
        # Held, or else the current stream might be given their memory. The result's own is this stream's.
        self._running.append((arguments, options))
        return result

    def wait(self) -> None:
        """Lets the current stream wait for all calls so far. The host does not wait."""
        if self._stream is not None and self._running:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
            self._running.clear()
