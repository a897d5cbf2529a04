"""Differentiable Siamese augmentation: its row of the op contract, and what is its own."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import op_contract
import pytest
import torch
from conftest import Backend
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from op_contract import moved
from torch import Tensor

from ddpp import augment
from ddpp.ops import _library, dsa, dsa_augment

Image = NDArray[np.float64]  # [C, H, W]


def draw(n: int, h: int, w: int, generator: torch.Generator, groups: Any = dsa.GROUPS) -> Tensor:
    return augment.draw(1, n, h, w, groups=groups, mode="all", generator=generator)[0]


def case(
    n: int, c: int, h: int, w: int, dtype: torch.dtype, generator: torch.Generator, groups: Any = dsa.GROUPS
) -> op_contract.Case:
    # A sample point is known to a rounding error of the side: neighbouring pixels of a large float32 image
    # must not differ much for that to stay below the tolerance. test_large_images takes larger ones.
    spread = 0.02 if max(h, w) >= 64 else 0.2
    images = spread * torch.randn(n, c, h, w, dtype=torch.float64, generator=generator).to(dtype)
    return images, (draw(n, h, w, generator, groups),)


def cases(dtype: torch.dtype, generator: torch.Generator) -> dict[str, op_contract.Case]:
    found = {}
    for n, c, h, w in (
        (0, 3, 8, 8),
        (1, 1, 8, 8),
        (3, 3, 7, 9),
        (3, 1, 28, 28),
        (3, 3, 33, 32),
        (2, 3, 1, 5),
    ):
        found[f"{n}x{c}x{h}x{w}"] = case(n, c, h, w, dtype, generator)
    for group in dsa.GROUPS:
        found[group] = case(4, 3, 32, 32, dtype, generator, (group,))
    found["2x3x64x64"] = case(2, 3, 64, 64, dtype, generator, dsa.GROUPS[1:])
    images, (plan,) = case(6, 3, 9, 10, dtype, generator)
    for row, group in enumerate(dsa.GROUPS):
        others = [k for other, columns in dsa.COLUMNS.items() if other != group for k in columns]
        plan[row, others] = torch.tensor(dsa.IDENTITY)[others]
    found["another-group-each"] = images, (plan,)
    return found


def operator_arguments(dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    images, (plan,) = case(3, 3, 7, 9, dtype, torch.Generator().manual_seed(3))
    return {"dsa_augment": (images, plan), "dsa_adjoint": (images, plan)}


ROW = op_contract.Row(
    function=dsa_augment,
    operators=("dsa_augment", "dsa_adjoint"),
    cases=cases,
    operator_arguments=operator_arguments,
    small="3x3x7x9",
    constants_follow=False,
)


# ---- each group by its definition, pixel by pixel ----


def color(image: Image, p: Image) -> Image:
    image = image + p[dsa.BRIGHTNESS]
    gray = image.mean(0)
    image = (image - gray) * p[dsa.SATURATION] + gray
    return (image - image.mean()) * p[dsa.CONTRAST] + image.mean()


def crop(image: Image, p: Image) -> Image:
    _, h, w = image.shape
    result = np.zeros_like(image)
    for y in range(h):
        for x in range(w):
            from_y, from_x = y + int(p[dsa.SHIFT_Y]), x + int(p[dsa.SHIFT_X])
            if 0 <= from_y < h and 0 <= from_x < w:
                result[:, y, x] = image[:, from_y, from_x]
    return result


def cutout(image: Image, p: Image) -> Image:
    top, bottom, left, right = (int(p[k]) for k in (dsa.TOP, dsa.BOTTOM, dsa.LEFT, dsa.RIGHT))
    result = image.copy()
    result[:, top:bottom, left:right] = 0
    return result


def flip(image: Image, p: Image) -> Image:
    return image[:, :, ::-1] if p[dsa.FLIP] else image


def resample(image: Image, matrix: Image) -> Image:
    _, h, w = image.shape
    result = np.zeros_like(image)
    for y in range(h):
        for x in range(w):
            at = np.array([2 * x / (w - 1) - 1 if w > 1 else 0.0, 2 * y / (h - 1) - 1 if h > 1 else 0.0])
            from_x, from_y = (matrix @ at + 1) / 2 * (w - 1, h - 1)
            for tap_y in (math.floor(from_y), math.floor(from_y) + 1):
                for tap_x in (math.floor(from_x), math.floor(from_x) + 1):
                    if 0 <= tap_y < h and 0 <= tap_x < w:
                        weight = (1 - abs(from_y - tap_y)) * (1 - abs(from_x - tap_x))
                        result[:, y, x] += weight * image[:, tap_y, tap_x]
    return result


def scale(image: Image, p: Image) -> Image:
    return resample(image, np.diag([p[dsa.SCALE_X], p[dsa.SCALE_Y]]))


def rotate(image: Image, p: Image) -> Image:
    return resample(image, np.array([[p[dsa.COS], -p[dsa.SIN]], [p[dsa.SIN], p[dsa.COS]]]))


BY_DEFINITION = {
    "color": color,
    "crop": crop,
    "cutout": cutout,
    "flip": flip,
    "scale": scale,
    "rotate": rotate,
}


def by_definition(images: Tensor, plan: Tensor, groups: Any) -> Tensor:
    result = []
    for image, row in zip(images.numpy(), plan.double().numpy(), strict=True):
        for group in groups:
            image = BY_DEFINITION[group](image, row)
        result.append(image)
    return torch.from_numpy(np.stack(result))


@pytest.mark.parametrize("shape", [(4, 3, 9, 12), (4, 1, 12, 7), (6, 3, 16, 16)], ids=str)
@pytest.mark.parametrize("groups", [*((group,) for group in dsa.GROUPS), dsa.GROUPS], ids="-".join)
def test_groups_by_their_definition(groups: tuple[str, ...], shape: tuple[int, ...], backend: Backend) -> None:
    generator = torch.Generator().manual_seed(11)
    images = torch.randn(shape, dtype=torch.float64, generator=generator)
    plan = draw(shape[0], *shape[2:], generator, groups)
    result = dsa_augment(*moved((images, plan), backend.device)).cpu()
    torch.testing.assert_close(result, by_definition(images, plan, groups), rtol=1e-12, atol=1e-12)


def test_scale_and_rotation_as_torch_samples(backend: Backend) -> None:
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    angle, sx, sy = 0.2, 1.1, 0.9
    plan = torch.tensor(dsa.IDENTITY).repeat(5, 1)
    plan[:, [dsa.SCALE_X, dsa.SCALE_Y]] = torch.tensor([sx, sy])
    plan[:, [dsa.COS, dsa.SIN]] = torch.tensor([math.cos(angle), math.sin(angle)])
    expected = images
    for matrix in (
        [[sx, 0.0, 0.0], [0.0, sy, 0.0]],
        [[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0]],
    ):
        grid = torch.nn.functional.affine_grid(torch.tensor(matrix).repeat(5, 1, 1), [5, 3, 32, 32], align_corners=True)
        expected = torch.nn.functional.grid_sample(expected, grid, align_corners=True)
    result = dsa_augment(*moved((images, plan), backend.device)).cpu()
    torch.testing.assert_close(result, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("side", [64, 128])
def test_large_images(side: int, dtype: torch.dtype, backend: Backend) -> None:
    generator = torch.Generator().manual_seed(2)
    images, plan = (
        torch.randn(3, 3, side, side, dtype=dtype, generator=generator),
        draw(3, side, side, generator),
    )
    expected = ROW.value_and_gradient(images.double(), (plan,), fused=False)
    actual = ROW.value_and_gradient(*moved((images, (plan,)), backend.device))
    # Sample points are known to a rounding error of the side; neighbouring pixels differ by several units.
    tolerance = 8 * side * torch.finfo(dtype).eps
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got.cpu().double(), wanted, rtol=0, atol=tolerance)


# ---- what is exact ----


def test_the_identity_changes_no_bit(backend: Backend) -> None:
    images = torch.randn(3, 3, 8, 10)
    images[0, 0, 0, 0], images[0, 1, 2, 3] = math.nan, math.inf
    plan = torch.tensor(dsa.IDENTITY).repeat(3, 1)
    result = dsa_augment(*moved((images, plan), backend.device)).cpu()
    torch.testing.assert_close(result, images, rtol=0, atol=0, equal_nan=True)
    result.zero_()
    assert images[0, 0, 1, 1] != 0


@pytest.mark.parametrize("group", ["crop", "cutout", "flip"])
def test_groups_that_copy_change_no_bit(group: str, backend: Backend) -> None:
    generator = torch.Generator().manual_seed(1)
    images, plan = torch.randn(8, 3, 32, 32, generator=generator), draw(8, 32, 32, generator, (group,))
    result = dsa_augment(*moved((images, plan), backend.device)).cpu()
    assert torch.equal(result, by_definition(images.double(), plan, (group,)).float())


def test_a_nan_stays_in_its_image(backend: Backend) -> None:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(6, 3, 16, 16, generator=generator)
    images[::2] = math.nan
    plan = draw(6, 16, 16, generator)
    plan[1, dsa.COS], plan[1, dsa.SIN] = 1, 0  # scaled after an image that was rotated
    images, plan = moved((images, plan), backend.device)
    images.requires_grad_()
    result = dsa_augment(images, plan)
    (gradient,) = torch.autograd.grad(result, images, torch.ones_like(result) * images.detach())
    for value in (result, gradient):
        assert value[::2].isnan().flatten(1).any(1).all()
        assert value[1::2].isfinite().all()


# The backend is the same for all examples.
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**31),
    channels=st.sampled_from([1, 3]),
    h=st.integers(1, 20),
    w=st.integers(1, 20),
    stretch=st.floats(0.2, 3),
    turn=st.floats(-math.pi, math.pi),
)
def test_adjoint_identity(
    backend: Backend, seed: int, channels: int, h: int, w: int, stretch: float, turn: float
) -> None:
    """<A x, y> = <x, A^T y> for any plan, also far beyond those that are drawn."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, 2, channels, h, w, dtype=torch.float64, generator=generator)
    plan = draw(2, h, w, generator)
    plan[:, dsa.BRIGHTNESS] = 0
    plan[0, dsa.SCALE_X] *= stretch
    plan[0, dsa.COS], plan[0, dsa.SIN] = math.cos(turn), math.sin(turn)
    x, y, plan = moved((x, y, plan), backend.device)
    forward = (_library.ops().dsa_augment(x, plan) * y).sum()
    adjoint = (x * _library.ops().dsa_adjoint(y, plan)).sum()
    assert abs(forward - adjoint) < 1e-12 * (x.norm() * y.norm() + 1)


