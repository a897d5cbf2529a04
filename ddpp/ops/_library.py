"""Registers the operators and loads their compiled forms.

An operator is defined once, in Python, by its plain-torch reference: the fallback where nothing is compiled,
the kernel of fake tensors, and the tests' oracle. The compiled libraries add kernels for their device,
nothing else. Three backends hold the same operators: ``compiled`` (what users get), ``reference`` (no
compiled kernels) and, for tests, ``emulated`` (the CUDA kernels compiled for the host).

Environment: ``DDPP_DISABLE_EXT=1`` loads no compiled library; ``DDPP_CPU_ISA=base|avx2|avx512`` picks the
kernels of the CPU.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])

NAMESPACES = {"compiled": "ddpp", "reference": "ddpp_reference", "emulated": "ddpp_emulated"}
_FOLDER = Path(__file__).resolve().parent.parent
_LIBRARIES = {name: torch.library.Library(name, "FRAGMENT") for name in NAMESPACES.values()}

#: Every operator by its name, with its reference.
references: dict[str, Callable[..., Any]] = {}
#: Each compiled library: "loaded", or why it is not.
status: dict[str, str] = {}
_current: Any = torch.ops.ddpp


def define(schema: str) -> Callable[[F], F]:
    """Decorator that registers an operator under its reference.

    Fake tensors run the reference on the meta device, so it must not branch on values there.
    """

    def register(reference: F) -> F:
        name = schema.partition("(")[0]
        references[name] = reference
        for library in _LIBRARIES.values():
            library.define(schema)
            library.impl(name, reference, "CompositeExplicitAutograd")
        return reference

    return register


def ops() -> Any:
    """The namespace of operators in use: ``ops().match_loss.default(...)``."""
    return _current


def function(compiled: Any, transformed: Any, plain: Any) -> Any:
    """The form of an autograd Function for this call.

    torch.compile takes no Function that has a jvp; torch.func's transforms need ``setup_context``; without both, a
    forward that takes the context saves 20 microseconds a call.
    """
    if torch.compiler.is_compiling():
        return compiled
    return transformed if torch._C._are_functorch_transforms_active() else plain


@contextmanager
def using(backend: str) -> Iterator[None]:
    """Makes another backend the one in use. For tests; not thread-safe."""
    global _current
    previous = _current
    _current = getattr(torch.ops, NAMESPACES[backend])
    try:
        yield
    finally:
        _current = previous


def implementation(name: str, device: str, backend: str = "compiled") -> tuple[str, str]:
    """Which implementation an operator uses on a device ("cpu" or "cuda"), and why.

    Returns:
        ``("C++" | "CUDA" | "pure PyTorch", reason)``.
    """
    qualified = f"{NAMESPACES[backend]}::{name}"
    if torch._C._dispatch_has_kernel_for_dispatch_key(qualified, device.upper()):
        return ("C++" if device == "cpu" and backend == "compiled" else "CUDA"), "compiled"
    library = {"cpu": "_cpu", "cuda": "_cuda"}[device]
    state = status.get(library, "not loaded")
    return "pure PyTorch", f"no kernel in {library}" if state == "loaded" else f"{library}: {state}"


def load(library: str, path: Path) -> None:
    """Loads a compiled library; a failure is a warning, since the references do the same work."""
    if not path.exists():
        status[library] = "not built"
        return
    try:
        torch.ops.load_library(str(path))
        status[library] = "loaded"
    except OSError as error:
        status[library] = f"failed to load: {str(error.__cause__ or error).splitlines()[0]}"
        warnings.warn(f"ddpp: {path.name} {status[library]}; pure PyTorch is used", RuntimeWarning, stacklevel=2)


def _load_all() -> None:
    if os.environ.get("DDPP_DISABLE_EXT") == "1":
        status.update(_cpu="disabled by DDPP_DISABLE_EXT=1", _cuda="disabled by DDPP_DISABLE_EXT=1")
        return
    load("_cpu", _FOLDER / "_cpu.abi3.so")
    if torch.version.cuda is None:
        status["_cuda"] = "this torch is a CPU build"
    else:
        load("_cuda", _FOLDER / "_cuda.abi3.so")
    _check_isa()


def _check_isa() -> None:
    wanted = os.environ.get("DDPP_CPU_ISA")
    if wanted is None or status["_cpu"] != "loaded":
        return
    try:
        from ddpp import _info
    except ImportError:  # built for another Python, as the library need not be
        return
    if wanted not in _info.supported_isas():
        warnings.warn(
            f"ddpp: DDPP_CPU_ISA={wanted} is not one of {', '.join(_info.supported_isas())}; "
            f"{_info.active_isa()} is used",
            RuntimeWarning,
            stacklevel=2,
        )


_load_all()
