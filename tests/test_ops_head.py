"""The linear layer of a student step under its cross-entropy, on every backend, against autograd of its definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from conftest import Backend
from torch import Tensor

from ddpp.ops import head
from ddpp.ops._library import ops
from ddpp.ops.head import Linear

STAGES = {"head_cotangents", "head_gradients"}

#: Images, features, classes: few of each; more classes than a warp has lanes; rows that are no whole packs.
SIZES = [(1, 1, 1), (3, 8, 10), (2, 37, 5), (10, 2048, 10), (6, 4, 70), (70, 36, 3), (0, 8, 3)]
each_size = pytest.mark.parametrize("size", SIZES, ids=str)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


class Problem(NamedTuple):
    """Features and their tangents, stacked, the layer and its tangent, and logits of the targets."""

    features: Tensor  # [2 n, F]
    weight: Tensor
    bias: Tensor
    weight_tangent: Tensor
    bias_tangent: Tensor
    labels: Tensor  # [n, K]

    def to(self, dtype: torch.dtype, device: torch.device) -> Problem:
        return Problem(*(x.to(device, dtype) for x in self))


class Found(NamedTuple):
    """What a step has of its head; the last three None in the plain one."""

    cotangents: Tensor
    weight: Tensor
    bias: Tensor
    features: Tensor
    phis: Tensor | None = None
    labels: Tensor | None = None


def problem(size: tuple[int, int, int], seed: int = 0) -> Problem:
    n, features, classes = size
    draw = torch.Generator().manual_seed(seed)
    shapes = (2 * n, features), (classes, features), (classes,), (classes, features), (classes,), (n, classes)
    x, weight, bias, *rest = (torch.randn(s, generator=draw, dtype=torch.float64) for s in shapes)
    return Problem(x, weight / features**0.5, bias, *rest).to(torch.float32, x.device)


def plain(p: Problem, count: int) -> Found:
    """The plain head by the functions."""
    x, linear = p.features.chunk(2)[0], Linear(p.weight, p.bias)
    out = Linear(torch.empty_like(p.weight), torch.empty_like(p.bias))
    cotangents = head.cotangents(x, linear, p.labels.softmax(1), count)
    features = head.gradients(cotangents, x, p.weight, None, out)
    return Found(cotangents, *out, features)


def dual(p: Problem, count: int) -> Found:
    """The dual head by the functions."""
    linear, tangent = Linear(p.weight, p.bias), Linear(p.weight_tangent, p.bias_tangent)
    out = Linear(torch.empty_like(p.weight), torch.empty_like(p.bias))
    phis, labels = p.labels.new_empty(len(p.labels)), torch.empty_like(p.labels)
    cotangents = head.dual_cotangents(p.features, linear, tangent, p.labels.softmax(1), count, phis, labels)
    features = head.gradients(cotangents, p.features, p.weight, p.weight_tangent, out)
    return Found(cotangents, *out, features, phis, labels)


def exact(p: Problem, count: int) -> tuple[Found, Found]:
    """Both by autograd, in float64 on the CPU."""
    p = Problem(*(x.detach().requires_grad_() for x in p.to(torch.float64, torch.device("cpu"))))
    value, along = p.features.chunk(2)
    z = value @ p.weight.T + p.bias
    z_tangent = along @ p.weight.T + value @ p.weight_tangent.T + p.bias_tangent
    loss = -(p.labels.softmax(1) * z.log_softmax(1)).sum() / count
    by_z, *of_plain, by_value = torch.autograd.grad(loss, (z, p.weight, p.bias, value), create_graph=True)
    phis = (by_z * z_tangent).sum(1)
    wanted = z, z_tangent, p.weight, p.bias, p.features, p.labels
    d_z, d_tangent, *of_dual, d_labels = torch.autograd.grad(phis.sum(), wanted)
    return (
        Found(by_z.detach(), *(x.detach() for x in of_plain), by_value.detach()),
        Found(torch.cat([d_z, d_tangent]), *of_dual, phis.detach(), d_labels),
    )


def check(found: Found, wanted: Found, dtype: torch.dtype) -> None:
    bound = 1e-6 if dtype == torch.float32 else 1e-13
    for name, value, exactly in zip(Found._fields, found, wanted, strict=True):
        assert (value is None) == (exactly is None), name
        if value is not None and exactly is not None:
            assert value.dtype == dtype and value.shape == exactly.shape, name
            error = (value.cpu().double() - exactly).norm()
            assert float(error) <= bound * (1e-3 + float(exactly.norm())), (name, float(error))


@each_dtype
@each_size
def test_against_autograd(size: tuple[int, int, int], dtype: torch.dtype, backend: Backend) -> None:
    p, count = problem(size), size[0] + 2
    of_plain, of_dual = exact(p, count)
    p = p.to(dtype, backend.device)
    check(plain(p, count), of_plain, dtype)
    check(dual(p, count), of_dual, dtype)


def test_views_off_any_alignment(backend: Backend) -> None:
    """As parts of a vector of parameters are."""

    def off(x: Tensor) -> Tensor:
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)

    p = problem((5, 64, 10))
    of_plain, of_dual = exact(p, 5)
    p = Problem(*(off(x) for x in p.to(torch.float32, backend.device)))
    check(plain(p, 5), of_plain, torch.float32)
    check(dual(p, 5), of_dual, torch.float32)


def test_large_outputs_and_what_is_not_finite(backend: Backend) -> None:
    p = problem((4, 16, 40))
    p = p._replace(features=p.features.clone())
    p.features[0] *= 1e4
    p.features[2, 3] = torch.nan
    found = dual(p.to(torch.float32, backend.device), 4)
    by_image = found.cotangents.view(2, 4, 40).isnan().cpu()
    assert by_image[:, 2].all() and not by_image[:, [0, 1, 3]].any()
    assert found.phis is not None and found.phis.isnan().tolist() == [False, False, True, False]
    assert found.features.view(2, 4, 16).isnan().cpu().any(2).all(0).tolist() == [False, False, True, False]


def test_problems_that_the_library_is_better_at(backend: Backend) -> None:
    """More classes, weights, products or rows than the kernels take: the same results."""
    for size in [(2, 3, 1025), (2, 260, 520), (130, 260, 260), (2**18 + 1, 1, 1)]:
        n, p = size[0], problem(size)
        assert head._ops(p.features, p.weight) is torch.ops.ddpp_reference
        of_plain, of_dual = exact(p, n)
        p = p.to(torch.float64, backend.device)
        check(plain(p, n), of_plain, torch.float64)
        check(dual(p, n), of_dual, torch.float64)


@each_dtype
def test_opcheck(dtype: torch.dtype, backend: Backend) -> None:
    p = problem((3, 8, 5)).to(dtype, backend.device)
    targets, outputs = p.labels.softmax(1), p.features.new_empty(6, 5)
    linear, tangent, out = p[1:3], p[3:5], (torch.empty_like(p.weight), torch.empty_like(p.bias))
    calls = {
        "head_cotangents": (p.features, *linear, *tangent, targets, 3, outputs, targets.clone(), targets[:, 0].clone()),
        "head_gradients": (torch.ones_like(outputs), p.features, p.weight, tangent[0], *out, p.features.clone()),
    }
    assert set(calls) == STAGES
    for name, arguments in calls.items():
        found = torch.library.opcheck(getattr(ops(), name).default, arguments)
        assert set(found.values()) == {"SUCCESS"}, (name, found)


P = problem((2, 8, 5))


def cotangents_call(**changes: object) -> Callable[[], None]:
    """A direct call of the operator, some of its arguments changed."""
    arguments = {
        **P._asdict(),
        "targets": P.labels,
        "count": 2,
        "cotangents": torch.zeros(4, 5),
        "d_labels": torch.zeros(2, 5),
        "phis": torch.zeros(2),
    }
    del arguments["labels"]
    return lambda: ops().head_cotangents.default(**arguments | changes)


def gradients_call(**changes: object) -> Callable[[], None]:
    arguments = {
        "cotangents": torch.zeros(4, 5),
        "features": P.features,
        "weight": P.weight,
        "weight_tangent": P.weight_tangent,
        "d_weight": torch.zeros(5, 8),
        "d_bias": torch.zeros(5),
        "d_features": torch.zeros(4, 8),
    }
    return lambda: ops().head_gradients.default(**arguments | changes)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (cotangents_call(features=P.features.half()), "features must be float32 or float64"),
        (cotangents_call(features=P.features[0]), r"features must be \[n, F\]"),
        (cotangents_call(features=P.features[:3]), r"stacked with their tangents, \[2 n, F\], got \[3, 8\]"),
        (cotangents_call(features=P.features.T.contiguous().T), "features must be contiguous"),
        (cotangents_call(weight=P.weight[:, :7].contiguous()), r"weight must be \[5, 8\], got \[5, 7\]"),
        (cotangents_call(weight=torch.zeros(0, 8)), "weight must have classes"),
        (cotangents_call(weight_tangent=P.weight_tangent[:4]), r"weight_tangent must be \[5, 8\]"),
        (cotangents_call(bias=P.bias[:4]), r"bias must be \[5\]"),
        (cotangents_call(bias_tangent=P.bias.double()), "bias_tangent must have the dtype of features"),
        (cotangents_call(bias_tangent=None), "go together"),
        (cotangents_call(phis=None), "go together"),
        (cotangents_call(targets=P.labels[:1]), r"targets must be \[2, 5\]"),
        (cotangents_call(count=0), "count must be at least 1"),
        (cotangents_call(cotangents=torch.zeros(2, 5)), r"cotangents must be \[4, 5\]"),
        (cotangents_call(d_labels=torch.zeros(2, 4)), r"d_labels must be \[2, 5\]"),
        (cotangents_call(phis=torch.zeros(3)), r"phis must be \[2\]"),
        (gradients_call(cotangents=torch.zeros(4, 4)), r"cotangents must be \[4, 5\]"),
        (gradients_call(d_weight=torch.zeros(5, 7)), r"d_weight must be \[5, 8\]"),
        (gradients_call(d_bias=torch.zeros(6)), r"d_bias must be \[5\]"),
        (gradients_call(d_features=torch.zeros(2, 8)), r"d_features must be \[4, 8\]"),
    ],
)
def test_a_direct_call_cannot_reach_foreign_memory(wrong: Callable[[], None], message: str, emulated: Backend) -> None:
    """There are kernels for CUDA only; the emulated ones share the checks."""
    with pytest.raises(RuntimeError, match=message):
        wrong()
