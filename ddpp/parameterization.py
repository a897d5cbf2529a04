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


class Parameterization(Protocol):
    """A linear map between numbers and images [N, C, H, W]."""

    def encode(self, images: Tensor) -> Tensor:
        """The numbers whose images are nearest to these."""

    def decode(self, numbers: Tensor) -> Tensor:
        """The images of these numbers."""

    def pull_back(self, gradient: Tensor) -> Tensor:
        """The gradient of the numbers from that of their images."""

    def tensors(self, numbers: Tensor) -> dict[str, Tensor]:
        """All from which the images can be decoded again, by name."""


class Pixels:
    """Images are their own numbers."""

    def encode(self, images: Tensor) -> Tensor:
        """The same."""
        return images

    def decode(self, numbers: Tensor) -> Tensor:
        """The same."""
        return numbers

    def pull_back(self, gradient: Tensor) -> Tensor:
        """The same."""
        return gradient

    def tensors(self, numbers: Tensor) -> dict[str, Tensor]:
        """None: the images are there."""
        return {}


class Frequencies:
    """FreD (arXiv 2311.08819): of each image those coefficients of its cosine transform that are largest in its class.

    The orthonormal type II transform of each channel. Every image of a class keeps the same H W / images_in_one
    frequencies, those with the largest mean square over its training images and the channels, which is how its images
    lose least. FreD goes by the variance, which is the same where a class's mean image is blank, as of natural images;
    elsewhere it leaves out what all images of a class have in common. Numbers: [N, C, kept].

    Args:
        dataset: whose training images are looked at.
        images_in_one: how many images share the numbers of one.
        device: of the images.
    """

    def __init__(self, dataset: Dataset, images_in_one: int, device: torch.device) -> None:
        _, height, width = dataset.shape
        self.down, self.across = (_cosines(side).to(device) for side in (height, width))
        kept = height * width // images_in_one
        self.places = torch.stack([self._largest(dataset, label)[:kept] for label in range(len(dataset.classes))])

    def encode(self, images: Tensor) -> Tensor:
        """Coefficients. [N, C, kept]"""
        return (self.down @ images @ self.across.mT).flatten(2).gather(2, self._places_of(images))

    def decode(self, numbers: Tensor) -> Tensor:
        """Images without the frequencies that were left out. [N, C, H, W]"""
        size = *numbers.shape[:2], len(self.down), len(self.across)
        coefficients = numbers.new_zeros(size).flatten(2).scatter(2, self._places_of(numbers), numbers)
        return self.down.mT @ coefficients.view(size) @ self.across

    pull_back = encode  # rows of an orthonormal matrix

    def tensors(self, numbers: Tensor) -> dict[str, Tensor]:
        """``numbers`` [N, C, kept] and ``places`` [K, kept] int64, row * W + column of a class's frequencies."""
        return {"numbers": numbers, "places": self.places}

    def _places_of(self, several: Tensor) -> Tensor:
        """[N, C, kept]"""
        of_each = self.places.repeat_interleave(len(several) // len(self.places), 0)
        return of_each[:, None].expand(-1, several.shape[1], -1)

    def _largest(self, dataset: Dataset, label: int) -> Tensor:
        """All places, that with the largest coefficients in a class first. [H W]"""
        images = dataset.train_images[dataset.train_labels == label].to(self.down.device)
        squares = (self.down @ images @ self.across.mT).double().square().mean((0, 1))
        return squares.flatten().sort(descending=True, stable=True).indices


class Multiformation:
    """IDC (arXiv 2205.14959): an image is a square of smaller ones, each enlarged to its size bilinearly.

    Numbers: [N / images_in_one, C, H, W].

    Args:
        shape: of an image, (C, H, W).
        images_in_one: a square number whose root divides H and W.
        device: of the images.
    """

    def __init__(self, shape: torch.Size | tuple[int, int, int], images_in_one: int, device: torch.device) -> None:
        self.factor = math.isqrt(images_in_one)
        self.down, self.across = (_enlarging(side // self.factor, side).to(device) for side in shape[1:])
        self._smaller = torch.linalg.pinv(self.down), torch.linalg.pinv(self.across)

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

    def tensors(self, numbers: Tensor) -> dict[str, Tensor]:
        """``numbers`` [N / images_in_one, C, H, W]."""
        return {"numbers": numbers}

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
        return Frequencies(dataset, several, device)
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
