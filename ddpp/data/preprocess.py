"""From pixels to what networks are trained on, and back.

A transform is a table of tensors, so that it can be saved with images and used without the data set:

* ``mean`` [C] and ``std`` [C]: each channel is normalised;
* ``mean`` [D], ``whiten`` [D, D] and ``unwhiten`` [D, D], D = C H W: ZCA whitening.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from tqdm import tqdm

from ddpp import runs
from ddpp.data.base import cache_folder
from ddpp.errors import UserError

Transform = dict[str, Tensor]

ZCA_EPSILON = 0.1  # the field's choice, added to the eigenvalues of images in [0, 1]
ZCA_LARGEST = 3 * 64 * 64  # values of an image; the matrices of larger ones take gigabytes
ZCA_SLOW = 2 * 3 * 32 * 32  # values from which on it takes a minute or more

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
#: Means and deviations of the channels by which the codes of DC, DSA, DM, MTT and others normalise. CIFAR-10's are not
#: the deviations of its pixels, and MTT gives them to CIFAR-100 too, as DC did at first. Source: their repositories.
PUBLISHED = {
    "cifar10": _CIFAR10,
    "cifar100": _CIFAR10,
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "mnist": ((0.1307,), (0.3081,)),
    "fashionmnist": ((0.2861,), (0.3530,)),
    "tinyimagenet": _IMAGENET,
    "folder": _IMAGENET,
}

FEW = 2**26  # values, as float32 256 MiB

_CHUNK = 1024  # images
_NUMBERS = 256  # that a pixel may be
_SILENT = 5  # seconds that need no bar
_CONSTANT = 1e-9  # a channel that deviates less differs by rounding alone


def from_pixels(transform: Transform, pixels: Tensor) -> Tensor:
    """What networks are trained on, from pixels in [0, 1]. [N, C, H, W]

    Raises:
        UserError: whole numbers, or images of other channels or another size.
    """
    if not pixels.is_floating_point():
        raise UserError(f"pixels must be numbers from 0 to 1, got {pixels.dtype}; divide whole numbers by 255")
    count = math.prod(pixels.shape[1:]) if "whiten" in transform else pixels.shape[-3]
    if count != transform["mean"].numel():
        held = "numbers an image" if "whiten" in transform else "channels"
        raise UserError(f"pixels must have {transform['mean'].numel()} {held}, got {list(pixels.shape)}")
    if "whiten" in transform:
        flat = pixels.flatten(1) - transform["mean"].to(pixels)
        return (flat @ transform["whiten"].to(pixels)).view_as(pixels)
    mean, std = (transform[name].to(pixels).view(-1, 1, 1) for name in ("mean", "std"))
    return (pixels - mean).div_(std)


def to_pixels_from(transform: Transform, images: Tensor) -> Tensor:
    """The inverse of :func:`from_pixels`, for viewing: clamped to [0, 1]. [N, C, H, W]"""
    if "unwhiten" in transform:
        flat = images.flatten(1) @ transform["unwhiten"].to(images) + transform["mean"].to(images)
        return flat.view_as(images).clamp(0, 1)
    mean, std = (transform[name].to(images).view(-1, 1, 1) for name in ("mean", "std"))
    return (images * std + mean).clamp(0, 1)


@dataclass(frozen=True)
class Images:
    """Images kept as small as they were read, of which an index or a part gives what networks are trained on.

    Whole numbers take a quarter of the memory of float32, and none where they lie in a file that the system maps.

    Attributes:
        stored: whole numbers as read, or float32. [M, C, H, W]
        rows: which of ``stored`` these are, in order; without, all. [N] int64
        transform: normalises each channel of whole numbers that are asked for; without, they are given as stored.
        white: the whole number that stands for 1.
    """

    stored: Tensor
    rows: Tensor | None = None
    transform: Transform | None = None
    white: int = 255
    _elsewhere: WeakValueDictionary[str, Images] = field(
        default_factory=WeakValueDictionary, init=False, repr=False, compare=False
    )

    def __len__(self) -> int:
        return len(self.stored if self.rows is None else self.rows)

    @property
    def shape(self) -> torch.Size:
        return torch.Size([len(self), *self.stored.shape[1:]])

    def __getitem__(self, index: int | slice | Tensor) -> Tensor:
        """The images at a place, of a slice, at indices from 0 on, or where a mask says so. [n, C, H, W]"""
        if isinstance(index, tuple):
            raise TypeError("images are chosen by one index; choose among their values afterwards: images[i][:, 0]")
        chosen = _rows(self.stored, index if self.rows is None else _rows(self.rows, index))
        return chosen if self.transform is None else from_pixels(self.transform, chosen.float() / self.white)

    def take(self, indices: Tensor) -> Images:
        """Some of them, without looking at them."""
        return replace(self, rows=indices if self.rows is None else self.rows[indices])

    def split(self, size: int) -> Iterator[Tensor]:
        """Parts of so many images; where there are none one without images, as of a tensor."""
        return (self[first : first + size] for first in range(0, max(len(self), 1), size))

    def to(self, device: torch.device | str) -> Images:
        """The same on a device; those that somebody still has there are given to others too."""
        device, there = torch.device(device), self.stored.device
        if device.type == there.type and device.index in (None, there.index):
            return self
        found = self._elsewhere.get(str(device))
        if found is None:
            found = self._elsewhere[str(device)] = self._copied(device)
        return found

    def _copied(self, device: torch.device) -> Images:
        stored = torch.empty(self.shape, dtype=self.stored.dtype, device=device)
        for place, part in zip(stored.split(_CHUNK), replace(self, transform=None).split(_CHUNK), strict=True):
            place.copy_(part)
        transform = self.transform and {name: t.to(device) for name, t in self.transform.items()}
        return Images(stored, None, transform, self.white)


def _rows(values: Tensor, index: int | slice | Tensor) -> Tensor:
    """``values[index]``, several times as fast for whole numbers at indices, which are from 0 on."""
    if isinstance(index, Tensor) and index.dtype == torch.int64 and index.ndim == 1:
        return values.index_select(0, index)
    return values[index]


def transformed(transform: Transform, images: Images) -> Images:
    """:func:`from_pixels` of whole numbers: at once if whitened, which is slow, or few; else when asked for."""
    if "whiten" not in transform and images.shape.numel() > FEW:
        return replace(images, transform=transform)
    out = torch.empty(images.shape)
    parts = zip(out.split(_CHUNK), images.split(_CHUNK), strict=True)
    with tqdm(total=len(images), desc="preprocess", unit="image", delay=_SILENT) as progress:
        for part, numbers in parts:
            part.copy_(from_pixels(transform, numbers.float() / images.white))
            progress.update(len(part))
    return Images(out)


def fit_channels(images: Images) -> Transform:
    """Mean and standard deviation of each channel, in units of [0, 1]; a constant channel is only centred.

    From how often each whole number stands there, which is fast and exact.
    """
    counts = torch.zeros(images.shape[1], _NUMBERS, dtype=torch.float64)
    for part in images.split(_CHUNK):
        for count, channel in zip(counts, part.unbind(1), strict=True):
            count += torch.bincount(channel.flatten(), minlength=_NUMBERS)
    shares = counts / counts.sum(1, keepdim=True)
    values = torch.arange(_NUMBERS, dtype=torch.float64) / images.white
    mean = shares @ values
    std = (shares * (values - mean[:, None]).square()).sum(1).sqrt()
    return {"mean": mean.float(), "std": torch.where(std > _CONSTANT, std, 1).float()}


def published_transform(dataset: str, option: str) -> Transform:
    """The constants by which published codes normalise a data set, in units of [0, 1].

    Raises:
        UserError: there are none; the message names the option that asked for them.
    """
    if dataset not in PUBLISHED:
        raise UserError(f"{option} is for {', '.join(PUBLISHED)}, not for {dataset}")
    mean, std = PUBLISHED[dataset]
    return {"mean": torch.tensor(mean), "std": torch.tensor(std)}


def fit_zca(images: Images, key: str) -> Transform:
    """ZCA whitening fitted on images [N, C, H, W], cached under ``key`` in the user's cache folder.

    With mean m and covariance U diag(s) U' (over N - 1) of images in [0, 1]:
    x -> (x - m) U diag(1 / sqrt(s + 0.1)) U'. The held-out and test images get the same transform.

    Raises:
        UserError: the images are too large, or too many for the memory.
    """
    size = images.shape[1:].numel()
    if size > ZCA_LARGEST:
        raise UserError(f"--zca needs images of at most {ZCA_LARGEST} values, got {size}. Lower --image-size.")
    needed, there = 4 * images.shape.numel(), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        sizes = f"{needed / 2**30:.1f} GiB of {len(images)} training images, and there are {there / 2**30:.1f}"
        raise UserError(f"--zca keeps whitened images in memory, {sizes}. Lower --image-size, or leave --zca out.")
    path = cache_folder() / f"zca-{key[:32]}.safetensors"
    try:
        return runs.read_tensors(path, "cached whitening")[0]
    except UserError:
        if size >= ZCA_SLOW:
            print(f"fitting the whitening of images of {size} values: minutes, once, then kept in {path}", flush=True)
        transform = _fit_zca(images)
    try:
        runs.write_tensors(path, transform, {})
    except runs.Unwritable as e:
        print(f"the whitening was not cached: {e}")
    return transform


def _fit_zca(images: Images) -> Transform:
    mean = torch.stack([part.sum(0) for part in _flat(images)]).sum(0) / len(images)
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for part in _flat(images):
        centred = part - mean
        covariance.addmm_(centred.T, centred)
    values, vectors = torch.linalg.eigh(covariance / max(len(images) - 1, 1))
    scale = (values.clamp_min(0) + ZCA_EPSILON).sqrt()
    return {
        "mean": mean.float(),
        "whiten": ((vectors / scale) @ vectors.T).float(),
        "unwhiten": ((vectors * scale) @ vectors.T).float(),
    }


def _flat(images: Images) -> Iterator[Tensor]:
    """Images in [0, 1], a part at a time, to need no second data set of floats. Each [n, D] float64"""
    return (part.double().flatten(1) / images.white for part in images.split(_CHUNK))
