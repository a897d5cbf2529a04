"""Every operator on every backend: one contract over the rows that the ops' test modules declare."""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Callable, Iterator

import op_contract
import pytest
import torch
from conftest import Backend
from op_contract import Row, close, moved

import ddpp.ops
from ddpp.ops import _library

ROWS = op_contract.rows()
DTYPES = [torch.float32, torch.float64]
each_row = pytest.mark.parametrize("row", [pytest.param(row, id=name) for name, row in ROWS.items()])
each_case = pytest.mark.parametrize(
    ("row", "case"),
    [pytest.param(row, case, id=f"{name}-{case}") for name, row in ROWS.items() for case in row.names()],
)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """New tensors are full of NaN, so that an element that a kernel leaves unwritten shows.

    DDPP_UNWRITTEN=1 leaves them as they are, for a tool that follows which memory was written.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = "DDPP_UNWRITTEN" not in os.environ
    yield
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(False)


def test_every_operator_has_a_row_or_is_a_stage() -> None:
    for module in pkgutil.iter_modules(ddpp.ops.__path__):
        importlib.import_module(f"ddpp.ops.{module.name}")
    covered = {operator for row in ROWS.values() for operator in row.operators} | op_contract.stages()
    assert set(_library.references) == covered


@each_row
def test_the_backend_is_the_one_it_says(row: Row, backend: Backend) -> None:
    expected = {"reference": "pure PyTorch", "compiled": "C++", "emulated": "CUDA", "cuda": "CUDA"}[backend.name]
    for operator in row.operators:
        assert _library.implementation(operator, backend.device.type, backend.operators)[0] == expected


@each_dtype
@each_case
def test_value_and_gradient(row: Row, case: str, dtype: torch.dtype, backend: Backend) -> None:
    x, constants = row.case(case, dtype)
    expected = row.value_and_gradient(*row.exact((x, constants)), fused=False)
    actual = row.value_and_gradient(*moved((x, constants), backend.device))
    for got, wanted in zip(actual, expected, strict=True):
        assert got.dtype == dtype
        assert got.device.type == backend.device.type
        close(got, wanted, dtype)


@each_row
def test_input_in_any_layout(row: Row, backend: Backend) -> None:
    x, constants = moved(row.case(row.small, torch.float32), backend.device)
    expected = row.value_and_gradient(x, constants)
    for view in op_contract.strided_views(x):
        for got, wanted in zip(row.value_and_gradient(view, constants), expected, strict=True):
            close(got, wanted.cpu().double(), torch.float32)


@each_row
def test_constants_in_any_layout(row: Row, backend: Backend) -> None:
    x, constants = moved(row.case(row.small, torch.float32), backend.device)
    expected = row.value_and_gradient(x, constants)
    strided = tuple(op_contract.strided_views(c)[0] if isinstance(c, torch.Tensor) else c for c in constants)
    for got, wanted in zip(row.value_and_gradient(x, strided), expected, strict=True):
        close(got, wanted.cpu().double(), torch.float32)


@each_row
def test_expanded_arguments(row: Row, backend: Backend) -> None:
    x, constants = moved(row.case(row.small, torch.float64), backend.device)
    x = x.flatten()[0].expand(x.shape)
    expected = row.value_and_gradient(x.cpu(), moved(constants, torch.device("cpu")), fused=False)
    for got, wanted in zip(row.value_and_gradient(x, constants), expected, strict=True):
        close(got, wanted, torch.float64)


@each_row
def test_gradcheck(row: Row, backend: Backend) -> None:
    x, constants = moved(row.case(row.small, torch.float64), backend.device)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: row.value(x, constants), (x,), check_forward_ad=True)


@each_row
def test_derivative_beyond_the_last_raises(row: Row, backend: Backend) -> None:
    x, constants = moved(row.case(row.small, torch.float64), backend.device)
    x.requires_grad_()
    value = row.value(x, constants)
    for _ in range(row.derivatives):
        (value,) = torch.autograd.grad(value.square().sum(), x, create_graph=True)
    message = rf"{('second', 'third')[row.derivatives - 1]} derivative.*fused=False"
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(value.sum(), x, retain_graph=True)
    with pytest.raises(RuntimeError, match=message):
        (value.sum() + x.pow(3).sum()).backward()


@each_row
def test_plain_torch_has_a_second_derivative(row: Row) -> None:
    x, constants = row.case(row.small, torch.float64)
    x.requires_grad_()
    try:
        assert torch.autograd.gradgradcheck(lambda x: row.value(x, constants, fused=False), (x,))
    except RuntimeError as error:
        if "derivative for aten::grid_sampler_2d_backward is not implemented" not in str(error):
            raise
        pytest.skip(f"torch {torch.__version__} differentiates its resampling once")


@each_dtype
@each_row
def test_opcheck(row: Row, dtype: torch.dtype, backend: Backend) -> None:
    arguments = row.operator_arguments(dtype)
    assert set(arguments) == set(row.operators)
    for operator, values in arguments.items():
        overload = getattr(_library.ops(), operator).default
        results = torch.library.opcheck(overload, moved(values, backend.device))
        assert set(results.values()) == {"SUCCESS"}, (operator, results)


def mapped(value: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor, by_vmap: bool) -> torch.Tensor:
    """The value of each item. Plain torch takes them one by one: its group norm lacks vmap in torch 2.11."""
    return torch.func.vmap(value)(batch) if by_vmap else torch.stack([value(x) for x in batch])


def along(value: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, tangent: torch.Tensor) -> torch.Tensor:
    """The derivative along a tangent by reverse mode: some releases of torch lack forward mode for resampling."""
    out = value(x)
    jacobian = torch.autograd.functional.jacobian(value, x)
    return (jacobian.reshape(out.numel(), -1) @ tangent.flatten()).view(out.shape)


@each_row
def test_torch_func(row: Row, backend: Backend) -> None:
    x, constants = moved(row.case(row.small, torch.float64), backend.device)
    batch, tangent = torch.stack([x, x * 0.9]), x * 0.5 + 1

    def results(fused: bool) -> list[torch.Tensor]:
        def value(x: torch.Tensor) -> torch.Tensor:
            return row.value(x, constants, fused)

        def total(x: torch.Tensor) -> torch.Tensor:
            return value(x).square().sum()

        return [
            torch.func.grad(total)(x),
            mapped(value, batch, fused),
            mapped(torch.func.grad(total), batch, fused),
            torch.func.jvp(value, (x,), (tangent,))[1] if fused else along(value, x, tangent),
        ]

    for got, wanted in zip(results(True), results(False), strict=True):
        close(got, wanted.cpu(), torch.float64)


@each_row
def test_torch_compile(row: Row, backend: Backend) -> None:
    x, constants = moved(row.case(row.small, torch.float32), backend.device)
    compiler = "inductor" if backend.name in ("compiled", "cuda") else "aot_eager"
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, *constants: row.value(x * 2, constants) * 3, fullgraph=True, backend=compiler)
    x.requires_grad_()
    got = compiled(x, *constants)
    wanted = row.value(x * 2, constants) * 3
    close(got.detach(), wanted.detach().cpu().double(), torch.float32)
    gradients = [torch.autograd.grad(value.square().sum(), x)[0] for value in (got, wanted)]
    close(gradients[0], gradients[1].cpu().double(), torch.float32)


@each_case
def test_bits_do_not_depend_on_the_threads(row: Row, case: str, backend: Backend, two_threads: None) -> None:
    if backend.name == "reference":
        pytest.skip("torch's own sums may depend on the number of threads")
    x, constants = moved(row.case(case, torch.float32), backend.device)
    with_two = row.value_and_gradient(x, constants)
    torch.set_num_threads(1)
    for got, wanted in zip(row.value_and_gradient(x, constants), with_two, strict=True):
        assert got.cpu().numpy().tobytes() == wanted.cpu().numpy().tobytes()


@each_row
def test_empty_cases_are_covered(row: Row) -> None:
    assert any(row.case(name, torch.float32)[0].numel() == 0 for name in row.names())
