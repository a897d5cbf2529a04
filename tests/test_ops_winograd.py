"""Winograd's convolution and its two gradients, also on values with tangents, and the columns of a first layer."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from conftest import Backend
from torch import Tensor

from ddpp.ops import _library, winograd
from ddpp.ops._library import ops

STAGES = {
    "winograd_convolve",
    "winograd_output_transposed",
    "winograd_weight",
    "winograd_weight_transposed",
    "columns_of_images",
    "images_of_columns",
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


def transformed_weight(weight: Tensor, m: int, backward: bool = False) -> Tensor:
    outputs, inputs = weight.shape[:2]
    rows, columns = (outputs, inputs) if backward else (inputs, outputs)
    result = winograd.transformed(m, rows, columns, weight.new_empty).fill_(torch.nan)
    ops().winograd_weight.default(weight, m, backward, result)
    return result


def convolution(x: Tensor, weight: Tensor, grad: Tensor, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """y, and the gradients of x and weight from that of y."""
    outputs, inputs = weight.shape[:2]
    down, across = winograd.tile_grid(*x.shape[2:], m=m)
    rows = len(x) * down * across
    tiles, grads = (winograd.transformed(m, rows, c, x.new_empty).fill_(torch.nan) for c in (inputs, outputs))
    products = winograd.transformed(m, outputs, inputs, x.new_empty).fill_(torch.nan)
    y, d_x, d_weight = planes(*grad.shape, like=x), planes(*x.shape, like=x), torch.full_like(weight, torch.nan)
    ops().winograd_convolve.default(x, transformed_weight(weight, m), None, False, m, tiles, y)
    ops().winograd_convolve.default(grad, transformed_weight(weight, m, True), None, False, m, None, d_x)
    ops().winograd_output_transposed.default(grad, m, grads)
    ops().multiply_matrices.default(grads, tiles, True, False, products)
    ops().winograd_weight_transposed.default(products, m, d_weight)
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
def test_a_convolution_and_its_gradients(size: tuple[int, ...], m: int, backend: Backend) -> None:
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


@pytest.mark.parametrize("m", winograd.TILES)
@pytest.mark.parametrize("size", [(4, 3, 5, 7, 6), (2, 128, 128, 16, 16)], ids=str)
def test_values_and_tangents(size: tuple[int, ...], m: int, backend: Backend) -> None:
    """The derivative along (x', weight'), and its transpose."""
    x, weight, grad = problem(size, torch.float64, backend.device)
    tangent = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=weight.dtype).to(x.device)
    factors = [transformed_weight(w, m) for w in (weight, tangent)]
    back = [transformed_weight(w, m, True) for w in (weight, tangent)]
    y, d_x = planes(*grad.shape, like=x), planes(*x.shape, like=x)
    ops().winograd_convolve.default(x, *factors, False, m, None, y)
    ops().winograd_convolve.default(grad, *back, True, m, None, d_x)

    def dual(stacked: Tensor) -> Tensor:
        values, tangents = stacked.chunk(2)
        value = F.conv2d(values, weight.cpu(), padding=1)
        return torch.cat(
            [value, F.conv2d(tangents, weight.cpu(), padding=1) + F.conv2d(values, tangent.cpu(), padding=1)]
        )

    wanted, transpose = torch.func.vjp(dual, x.cpu().contiguous())
    assert near(y, wanted, 1e-13)
    assert near(d_x, transpose(grad.cpu())[0], 1e-13)


@pytest.mark.parametrize("m", winograd.TILES)
@pytest.mark.parametrize(
    ("name", "arguments"),
    [("winograd_output_transposed", (2, 3, 6, 7)), ("winograd_weight_transposed", (5, 3, 3, 3))],
)
def test_transposes(name: str, arguments: tuple[int, ...], m: int, backend: Backend) -> None:
    """<A x, y> = <x, A^T y>, with A by autograd where the operator is a transpose alone."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(arguments, generator=draw, dtype=torch.float64).to(backend.device)
    if name == "winograd_weight_transposed":
        y = winograd.transformed(m, 5, 3, x.new_empty).normal_(generator=draw)
        found = torch.empty_like(x)
        ops().winograd_weight_transposed.default(y, m, found)
        torch.testing.assert_close((transformed_weight(x, m).transpose(1, 2) * y).sum(), (x * found).sum())
        return
    x = x.to(memory_format=torch.channels_last)
    down, across = winograd.tile_grid(6, 7, m)
    y = winograd.transformed(m, 2 * down * across, 3, x.new_empty).normal_(generator=draw)
    found = torch.empty_like(y)
    ops().winograd_output_transposed.default(x, m, found)
    torch.testing.assert_close((winograd._images(y, m, x.shape) * x).sum(), (y * found).sum())


