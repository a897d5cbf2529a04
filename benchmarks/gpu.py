"""The fused operators and the outer step on one GPU, against the bandwidth of copying and against PyTorch.

    python benchmarks/gpu.py --out benchmarks/results/2026-01-01-device.json

Prints Markdown tables and writes the same as JSON: operators with their share of the bandwidth of copying; the vendor's
convolution in two layouts; trainings; outer steps in float32, in TF32 and with planes in bfloat16, with CUDA graphs on
one stream and on several, and without, their memory, and how far their pixels' gradient is from float64's; and at last,
since a profiler slows what follows it, where the time of an outer step goes, by kernel. ``--search``: outer steps and
convolutions alone, with the fastest of the vendor's algorithms searched for each shape. It takes a process of its own,
since cuDNN's plans stay: what was once called without a search is never searched. ``--parts``: some of the rows.
Every side of a case runs in turn, the second-level cache is emptied before each call, and the median of the
device's own clock is taken. ``--small --device cpu`` tries the script where there is no GPU; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gc
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import bench_match_loss
import bench_norm_pool
import bench_outer_step
import torch
import torch.nn.functional as F
from bench_outer_step import Case, gradients
from machine import processor
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ddpp import augment, models, training
from ddpp.config import ModelConfig
from ddpp.gpu import CudaGraphs, Graphs
from ddpp.ops import convnet, dsa_augment, masked_match_loss
from ddpp.ops import dsa as in_torch
from ddpp.ops import head as head_op
from ddpp.ops import norm_pool as faces
from ddpp.ops._library import using
from ddpp.ops._streams import SIDES
from ddpp.ops.head import Linear
from ddpp.training import Backend, Recipe
from ddpp.unroll import Gradients, provider

Side = Callable[[], object]
ROUNDS = 15
CACHE = 256 * 2**20  # bytes, larger than any second-level cache
AHEAD = 2_000_000  # cycles of the device, about a millisecond
KERNELS = 15  # of a profile, the slowest ones
OUTER_STEPS = {"IPC 1, J = 50": Case(1, 10, 50), "batch 100, J = 30": Case(10, 100, 30)}
PRECISIONS = {"float32": False, "TF32": True}
STREAMS = 32  # of torch's pool; cuBLAS keeps memory for each that it has worked on
IN_CACHE = {"head"}  # operators whose operands a step has just written
SMALL_OUTER_STEPS = {"IPC 1, J = 2": Case(1, 10, 2)}


class Clock:
    """Milliseconds of a call on a device, with cold caches or with what the call before left there."""

    def __init__(self, device: torch.device, small: bool) -> None:
        self.device = device
        self.cache = torch.zeros((2**20 if small else CACHE) // 4, device=device)

    def __call__(self, call: Side, ahead: bool, cold: bool) -> float:
        if cold:
            self.cache.sum()  # read, not written: what is written may reach the memory while the call runs
        if self.device.type != "cuda":
            began = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - began)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if ahead:
            torch.cuda._sleep(AHEAD)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    def medians(
        self, sides: dict[str, Side], rounds: int = ROUNDS, ahead: bool = True, cold: bool = True
    ) -> dict[str, float]:
        """By side; with ``ahead`` the device begins when the host has launched most of a call, and waits for nobody."""
        for call in sides.values():
            call()
            call()
        found = [{name: self(call, ahead, cold) for name, call in sides.items()} for _ in range(rounds)]
        return {name: statistics.median(row[name] for row in found) for name in sides}


def copying(clock: Clock, small: bool) -> float:
    """Bytes a millisecond, read and written."""
    source = torch.randn(2**20 if small else 2**28, device=clock.device)  # 1 GiB of float32
    target = torch.empty_like(source)
    return 2 * source.nbytes / clock.medians({"copy": lambda: target.copy_(source)})["copy"]


def match_loss(device: torch.device, small: bool) -> dict[str, tuple[int, dict[str, Side]]]:
    """By case the bytes that must move and the sides."""
    p = 10_000 if small else bench_match_loss.SIZES["100M"]
    student, target, start = (x.to(device) for x in bench_match_loss.vectors(p))
    plain = bench_match_loss.pytorch
    functions = {
        "fused": lambda x: masked_match_loss(x, target, start)[0],
        "pytorch": lambda x: plain(x, target, start),
        "compile": lambda x: bench_match_loss.implementation("compile")(x, target, start),
    }

    def backward(function: Callable[[Tensor], Tensor]) -> Side:
        leaf = student.detach().requires_grad_()
        loss = function(leaf)
        return lambda: torch.autograd.grad(loss, leaf, retain_graph=True)

    forward: dict[str, Side] = {name: (lambda f=f: f(student)) for name, f in functions.items()}
    return {
        f"match loss, P = {p:,}, forward": (12 * p, forward),
        f"match loss, P = {p:,}, backward": (12 * p, {name: backward(f) for name, f in functions.items()}),
    }


def dsa(device: torch.device, small: bool) -> dict[str, tuple[int, dict[str, Side]]]:
    """All groups at once, and each alone: distillation draws one a step."""
    cases = {}
    for name, groups in {"all groups": augment.GROUPS, **{group: (group,) for group in augment.GROUPS}}.items():
        cases |= _dsa_of(name, groups, device, small)
    return cases


def _dsa_of(
    name: str, groups: tuple[str, ...], device: torch.device, small: bool
) -> dict[str, tuple[int, dict[str, Side]]]:
    n, size = (8, 32) if small else (500, 64)
    draw = torch.Generator().manual_seed(0)
    plan = augment.draw(1, n, size, size, groups=groups, mode="all", generator=draw)[0].to(device)
    images = torch.randn(n, 3, size, size, generator=draw).to(device)
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "fused": lambda x: dsa_augment(x, plan),
        "pytorch": lambda x: in_torch.reference(x, plan, groups),  # need not look at the plan, and wait
    }
    if groups == augment.GROUPS:  # compiling all seven would take longer than the rest of the script's operators
        functions["compile"] = torch.compile(functions["pytorch"], fullgraph=True)

    def backward(function: Callable[[Tensor], Tensor]) -> Side:
        leaf = images.detach().requires_grad_()
        augmented = function(leaf)
        return lambda: torch.autograd.grad(augmented, leaf, images, retain_graph=True)

    forward: dict[str, Side] = {name: partial(f, images) for name, f in functions.items()}
    forward["copy"] = images.clone  # which of so few bytes is slower than of many
    moved = 2 * images.nbytes
    name = f"DSA, {name}, {n}x3x{size}x{size}"
    return {
        f"{name}, forward": (moved, forward),
        f"{name}, adjoint": (moved, {side: backward(f) for side, f in functions.items()}),
    }


def norm_pool(device: torch.device, small: bool) -> dict[str, tuple[int, dict[str, Side]]]:
    shape = (4, 8, 8, 8) if small else (256, 128, 32, 32)
    bench_norm_pool.SHAPES["device"] = shape
    values = tuple(x.to(device) for x in bench_norm_pool.arguments("device", "channels-last"))
    plane = 4 * shape[0] * shape[1] * shape[2] * shape[3]
    cases = {}
    for passes, run in (("forward", bench_norm_pool.forward), ("forward+backward", bench_norm_pool.forward_backward)):
        sides: dict[str, Side] = {
            name: (lambda run=run, name=name: run(bench_norm_pool.implementation(name), values))
            for name in ("fused", "pytorch", "compile")
        }
        cases[passes] = int(bench_norm_pool.PLANES[passes] * plane), sides
    second: dict[str, Side] = {
        "fused": lambda: bench_norm_pool.dual(values),
        "pytorch": lambda: bench_norm_pool.unrolled(bench_norm_pool.plain, values),
    }
    cases["second order"] = int(bench_norm_pool.PLANES["second order"] * plane), second
    cases |= {name: (int(planes * plane), {"fused": call}) for name, (planes, call) in single_faces(values).items()}
    return {f"norm-ReLU-pool, {'x'.join(map(str, shape))}, {passes}": case for passes, case in cases.items()}


def norm_pool_layers(device: torch.device, small: bool) -> dict[str, tuple[int, dict[str, Side]]]:
    """Each face alone at the layers of a ConvNet on 32x32 images, of a hundred and of ten."""
    cases: dict[str, tuple[int, dict[str, Side]]] = {}
    for n, side in ((2, 4),) if small else itertools.product((100, 10), (32, 16, 8)):
        shape = bench_norm_pool.SHAPES["layer"] = n, 8 if small else 128, side, side
        bench_norm_pool.arguments.cache_clear()  # they go by the name
        values = tuple(x.to(device) for x in bench_norm_pool.arguments("layer", "channels-last"))
        for name, (planes, call) in single_faces(values).items():
            moved = int(planes * 4 * math.prod(shape))
            cases[f"norm-ReLU-pool, {'x'.join(map(str, shape))}, {name}"] = moved, {"fused": call}
    return cases


def single_faces(values: tuple[Tensor, ...]) -> dict[str, tuple[float, Side]]:
    """Each face alone, into memory that is there: full-size planes moved, and the call."""
    y, y_tangent, grad, grad_tangent, scale, shift, scale_tangent, shift_tangent = values
    point = y, y_tangent, scale, scale_tangent, shift
    out, dual_out = faces.norm_relu_pool_forward(y, scale, shift), faces.norm_relu_pool_dual(*point, shift_tangent)
    plain, dual = (grad, y, scale, shift, out.statistics), (grad, grad_tangent, *point, dual_out.statistics)
    back, dual_back = faces.norm_relu_pool_backward(*plain), faces.norm_relu_pool_dual_backward(*dual)
    return {
        "forward alone": (1.25, lambda: faces.norm_relu_pool_forward(y, scale, shift, out=out)),
        "backward alone": (2.25, lambda: faces.norm_relu_pool_backward(*plain, out=back)),
        "dual alone": (2.5, lambda: faces.norm_relu_pool_dual(*point, shift_tangent, out=dual_out)),
        "dual backward alone": (4.5, lambda: faces.norm_relu_pool_dual_backward(*dual, out=dual_back)),
    }


def head(device: torch.device, small: bool) -> dict[str, tuple[int, dict[str, Side]]]:
    """The linear layer under its cross-entropy on dual numbers, there and back: kernels, and the library."""
    cases: dict[str, tuple[int, dict[str, Side]]] = {}
    for n, features, classes in [(2, 8, 3)] if small else [(10, 2048, 10), (100, 2048, 10), (100, 2048, 20)]:
        draw = torch.Generator().manual_seed(0)
        shapes = (2 * n, features), (classes, features), (classes,), (classes, features), (classes,), (n, classes)
        x, *layer, logits = (torch.randn(shape, generator=draw).to(device) for shape in shapes)
        linear, tangent, out = Linear(*layer[:2]), Linear(*layer[2:]), Linear(*map(torch.empty_like, layer[:2]))
        moved = 4 * features * (4 * n + 3 * classes)
        sides: dict[str, Side] = {
            side: partial(_dual_head, backend, x, linear, tangent, out, logits.softmax(1))
            for side, backend in (("fused", "compiled"), ("pytorch", "reference"))
        }
        cases[f"linear layer and cross-entropy, dual, {n}x{features}x{classes}"] = moved, sides
    return cases


def _dual_head(backend: str, x: Tensor, linear: Linear, tangent: Linear, out: Linear, targets: Tensor) -> None:
    n, phis = len(targets), targets.new_empty(len(targets))
    with using(backend):
        cotangents = head_op.dual_cotangents(x, linear, tangent, targets, n, phis)
        head_op.gradients(cotangents, x, linear.weight, tangent.weight, out)


def convolutions(clock: Clock, small: bool) -> Iterator[dict[str, Any]]:
    """The vendor's convolution, with its two gradients, of the second layer: in the fused step's layout and torch's."""
    for batch in (2,) if small else (10, 100, 200):
        shape = (batch, 8, 4, 4) if small else (batch, 128, 16, 16)
        x, grad = torch.randn(shape, device=clock.device), torch.randn(shape, device=clock.device)
        weight = torch.randn(shape[1], shape[1], 3, 3, device=clock.device)
        for precision in _precisions(clock.device):
            sides = {
                "fused": _convolution(x, weight, grad, torch.channels_last),
                "pytorch": _convolution(x, weight, grad, torch.contiguous_format),
            }
            name = "x".join(map(str, shape))
            yield {"case": f"convolution and gradients, {name}, {precision}", "ms": clock.medians(sides, 5)}


