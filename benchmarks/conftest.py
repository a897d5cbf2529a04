"""What the benchmarks share: kept pages, threads, and the machine's copy bandwidth.

Both sides of a comparison run with malloc keeping the pages it got. By default glibc returns large blocks to
the system, so that each new tensor pays for page faults; the benchmarks measure kernels.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo

from ddpp.cli import keep_pages

PAGES_KEPT = keep_pages()

# One process compiles each function for many sizes, thread counts and layouts.
torch._dynamo.config.recompile_limit = 64


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """The number of threads, in turn."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@functools.cache
def copy_bandwidth(size: int, threads: int) -> float:
    """GB/s, reads and writes, of torch's copy between two float32 vectors of that many bytes in all."""
    source = torch.ones(max(1, size // 8))
    destination = torch.empty_like(source)
    destination.copy_(source)
    best = float("inf")
    for _ in range(7):
        began = time.perf_counter()
        destination.copy_(source)
        best = min(best, time.perf_counter() - began)
    return size / best / 1e9


def report(benchmark: Any, moved: int, threads: int) -> None:
    """Writes bytes moved and GB/s beside the time. To be called after the benchmark ran.

    Args:
        moved: bytes that the algorithm has to read and write, whatever the implementation.
    """
    if benchmark.disabled:  # run once, untimed
        return
    best = benchmark.stats.stats.min
    copy = copy_bandwidth(moved, threads)
    benchmark.extra_info.update(
        threads=threads,
        bytes_moved=moved,
        gb_per_s=round(moved / best / 1e9, 2),
        copy_gb_per_s=round(copy, 2),
        share_of_copy=round(moved / best / 1e9 / copy, 3),
        malloc_keeps_pages=PAGES_KEPT,
    )
