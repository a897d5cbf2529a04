"""Builds ddpp's compiled libraries by driving CMakeLists.txt; everything else is in pyproject.toml.

Environment: DDPP_BUILD_EXTENSION=0 (a pure Python package), DDPP_BUILD_CUDA=auto|0|1, DDPP_DEBUG=1,
TORCH_CUDA_ARCH_LIST, MAX_JOBS, DDPP_TORCH_INCLUDE, CMAKE_ARGS.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "build_tools"))
import ddpp_buildenv as env  # noqa: E402

NO_COMPILER = """\
ddpp: no C++ compiler was found, so the fused kernels cannot be compiled. Either
  - install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; conda install cxx-compiler), or
  - go without: DDPP_BUILD_EXTENSION=0 pip install -e .   (pure PyTorch, the same results, slower)"""
NO_TORCH = """\
ddpp: no torch >= {}.{} was found to build against. Either
  - install it first (pip install torch), or leave out --no-build-isolation, or
  - go without the fused kernels: DDPP_BUILD_EXTENSION=0 pip install -e ."""
NO_TOOLS = """\
ddpp: the build needs {}, which this environment lacks. Either
  - install what is missing (pip install {}), or leave out --no-build-isolation, or
  - go without the fused kernels: DDPP_BUILD_EXTENSION=0 pip install -e ."""


def extensions() -> list[Extension]:
    # _cpu and _cuda hold no Python: torch loads them. They are named like extensions so that setuptools
    # puts them where the package is, in a wheel as in an editable install.
    if not env.want_extension():
        return []
    names = ["ddpp._cpu", "ddpp._info"] + (["ddpp._cuda"] if env.want_cuda() else [])
    return [Extension(name, [], py_limited_api=name != "ddpp._info") for name in names]


def remove_stale(command: build_ext | build_py, keep: set[str]) -> None:
    """A library of an earlier build must stay neither in build/lib nor beside the sources."""
    places = [Path(command.build_lib) / "ddpp"]
    if getattr(command, "inplace", False) or command.editable_mode:
        places.append(HERE / "ddpp")
    for place in places:
        for old in place.glob("_*.so"):
            if old.name not in keep:
                old.unlink()


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        if not self.distribution.ext_modules:
            remove_stale(self, keep=set())


class BuildExt(build_ext):
    def build_extensions(self) -> None:
        include = env.torch_include()
        if env.compiler() is None:
            raise SystemExit(NO_COMPILER)
        if include is None:
            raise SystemExit(NO_TORCH.format(*env.MIN_TORCH))
        if tools := env.missing_tools():
            raise SystemExit(NO_TOOLS.format(" and ".join(tools), " ".join(tools)))
        out = self.compile(include)
        for extension in self.extensions:
            destination = Path(self.get_ext_fullpath(extension.name))
            destination.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(out / "out" / destination.name, destination)

    def compile(self, include: Path) -> Path:
        """Configures and builds; returns the build folder, which is kept so that a rebuild is short."""
        import pybind11  # a build requirement

        cuda = any(extension.name == "ddpp._cuda" for extension in self.extensions)
        if not cuda:
            print("ddpp: building for the CPU only (no nvcc, or DDPP_BUILD_CUDA=0)", flush=True)
        kind = ("-cuda" if cuda else "-cpu") + ("-debug" if env.debug() else "")
        out = HERE / "build" / f"cmake-{sys.implementation.cache_tag}{kind}"
        options = {
            "CMAKE_BUILD_TYPE": "RelWithDebInfo" if env.debug() else "Release",
            "CMAKE_MAKE_PROGRAM": env.ninja(),
            "DDPP_BUILD_CUDA": "1" if cuda else "0",
            "DDPP_TORCH_INCLUDE": include,
            "DDPP_PYTHON": "ON",
            "DDPP_TESTS": "OFF",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        if cuda:
            options |= {"CMAKE_CUDA_COMPILER": env.nvcc(), "CMAKE_CUDA_ARCHITECTURES": env.cuda_archs()}
        cmake = env.cmake() or "cmake"
        configure = [cmake, "-S", str(HERE), "-B", str(out), "-G", "Ninja"]
        configure += [f"-D{key}={value}" for key, value in options.items()]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        jobs = os.environ.get("MAX_JOBS")
        try:
            subprocess.run(configure, check=True)
            subprocess.run([cmake, "--build", str(out), *(["-j", jobs] if jobs else [])], check=True)
        except subprocess.CalledProcessError:
            raise SystemExit(
                "ddpp: compiling failed; the compiler's own message stands above. "
                "DDPP_BUILD_CUDA=0 leaves out CUDA, DDPP_BUILD_EXTENSION=0 everything compiled."
            ) from None
        except FileNotFoundError as error:
            raise SystemExit(f"ddpp: {error.filename} was not found: pip install cmake ninja") from None
        return out

    def run(self) -> None:
        super().run()
        remove_stale(self, keep={Path(self.get_ext_filename(e.name)).name for e in self.extensions})


setup(license="MIT", ext_modules=extensions(), cmdclass={"build_ext": BuildExt, "build_py": BuildPy})
