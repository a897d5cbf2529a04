"""Any tree of images: ``train/<class>/*`` and ``test/<class>/*`` under the data root."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ddpp import runs
from ddpp.config import DataConfig
from ddpp.data.base import DATASETS, EVERY_GROUP, Raw, library
from ddpp.errors import UserError

_CHUNK = 256  # files that a thread decodes in a row
_PROGRESS_FROM = 2000  # files


@DATASETS.register("folder")
def folder(config: DataConfig) -> Raw:
    """Reads the tree under ``config.data_root``; the data set is named after that folder.

    Images are grey or RGB, 8 bits a channel; palettes become RGB and transparency is dropped. All must be
    square and of one size, unless ``config.image_size`` is given: then the shorter side is resized to it
    (bilinear, antialiased) and the centre kept.

    Raises:
        UserError: a part, class or image is missing, train and test differ in their classes, an image cannot
            be read, or images differ in size or channels. The message names the file.
    """
    root = Path(config.data_root)
    train, test = _list(root, "train"), _list(root, "test")
    if train.classes != test.classes:
        odd = ", ".join(sorted(set(train.classes) ^ set(test.classes))[:5])
        raise UserError(f"train and test in {root} must have the same classes, but only one has {odd}")
    images = _decode([path for path, _ in train.samples + test.samples], config.image_size)
    labels = torch.tensor([label for _, label in train.samples + test.samples])
    count = len(train.samples)
    return Raw(
        name=root.resolve().name or "folder",
        classes=tuple(train.classes),
        train_images=images[:count],
        train_labels=labels[:count],
        test_images=images[count:],
        test_labels=labels[count:],
        strategy=EVERY_GROUP,
    )


def pictures(root: Path, classes: Sequence[str], image_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Pictures as :func:`write` leaves them, ``<class>/*``: pixels from 0 to 1 [N, C, H, W], and labels [N].

    Raises:
        UserError: other classes than these, or what :func:`folder` refuses.
    """
    found = _list(root.parent, root.name)
    places = {_folder_name(name): label for label, name in enumerate(classes)}
    if set(found.classes) != set(places):
        odd = ", ".join(sorted(set(found.classes) ^ set(places))[:5])
        raise UserError(f"{root} must have one folder a class of the data set; only one of both has {odd}")
    pixels = _decode([path for path, _ in found.samples], image_size).float() / 255
    return pixels, torch.tensor([places[found.classes[label]] for _, label in found.samples])


def write(root: Path, pixels: Tensor, classes: Sequence[str]) -> None:
    """Writes pictures as :func:`folder` reads them: ``<class>/<number>.png``, 8 bits a channel.

    Args:
        pixels: grey or RGB, from 0 to 1, as many of each class, class by class. [N, C, H, W]
        classes: the names; a / in them becomes -.

    Raises:
        UserError: a file cannot be written.
    """
    pillow, ipc = library("PIL.Image"), len(pixels) // len(classes)
    values = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()  # [N, H, W, C]
    for number, picture in enumerate(values):
        name = f"{number % ipc:04d}.png"
        with runs.replacing(root / _folder_name(classes[number // ipc]) / name) as temporary:
            pillow.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture).save(temporary)


def _folder_name(class_name: str) -> str:
    return class_name.replace("/", "-")


def _list(root: Path, part: str) -> Any:
    """The classes and files of one part."""
    expected = f"expected images in {root / part / '<class>'}/"
    if not (root / part).is_dir():
        raise UserError(f"there is no folder {root / part}; {expected}. Name the tree with --data-root.")
    try:
        return library("torchvision.datasets").ImageFolder(root / part)
    except FileNotFoundError as e:
        raise UserError(f"{root / part}: {e}; {expected}. Add some, or remove the class.") from e


def _decode(paths: Sequence[str], image_size: int | None) -> Tensor:
    """All images as one tensor. [N, C, H, W] uint8"""
    first = _read(paths[0], image_size)
    if first.shape[0] != first.shape[1]:
        raise UserError(f"{paths[0]} is {_size(first)}, but must be square. Crop images with --image-size.")
    height, width, channels = first.shape
    images = np.empty((len(paths), channels, height, width), dtype=np.uint8)

    def decode(start: int) -> int:
        chunk = range(start, min(start + _CHUNK, len(paths)))
        for i in chunk:
            image = _read(paths[i], image_size)
            if image.shape != first.shape:
                raise UserError(_difference(image, first, paths[i], paths[0]))
            images[i] = image.transpose(2, 0, 1)
        return len(chunk)

    progress = tqdm(total=len(paths), desc="read images", unit="image", disable=len(paths) < _PROGRESS_FROM)
    with ThreadPoolExecutor() as pool, progress:
        try:
            for count in pool.map(decode, range(0, len(paths), _CHUNK)):
                progress.update(count)
        except UserError:
            pool.shutdown(cancel_futures=True)
            raise
    return torch.from_numpy(images)


def _read(path: str, image_size: int | None) -> NDArray[np.uint8]:
    """One image. [H, W, C]"""
    pillow, transforms = library("PIL.Image"), library("torchvision.transforms.functional")
    try:
        with pillow.open(path) as image:
            if image.mode[0] in "IF":
                raise UserError(f"{path} has more than 8 bits a channel. Convert it to an 8-bit image.")
            image = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    except (OSError, SyntaxError, pillow.DecompressionBombError) as e:
        raise UserError(f"cannot read the image {path}: {e}. Replace or remove the file.") from e
    if image_size and image.size != (image_size, image_size):
        image = transforms.center_crop(transforms.resize(image, image_size), image_size)
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _difference(image: NDArray[np.uint8], first: NDArray[np.uint8], path: str, first_path: str) -> str:
    if image.shape[2] != first.shape[2]:
        return f"{path} has {image.shape[2]} channels, but {first_path} has {first.shape[2]}. Convert one kind."
    return f"{path} is {_size(image)}, but {first_path} is {_size(first)}. Make them equal with --image-size."


def _size(image: NDArray[np.uint8]) -> str:
    return f"{image.shape[1]}x{image.shape[0]} pixels"
