"""One outer step: loss and exact gradients of J student steps, on the field's ConvNet and image size.

The reference keeps the graph of all J steps in plain PyTorch (GroupNorm, avg_pool2d, create_graph), as published codes
do. Interleaved rounds of all sides in one process, then the memory of one step in fresh processes:

    python benchmarks/bench_outer_step.py [--threads 2] [--rounds 5] [--keep-pages] [--larger|--adam] [--sides SIDE ...]
    python benchmarks/bench_outer_step.py --errors 10 [--sides SIDE ...]

Memory is the peak of the resident set above that at the start of the step, everything included.
"""

from __future__ import annotations

import argparse
import copy
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from machine import processor
from pytest_benchmark.fixture import BenchmarkFixture

from ddpp import augment, models
from ddpp.config import ModelConfig
from ddpp.models import flat
from ddpp.ops import masked_match_loss
from ddpp.unroll import Gradients, provider, training_gradients

CLASSES = 10

Side = Callable[[], Gradients]


@dataclass(frozen=True)
class Case:
    """A synthetic set and how its student is trained; ConvNet of width 128 and the depth that suits the images."""

    ipc: int
    batch: int
    inner_steps: int
    side: int = 32  # pixels
    optimizer: str = "sgd"

    def problem(self, seed: int = 0) -> dict[str, Any]:
        """Arguments of :func:`gradients`. Each parameter of the target is a tenth away from the start."""
        draw = torch.Generator().manual_seed(seed)
        shape = 3, self.side, self.side
        network = models.build(ModelConfig(), shape, CLASSES, seed=seed)
        start = flat.flatten(network)
        count = self.ipc * CLASSES
        size = self.inner_steps, self.batch, *shape[1:]
        return {
            "network": network,
            "start": start,
            "target": start * (1 + 0.1 * torch.randn(start.shape, generator=draw)),
            "images": torch.randn(count, *shape, generator=draw),
            "labels": torch.arange(CLASSES).repeat_interleave(self.ipc),
            "lr": torch.tensor(0.01 if self.optimizer == "sgd" else 0.001),
            "batches": [torch.randperm(count, generator=draw)[: self.batch] for _ in range(self.inner_steps)],
            "plans": list(augment.draw(*size, groups=augment.GROUPS, mode="one", generator=draw)),
            "optimizer": self.optimizer,
        }


CASES = {"IPC 1, J = 50": Case(1, 10, 50), "batch 100, J = 10": Case(10, 100, 10)}
LONGER = {"IPC 1, J = 10": Case(1, 10, 10), "IPC 1, J = 80": Case(1, 10, 80), "IPC 50, J = 80": Case(50, 250, 80)}
LARGER = {"64x64, batch 10, J = 20": Case(1, 10, 20, 64), "128x128, batch 10, J = 20": Case(1, 10, 20, 128)}
#: As RaT-BPTT trains students.
BY_ADAM = {"IPC 1, J = 60, Adam": Case(1, 10, 60, 32, "adam"), "batch 100, J = 10, Adam": Case(10, 100, 10, 32, "adam")}
ALL = CASES | LONGER | LARGER | BY_ADAM
REFERENCE = "reference"
#: Provider and Winograd tile of the adjoint engine, and whether planes are bfloat16.
SIDES = {
    "autograd": ("autograd", 0, False),
    "fused Functions": ("fused", 0, False),
    "dual": ("dual", 0, False),
    "dual, F(2, 3)": ("dual", 2, False),
    "dual, F(4, 3)": ("dual", 4, False),
    "dual, bf16 planes": ("dual", 0, True),
}


def side(name: str, problem: dict[str, Any]) -> Side:
    """What computes one outer step; buffers are kept from call to call, as a run keeps them."""
    if name == REFERENCE:
        return lambda: gradients(problem, engine="unrolled", fused=False)
    kind, tile, bf16 = SIDES[name]
    step = provider(problem["network"], kind, tile=tile, bf16=bf16)
    return lambda: gradients(problem, step=step)


def gradients(problem: dict[str, Any], **how: Any) -> Gradients:
    """Of DDPP's distance to the target."""
    target, start, fused = problem["target"], problem["start"], how.get("fused", True)
    given = {name: value for name, value in problem.items() if name != "target"}
    return training_gradients(
        **given, objective=lambda end: masked_match_loss(end, target, start, 0.1, fused=fused), **how
    )


@pytest.mark.parametrize("name", [REFERENCE, *SIDES])
@pytest.mark.parametrize("case", ["IPC 1", "batch 100"])
def test_outer_step(benchmark: BenchmarkFixture, case: str, name: str) -> None:
    """Two inner steps: the time of one is the same for any J."""
    benchmark.group = f"outer step, {case}, J = 2"
    problem = (Case(1, 10, 2) if case == "IPC 1" else Case(10, 100, 2)).problem()
    found = benchmark.pedantic(side(name, problem), rounds=5, warmup_rounds=1)
    assert torch.isfinite(found.images).all()


