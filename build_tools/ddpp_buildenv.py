"""What the build finds on this machine. Standard library only: torch is never imported."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import site
import subprocess
import sysconfig
from pathlib import Path

MIN_TORCH = (2, 10)
MIN_CMAKE = (3, 22)
MIN_SETUPTOOLS = (70, 1)  # makes wheels without the package of that name
DEFAULT_ARCHS = "8.0;9.0+PTX"


def _flag(name: str, default: str) -> str:
    """An environment variable that is ``auto``, ``0`` or ``1`` (on/off, true/false are read as well)."""
    value = os.environ.get(name, default).lower()
    value = {"on": "1", "true": "1", "off": "0", "false": "0"}.get(value, value)
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"ddpp: {name} must be auto, 0 or 1, got {value!r}")
    return value


def want_extension() -> bool:
    return _flag("DDPP_BUILD_EXTENSION", "1") != "0"


def want_cuda() -> bool:
    """Whether to compile the CUDA kernels: where nvcc works, whether or not there is a GPU."""
    mode = _flag("DDPP_BUILD_CUDA", "auto")
    if mode == "1" and nvcc() is None:
        raise SystemExit(
            "ddpp: DDPP_BUILD_CUDA=1, but no working nvcc was found. Put nvcc on PATH, or set CUDACXX or CUDA_HOME."
        )
    return mode != "0" and nvcc() is not None


def check_setuptools(version: str) -> None:
    """pip reads build-system.requires under build isolation alone."""
    if tuple(map(int, version.split(".")[:2])) < MIN_SETUPTOOLS and importlib.util.find_spec("wheel") is None:
        raise SystemExit(
            f"ddpp: setuptools {version} cannot make a wheel by itself. Either pip install 'setuptools>="
            f"{MIN_SETUPTOOLS[0]}.{MIN_SETUPTOOLS[1]}', or leave out --no-build-isolation."
        )


def missing_tools() -> list[str]:
    """What the build imports or runs, besides cmake, and this environment lacks."""
    names = ["pybind11"] if shutil.which("ninja") else ["pybind11", "ninja"]
    return [name for name in names if importlib.util.find_spec(name) is None]


def debug() -> bool:
    return _flag("DDPP_DEBUG", "0") == "1"


def torch_version(include: Path) -> tuple[int, int] | None:
    """(major, minor) of the torch these headers belong to; None when they are not usable."""
    try:
        text = (include / "torch/headeronly/version.h").read_text()
    except OSError:
        return None
    found = {key: int(value) for key, value in re.findall(r"#define TORCH_VERSION_(MAJOR|MINOR) (\d+)", text)}
    if not (include / "torch/csrc/stable/library.h").is_file():
        return None
    return found["MAJOR"], found["MINOR"]


def torch_include() -> Path | None:
    """Headers to build against: the environment being installed into first, then the isolated one.

    Under pip's build isolation sys.prefix is still the target environment, only sys.path is not, so its
    torch can be read from there. uv and build use an environment of their own; there the backend's extra
    requirement puts a torch on sys.path.
    """
    places = [os.environ.get("DDPP_TORCH_INCLUDE", "")]
    places += [os.path.join(sysconfig.get_path(key), "torch", "include") for key in ("platlib", "purelib")]
    if site.ENABLE_USER_SITE:
        places.append(os.path.join(site.getusersitepackages(), "torch", "include"))
    spec = importlib.util.find_spec("torch")
    if spec and spec.submodule_search_locations:
        places.append(os.path.join(spec.submodule_search_locations[0], "include"))
    for place in places:
        if place and (torch_version(Path(place)) or (0, 0)) >= MIN_TORCH:
            return Path(place)
    return None


def cmake() -> str | None:
    exe = shutil.which("cmake")
    if exe is None:
        return None
    text = subprocess.run([exe, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"cmake version (\d+)\.(\d+)", text)
    return exe if found and (int(found[1]), int(found[2])) >= MIN_CMAKE else None


def ninja() -> str:
    if exe := shutil.which("ninja"):
        return exe
    import ninja as wheel  # its script is not on PATH in an environment that is not activated

    return os.path.join(wheel.BIN_DIR, "ninja")


def compiler() -> str | None:
    """The C++ compiler CMake will take: $CXX, else the usual names."""
    asked = shlex.split(os.environ.get("CXX", ""))[:1]
    return next((exe for name in asked or ["c++", "g++", "clang++"] if (exe := shutil.which(name))), None)


def nvcc() -> str | None:
    """A working nvcc: CUDACXX, CUDA_HOME, PATH, then the usual place."""
    names = [os.environ.get("CUDACXX", "")]
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            names.append(os.path.join(os.environ[variable], "bin", "nvcc"))
    names += [shutil.which("nvcc") or "", "/usr/local/cuda/bin/nvcc"]
    return next((name for name in names if name and _runs(name)), None)


def _runs(exe: str) -> bool:
    try:
        return subprocess.run([exe, "--version"], capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def cuda_archs() -> str:
    """TORCH_CUDA_ARCH_LIST's syntax (8.0;9.0+PTX) as CMAKE_CUDA_ARCHITECTURES."""
    # No GPU is needed to build, so none is asked: a fixed default, not the visible card.
    text = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS
    archs = []
    for item in re.split(r"[;, ]+", text.strip()):
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", item)
        if not found:
            raise SystemExit(
                f"ddpp: cannot read {item!r} in TORCH_CUDA_ARCH_LIST={text!r}; write it like {DEFAULT_ARCHS}"
            )
        archs.append(f"{found[1]}{found[2]}{found[3]}" + ("" if found[4] else "-real"))
    return ";".join(archs)
