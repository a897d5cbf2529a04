"""How many times faster the fused operators are: both sides in one process, their rounds interleaved.

    python benchmarks/ratios.py [--threads 2] [--rounds 15]

Prints a Markdown table of medians and of ratios of medians, forward and backward together, with the machine in its
heading. The allocator keeps its pages for every side (see conftest.py).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import bench_dsa
import bench_match_loss
import torch
from conftest import PAGES_KEPT, copy_bandwidth
from machine import processor
from torch import Tensor

Side = Callable[[], Tensor]


def medians(sides: dict[str, Side], rounds: int, repeats: int) -> dict[str, float]:
    """Seconds of one call of each side; in each round every side has its turn."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for name in sides:
        sides[name]()
    for _ in range(rounds):
        for name, call in sides.items():
            began = time.perf_counter()
            for _ in range(repeats):
                call()
            seconds[name].append((time.perf_counter() - began) / repeats)
    return {name: statistics.median(values) for name, values in seconds.items()}


def match_loss(size: str) -> dict[str, Side]:
    student, target, start = bench_match_loss.vectors(bench_match_loss.SIZES[size])

    def side(name: str) -> Side:
        def call() -> Tensor:
            x = student.detach().requires_grad_()
            return torch.autograd.grad(bench_match_loss.implementation(name)(x, target, start), x)[0]

        return call

    return {name: side(name) for name in ("fused", "pytorch", "compile")}


def dsa(groups: str, batch: int) -> dict[str, Side]:
    functions = {"fused": bench_dsa.fused, "pytorch": bench_dsa.pytorch}
    if groups == "all":
        functions["compile"] = bench_dsa.compiled()
    return {
        name: bench_dsa.passes_of(function, batch, 32, groups)["forward+backward"]
        for name, function in functions.items()
    }


def row(name: str, found: dict[str, float], note: str = "") -> str:
    others = [
        f"{found[other] * 1e3:.3g} ms ({found[other] / found['fused']:.1f}x)" if other in found else ""
        for other in ("pytorch", "compile")
    ]
    return f"| {name} | {found['fused'] * 1e3:.3g} ms | {others[0]} | {others[1]} | {note} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{processor()}, {args.threads} threads, torch {torch.__version__}, allocator keeps pages: {PAGES_KEPT}\n")
    print("| forward + backward | fused | pure PyTorch | torch.compile | |\n|---|---|---|---|---|")
    for size, repeats in (("320010", 20), ("11.2M", 1)):
        found = medians(match_loss(size), args.rounds, repeats)
        moved = bench_match_loss.BYTES_PER_PARAMETER["forward+backward"] * bench_match_loss.SIZES[size]
        speed = moved / found["fused"] / 1e9
        share = speed / copy_bandwidth(moved, args.threads)
        print(row(f"match loss, P = {size}", found, f"{speed:.0f} GB/s, {share:.0%} of copying"))
    for batch in (100, 500):
        ratios = []
        for groups in bench_dsa.GROUPS:
            found = medians(dsa(groups, batch), args.rounds, 4)
            ratios.append(found["pytorch"] / found["fused"])
            print(row(f"DSA with drawing, {groups}, {batch} images", found))
        print(f"| DSA, mean of the six groups, {batch} images | | {statistics.fmean(ratios[:6]):.2f}x | | |")


if __name__ == "__main__":
    main()
