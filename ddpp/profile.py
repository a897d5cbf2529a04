"""``python -m ddpp.profile``: where the time and the memory of one outer step go, as tables and a picture.

Takes the options of ``ddpp.distill``, and any of its methods that takes outer steps. It needs no teachers: students
start at random weights, and the target is a tenth of each parameter away.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from ddpp import cli, distill, runs, seeds, synthetic
from ddpp.config import SECTIONS, Config
from ddpp.dual import ConvNetStep
from ddpp.errors import UserError
from ddpp.gpu import Graphs, graphs_for
from ddpp.methods import Problem
from ddpp.methods.bptt import BPTT
from ddpp.methods.ddpp import DDPP
from ddpp.models import flat
from ddpp.ops import convnet
from ddpp.optimizers import OPTIMIZERS
from ddpp.trajectories import Trajectory
from ddpp.unroll import AutogradStep

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


class Profile(NamedTuple):
    """Milliseconds by room and megabytes by what they hold."""

    milliseconds: dict[str, float]
    megabytes: dict[str, float]
    total: float  # milliseconds of the step when nothing watches it


def room(operator: str) -> str:
    """The name in :data:`ROOMS` that an operator counts as."""
    return next((name for name, starts in ROOMS.items() if operator.startswith(starts)), OTHER)


def measure(steps: OuterSteps, device: torch.device, graphs: Graphs | None = None) -> Profile:
    """Times the second outer step, watches a later one, and adds up what the provider of its inner steps holds.

    Args:
        graphs: what replays its inner steps where nothing watches; a graph does not tell of its operators.
    """

    def timed(graphs: Graphs | None = None) -> float:
        began = time.perf_counter()
        steps(graphs)
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
    if isinstance(steps.provider, ConvNetStep):
        steps.provider.account = account
    with torch_profile(activities=activities) as profiler:
        watched = timed()
    if isinstance(steps.provider, ConvNetStep):
        steps.provider.account = None
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
    return Profile(rooms, {**held, **steps.kept}, total)


class OuterSteps:
    """Outer steps as ``ddpp.distill`` takes them, one at each call, under teachers that are made up.

    Attributes:
        provider: of inner steps, or None of methods that have none.

    Raises:
        UserError: the options cannot work together, or the method takes no outer steps.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self.settings = config.distill
        problem, method, first, space = distill.prepare(config, device)
        if hasattr(method, "choose"):
            raise UserError(f"--method {self.settings.method} takes no outer steps, of which one could be shown")
        if method.needs_teachers:
            method = type(method)(replace(problem, teachers=[MadeUp.of(problem)]))
        if self.settings.labels == "soft":
            first = synthetic.with_soft_labels(first, len(problem.dataset.classes))
        self.method, self.state = method, distill.State.begin(first, space)
        step = getattr(method, "step", None)
        self.provider = step if isinstance(step, ConvNetStep | AutogradStep) else None

    def __call__(self, graphs: Graphs | None = None) -> None:
        """Takes one, whose inner steps are replayed by ``graphs`` where they are given and the method can."""
        if isinstance(self.method, DDPP | BPTT):
            self.method.graphs = graphs
        self.state, _ = distill.outer_step(self.state, self.method, self.settings)

    @property
    def kept(self) -> dict[str, float]:
        """Megabytes of what the unroll keeps from its way there for its way back."""
        settings = self.settings
        if not isinstance(self.method, DDPP | BPTT) or settings.engine == "unrolled":
            return {}
        states = -(-settings.inner_steps // settings.keep_every) + 1
        state = OPTIMIZERS[settings.inner_optimizer].begin(flat.flatten(self.method.problem.network))
        return {"student's parameters": states * state.nbytes / 1e6}


@dataclass(frozen=True)
class MadeUp(Trajectory):
    """A teacher that goes from random weights, the same at each epoch, to a tenth of each parameter away."""

    start: Tensor  # [P]
    target: Tensor  # [P]

    @classmethod
    def of(cls, problem: Problem) -> MadeUp:
        start = flat.flatten(problem.network).cpu()
        noise = torch.randn(start.shape, generator=seeds.generator(problem.config.run.seed, "profile"))
        epochs, layout = problem.config.teachers.epochs, flat.layout(problem.network)
        return cls(Path("made up"), epochs, layout, {}, start, start * (1 + 0.1 * noise))

    def rows(self, start: int, target: int) -> tuple[Tensor, Tensor]:
        """The same two, whatever is asked for. [P], [P]"""
        return self.start, self.target


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
    device = cli.device(config)
    steps = OuterSteps(config, device)
    found = measure(steps, device, graphs_for(config.run, device))
    print(f"{_described(config, steps)}, {torch.get_num_threads()} threads: {found.total:.0f} ms\n")
    print(table("time, longer by what watching takes", found.milliseconds, "ms"))
    print()
    print(table("memory held between steps", found.megabytes, "MB"))
    print(f"\npeak memory of the process: {runs.peak_memory_mb(device):.0f} MB")
    draw(found, Path(args.out))
    print(f"written: {args.out}")


def _described(config: Config, steps: OuterSteps) -> str:
    settings = config.distill
    words = [config.data.dataset, settings.method, f"{settings.ipc * settings.images_in_one} images a class"]
    if isinstance(steps.method, DDPP | BPTT):
        words += [f"{settings.inner_steps} inner steps", f"engine {settings.engine}"]
    return ", ".join([*words, *([type(steps.provider).__name__] if steps.provider else [])])


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
