"""What a reader gives, and the table of readers."""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpp.config import DataConfig
from ddpp.errors import UserError
from ddpp.registry import Registry


@dataclass(frozen=True)
class Raw:
    """A data set as read: whole numbers, nothing held out, nothing normalised."""

    name: str
    classes: tuple[str, ...]
    train_images: Tensor  # [N, C, H, W] uint8
    train_labels: Tensor  # [N] int64
    test_images: Tensor  # [N, C, H, W] uint8
    test_labels: Tensor  # [N] int64
    strategy: str  # the augmentation that suits the images and keeps their labels
    white: int = 255  # the value that stands for 1


EVERY_GROUP = "color_crop_cutout_flip_scale_rotate"
NO_FLIP = "color_crop_cutout_scale_rotate"  # of digits, whose mirror images mean something else

Reader = Callable[[DataConfig], Raw]

DATASETS: Registry[Reader] = Registry("data set")


def cache_folder() -> Path:
    """Where what can be computed again is kept; the user may empty it."""
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(given) if given else Path.home() / ".cache") / "ddpp"
    except RuntimeError:  # nobody's home, as in a container
        return Path(tempfile.gettempdir()) / "ddpp"


def library(module: str) -> Any:
    """A module that only some readers need.

    Raises:
        UserError: it is missing, or was built for another torch.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError, OSError) as e:
        package = module.partition(".")[0]
        raise UserError(
            f"{package} cannot be imported: {e}. Install one that fits torch {torch.__version__} "
            f"(pip install --upgrade torch {package}), or do without the option that needs it."
        ) from e
