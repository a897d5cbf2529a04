"""Every stage where tensors are not the CPU's: none is left behind there, and what comes out is what the CPU gives.

On the stand-in, and on a GPU where there is one.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Backend
from stand_in import DEVICE, standing_in
from test_gpu import Recorder

from ddpp import cli, continual, distill, evaluate, profile, search, synthetic, teachers, training, trajectories
from ddpp.data import preprocess
from ddpp.dual import ConvNetStep
from ddpp.gpu import Graphs
from ddpp.methods import METHODS, Problem
from ddpp.methods.ddpp import DDPP
from ddpp.models import flat
from ddpp.synthetic import Synthetic
from ddpp.training import Recipe

NETWORK = ["--width", "8", "--depth", "2", "--threads", "1"]
TOY = [
    *("--teachers-count", "2", "--teachers-epochs", "2", "--max-start-epoch", "1", "--teacher-span", "1"),
    *("--steps", "2", "--inner-steps", "3", "--batch", "8", "--real-batch", "16", "--lr-pixels", "10"),
    *("--snapshot-every", "1", "--checkpoint-every", "1"),
    *("--evaluate-networks", "1", "--evaluate-epochs", "2", "--evaluate-full-epochs", "0"),
]
MOVED = {
    "ddpp": "--method ddpp",
    "options": "--method ddpp --prune depth --lr-importance 0.01 --ema 0.9 --nearest-step --keep-every 2",
    "adam": "--method mtt --labels soft --optimizer adam --lr-pixels 0.01 --lr-labels 0.01",
    "soft labels": "--method mtt --labels soft --max-loss 1000 --first-max-start-epoch 1",
    "tesla": "--method ddpp --engine tesla --prune difference --ipc 2",
    "pure PyTorch": "--method ddpp --no-use-fused-kernels",
    "unrolled": "--method ddpp --engine unrolled --prune lowest",
    "frequencies": "--method ddpp --parameterization frequencies --images-in-one 4 --ema 0.9",
    "multiformation": "--method dm --parameterization multiformation --images-in-one 4",
    "bptt": "--method bptt --student-steps 5 --labels soft",
    "bptt by Adam": "--method bptt --inner-optimizer adam --step-size 0.001 --keep-every 2",
    "dc": "--method dc",
    "dsa": "--method dsa --ipc 2",
    "dm": "--method dm",
    "cafe": "--method cafe",
    "kip": "--method kip --strategy none --norm none --pooling none",
    "sre2l": "--method sre2l",
}
GRAPH_OF_GRAPHS = ("pure PyTorch", "unrolled")
CHOSEN = {
    "herding": "--method herding",
    "kcenter": "--method kcenter",
    "forgetting": "--method forgetting",
    "rded": "--method rded --rded-candidates 20 --rded-patches 2",
    "teacher's answers": "--method random --evaluate-labels teacher --evaluate-cutmix",
    "policies": "--method random --evaluate-augmentations none dsa autoaugment randaugment imagenet",
    "adam": "--method random --evaluate-optimizer adam --evaluate-lr 0.001",
    "searched rate": "--method random --evaluate-search-lr --evaluate-select all",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teachers, by the CPU."""
    path = tmp_path_factory.mktemp("teachers") / "digits"
    assert run(teachers.main, "cpu", [*NETWORK, "--count", "2", "--epochs", "2", "--folder", str(path)]) == 0
    return path


