"""Draws the plans of differentiable Siamese augmentation (DSA); :func:`ddpp.ops.dsa_augment` applies them.

Source: Zhao and Bilen, "Dataset Condensation with Differentiable Siamese Augmentation" (arXiv 2102.08259),
with the ranges and the one group per batch of Cazenavette et al., "Dataset Distillation by Matching Training
Trajectories" (arXiv 2203.11932).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from ddpp.errors import UserError, nearest
from ddpp.ops import dsa
from ddpp.ops.dsa import GROUPS, PLAN_SIZE

__all__ = ["GROUPS", "draw", "groups_for", "parse_strategy"]

_CROP = 0.125  # largest shift, as a part of the side
_CUTOUT = 0.5  # side of the zeroed box, as a part of the image's
_FLIP = 0.5  # probability
_SCALE = 1.2  # largest factor; the smallest is its inverse
_ROTATE = math.radians(15)  # largest angle

_IDENTITY = torch.tensor(dsa.IDENTITY)


def parse_strategy(strategy: str) -> tuple[str, ...]:
    """The groups that a strategy such as ``"color_crop_flip"`` names, in the order in which they are applied.

    Args:
        strategy: names out of :data:`GROUPS` joined by ``_``, or ``"none"``.

    Raises:
        UserError: a name is not a group.
    """
    names = [] if strategy == "none" else strategy.split("_")
    for name in names:
        if name not in GROUPS:
            raise UserError(
                f"strategy {strategy!r}: unknown augmentation group {name!r}{nearest(name, GROUPS)} "
                f"Join some of {', '.join(GROUPS)} by '_', or give 'none'."
            )
    return tuple(group for group in GROUPS if group in names)


def groups_for(strategy: str, auto: str) -> tuple[str, ...]:
    """As :func:`parse_strategy`; ``"auto"`` stands for the strategy ``auto``, that of the data set."""
    return parse_strategy(auto if strategy == "auto" else strategy)


def draw(
    steps: int,
    batch: int,
    height: int,
    width: int,
    *,
    groups: Collection[str],
    mode: str = "one",
    siamese: bool = False,
    generator: torch.Generator,
) -> Tensor:
    """Draws the augmentation of ``steps`` batches of images at once.

    With r ~ U[0, 1), anew for every use, an image gets: brightness r - 0.5; saturation 2r; contrast
    r + 0.5; a shift of -s to s whole pixels on each axis, s = int(0.125 side + 0.5); a zeroed box of
    int(0.5 side + 0.5) pixels around any pixel of the image, cut at the border; a flip where r < 0.5;
    scale factors in [1/1.2, 1.2) on each axis; a rotation by 30 (r - 0.5) degrees.

    Args:
        steps: number of batches.
        batch: images in each batch.
        height: of the images, in pixels.
        width: of the images, in pixels.
        groups: the groups to draw from, as :func:`parse_strategy` gives them; without any, the plans change
            nothing.
        mode: ``"one"`` draws one group for each step (trajectory matching's choice), ``"all"`` chains all.
        siamese: one set of parameters for all images of a step; otherwise each image has its own.
        generator: source of randomness, on the CPU.

    Returns:
        The plans, float32 on the CPU. [steps, batch, 16]

    Raises:
        UserError: a size that is too small, an unknown group or mode, or a generator on another device.
    """
    _check(steps, batch, height, width, groups, mode, generator)
    if not groups:
        return _IDENTITY.repeat(steps, batch, 1)
    ranges = _ranges(height, width, tuple(groups), mode == "all")
    if mode == "one":
        chosen = torch.randint(len(ranges.low), (steps,), generator=generator)
        ranges = _Ranges(*(part[chosen] for part in ranges))
    plans = _draw(steps, 1 if siamese else batch, ranges, generator)
    return plans.expand(steps, batch, PLAN_SIZE).contiguous()


class _Ranges(NamedTuple):
    """What is drawn from; a group that is off gives its columns of the identity. One row a choice of groups.

    COS draws the angle, FLIP a number below a half where the image is flipped; BOTTOM, RIGHT and SIN follow from
    other columns.
    """

    low: Tensor  # [rows, 1, 16]
    length: Tensor  # [rows, 1, 16]
    box: Tensor  # sides of the zeroed box [rows, 1, 2]
    sides: Tensor  # height and width of the image, for both ends of the box [rows, 1, 4]


def _draw(steps: int, batch: int, ranges: _Ranges, generator: torch.Generator) -> Tensor:
    # A draw r is at most 1 - 2^-24, so that whole numbers, drawn by rounding down, stay below the upper end.
    plans = torch.rand(steps, batch, PLAN_SIZE, generator=generator).mul_(ranges.length).add_(ranges.low)
    plans[..., dsa.SHIFT_Y : dsa.RIGHT + 1].floor_()
    box = plans[..., dsa.TOP : dsa.RIGHT + 1]  # both ends of each side [., ., 4]
    torch.add(box[..., ::2], ranges.box, out=box[..., 1::2])
    torch.minimum(box, ranges.sides, out=box).clamp_(min=0)
    plans[..., dsa.FLIP].lt_(_FLIP)
    angle = plans[..., dsa.COS]
    torch.sin(angle, out=plans[..., dsa.SIN])
    angle.cos_()
    return plans


@functools.cache
def _ranges(height: int, width: int, groups: tuple[str, ...], chained: bool) -> _Ranges:
    """Ranges with one of the groups on in each row, or, chained, of one row with all of them on."""
    on = [group for group in GROUPS if group in groups]
    rows = [_range(height, width, choice) for choice in ([on] if chained else [[group] for group in on])]
    low, high, box = (torch.tensor(part, dtype=torch.float32)[:, None] for part in zip(*rows, strict=True))
    sides = torch.tensor([height, height, width, width], dtype=torch.float32)
    return _Ranges(low, high - low, box, sides.expand(len(rows), 1, 4))


def _range(height: int, width: int, groups: Collection[str]) -> tuple[list[float], list[float], list[int]]:
    """Lower and upper end of each column [16], and the sides of the zeroed box [2]."""
    low, high = list(dsa.IDENTITY), list(dsa.IDENTITY)
    low[dsa.FLIP] = high[dsa.FLIP] = 1
    low[dsa.COS] = high[dsa.COS] = 0
    box = [0, 0]
    if "color" in groups:
        low[dsa.BRIGHTNESS : dsa.CONTRAST + 1] = [-0.5, 0, 0.5]
        high[dsa.BRIGHTNESS : dsa.CONTRAST + 1] = [0.5, 2, 1.5]
    if "crop" in groups:
        for column, side in ((dsa.SHIFT_Y, height), (dsa.SHIFT_X, width)):
            most = int(side * _CROP + 0.5)
            low[column], high[column] = -most, most + 1
    if "cutout" in groups:
        box = [int(side * _CUTOUT + 0.5) for side in (height, width)]
        for column, side, size in zip((dsa.TOP, dsa.LEFT), (height, width), box, strict=True):
            low[column], high[column] = -(size // 2), side + 1 - size % 2 - size // 2
    if "flip" in groups:
        low[dsa.FLIP] = 0
    if "scale" in groups:
        low[dsa.SCALE_X] = low[dsa.SCALE_Y] = 1 / _SCALE
        high[dsa.SCALE_X] = high[dsa.SCALE_Y] = _SCALE
    if "rotate" in groups:
        low[dsa.COS], high[dsa.COS] = -_ROTATE, _ROTATE
    return low, high, box


def _check(
    steps: int,
    batch: int,
    height: int,
    width: int,
    groups: Collection[str],
    mode: str,
    generator: torch.Generator,
) -> None:
    sizes = (("steps", steps, 0), ("batch", batch, 0), ("height", height, 1), ("width", width, 1))
    for name, value, least in sizes:
        if value < least:
            raise UserError(f"{name} must be at least {least}, got {value}")
    unknown = [group for group in groups if group not in GROUPS]
    if unknown:
        raise UserError(
            f"groups: unknown augmentation group {unknown[0]!r}{nearest(unknown[0], GROUPS)} Known are "
            f"{', '.join(GROUPS)}; parse_strategy makes them of a strategy such as 'color_crop'."
        )
    if mode not in ("one", "all"):
        raise UserError(f"mode must be 'one' (one group for each step) or 'all' (all groups chained), got {mode!r}")
    if generator.device.type != "cpu":
        raise UserError(
            f"generator must be on the CPU, so that CPU and GPU runs draw alike, got {generator.device}; "
            "draw there and move the plans"
        )