def _convolution(x: Tensor, weight: Tensor, grad: Tensor, layout: torch.memory_format) -> Side:
    x, weight, grad = (t.contiguous(memory_format=layout) for t in (x, weight, grad))

    def call() -> None:
        F.conv2d(x, weight, padding=1)
        torch.ops.aten.convolution_backward(
            grad, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False]
        )

    return call


def trainings(clock: Clock, small: bool) -> Iterator[dict[str, Any]]:
    """Of a network on a synthetic set of ten images, as in an evaluation, and on batches of many, as of teachers."""
    for n, epochs in ((10, 2), (20, 1)) if small else ((10, 200), (5120, 10)):
        steps, batch = epochs * -(-n // Recipe.batch), min(n, Recipe.batch)
        for precision in _precisions(clock.device):
            found = clock.medians(_training(n, epochs, clock.device), 1 if small else 3, ahead=False)
            yield {"case": f"training, {steps} steps of {batch} images, {precision}", "ms": found}


def _training(n: int, epochs: int, device: torch.device) -> dict[str, Side]:
    images = torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
    labels, network = torch.arange(n) % 10, models.build(ModelConfig(), (3, 32, 32), 10, seed=0)

    def fit(graphs: bool) -> None:
        backend = Backend(device, graphs=Graphs if graphs and device.type == "cuda" else None)
        training.fit(network, images, labels, Recipe(epochs, 0.01), backend, seed=0, groups=augment.GROUPS)

    return {"fused": lambda: fit(True), "without CUDA graphs": lambda: fit(False)}


def _precisions(device: torch.device) -> Iterator[str]:
    """Names of :data:`PRECISIONS`, each while it holds. On a CPU they are all the same."""
    searched = ", algorithms searched" if torch.backends.cudnn.benchmark else ""
    for name, tf32 in PRECISIONS.items() if device.type == "cuda" else [("float32", False)]:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        yield name + searched
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def _problems(device: torch.device, small: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, case in (SMALL_OUTER_STEPS if small else OUTER_STEPS).items():
        yield name, {key: _moved(value, device) for key, value in case.problem().items()}


def outer_steps(clock: Clock, small: bool) -> Iterator[dict[str, Any]]:
    """A row for each case and precision. The same precision holds for all sides."""
    device = clock.device
    for name, problem in _problems(device, small):
        exact = gradients(_in_float64(problem), engine="unrolled", fused=False)
        for precision in _precisions(device):
            memory = _peaks(_sides(problem), device)
            sides = {side: make() for side, make in _sides(problem).items()}
            yield {
                "case": f"outer step, {name}, {precision}",
                "ms": clock.medians(sides, 1 if small else 5, ahead=False),
                "memory_mb": memory,
                "one_minus_cosine": {side: _turned(call(), exact) for side, call in sides.items()},
            }


def profiles(device: torch.device, small: bool) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Of both sides of each row of :func:`outer_steps`, the kernels."""
    for name, problem in _problems(device, small):
        for precision in _precisions(device):
            for side in ("pytorch", "fused"):
                yield f"outer step, {name}, {precision}, {side}", by_kernel(_sides(problem)[side](), device)


def _sides(problem: dict[str, Any]) -> dict[str, Callable[[], Callable[[], Gradients]]]:
    """What makes the reference, every step a graph of autograd, and the adjoint engine in seven forms."""
    on_gpu = problem["start"].is_cuda

    def adjoint(graphs: bool = True, bf16: bool = False, sides: int = SIDES) -> Callable[[], Gradients]:
        step = provider(problem["network"], "dual", bf16=bf16)
        captured = Graphs(CudaGraphs(sides)) if graphs and on_gpu else None
        return lambda: gradients(problem, step=step, graphs=captured)

    return {
        "pytorch": lambda: _as_published(bench_outer_step.side(bench_outer_step.REFERENCE, problem), problem["plans"]),
        "fused": adjoint,
        "on one stream": lambda: adjoint(sides=0),
        "without CUDA graphs": lambda: adjoint(graphs=False),
        "bf16 planes": lambda: adjoint(bf16=True),
        "convolutions in NCHW": lambda: _converting(adjoint()),
        "gradients by forward convolutions": lambda: _turning(adjoint()),
    }


def _converting(call: Callable[[], Gradients]) -> Callable[[], Gradients]:
    """With every convolution in torch's layout between two conversions: whether the vendor's are faster there by more.

    Weights are converted too, which a step made for that layout would not need to.
    """

    def converted(convolve: Callable[..., Any]) -> Callable[..., Any]:
        def run(*tensors: Any, **options: Any) -> Any:
            found = convolve(*(x.contiguous() if isinstance(x, Tensor) else x for x in tensors), **options)
            several = found if isinstance(found, tuple) else (found,)
            there = [x if x is None else x.contiguous(memory_format=torch.channels_last) for x in several]
            return tuple(there) if isinstance(found, tuple) else there[0]

        return run

    def run() -> Gradients:
        with (
            mock.patch.object(convnet.F, "conv2d", converted(F.conv2d)),
            mock.patch.object(convnet, "_convolution_backward", converted(convnet._convolution_backward)),
        ):
            return call()

    return run


def _turning(call: Callable[[], Gradients]) -> Callable[[], Gradients]:
    """With the gradients of inputs as forward convolutions by the weights turned round, which have faster kernels.

    Weights are turned at every call, which a step made for it would do once for all layers. Padding is 1.
    """

    def turned(grad: Tensor, x: Tensor, weight: Tensor, padding: tuple[int, int], of: tuple[bool, bool]) -> Any:
        around = weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)
        d_weight = plain(grad, x, weight, padding, (False, True))[1] if of[1] else None
        return (F.conv2d(grad, around, padding=padding) if of[0] else None), d_weight

    plain = convnet._convolution_backward

    def run() -> Gradients:
        with mock.patch.object(convnet, "_convolution_backward", turned):
            return call()

    return run


def _as_published(call: Callable[[], Gradients], plans: list[Tensor]) -> Callable[[], Gradients]:
    """As published codes run, with any of the vendor's algorithms: they do not ask for the same bits each time.

    Nor do they ask the device which groups of the augmentation are on, since the host draws them.
    """
    groups = {id(plan): in_torch._groups_on(plan) for plan in plans}

    def run() -> Gradients:
        torch.backends.cudnn.deterministic = False
        try:
            with mock.patch.object(in_torch, "_groups_on", lambda plan: groups[id(plan)]):
                return call()
        finally:
            torch.backends.cudnn.deterministic = True

    return run


def by_kernel(call: Side, device: torch.device) -> list[dict[str, Any]]:
    """All kernels of a call, and those that take most of it: name, how often, milliseconds in all and their share."""
    on_gpu = device.type == "cuda"
    call()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        call()
        if on_gpu:
            torch.cuda.synchronize(device)
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU  # the host's launches are in the list as well
    found = [
        (event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.count, event.key)
        for event in profiler.key_averages()
        if event.device_type == kind
    ]
    total = sum(time_ for time_, _, _ in found) or 1.0
    slowest = [(total, sum(n for _, n, _ in found), "all"), *sorted(found, reverse=True)[:KERNELS]]
    return [{"kernel": key, "calls": n, "ms": time_ / 1e3, "share": time_ / total} for time_, n, key in slowest]


def _turned(found: Gradients, exact: Gradients) -> float:
    """1 - cosine of the pixels' gradient to the exact one."""
    return 1 - float(F.cosine_similarity(found.images.double().flatten(), exact.images.flatten(), dim=0))


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, list):
        return [_moved(v, device) for v in value]
    return value.to(device) if isinstance(value, (Tensor, torch.nn.Module)) else value


def _in_float64(problem: dict[str, Any]) -> dict[str, Any]:
    cast = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in problem.items()}
    return {**cast, "network": copy.deepcopy(problem["network"]).double()}


