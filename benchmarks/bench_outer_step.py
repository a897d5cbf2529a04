"""One outer step: loss and exact gradients of J student steps, on the field's ConvNet and image size.

The reference keeps the graph of all J steps of plain PyTorch (GroupNorm, avg_pool2d, create_graph), as published codes
do. A table of interleaved rounds, with the reference's allocator as it is, and of memory in fresh processes:

    python benchmarks/bench_outer_step.py [--threads 2] [--rounds 5]

``PEAK`` is the resident memory above that at the step's start, everything included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ddpp import augment, models
from ddpp.config import ModelConfig
from ddpp.models import flat

SHAPE, CLASSES, STEP_SIZE = (3, 32, 32), 10, 0.01
EPSILON = 0.1


@dataclass(frozen=True)
class Case:
    """A synthetic set and how its student is trained."""

    ipc: int
    batch: int
    inner_steps: int

    def problem(self) -> dict[str, Any]:
        """Arguments of :func:`matching_gradients`; the target is a teacher's start moved by a tenth of its length."""
        draw = torch.Generator().manual_seed(0)
        network = models.build(ModelConfig(), SHAPE, CLASSES, seed=0)
        start = flat.flatten(network)
        count = self.ipc * CLASSES
        plans = augment.draw(
            self.inner_steps, self.batch, *SHAPE[1:], groups=augment.GROUPS, mode="one", generator=draw
        )
        return {
            "network": network,
            "start": start,
            "target": start * (1 + 0.1 * torch.randn(start.shape, generator=draw)),
            "images": torch.randn(count, *SHAPE, generator=draw),
            "labels": torch.arange(CLASSES).repeat_interleave(self.ipc),
            "lr": torch.tensor(STEP_SIZE),
            "batches": [torch.randperm(count, generator=draw)[: self.batch] for _ in range(self.inner_steps)],
            "plans": list(plans),
            "epsilon": EPSILON,
        }


CASES = {
    "IPC 1, J = 50": Case(1, 10, 50),
    "batch 100, J = 10": Case(10, 100, 10),
}
SMALL = {"IPC 1, J = 2": Case(1, 10, 2)}
LONG = {
    "IPC 1, J = 10": Case(1, 10, 10),
    "IPC 1, J = 80": Case(1, 10, 80),
    "IPC 50, batch 500, J = 80": Case(50, 500, 80),
}
