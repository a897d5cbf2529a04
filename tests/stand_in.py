"""A stand-in for a GPU, for whole stages where there is none.

Its tensors say that they are on a device of their own and hold their values in the CPU's memory. Operators compute on
these, but refuse to take tensors of both devices, as a GPU does. The device is called ``meta``, the only one beside the
CPU whose backward passes autograd runs without a driver.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ddpp.ops._library import references

DEVICE = torch.device("meta")
_BETWEEN_DEVICES = ("aten::copy_", "aten::_to_copy")


@contextmanager
def standing_in() -> Iterator[None]:
    """Within it tensors can be made on, and moved to and from, :data:`DEVICE`."""
    with _Functions(), _Device():
        yield


class There(Tensor):
    """A tensor on :data:`DEVICE`."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> There:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        tensor: There = Tensor._make_wrapper_subclass(cls, held.shape, **layout, device=DEVICE)
        tensor.held = held
        return tensor

    def tolist(self) -> Any:
        return self.held.tolist()

    def new_tensor(self, data: Any, **options: Any) -> Tensor:
        return torch.tensor(data, **{"dtype": self.dtype, **options}).to(DEVICE)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


class _Device(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What torch does without an operator: tensors made of values, and a parameter put on other memory."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and _is_there(kwargs.get("device")) and not _there(args):
            return func(*args, **kwargs | {"device": "cpu"}).to(DEVICE)
        if func == Tensor.data.__set__ and isinstance(args[1], There):  # type: ignore[attr-defined]
            args[0].held = args[1].held
        return func(*args, **kwargs)


def _call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    namespace, name = func.name().partition(".")[0].split("::")
    if namespace.startswith("ddpp") and name.startswith("convnet"):  # as on a GPU, which has no kernel for it
        with _Device():
            return references[name](*args, **kwargs)
    given = _there((args, kwargs))
    to_there = _is_there(kwargs["device"]) if kwargs.get("device") is not None else bool(given)
    if given and f"{namespace}::{name}" not in _BETWEEN_DEVICES:
        here = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and not isinstance(t, There)]
        assert not here, f"{func.name()} takes tensors of two devices, of the CPU {[list(t.shape) for t in here]}"
    if to_there and "device" in kwargs:
        kwargs = kwargs | {"device": torch.device("cpu")}
    held_args, held_kwargs = tree_map_only(There, lambda t: t.held, (args, kwargs))
    found = func(*held_args, **held_kwargs)
    if name == "copy_":
        return args[0]
    if not to_there:
        return found
    same = {id(t.held): t for t in given}  # an operator in place gives back its argument
    return tree_map_only(Tensor, lambda t: same[id(t)] if id(t) in same else There(t), found)


def _there(arguments: Any) -> list[There]:
    return [t for t in tree_leaves(arguments) if isinstance(t, There)]


def _is_there(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type
