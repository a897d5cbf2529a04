"""The masked matching loss: its row of the op contract, and what is its own."""

from __future__ import annotations

import itertools
import math
from typing import Any

import op_contract
import pytest
import torch
from conftest import Backend
from torch import Tensor

from ddpp.ops import _library, masked_match_loss

INF, NAN = math.inf, math.nan


def vectors(p: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Student, target and start, of which about a tenth is pruned at epsilon 0.1."""
    target, far, span = torch.randn(3, p, dtype=torch.float64, generator=generator).to(dtype)
    return target + 0.3 * far, target, target + span


def cases(dtype: torch.dtype, generator: torch.Generator) -> dict[str, op_contract.Case]:
    found: dict[str, op_contract.Case] = {}
    for p in (*op_contract.SIZES, 70001):
        student, target, start = vectors(p, dtype, generator)
        found[f"{p}"] = (student, (target, start, 0.1))
    student, target, start = vectors(1000, dtype, generator)
    for epsilon in (None, 0.5, 1.0):
        found[f"epsilon-{epsilon}"] = (student, (target, start, epsilon))
    found["degenerate"] = (student, (target, target.clone(), 0.1))
    found["nothing-kept"] = (-target, (target, start, 0.1))
    return found


def operator_arguments(dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    student, target, start = vectors(33, dtype, torch.Generator().manual_seed(3))
    one, denominator = torch.ones((), dtype=dtype), torch.ones((), dtype=torch.float64)
    return {
        "match_loss": (student, target, start, 0.1),
        "match_loss_backward": (one, denominator, student, target, 0.1),
    }


ROW = op_contract.Row(
    function=masked_match_loss,
    operators=("match_loss", "match_loss_backward"),
    cases=cases,
    operator_arguments=operator_arguments,
    small="33",
)


def by_definition(student: Tensor, target: Tensor, start: Tensor, epsilon: float) -> tuple[float, int, list[bool]]:
    """Loss, number kept and mask, one parameter after the other; epsilon * x is rounded to their dtype."""
    rounded = torch.tensor(epsilon, dtype=student.dtype)
    numerator = denominator = 0.0
    kept = []
    for s, t, u in zip(student, target, start, strict=True):
        pruned = bool(
            ((s <= 0) & (t > 0)) | ((s >= 0) & (t < 0)) | ((t <= 0) & (s > 0)) | ((t >= 0) & (s < 0))
            | (s.abs() < rounded * t.abs()) | (t.abs() < rounded * s.abs())
        )  # fmt: skip
        kept.append(not pruned)
        if not pruned:
            numerator += float(s - t) ** 2
            denominator += float(u - t) ** 2
    loss = numerator / denominator if denominator else 0.0
    return loss, sum(kept) if denominator else 0, kept


def special_values(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """All pairs of values around zero, the boundary of the mask, denormals, infinities and NaN."""
    info = torch.finfo(dtype)
    denormal = info.smallest_normal * info.eps
    base = [0.0, denormal, 3 * denormal, 12 * denormal, info.tiny, 0.1, 0.3, 1.0, 3.0, 10.0, info.max, INF]
    near = [
        math.nextafter(0.1, 0),
        math.nextafter(0.1, 1),
        0.1 * (1 + info.eps),
        0.1 * (1 - info.eps),
        1 - info.eps,
    ]
    values = [sign * value for value in base + near for sign in (1, -1)] + [NAN]
    pairs = torch.tensor(list(itertools.product(values, values)), dtype=dtype)
    return pairs[:, 0].contiguous(), pairs[:, 1].contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("epsilon", [0.1, 0.3, 1.0])
def test_mask_is_the_definition_bit_for_bit(dtype: torch.dtype, epsilon: float, backend: Backend) -> None:
    student, target = special_values(dtype)
    kept = by_definition(student, target, target, epsilon)[2]
    one = torch.ones((), dtype=dtype, device=backend.device)
    # A denominator of 2 makes the gradient student - target where kept: 0 tells pruned, but for equal values.
    gradient = _library.ops().match_loss_backward.default(
        one, 2 * one.double(), student.to(backend.device), target.to(backend.device), epsilon
    )
    expected = torch.where(torch.tensor(kept), student - target, 0)
    torch.testing.assert_close(gradient.cpu(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_count_and_loss_follow_the_definition(dtype: torch.dtype, backend: Backend) -> None:
    student, target = special_values(dtype)
    usable = (student.abs() < 1e9) & (target.abs() < 1e9)  # finite sums
    student, target = student[usable], target[usable]
    start = target + 1
    loss, kept = masked_match_loss(*(v.to(backend.device) for v in (student, target, start)))
    wanted_loss, wanted_kept, _ = by_definition(student, target, start, 0.1)
    assert int(kept) == wanted_kept
    assert kept.dtype == torch.int64
    assert float(loss) == pytest.approx(wanted_loss, rel=1e-6)


@pytest.mark.parametrize("place", ["student", "target", "start"])
def test_nan_shows(place: str, backend: Backend) -> None:
    student, target, start = vectors(100, torch.float32, torch.Generator().manual_seed(1))
    student = target * 1.01
    {"student": student, "target": target, "start": start}[place][57] = NAN
    loss, kept = masked_match_loss(*(v.to(backend.device) for v in (student, target, start)))
    assert loss.isnan()
    assert int(kept) == 100


def test_nan_in_the_student_shows_when_the_denominator_is_zero(backend: Backend) -> None:
    target = torch.ones(10, device=backend.device)
    student = target.clone()
    student[3] = NAN
    assert masked_match_loss(student, target, target)[0].isnan()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", ["no denominator", "nothing kept", "empty"])
def test_degenerate_steps_are_zero(kind: str, fused: bool, backend: Backend) -> None:
    target = torch.arange(1.0, 6.0, device=backend.device)
    student = {"no denominator": target * 1.1, "nothing kept": -target, "empty": target[:0]}[kind].clone()
    target = target[: len(student)]
    start = target + (kind == "nothing kept")
    loss, kept = masked_match_loss(student.requires_grad_(), target, start, fused=fused)
    loss.backward()
    assert (float(loss.detach()), int(kept)) == (0, 0)
    assert student.grad is not None
    assert not student.grad.any()


def test_sums_are_accumulated_in_float64(backend: Backend) -> None:
    if backend.name == "reference":
        pytest.skip("plain torch sums in the dtype of the vectors")
    p = 1 << 17
    target = torch.ones(p, device=backend.device)
    student = target + 2**-10
    student[0] = 9  # after its square a float32 sum of 2^-20 would lose bits
    loss, _ = masked_match_loss(student, target, target + 1, None)
    assert float(loss) == pytest.approx((64 + (p - 1) * 2.0**-20) / p, rel=1e-7)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"student": [1.0]}, TypeError, r"student must be a tensor \[P\], got list"),
        ({"student": torch.ones(2, 3)}, ValueError, r"flat vector \[P\], got shape \[2, 3\]; use .flatten"),
        ({"student": torch.ones(6).half()}, TypeError, r"float32 or float64, got torch.float16; convert it"),
        ({"target": torch.ones(5)}, ValueError, r"target must have the shape of student \[6\], got \[5\]"),
        ({"start": torch.ones(6).double()}, ValueError, "start must have the dtype of student torch.float32"),
        (
            {"target": torch.ones(6, device="meta")},
            ValueError,
            "target must be on the device of student, cpu, got meta",
        ),
        (
            {"target": torch.ones(6, requires_grad=True)},
            ValueError,
            r"target is a constant.*target.detach\(\)",
        ),
        ({"start": torch.ones(6, requires_grad=True)}, ValueError, r"start is a constant.*start.detach\(\)"),
        ({"epsilon": 0.0}, ValueError, "0 < epsilon <= 1, or be None to prune nothing, got 0.0"),
        ({"epsilon": NAN}, ValueError, "got nan"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str, fused: bool) -> None:
    arguments = {"student": torch.ones(6), "target": torch.ones(6), "start": torch.zeros(6), "epsilon": 0.1}
    with pytest.raises(error, match=message):
        masked_match_loss(**(arguments | change), fused=fused)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (torch.ones(6), torch.ones(5), torch.ones(6), 0.1),
            r"target must have the shape of student \[6\], got \[5\]",
        ),
        ((torch.ones(6), torch.ones(6), torch.ones(6).double(), 0.1), "start must have the dtype of student"),
        (
            (torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3), 0.1),
            r"must be a vector \[P\], got \[2, 3\]",
        ),
        ((torch.ones(6).half(),) * 3 + (0.1,), "student must be float32 or float64, got Half"),
    ],
)
def test_a_direct_call_of_the_operator_is_safe(arguments: tuple[Any, ...], message: str, backend: Backend) -> None:
    if backend.name == "reference":
        pytest.skip("plain torch checks by itself")
    with pytest.raises(RuntimeError, match=message):
        _library.ops().match_loss.default(*(op_contract.moved(arguments, backend.device)))


@pytest.mark.parametrize("name", ["target", "start"])
def test_a_tangent_of_a_constant_is_refused(name: str) -> None:
    given = {key: torch.rand(6) + 0.5 for key in ("student", "target", "start")}
    with torch.autograd.forward_ad.dual_level():
        given[name] = torch.autograd.forward_ad.make_dual(given[name], torch.ones(6))
        with pytest.raises(RuntimeError, match=r"target and start are constants .* detach them"):
            masked_match_loss(**given)


def test_the_student_is_no_constant_of_its_own_loss() -> None:
    student = torch.ones(6, requires_grad=True)
    with pytest.raises(ValueError, match=r"start is a constant.*start.detach\(\)"):
        masked_match_loss(student, torch.zeros(6), student)
