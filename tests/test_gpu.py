"""Graphs of student steps, with a stand-in that calls again in place of a GPU, and steps that nobody waits for."""

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from streams import Race, Streams
from test_unroll import problem
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ddpp import augment, data, distill, models, synthetic, training, unroll
from ddpp.config import Config, DistillConfig, ModelConfig
from ddpp.gpu import MOST_GRAPHS, CudaGraphs, Graphs, Results, send
from ddpp.methods import METHODS, Problem, Update
from ddpp.models import flat
from ddpp.ops._library import implementation
from ddpp.ops._streams import SIDES, Beside, side_streams
from ddpp.profile import MadeUp
from ddpp.synthetic import Synthetic
from ddpp.unroll import matching_gradients, provider, training_gradients


class Recorder:
    """Captures a call as a graph does: repeating it gives the results in the memory of the first ones.

    Graphs share memory: what one of them gave may be gone when another runs.
    """

    def __init__(self) -> None:
        self.captured = 0
        self._given: list[Tensor] = []

    def __call__(self, call: Callable[[], Results]) -> tuple[Results, Callable[[], None]]:
        self.captured += 1
        results = call()
        self._given += tensors(results)

        def replay() -> None:
            found = [new.clone() for new in tensors(call())]
            for given in self._given:
                given.detach().fill_(torch.nan)
            for kept, new in zip(tensors(results), found, strict=True):
                kept.copy_(new)

        for result in tensors(results):  # a capture computes nothing
            result.detach().fill_(torch.nan)
        return results, replay


def tensors(results: Results) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else [r for r in results if r is not None]


@pytest.mark.parametrize("name", ["dual", "autograd"])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("augmented", [True, False])
@pytest.mark.parametrize("checkpoint_every", [1, 3])
def test_graphs_change_no_bit(name: str, soft: bool, augmented: bool, checkpoint_every: int) -> None:
    """Batches of two sizes, so that there are four graphs; the second unroll captures nothing."""
    p = problem(soft=soft)
    p["batches"] = [b if i % 2 else b[:3] for i, b in enumerate(p["batches"])]
    p["plans"] = [plan if i % 2 else plan[:3] for i, plan in enumerate(p["plans"])] if augmented else None
    recorder, step = Recorder(), provider(p["network"], name)
    graphs = Graphs(recorder)
    for _ in range(2):
        wanted = matching_gradients(**p, step=step)
        found = matching_gradients(**p, step=step, graphs=graphs, checkpoint_every=checkpoint_every)
        kept = [None if t is None else t.clone() for t in found]
        matching_gradients(**p | {"start": p["target"]}, step=step, graphs=graphs)
        for result, first, exact in zip(found, kept, wanted, strict=True):
            assert result is first is exact is None or (torch.equal(result, exact) and torch.equal(first, exact))
            assert result is None or not result.requires_grad
        p["start"], p["images"] = p["start"] * 1.01, p["images"] + 0.1
        p["lr"].mul_(1.1)
    assert recorder.captured == 4


@pytest.mark.parametrize("checkpoint_every", [1, 2])
def test_graphs_change_no_bit_of_students_by_adam(checkpoint_every: int) -> None:
    """Of the last three steps; the second unroll captures nothing."""
    p, recorder = problem(soft=True), Recorder()
    step, graphs = provider(p["network"], "dual"), Graphs(recorder)
    given = {name: value for name, value in p.items() if name != "target"}
    options: dict[str, Any] = {"optimizer": "adam", "first": 1, "step": step}
    options["objective"] = lambda end: (end @ end, torch.ones(()))
    for _ in range(2):
        wanted = training_gradients(**given, **options)
        found = training_gradients(**given, **options, graphs=graphs, checkpoint_every=checkpoint_every)
        for result, exact in zip(found, wanted, strict=True):
            assert result is not None and exact is not None and torch.equal(result, exact)
        given["start"], given["images"] = given["start"] * 1.01, given["images"] + 0.1
    assert recorder.captured == 2


def test_graphs_see_arguments_that_change_in_place_and_their_own_results() -> None:
    recorder = Recorder()
    graphs, held = Graphs(recorder), torch.ones(2)

    def add(x: Tensor, y: Tensor, factor: int) -> tuple[Tensor, None]:
        return x + factor * y, None

    result = torch.zeros(2)
    for _ in range(3):
        result, nothing = graphs(add, result, held, 2)
        assert nothing is None
    assert result.tolist() == [6, 6]
    held.fill_(5)
    result, _ = graphs(add, torch.zeros(2), held, 2)
    assert result.tolist() == [10, 10] and recorder.captured == 1
    result, _ = graphs(add, torch.zeros(2), held, 3)  # what is no tensor belongs to the graph
    assert result.tolist() == [15, 15] and recorder.captured == 2


