"""Winograd's stages: together they are a convolution and its two gradients, and each has its transpose."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Backend
from torch import Tensor

from ddpp.ops import _library, winograd
from ddpp.ops._library import ops

STAGES = {
    "winograd_input",
    "winograd_input_transposed",
    "winograd_output",
    "winograd_output_transposed",
    "winograd_weight",
    "winograd_weight_transposed",
    "multiply_matrices",
}

#: N, inputs, outputs, H, W
SIZES = [(2, 3, 5, 7, 6), (1, 1, 1, 1, 1), (3, 16, 20, 8, 9), (0, 4, 4, 8, 8), (2, 33, 64, 16, 16)]
#: Length of the difference, as a part of the length, float32 against float64, 128 channels.
ERROR = {2: 1e-6, 4: 3e-6}


def near(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    """Whether all differences are within a part of the largest value."""
    largest = wanted.abs().amax() if wanted.numel() else 0
    return bool(((found.cpu() - wanted).abs() <= tolerance * largest).all())


def planes(*shape: int, like: Tensor) -> Tensor:
    return torch.full(shape, torch.nan, dtype=like.dtype, device=like.device).to(memory_format=torch.channels_last)


def convolution(x: Tensor, weight: Tensor, grad: Tensor, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """y, and the gradients of x and weight from that of y, by the stages."""
    outputs, inputs = weight.shape[:2]
    down, across = winograd.tile_grid(*x.shape[2:], m=m)
    rows = len(x) * down * across
    matrices = {
        name: winograd.transformed(m, *shape, x.new_empty).fill_(torch.nan)
        for name, shape in {
            "in": (rows, inputs),
            "out": (rows, outputs),
            "d_in": (rows, inputs),
            "d_out": (rows, outputs),
            "by_input": (inputs, outputs),
            "by_output": (outputs, inputs),
            "d_weight": (outputs, inputs),
        }.items()
    }
    y, d_x, d_weight = planes(*grad.shape, like=x), planes(*x.shape, like=x), torch.full_like(weight, torch.nan)
    ops().winograd_weight.default(weight, m, True, matrices["by_input"])
    ops().winograd_weight.default(weight, m, False, matrices["by_output"])
    ops().winograd_input.default(x, m, matrices["in"])
    ops().multiply_matrices.default(matrices["in"], matrices["by_input"], False, False, matrices["out"])
    ops().winograd_output.default(matrices["out"], m, y)
    ops().winograd_output_transposed.default(grad, m, matrices["d_out"])
    ops().multiply_matrices.default(matrices["d_out"], matrices["by_output"], False, False, matrices["d_in"])
    ops().winograd_input_transposed.default(matrices["d_in"], m, d_x)
    ops().multiply_matrices.default(matrices["d_out"], matrices["in"], True, False, matrices["d_weight"])
    ops().winograd_weight_transposed.default(matrices["d_weight"], m, d_weight)
    return y, d_x, d_weight


def problem(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    n, inputs, outputs, height, width = size
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(device, dtype)

    x, grad = (normal(n, c, height, width).to(memory_format=torch.channels_last) for c in (inputs, outputs))
    return x, normal(outputs, inputs, 3, 3), grad


def exact(x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    x, weight = x.cpu().double().requires_grad_(), weight.cpu().double().requires_grad_()
    y = F.conv2d(x, weight, padding=1)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), grad.cpu().double())]


@pytest.mark.parametrize("m", winograd.TILES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_stages_are_a_convolution_and_its_gradients(size: tuple[int, ...], m: int, backend: Backend) -> None:
    tensors = problem(size, torch.float64, backend.device)
    for found, wanted in zip(convolution(*tensors, m), exact(*tensors), strict=True):
        assert near(found, wanted, 1e-13)


@pytest.mark.parametrize("m", winograd.TILES)
@pytest.mark.parametrize("size", [(10, 128, 128, 16, 16), (10, 128, 128, 8, 8)], ids=str)
def test_error_in_float32(size: tuple[int, ...], m: int, backend: Backend) -> None:
    if backend.name != "compiled":
        pytest.skip("the error is documented for the compiled kernels; torch's own products sum in another order")
    tensors = problem(size, torch.float32, backend.device)
    found, wanted = convolution(*tensors, m)[0].double(), exact(*tensors)[0]
    assert (found - wanted).norm() < ERROR[m] * wanted.norm()


def stages(m: int, dtype: torch.dtype) -> dict[str, tuple[tuple[Any, ...], Tensor]]:
    """For each stage its arguments without the last one, and the shape and dtype of the last one."""
    x, weight, _ = problem((2, 3, 5, 6, 7), dtype, torch.device("cpu"))
    down, across = winograd.tile_grid(6, 7, m)
    tiles = winograd.transformed(m, 2 * down * across, 3, x.new_empty).normal_(
        generator=torch.Generator().manual_seed(1)
    )
    square = winograd.transformed(m, 5, 3, x.new_empty).normal_(generator=torch.Generator().manual_seed(2))
    return {
        "winograd_input": ((x, m), tiles),
        "winograd_input_transposed": ((tiles, m), x),
        "winograd_output": ((tiles, m), x),
        "winograd_output_transposed": ((x, m), tiles),
        "winograd_weight": ((weight, m, False), square),
        "winograd_weight_transposed": ((square, m), weight),
    }


@pytest.mark.parametrize("m", winograd.TILES)
@pytest.mark.parametrize("name", ["winograd_input", "winograd_output", "winograd_weight"])
def test_transposes(name: str, m: int, backend: Backend) -> None:
    """<A x, y> = <x, A^T y>"""
    table = stages(m, torch.float64)
    (arguments, y), (back, x) = table[name], table[name + "_transposed"]
    forward, backward = torch.empty_like(y), torch.empty_like(x)
    getattr(ops(), name).default(*arguments, forward)
    getattr(ops(), name + "_transposed").default(*back, backward)
    torch.testing.assert_close((forward * back[0]).sum(), (arguments[0] * backward).sum())


@pytest.mark.parametrize(("transposed", "accumulate"), list(product([False, True], repeat=2)))
@pytest.mark.parametrize(("rows", "inner", "columns"), [(5, 7, 9), (1, 1, 1), (64, 200, 33), (13, 128, 64), (4, 0, 3)])
def test_products(rows: int, inner: int, columns: int, transposed: bool, accumulate: bool, backend: Backend) -> None:
    draw = torch.Generator().manual_seed(0)
    a, b, c = (
        torch.randn(4, *shape, generator=draw, dtype=torch.float64).to(backend.device)
        for shape in ((inner, rows) if transposed else (rows, inner), (inner, columns), (rows, columns))
    )
    wanted = (a.mT if transposed else a) @ b + (c if accumulate else 0)
    ops().multiply_matrices.default(a, b, transposed, accumulate, c)
    assert near(c, wanted.cpu(), 1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_opcheck(dtype: torch.dtype, backend: Backend) -> None:
    calls = {name: (*arguments, torch.empty_like(last)) for name, (arguments, last) in stages(2, dtype).items()}
    factors = torch.randn(2, 2, 4, 4, dtype=dtype)
    calls["multiply_matrices"] = (*factors, False, True, torch.zeros(2, 4, 4, dtype=dtype))
    assert set(calls) == STAGES
    for name, arguments in calls.items():
        moved = [a.to(backend.device) if isinstance(a, Tensor) else a for a in arguments]
        results = torch.library.opcheck(getattr(_library.ops(), name).default, tuple(moved))
        assert set(results.values()) == {"SUCCESS"}, (name, results)


@pytest.mark.parametrize("m", winograd.TILES)
def test_bits_do_not_depend_on_the_threads(m: int, two_threads: None) -> None:
    tensors = problem((9, 20, 33, 9, 8), torch.float32, torch.device("cpu"))
    with _library.using("compiled"):
        if _library.status["_cpu"] != "loaded":
            pytest.skip("torch's own sums may depend on the number of threads")
        with_two = convolution(*tensors, m)
        torch.set_num_threads(1)
        for one, other in zip(convolution(*tensors, m), with_two, strict=True):
            assert torch.equal(one, other)


x = torch.randn(2, 3, 6, 7).to(memory_format=torch.channels_last)
tiles = winograd.transformed(2, 24, 3, x.new_empty)
square = torch.zeros(16, 3, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops().winograd_input(x, 3, tiles), "m must be 2 or 4, got 3"),
        (lambda: ops().winograd_input(x.contiguous(), 2, tiles), "channels last"),
        (lambda: ops().winograd_input(x[0], 2, tiles), r"must be \[N, C, H, W\]"),
        (lambda: ops().winograd_input(x, 2, tiles[:, 1:]), r"tiles must be \[16, 24, 3\]"),
        (lambda: ops().winograd_input(x, 2, tiles.double()), "dtype"),
        (lambda: ops().winograd_input(x.half(), 2, tiles), "float32 or float64"),
        (lambda: ops().winograd_weight(torch.randn(4, 3, 5, 5), 2, True, tiles), r"\[O, I, 3, 3\]"),
        (lambda: ops().multiply_matrices(tiles, tiles, False, False, tiles), "b must be"),
        (lambda: ops().multiply_matrices(square, square.mT, False, False, square), "without gaps"),
    ],
)
def test_a_direct_call_cannot_reach_foreign_memory(call: Callable[[], None], message: str) -> None:
    if _library.status["_cpu"] != "loaded":
        pytest.skip(f"_cpu: {_library.status['_cpu']}")
    with pytest.raises(RuntimeError, match=message):
        call()
