"""Methods, data sets and architectures of a file that is not part of the package."""

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ddpp import config, data, distill, evaluate, models, profile, registry, runs, store, synthetic, teachers, training
from ddpp.data import DATASETS
from ddpp.errors import UserError
from ddpp.methods import METHODS, own_options
from ddpp.models import MODELS
from ddpp.registry import load_plugins

EXTENDING = Path(__file__).resolve().parent.parent / "docs" / "extending.md"
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
TEACHERS = ["--teachers-count", "1", "--teachers-epochs", "3", "--max-start-epoch", "1", "--inner-steps", "2"]
WRONG_UPDATES = {
    "images=gradient.double()": "must have images as torch.float32, got torch.float64",
    "images=gradient[:1]": r"must have images as a tensor \[10, 1, 8, 8\], got \[1, 1, 8, 8\]",
    "loss=torch.tensor(1)": "must have loss as a floating point number, got torch.int64",
    "loss=1.5": r"must have loss as a tensor \[\], got float 1.5",
    "kept=fixed + torch.ones(1)": r"must have kept as a tensor \[\], got \[1\]",
    "labels=torch.zeros(10, 10)": "has labels, but the set's are fixed; they need --labels soft",
    "memory={'best': 1.5}": "memory must hold tensors, got float 1.5 as 'best'",
    "note={'drawn': torch.ones(2)}": r"note must hold numbers and words, got \[2\] as 'drawn'",
    "memory={1: fixed}": "memory and note must have names as keys, got int 1",
}
SELECTION = """
import torch
from ddpp.methods import METHODS
from ddpp.synthetic import Synthetic


@METHODS.register("first")
class First:
    needs_teachers, learns_labels = False, True

    def __init__(self, problem):
        labels = problem.dataset.train_labels
        self.chosen = torch.cat([torch.nonzero(labels == k).flatten()[:1] for k in range(10)])
        self.dataset = problem.dataset

    def choose(self):
        images, labels = self.dataset.train_images[self.chosen], self.dataset.train_labels[self.chosen]
        step_size, soft = torch.tensor(0.02), torch.eye(10)
        return Synthetic(images, labels, step_size)
"""
WRONG_SETS = {
    "None": "must choose a ddpp.synthetic.Synthetic, got NoneType",
    "Synthetic(images * torch.nan, labels, step_size)": "has images with numbers that are not finite",
    "Synthetic(images.double(), labels, step_size)": r"must have images as torch.float32 .* got torch.float64",
    "Synthetic(images[:5], labels, step_size)": r"must have images as torch.float32 .*, got .*\[5, 1, 8, 8\]",
    "Synthetic(images[..., :4], labels, step_size)": r"must have images as .* got torch.float32 \[10, 1, 8, 4\]",
    "Synthetic(images, labels.flip(0), step_size)": "must have labels class by class, 1 of each",
    "Synthetic(images, labels.int(), step_size)": r"must have labels as torch.int64 \[10\], got torch.int32 \[10\]",
    "Synthetic(images, soft, step_size)": r"must have labels as torch.int64 \[10\], got torch.float32 \[10, 10\]",
    "Synthetic(images, labels, 0.02)": r"must have step_size as torch.float32 \[\], got float",
    "Synthetic(images, labels, 0 * step_size)": "must have a step_size above 0, got 0",
}


@pytest.fixture(autouse=True)
def registries_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    for table in (METHODS, DATASETS, MODELS):
        monkeypatch.setattr(table, "_entries", dict(table._entries))
        monkeypatch.setattr(table, "_sources", dict(table._sources))
    monkeypatch.setattr(registry, "_plugins", set())


def shown(name: str, folder: Path) -> Path:
    """A method that the documentation shows."""
    blocks = re.findall(r"```python\n(.*?)```", EXTENDING.read_text(encoding="utf-8"), re.DOTALL)
    (text,) = (block for block in blocks if f'@METHODS.register("{name}")' in block)
    path = folder / f"{name}.py"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def means(tmp_path: Path) -> Path:
    return shown("means", tmp_path)


