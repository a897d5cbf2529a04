"""What is built and loaded, what happens where it is not, and what `python -m ddpp.info` says of it."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ddpp
from ddpp import config, info
from ddpp.ops import _library

ROOT = Path(__file__).resolve().parent.parent
compiled = pytest.mark.skipif(_library.status["_cpu"] != "loaded", reason=f"_cpu: {_library.status['_cpu']}")

LOSS = """
import torch
from ddpp.ops import _library, masked_match_loss
print(_library.implementation("match_loss", "cpu"))
print(float(masked_match_loss(torch.tensor([1.0, 2.0]), torch.tensor([1.5, 2.5]), torch.zeros(2))[0]))
"""


@pytest.fixture
def buildenv(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that finds what the build needs."""
    monkeypatch.syspath_prepend(str(ROOT / "build_tools"))
    return importlib.import_module("ddpp_buildenv")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, cwd=ROOT, capture_output=True, text=True
    )


def test_importing_ddpp_loads_nothing() -> None:
    done = python("import sys, ddpp; print(ddpp.__version__, 'torch' in sys.modules)")
    assert done.stdout.split() == [ddpp.__version__, "False"]


def test_a_public_name_is_found_in_the_package() -> None:
    assert ddpp.masked_match_loss is ddpp.ops.masked_match_loss
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = ddpp.nonsense


def test_without_the_extension_the_reference_gives_the_same() -> None:
    done = python(LOSS, DDPP_DISABLE_EXT="1")
    assert done.returncode == 0, done.stderr
    used, loss = done.stdout.splitlines()
    assert used == "('pure PyTorch', '_cpu: disabled by DDPP_DISABLE_EXT=1')"
    assert float(loss) == pytest.approx(0.5 / 8.5, rel=1e-6)


def test_a_library_that_does_not_load_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "status", {})
    broken = tmp_path / "_cpu.abi3.so"
    broken.write_bytes(b"not a library")
    with pytest.warns(RuntimeWarning, match=r"_cpu.abi3.so failed to load: .*; pure PyTorch is used"):
        _library.load("_cpu", broken)
    _library.load("_cuda", tmp_path / "_cuda.abi3.so")
    assert _library.status["_cuda"] == "not built"
    assert _library.status["_cpu"].startswith("failed to load")


@compiled
@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
def test_an_instruction_set_can_be_forced(isa: str) -> None:
    from ddpp import _info

    if isa not in _info.supported_isas():
        pytest.skip(f"this CPU does not run {isa}")
    done = python("import ddpp._info; print(ddpp._info.active_isa())" + LOSS, DDPP_CPU_ISA=isa)
    assert done.stdout.splitlines()[:2] == [isa, "('C++', 'compiled')"], done.stderr
    assert float(done.stdout.splitlines()[2]) == pytest.approx(0.5 / 8.5, rel=1e-6)


@compiled
def test_an_unknown_instruction_set_is_a_warning() -> None:
    done = python(LOSS, DDPP_CPU_ISA="sse9")
    assert done.returncode == 0
    assert "DDPP_CPU_ISA=sse9 is not one of base" in done.stderr


