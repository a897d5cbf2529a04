"""Plants bugs, one at a time, in a copy of each op's kernels, and shows that the C++ tests catch each.

    python tools/plant_bugs.py [op ...]

The bugs stand in csrc/tests/planted_<op>.toml: a file of csrc, a text in it, what stands there instead, and
why that is wrong. Ends with 1 when a bug is not caught, and when its text is no longer in the file.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Group(NamedTuple):
    """Bugs of one op that one build shows: no more is built than what they take."""

    op: str
    others: list[str]
    sanitizers: str
    base_only: bool
    bugs: list[dict[str, str]]

    def seconds(self) -> int:
        """About what it takes: sanitizers take several times as long to compile."""
        return (8 if self.sanitizers else 2) * (5 + len(self.bugs))


def groups(op: str) -> list[Group]:
    planted = tomllib.loads((ROOT / f"csrc/tests/planted_{op}.toml").read_text())
    found: dict[tuple[str, bool], Group] = {}
    for bug in planted["bug"]:
        sanitizers = bug.get("sanitizers", planted.get("sanitizers", "address,undefined"))
        base_only = not bug["file"].endswith("_avx512.inl")
        new = Group(op, planted.get("with", []), sanitizers, base_only, [])
        found.setdefault((sanitizers, base_only), new).bugs.append(bug)
    return list(found.values())


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True)


def configure(folder: Path, group: Group) -> None:
    """A copy of what the test of the op needs, other ops' kernels among it, built with sanitizers."""
    shutil.copy2(ROOT / "CMakeLists.txt", folder)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    for path in (folder / "csrc").rglob("*_*"):
        source = path.parent.name in ("kernels", "tests") and path.suffix in (".cpp", ".cu")
        wanted = [group.op, *group.others] if path.parent.name == "kernels" else [group.op]
        if source and not any(name in path.name for name in wanted):
            path.unlink()
    sanitize, base_only = f"-DDDPP_SANITIZE={group.sanitizers}", f"-DDDPP_BASE_ONLY={int(group.base_only)}"
    options = ["-DDDPP_BUILD_CUDA=0", "-DCMAKE_CXX_FLAGS_RELEASE=-O1", sanitize, base_only]
    done = run("cmake", "-S", folder, "-B", folder / "build", "-G", "Ninja", *options)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)


def concerned(file: str) -> tuple[str, ...]:
    """Options of ctest that choose the tests a source has a part in."""
    if file.endswith((".cu", ".cuh")):
        return "-R", "emulated"
    return ("-E", "emulated") if file.endswith(("_cpu.cpp", "_avx512.inl")) else ()


def test(folder: Path, op: str, *chosen: str) -> str | None:
    """What the tests say first; None when they pass."""
    done = run("cmake", "--build", folder / "build", "--target", f"test_{op}")
    if done.returncode:
        sys.exit(f"a planted bug must compile:\n{done.stdout[-3000:]}")
    done = run(
        "ctest",
        "--test-dir",
        folder / "build",
        "--timeout",
        "120",
        "--stop-on-failure",
        "--output-on-failure",
        *chosen,
    )
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in done.stdout.splitlines()]
    marks = ("CHECK(", "ERROR: AddressSanitizer", "what():", "runtime error", "Timeout", "***")
    return next((line for mark in marks for line in lines if mark in line), "failed")


def plant(group: Group) -> int:
    """Plants each bug of a group; returns how many were missed."""
    op = group.op
    missed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        configure(folder, group)
        if said := test(folder, op):
            sys.exit(f"{op}: the tests fail without a planted bug: {said}")
        for bug in group.bugs:
            path = folder / "csrc" / bug["file"]
            right = path.read_text()
            if right.count(bug["old"]) != 1:
                sys.exit(f"{bug['file']} must hold this text once: {bug['old']!r} ({bug['what']})")
            path.write_text(right.replace(bug["old"], bug["new"]))
            said = test(folder, op, *concerned(bug["file"]))
            path.write_text(right)
            missed += said is None
            print(
                f"{'caught' if said else 'MISSED':6}  {op}: {bug['what']}  [{said or 'all tests passed'}]",
                flush=True,
            )
    return missed


def main() -> None:
    known = sorted(path.stem.removeprefix("planted_") for path in (ROOT / "csrc/tests").glob("planted_*.toml"))
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"some of {', '.join(known)}; by default all")
    ops = parser.parse_args().ops or known
    if unknown := set(ops) - set(known):
        parser.error(f"no bugs are known for {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    longest_first = sorted((group for op in ops for group in groups(op)), key=lambda group: -group.seconds())
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # most of the time one compiler runs
        missed = sum(pool.map(plant, longest_first))
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
