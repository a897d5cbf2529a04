"""Names that a person may type, and what they stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from ddpp.errors import UserError, nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """A table of named things of one kind: data sets, architectures, methods.

    Args:
        kind: what the entries are, in the singular; used in error messages.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that enters its argument under ``name``."""

        def enter(entry: T) -> T:
            if name in self._entries:
                raise KeyError(f"{self.kind} {name!r} is registered twice")
            self._entries[name] = entry
            return entry

        return enter

    def get(self, name: str) -> T:
        """The entry of that name.

        Raises:
            UserError: no such entry; the message lists the known names and the nearest one.
        """
        if name not in self._entries:
            known = ", ".join(self.names())
            raise UserError(f"unknown {self.kind} {name!r}{nearest(name, self._entries)} Known: {known}")
        return self._entries[name]

    def names(self) -> list[str]:
        return sorted(self._entries)
