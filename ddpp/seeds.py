"""Randomness without state: every draw comes from (seed, where, step).

A resumed run so draws what an uninterrupted one would have drawn.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_GLOBAL = threading.RLock()  # all threads share torch's global generator


def derive(seed: int, *key: str | int) -> int:
    """A 63-bit seed for one place of one run, e.g. ``derive(0, "distill", "batches", 17)``."""
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, *key: str | int) -> torch.Generator:
    """A CPU generator seeded by :func:`derive`; draws are made on the CPU and moved, so every device sees the same."""
    return torch.Generator().manual_seed(derive(seed, *key))


@contextmanager
def in_global_generator(seed: int) -> Iterator[None]:
    """Seeds torch's global generator for what draws from no other, and leaves it as it was. One thread at a time."""
    with _GLOBAL, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
