"""Graphs of student steps, with a stand-in that calls again in place of a GPU, and steps that nobody waits for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_unroll import problem
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ddpp import distill
from ddpp.config import DistillConfig
from ddpp.dual import Step, StepAdjoint
from ddpp.gpu import MOST_GRAPHS, GraphedStep, send
from ddpp.methods import Update
from ddpp.models import flat
from ddpp.synthetic import Synthetic
from ddpp.unroll import matching_gradients, provider


class Recorder:
    """Captures a call as a graph does: repeating it gives the results in the memory of the first ones."""

    def __init__(self) -> None:
        self.captured = 0

    def __call__(self, call: Callable[[], tuple[Any, ...]]) -> tuple[tuple[Any, ...], Callable[[], None]]:
        self.captured += 1
        results = call()

        def replay() -> None:
            for kept, new in zip(results, call(), strict=True):
                if kept is not None:
                    kept.copy_(new)

        for result in results:  # a capture computes nothing
            if result is not None:
                result.fill_(torch.nan)
        return results, replay


def graphed(p: dict[str, Any], name: str) -> tuple[GraphedStep, Recorder]:
    recorder = Recorder()
    return GraphedStep(lambda: provider(p["network"], name), recorder), recorder


@pytest.mark.parametrize("name", ["dual", "autograd"])
@pytest.mark.parametrize("soft", [False, True])
def test_graphs_change_no_bit(name: str, soft: bool) -> None:
    """Batches of two sizes, so that there are four graphs; the second unroll captures nothing."""
    p = problem(soft=soft)
    p["batches"] = [b if i % 2 else b[:3] for i, b in enumerate(p["batches"])]
    p["plans"] = [plan if i % 2 else plan[:3] for i, plan in enumerate(p["plans"])]
    step, recorder = graphed(p, name)
    plain = provider(p["network"], name)
    for _ in range(2):
        wanted = matching_gradients(**p, step=plain)
        for found, exact in zip(matching_gradients(**p, step=step), wanted, strict=True):
            assert found is exact is None or torch.equal(found, exact)
        p["start"], p["images"] = p["start"] * 1.01, p["images"] + 0.1
    assert recorder.captured == 4


def arguments(p: dict[str, Any], n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return p["start"], p["target"], p["images"][:n], p["labels"][:n]


def same(found: StepAdjoint, wanted: StepAdjoint) -> bool:
    return all(a is b is None or torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", ["dual", "autograd"])
def test_results_stay_as_they_are(name: str) -> None:
    p = problem(soft=True)
    step, _ = graphed(p, name)
    theta, adjoint, images, labels = arguments(p, 4)
    first, gradient = step.adjoint(theta, adjoint, images, labels), step.gradient(theta, images, labels)
    kept, kept_gradient = StepAdjoint(*(t.clone() for t in first if t is not None)), gradient.clone()
    step.adjoint(theta + 1, adjoint * 2, images * 3, labels - 1)
    step.gradient(theta + 1, images * 3, labels - 1)
    assert same(first, kept) and torch.equal(gradient, kept_gradient)


def test_arguments_may_require_gradients() -> None:
    p = problem()
    step, _ = graphed(p, "dual")
    theta, adjoint, images, labels = arguments(p, 4)
    wanted = provider(p["network"], "dual").adjoint(theta, adjoint, images, labels)
    for _ in range(2):
        found = step.adjoint(theta.clone().requires_grad_(), adjoint, images.clone().requires_grad_(), labels)
        assert same(found, wanted) and not any(t.requires_grad for t in found if t is not None)


def test_every_graph_has_a_step_of_its_own() -> None:
    """A batch that makes a step's buffers grow must not take the memory of an earlier graph away."""
    p, built = problem(), []

    def build() -> Step:
        built.append(provider(p["network"], "dual"))
        return built[-1]

    recorder = Recorder()
    step = GraphedStep(build, recorder)
    for n in (2, 6, 2, 4, 6):
        step.adjoint(*arguments(p, n))
    assert recorder.captured == 3 and len({id(s) for s in built}) == 3 + 1


