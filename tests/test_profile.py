"""The profile adds up, names what it measured, and draws it."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_gpu import Recorder
from torch.autograd import DeviceType

from ddpp import models, profile
from ddpp.config import Config, DistillConfig, ModelConfig
from ddpp.gpu import Graphs
from ddpp.ops import convnet
from ddpp.ops._library import implementation
from ddpp.unroll import Gradients, matching_gradients

CPU = torch.device("cpu")
TOY = ["--width", "8", "--inner-steps", "3", "--threads", "1"]


@pytest.mark.parametrize(
    ("operator", "room"),
    [
        ("ddpp::convnet_adjoint", profile.WAITING),
        ("aten::addmm", "products of matrices"),
        ("aten::native_group_norm_backward", "norm, activation, pooling"),
        ("aten::softmax", profile.OTHER),
    ],
)
def test_rooms(operator: str, room: str) -> None:
    assert profile.room(operator) == room


@pytest.mark.parametrize("engine", ["adjoint", "unrolled"])
def test_what_is_measured(engine: str) -> None:
    config = Config(model=ModelConfig(width=8), distill=DistillConfig(inner_steps=4, keep_every=2, engine=engine))
    steps = profile.OuterSteps(config, CPU)
    found = profile.measure(steps, CPU)
    assert found.total > 0 and set(found.milliseconds) == {
        *profile.ROOMS,
        *convnet.TIMES,
        profile.OTHER,
        profile.OUTSIDE,
    }
    assert all(value >= 0 for value in found.milliseconds.values())
    if engine == "adjoint":  # theta_0, theta_2 and theta_4
        parameters = models.flat.size(models.flat.layout(steps.method.problem.network))
        assert found.megabytes["student's parameters"] == pytest.approx(3 * 4e-6 * parameters)
        assert found.milliseconds["norm, activation, pooling"] > 0
        if implementation("convnet_adjoint", "cpu")[0] == "C++":
            assert found.megabytes["planes"] > 0 and found.milliseconds["gradients of weights"] > 0


def test_inner_steps_may_be_replayed_where_nothing_watches() -> None:
    config, recorder = Config(model=ModelConfig(width=8), distill=DistillConfig(inner_steps=3)), Recorder()
    found = profile.measure(profile.OuterSteps(config, CPU), CPU, Graphs(recorder))
    assert recorder.captured == 2 and found.milliseconds["norm, activation, pooling"] > 0


@pytest.mark.parametrize(
    "options",
    [
        {"prune": "difference"},
        {"nearest_step": True},
        {"lr_importance": 1.0},
        {"labels": "soft"},
        {"parameterization": "frequencies", "images_in_one": 2},
    ],
    ids=lambda options: next(iter(options)),
)
def test_the_step_is_the_one_that_distil_takes(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def watch(*args: Any, **kwargs: Any) -> Gradients:
        seen.update(kwargs, images=args[3], labels=args[4])
        return matching_gradients(*args, **kwargs)

    monkeypatch.setattr("ddpp.methods.ddpp.matching_gradients", watch)
    steps = profile.OuterSteps(Config(model=ModelConfig(width=8), distill=DistillConfig(inner_steps=3, **options)), CPU)
    first = steps.state.numbers
    steps()
    assert not torch.equal(steps.state.numbers, first) and steps.state.step == 1
    assert seen["nearest_step"] == options.get("nearest_step", False)
    assert seen["labels"].is_floating_point() == (options.get("labels") == "soft")
    assert len(seen["images"]) == 10 * options.get("images_in_one", 1)
    assert ("importance" in steps.state.memory) == ("lr_importance" in options)


def test_a_kernel_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A profile of a GPU tells of an operator with its kernels' time, and of the kernels."""
    rows = [("aten::addmm", DeviceType.CPU), ("gemm_128x128", DeviceType.CUDA)]
    events = [SimpleNamespace(key=key, device_type=kind, self_cpu_time_total=2000.0) for key, kind in rows]
    watched = SimpleNamespace(key_averages=lambda: events)
    monkeypatch.setattr(profile, "torch_profile", lambda activities: nullcontext(watched))
    found = profile.measure(profile.OuterSteps(Config(model=ModelConfig(width=8)), CPU), CPU).milliseconds
    assert found["products of matrices"] == 2 and found[profile.OTHER] == 0


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "where.png"
    assert profile.main([*TOY, "--out", str(picture)]) == 0
    text = capsys.readouterr().out
    assert "| time, longer by what watching takes | ms | share |" in text
    assert "digits, ddpp, 1 images a class, 3 inner steps" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert profile.main([*TOY, "--method", "mtt", "--prune", "none", "--epsilon", "0", "--out", str(picture)]) == 0
    assert "digits, mtt, 1 images a class" in capsys.readouterr().out
    small = ["--width", "8", "--real-batch", "8", "--threads", "1", "--out", str(picture)]
    assert profile.main([*small, "--method", "dm"]) == 0
    assert "digits, dm, 1 images a class, 1 threads" in capsys.readouterr().out
    assert profile.main([*small, "--method", "herding"]) == 2
    assert "--method herding takes no outer steps, of which one could be shown" in capsys.readouterr().err
    assert profile.main([*small, "--parameterization", "frequencies"]) == 2
    assert "give both options, or leave out both" in capsys.readouterr().err
