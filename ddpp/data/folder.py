"""Any tree of images under the data root: ``train/<class>/*`` and ``test/<class>/*``, or else ``val/<class>/*``."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ddpp.config import DataConfig
from ddpp.data import pictures
from ddpp.data.base import DATASETS, EVERY_GROUP, Raw, library
from ddpp.errors import UserError, nearest


class _Listing(NamedTuple):
    """The files of a part and their classes, in order."""

    classes: list[str]
    paths: list[str]
    labels: Tensor  # [N] int64


@DATASETS.register("folder")
def folder(config: DataConfig) -> Raw:
    """Reads the tree under ``config.data_root``; the data set is named after that folder.

    ``config.classes`` takes some of its classes; the first one and their number are then part of the name. How images
    are read says :func:`ddpp.data.pictures.decode`.

    Raises:
        UserError: a part, class or image is missing, train and test differ in their classes, an image cannot
            be read, or images differ in size. The message names the file.
    """
    root = Path(config.data_root)
    tested = next((part for part in ("test", "val") if any((root / part).glob("*/"))), "test")
    train, test = (_list(root / part, config.classes) for part in ("train", tested))
    if train.classes != test.classes:
        odd = ", ".join(sorted(set(train.classes) ^ set(test.classes))[:5])
        raise UserError(f"train and {tested} in {root} must have the same classes, but only one has {odd}")
    images, count = pictures.decode(train.paths + test.paths, config.image_size), len(train.paths)
    some = [train.classes[0], str(len(train.classes))] if config.classes else []
    return Raw(
        name="-".join([root.resolve().name or "folder", *some]),
        classes=tuple(train.classes),
        train_images=images[:count],
        train_labels=train.labels,
        test_images=images[count:],
        test_labels=test.labels,
        strategy=EVERY_GROUP,
    )


def read_classes(root: Path, classes: Sequence[str], image_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Pictures as :func:`ddpp.data.pictures.write` leaves them: pixels from 0 to 1 [N, C, H, W], and labels [N].

    Raises:
        UserError: other classes than these, or what :func:`folder` refuses.
    """
    found = _list(root)
    places = {name: label for label, name in enumerate(pictures.folder_names(classes))}
    if set(found.classes) != set(places):
        odd = ", ".join(sorted(set(found.classes) ^ set(places))[:5])
        raise UserError(f"{root} must have one folder a class of the data set; only one of both has {odd}")
    pixels = pictures.decode(found.paths, image_size).float() / 255
    return pixels, torch.tensor([places[name] for name in found.classes])[found.labels]


def _is_image(part: Path, path: str) -> bool:
    """By its ending; what is hidden, as editors and systems leave it, is none."""
    hidden = any(name.startswith(".") for name in Path(path).relative_to(part).parts)
    return not hidden and path.lower().endswith(library("torchvision.datasets.folder").IMG_EXTENSIONS)


def _list(part: Path, chosen: Collection[str] = ()) -> _Listing:
    """The images of one part, of some of its classes if these are named."""
    expected = f"expected images in {part / '<class>'}/"
    if not part.is_dir():
        raise UserError(f"there is no folder {part}; {expected}. Name the tree with --data-root.")
    reader = library("torchvision.datasets.folder")
    try:
        classes = [name for name in reader.find_classes(str(part))[0] if not name.startswith(".")]
        if not classes:
            raise FileNotFoundError("its folders are hidden")
        for name in (name for name in chosen if name not in classes):
            raise UserError(f"--classes {name}: {part} has no such class{nearest(name, classes)}")
        classes = sorted(set(chosen)) or classes
        places = {name: label for label, name in enumerate(classes)}
        samples = reader.make_dataset(str(part), places, is_valid_file=partial(_is_image, part), allow_empty=False)
    except FileNotFoundError as e:
        raise UserError(f"{part}: {str(e).rstrip(' .')}; {expected}. Add some, or remove the class.") from e
    return _Listing(classes, [path for path, _ in samples], torch.tensor([label for _, label in samples]))
