"""The profile adds up, names what it measured, and draws it."""

from pathlib import Path

import pytest
import torch

from ddpp import profile
from ddpp.config import Config, DistillConfig, ModelConfig
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


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "where.png"
    assert profile.main([*TOY, "--out", str(picture)]) == 0
    text = capsys.readouterr().out
    assert "| time | ms | share |" in text and "digits, 1 images a class, 3 inner steps" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
