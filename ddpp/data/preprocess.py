"""From pixels to what networks are trained on, and back.

A transform is a table of tensors, so that it can be saved with images and used without the data set:

* ``mean`` [C] and ``std`` [C]: each channel is normalised;
* ``mean`` [D], ``whiten`` [D, D] and ``unwhiten`` [D, D], D = C H W: ZCA whitening.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ddpp import runs
from ddpp.errors import UserError

Transform = dict[str, Tensor]

ZCA_EPSILON = 0.1  # the field's choice, added to the eigenvalues of images in [0, 1]
ZCA_LARGEST = 3 * 64 * 64  # values of an image; the matrices of larger ones take gigabytes
ZCA_SLOW = 2 * 3 * 32 * 32  # values from which on it takes a minute or more

_CHUNK = 1024  # images
_SILENT = 5  # seconds that need no bar
_CONSTANT = 1e-9  # a channel that deviates less differs by rounding alone


def from_pixels(transform: Transform, pixels: Tensor) -> Tensor:
    """What networks are trained on, from pixels in [0, 1]. [N, C, H, W]"""
    if "whiten" in transform:
        flat = pixels.flatten(1) - transform["mean"].to(pixels)
        return (flat @ transform["whiten"].to(pixels)).view_as(pixels)
    mean, std = (transform[name].to(pixels).view(-1, 1, 1) for name in ("mean", "std"))
    return (pixels - mean) / std


def to_pixels_from(transform: Transform, images: Tensor) -> Tensor:
    """The inverse of :func:`from_pixels`, for viewing: clamped to [0, 1]. [N, C, H, W]"""
    if "unwhiten" in transform:
        flat = images.flatten(1) @ transform["unwhiten"].to(images) + transform["mean"].to(images)
        return flat.view_as(images).clamp(0, 1)
    mean, std = (transform[name].to(images).view(-1, 1, 1) for name in ("mean", "std"))
    return (images * std + mean).clamp(0, 1)


def apply(transform: Transform, images: Tensor, white: int) -> Tensor:
    """:func:`from_pixels` of whole numbers, of which ``white`` stands for 1. [N, C, H, W] float32"""
    out = torch.empty(images.shape)
    parts = zip(out.split(_CHUNK), _chunks(images, white, torch.float32), strict=True)
    with tqdm(total=len(images), desc="preprocess", unit="image", delay=_SILENT) as progress:
        for part, pixels in parts:
            part.copy_(from_pixels(transform, pixels))
            progress.update(len(part))
    return out


def fit_channels(images: Tensor, white: int) -> Transform:
    """Mean and standard deviation of each channel, in units of [0, 1]; a constant channel is only centred."""
    mean = _mean(chunk.mean((2, 3)) for chunk in _chunks(images, white))
    centred = (chunk - mean.view(-1, 1, 1) for chunk in _chunks(images, white))
    std = _mean(chunk.square().mean((2, 3)) for chunk in centred).sqrt()
    return {"mean": mean.float(), "std": torch.where(std > _CONSTANT, std, 1).float()}


def fit_zca(images: Tensor, white: int, key: str) -> Transform:
    """ZCA whitening fitted on images [N, C, H, W], cached under ``key`` in the user's cache folder.

    With mean m and covariance U diag(s) U' (over N - 1) of images in [0, 1]:
    x -> (x - m) U diag(1 / sqrt(s + 0.1)) U'. The held-out and test images get the same transform.

    Raises:
        UserError: the images are too large.
    """
    size = images[0].numel()
    if size > ZCA_LARGEST:
        raise UserError(f"--zca needs images of at most {ZCA_LARGEST} values, got {size}. Lower --image-size.")
    path = cache_folder() / f"zca-{key[:32]}.safetensors"
    try:
        return runs.read_tensors(path, "cached whitening")[0]
    except UserError:
        if size >= ZCA_SLOW:
            print(f"fitting the whitening of images of {size} values: minutes, once, then kept in {path}", flush=True)
        transform = _fit_zca(images, white)
    try:
        runs.write_tensors(path, transform, {})
    except UserError as e:
        print(f"the whitening was not cached: {e}")
    return transform


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddpp"


def _fit_zca(images: Tensor, white: int) -> Transform:
    mean = _mean(chunk.flatten(1) for chunk in _chunks(images, white))
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for chunk in _chunks(images, white):
        centred = chunk.flatten(1) - mean
        covariance.addmm_(centred.T, centred)
    values, vectors = torch.linalg.eigh(covariance / max(len(images) - 1, 1))
    scale = (values.clamp_min(0) + ZCA_EPSILON).sqrt()
    return {
        "mean": mean.float(),
        "whiten": ((vectors / scale) @ vectors.T).float(),
        "unwhiten": ((vectors * scale) @ vectors.T).float(),
    }


def _mean(rows: Iterable[Tensor]) -> Tensor:
    """The mean over all rows of all parts [n, ...]."""
    sums, counts = zip(*((part.sum(0), len(part)) for part in rows), strict=True)
    return torch.stack(sums).sum(0) / sum(counts)


def _chunks(images: Tensor, white: int, dtype: torch.dtype = torch.float64) -> Iterator[Tensor]:
    """Images [N, C, H, W] in [0, 1], a part at a time, to need no second data set of floats."""
    return (chunk.to(dtype) / white for chunk in images.split(_CHUNK))
