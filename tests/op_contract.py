"""What every operator keeps, on every backend. An op's test module has a row; test_op_contract.py runs it.

Operators that are stages of an algorithm, write their last argument and are never differentiated by autograd stand in
a set STAGES of their test module instead, which tests them all.

ROW = op_contract.Row(
    function=masked_match_loss,          # public function; fused=False is its meaning in plain torch
    operators=("match_loss", "match_loss_backward"),
    cases=cases,                         # (dtype, generator) -> {name: (x, constants)}
    operator_arguments=arguments,        # dtype -> {operator: arguments}, for torch.library.opcheck
)
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: Sizes with an odd tail, a partial warp, more than one block.
SIZES = (0, 1, 31, 32, 33, 255, 1000, 4097)

#: (relative, absolute) against the float64 reference. The one table of tolerances.
TOLERANCE = {torch.float32: (2e-5, 2e-6), torch.float64: (1e-11, 1e-13)}

#: x, the argument that is differentiated, and the constants that follow it.
Case = tuple[Tensor, tuple[Any, ...]]


@dataclass(frozen=True)
class Row:
    """How the contract calls one public function, and which registered operators lie behind it.

    ``function(x, *constants, fused=...)`` gives a tensor, or a tuple whose first is differentiable in x.
    """

    function: Callable[..., Any]
    operators: tuple[str, ...]
    cases: Callable[[torch.dtype, torch.Generator], dict[str, Case]]
    operator_arguments: Callable[[torch.dtype], dict[str, tuple[Any, ...]]]
    #: The case for checks that take one: gradcheck, torch.func, torch.compile. Small, and smooth around x.
    small: str
    #: Whether the constants have the dtype of x, or one of their own.
    constants_follow: bool = True
    #: How many derivatives the fused form has; the next one raises.
    derivatives: int = 1

    def case(self, name: str, dtype: torch.dtype) -> Case:
        return self.cases(dtype, torch.Generator().manual_seed(7))[name]

    def exact(self, case: Case) -> Case:
        """The case in float64."""
        x, constants = case
        return x.double(), moved(constants, dtype=torch.float64) if self.constants_follow else constants

    def names(self) -> list[str]:
        return list(self.cases(torch.float64, torch.Generator().manual_seed(7)))

    def value(self, x: Tensor, constants: Sequence[Any], fused: bool = True) -> Tensor:
        result = self.function(x, *constants, fused=fused)
        return result[0] if isinstance(result, tuple) else result

    def value_and_gradient(self, x: Tensor, constants: Sequence[Any], fused: bool = True) -> tuple[Tensor, Tensor]:
        """The value, and the gradient of its product with fixed weights."""
        x = x.detach().requires_grad_()
        value = self.value(x, constants, fused)
        weights = torch.linspace(-1, 2, value.numel(), dtype=value.dtype).reshape(value.shape)
        (gradient,) = torch.autograd.grad(value, x, weights.to(value.device))
        return value.detach(), gradient


def rows() -> dict[str, Row]:
    """The rows that the test modules of the ops declare, by the module's name."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("test_ops_*.py")):
        module = importlib.import_module(path.stem)
        if hasattr(module, "ROW"):
            found[path.stem.removeprefix("test_ops_")] = module.ROW
    return found


def stages() -> set[str]:
    """The operators that test modules declare as stages."""
    paths = Path(__file__).parent.glob("test_ops_*.py")
    return set().union(*(getattr(importlib.import_module(path.stem), "STAGES", set()) for path in paths))


def moved(value: Any, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Any:
    """A nested argument with its tensors moved and its floating tensors cast."""
    if isinstance(value, tuple):
        return tuple(moved(item, device, dtype) for item in value)
    if not isinstance(value, Tensor):
        return value
    return value.to(device=device, dtype=dtype if value.is_floating_point() else None)


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    relative, absolute = TOLERANCE[dtype]
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=relative, atol=absolute, equal_nan=True)


def strided_views(x: Tensor) -> list[Tensor]:
    """The same values in other layouts: every second element, an odd offset, the last axes swapped."""
    every_second = torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0]
    offset = torch.cat([x.new_full((1,), torch.nan), x.flatten()])[1:].view(x.shape)
    swapped = [x.transpose(-1, -2).contiguous().transpose(-1, -2)] if x.dim() > 1 else []
    return [every_second, offset, *swapped]