def test_info_names_every_operator_and_library() -> None:
    done = subprocess.run([sys.executable, "-m", "ddpp.info"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for expected in (ddpp.__version__, torch.__version__, "_cpu", "_cuda", *_library.references):
        assert expected in done.stdout
    words = done.stdout.split()
    assert words.count("cpu") == words.count("cuda") >= len(_library.references)  # no column runs into the next
    for line in done.stdout.splitlines():
        assert line == line.rstrip()


def test_info_is_a_stage_as_others_are() -> None:
    by_name = subprocess.run([sys.executable, "-m", "ddpp", "info"], cwd=ROOT, capture_output=True, text=True)
    assert by_name.returncode == 0 and by_name.stdout.startswith("ddpp "), by_name.stderr
    reading, writing = os.pipe()
    os.close(reading)  # as `| head` does
    ended = subprocess.run(
        [sys.executable, "-m", "ddpp.info"], cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, "ddpp.info: stopped: nobody reads what it prints\n")


def test_info_tells_of_published_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main(["--presets", "ddpp-cifar100", "ipc1000"]) == 0
    told = capsys.readouterr().out
    names = [line for line in told.splitlines() if not line.startswith(" ")]
    assert names == sorted(names) and set(names) == {
        name for name in config.preset_names() if "ddpp-cifar100" in name or "ipc1000" in name
    }
    assert "24.6 ± 0.1 %" in told and "arXiv 2209.14609" in told  # the paper's figure of one image a class
    assert info.main(["--presets", "imagenet22k"]) == 2
    assert "no preset has imagenet22k in its name" in capsys.readouterr().err


def test_the_cuda_library_is_left_out_with_a_reason_on_a_cpu_torch() -> None:
    if torch.version.cuda is not None:
        pytest.skip("this torch is a CUDA build")
    assert _library.status["_cuda"] == "this torch is a CPU build"


@pytest.mark.parametrize(
    ("archs", "expected"),
    [
        ("8.0;9.0+PTX", "80-real;90"),
        ("7.5 8.6", "75-real;86-real"),
        ("9.0a,10.0+PTX", "90a-real;100"),
        ("", "80-real;90"),
    ],
)
def test_the_list_of_architectures(archs: str, expected: str, buildenv: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", archs)
    assert buildenv.cuda_archs() == expected


@pytest.mark.parametrize(
    ("variable", "value", "call", "message"),
    [
        ("TORCH_CUDA_ARCH_LIST", "Hopper", "cuda_archs", r"cannot read 'Hopper'.*write it like 8.0;9.0\+PTX"),
        ("DDPP_BUILD_CUDA", "maybe", "want_cuda", "DDPP_BUILD_CUDA must be auto, 0 or 1, got 'maybe'"),
        ("DDPP_DEBUG", "yes", "debug", "DDPP_DEBUG must be auto, 0 or 1, got 'yes'"),
    ],
)
def test_errors_of_the_build(
    variable: str, value: str, call: str, message: str, buildenv: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit, match=message):
        getattr(buildenv, call)()


def test_cuda_asked_for_without_nvcc(buildenv: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDPP_BUILD_CUDA", "1")
    monkeypatch.setattr(buildenv, "nvcc", lambda: None)
    with pytest.raises(SystemExit, match=r"no working nvcc was found\. Put nvcc on PATH"):
        buildenv.want_cuda()
    monkeypatch.setenv("DDPP_BUILD_CUDA", "auto")
    assert not buildenv.want_cuda()


def test_an_old_setuptools_is_named(buildenv: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buildenv.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"setuptools 65\.5\.0 cannot make a wheel .*pip install 'setuptools>=70\.1'"):
        buildenv.check_setuptools("65.5.0")
    buildenv.check_setuptools("70.1.0")


def test_missing_build_tools_are_named(buildenv: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buildenv.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(buildenv.shutil, "which", lambda name: None)
    assert buildenv.missing_tools() == ["pybind11", "ninja"]


def test_building_without_a_compiler_names_the_ways_out(tmp_path: Path) -> None:
    """On a copy, so that nothing of this checkout is touched."""
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "build_tools").symlink_to(ROOT / "build_tools")
    (tmp_path / "ddpp").mkdir()
    (tmp_path / "ddpp" / "__init__.py").touch()
    environment = os.environ | {"CXX": "no-such-compiler", "DDPP_BUILD_CUDA": "0"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "no C++ compiler was found" in done.stderr
    assert "apt install g++" in done.stderr
    assert "DDPP_BUILD_EXTENSION=0 pip install" in done.stderr
    assert "Traceback" not in done.stderr
    environment |= {"DDPP_BUILD_EXTENSION": "0"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