@pytest.mark.parametrize("padding", [(1, 1), (3, 2)])
def test_columns(padding: tuple[int, int], backend: Backend) -> None:
    images = problem((2, 3, 5, 7, 6), torch.float64, backend.device)[0].contiguous()
    taps = F.unfold(images, 3, padding=padding).transpose(1, 2)
    columns = taps.new_full((2, taps.shape[1], 32), torch.nan)
    ops().columns_of_images.default(images, *padding, columns)
    assert torch.equal(columns[..., :27], taps)
    assert (columns[..., 27:] == 0).all()
    folded = torch.full_like(images, torch.nan)
    ops().images_of_columns.default(columns, *padding, folded)
    wanted = F.fold(taps.transpose(1, 2), [7, 6], 3, padding=padding)
    assert near(folded, wanted.cpu(), 1e-14)


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
    x, weight, _ = problem((2, 3, 5, 6, 7), dtype, torch.device("cpu"))
    tiles = winograd.transformed(2, 2 * 3 * 4, 3, x.new_zeros)
    products, factor = (winograd.transformed(2, *shape, x.new_zeros) for shape in ((5, 3), (3, 5)))
    square, columns = torch.randn(2, 4, 4, dtype=dtype), x.new_zeros(2, 42, 27)
    y = planes(2, 5, 6, 7, like=x).zero_()
    calls = {
        "winograd_convolve": (x, factor, factor.clone(), False, 2, tiles, y),
        "winograd_output_transposed": (x, 2, tiles),
        "winograd_weight": (weight, 2, True, products),
        "winograd_weight_transposed": (products, 2, weight),
        "columns_of_images": (x.contiguous(), 1, 1, columns),
        "images_of_columns": (columns, 1, 1, x.contiguous()),
        "multiply_matrices": (square, square.clone(), False, True, square.clone()),
    }
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
columns = torch.zeros(2, 42, 27)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops().winograd_convolve(x, square, None, False, 3, None, x), "m must be 2 or 4, got 3"),
        (lambda: ops().winograd_convolve(x.contiguous(), square, None, False, 2, None, x), "channels last"),
        (lambda: ops().winograd_convolve(x[0], square, None, False, 2, None, x), r"must be \[N, C, H, W\]"),
        (lambda: ops().winograd_convolve(x, square, None, False, 2, tiles[:, 1:], x), r"tiles must be \[16, 24, 3\]"),
        (lambda: ops().winograd_convolve(x, square.double(), None, False, 2, None, x), "dtype"),
        (lambda: ops().winograd_convolve(x, square[1:], None, False, 2, None, x), r"weight must be \[16, 3, 3\]"),
        (lambda: ops().winograd_convolve(x, square, None, False, 2, None, x[:1]), "y must have the batch"),
        (lambda: ops().winograd_convolve(x[:1], square, square, False, 2, None, x[:1]), "as many values as tangents"),
        (lambda: ops().winograd_output_transposed(x.half(), 2, tiles), "float32 or float64"),
        (lambda: ops().winograd_weight(torch.randn(4, 3, 5, 5), 2, True, tiles), r"\[O, I, 3, 3\]"),
        (lambda: ops().columns_of_images(x, 1, 1, columns), "contiguous"),
        (lambda: ops().columns_of_images(x.contiguous(), 2, 1, columns), r"columns must be \[2, 56, 27 or more\]"),
        (lambda: ops().columns_of_images(torch.zeros(1, 1, 1, 1), 0, 1, columns), "room for a neighbourhood"),
        (lambda: ops().multiply_matrices(tiles, tiles, False, False, tiles), "b must be"),
        (lambda: ops().multiply_matrices(square, square.mT, False, False, square), "without gaps"),
    ],
)
def test_a_direct_call_cannot_reach_foreign_memory(call: Callable[[], None], message: str) -> None:
    if _library.status["_cpu"] != "loaded":
        pytest.skip(f"_cpu: {_library.status['_cpu']}")
    with pytest.raises(RuntimeError, match=message):
        call()