STEPS: dict[str, Callable[[Clock, bool], Iterator[dict[str, Any]]]] = {
    "outer_steps": outer_steps,
    "convolutions": convolutions,
    "trainings": trainings,
}
OPERATORS: dict[str, Callable[[torch.device, bool], dict[str, tuple[int, dict[str, Side]]]]] = {
    "match_loss": match_loss,
    "dsa": dsa,
    "norm_pool": norm_pool,
    "norm_pool_layers": norm_pool_layers,
    "head": head,
}
PARTS = "outer_steps", "head", "dsa", "norm_pool", "norm_pool_layers", "match_loss", "convolutions", "trainings"


def rows(clock: Clock, speed: float, small: bool, parts: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Each row of the table. A part that fails is a row that says so; the others are measured all the same."""
    for part in parts:
        try:
            yield from STEPS[part](clock, small) if part in STEPS else _operators(clock, speed, small, part)
        except Exception as error:
            yield {"case": part, "error": f"{type(error).__name__}: {error}"}


def _operators(clock: Clock, speed: float, small: bool, part: str) -> Iterator[dict[str, Any]]:
    for name, (moved, sides) in OPERATORS[part](clock.device, small).items():
        rounds = 3 if small else ROUNDS
        found = clock.medians(sides, rounds)
        share = moved / found["fused"] / speed
        if part in IN_CACHE:
            warm = {side: clock.medians({side: call}, rounds, cold=False)[side] for side, call in sides.items()}
            found |= {f"{side}, in cache": ms for side, ms in warm.items()}
        yield {"case": name, "ms": found, "share_of_copying": share}


def measure(device: torch.device, small: bool, parts: Sequence[str], out: Path | None) -> dict[str, Any]:
    """Prints rows and writes the file as they come, so that what was measured stays where the script is cut."""
    clock = Clock(device, small)
    speed = copying(clock, small)
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "copying_gb_s": speed / 1e6,
        "rows": [],
        "profiles": {},
    }

    def save() -> None:
        if out:
            out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    for row in rows(clock, speed, small, parts):
        print(_line(row), flush=True)
        result["rows"].append(row)
        save()
    print(f"\n{result['device']}, torch {result['torch']}, copying {result['copying_gb_s']:.0f} GB/s, {result['date']}")
    for name, kernels in profiles(device, small) if "outer_steps" in parts else ():
        print(_profile_table(name, kernels), flush=True)
        result["profiles"][name] = kernels
        save()
    return result


def _peaks(sides: dict[str, Callable[[], Side]], device: torch.device) -> dict[str, float] | None:
    """Peak of the memory that torch takes for a side, MB: a graph's is taken, though no tensor holds it any more.

    Without cuBLAS's workspaces, which every stream has for itself and for good.
    """
    if device.type != "cuda":
        return None
    factor, found = torch.ones(64, 64, device=device), {}
    for stream in (torch.cuda.Stream(device) for _ in range(STREAMS)):
        with torch.cuda.stream(stream):
            factor @ factor
    torch.cuda.synchronize(device)
    for name, make in sides.items():
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call = make()
        call()
        peaks = torch.cuda.max_memory_reserved(device), torch.cuda.max_memory_allocated(device)
        # Both: what was reserved before need not be reserved again.
        found[name] = max(peak - start for peak, start in zip(peaks, before, strict=True)) / 1e6
        del call
    return found


def _line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"| {row['case']} | failed: {' '.join(row['error'].split())[:200]} | | | |"
    ms = row["ms"]
    others = [f"{ms[o]:.3g} ms ({ms[o] / ms['fused']:.1f}x)" if o in ms else "" for o in ("pytorch", "compile")]
    notes = [f"{100 * row['share_of_copying']:.0f} % of copying"] if "share_of_copying" in row else []
    notes += [f"{side} {value:.3g} ms" for side, value in ms.items() if side not in ("fused", "pytorch", "compile")]
    notes += [f"{name} {value:.0f} MB" for name, value in (row.get("memory_mb") or {}).items()]
    notes += [f"{name} 1 - cos {value:.1e}" for name, value in row.get("one_minus_cosine", {}).items()]
    return f"| {row['case']} | {ms['fused']:.3g} ms | {others[0]} | {others[1]} | {', '.join(notes)} |"


def _profile_table(name: str, kernels: list[dict[str, Any]]) -> str:
    rows = [f"| `{k['kernel'][:90]}` | {k['calls']} | {k['ms']:.3f} | {k['share']:.0%} |" for k in kernels]
    return "\n".join([f"\n{name}, by kernel\n", "| kernel | calls | ms | share |", "|---|---|---|---|", *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="toy sizes, to try the script")
    parser.add_argument("--search", action="store_true", help="search algorithms; outer steps and convolutions alone")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="these rows alone, in this order")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    torch._functorch.config.donated_buffer = False  # a compiled backward is called again and again
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True  # as every stage sets it
    print("| | fused | pure PyTorch | torch.compile | |\n|---|---|---|---|---|")
    torch.backends.cudnn.benchmark = args.search
    parts = args.parts or (("outer_steps", "convolutions") if args.search else PARTS)
    result = measure(torch.device(args.device), args.small, parts, args.out)
    if failed := [row["case"] for row in result["rows"] if "error" in row]:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
