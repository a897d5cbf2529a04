"""What is learned in place of pixels: from the numbers of one image several are decoded.

A parameterization is a linear map from numbers to images. Methods see images and give their gradients, which its
transpose pulls back to the numbers; :mod:`ddpp.distill` moves these. A set of ``ipc`` images a class then holds
``ipc * images_in_one`` images and is stored in the numbers of ``ipc``. Images stand class by class, as everywhere.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpp.config import DistillConfig
from ddpp.data import Dataset
from ddpp.errors import UserError

_AT_ONCE = 500  # images


class Parameterization(Protocol):
    """A linear map between numbers and images [N, C, H, W].

    Attributes:
        fixed: what the images are decoded by, beside the numbers: chosen once, it must stay with them.
    """

    fixed: dict[str, Tensor]

    def with_fixed(self, fixed: dict[str, Tensor]) -> Parameterization:
        """The same as it was chosen for numbers that were saved."""

    def encode(self, images: Tensor) -> Tensor:
        """The numbers whose images are nearest to these."""

    def decode(self, numbers: Tensor) -> Tensor:
        """The images of these numbers."""

    def pull_back(self, gradient: Tensor) -> Tensor:
        """The gradient of the numbers from that of their images."""


class Pixels:
    """Images are their own numbers."""

    def __init__(self) -> None:
        self.fixed: dict[str, Tensor] = {}

    def with_fixed(self, fixed: dict[str, Tensor]) -> Pixels:
        """The same."""
        return self

    def encode(self, images: Tensor) -> Tensor:
        """The same."""
        return images

    def decode(self, numbers: Tensor) -> Tensor:
        """The same."""
        return numbers

    def pull_back(self, gradient: Tensor) -> Tensor:
        """The same."""
        return gradient


class Frequencies:
    """FreD (arXiv 2311.08819): of each image those coefficients of its cosine transform that are largest in its class.

    The orthonormal type II transform of each channel. Every image of a class keeps the same H W / images_in_one
    frequencies, those with the largest mean square over its training images and the channels, which is how its images
    lose least. FreD goes by the variance, which is nearly the same for photographs, whose mean image is nearly blank;
    elsewhere it leaves out what all images of a class have in common. Numbers: [N, C, kept].

    Args:
        places: of the frequencies that the images of each class keep, row * W + column. [K, kept] int64
        shape: of an image, (C, H, W).
    """

    def __init__(self, places: Tensor, shape: torch.Size | tuple[int, int, int]) -> None:
        self.fixed, self.shape = {"places": places}, shape
        self.down, self.across = (_cosines(side).to(places.device) for side in shape[1:])

    @classmethod
    def of(cls, dataset: Dataset, images_in_one: int, device: torch.device) -> Frequencies:
        """For images on a device, ``images_in_one`` of which share the numbers of one."""
        _, height, width = dataset.shape
        down, across = (_cosines(side).to(device) for side in (height, width))
        kept = height * width // images_in_one
        largest = []
        for label in range(len(dataset.classes)):
            squares = torch.zeros(height, width, dtype=torch.float64, device=device)
            for some in torch.nonzero(dataset.train_labels == label).flatten().split(_AT_ONCE):
                coefficients = down @ dataset.train_images[some].to(device) @ across.mT
                squares += coefficients.double().square().sum((0, 1))
            largest.append(squares.flatten().sort(descending=True, stable=True).indices[:kept])
        return cls(torch.stack(largest), dataset.shape)

    def with_fixed(self, fixed: dict[str, Tensor]) -> Frequencies:
        """With ``places`` that were saved: of nearly equal frequencies another machine may choose another."""
        return Frequencies(fixed["places"], self.shape)

    def encode(self, images: Tensor) -> Tensor:
        """Coefficients. [N, C, kept]"""
        return (self.down @ images @ self.across.mT).flatten(2).gather(2, self._places_of(images))

    def decode(self, numbers: Tensor) -> Tensor:
        """Images without the frequencies that were left out. [N, C, H, W]"""
        size = *numbers.shape[:2], len(self.down), len(self.across)
        coefficients = numbers.new_zeros(size).flatten(2).scatter(2, self._places_of(numbers), numbers)
        return self.down.mT @ coefficients.view(size) @ self.across

    pull_back = encode  # rows of an orthonormal matrix

    def _places_of(self, several: Tensor) -> Tensor:
        """[N, C, kept]"""
        places = self.fixed["places"]
        of_each = places.repeat_interleave(len(several) // len(places), 0)
        return of_each[:, None].expand(-1, several.shape[1], -1)


class Multiformation:
    """IDC (arXiv 2205.14959): an image is a square of smaller ones, each enlarged to its size bilinearly.

    Numbers: [N / images_in_one, C, H, W].

    Args:
        shape: of an image, (C, H, W).
        images_in_one: a square number whose root divides H and W.
        device: of the images.
    """

    def __init__(self, shape: torch.Size | tuple[int, int, int], images_in_one: int, device: torch.device) -> None:
        self.fixed: dict[str, Tensor] = {}
        self.factor = math.isqrt(images_in_one)
        self.down, self.across = (_enlarging(side // self.factor, side).to(device) for side in shape[1:])
        self._smaller = torch.linalg.pinv(self.down), torch.linalg.pinv(self.across)

    def with_fixed(self, fixed: dict[str, Tensor]) -> Multiformation:
        """The same: nothing is chosen."""
        return self

    def encode(self, images: Tensor) -> Tensor:
        """The smaller images that are nearest when enlarged, in their squares."""
        return self._together(self._smaller[0] @ images @ self._smaller[1].mT)

    def decode(self, numbers: Tensor) -> Tensor:
        """Each part of a square, row by row, enlarged."""
        (n, channels, height, width), factor = numbers.shape, self.factor
        parts = numbers.view(n, channels, factor, height // factor, factor, width // factor).permute(0, 2, 4, 1, 3, 5)
        return self.down @ parts.flatten(0, 2) @ self.across.mT

    def pull_back(self, gradient: Tensor) -> Tensor:
        """By the transpose of the enlargement."""
        return self._together(self.down.mT @ gradient @ self.across)

    def _together(self, parts: Tensor) -> Tensor:
        (count, channels, height, width), factor = parts.shape, self.factor
        squares = parts.view(count // factor**2, factor, factor, channels, height, width).permute(0, 3, 1, 4, 2, 5)
        return squares.reshape(-1, channels, factor * height, factor * width)


PIXELS = Pixels()


def make(settings: DistillConfig, dataset: Dataset, device: torch.device) -> Parameterization:
    """What ``--parameterization`` names.

    Raises:
        UserError: the number of images in one does not suit it, or not the images.
    """
    name, several, shape = settings.parameterization, settings.images_in_one, dataset.shape
    if (name == "pixels") != (several == 1):
        raise UserError(
            f"--images-in-one {several} with --parameterization {name}: pixels hold one image, frequencies and "
            "multiformation 2 or more; give both options, or leave out both"
        )
    if name == "frequencies":
        if several > shape[1] * shape[2]:
            raise UserError(f"--images-in-one {several} is more than the {shape[1] * shape[2]} frequencies of an image")
        return Frequencies.of(dataset, several, device)
    if name == "multiformation":
        factor = math.isqrt(several)
        if factor**2 != several or shape[1] % factor or shape[2] % factor:
            raise UserError(
                f"--images-in-one {several} must be a square number for multiformation, such as 4, and its root must "
                f"divide both sides of the images, which are {shape[1]}x{shape[2]}"
            )
        return Multiformation(shape, several, device)
    return PIXELS


def _cosines(side: int) -> Tensor:
    """The orthonormal cosine transform of type II, a frequency a row. [side, side]"""
    frequency, place = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    rows = torch.cos(math.pi / side * (place.double() + 0.5) * frequency)
    return (rows / rows.norm(dim=1, keepdim=True)).float()


def _enlarging(small: int, large: int) -> Tensor:
    """Bilinear enlargement along one axis. [large, small]"""
    return F.interpolate(torch.eye(small)[None], size=large, mode="linear")[0].mT.contiguous()