# ---- errors ----


def wrong_arguments() -> dict[str, tuple[Tensor, Tensor, str]]:
    images, plan = torch.zeros(2, 3, 8, 8), torch.tensor(dsa.IDENTITY).repeat(2, 1)
    return {
        "images-shape": (images[0], plan, r"images must be \[N, C, H, W\], got \[3, 8, 8\]"),
        "images-dtype": (images.half(), plan, "images must be float32 or float64, got torch.float16"),
        "plan-rows": (images, plan[:1], r"plan must be float32 \[2, 16\].*got torch.float32 \[1, 16\]"),
        "plan-columns": (images, plan[:, :9], r"plan must be float32 \[2, 16\].*got torch.float32 \[2, 9\]"),
        "plan-dtype": (images, plan.double(), r"plan must be float32 \[2, 16\].*got torch.float64"),
        "plan-device": (images, plan.to("meta"), "plan must be on cpu like the images, got meta"),
        "plan-grad": (
            images,
            plan.clone().requires_grad_(),
            r"plan must not require a gradient.*plan.detach\(\)",
        ),
    }


@pytest.mark.parametrize("name", wrong_arguments())
def test_errors(name: str, backend: Backend) -> None:
    images, plan, message = wrong_arguments()[name]
    with pytest.raises(ValueError, match=message):
        dsa_augment(images, plan)


