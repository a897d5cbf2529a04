"""Names that a person may type, and what they stand for."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Generic, TypeVar

from ddpp.errors import UserError, nearest

T = TypeVar("T")

_plugins: dict[str, str] = {}  # by name the digests of those that were loaded
_loading = ""  # digest of the one that is being loaded


class Registry(Generic[T]):
    """A table of named things of one kind: data sets, architectures, methods.

    Args:
        kind: what the entries are, in the singular; used in error messages.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}
        self._sources: dict[str, str] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that enters its argument under ``name``."""

        def enter(entry: T) -> T:
            if name in self._entries:
                raise KeyError(f"{self.kind} {name!r} is registered twice")
            self._entries[name], self._sources[name] = entry, _loading
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

    def source(self, name: str) -> str:
        """A digest of the plugin's file that registered an entry; empty for one of ddpp's own."""
        return self._sources.get(name, "")


def plugins() -> list[str]:
    """Digests of the files of the plugins that were loaded, sorted. What these import is not looked at."""
    return sorted(set(_plugins.values()))


def load_plugins(names: Iterable[str]) -> None:
    """Runs Python files and modules that register entries of their own, each once in a process.

    Args:
        names: a file where one ends with ``.py``, else a module that can be imported.

    Raises:
        UserError: one is missing, or an exception ended it; the message names the line.
    """
    for name in names:
        try:
            if name.endswith(".py"):
                path = Path(name).resolve()
                with _as_source(str(path), path):
                    _run_file(path)
            else:
                found = importlib.util.find_spec(name)
                with _as_source(name, Path(found.origin) if found and found.origin else None):
                    importlib.import_module(name)
        except Exception as e:
            lines = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(e.__traceback__)]
            own = [line for line in lines if not line.startswith(("<frozen", __file__, importlib.__file__))]
            at = f" at {own[-1]}" if own else ""
            raise UserError(f"--plugins {name} cannot be loaded: {type(e).__name__}: {e}{at}") from e


@contextlib.contextmanager
def _as_source(name: str, path: Path | None) -> Iterator[None]:
    """What is registered within the block is of this file."""
    global _loading
    known = path is not None and path.is_file()
    digest = hashlib.sha256(path.read_bytes() if path and known else name.encode()).hexdigest()
    before, _loading = _loading, digest
    try:
        yield
    finally:
        _loading = before
    _plugins.setdefault(name, digest)


def _run_file(path: Path) -> None:
    key = f"ddpp plugin {path}"
    spec = importlib.util.spec_from_file_location(key, path)
    if key in sys.modules or spec is None or spec.loader is None:
        return
    sys.modules[key] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(sys.modules[key])
    except BaseException:
        del sys.modules[key]
        raise
