"""The profile adds up, names what it measured, and draws it."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_gpu import Recorder
from torch.autograd import DeviceType

from ddpp import profile
from ddpp.config import Config, DistillConfig, ModelConfig
from ddpp.gpu import Graphs
from ddpp.ops import convnet
from ddpp.ops._library import implementation

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
    call, step, kept = profile.outer_step(config, torch.device("cpu"))
    found = profile.measure(call, step, torch.device("cpu"))
    assert found.total > 0 and set(found.milliseconds) == {
        *profile.ROOMS,
        *convnet.TIMES,
        profile.OTHER,
        profile.OUTSIDE,
    }
    assert all(value >= 0 for value in found.milliseconds.values())
    if engine == "adjoint":  # theta_0, theta_2 and theta_4
        assert kept["student's parameters"] == pytest.approx(3 * 4e-6 * len(call().end))
        assert found.milliseconds["norm, activation, pooling"] > 0
        if implementation("convnet_adjoint", "cpu")[0] == "C++":
            assert found.megabytes["planes"] > 0 and found.milliseconds["gradients of weights"] > 0


def test_inner_steps_may_be_replayed_where_nothing_watches() -> None:
    config, recorder = Config(model=ModelConfig(width=8), distill=DistillConfig(inner_steps=3)), Recorder()
    call, step, _ = profile.outer_step(config, torch.device("cpu"))
    found = profile.measure(call, step, torch.device("cpu"), Graphs(recorder))
    assert recorder.captured == 2 and found.milliseconds["norm, activation, pooling"] > 0


def test_a_kernel_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A profile of a GPU tells of an operator with its kernels' time, and of the kernels."""
    rows = [("aten::addmm", DeviceType.CPU), ("gemm_128x128", DeviceType.CUDA)]
    events = [SimpleNamespace(key=key, device_type=kind, self_cpu_time_total=2000.0) for key, kind in rows]
    watched = SimpleNamespace(key_averages=lambda: events)
    monkeypatch.setattr(profile, "torch_profile", lambda activities: nullcontext(watched))
    call, step, _ = profile.outer_step(Config(model=ModelConfig(width=8)), torch.device("cpu"))
    found = profile.measure(call, step, torch.device("cpu")).milliseconds
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
    assert profile.main([*TOY, "--method", "dm", "--out", str(picture)]) == 2
    assert "the step that is shown is one of ddpp or mtt, and dm has another" in capsys.readouterr().err
