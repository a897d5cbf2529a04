"""RDED: the crops of real images that a teacher is surest of, several in an image (arXiv 2312.03526)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpp import data, seeds, store
from ddpp.config import Config
from ddpp.errors import UserError
from ddpp.methods import METHODS, Problem
from ddpp.models import Network
from ddpp.synthetic import Synthetic

_LEAST_AREA = 0.08  # of an image, in a crop
_AT_ONCE = 500  # images


@METHODS.register("rded")
class RDED:
    """Selects for networks that learn a teacher's answers (``--evaluate-labels teacher``).

    Of each class ``rded_candidates`` random training images are looked at, and of each of them ``rded_crops`` random
    squares, enlarged or reduced to a patch; the one for which the first teacher's cross-entropy is least stands for its
    image. The patches of the least cross-entropy fill ``ipc`` images of ``rded_patches`` times ``rded_patches``; one
    that is smaller than an image is shown to the teacher in the midst of the mean image.
    """

    needs_teachers = True
    learns_labels = False

    @staticmethod
    def check(config: Config) -> None:
        """Refuses fewer candidates than there are to be patches.

        Raises:
            UserError: there are.
        """
        settings, patches = config.distill, _patches(config)
        if settings.rded_candidates < patches:
            raise UserError(
                f"--rded-candidates {settings.rded_candidates} is less than the {patches} patches of a class, as many "
                f"as --ipc {settings.ipc} images of {settings.rded_patches}x{settings.rded_patches} hold"
            )

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        side, patches = problem.dataset.shape[-1], problem.config.distill.rded_patches
        if side % patches:
            raise UserError(f"--rded-patches {patches} must divide the side of the images, {side} pixels")
        self._side, self._patch = side, side // patches

    def choose(self) -> Synthetic:
        problem, settings = self.problem, self.problem.config.distill
        teacher = store.ended(problem.teachers[0], problem.config, problem.dataset, problem.device)
        chosen = [self._of_class(teacher, label) for label in range(len(problem.dataset.classes))]
        images = data.from_pixels(problem.dataset.transform, torch.cat(chosen).cpu())
        labels = torch.arange(len(chosen)).repeat_interleave(settings.ipc)
        return Synthetic(images, labels, torch.tensor(settings.step_size))

    def _of_class(self, teacher: Network, label: int) -> Tensor:
        """Pixels. [ipc, C, H, H]"""
        dataset, settings = self.problem.dataset, self.problem.config.distill
        draw = seeds.generator(self.problem.config.run.seed, "rded", label)
        members = torch.nonzero(dataset.train_labels == label).flatten()
        members = members[torch.randperm(len(members), generator=draw)[: settings.rded_candidates]]
        patches = _patches(self.problem.config)
        if len(members) < patches:
            raise UserError(
                f"class {dataset.classes[label]!r} has {len(members)} training images, and {patches} patches take one "
                "each; lower --ipc or --rded-patches"
            )
        pixels = data.to_pixels_from(dataset.transform, dataset.train_images[members].to(self.problem.device))
        best = torch.full([len(members)], torch.inf, device=pixels.device)
        kept = pixels.new_zeros(len(members), pixels.shape[1], self._patch, self._patch)
        for _ in range(settings.rded_crops):
            crops = _crops(pixels, self._patch, draw)
            doubt = self._doubt(teacher, crops, label)
            better = doubt < best
            best, kept = torch.where(better, doubt, best), torch.where(better[:, None, None, None], crops, kept)
        return _tiled(kept[best.argsort(stable=True)[:patches]], settings.rded_patches)

    @torch.no_grad()
    def _doubt(self, teacher: Network, patches: Tensor, label: int) -> Tensor:
        """The teacher's cross-entropy for pixels [n, C, p, p] of a class. [n]"""
        transform, first = self.problem.dataset.transform, (self._side - self._patch) // 2
        mean = data.to_pixels_from(transform, patches.new_zeros(1, *self.problem.dataset.shape))
        found = []
        for part in patches.split(_AT_ONCE):
            shown = mean.repeat(len(part), 1, 1, 1)
            shown[:, :, first : first + self._patch, first : first + self._patch] = part
            answers = teacher(data.from_pixels(transform, shown))
            found.append(F.cross_entropy(answers, answers.new_full([len(part)], label).long(), reduction="none"))
        return torch.cat(found)


def _patches(config: Config) -> int:
    """Of a class."""
    return config.distill.ipc * config.distill.rded_patches**2


def _crops(pixels: Tensor, side: int, draw: torch.Generator) -> Tensor:
    """A random square of each image [n, C, H, H], of a uniform share of its area, resized. [n, C, side, side]"""
    found = []
    for image, (area, *at) in zip(pixels, torch.rand(len(pixels), 3, generator=draw).tolist(), strict=True):
        whole = image.shape[-1]
        own = max(1, round(whole * (_LEAST_AREA + (1 - _LEAST_AREA) * area) ** 0.5))
        top, left = (int(place * (whole - own + 1)) for place in at)
        square = image[None, :, top : top + own, left : left + own]
        found.append(F.interpolate(square, size=(side, side), mode="bilinear", antialias=True))
    return torch.cat(found).clamp(0, 1)


def _tiled(patches: Tensor, along: int) -> Tensor:
    """Images of ``along`` x ``along`` patches, of which each image has one of every rank. [n / along^2, C, H, H]"""
    rows = patches.unflatten(0, (along, along, -1))  # [row, column, n, C, p, p]
    return torch.cat([torch.cat(list(row), dim=3) for row in rows], dim=2)
