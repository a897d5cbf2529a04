"""The fused instance norm, ReLU and average pool: its row of the op contract, and what is its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import op_contract
import pytest
import torch
import torch.nn.functional as F
from conftest import Backend
from torch import Tensor

from ddpp.ops import _library
from ddpp.ops.norm_pool import (
    Dual,
    norm_relu_pool,
    norm_relu_pool_backward,
    norm_relu_pool_dual,
    norm_relu_pool_dual_backward,
    norm_relu_pool_forward,
)

#: N, C, H, W: tiny and odd planes, one channel, channels that no vector divides, several blocks, no image.
SHAPES = [(3, 1, 2, 2), (2, 3, 3, 5), (2, 17, 4, 7), (2, 64, 8, 8), (1, 128, 6, 5), (2, 36, 32, 33), (0, 3, 4, 4)]
DTYPES = [torch.float32, torch.float64]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
#: What planes may be stored as.
each_stored = pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=["float32", "float64", "bfloat16"])


def planes(shape: tuple[int, ...], generator: torch.Generator, mean: float = 0) -> Tensor:
    """Float64 values that float32 holds exactly, channels last. [N, C, H, W]"""
    x = (mean + torch.randn(shape, generator=generator)).double()
    return x.to(memory_format=torch.channels_last)


def channels(shape: tuple[int, ...], generator: torch.Generator, mean: float) -> Tensor:
    return (mean + torch.randn(shape[1], generator=generator)).double()  # [C]


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.bfloat16 else dtype


def stored(values: dict[str, Tensor], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The planes in a dtype, and all else in that of the arithmetic."""
    return {name: value.to(device, dtype if value.dim() == 4 else arithmetic(dtype)) for name, value in values.items()}


def cases(dtype: torch.dtype, generator: torch.Generator) -> dict[str, op_contract.Case]:
    found: dict[str, op_contract.Case] = {}
    for shape in SHAPES:
        y = planes(shape, generator)
        scale, shift = channels(shape, generator, 0.5), channels(shape, generator, 0.2)
        found["x".join(map(str, shape))] = (y.to(dtype), (scale.to(dtype), shift.to(dtype)))
    return found


