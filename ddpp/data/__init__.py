"""Data sets: one file and one registration a source; :func:`load` gives images and labels ready for training."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpp import runs, seeds
from ddpp.config import DataConfig
from ddpp.data import digits, folder, pictures, tinyimagenet, torchvision_sets
from ddpp.data.base import DATASETS, Raw
from ddpp.data.preprocess import (
    Images,
    Transform,
    fit_channels,
    fit_zca,
    from_pixels,
    published_transform,
    to_pixels_from,
    transformed,
)
from ddpp.data.split import stratified
from ddpp.errors import UserError

__all__ = [
    "DATASETS",
    "Dataset",
    "Images",
    "Transform",
    "digits",
    "folder",
    "from_pixels",
    "load",
    "pictures",
    "published_transform",
    "tinyimagenet",
    "to_pixels_from",
    "torchvision_sets",
]

_AT_ONCE = 1024  # images


@dataclass(frozen=True)
class Dataset:
    """A data set on the CPU; the validation part is held out of the training part.

    Its images are normalised where an index or a part of them is asked for, or were whitened.
    """

    name: str
    classes: tuple[str, ...]
    train_images: Images  # [N, C, H, W] float32
    train_labels: Tensor  # [N] int64
    val_images: Images
    val_labels: Tensor
    test_images: Images
    test_labels: Tensor
    preprocessing: str  # "channel", "published" or "zca"
    transform: Transform
    strategy: str  # the augmentation that "auto" stands for
    fingerprint: str  # of all pixels, labels and the preprocessing

    @property
    def shape(self) -> tuple[int, int, int]:
        """C, H and W of an image."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width

    def to_pixels(self, images: Tensor) -> Tensor:
        """Images of this data set's space as pixels in [0, 1], for viewing. [N, C, H, W]"""
        return to_pixels_from(self.transform, images)

    def describe(self) -> dict[str, Any]:
        """What must be equal for teachers trained on one data set to be used with another."""
        return {
            "name": self.name,
            "classes": len(self.classes),
            "shape": list(self.shape),
            "preprocessing": self.preprocessing,
            "training images": len(self.train_labels),
            "fingerprint": self.fingerprint,
        }


def load(config: DataConfig) -> Dataset:
    """Reads a data set, holds out a validation part, and normalises or whitens by the rest's statistics.

    With ``config.constants`` "published" by those of published codes.

    The held-out part is a share ``config.validation`` of each class and the same for every seed of a run.

    Raises:
        UserError: unknown name, missing, damaged or unfit data; the message says which and what to do.
    """
    reader = DATASETS.get(config.dataset)
    for name, value in (("--image-size", config.image_size), ("--classes", config.classes)):
        if value and config.dataset != "folder":
            raise UserError(f"{name} is for --dataset folder, got it with {config.dataset}. Leave it out.")
    if config.zca and config.constants == "published":
        raise UserError("--constants published normalise, --zca whitens instead; give --constants measured or --no-zca")
    with _one_download(config):
        raw = reader(config)
    if not isinstance(raw, Raw):
        raise UserError(f"data set {config.dataset!r} must give a ddpp.data.base.Raw, got {type(raw).__name__}")
    _check(raw)
    train, held_out = stratified(raw.train_labels, config.validation, seeds.generator(0, "validation"))
    images = {
        "train": Images(raw.train_images, train if len(held_out) else None, white=raw.white),
        "val": Images(raw.train_images, held_out, white=raw.white),
        "test": Images(raw.test_images, white=raw.white),
    }
    labels = {"train": raw.train_labels[train], "val": raw.train_labels[held_out], "test": raw.test_labels}
    preprocessing = "zca" if config.zca else "published" if config.constants == "published" else "channel"
    fingerprint = _fingerprint(preprocessing, raw.white, [*images.values(), *labels.values()])
    transform = _transform(config, images["train"], fingerprint)
    return Dataset(
        name=raw.name,
        classes=raw.classes,
        train_images=transformed(transform, images["train"]),
        train_labels=labels["train"],
        val_images=transformed(transform, images["val"]),
        val_labels=labels["val"],
        test_images=transformed(transform, images["test"]),
        test_labels=labels["test"],
        preprocessing=preprocessing,
        transform=transform,
        strategy=raw.strategy,
        fingerprint=fingerprint,
    )


def _transform(config: DataConfig, images: Images, fingerprint: str) -> Transform:
    if config.constants == "published":
        found = published_transform(config.dataset, "--constants published")
        if len(found["mean"]) != images.shape[1]:
            channels = f"{len(found['mean'])} channels, and these images have {images.shape[1]}"
            raise UserError(f"--constants published are for {channels}; give --constants measured")
        return found
    return fit_zca(images, fingerprint) if config.zca else fit_channels(images)


@contextlib.contextmanager
def _one_download(config: DataConfig) -> Iterator[None]:
    """Lets processes that begin together download one after the other, of which the second finds all there."""
    root = Path(config.data_root)
    if not config.download or (root.is_dir() and not os.access(root, os.W_OK)):
        yield
        return
    with runs.claimed(root / ".download.lock", wait=True):
        yield


def _check(raw: Raw) -> None:
    """What every source must give."""
    if len(raw.classes) < 2:
        raise UserError(f"{raw.name} has {len(raw.classes)} class, but classification needs two or more")
    train, test = (raw.train_images, raw.train_labels), (raw.test_images, raw.test_labels)
    for part, images, labels in (("training", *train), ("test", *test)):
        _check_part(f"{raw.name}'s reader gives {part}", images, labels, len(raw.classes))
        counts = torch.bincount(labels, minlength=len(raw.classes)).tolist()
        empty = [name for name, count in zip(raw.classes, counts, strict=True) if count == 0]
        if empty:
            raise UserError(f"{raw.name} has no {part} image of class {', '.join(empty[:5])}. Add some.")


def _check_part(what: str, images: Tensor, labels: Tensor, classes: int) -> None:
    """What a reader of one's own may get wrong."""
    for kind, given in (("images", images), ("labels", labels)):
        if not isinstance(given, Tensor):
            raise UserError(f"{what} {kind} as {type(given).__name__}, but they must be a torch.Tensor")
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[2] != images.shape[3]:
        found = f"{what} images {images.dtype} {list(images.shape)}"
        raise UserError(f"{found}, but they must be uint8 [N, C, H, H], with 255 for white")
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        found = f"{what} labels {labels.dtype} {list(labels.shape)} of {len(images)} images"
        raise UserError(f"{found}, but they must be int64, one each")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        ends = f"{int(labels.min())} to {int(labels.max())}"
        raise UserError(f"{what} labels from {ends}, but they must number the {classes} classes from 0")


def _fingerprint(preprocessing: str, white: int, tensors: list[Images | Tensor]) -> str:
    digest = hashlib.sha256(repr((preprocessing, white, [tuple(t.shape) for t in tensors])).encode())
    for tensor in tensors:
        for part in tensor.split(_AT_ONCE):
            digest.update(part.contiguous().numpy().data)
    return digest.hexdigest()
