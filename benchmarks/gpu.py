"""The fused operators and the outer step on one GPU, against the bandwidth of copying and against PyTorch.

    python benchmarks/gpu.py --out benchmarks/results/2026-01-01-device.json

Prints a Markdown table and writes the same as JSON. Every side of a case runs in turn, the second-level cache is
overwritten before each call, and the median of the device's own clock is taken. ``--small --device cpu`` tries the
script where there is no GPU; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_match_loss
import bench_norm_pool
import bench_outer_step
import torch
from machine import processor
from torch import Tensor

from ddpp import augment
from ddpp.ops import dsa_augment, masked_match_loss

Side = Callable[[], object]
ROUNDS = 15
CACHE = 256 * 2**20  # bytes, larger than any second-level cache


class Clock:
    """Milliseconds of a call on a device, with cold caches."""

    def __init__(self, device: torch.device, small: bool) -> None:
        self.device = device
        self.cache = torch.empty(2**20 if small else CACHE, dtype=torch.uint8, device=device)

    def __call__(self, call: Side) -> float:
        self.cache.zero_()
        if self.device.type != "cuda":
            began = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - began)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    def medians(self, sides: dict[str, Side], rounds: int = ROUNDS) -> dict[str, float]:
        for call in sides.values():
            call()
            call()
        found = [{name: self(call) for name, call in sides.items()} for _ in range(rounds)]
        return {name: statistics.median(row[name] for row in found) for name in sides}


def copying(clock: Clock, small: bool) -> float:
    """Bytes a millisecond, read and written."""
    source = torch.zeros(2**20 if small else 2**28, device=clock.device)  # 1 GiB of float32
    target = torch.empty_like(source)
    return 2 * source.nbytes / clock.medians({"copy": lambda: target.copy_(source)})["copy"]


def match_loss(device: torch.device, small: bool) -> dict[str, tuple[int, dict[str, Side]]]:
    """By case the bytes that must move and the sides."""
    p = 10_000 if small else bench_match_loss.SIZES["100M"]
    student, target, start = (x.to(device) for x in bench_match_loss.vectors(p))
    plain = bench_match_loss.pytorch
    functions = {
        "fused": lambda x: masked_match_loss(x, target, start)[0],
        "pytorch": lambda x: plain(x, target, start),
        "compile": lambda x: bench_match_loss.implementation("compile")(x, target, start),
    }

    def backward(function: Callable[[Tensor], Tensor]) -> Side:
        leaf = student.detach().requires_grad_()
        loss = function(leaf)
        return lambda: torch.autograd.grad(loss, leaf, retain_graph=True)

    forward: dict[str, Side] = {name: (lambda f=f: f(student)) for name, f in functions.items()}
    return {
        f"match loss, P = {p:,}, forward": (12 * p, forward),
        f"match loss, P = {p:,}, backward": (12 * p, {name: backward(f) for name, f in functions.items()}),
    }


def dsa(device: torch.device, small: bool) -> dict[str, tuple[int, dict[str, Side]]]:
    n, size = (8, 32) if small else (500, 64)
    draw = torch.Generator().manual_seed(0)
    plan = augment.draw(1, n, size, size, groups=augment.GROUPS, mode="all", generator=draw)[0].to(device)
    images = torch.randn(n, 3, size, size, generator=draw).to(device)
    forward: dict[str, Side] = {
        "fused": lambda: dsa_augment(images, plan),
        "pytorch": lambda: dsa_augment(images, plan, fused=False),
    }

    def backward(fused: bool) -> Side:
        leaf = images.detach().requires_grad_()
        augmented = dsa_augment(leaf, plan, fused=fused)
        return lambda: torch.autograd.grad(augmented, leaf, images, retain_graph=True)

    moved = 2 * images.nbytes
    name = f"DSA, all groups, {n}x3x{size}x{size}"
    return {
        f"{name}, forward": (moved, forward),
        f"{name}, adjoint": (moved, {"fused": backward(True), "pytorch": backward(False)}),
    }


def norm_pool(device: torch.device, small: bool) -> dict[str, tuple[int, dict[str, Side]]]:
    shape = (4, 8, 8, 8) if small else (256, 128, 32, 32)
    bench_norm_pool.SHAPES["device"] = shape
    values = tuple(x.to(device) for x in bench_norm_pool.arguments("device", "channels-last"))
    plane = 4 * shape[0] * shape[1] * shape[2] * shape[3]
    cases = {}
    for passes, run in (("forward", bench_norm_pool.forward), ("forward+backward", bench_norm_pool.forward_backward)):
        sides: dict[str, Side] = {
            name: (lambda run=run, name=name: run(bench_norm_pool.implementation(name), values))
            for name in ("fused", "pytorch", "compile")
        }
        cases[passes] = int(bench_norm_pool.PLANES[passes] * plane), sides
    second: dict[str, Side] = {
        "fused": lambda: bench_norm_pool.dual(values),
        "pytorch": lambda: bench_norm_pool.unrolled(bench_norm_pool.plain, values),
    }
    cases["second order"] = int(bench_norm_pool.PLANES["second order"] * plane), second
    return {f"norm-ReLU-pool, {'x'.join(map(str, shape))}, {passes}": case for passes, case in cases.items()}


def outer_steps(device: torch.device, small: bool) -> dict[str, dict[str, Side]]:
    """The reference, every step a graph, against the adjoint engine, both in the same precision."""
    wanted = (
        {"IPC 1, J = 2": bench_outer_step.Case(1, 10, 2)}
        if small
        else {
            "IPC 1, J = 50": bench_outer_step.Case(1, 10, 50),
            "IPC 10, J = 30": bench_outer_step.Case(10, 100, 30),
        }
    )
    cases = {}
    for name, case in wanted.items():
        problem = {key: _moved(value, device) for key, value in case.problem().items()}
        sides = {"pytorch": bench_outer_step.side(bench_outer_step.REFERENCE, problem)}
        cases[f"outer step, {name}"] = sides | {"fused": bench_outer_step.side("dual", problem)}
    return cases


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, list):
        return [_moved(v, device) for v in value]
    return value.to(device) if isinstance(value, (Tensor, torch.nn.Module)) else value


def measure(device: torch.device, small: bool) -> dict[str, Any]:
    clock = Clock(device, small)
    speed = copying(clock, small)
    rows = []
    for cases in (match_loss, dsa, norm_pool):
        for name, (moved, sides) in cases(device, small).items():
            found = clock.medians(sides, 3 if small else ROUNDS)
            rows.append({"case": name, "ms": found, "share_of_copying": moved / found["fused"] / speed})
            print(_line(rows[-1]), flush=True)
    for name, sides in outer_steps(device, small).items():
        rows.append({"case": name, "ms": clock.medians(sides, 1 if small else 5), "memory_mb": _peaks(sides, device)})
        print(_line(rows[-1]), flush=True)
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "copying_gb_s": speed / 1e6,
        "rows": rows,
    }


def _peaks(sides: dict[str, Side], device: torch.device) -> dict[str, float] | None:
    """Peak of torch's allocations above what is held between calls."""
    if device.type != "cuda":
        return None
    found = {}
    for name, call in sides.items():
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        found[name] = (torch.cuda.max_memory_allocated(device) - before) / 1e6
    return found


def _line(row: dict[str, Any]) -> str:
    ms = row["ms"]
    others = [f"{ms[o]:.3g} ms ({ms[o] / ms['fused']:.1f}x)" if o in ms else "" for o in ("pytorch", "compile")]
    share = f"{100 * row['share_of_copying']:.0f} % of copying" if "share_of_copying" in row else ""
    if row.get("memory_mb"):
        share = ", ".join(f"{name} {value:.0f} MB" for name, value in row["memory_mb"].items())
    return f"| {row['case']} | {ms['fused']:.3g} ms | {others[0]} | {others[1]} | {share} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="toy sizes, to try the script")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    torch._functorch.config.donated_buffer = False  # a compiled backward is called again and again
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    print("| | fused | pure PyTorch | torch.compile | |\n|---|---|---|---|---|")
    result = measure(torch.device(args.device), args.small)
    print(f"\n{result['device']}, torch {result['torch']}, copying {result['copying_gb_s']:.0f} GB/s, {result['date']}")
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
