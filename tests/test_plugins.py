"""Methods, data sets and architectures of a file that is not part of the package."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from ddpp import config, distill, evaluate, runs, teachers
from ddpp.data import DATASETS
from ddpp.errors import UserError
from ddpp.methods import METHODS, own_options
from ddpp.models import MODELS
from ddpp.registry import load_plugins

README = Path(__file__).resolve().parent.parent / "README.md"
SHORT = [
    "--threads",
    "1",
    "--width",
    "8",
    "--steps",
    "3",
    "--evaluate-full-epochs",
    "0",
    "--evaluate-networks",
    "2",
    "--evaluate-epochs",
    "2",
]
OWN_DATA_AND_NETWORK = """
import torch
from torch import nn
from ddpp.data import DATASETS
from ddpp.data.base import Raw
from ddpp.models import MODELS, Network


@DATASETS.register("stripes")
def stripes(config):
    images = torch.zeros(40, 1, 8, 8, dtype=torch.uint8)
    images[::2, :, ::2] = 255
    images[1::2, :, :, ::2] = 255
    labels = torch.arange(40) % 2
    return Raw("stripes", ("across", "down"), images, labels, images, labels, strategy="crop")


@MODELS.register("one-layer")
def one_layer(config, shape, classes):
    return Network(nn.Sequential(nn.Conv2d(shape[0], 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)), 8, classes)
"""


@pytest.fixture(autouse=True)
def registries_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    for registry in (METHODS, DATASETS, MODELS):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))


@pytest.fixture
def means(tmp_path: Path) -> Path:
    """The method that the README shows."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (text,) = (block for block in blocks if "@METHODS.register" in block)
    path = tmp_path / "means.py"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_method_of_ones_own_has_what_those_of_ddpp_have(means: Path, tmp_path: Path) -> None:
    """In processes of its own; the second learns of the plugin from the run."""
    out, command = tmp_path / "run", [sys.executable, "-m"]
    own = ["--plugins", str(means), "--method", "means", "--lr-pixels", "0.1", "--own", "pull=0.5"]
    subprocess.run([*command, "ddpp.distill", *own, *SHORT, "--out", str(out)], check=True, timeout=240)
    accuracy = runs.read_json(out / "results.json")["accuracy"]
    assert len(accuracy["means"]["networks"]) == 2 and len(accuracy["random"]["networks"]) == 2
    (out / "results.json").unlink()
    subprocess.run([*command, "ddpp.distill", "--out", str(out), "--resume"], check=True, timeout=240)
    assert runs.read_json(out / "results.json")["accuracy"] == accuracy


def test_a_run_goes_on_where_its_plugin_is_by_now(
    means: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert distill.main(["--plugins", str(means), "--method", "means", *SHORT, "--out", str(out)]) == 0
    moved = means.rename(tmp_path / "elsewhere.py")
    METHODS._entries.pop("means")
    saved = runs.saved_config(out)
    runs.write_text(out / "config.toml", saved.to_toml().replace("means.py", "gone.py"))
    assert evaluate.main([str(out)]) == 2
    assert "gone.py cannot be loaded: FileNotFoundError" in capsys.readouterr().err
    assert evaluate.main([str(out), "--plugins", str(moved)]) == 0


def test_the_loss_of_the_readmes_method_falls(means: Path, tmp_path: Path) -> None:
    words = ["--plugins", str(means), "--method", "means", "--lr-pixels", "0.5", *SHORT, "--out", str(tmp_path / "run")]
    assert distill.main(words) == 0
    losses = [row["loss"] for row in runs.read_log(tmp_path / "run" / "log.jsonl")]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] / 2


def test_data_and_networks_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(OWN_DATA_AND_NETWORK, encoding="utf-8")
    own = ["--plugins", str(path), "--dataset", "stripes", "--model", "one-layer", "--threads", "1"]
    folder = ["--teachers-folder", str(tmp_path / "teachers"), "--teachers-count", "1", "--max-start-epoch", "1"]
    more = [
        *folder,
        "--teachers-epochs",
        "3",
        "--inner-steps",
        "2",
        *SHORT,
        "--evaluate-models",
        "convnet",
        "one-layer",
    ]
    assert distill.main([*own, *more, "--width", "4", "--out", str(tmp_path / "run")]) == 0
    found = runs.read_json(tmp_path / "run" / "results.json")["models"]
    assert set(found) == {"convnet", "one-layer"} and len(found["one-layer"]["ddpp"]["networks"]) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\nraise KeyError('x')\n", r"KeyError: 'x' at .*bad\.py:2$"),
        ("x = (\n", r"SyntaxError: .*bad\.py, line 1\)$"),
        ("from ddpp.methods import METHODS\nMETHODS.register('dm')(int)\n", r"'dm' is registered twice.* at .*:2$"),
        (None, "FileNotFoundError: .*No such file"),
    ],
)
def test_what_is_wrong_with_a_plugin_is_one_line(
    text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.py"
    if text:
        path.write_text(text, encoding="utf-8")
    for _ in range(2):
        assert teachers.main(["--plugins", str(path)]) == 2
    line, again = capsys.readouterr().err.splitlines()
    assert line == again
    assert re.search(rf"^ddpp\.teachers: error: --plugins .*bad\.py cannot be loaded: .*{message}", line)


def test_a_module_is_a_plugin_too_and_a_missing_one_is_said() -> None:
    load_plugins(["json"])
    with pytest.raises(
        UserError, match=r"--plugins no\.module cannot be loaded: ModuleNotFoundError: No module named 'no'$"
    ):
        load_plugins(["no.module"])


class Optioned:
    options = {"pull": 1.0, "times": 3, "loud": False, "name": "a", "both": (1, 2)}  # noqa: RUF012 (as in a plugin)


def test_options_of_ones_own_have_the_type_of_their_default() -> None:
    given = ["pull=2", "loud=true", "name=b=c"]
    assert own_options(Optioned, given) == {"pull": 2.0, "times": 3, "loud": True, "name": "b=c", "both": (1, 2)}  # type: ignore[arg-type]
    for wrong, message in (
        ("times=2.5", "--own times must be of type int, got '2.5'"),
        ("pull", "--own pull must be NAME=VALUE"),
        ("both=12", r"--own both: the default must be of type bool, int, float or str, got \(1, 2\)"),
        ("loud=yes", "--own loud must be of type bool, got 'yes'"),
        ("pul=1", r"no option 'pul'; did you mean 'pull'\? Known: pull, times, loud, name, both"),
    ):
        with pytest.raises(UserError, match=message):
            own_options(Optioned, [wrong])  # type: ignore[arg-type]


def test_a_method_without_options_refuses_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert distill.main(["--method", "dm", "--own", "pull=1", "--out", str(tmp_path / "run")]) == 2
    assert "--own pull=1: the method has no option 'pull'. Known: none" in capsys.readouterr().err
    assert not (tmp_path / "run").exists() and config.Config().distill.own == ()