@pytest.fixture(autouse=True)
def many_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images stay whole numbers, which are normalised on the device."""
    monkeypatch.setattr(preprocess, "FEW", 0)


@pytest.fixture(params=["stand-in", "cuda"])
def elsewhere(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return str(request.param)


def optimizer(parameters: list[torch.nn.Parameter], recipe: Recipe, lr: float) -> torch.optim.Optimizer:
    """As :mod:`ddpp.training` has it, but not fused."""
    if recipe.optimizer == "adam":
        return torch.optim.Adam(parameters, lr, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(parameters, lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)


def run(main: Any, device: str, arguments: list[str]) -> int:
    """A stage on a device. By its name torch chooses a fused optimiser, and ddpp the fused training step."""
    if device != "stand-in":
        return int(main([*arguments, "--device", device]))
    with pytest.MonkeyPatch.context() as patch, standing_in():
        patch.setattr(cli, "device", lambda config: DEVICE)
        patch.setattr(training, "_optimizer", optimizer)
        patch.setattr(training, "_suits", lambda model, device: ConvNetStep.suits(model))
        return int(main(arguments))


def distilled(arguments: list[str], out: Path, device: str) -> Synthetic:
    assert run(distill.main, device, [*NETWORK, *TOY, *arguments, "--out", str(out)]) == 0
    return synthetic.load(out / "synthetic.safetensors")[0]


def group_norm_has_two_derivatives() -> bool:
    """Of tensors that stand in; torch 2.11 fails at the second one."""
    with standing_in():
        x, weight = torch.randn(2, 3, 4, 4).to(DEVICE).requires_grad_(), torch.ones(3).to(DEVICE).requires_grad_()
        norm = torch.nn.functional.group_norm(x, 3, weight, torch.zeros(3).to(DEVICE))
        (first,) = torch.autograd.grad(norm.square().sum(), weight, create_graph=True)
        try:
            torch.autograd.grad(first.square().sum(), x)
        except RuntimeError:
            return False
    return True


def cut_and_resumed(arguments: list[str], out: Path, device: str) -> Synthetic:
    """From a run that ends after a step and goes on from its checkpoint."""
    steps: list[int] = []
    outer_step = distill.outer_step

    def cut(state: Any, *rest: Any) -> Any:
        steps.append(state.step)
        if len(steps) == 2:
            raise RuntimeError("cut")
        return outer_step(state, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "outer_step", cut)
        with pytest.raises(RuntimeError, match=r"^cut$"):
            distilled(arguments, out, device)
        found = distilled([*arguments, "--resume"], out, device)
    assert steps == [0, 1, 1]
    return found


def assert_alike(found: Synthetic, wanted: Synthetic, tolerance: float = 1e-5) -> None:
    for mine, theirs in ((found.images, wanted.images), (found.labels, wanted.labels)):
        assert mine.dtype == theirs.dtype and (mine - theirs).double().norm() <= tolerance * theirs.double().norm()
    assert float(found.step_size) == pytest.approx(float(wanted.step_size), rel=tolerance)


@pytest.mark.parametrize("case", MOVED)
def test_a_run_gives_what_the_cpu_gives(case: str, elsewhere: str, folder: Path, tmp_path: Path) -> None:
    arguments = MOVED[case].split()
    if case in GRAPH_OF_GRAPHS and elsewhere == "stand-in" and not group_norm_has_two_derivatives():
        pytest.skip(f"torch {torch.__version__} does not differentiate GroupNorm twice on tensors that stand in")
    if case != "kip":
        arguments += ["--teachers-folder", str(folder)]
    wanted = distilled(arguments, tmp_path / "cpu", "cpu")
    found = cut_and_resumed(arguments, tmp_path / "elsewhere", elsewhere)
    assert_alike(found, wanted, tolerance=1e-3 if elsewhere == "cuda" else 1e-5)  # a GPU sums in another order


def test_the_same_seed_gives_the_same_bytes_resumed_or_not(elsewhere: str, folder: Path, tmp_path: Path) -> None:
    arguments = ["--teachers-folder", str(folder)]
    cut_and_resumed(arguments, tmp_path / "cut", elsewhere)
    distilled(arguments, tmp_path / "whole", elsewhere)
    one, other = ((tmp_path / run / "synthetic.safetensors").read_bytes() for run in ("cut", "whole"))
    assert one == other


@pytest.mark.parametrize("backend", ["emulated"], indirect=True)
@pytest.mark.parametrize("planes", ["float32", "bfloat16"])
def test_a_run_on_emulated_kernels(backend: Backend, planes: str, folder: Path, tmp_path: Path) -> None:
    arguments = ["--teachers-folder", str(folder), *(["--bf16"] if planes == "bfloat16" else [])]
    wanted = distilled(arguments, tmp_path / "cpu", "cpu")
    assert_alike(distilled(arguments, tmp_path / "elsewhere", "stand-in"), wanted)


@pytest.mark.parametrize("case", ["ddpp", "options", "soft labels", "tesla"])
def test_a_run_with_captured_inner_steps(
    case: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, begin = Recorder(), DDPP.__init__

    def capture(self: DDPP, problem: Problem) -> None:
        begin(self, problem)
        self.graphs = Graphs(recorder)

    arguments = [*MOVED[case].split(), "--teachers-folder", str(folder)]
    wanted = distilled(arguments, tmp_path / "cpu", "cpu")
    monkeypatch.setattr(DDPP, "__init__", capture)
    assert_alike(distilled(arguments, tmp_path / "elsewhere", "stand-in"), wanted)
    assert recorder.captured in (2, 4)  # a step forward and a step back, for batches of one or two sizes


@pytest.mark.parametrize("case", CHOSEN)
def test_the_same_images_are_chosen_and_networks_are_as_good(case: str, folder: Path, tmp_path: Path) -> None:
    devices, arguments = ("cpu", "stand-in"), [*CHOSEN[case].split(), "--teachers-folder", str(folder)]
    wanted, found = (distilled(arguments, tmp_path / device, device) for device in devices)
    assert torch.equal(found.images, wanted.images) and torch.equal(found.labels, wanted.labels)
    theirs, mine = (json.loads((tmp_path / d / "results.json").read_text())["models"]["convnet"] for d in devices)
    for name, figures in theirs.items():
        assert mine[name] is figures is None or mine[name]["mean"] == pytest.approx(
            figures["mean"],
            abs=0.6,  # percent: two test images of 359
        )


@pytest.mark.parametrize("sharpness", ["0", "0.01"])
def test_teachers_are_those_of_the_cpu(sharpness: str, elsewhere: str, tmp_path: Path) -> None:
    arguments = [*NETWORK, "--count", "1", "--epochs", "1", "--sharpness-radius", sharpness, "--folder"]
    for device in ("cpu", elsewhere):
        assert run(teachers.main, device, [*arguments, str(tmp_path / device)]) == 0
    wanted, found = (
        trajectories.Trajectory.open(tmp_path / device / trajectories.file_name(0)) for device in ("cpu", elsewhere)
    )
    torch.testing.assert_close(found.rows(0, 1), wanted.rows(0, 1), rtol=1e-4, atol=1e-6)


def test_buffers_of_other_codes_are_measured(elsewhere: str, folder: Path, tmp_path: Path) -> None:
    trained = trajectories.Trajectory.open(folder / trajectories.file_name(0))
    rows = [flat.unflatten(trained.rows(epoch, 0)[0], trained.layout) for epoch in range(3)]
    torch.save([[list(row.values()) for row in rows]], tmp_path / "replay_buffer_0.pt")
    arguments = ["--count", "1", "--epochs", "2", "--folder", str(tmp_path / "brought"), "--from-buffers"]
    assert run(teachers.main, elsewhere, [*NETWORK, *arguments, str(tmp_path / "replay_buffer_0.pt")]) == 0
    found = trajectories.Trajectory.open(tmp_path / "brought" / trajectories.file_name(0))
    assert found.accuracy() == pytest.approx(trained.accuracy(), abs=1)  # percent: an image or two of the held-out ones


def test_a_teacher_that_was_cut_goes_on(elsewhere: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With velocity and running statistics, killed in its second epoch."""
    arguments = [*NETWORK, "--norm", "batch", "--momentum", "0.9", "--count", "1", "--epochs", "2", "--folder"]
    assert run(teachers.main, elsewhere, [*arguments, str(tmp_path / "whole")]) == 0
    add = trajectories.Begun.add

    def killed(begun: trajectories.Begun, *row: Any) -> None:
        add(begun, *row)
        if begun.epochs == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trajectories, "_KEPT_EVERY", 0)
        patch.setattr(trajectories.Begun, "add", killed)
        assert run(teachers.main, elsewhere, [*arguments, str(tmp_path / "cut")]) == 130
    assert run(teachers.main, elsewhere, [*arguments, str(tmp_path / "cut")]) == 0
    whole, cut = (tmp_path / folder / trajectories.file_name(0) for folder in ("whole", "cut"))
    assert cut.read_bytes() == whole.read_bytes()


