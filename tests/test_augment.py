"""Plans of augmentation: their ranges, their randomness, and strategies by name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpp import augment
from ddpp.errors import UserError
from ddpp.ops import dsa

IDENTITY = torch.tensor(dsa.IDENTITY)


def draw(steps: int, batch: int, height: int, width: int, seed: int = 0, **options: Any) -> Tensor:
    options = {"groups": augment.GROUPS, "mode": "all", **options}
    return augment.draw(steps, batch, height, width, generator=torch.Generator().manual_seed(seed), **options)


def groups_on(plan: Tensor) -> list[str]:
    on = (plan != IDENTITY).flatten(0, -2).any(0)
    return [group for group, columns in dsa.COLUMNS.items() if on[list(columns)].any()]


@pytest.mark.parametrize(("height", "width"), [(32, 32), (28, 28), (33, 20), (8, 8), (3, 1)])
def test_ranges(height: int, width: int) -> None:
    plan = draw(40, 500, height, width).flatten(0, 1)
    uniform = {
        dsa.BRIGHTNESS: (-0.5, 0.5),
        dsa.SATURATION: (0, 2),
        dsa.CONTRAST: (0.5, 1.5),
        dsa.SCALE_X: (1 / 1.2, 1.2),
        dsa.SCALE_Y: (1 / 1.2, 1.2),
        dsa.SIN: (-math.sin(math.pi / 12), math.sin(math.pi / 12)),
    }
    for column, (low, high) in uniform.items():
        values = plan[:, column]
        margin = 0.01 * (high - low)
        assert low - 1e-6 <= values.min() < low + margin
        assert high - margin < values.max() <= high + 1e-6
        assert abs(values.mean() - (low + high) / 2) < margin
    for column, side in ((dsa.SHIFT_Y, height), (dsa.SHIFT_X, width)):
        most = int(side * 0.125 + 0.5)
        assert plan[:, column].unique().tolist() == list(range(-most, most + 1))
    assert set(plan[:, dsa.FLIP].tolist()) == {0.0, 1.0}
    assert abs(plan[:, dsa.FLIP].mean() - 0.5) < 0.02
    torch.testing.assert_close(plan[:, dsa.COS].square() + plan[:, dsa.SIN].square(), torch.ones(len(plan)))


@pytest.mark.parametrize("side", [1, 2, 3, 8, 28, 31, 32])
def test_cutout_boxes_are_those_of_the_published_code(side: int) -> None:
    """Centre offsets 0 to side inclusive (below side where the box is odd), indices clamped at the border."""
    size = int(side * 0.5 + 0.5)
    possible = set()
    for offset in range(side + (1 - size % 2)):
        indices = [min(max(k + offset - size // 2, 0), side - 1) for k in range(size)]
        possible.add((min(indices), max(indices) + 1))
    plan = draw(1, 5000, side, side)[0]
    for start, end in ((dsa.TOP, dsa.BOTTOM), (dsa.LEFT, dsa.RIGHT)):
        assert {(int(row[start]), int(row[end])) for row in plan} == possible


def test_the_same_generator_gives_the_same_plans() -> None:
    assert torch.equal(draw(3, 5, 32, 32, seed=4), draw(3, 5, 32, 32, seed=4))
    assert not torch.equal(draw(3, 5, 32, 32, seed=4), draw(3, 5, 32, 32, seed=5))


def test_a_draw_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    draw(3, 5, 32, 32)
    assert torch.equal(torch.get_rng_state(), before)


def test_all_chains_every_group_and_one_takes_a_group_for_each_step() -> None:
    assert groups_on(draw(1, 64, 32, 32)) == list(augment.GROUPS)
    plans = draw(600, 64, 32, 32, mode="one")
    chosen = [groups_on(step) for step in plans]
    assert all(len(groups) == 1 for groups in chosen)
    for group in augment.GROUPS:
        assert 60 < chosen.count([group]) < 140
    parameters = plans[chosen.index(["scale"]), :, dsa.SCALE_X]
    assert len(parameters.unique()) == 64  # each image its own


def test_groups_that_are_not_asked_for_stay_off() -> None:
    plans = draw(50, 32, 32, 32, mode="one", groups=("crop", "scale"))
    assert {groups_on(step)[0] for step in plans} == {"crop", "scale"}
    assert groups_on(draw(2, 32, 32, 32, groups=("flip", "color"))) == ["color", "flip"]


def test_siamese_gives_all_images_of_a_step_the_same_parameters() -> None:
    plans = draw(4, 7, 32, 32, siamese=True)
    assert torch.equal(plans, plans[:, :1].expand_as(plans))
    assert not torch.equal(plans[0], plans[1])
    assert plans.is_contiguous()


@pytest.mark.parametrize(("steps", "batch", "groups"), [(3, 4, ()), (0, 4, augment.GROUPS), (3, 0, augment.GROUPS)])
@pytest.mark.parametrize("mode", ["one", "all"])
def test_nothing_to_draw(steps: int, batch: int, groups: tuple[str, ...], mode: str) -> None:
    plans = draw(steps, batch, 32, 32, groups=groups, mode=mode)
    assert plans.shape == (steps, batch, dsa.PLAN_SIZE)
    assert torch.equal(plans, IDENTITY.expand_as(plans))


def test_strategies() -> None:
    assert augment.parse_strategy("color_crop_cutout_flip_scale_rotate") == augment.GROUPS
    assert augment.parse_strategy("flip_crop") == ("crop", "flip")
    assert augment.groups_for("auto", "crop_scale") == ("crop", "scale")
    assert augment.groups_for("flip", "crop_scale") == ("flip",)
    assert augment.parse_strategy("none") == ()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: augment.parse_strategy("color_rotat"),
            r"unknown augmentation group 'rotat'; did you mean 'rotate'",
        ),
        (lambda: augment.parse_strategy(""), r"Join some of color, crop.*'none'"),
        (
            lambda: draw(1, 1, 8, 8, groups=("colour",)),
            r"unknown augmentation group 'colour'; did you mean 'color'",
        ),
        (lambda: draw(1, 1, 8, 8, mode="S"), r"mode must be 'one'.*or 'all'.*got 'S'"),
        (lambda: draw(1, -1, 8, 8), "batch must be at least 0, got -1"),
        (lambda: draw(1, 1, 0, 8), "height must be at least 1, got 0"),
    ],
)
def test_errors(call: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()