def test_more_shapes_than_graphs() -> None:
    p = problem()
    step, recorder = graphed(p, "autograd")
    plain = provider(p["network"], "autograd")
    for n in range(1, MOST_GRAPHS + 4):
        theta, adjoint, _, _ = arguments(p, 1)
        images, labels = p["images"][:1].repeat(n, 1, 1, 1), p["labels"][:1].repeat(n)
        for _ in range(2):
            assert same(step.adjoint(theta, adjoint, images, labels), plain.adjoint(theta, adjoint, images, labels))
    assert recorder.captured == MOST_GRAPHS


def test_a_step_that_cannot_be_captured_is_computed_without() -> None:
    p = problem()

    def refuses(call: Callable[[], tuple[Any, ...]]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    step, plain = GraphedStep(lambda: provider(p["network"], "dual"), refuses), provider(p["network"], "dual")
    with pytest.warns(RuntimeWarning, match="run without CUDA graphs: operation not permitted when stream is captur"):
        found = step.adjoint(*arguments(p, 4))
    assert same(found, plain.adjoint(*arguments(p, 4)))
    assert same(step.adjoint(*arguments(p, 3)), plain.adjoint(*arguments(p, 3)))  # and says so once


def test_without_a_gpu_there_are_no_graphs() -> None:
    network = problem()["network"]
    assert type(provider(network, graphs=True)) is type(provider(network))
    tensor = torch.arange(3)
    assert send(tensor, torch.device("cpu")) is tensor


class NobodyWaits(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU: values that Python looks at, and shapes that depend on values."""

    WAITING = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "unique", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        chosen = args[1] if name.startswith("index") and isinstance(args[1], list | tuple) else ()
        by_mask = any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in chosen)
        assert name not in self.WAITING and not by_mask, f"{func.name()} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["dual", "fused", "autograd"])
@pytest.mark.parametrize("soft", [False, True])
def test_nobody_waits_within_an_unroll(name: str, soft: bool) -> None:
    p = problem(soft=soft)
    step = provider(p["network"], name)
    with NobodyWaits():
        matching_gradients(**p, step=step, checkpoint_every=2)


def test_waiting_would_be_seen() -> None:
    for wait in (lambda x: float(x.sum()), lambda x: x[x > 0], lambda x: bool((x > 0).any())):
        with pytest.raises(AssertionError, match="waits for the device"), NobodyWaits():
            wait(torch.arange(3))


def test_nobody_waits_when_pixels_move() -> None:
    held = Synthetic(torch.zeros(2, 1, 4, 4), torch.zeros(2, 3), torch.tensor(0.02))
    update = Update(torch.ones(()), torch.ones(2, 1, 4, 4), torch.ones(()), torch.ones(()), {}, torch.ones(2, 3))
    state = distill.State.begin(held)
    with NobodyWaits():
        assert state.moved(update, DistillConfig(ema=0.5)).finite().dtype == torch.bool


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["dual", "fused", "autograd"])
@pytest.mark.parametrize("soft", [False, True])
def test_captured_on_a_gpu(name: str, soft: bool) -> None:
    """The real capture, and no wait that CUDA itself would see."""
    device = torch.device("cuda")
    p = problem(soft=soft)
    p = {k: v.to(device) if isinstance(v, Tensor | torch.nn.Module) else v for k, v in p.items()}
    p["batches"] = [b.to(device) for b in p["batches"]]
    step, plain = (provider(p["network"], name, graphs=graphs) for graphs in (True, False))
    assert isinstance(step, GraphedStep)
    wanted = matching_gradients(**p, step=plain)
    matching_gradients(**p, step=step)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = matching_gradients(**p, step=step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for got, exact in zip(found, wanted, strict=True):
        assert got is exact is None or torch.allclose(got, exact, rtol=1e-9, atol=1e-12)
    assert flat.size(flat.layout(p["network"])) == len(found.end)
