"""``python -m ddpp.profile``: where the time and the memory of one outer step go, as tables and a picture.

Takes the options of ``ddpp.distill``. It needs no teachers: the student starts at random weights, and the target is a
tenth of each parameter away.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from ddpp import augment, cli, data, models, runs, seeds, synthetic
from ddpp.config import SECTIONS, Config
from ddpp.dual import ConvNetStep, Step
from ddpp.errors import UserError
from ddpp.gpu import Graphs, graphs_for
from ddpp.methods import METHODS
from ddpp.methods.ddpp import DDPP
from ddpp.models import flat
from ddpp.ops import convnet
from ddpp.unroll import Matching, matching_gradients, provider

#: What is left of a ConvNet's step, one operator, when the times are taken off that it tells of.
WAITING = "threads waiting for each other"
#: What an operator's time counts as, by the beginnings of its name.
ROOMS: dict[str, tuple[str, ...]] = {
    "products of matrices": ("aten::mm", "aten::addmm", "aten::bmm"),
    "torch's convolutions": ("aten::mkldnn_conv", "aten::convolution", "aten::cudnn_conv", "aten::_slow_conv"),
    "norm, activation, pooling": (
        *("ddpp::norm_relu_pool", "aten::native_group_norm", "aten::threshold", "aten::relu", "aten::clamp"),
        *("aten::avg_pool", "aten::max_pool", "aten::var", "aten::rsqrt"),
    ),
    "augmentation": ("ddpp::dsa", "aten::grid_sampler", "aten::affine_grid"),
    "matching loss": ("ddpp::match_loss",),
    WAITING: ("ddpp::convnet",),
    "copies and fills": (
        "aten::copy_",
        "aten::fill_",
        "aten::zero_",
        "aten::im2col",
        "aten::col2im",
        "aten::cat",
    ),
}
OTHER, OUTSIDE = "other operators", "outside operators"


Call = Callable[[Graphs | None], Matching]


class Profile(NamedTuple):
    """Milliseconds by room and megabytes by what they hold."""

    milliseconds: dict[str, float]
    megabytes: dict[str, float]
    total: float  # milliseconds of the step when nothing watches it


def room(operator: str) -> str:
    """The name in :data:`ROOMS` that an operator counts as."""
    return next((name for name, starts in ROOMS.items() if operator.startswith(starts)), OTHER)


def measure(call: Call, step: Step, device: torch.device, graphs: Graphs | None = None) -> Profile:
    """Times an outer step, its second and third call, and adds up what its provider of a step holds.

    Args:
        graphs: what replays its inner steps where nothing watches; a graph does not tell of its operators.
    """

    def timed(graphs: Graphs | None = None) -> float:
        began = time.perf_counter()
        call(graphs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1e3 * (time.perf_counter() - began)

    timed(graphs)
    total = timed(graphs)
    if graphs:
        timed()  # what the first call launched one by one makes
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    account = torch.zeros(len(convnet.TIMES) + len(convnet.BYTES), dtype=torch.float64)
    if isinstance(step, ConvNetStep):
        step.account = account
    with torch_profile(activities=activities) as profiler:
        watched = timed()
    if isinstance(step, ConvNetStep):
        step.account = None
    rooms = dict.fromkeys([*ROOMS, OTHER], 0.0)
    for event in profiler.key_averages():
        if event.device_type != DeviceType.CPU:
            continue  # a kernel, whose time its operator has too
        rooms[room(event.key)] += (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3
    stages = dict(zip(convnet.TIMES, (1e3 * account[: len(convnet.TIMES)]).tolist(), strict=True))
    rooms[WAITING] = max(0.0, rooms[WAITING] - sum(stages.values()))
    for name, spent in stages.items():
        rooms[name] = rooms.get(name, 0.0) + spent
    rooms[OUTSIDE] = max(0.0, watched - sum(rooms.values()))
    held = dict(zip(convnet.BYTES, (account[len(convnet.TIMES) :] / 1e6).tolist(), strict=True))
    return Profile(rooms, held, total)


def outer_step(config: Config, device: torch.device) -> tuple[Call, Step, dict[str, float]]:
    """One outer step as ``ddpp.distill`` would take it, its provider, and megabytes of what the unroll keeps."""
    settings, fused = config.distill, config.run.use_fused_kernels
    dataset = data.load(config.data)
    network = models.build(config.model, dataset.shape, len(dataset.classes), seed=config.run.seed).to(device)
    several, seed = settings.images_in_one, config.run.seed
    images = synthetic.start(dataset, settings.ipc, settings.init, settings.step_size, seed, several).to(device)
    draw = seeds.generator(config.run.seed, "profile")
    start = flat.flatten(network)
    noise = torch.randn(start.shape, generator=draw).to(device)
    count = len(images.images)
    size = min(settings.batch or count, count)
    batches = [torch.randperm(count, generator=draw)[:size].to(device) for _ in range(settings.inner_steps)]
    groups = augment.groups_for(config.augment.strategy, dataset.strategy)
    drawn = augment.draw(
        len(batches), size, *dataset.shape[1:], groups=groups, mode=config.augment.mode, generator=draw
    )
    step = provider(network, "auto" if fused else "autograd", tile=config.run.winograd, bf16=config.run.bf16)

    def call(graphs: Graphs | None = None) -> Matching:
        return matching_gradients(
            network,
            start,
            start * (1 + 0.1 * noise),
            images.images,
            images.labels,
            images.step_size,
            batches,
            list(drawn.to(device)),
            settings.epsilon or None,
            settings.engine,
            fused=fused,
            step=step,
            checkpoint_every=settings.keep_every,
            graphs=graphs,
        )

    states = -(-len(batches) // settings.keep_every) + 1
    kept = {"student's parameters": states * start.nbytes / 1e6} if settings.engine == "adjoint" else {}
    return call, step, kept


def table(title: str, rows: dict[str, float], unit: str) -> str:
    """Markdown, the largest first, with each row's share."""
    total = sum(rows.values()) or 1.0
    ordered = sorted(rows.items(), key=lambda row: -row[1])
    lines = [f"| {name} | {value:.1f} | {value / total:.0%} |" for name, value in ordered if value >= total / 1000]
    return "\n".join([f"| {title} | {unit} | share |", "|---|---|---|", *lines])