def operator_arguments(dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(3)
    shape = (2, 5, 4, 5)
    other = arithmetic(dtype)
    y, t, grad_y, grad_t = (planes(shape, generator).to(dtype) for _ in range(4))
    out, out_t, grad_out, grad_out_t = (planes((2, 5, 2, 2), generator).to(dtype) for _ in range(4))
    scale, shift, scale_t, shift_t, *grads = (channels(shape, generator, 0.5).to(other) for _ in range(6))
    statistics, dual_statistics = torch.ones(3, 2, 5, dtype=other), torch.ones(6, 2, 5, dtype=other)
    return {
        "norm_relu_pool": (y, scale, shift, 1e-5, out, statistics),
        "norm_relu_pool_backward": (grad_out, y, scale, shift, statistics, grad_y, *grads),
        "norm_relu_pool_dual": (y, t, scale, scale_t, shift, shift_t, 1e-5, out, out_t, dual_statistics),
        "norm_relu_pool_dual_backward": (
            *(grad_out, grad_out_t, y, t, scale, scale_t, shift, dual_statistics),
            *(grad_y, grad_t, *grads),
        ),
    }


ROW = op_contract.Row(
    function=norm_relu_pool,
    operators=(
        "norm_relu_pool",
        "norm_relu_pool_backward",
        "norm_relu_pool_dual",
        "norm_relu_pool_dual_backward",
    ),
    cases=cases,
    operator_arguments=operator_arguments,
    small="2x3x3x5",
    derivatives=2,
)


# ---- the faces against plain torch in float64 ----


class Example:
    """Arguments and cotangents in float64, of planes that a dtype holds, and every face's results by plain torch."""

    def __init__(self, shape: tuple[int, ...], mean: float = 0, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(11)
        n, c, h, w = shape
        self.y, self.y_tangent = planes(shape, generator, mean), planes(shape, generator, mean / 2)
        self.scale, self.shift = channels(shape, generator, 0.5), channels(shape, generator, 0.2)
        self.scale_tangent, self.shift_tangent = channels(shape, generator, 0), channels(shape, generator, 0)
        pooled = (n, c, h // 2, w // 2)
        self.grad_out, self.grad_out_tangent = planes(pooled, generator), planes(pooled, generator)
        vars(self).update({name: x.to(dtype).double() for name, x in vars(self).items() if x.dim() == 4})

    def faces(
        self, dtype: torch.dtype, device: torch.device, layout: Callable[[Tensor], Tensor] = torch.clone
    ) -> dict[str, Tensor]:
        x = {name: layout(value) for name, value in stored(vars(self), dtype, device).items()}
        point = x["y"], x["scale"], x["shift"]
        dual_point = x["y"], x["y_tangent"], x["scale"], x["scale_tangent"], x["shift"]
        forward = norm_relu_pool_forward(*point)
        backward = norm_relu_pool_backward(x["grad_out"], *point, forward.statistics)
        dual = norm_relu_pool_dual(*dual_point, x["shift_tangent"])
        grads = x["grad_out"], x["grad_out_tangent"]
        dual_backward = norm_relu_pool_dual_backward(*grads, *dual_point, dual.statistics)
        return {
            "forward out": forward.out,
            **{f"backward grad {name}": value for name, value in backward._asdict().items()},
            "dual out": dual.out,
            "dual out tangent": dual.out_tangent,
            **{f"dual backward grad {name}": value for name, value in dual_backward._asdict().items()},
        }

    def plain(self) -> dict[str, Tensor]:
        def function(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
            return norm_relu_pool(y, scale, shift, fused=False)

        # torch 2.11 has no forward mode of its group norm for planes that are channels last
        y, y_tangent = (v.clone(memory_format=torch.contiguous_format) for v in (self.y, self.y_tangent))
        point = tuple(v.clone().requires_grad_() for v in (y, self.scale, self.shift))
        y_tangent.requires_grad_()
        tangents = y_tangent, self.scale_tangent, self.shift_tangent
        out = function(*point)
        backward = torch.autograd.grad(out, point, self.grad_out)
        dual_out, out_tangent = torch.func.jvp(function, point, tangents)
        dual_backward = torch.autograd.grad(
            (dual_out, out_tangent), (point[0], y_tangent, *point[1:]), (self.grad_out, self.grad_out_tangent)
        )
        results = (out, *backward, dual_out, out_tangent, *dual_backward)
        return dict(zip(self.faces(torch.float64, self.y.device), results, strict=True))

    def check(self, faces: dict[str, Tensor], bound: float) -> None:
        expected = self.plain()
        terms = float(torch.stack([self.grad_out, self.grad_out_tangent]).norm())
        for name, got in faces.items():
            assert_close_in_norm(got, expected[name], terms if "grad" in name else 0, bound)


def assert_close_in_norm(actual: Tensor, expected: Tensor, terms: float, bound: float) -> None:
    """The error's norm is below the bound times that of the expected values, or of the terms that cancel in them.

    Rounding to bfloat16, by at most 2^-8 of what it gives, is no error.
    """
    got, expected = actual.cpu().double(), expected.detach()
    rounding = got.abs() / 256 if actual.dtype == torch.bfloat16 else 0
    error, size = float(((got - expected).abs() - rounding).relu().norm()), max(float(expected.norm()), terms)
    assert error <= bound * size, f"{error} of {size}"


@each_stored
@pytest.mark.parametrize(
    ("shape", "mean"), [*((shape, 0) for shape in SHAPES), ((2, 8, 16, 16), 0), ((2, 8, 9, 8), 1000)], ids=str
)
def test_faces_are_plain_torch(shape: tuple[int, ...], mean: float, dtype: torch.dtype, backend: Backend) -> None:
    example = Example(shape, mean, dtype)
    faces = example.faces(dtype, backend.device)
    for name, got in faces.items():
        assert got.dtype == (dtype if got.dim() == 4 else arithmetic(dtype)), name
    # At a mean of 1000, torch's group norm in float64 is itself off by 3e-10.
    example.check(faces, 1e-6 if dtype != torch.float64 else 1e-8 if mean else 1e-12)


def unaligned(x: Tensor) -> Tensor:
    """The same values in the same layout, one value off any alignment."""
    axes, back = ((0, 2, 3, 1), (0, 3, 1, 2)) if x.dim() == 4 else ((0,), (0,))
    values = x.permute(axes)
    return torch.cat([x.new_zeros(1), values.flatten()])[1:].view(values.shape).permute(back)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_faces_of_unaligned_planes(dtype: torch.dtype, backend: Backend) -> None:
    example = Example((2, 8, 5, 6), 0, dtype)
    example.check(example.faces(dtype, backend.device, unaligned), 1e-6)


@pytest.mark.parametrize("shape", [(3, 1, 2, 2), (2, 3, 3, 5), (2, 4, 4, 4), (0, 3, 4, 4)], ids=str)
def test_gradcheck_in_every_argument(shape: tuple[int, ...], backend: Backend) -> None:
    example = Example(shape)
    point = [v.to(backend.device).requires_grad_() for v in (example.y, example.scale, example.shift)]
    assert torch.autograd.gradcheck(norm_relu_pool, point, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(norm_relu_pool, point)


def test_second_derivative_of_a_network_is_that_of_the_plain_one(backend: Backend) -> None:
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(3, 3, 9, 8, generator=generator).double().to(backend.device)
    sizes = [(6, 3, 3, 3), (6,), (6,), (7, 6, 3, 3), (7,), (7,), (4, 7 * 2 * 2)]
    weights = [torch.randn(s, generator=generator).double().to(backend.device) for s in sizes]
    directions = [torch.randn(s, generator=generator).double().to(backend.device) for s in sizes]
    labels = torch.tensor([0, 3, 1], device=backend.device)

    def derivatives(fused: bool) -> tuple[Tensor, ...]:
        x = images.clone().requires_grad_()
        w = [v.clone().requires_grad_() for v in weights]
        z = norm_relu_pool(F.conv2d(x, w[0], padding=1), w[1] + 1, w[2], fused=fused)
        z = norm_relu_pool(F.conv2d(z, w[3], padding=1), w[4], w[5], fused=fused)
        loss = F.cross_entropy(z.flatten(1) @ w[6].T, labels)
        grads = torch.autograd.grad(loss, w, create_graph=True)
        product = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))
        return torch.autograd.grad(product, [x, *w])

    for got, wanted in zip(derivatives(True), derivatives(False), strict=True):
        assert_close_in_norm(got, wanted.cpu(), 0, 1e-11)


def test_third_derivative_raises(backend: Backend) -> None:
    example = Example((2, 3, 3, 5))
    y, scale, shift = (v.to(backend.device).requires_grad_() for v in (example.y, example.scale, example.shift))
    (first,) = torch.autograd.grad(norm_relu_pool(y, scale, shift).pow(2).sum(), y, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), y, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no third derivative.*fused=False"):
        second.sum().backward()


def test_reverse_over_forward_mode_raises(backend: Backend) -> None:
    example = Example((2, 3, 3, 5))
    y, scale, shift = (v.to(backend.device) for v in (example.y, example.scale, example.shift))

    def tangent(y: Tensor) -> Tensor:
        return torch.func.jvp(lambda y: norm_relu_pool(y, scale, shift), (y,), (y,))[1].sum()

    with pytest.raises(RuntimeError, match=r"no reverse derivative of its forward mode.*fused=False"):
        torch.func.grad(tangent)(y)


# ---- special planes ----


def test_constant_planes_are_normalised_to_zero(backend: Backend) -> None:
    y = torch.full((2, 3, 5, 4), 0.1, device=backend.device, requires_grad=True)
    scale = torch.ones(3, device=backend.device, requires_grad=True)
    shift = torch.tensor([-1.0, 0.0, 2.0], device=backend.device, requires_grad=True)
    out = norm_relu_pool(y, scale, shift)
    assert out[:, :2].abs().max() == 0  # also where z is 0, whose ReLU has derivative 0
    assert (out[:, 2] == 2).all()
    grads = torch.autograd.grad(out.sum(), (scale, shift))
    assert grads[0].tolist() == [0, 0, 0]
    assert grads[1].tolist() == [0, 0, 2 * 2 * 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_nan_shows_in_its_plane_alone(dtype: torch.dtype, backend: Backend) -> None:
    example = Example((2, 17, 4, 7))
    example.y[1, 16, 3, 6] = math.nan  # a pixel that is not pooled
    for name, value in example.faces(dtype, backend.device).items():
        if value.dim() == 4:
            bad = value.isnan().flatten(2)
            assert bad[1, 16].all(), name
            assert bad.sum() == bad[1, 16].numel(), name


# ---- bfloat16 planes ----


def bfloat16_example(backend: Backend, requires_grad: bool = True) -> tuple[Example, list[Tensor], dict[str, Tensor]]:
    """An example, its y, scale and shift, and the results of its faces."""
    example = Example((2, 8, 5, 6), 0, torch.bfloat16)
    x = stored(vars(example), torch.bfloat16, backend.device)
    point = [x[name].requires_grad_(requires_grad) for name in ("y", "scale", "shift")]
    return example, point, example.faces(torch.bfloat16, backend.device)


@pytest.mark.parametrize("fused", [True, False])
def test_derivatives_of_bfloat16_planes(fused: bool, backend: Backend) -> None:
    example, point, faces = bfloat16_example(backend)
    out = norm_relu_pool(*point, fused=fused)
    grads = torch.autograd.grad(out, point, example.grad_out.to(out))
    got = dict(zip(faces, (out, *grads), strict=False))
    example.check({name: value.detach() for name, value in got.items()}, 1e-6)
    assert [x.dtype for x in (out, *grads)] == [torch.bfloat16] * 2 + [torch.float32] * 2
    if fused:
        assert all(torch.equal(value, faces[name]) for name, value in got.items())


def test_second_derivative_of_bfloat16_planes(backend: Backend) -> None:
    example, point, _ = bfloat16_example(backend)
    x = stored(vars(example), torch.bfloat16, backend.device)
    tangents = x["y_tangent"], x["scale_tangent"], x["shift_tangent"]
    grad_out = x["grad_out_tangent"].requires_grad_()
    grads = torch.autograd.grad(norm_relu_pool(*point), point, grad_out, create_graph=True)
    got = torch.autograd.grad(grads, (grad_out, *point), tangents)
    example.grad_out.zero_()  # double backward is dual backward without it
    faces = example.faces(torch.bfloat16, backend.device)
    names = "dual out tangent", "dual backward grad y", "dual backward grad scale", "dual backward grad shift"
    assert all(torch.equal(value, faces[name]) for name, value in zip(names, got, strict=True))


def test_forward_mode_of_bfloat16_planes(backend: Backend) -> None:
    example, point, faces = bfloat16_example(backend, requires_grad=False)
    x = stored(vars(example), torch.bfloat16, backend.device)
    tangents = x["y_tangent"], x["scale_tangent"], x["shift_tangent"]
    got = torch.func.jvp(norm_relu_pool, tuple(point), tangents)
    assert torch.equal(got[0], faces["dual out"])
    assert torch.equal(got[1], faces["dual out tangent"])


def test_torch_compile_of_bfloat16_planes(backend: Backend) -> None:
    _, point, _ = bfloat16_example(backend)
    torch._dynamo.reset()
    compiled = torch.compile(norm_relu_pool, fullgraph=True, backend="aot_eager")
    results = [(out, *torch.autograd.grad(out.sum(), point)) for out in (compiled(*point), norm_relu_pool(*point))]
    assert all(torch.equal(got, wanted) for got, wanted in zip(*results, strict=True))


def test_operators_on_bfloat16_planes(backend: Backend) -> None:
    for operator, values in operator_arguments(torch.bfloat16).items():
        overload = getattr(_library.ops(), operator).default
        if backend.name == "compiled":
            with pytest.raises(RuntimeError, match="y must be float32 or float64 on the CPU, got BFloat16"):
                overload(*values)
        else:
            results = torch.library.opcheck(overload, op_contract.moved(values, backend.device))
            assert set(results.values()) == {"SUCCESS"}, (operator, results)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (1, "scale must be float32 where y is bfloat16"),
        (4, "out must have the dtype of y"),
        (5, "statistics must be float32 where y is bfloat16"),
    ],
)
def test_a_direct_call_with_bfloat16_planes_is_safe(place: int, message: str, backend: Backend) -> None:
    if backend.name in ("reference", "compiled"):
        pytest.skip("no kernel takes bfloat16 there")
    arguments = list(op_contract.moved(operator_arguments(torch.bfloat16)["norm_relu_pool"], backend.device))
    arguments[place] = arguments[place].to(torch.float32 if place == 4 else torch.bfloat16)
    with pytest.raises(RuntimeError, match=message):
        _library.ops().norm_relu_pool.default(*arguments)


# ---- layouts, preallocated results, threads, errors ----


def test_result_is_channels_last_whatever_the_input(backend: Backend) -> None:
    y = torch.randn(2, 5, 4, 6, device=backend.device)
    ones = torch.ones(5, device=backend.device)
    results = [norm_relu_pool(x, ones, ones) for x in (y, y.to(memory_format=torch.channels_last))]
    assert all(r.is_contiguous(memory_format=torch.channels_last) for r in results)
    assert torch.equal(*results)


@each_stored
def test_preallocated_results_may_be_halves_of_a_batch(dtype: torch.dtype, backend: Backend) -> None:
    x = stored(vars(Example((3, 5, 4, 6))), dtype, backend.device)
    arguments = [x[name] for name in ("y", "y_tangent", "scale", "scale_tangent", "shift", "shift_tangent")]
    expected = norm_relu_pool_dual(*arguments)
    both = torch.empty(6, 2, 3, 5, dtype=dtype, device=backend.device).permute(0, 3, 1, 2)
    given = Dual(both[:3], both[3:], torch.empty_like(expected.statistics))
    got = norm_relu_pool_dual(*arguments, out=given)
    assert got is given
    assert torch.equal(both, torch.cat(expected[:2]))
    assert torch.equal(got.statistics, expected.statistics)


@each_dtype
@pytest.mark.parametrize("shape", [(2, 17, 5, 7), (64, 128, 32, 32)], ids=str)  # the second is written past the caches
def test_on_the_cpu_the_gradient_may_be_written_over_y(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(6)
    y, tangent = (planes(shape, generator).to(dtype) for _ in range(2))
    grads = [planes((*shape[:2], shape[2] // 2, shape[3] // 2), generator).to(dtype) for _ in range(2)]
    scale, scale_tangent, shift = (channels(shape, generator, 0.5).to(dtype) for _ in range(3))
    statistics = norm_relu_pool_forward(y, scale, shift).statistics
    wanted = norm_relu_pool_backward(grads[0], y, scale, shift, statistics)
    over = y.clone()
    found = norm_relu_pool_backward(
        grads[0], over, scale, shift, statistics, out=wanted._replace(y=over, scale=scale.clone(), shift=shift.clone())
    )
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))

    point = y, tangent, scale, scale_tangent, shift
    statistics = norm_relu_pool_dual(*point, shift).statistics
    wanted_dual = norm_relu_pool_dual_backward(*grads, *point, statistics)
    over, over_tangent = y.clone(), tangent.clone()
    found_dual = norm_relu_pool_dual_backward(
        *grads, over, over_tangent, *point[2:], statistics, out=wanted_dual._replace(y=over, y_tangent=over_tangent)
    )
    again = norm_relu_pool_dual_backward(*grads, *point, statistics)
    assert all(torch.equal(a, b) for a, b in zip(found_dual, again, strict=True))


@pytest.mark.usefixtures("two_threads")
@each_dtype
def test_bits_do_not_depend_on_the_threads(dtype: torch.dtype, backend: Backend) -> None:
    example = Example((9, 40, 32, 31))
    if backend.name in ("reference", "emulated"):
        pytest.skip("plain torch promises nothing, and the emulation has no threads of torch's")
    two = example.faces(dtype, backend.device)
    torch.set_num_threads(1)
    one = example.faces(dtype, backend.device)
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"y": [1.0]}, TypeError, r"y must be a tensor \[N, C, H, W\], got list"),
        ({"y": torch.ones(2, 3, 4)}, ValueError, r"with H and W at least 2, got \[2, 3, 4\]"),
        ({"y": torch.ones(2, 3, 1, 4)}, ValueError, r"with H and W at least 2, got \[2, 3, 1, 4\]"),
        ({"y": torch.ones(2, 3, 4, 4).half()}, TypeError, r"float64 or bfloat16, got torch.float16; convert it"),
        ({"y": torch.ones(2, 3, 4, 4).bfloat16(), "shift": torch.ones(3).bfloat16()}, ValueError, "float32 where y is"),
        ({"scale": 1.0}, TypeError, r"scale must be a tensor \[C\], got float"),
        ({"scale": torch.ones(4)}, ValueError, r"scale must be \[3\], a value for each channel of y, got \[4\]"),
        ({"shift": torch.ones(3).double()}, ValueError, "shift must be torch.float32 where y is torch.float32"),
        ({"shift": torch.ones(3, device="meta")}, ValueError, "shift must be on the device of y, cpu, got meta"),
        ({"eps": 0.0}, ValueError, "eps must be above 0, got 0.0"),
        ({"eps": math.nan}, ValueError, "eps must be above 0, got nan"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str, fused: bool) -> None:
    arguments = {"y": torch.ones(2, 3, 4, 4), "scale": torch.ones(3), "shift": torch.ones(3), "eps": 1e-5}
    with pytest.raises(error, match=message):
        norm_relu_pool(**(arguments | change), fused=fused)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.ones(2, 5, 4, 5).half(), "y must be float32(, float64 or bfloat16| or float64 on the CPU), got Half"),
        (0, torch.ones(2, 5, 1, 5), r"H and W from 2 to 32768, got \[2, 5, 1, 5\]"),
        (1, torch.ones(4), r"scale does not fit y \[2, 5, 4, 5\], got \[4\]"),
        (2, torch.ones(5).double(), "shift must have the dtype of y"),
        (4, torch.ones(2, 5, 3, 2), r"out does not fit y \[2, 5, 4, 5\], got \[2, 5, 3, 2\]"),
        (4, torch.ones(2, 5, 2, 2), "out must be without gaps, and channels last"),
        (5, torch.ones(2, 2, 5), r"statistics does not fit y \[2, 5, 4, 5\], got \[2, 2, 5\]"),
    ],
)
def test_a_direct_call_of_the_operator_is_safe(place: int, value: Tensor, message: str, backend: Backend) -> None:
    if backend.name == "reference":
        pytest.skip("plain torch checks by itself")
    arguments = list(operator_arguments(torch.float32)["norm_relu_pool"])
    arguments[place] = value
    with pytest.raises(RuntimeError, match=message):
        _library.ops().norm_relu_pool.default(*op_contract.moved(tuple(arguments), backend.device))
