"""The masked matching loss: fused, in plain PyTorch, and that under torch.compile."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import report
from torch import Tensor

from ddpp.ops import masked_match_loss

#: Parameters of a ConvNet-D3 and of a ResNet18 on CIFAR-10, and a size far beyond every cache.
SIZES = {"320010": 320_010, "11.2M": 11_200_000, "100M": 100_000_000}
BYTES_PER_PARAMETER = {"forward": 12, "forward+backward": 24}  # 3 reads; then 2 reads and 1 write; float32


@functools.lru_cache(maxsize=1)
def vectors(p: int) -> tuple[Tensor, Tensor, Tensor]:
    """Student, target and start, of which about a tenth is pruned."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(p, generator=generator)
    student = torch.randn(p, generator=generator).mul_(0.3).add_(target)
    return student, target, torch.randn(p, generator=generator).add_(target)


def fused(student: Tensor, target: Tensor, start: Tensor) -> Tensor:
    return masked_match_loss(student, target, start)[0]


def pytorch(student: Tensor, target: Tensor, start: Tensor) -> Tensor:
    return masked_match_loss(student, target, start, fused=False)[0]


def published(student: Tensor, target: Tensor, start: Tensor) -> Tensor:
    """The shortest PyTorch: with divisions, as papers' codes have it; its mask is rounded differently."""
    with torch.no_grad():
        ratio = student / target
        pruned = (ratio < 0.1) | (ratio.reciprocal() < 0.1)
    far, span = (student - target).masked_fill(pruned, 0), (start - target).masked_fill_(pruned, 0)
    return far.dot(far) / span.dot(span)


@functools.cache
def implementation(name: str) -> Callable[..., Tensor]:
    if name == "compile":
        return torch.compile(pytorch, fullgraph=True, dynamic=True)
    return {"fused": fused, "pytorch": pytorch, "published": published}[name]


@pytest.mark.parametrize("name", ["fused", "pytorch", "published", "compile"])
@pytest.mark.parametrize("passes", ["forward", "forward+backward"])
@pytest.mark.parametrize("size", SIZES)
def bench_match_loss(benchmark: Any, size: str, passes: str, name: str, threads: int) -> None:
    p = SIZES[size]
    if size == "100M" and free_memory() < 12 * 2**30:
        pytest.skip("needs 12 GiB of free memory")
    student, target, start = vectors(p)
    function = implementation(name)

    def forward() -> Tensor:
        with torch.no_grad():
            return function(student, target, start)

    def both() -> Tensor:
        x = student.detach().requires_grad_()
        return torch.autograd.grad(function(x, target, start), x)[0]

    benchmark.group = f"match loss, P = {size}, {passes}, {threads} thread{'s' * (threads > 1)}"
    rounds, iterations = {"320010": (15, 10), "11.2M": (7, 1), "100M": (2, 1)}[size]
    benchmark.pedantic(forward if passes == "forward" else both, rounds=rounds, iterations=iterations, warmup_rounds=1)
    report(benchmark, BYTES_PER_PARAMETER[passes] * p, threads)


def free_memory() -> int:
    """Bytes of memory that are free on this machine."""
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
