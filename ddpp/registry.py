"""Names that a person may type, and what they stand for."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Generic, TypeVar

from ddpp.errors import UserError, nearest

T = TypeVar("T")

_plugins: set[str] = set()  # digests of the files that registered something


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
            if name in self._entries and not _again(entry, self._entries[name]):
                raise KeyError(f"{self.kind} {name!r} is registered twice")
            self._entries[name], self._sources[name] = entry, _source(entry)
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


def _again(entry: object, before: object) -> bool:
    """Whether it is the same one, edited, of a session: a notebook's cell that is run again."""
    names = [(getattr(x, "__module__", None), getattr(x, "__qualname__", None)) for x in (entry, before)]
    return names[0] == names[1] and names[0][0] == "__main__"


def plugins() -> list[str]:
    """Digests of the files of plugins that registered something, sorted. What these import is not looked at."""
    return sorted(_plugins)


def _source(entry: object) -> str:
    """A digest of the file that defines a plugin's entry, or of its own lines in a notebook; empty for ddpp's own."""
    name = getattr(entry, "__module__", None) or ""
    if name.partition(".")[0] == __package__:
        return ""
    file = getattr(sys.modules.get(name), "__file__", None)
    text = Path(file).read_bytes() if file else name.encode()
    if not file:
        with contextlib.suppress(OSError, TypeError):  # there are no lines of what was typed
            text = inspect.getsource(entry).encode()  # type: ignore[arg-type]
    digest = hashlib.sha256(text).hexdigest()
    _plugins.add(digest)
    return digest


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
                _run_file(Path(name).resolve())
            else:
                importlib.import_module(name)
        except Exception as e:
            lines = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(e.__traceback__)]
            own = [line for line in lines if not line.startswith(("<frozen", __file__, importlib.__file__))]
            at = f" at {own[-1]}" if own else ""
            raise UserError(f"--plugins {name} cannot be loaded: {type(e).__name__}: {e}{at}") from e


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
