"""Differentiable Siamese augmentation: fused, in plain PyTorch, and that under torch.compile.

Each pass draws its plan, as training does; all sides draw with the same function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import report
from torch import Tensor

from ddpp import augment
from ddpp.ops import dsa, dsa_augment

GROUPS = {**{group: (group,) for group in dsa.GROUPS}, "all": dsa.GROUPS}
BYTES_PER_VALUE = {"forward": 8, "forward+backward": 16}  # a read and a write each; float32


def fused(images: Tensor, plan: Tensor) -> Tensor:
    return dsa_augment(images, plan)


def pytorch(images: Tensor, plan: Tensor) -> Tensor:
    return dsa_augment(images, plan, fused=False)


def compiled() -> Callable[[Tensor, Tensor], Tensor]:
    """Plain PyTorch under torch.compile; the groups, all of them, are known to it, so that it is one graph."""
    return torch.compile(lambda images, plan: dsa.reference(images, plan, dsa.GROUPS), fullgraph=True)


def passes_of(function: Callable[..., Tensor], n: int, side: int, groups: str) -> dict[str, Callable[[], Tensor]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(n, 3, side, side, generator=generator)
    grad = torch.randn(n, 3, side, side, generator=generator)

    def plan() -> Tensor:
        return augment.draw(1, n, side, side, groups=GROUPS[groups], mode="all", generator=generator)[0]

    def forward() -> Tensor:
        with torch.no_grad():
            return function(images, plan())

    def both() -> Tensor:
        x = images.detach().requires_grad_()
        return torch.autograd.grad(function(x, plan()), x, grad)[0]

    return {"forward": forward, "forward+backward": both}


def run(
    benchmark: Any, function: Callable[..., Tensor], n: int, side: int, groups: str, passes: str, threads: int
) -> None:
    benchmark.group = f"DSA, {groups}, {n} x 3 x {side} x {side}, {passes}, {threads} thread{'s' * (threads > 1)}"
    rounds, iterations = (4, 1) if n * side * side > 200_000 else (5, 4)
    timed = passes_of(function, n, side, groups)[passes]
    benchmark.pedantic(timed, rounds=rounds, iterations=iterations, warmup_rounds=1)
    report(benchmark, BYTES_PER_VALUE[passes] * n * 3 * side * side, threads)


@pytest.mark.parametrize("name", ["fused", "pytorch"])
@pytest.mark.parametrize("passes", ["forward", "forward+backward"])
@pytest.mark.parametrize("n", [10, 100, 500])
@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("groups", GROUPS)
def bench_dsa(benchmark: Any, groups: str, side: int, n: int, passes: str, name: str, threads: int) -> None:
    run(benchmark, {"fused": fused, "pytorch": pytorch}[name], n, side, groups, passes, threads)


@pytest.mark.parametrize("passes", ["forward", "forward+backward"])
def bench_dsa_under_compile(benchmark: Any, passes: str, threads: int) -> None:
    run(benchmark, compiled(), 100, 32, "all", passes, threads)
