"""Picture files: many at once as one tensor, and a tensor as files of their classes."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ddpp import runs
from ddpp.data.base import cache_folder, library
from ddpp.errors import UserError

_CHUNK = 256  # files that a thread decodes in a row
_MANY = 2000  # files from which on progress is shown, and pixels are kept
_FORMAT = 2  # another one for pixels that are decoded otherwise
_GREY = ("1", "L", "LA")

Room = Callable[[tuple[int, ...]], NDArray[np.uint8]]  # from a shape to memory


def decode(paths: Sequence[str], image_size: int | None = None) -> Tensor:
    """All images as one tensor, grey if all are, else RGB. [N, C, H, W] uint8

    Images are turned as their camera says. Palettes become RGB, grey images among coloured ones too, and transparency
    is dropped. All must be square and of one size, unless ``image_size`` is given: then the shorter side is resized to
    it (bilinear, antialiased) and the centre kept. Many are decoded once, and again when a file changes: their pixels
    are kept in the user's cache folder, and the tensor is a view of that file, which takes no memory of a process's own
    and must not be written to.

    Raises:
        UserError: an image cannot be read, has more than 8 bits a channel, or another size. The message names it.
    """
    if len(paths) >= _MANY:
        path = cache_folder() / f"images-{_key(paths, image_size)}.npy"
        try:
            found = _kept(path)
            return _decode_and_keep(paths, image_size, path) if found is None else found
        except runs.Unwritable as e:
            print(f"the decoded images were not cached: {e}")
    return torch.from_numpy(_decode(paths, image_size, _memory))


def _key(paths: Sequence[str], image_size: int | None) -> str:
    """Changes when a file does, or :data:`_FORMAT`."""
    digest = hashlib.sha256(repr((_FORMAT, image_size)).encode())
    for path in paths:
        digest.update(f"{os.path.abspath(path)}\0{_stamp(path)}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()[:32]


def _stamp(path: str) -> tuple[int, int]:
    try:
        about = os.stat(path)
    except OSError:  # decoding says what is wrong
        return 0, 0
    return about.st_size, about.st_mtime_ns


def _decode_and_keep(paths: Sequence[str], image_size: int | None, path: Path) -> Tensor:
    """Processes that begin together decode once."""
    with runs.claimed(path.with_suffix(".lock"), wait=True):
        found = _kept(path)
        if found is None:
            runs.remove_partial(path)
            with runs.replacing(path) as temporary:
                _decode(paths, image_size, partial(_file, temporary)).flush()
                found = _mapped(temporary)
            print(f"the decoded images are kept in {path} ({found.numel() / 1e6:.0f} MB)", flush=True)
    return found


def _kept(path: Path) -> Tensor | None:
    """None where there is no whole file."""
    try:
        return _mapped(path)
    except (OSError, ValueError, EOFError):
        return None


def _mapped(path: Path) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable")
        return torch.from_numpy(np.load(path, mmap_mode="r"))


def _memory(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    return np.empty(shape, dtype=np.uint8)


def _file(path: Path, shape: tuple[int, ...]) -> np.memmap[Any, np.dtype[np.uint8]]:
    images = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    if hasattr(os, "posix_fallocate"):  # a disk that is full says so here, and kills no process later
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return images


def _decode(paths: Sequence[str], image_size: int | None, room: Room) -> Any:
    """The images in memory that ``room`` gives. [N, C, H, W]"""
    mode = "L" if all(_mode(path) in _GREY for path in paths) else "RGB"  # ends at the first one with colour
    first = _read(paths[0], image_size, mode)
    height, width, channels = first.shape
    if height != width:
        raise UserError(f"{paths[0]} is {_size(first)}, but must be square. Crop images with --image-size.")
    images = room((len(paths), channels, height, width))

    def decode_chunk(start: int) -> int:
        chunk = range(start, min(start + _CHUNK, len(paths)))
        for i in chunk:
            image = _read(paths[i], image_size, mode)
            if image.shape != first.shape:
                sizes = f"{paths[i]} is {_size(image)}, but {paths[0]} is {_size(first)}"
                raise UserError(f"{sizes}. Make them equal with --image-size.")
            images[i] = image.transpose(2, 0, 1)
        return len(chunk)

    pool = ThreadPoolExecutor()
    with tqdm(total=len(paths), desc="read images", unit="image", disable=len(paths) < _MANY) as progress:
        try:
            for count in pool.map(decode_chunk, range(0, len(paths), _CHUNK)):
                progress.update(count)
        finally:
            pool.shutdown(cancel_futures=True)
    return images


def write(root: Path, pixels: Tensor, classes: Sequence[str]) -> None:
    """Writes pictures, 8 bits a channel: ``<class>/<number>.png``.

    Args:
        pixels: grey or RGB, from 0 to 1, as many of each class, class by class. [N, C, H, W]
        classes: the names; see :func:`folder_names`.

    Raises:
        UserError: a file cannot be written.
    """
    pillow, ipc, folders = library("PIL.Image"), len(pixels) // len(classes), folder_names(classes)
    values = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()  # [N, H, W, C]
    for number, picture in enumerate(values):
        name = f"{number % ipc:04d}.png"
        with runs.replacing(root / folders[number // ipc] / name) as temporary:
            pillow.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture).save(temporary)


def folder_names(classes: Sequence[str]) -> list[str]:
    """The classes' names where no / can stand, numbered if two would be the same."""
    names = [name.replace("/", "-") for name in classes]
    return names if len(set(names)) == len(names) else [f"{label}-{name}" for label, name in enumerate(names)]


def _mode(path: str) -> str:
    """Pillow's name of the channels, from the file's head; empty where it cannot be read."""
    pillow = library("PIL.Image")
    try:
        with pillow.open(path) as image:
            return str(image.mode)
    except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError):
        return ""


def _read(path: str, image_size: int | None, mode: str) -> NDArray[np.uint8]:
    """One image. [H, W, C]"""
    pillow, transforms = library("PIL.Image"), library("torchvision.transforms.functional")
    try:
        with pillow.open(path) as image:
            if image.mode[0] in "IF":
                raise UserError(f"{path} has more than 8 bits a channel. Convert it to an 8-bit image.")
            image = library("PIL.ImageOps").exif_transpose(image).convert(mode)
    except UserError:  # a ValueError, as Pillow raises them too
        raise
    except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as e:
        raise UserError(f"cannot read the image {path}: {e}. Replace or remove the file.") from e
    if image_size and image.size != (image_size, image_size):
        image = transforms.center_crop(transforms.resize(image, image_size), image_size)
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _size(image: NDArray[np.uint8]) -> str:
    return f"{image.shape[1]}x{image.shape[0]} pixels"