def test_arguments_may_require_gradients() -> None:
    p = problem()
    step, graphs = provider(p["network"], "dual"), Graphs(Recorder())
    wanted = matching_gradients(**p, step=step)
    p["images"].requires_grad_(), p["lr"].requires_grad_()
    found = matching_gradients(**p, step=step, graphs=graphs)
    assert torch.equal(found.images, wanted.images) and not found.images.requires_grad


def test_more_shapes_than_graphs() -> None:
    recorder = Recorder()
    graphs = Graphs(recorder)
    for n in range(1, MOST_GRAPHS + 4):
        for _ in range(2):
            assert torch.equal(graphs(torch.neg, torch.ones(n)), -torch.ones(n))
    assert recorder.captured == MOST_GRAPHS


def test_a_step_that_cannot_be_captured_is_computed_without() -> None:
    p = problem()

    def refuses(call: Callable[[], Results]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    step, graphs = provider(p["network"], "dual"), Graphs(refuses)
    wanted = matching_gradients(**p, step=step)
    with pytest.warns(RuntimeWarning, match="run without CUDA graphs: operation not permitted when stream is captur"):
        found = matching_gradients(**p, step=step, graphs=graphs)
    assert torch.equal(found.images, wanted.images)
    assert torch.equal(matching_gradients(**p, step=step, graphs=graphs).images, wanted.images)  # and says so once


class Pool:
    """Of memory."""

    id = (0, 1)


class HalfAGpu:
    """Of torch.cuda what a capture needs. After so many that work, its graphs break off as CUDA's do: at their end, the
    stream still theirs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, works: int = 0) -> None:
        self.tried, self.works, self.current = 0, works, self.own_stream()
        self.pools: list[weakref.ref[Any]] = []
        monkeypatch.setattr(CudaGraphs, "failed", False)
        monkeypatch.setattr(CudaGraphs, "_pools", weakref.WeakSet())
        monkeypatch.setattr(CudaGraphs, "_for_good", [])
        for name, value in {
            "Stream": lambda device: self.own_stream(),
            "stream": lambda stream: nullcontext(),
            "current_stream": lambda: self.current,
            "MemPool": self.pool,
            "use_mem_pool": lambda pool: nullcontext(),
            "set_stream": lambda stream: setattr(self, "current", stream),
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
            "graph": self.graph,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def own_stream(self) -> Any:
        return SimpleNamespace(wait_stream=lambda other: None, device=self)

    def pool(self) -> Any:
        pool = Pool()
        self.pools.append(weakref.ref(pool))
        return pool

    @contextmanager
    def graph(self, graph: Any, pool: Any, stream: Any) -> Iterator[None]:
        self.tried, self.current = self.tried + 1, stream
        assert not gc.isenabled()
        try:
            yield
        finally:
            if self.tried > self.works:
                raise RuntimeError("operation failed due to a previous error during capture")


def test_after_a_capture_that_broke_off_no_other_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = HalfAGpu(monkeypatch)
    before = gpu.current
    with pytest.warns(RuntimeWarning, match="without CUDA graphs: operation failed due to a previous error"):
        assert Graphs()(torch.neg, torch.ones(2)).tolist() == [-1, -1]
    assert gpu.current is before
    with pytest.warns(RuntimeWarning, match="without CUDA graphs: an earlier capture failed in this process"):
        assert Graphs()(torch.neg, torch.ones(2)).tolist() == [-1, -1]
    assert gpu.tried == 1


def test_memory_of_graphs_is_given_back_but_not_after_a_capture_that_broke_off(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = HalfAGpu(monkeypatch, works=2)
    first, second = Graphs(), Graphs()
    for graphs in (first, second):
        graphs(torch.neg, torch.ones(2))
    del first, graphs
    gc.collect()
    assert [pool() is None for pool in gpu.pools] == [True, False]
    with pytest.warns(RuntimeWarning, match="without CUDA graphs"):
        Graphs()(torch.neg, torch.ones(2))
    del second
    gc.collect()
    assert [pool() is None for pool in gpu.pools] == [True, False, False] and gc.isenabled()


def test_an_interrupt_during_a_capture_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    HalfAGpu(monkeypatch)
    calls = []

    def interrupted(x: Tensor) -> Tensor:
        calls.append(x)
        if len(calls) == 4:  # after those that warm up
            raise KeyboardInterrupt
        return x

    with pytest.raises(KeyboardInterrupt):
        Graphs()(interrupted, torch.ones(2))


def test_memory_of_a_warm_up_that_failed_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = HalfAGpu(monkeypatch)

    def fails() -> Results:
        raise torch.OutOfMemoryError("CUDA out of memory")

    capture = CudaGraphs()
    with pytest.raises(torch.OutOfMemoryError):
        capture(fails)
    gc.collect()
    assert [pool() for pool in gpu.pools] == [None] and gpu.tried == 0 and not CudaGraphs.failed


def test_on_the_cpu_nothing_is_pinned() -> None:
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


class Launches(TorchDispatchMode):
    """Counts the calls that are a kernel or more on a GPU: all but allocations and views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        self.count += not (view or "empty" in func.name() or func.name() == "aten::detach")
        return func(*args, **(kwargs or {}))


def test_an_inner_step_is_few_kernels() -> None:
    """On a few images a GPU's time is their number. The path that it takes, of a ConvNet of three blocks."""
    network = models.build(ModelConfig(), (3, 32, 32), 3, seed=0)
    start, step = flat.flatten(network), provider(network, "dual", tile=0)

    def launches(steps: int) -> int:
        images, labels, batch = torch.ones(3, 3, 32, 32), torch.arange(3), torch.arange(3)
        plans = list(augment.draw(steps, 3, 32, 32, groups=augment.GROUPS, mode="one", generator=torch.Generator()))
        with Launches() as counted:
            matching_gradients(
                network, start, start + 1, images, labels, torch.tensor(0.1), [batch] * steps, plans, step=step
            )
        return counted.count

    launches(1)  # what is made once
    assert launches(3) - launches(2) <= 76  # forward and back; the plain graph of all steps has several hundred


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_kernels_run_beside_each_other_without_a_race(soft: bool, bf16: bool) -> None:
    p = problem(soft=soft)
    step = provider(p["network"], "dual", tile=0, bf16=bf16)
    wanted = matching_gradients(**p, step=step)
    with Streams(SIDES) as streams, side_streams(streams.sides):
        found = matching_gradients(**p, step=step)
    for got, exact in zip(found, wanted, strict=True):
        assert got is exact is None or torch.equal(got, exact)
    convolutions = sum("convolution" in name for name in streams.beside)
    # of both blocks the weights' gradients, here and along lambda, and forward and back by lambda's weights
    assert convolutions == len(p["batches"]) * 2 * (1 + 3)


@pytest.mark.parametrize("side", range(SIDES))
def test_a_wait_that_is_missing_would_be_seen(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    p, wait = problem(), Beside.wait
    step = provider(p["network"], "dual", tile=0)
    with Streams(SIDES) as streams, side_streams(streams.sides):
        missing = streams.sides[side]
        monkeypatch.setattr(Beside, "wait", lambda self: None if self._stream is missing else wait(self))
        seen = rf"does not wait for .* on side {side}|takes memory that .* on side {side} may still use"
        with pytest.raises(Race, match=seen):
            matching_gradients(**p, step=step)


@pytest.mark.parametrize("held", [True, False])
def test_memory_given_back_too_early_would_be_seen(held: bool) -> None:
    with Streams(SIDES) as streams, side_streams(streams.sides):
        beside, x = Beside(0), torch.ones(3)
        result = beside(torch.neg, x)
        if not held:
            beside._running.clear()
        del x
        with nullcontext() if held else pytest.raises(Race, match=r"main takes memory that aten::neg on side 0 may"):
            torch.ones(3)
            beside.wait()
            assert result.neg().tolist() == [1, 1, 1]


@pytest.mark.parametrize("name", ["dual", "fused", "autograd"])
@pytest.mark.parametrize("soft", [False, True])
def test_nobody_waits_within_an_unroll(name: str, soft: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(soft=soft)
    monkeypatch.setattr(unroll, "_may_be_read", lambda tensor: False)  # as on a GPU
    step = provider(p["network"], name)
    with NobodyWaits():
        matching_gradients(**p, step=step, checkpoint_every=2)


@pytest.mark.parametrize("name", ["bptt", "dc", "dsa", "dm", "sre2l"])
def test_nobody_waits_within_an_outer_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of methods that look at real images. Cafe asks for an accuracy after each epoch, and kip tells its own."""
    settings = Config(
        model=ModelConfig(width=8), distill=DistillConfig(real_batch=8, loops=2, inner_steps=3, inner_optimizer="adam")
    )
    dataset = data.load(settings.data)
    network = models.build(settings.model, dataset.shape, 10, seed=0)
    groups = augment.groups_for("auto", dataset.strategy)
    alone = Problem(settings, dataset, network, [], groups, torch.device("cpu"))
    method = METHODS.get(name)(replace(alone, teachers=[MadeUp.of(alone)]))
    start = synthetic.start(dataset, 2, "real", 0.01, 0)
    memory = method.update(start, 0, {}).memory  # what is made once
    monkeypatch.setattr(unroll, "_may_be_read", lambda tensor: False)  # as on a GPU
    for step in (1, 2):
        with NobodyWaits():
            memory = method.update(start, step, memory).memory


def test_waiting_would_be_seen() -> None:
    for wait in (lambda x: float(x.sum()), lambda x: x[x > 0], lambda x: bool((x > 0).any())):
        with pytest.raises(AssertionError, match="waits for the device"), NobodyWaits():
            wait(torch.arange(3))


def test_nobody_waits_when_pixels_move() -> None:
    held = Synthetic(torch.zeros(2, 1, 4, 4), torch.zeros(2, 3), torch.tensor(0.02))
    update = Update(torch.ones(()), torch.ones(2, 1, 4, 4), torch.ones(()), torch.ones(()), {}, torch.ones(2, 3))
    state = distill.State.begin(held)
    for optimizer in ("sgd", "adam"):
        with NobodyWaits():
            assert state.moved(update, DistillConfig(ema=0.5, optimizer=optimizer)).finite().dtype == torch.bool


def trained(device: str, recipe: training.Recipe, graphs: Callable[[], Graphs] | None) -> Tensor:
    """A network's parameters after training on batches of two sizes."""
    images = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    network, teacher = (models.build(ModelConfig(width=8), (1, 8, 8), 3, seed=seed).double() for seed in (0, 1))
    backend = training.Backend(torch.device(device), graphs=graphs)
    labels, draws = torch.arange(20) % 3, {"groups": augment.GROUPS, "mode": "all"}
    assert training.fit(network, images, labels, recipe, backend, seed=0, teacher=teacher.to(device).eval(), **draws)
    return flat.flatten(network)


RECIPES = {
    "momentum": training.Recipe(6, lr=0.05, momentum=0.9, weight_decay=0.01, batch=8, decay=True),
    "flat minima": training.Recipe(3, lr=0.05, batch=8, sharpness_radius=0.05, sharpness_weight=0.3),
    "adam": training.Recipe(6, lr=0.01, weight_decay=0.01, batch=8, decay=True, optimizer="adam"),
    "a teacher's answers": training.Recipe(4, lr=0.01, batch=8, optimizer="adamw", temperature=4.0, cutmix=True),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_graphs_train_to_the_same_bits(recipe: training.Recipe) -> None:
    recorder = Recorder()
    found, wanted = trained("cpu", recipe, lambda: Graphs(recorder)), trained("cpu", recipe, None)
    compiled = implementation("norm_relu_pool", "cpu")[0] != "pure PyTorch"  # else autograd trains, which has no graphs
    assert torch.equal(found, wanted) and recorder.captured == 2 * compiled


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_training_captured_on_a_gpu(recipe: training.Recipe) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a capture that failed
        found = trained("cuda", recipe, Graphs)
    torch.testing.assert_close(found, trained("cuda", recipe, None), rtol=1e-9, atol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["dual", "fused", "autograd"])
@pytest.mark.parametrize("soft", [False, True])
def test_captured_on_a_gpu(name: str, soft: bool) -> None:
    """The real capture, and no wait that CUDA itself would see."""
    device = torch.device("cuda")
    p = problem(soft=soft)
    p = {k: v.to(device) if isinstance(v, Tensor | torch.nn.Module) else v for k, v in p.items()}
    p["batches"] = [b.to(device) for b in p["batches"]]
    step, graphs = provider(p["network"], name), Graphs()
    wanted = matching_gradients(**p, step=step)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a capture that failed
        matching_gradients(**p, step=step, graphs=graphs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = matching_gradients(**p, step=step, graphs=graphs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for got, exact in zip(found, wanted, strict=True):
        assert got is exact is None or torch.allclose(got, exact, rtol=1e-9, atol=1e-12)
    assert flat.size(flat.layout(p["network"])) == len(found.end)