def test_what_a_result_is_used_for(elsewhere: str, folder: Path, tmp_path: Path) -> None:
    held = str(tmp_path / "run")
    distilled(["--teachers-folder", str(folder)], tmp_path / "run", "cpu")
    assert run(evaluate.main, elsewhere, [held, "--models", "convnet", "alexnet", "resnet18", "--networks", "1"]) == 0
    assert run(continual.main, elsewhere, [held, "--epochs", "1", "--orders", "2"]) == 0
    grid = ["--widths", "8", "--depths", "1", "--norm", "none", "--epochs", "1", "--full-epochs", "1"]
    assert run(search.main, elsewhere, [held, *grid]) == 0
    picture = str(tmp_path / "profile.png")
    assert run(profile.main, elsewhere, [*NETWORK, "--inner-steps", "2", "--out", picture]) == 0


def test_no_method_is_left_out() -> None:
    words = [case.split() for case in (*MOVED.values(), *CHOSEN.values())]
    tried = {case[case.index("--method") + 1] for case in words}
    assert tried == set(METHODS.names()) - {"given"}  # which computes nothing


def test_tensors_of_two_devices_do_not_meet() -> None:
    with standing_in():
        x = torch.ones(3).to(DEVICE)
        assert x.device == DEVICE and (2 * x).sum().item() == 6 and x.new_tensor([1, 2]).device == DEVICE
        for mix in (lambda: x + torch.ones(3), lambda: x[torch.tensor([0])], lambda: torch.stack([x, torch.ones(3)])):
            with pytest.raises(AssertionError, match="takes tensors of two devices"):
                mix()
        assert type(x.cpu()) is torch.Tensor and torch.equal(x.cpu().to(DEVICE).cpu(), torch.ones(3))