def test_a_distance_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its loss, of trajectories, begins near 1 and falls where DDPP's would be another."""
    out, own = tmp_path / "run", ["--plugins", str(shown("absolute", tmp_path)), "--method", "absolute"]
    argv = [*own, *SHORT, "--out", str(out), "--teachers-folder", str(tmp_path / "teachers")]
    assert distill.main(argv) == 0
    rows = runs.read_log(out / "log.jsonl")
    assert all(row["kept"] == 1 and 0 < row["loss"] < 1.5 for row in rows)
    assert distill.main([*SHORT, "--out", str(tmp_path / "ddpp"), "--teachers-folder", str(tmp_path / "teachers")]) == 0
    assert [row["loss"] for row in runs.read_log(tmp_path / "ddpp" / "log.jsonl")] != [row["loss"] for row in rows]


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
        "one-layer:width=4",
    ]
    assert distill.main([*own, *more, "--width", "4", "--out", str(tmp_path / "run")]) == 0
    found = runs.read_json(tmp_path / "run" / "results.json")["models"]
    assert set(found) == {"convnet", "one-layer", "one-layer:width=4"}
    assert len(found["one-layer"]["ddpp"]["networks"]) == 2


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


def load_again(path: Path) -> None:
    """What a new process would do."""
    sys.modules.pop(f"ddpp plugin {path.resolve()}", None)
    for table in (DATASETS, MODELS):
        for name in ("stripes", "one-layer"):
            table._entries.pop(name, None)
    load_plugins([str(path)])


def test_teachers_are_of_one_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Options that a plugin may look at, and the plugin itself."""
    path = tmp_path / "mine.py"
    path.write_text(OWN_DATA_AND_NETWORK, encoding="utf-8")
    load_again(path)
    settings = config.Config().with_values({"model": {"model": "one-layer"}, "data": {"dataset": "stripes"}}, "test")
    dataset = data.load(settings.data)
    folders = [store.folder_of(settings, dataset)]
    folders.append(store.folder_of(settings.with_values({"model": {"activation": "sigmoid"}}, "test"), dataset))
    own = ["--plugins", str(path), "--dataset", "stripes", "--model", "one-layer", "--threads", "1"]
    train = [*own, "--count", "1", "--epochs", "1", "--folder", str(tmp_path / "teachers")]
    assert teachers.main(train) == 0
    path.write_text(OWN_DATA_AND_NETWORK.replace("nn.ReLU", "nn.Tanh"), encoding="utf-8")
    load_again(path)
    folders.append(store.folder_of(settings, dataset))
    assert len(set(folders)) == 3
    assert teachers.main(train) == 2
    assert "plugin is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("nn.ReLU()", "nn.Dropout(0.5)", "draws random numbers, as dropout does"),
        ("nn.ReLU()", "nn.Linear(3, 3)", "fails on images"),
        (", 8, classes)", ", 8, classes + 1)", r"must give logits \[2, 2\] of 2 images, got \[2, 3\]"),
    ],
)
def test_a_network_that_cannot_be_distilled_is_refused_at_once(
    old: str, new: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(OWN_DATA_AND_NETWORK.replace(old, new), encoding="utf-8")
    load_again(path)
    with pytest.raises(UserError, match=f"model 'one-layer' {message}"):
        models.build(config.ModelConfig(model="one-layer"), (1, 8, 8), 2, seed=0)


@pytest.mark.parametrize("wrong", WRONG_UPDATES)
def test_a_wrong_update_is_one_line(
    wrong: str, means: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = means.read_text(encoding="utf-8")
    changed = text.replace("kept=fixed + 1, note={})", f"kept=fixed + 1, note={{}})._replace({wrong})")
    assert changed != text
    means.write_text(changed, encoding="utf-8")
    argv = ["--plugins", str(means), "--method", "means", *SHORT, "--out", str(tmp_path / "run")]
    assert distill.main(argv) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "error" in line)
    assert re.search(f"ddpp.distill: error: the method's (update )?{WRONG_UPDATES[wrong]}", line)


def test_a_run_does_not_go_on_with_an_edited_plugin(
    means: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert distill.main(["--plugins", str(means), "--method", "means", *SHORT, "--out", str(out)]) == 0
    assert distill.main(["--resume", "--steps", "4", "--out", str(out)]) == 0
    code = means.read_text(encoding="utf-8")
    for more, expected in (("# edited", 2), ("", 0)):
        means.write_text(code + more, encoding="utf-8")
        METHODS._entries.pop("means")
        sys.modules.pop(f"ddpp plugin {means.resolve()}")
        assert distill.main(["--resume", "--steps", "5", "--out", str(out)]) == expected
        told = f"{out} was begun with a plugin that was edited since. Restore it, or choose another --out."
        assert (told in capsys.readouterr().err) == (expected == 2)


def test_an_update_of_another_kind_is_one_line(means: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    means.write_text(means.read_text(encoding="utf-8").replace("return Update(", "Update("), encoding="utf-8")
    argv = ["--plugins", str(means), "--method", "means", *SHORT, "--out", str(tmp_path / "run")]
    assert distill.main(argv) == 2
    assert "error: the method's update must be a ddpp.methods.Update, got NoneType" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["full", "own/means"])
def test_a_name_that_results_give_another_meaning_is_refused(
    name: str, means: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    means.write_text(means.read_text(encoding="utf-8").replace('"means"', f'"{name}"'), encoding="utf-8")
    assert distill.main(["--plugins", str(means), "--method", name, *SHORT, "--out", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"error: --method {name}: a method's name must not be 'full' or hold '/'" in line
    assert not (tmp_path / "run").exists()


def selected(folder: Path, chosen: str, *more: str) -> int:
    """What ddpp.distill returns of a plugin's selection that gives another set."""
    path = folder / "first.py"
    path.write_text(SELECTION.replace("Synthetic(images, labels, step_size)", chosen), encoding="utf-8")
    return distill.main(["--plugins", str(path), "--method", "first", *SHORT, *more, "--out", str(folder / "run")])