def seconds(case: Case, rounds: int, names: Sequence[str] = tuple(SIDES)) -> dict[str, float]:
    """Medians of the reference and the named sides; in each round every side has its turn."""
    problem = case.problem()
    sides = {name: side(name, problem) for name in (REFERENCE, *names)}
    found: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(rounds + 1):
        for name, call in sides.items():
            began = time.perf_counter()
            call()
            if round_:  # the first one warms up
                found[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in found.items()}


def errors(case: Case, seeds: int, names: Sequence[str] = tuple(SIDES)) -> dict[str, list[float]]:
    """For each side and seed how far its float32 gradient of the images is from float64, as a part of its length."""
    found: dict[str, list[float]] = {name: [] for name in (REFERENCE, *names)}
    for seed in range(seeds):
        problem = case.problem(seed)
        double = {k: _double(v) for k, v in problem.items()}
        exact = gradients(double, engine="unrolled", fused=False).images
        for name, values in found.items():
            off = side(name, problem)().images.double() - exact
            values.append(float(off.norm() / exact.norm()))
    return found


def _double(value: Any) -> Any:
    if isinstance(value, torch.nn.Module):
        return copy.deepcopy(value).double()
    return value.double() if isinstance(value, torch.Tensor) and value.dtype == torch.float32 else value


def _print_errors(seeds: int, names: Sequence[str]) -> None:
    print("| float32 against float64, IPC 1, J = 10 | median | worst |\n|---|---|---|")
    for name, values in errors(LONGER["IPC 1, J = 10"], seeds, names).items():
        print(f"| {name} | {statistics.median(values):.2e} | {max(values):.2e} |")


def _status(field: str) -> float:
    """A size of this process in MB."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return int(match[1]) / 1e3


def peak_here(case: str, name: str) -> float:
    """MB that one outer step, the first of this process, adds to the resident set at its highest."""
    call = side(name, ALL[case].problem())
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def peak(case: str, name: str, threads: int) -> float:
    """:func:`peak_here` of a fresh process."""
    command = [sys.executable, __file__, "--threads", str(threads), "--peak", case, name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _print_times(rounds: int, cases: Sequence[str], names: Sequence[str]) -> None:
    tables = {case: seconds(ALL[case], rounds, names) for case in cases}
    print(f"| seconds of an outer step | {' | '.join(cases)} |\n|---|{'---|' * len(cases)}")
    for name in (REFERENCE, *names):
        cells = [f"{t[name]:.3f} ({t[REFERENCE] / t[name]:.2f}x)" for t in tables.values()]
        print(f"| {name} | {' | '.join(cells)} |")


def _print_peaks(threads: int, cases: Sequence[str], names: Sequence[str]) -> None:
    print(f"\n| MB above the start | {' | '.join(cases)} |\n|---|{'---|' * len(cases)}")
    references = {case: peak(case, REFERENCE, threads) for case in cases}
    print(f"| {REFERENCE} | {' | '.join(f'{mb:.0f}' for mb in references.values())} |")
    for name in names:
        found = {case: peak(case, name, threads) for case in cases}
        cells = [f"{mb:.0f} (1/{references[case] / mb:.1f})" for case, mb in found.items()]
        print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="times or errors of these alone")
    parser.add_argument("--keep-pages", action="store_true", help="malloc keeps its pages, for all sides")
    parser.add_argument("--larger", action="store_true", help="images of 64x64 and 128x128, depths 4 and 5, memory too")
    parser.add_argument("--adam", action="store_true", help="students that move by Adam, memory too")
    parser.add_argument("--peak", nargs=2, metavar=("CASE", "SIDE"), help="print the memory of one step and end")
    parser.add_argument("--errors", type=int, metavar="SEEDS", help="print how far float32 is from float64, and end")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.errors:
        _print_errors(args.errors, args.sides)
        return
    if args.peak:
        print(peak_here(*args.peak))
        return
    if args.keep_pages:
        from conftest import keep_pages  # importing it is what keeps the pages

        assert keep_pages()
    print(f"{processor()}, {args.threads} threads, torch {torch.__version__}, pages kept: {args.keep_pages}\n")
    cases = list(LARGER if args.larger else BY_ADAM if args.adam else CASES)
    _print_times(args.rounds, cases, args.sides)
    if args.larger or args.adam:
        _print_peaks(args.threads, cases, args.sides)
    elif not args.keep_pages and len(args.sides) == len(SIDES):
        _print_peaks(args.threads, cases, args.sides)
        for case in LONGER:
            print(f"\n{case}, dual, F(2, 3): {peak(case, 'dual, F(2, 3)', args.threads):.0f} MB", end="")
        print()


if __name__ == "__main__":
    main()