def draw(found: Profile, path: Path) -> None:
    """Bars of the two tables, one beside the other."""
    panels = [(found.milliseconds, "milliseconds"), (found.megabytes, "megabytes held between steps")]
    figure = Figure(figsize=(13, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, (rows, title) in zip(axes, panels, strict=True):
        ordered = sorted((value, name) for name, value in rows.items() if value > 0)[-12:]
        axis.barh([name for _, name in ordered], [value for value, _ in ordered])
        axis.set_title(title)
        axis.grid(axis="x", alpha=0.3)
    runs.write_figure(path, figure)


def _run(config: Config, args: argparse.Namespace) -> None:
    device, method = cli.device(config), METHODS.get(config.distill.method)
    if not issubclass(method, DDPP):
        raise UserError(f"the step that is shown is one of ddpp or mtt, and {config.distill.method} has another")
    method.check(config)
    call, step, kept = outer_step(config, device)
    found = measure(call, step, device, graphs_for(config.run, device))
    found = found._replace(megabytes={**found.megabytes, **kept})
    settings = config.distill
    of_a_class = settings.ipc * settings.images_in_one
    print(
        f"{config.data.dataset}, {settings.method}, {of_a_class} images a class, {settings.inner_steps} inner steps, "
        f"engine {settings.engine}, {type(step).__name__}, {torch.get_num_threads()} threads: {found.total:.0f} ms\n"
    )
    print(table("time, longer by what watching takes", found.milliseconds, "ms"))
    print()
    print(table("memory held between steps", found.megabytes, "MB"))
    print(f"\npeak memory of the process: {runs.peak_memory_mb(device):.0f} MB")
    draw(found, Path(args.out))
    print(f"written: {args.out}")


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(
        "profile",
        "Show where the time and memory of an outer step go.",
        "distill",
        SECTIONS,
        _run,
        argv,
        arguments=lambda parser: parser.add_argument(
            "--out", metavar="FILE", default="profile.png", help="Where the picture goes (default: profile.png)."
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