@pytest.mark.parametrize("labels", ["labels", "soft"])
def test_a_selection_of_ones_own_may_refuse_nothing(
    labels: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = ["--labels", "soft"] if labels == "soft" else []
    assert selected(tmp_path, f"Synthetic(images, {labels}, step_size)", *kind) == 0
    held, meta = synthetic.load(tmp_path / "run" / "synthetic.safetensors")
    assert meta["steps"] == 0 and held.labels.is_floating_point() == bool(kind)
    assert len(runs.read_json(tmp_path / "run" / "results.json")["accuracy"]["first"]["networks"]) == 2
    assert profile.main(["--method", "first", "--plugins", str(tmp_path / "first.py"), "--threads", "1"]) == 2
    assert "--method first takes no outer steps" in capsys.readouterr().err


@pytest.mark.parametrize("chosen", WRONG_SETS)
def test_a_wrong_selection_is_one_line(chosen: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert selected(tmp_path, chosen) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "error" in line)
    assert re.search(f"error: the (set that the )?method (chose )?{WRONG_SETS[chosen]}", line)
    assert not (tmp_path / "run").exists()


def test_an_evaluation_of_another_plugin_begins_anew(means: Path, tmp_path: Path) -> None:
    """What an edited file gave is not mixed with what it gave before."""
    out = tmp_path / "run"
    assert distill.main(["--plugins", str(means), "--method", "means", *SHORT, "--out", str(out)]) == 0
    about = []
    for more in ("", "# edited"):
        means.write_text(means.read_text(encoding="utf-8") + more, encoding="utf-8")
        METHODS._entries.pop("means")
        sys.modules.pop(f"ddpp plugin {means.resolve()}")
        registry._plugins.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(evaluate, "forget_parts", lambda folder: None)
            assert evaluate.main([str(out)]) == 0
        about.append(runs.read_log(out / "evaluated.jsonl")[0]["about"]["plugins"])
    assert about[0] != about[1] and len(about[0]) == len(about[1]) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("None", "data set 'odd' must give a ddpp.data.base.Raw, got NoneType"),
        ("raw(np.zeros((4, 1, 8, 8), np.uint8))", "images as ndarray, but they must be a torch.Tensor"),
        ("raw(torch.zeros(4, 1, 8, 8))", "torch.float32 [4, 1, 8, 8], but they must be uint8 [N, C, H, H], with 255"),
    ],
)
def test_what_a_reader_gets_wrong_is_one_line(
    given: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"""
import numpy as np
import torch
from ddpp.data.base import DATASETS, Raw


def raw(images):
    return Raw("odd", ("a", "b"), images, torch.tensor([0, 1, 0, 1]), images, torch.tensor([0, 1, 0, 1]), "flip")


DATASETS._entries.pop("odd", None)
DATASETS.register("odd")(lambda config: {given})
"""
    path = tmp_path / "odd.py"
    path.write_text(text, encoding="utf-8")
    assert distill.main(["--plugins", str(path), "--dataset", "odd", *SHORT, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_method_may_refuse_nothing(tmp_path: Path, means: Path) -> None:
    text = means.read_text(encoding="utf-8")
    start, end = text.index("    @staticmethod"), text.index("    def __init__")
    means.write_text(text[:start] + text[end:], encoding="utf-8")
    argv = ["--plugins", str(means), "--method", "means", *SHORT, "--out", str(tmp_path / "run")]
    assert distill.main(argv) == 0


def test_a_run_finds_its_plugin_from_another_folder(
    means: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not another file of that name there."""
    monkeypatch.chdir(tmp_path)
    assert distill.main(["--plugins", "means.py", "--method", "means", *SHORT, "--out", "run"]) == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "means.py").write_text("raise ValueError('another')", encoding="utf-8")
    monkeypatch.chdir(tmp_path / "other")
    assert evaluate.main(["../run"]) == 0


def test_a_network_of_a_package_is_known_by_the_file_that_defines_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "__init__.py").write_text("from own_package import net\n", encoding="utf-8")
    path = tmp_path / "own_package" / "net.py"
    path.write_text(OWN_DATA_AND_NETWORK, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    load_plugins(["own_package"])
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert MODELS.source("one-layer") == digest and registry.plugins() == [digest]
    assert MODELS.source("convnet") == ""


MORE_NETWORKS = """
from torch import nn
from ddpp import models
from ddpp.config import ModelConfig
from ddpp.models import MODELS, Network


@MODELS.register("weight-norm")
def weight_norm(config, shape, classes):
    first = nn.utils.parametrizations.weight_norm(nn.Conv2d(shape[0], 8, 3))
    nn.utils.weight_norm(conv := nn.Conv2d(8, 8, 3))
    return Network(nn.Sequential(first, conv, nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1)), 8, classes)


@MODELS.register("two-heads")
def two_heads(config, shape, classes):
    network = models.build(ModelConfig(width=8, depth=1), shape, classes, seed=1)
    network.classifier = nn.Sequential(network.classifier, nn.Linear(classes, classes))
    return network
"""


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("name", ["weight-norm", "two-heads"])
def test_networks_of_other_kinds_train(name: str, tmp_path: Path) -> None:
    """Parametrised, with statistics, of others, and with more than one linear layer at the end."""
    path = tmp_path / "more.py"
    path.write_text(MORE_NETWORKS, encoding="utf-8")
    load_plugins([str(path)])
    network = models.build(config.ModelConfig(model=name), (1, 8, 8), 2, seed=0)
    assert all(buffer.eq(0).all() for key, buffer in network.named_buffers() if key.endswith("running_mean"))
    images, labels = torch.randn(6, 1, 8, 8), torch.arange(6) % 2
    assert training.fit(network, images, labels, training.Recipe(2, lr=0.1), seed=0)


@pytest.mark.parametrize("channels", [2, 4])
def test_images_of_other_than_one_or_three_channels(channels: int, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(OWN_DATA_AND_NETWORK.replace("zeros(40, 1", f"zeros(40, {channels}"), encoding="utf-8")
    own = ["--plugins", str(path), "--dataset", "stripes", "--teachers-folder", str(tmp_path / "teachers")]
    assert distill.main([*own, *TEACHERS, *SHORT, "--out", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "images.png").is_file()
    held, _ = synthetic.load(tmp_path / "run" / "synthetic.safetensors")
    assert held.images.shape == (2, channels, 8, 8)
