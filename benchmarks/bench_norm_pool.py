"""Instance norm, ReLU and average pool: fused, in plain PyTorch in both layouts, and that under torch.compile."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import report
from torch import Tensor

from ddpp.ops.norm_pool import norm_relu_pool, norm_relu_pool_dual, norm_relu_pool_dual_backward

#: The first layer of a ConvNet-D3 of width 128 on 32x32 images, at IPC 10 and 1 with 10 classes. N, C, H, W
SHAPES = {"100": (100, 128, 32, 32), "10": (10, 128, 32, 32)}
#: Full-size and pooled planes read and written by the fused op's faces; a pooled plane is 1/4.
PLANES = {"forward": 1.25, "forward+backward": 1.25 + 2.25, "second order": 2.5 + 4.5}
FORMATS = {"channels-last": torch.channels_last, "nchw": torch.contiguous_format}


@functools.lru_cache(maxsize=2)
def arguments(size: str, layout: str) -> tuple[Tensor, ...]:
    """y, its tangent, the cotangents of out and its tangent, and scale, shift and their tangents."""
    n, c, h, w = SHAPES[size]
    generator = torch.Generator().manual_seed(0)
    full, pooled = (n, c, h, w), (n, c, h // 2, w // 2)
    images = [torch.randn(s, generator=generator) for s in (full, full, pooled, pooled)]
    return *(x.contiguous(memory_format=FORMATS[layout]) for x in images), *torch.randn(4, c, generator=generator)


def plain(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return norm_relu_pool(y, scale, shift, fused=False)


@functools.cache
def implementation(name: str) -> Callable[..., Tensor]:
    return {"fused": norm_relu_pool, "pytorch": plain, "compile": torch.compile(plain, fullgraph=True)}[name]


def forward(function: Callable[..., Tensor], values: tuple[Tensor, ...]) -> Tensor:
    y, _, _, _, scale, shift, *_ = values
    with torch.no_grad():
        return function(y, scale, shift)


def forward_backward(function: Callable[..., Tensor], values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    y, _, grad, _, scale, shift, *_ = values
    point = [v.detach().requires_grad_() for v in (y, scale, shift)]
    return torch.autograd.grad(function(*point), point, grad)


def unrolled(function: Callable[..., Tensor], values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Forward, backward and double backward, as a graph of unrolled steps has them."""
    y, y_tangent, _, grad_tangent, scale, shift, scale_tangent, shift_tangent = values
    point = [v.detach().requires_grad_() for v in (y, scale, shift)]
    cotangent = grad_tangent.detach().requires_grad_()
    grads = torch.autograd.grad(function(*point), point, cotangent, create_graph=True)
    tangents = (y_tangent, scale_tangent, shift_tangent)
    return torch.autograd.grad(grads, [cotangent, *point], tangents)


def dual(values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same by dual numbers, which also take a cotangent of out."""
    y, y_tangent, grad, grad_tangent, scale, shift, scale_tangent, shift_tangent = values
    point = y, y_tangent, scale, scale_tangent, shift
    statistics = norm_relu_pool_dual(*point, shift_tangent).statistics
    return norm_relu_pool_dual_backward(grad, grad_tangent, *point, statistics)


def measure(benchmark: Any, what: str, size: str, threads: int, run: Callable[[], Any]) -> None:
    n, c, h, w = SHAPES[size]
    shape = "x".join(map(str, SHAPES[size]))
    benchmark.group = f"norm-ReLU-pool, {shape}, {what}, {threads} thread{'s' * (threads > 1)}"
    rounds = {"100": 7, "10": 25}[size]
    benchmark.pedantic(run, rounds=rounds, warmup_rounds=2)
    report(benchmark, int(PLANES[what] * 4 * n * c * h * w), threads)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("name", ["fused", "pytorch", "compile"])
@pytest.mark.parametrize("passes", ["forward", "forward+backward"])
@pytest.mark.parametrize("size", SHAPES)
def bench_norm_pool(benchmark: Any, size: str, passes: str, name: str, layout: str, threads: int) -> None:
    if (name, layout) == ("fused", "nchw"):
        pytest.skip("converts to channels last")
    values, function = arguments(size, layout), implementation(name)
    run = forward if passes == "forward" else forward_backward
    measure(benchmark, passes, size, threads, lambda: run(function, values))


@pytest.mark.parametrize("name", ["dual", "fused", "pytorch-channels-last", "pytorch-nchw"])
@pytest.mark.parametrize("size", SHAPES)
def bench_norm_pool_second_order(benchmark: Any, size: str, name: str, threads: int) -> None:
    values = arguments(size, "nchw" if name == "pytorch-nchw" else "channels-last")
    function = implementation("fused" if name == "fused" else "pytorch")
    run = (lambda: dual(values)) if name == "dual" else (lambda: unrolled(function, values))
    measure(benchmark, "second order", size, threads, run)
