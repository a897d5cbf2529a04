"""Scores of a distilled set, and the difference of two: from accuracies alone.

Source: DD-Ranking (arXiv 2505.13300), whose formulas take accuracies as fractions in [0, 1].
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from ddpp.errors import UserError

# Two-sided 95 % points of Student's t by degrees of freedom.
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


class Difference(NamedTuple):
    """Second minus first, paired: the mean, and half of its 95 % interval."""

    mean: float
    margin: float
    pairs: int


def label_robust_score(
    *, full_hard: float, synthetic_hard: float, synthetic: float, random: float, weight: float = 0.5
) -> float:
    """LRS: improvement over random against what is lost to all real data, on a scale from 0 to 1.

    alpha = weight (synthetic - random) - (1 - weight) (full_hard - synthetic_hard),
    LRS = (e^alpha - e^-1) / (e - e^-1).

    Args:
        full_hard: accuracy of networks trained on all real data with hard labels, a fraction in [0, 1].
        synthetic_hard: on the synthetic images with hard labels.
        synthetic: on the synthetic images with any labels.
        random: on as many random real images with the same labels and recipe.
        weight: of the improvement over random.

    Raises:
        UserError: a value outside [0, 1].
    """
    _check(full_hard=full_hard, synthetic_hard=synthetic_hard, synthetic=synthetic, random=random, weight=weight)
    return _scaled(weight * (synthetic - random) - (1 - weight) * (full_hard - synthetic_hard))


def augmentation_robust_score(
    *, synthetic: float, random: float, synthetic_plain: float, random_plain: float, weight: float = 0.5
) -> float:
    """ARS: improvement over random with and without augmentation, on the scale of :func:`label_robust_score`.

    Args:
        synthetic: accuracy on the synthetic images, trained with augmentation, a fraction in [0, 1].
        random: on as many random real images.
        synthetic_plain: as ``synthetic`` without augmentation.
        random_plain: as ``random`` without augmentation.
        weight: of the figures with augmentation.

    Raises:
        UserError: a value outside [0, 1].
    """
    _check(
        synthetic=synthetic, random=random, synthetic_plain=synthetic_plain, random_plain=random_plain, weight=weight
    )
    return _scaled(weight * (synthetic - random) + (1 - weight) * (synthetic_plain - random_plain))


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Mean of second - first over pairs, with half of Student's 95 % interval.

    Raises:
        UserError: not as many of one as of the other, or fewer than two.
    """
    if len(first) != len(second) or len(first) < 2:
        raise UserError(f"a paired difference needs two or more pairs, got {len(first)} and {len(second)} figures")
    differences = [b - a for a, b in zip(first, second, strict=True)]
    freedom = len(differences) - 1
    margin = _t(freedom) * statistics.stdev(differences) / math.sqrt(len(differences))
    return Difference(statistics.fmean(differences), margin, len(differences))


def _t(freedom: int) -> float:
    """The 95 % point; beyond the table by two terms of its series about the normal's, exact to a ten-thousandth."""
    if freedom <= len(_T):
        return _T[freedom - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def _scaled(exponent: float) -> float:
    return (math.exp(exponent) - math.exp(-1)) / (math.e - math.exp(-1))


def _check(**fractions: float) -> None:
    for name, value in fractions.items():
        if not 0 <= value <= 1:
            hint = "; that looks like percent, divide it by 100" if 1 < value <= 100 else ""
            raise UserError(f"{name} must be a fraction between 0 and 1, got {value}{hint}")