@pytest.mark.parametrize("name", ["images-shape", "images-dtype", "plan-rows", "plan-columns", "plan-dtype"])
def test_a_direct_call_of_the_operator_is_checked_too(name: str) -> None:
    if _library.implementation("dsa_augment", "cpu")[0] != "C++":
        pytest.skip("no compiled kernels")
    images, plan, _ = wrong_arguments()[name]
    with pytest.raises(RuntimeError, match=r"ddpp: (images|plan) must"):
        torch.ops.ddpp.dsa_augment(images, plan)


@pytest.mark.parametrize("channels", [2, 5])
def test_other_numbers_of_channels_go_by_plain_torch(channels: int, backend: Backend) -> None:
    generator = torch.Generator().manual_seed(1)
    images, plan = torch.randn(3, channels, 8, 8, dtype=torch.float64, generator=generator), draw(3, 8, 8, generator)
    expected = by_definition(images, plan, dsa.GROUPS)
    images, plan = images.to(backend.device).requires_grad_(), plan.to(backend.device)
    result = dsa_augment(images, plan)
    torch.testing.assert_close(result.detach().cpu(), expected, rtol=1e-12, atol=1e-12)
    grad = torch.autograd.grad(result, images, result.detach())[0]
    torch.testing.assert_close(dsa.dsa_adjoint(result.detach(), plan), grad, rtol=1e-12, atol=1e-12)
