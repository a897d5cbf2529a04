"""Every rule of pruning against a loop over the parameters."""

import math

import pytest
import torch
from torch import Tensor

from ddpp.errors import UserError
from ddpp.pruning import RULES, Importance, distance, keep, keep_by_difference, keep_by_ratio, keep_deep

LAYOUT = (("a.weight", (4, 2)), ("a.bias", (4,)), ("b.weight", (3,)), ("c.weight", (2, 4)), ("c.bias", (2,)))
SIZE = 25


@pytest.fixture
def vectors() -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    student, target, start = torch.randn(3, SIZE, generator=draw, dtype=torch.float64)
    return student, target, start


def kept_by_loop(rule: str, student: Tensor, target: Tensor, share: float) -> list[bool]:
    pairs = [(float(s), float(t)) for s, t in zip(student, target, strict=True)]
    if rule == "none":
        return [True] * SIZE
    if rule == "ratio":
        return [s / t >= 0.1 and t / s >= 0.1 for s, t in pairs]
    dropped = int(share * SIZE)
    if rule == "depth":
        return [i >= dropped for i in range(SIZE)]
    order = sorted(range(SIZE), key=lambda i: abs(pairs[i][0] - pairs[i][1]), reverse=rule == "difference")
    return [i not in order[:dropped] for i in range(SIZE)]


@pytest.mark.parametrize("rule", RULES)
def test_loss_gradient_and_count(rule: str, vectors: tuple[Tensor, Tensor, Tensor]) -> None:
    student, target, start = vectors
    keep = kept_by_loop(rule, student, target, 0.4)
    far = sum(float(s - t) ** 2 for s, t, k in zip(student, target, keep, strict=True) if k)
    span = sum(float(s - t) ** 2 for s, t, k in zip(start, target, keep, strict=True) if k)
    leaf = student.clone().requires_grad_()
    loss, kept = distance(rule, LAYOUT, share=0.4)(leaf, target, start)
    assert loss.item() == pytest.approx(far / span) and int(kept) == sum(keep)
    (gradient,) = torch.autograd.grad(loss, leaf)
    wanted = [2 * float(s - t) / span if k else 0.0 for s, t, k in zip(student, target, keep, strict=True)]
    torch.testing.assert_close(gradient, torch.tensor(wanted, dtype=torch.float64))


@pytest.mark.parametrize("rule", ["difference", "lowest", "depth"])
def test_nothing_to_match_is_degenerate_not_nan(rule: str, vectors: tuple[Tensor, Tensor, Tensor]) -> None:
    student, target, _ = vectors
    leaf = student.clone().requires_grad_()
    loss, kept = distance(rule, LAYOUT)(leaf, target, target)
    assert int(kept) == 0 and math.isfinite(loss.item())
    assert bool(torch.isfinite(torch.autograd.grad(loss, leaf)[0]).all())


def test_a_share_of_nothing_keeps_all(vectors: tuple[Tensor, Tensor, Tensor]) -> None:
    student, target, _ = vectors
    assert bool(keep_deep(LAYOUT, 0.0).all())
    assert bool(keep_by_difference(student, target, 0.0, furthest=True).all())


def test_depth_cuts_through_a_layer() -> None:
    """a holds 12 of the 25 parameters; a third of all, rounded down, is 8, and 14 reach into b."""
    assert keep_deep(LAYOUT, 1 / 3).tolist() == [False] * 8 + [True] * 17
    assert keep_deep(LAYOUT, 0.58).tolist() == [False] * 14 + [True] * 11


def test_divergence_shows(vectors: tuple[Tensor, Tensor, Tensor]) -> None:
    student, target, start = vectors
    student[3] = torch.nan
    for rule in ("difference", "lowest"):
        assert math.isnan(distance(rule, LAYOUT, share=0.5)(student, target, start)[0].item()), rule


def test_wrong_rules_are_named() -> None:
    with pytest.raises(UserError, match="unknown pruning rule 'ratios'; did you mean 'ratio'"):
        distance("ratios", LAYOUT)
    with pytest.raises(UserError, match=r"at least 0 and below 1, got 1\.0"):
        distance("lowest", LAYOUT, share=1.0)


@pytest.mark.parametrize("rule", RULES)
def test_equal_weights_change_nothing(rule: str, vectors: tuple[Tensor, Tensor, Tensor]) -> None:
    student, target, start = vectors
    wanted, count = distance(rule, LAYOUT, share=0.4)(student, target, start)
    found, kept = Importance(keep(rule, LAYOUT, share=0.4), torch.full_like(student, 3.0)).distance(
        student, target, start
    )
    torch.testing.assert_close(found, wanted)
    assert int(kept) == int(count)


def test_the_mask_of_the_ratio_is_that_of_the_operator() -> None:
    values = [0.0, -0.0, 1.0, -1.0, 0.1, 10.0, 0.0999, 1e-30, math.inf, math.nan]
    student, target = torch.cartesian_prod(torch.tensor(values), torch.tensor(values)).unbind(1)
    for s, t, kept in zip(student, target, keep_by_ratio(student, target, 0.1), strict=True):
        assert bool(kept) == bool(distance("ratio", LAYOUT)(s[None], t[None], t[None] + 1)[1]), (s, t)


def test_weights_move_against_the_derivative_of_the_loss(vectors: tuple[Tensor, Tensor, Tensor]) -> None:
    """The derivative by finite differences; masked parameters have none."""
    student, target, start = vectors
    rule, weights = keep("ratio", LAYOUT), torch.linspace(0.5, 1.5, SIZE, dtype=torch.float64)
    importance = Importance(rule, weights)
    importance.distance(student, target, start)
    moved = importance.learned(1e-3)
    assert moved.mean().item() == pytest.approx(1) and bool((moved > 0).all())
    slopes = []
    for i in range(SIZE):
        step = torch.zeros_like(weights)
        step[i] = 1e-6
        up, down = (Importance(rule, weights + d).distance(student, target, start)[0] for d in (step, -step))
        slopes.append(float(up - down) / 2e-6)
    wanted = weights * torch.exp(-1e-3 * SIZE * weights * torch.tensor(slopes, dtype=torch.float64))
    torch.testing.assert_close(moved, wanted / wanted.mean(), rtol=1e-7, atol=0)
    after = Importance(rule, moved).distance(student, target, start)[0]
    assert after < Importance(rule, weights).distance(student, target, start)[0]


def test_nothing_to_match_leaves_the_weights(vectors: tuple[Tensor, Tensor, Tensor]) -> None:
    student, target, _ = vectors
    importance = Importance(keep("none", LAYOUT), torch.ones_like(student))
    assert int(importance.distance(student, target, target)[1]) == 0
    assert torch.equal(importance.learned(1.0), torch.ones_like(student))
