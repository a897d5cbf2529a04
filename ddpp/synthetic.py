"""The result: a synthetic set and its file, which holds all that is needed to use it without the run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpp import runs, seeds
from ddpp.data import Dataset
from ddpp.errors import UserError

FORMAT = 1


@dataclass(frozen=True)
class Synthetic:
    """Images in the space the networks are trained in, their labels, and the step size learned with them."""

    images: Tensor  # [N, C, H, W]
    labels: Tensor  # [N] int64, or logits [N, K]
    step_size: Tensor  # []

    def to(self, device: torch.device) -> Synthetic:
        return Synthetic(self.images.to(device), self.labels.to(device), self.step_size.to(device))

    def save(self, path: Path, meta: dict[str, Any], transform: dict[str, Tensor] | None = None) -> None:
        """Writes images, labels and step size, and with ``transform`` the way back to pixels in [0, 1]."""
        tensors = {"images": self.images, "labels": self.labels, "step_size": self.step_size}
        tensors |= {f"transform.{name}": t for name, t in (transform or {}).items()}
        runs.write_tensors(path, tensors, {"format": FORMAT, **meta})


def load(path: Path) -> tuple[Synthetic, dict[str, Any]]:
    """A synthetic set and its metadata.

    Raises:
        UserError: the file is missing, damaged, foreign, or of a later version.
    """
    tensors, meta = runs.read_tensors(path, "synthetic set")
    if meta.get("format") != FORMAT or "images" not in tensors:
        raise UserError(
            f"{path} is no synthetic set of format {FORMAT}; it was written by another version or stage of ddpp"
        )
    return Synthetic(tensors["images"], tensors["labels"], tensors["step_size"]), meta


def real_images(dataset: Dataset, ipc: int, *key: str | int, seed: int) -> Synthetic:
    """``ipc`` random real training images of each class, sorted by class; the step size is left at 0.

    Raises:
        UserError: a class has fewer images.
    """
    draw = seeds.generator(seed, *key)
    chosen = []
    for label, name in enumerate(dataset.classes):
        members = torch.nonzero(dataset.train_labels == label).flatten()
        if len(members) < ipc:
            raise UserError(f"--ipc {ipc} is more than the {len(members)} training images of class {name!r}")
        chosen.append(members[torch.randperm(len(members), generator=draw)[:ipc]])
    index = torch.cat(chosen)
    return Synthetic(dataset.train_images[index], dataset.train_labels[index], torch.zeros(()))


def start(dataset: Dataset, ipc: int, init: str, step_size: float, seed: int) -> Synthetic:
    """The set that distillation begins with: real images, or unit normal noise, class by class."""
    images = real_images(dataset, ipc, "start", seed=seed)
    if init == "noise":
        noise = torch.randn(images.images.shape, generator=seeds.generator(seed, "noise"))
        images = replace(images, images=noise)
    return replace(images, step_size=torch.tensor(step_size))
