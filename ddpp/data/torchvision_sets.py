"""CIFAR-10, CIFAR-100, SVHN, MNIST and FashionMNIST, through torchvision."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ddpp.config import DataConfig
from ddpp.data.base import DATASETS, EVERY_GROUP, NO_FLIP, Raw, library
from ddpp.errors import UserError


def _read(config: DataConfig, *, kind: str, strategy: str) -> Raw:
    train, test = _open(config, kind, train=True), _open(config, kind, train=False)
    return Raw(
        name=config.dataset,
        classes=tuple(getattr(train, "classes", map(str, range(10)))),
        train_images=_images(train),
        train_labels=_labels(train),
        test_images=_images(test),
        test_labels=_labels(test),
        strategy=strategy,
    )


def _open(config: DataConfig, kind: str, *, train: bool) -> Any:
    """One part of a data set, read into memory by torchvision.

    Raises:
        UserError: it is missing, incomplete or damaged, or cannot be downloaded.
    """
    reader = getattr(library("torchvision.datasets"), kind)
    part = {"split": "train" if train else "test"} if kind == "SVHN" else {"train": train}
    try:
        return reader(config.data_root, download=config.download, **part)
    except Exception as e:  # whatever a damaged file or a broken download makes torchvision raise
        found = f"{config.dataset} in {config.data_root} is missing or incomplete"
        if not config.download:
            advice = "Pass --download to fetch it, or name the folder that holds it with --data-root."
            raise UserError(f"{found}. {advice}") from e
        advice = "The download failed or met a damaged file: remove that file and try again."
        raise UserError(f"{found} ({type(e).__name__}: {e}). {advice}") from e


def _images(part: Any) -> Tensor:
    images = torch.as_tensor(part.data)
    if images.ndim == 3:
        images = images[:, None]
    elif images.shape[-1] == 3:
        images = images.permute(0, 3, 1, 2)
    return images.contiguous()  # [N, C, H, W] uint8


def _labels(part: Any) -> Tensor:
    return torch.as_tensor(part.labels if hasattr(part, "labels") else part.targets).long()


for _name, _kind, _strategy in (
    ("cifar10", "CIFAR10", EVERY_GROUP),
    ("cifar100", "CIFAR100", EVERY_GROUP),
    ("svhn", "SVHN", NO_FLIP),
    ("mnist", "MNIST", NO_FLIP),
    ("fashionmnist", "FashionMNIST", EVERY_GROUP),
):
    DATASETS.register(_name)(partial(_read, kind=_kind, strategy=_strategy))
