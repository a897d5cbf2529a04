"""The backends that the op tests run on.

DDPP_REQUIRE_BACKENDS=reference,compiled,emulated,cuda: a backend named there that ran no test is a failure.
"""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpp import networks
from ddpp.ops import _library

ROOT = Path(__file__).resolve().parent.parent
torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # as every stage of ddpp sets it
REQUIRED = {name for name in os.environ.get("DDPP_REQUIRE_BACKENDS", "").split(",") if name}
_ran: set[str] = set()


@dataclass(frozen=True)
class Backend:
    """Where an op test runs: ``reference`` (plain torch), ``compiled``, ``emulated`` CUDA, or ``cuda``."""

    name: str
    device: torch.device

    @property
    def operators(self) -> str:
        """The backend of :mod:`ddpp.ops._library` that holds the operators."""
        return "compiled" if self.name == "cuda" else self.name


@functools.cache
def _why_not(name: str) -> str | None:
    """Why a backend cannot run here; None when it can."""
    if name == "compiled" and _library.status["_cpu"] != "loaded":
        return f"_cpu: {_library.status['_cpu']}"
    if name == "cuda" and not torch.cuda.is_available():
        return "no GPU"
    if name == "cuda" and _library.status["_cuda"] != "loaded":
        return f"_cuda: {_library.status['_cuda']}"
    return _load_emulated() if name == "emulated" else None


def _load_emulated() -> str | None:
    """Compiles the CUDA kernels for the host, into build/emulated, and loads them."""
    cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
    scripts = Path(sys.executable).parent  # the wheels' scripts, in an environment that is not activated
    cmake = cmake or shutil.which("cmake", path=str(scripts))
    ninja = ninja or shutil.which("ninja", path=str(scripts))
    if cmake is None or ninja is None:
        return "no cmake or ninja: pip install 'ddpp[test]'"
    build = ROOT / "build" / "emulated"
    build.mkdir(parents=True, exist_ok=True)
    options = {
        "CMAKE_MAKE_PROGRAM": ninja,
        "DDPP_BUILD_CUDA": "0",
        "DDPP_EMULATED": "ON",
        "DDPP_TESTS": "OFF",
        "DDPP_TORCH_INCLUDE": Path(torch.__file__).parent / "include",
    }
    with open(build / "lock", "w") as lock:  # test processes side by side build once
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (
            [cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *(f"-D{k}={v}" for k, v in options.items())],
            [cmake, "--build", build, "--target", "_emulated"],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                return f"building it failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    _library.load("_emulated", build / "out" / "_emulated.abi3.so")
    state = _library.status["_emulated"]
    return None if state == "loaded" else state


@contextmanager
def _in_use(name: str) -> Iterator[Backend]:
    """A backend, made the one in use; one that cannot run here is skipped with the reason."""
    if reason := _why_not(name):
        (pytest.fail if name in REQUIRED else pytest.skip)(f"backend {name}: {reason}")
    chosen = Backend(name, torch.device("cuda" if name == "cuda" else "cpu"))
    with _library.using(chosen.operators):
        yield chosen
    _ran.add(name)


@pytest.fixture(params=["reference", "compiled", "emulated", "cuda"])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Each backend in turn."""
    with _in_use(request.param) as chosen:
        yield chosen


@pytest.fixture
def emulated() -> Iterator[Backend]:
    """The emulated CUDA kernels alone."""
    with _in_use("emulated") as chosen:
        yield chosen


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Two threads inside the test, and what was set before after it."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The bars of images that stages show from now on."""
    shown: list[Any] = []
    plain = networks.images_bar

    def noted(*args: Any, **options: Any) -> Any:
        shown.append(plain(*args, **options))
        return shown[-1]

    monkeypatch.setattr(networks, "images_bar", noted)
    return shown


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A process of pytest-xdist says which backends it ran."""
    _ran.update(getattr(node, "workeroutput", {}).get("ran", ()))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["ran"] = sorted(_ran)
    missing = REQUIRED - _ran
    if missing and not session.config.option.collectonly and not hasattr(session.config, "workerinput"):
        print(f"\nDDPP_REQUIRE_BACKENDS: no test ran on {', '.join(sorted(missing))}")
        session.exitstatus = 1
