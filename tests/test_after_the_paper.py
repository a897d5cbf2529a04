"""What composes with DDPP: soft labels, the start that teachers choose, windows of starts, flat teachers, averages."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpp import config, data, distill, models, runs, seeds, store, synthetic, teachers, training
from ddpp.config import Config, DistillConfig, ModelConfig, TeachersConfig
from ddpp.errors import UserError
from ddpp.methods import Update
from ddpp.methods.ddpp import start_bound
from ddpp.models import flat
from ddpp.parameterization import PIXELS, Multiformation, Parameterization
from ddpp.synthetic import Synthetic
from ddpp.training import Recipe

TOY = [
    *("--width", "8", "--threads", "1", "--ipc", "2", "--teachers-count", "2", "--teachers-epochs", "3"),
    *("--max-start-epoch", "2", "--teacher-span", "1", "--inner-steps", "4", "--steps", "5", "--lr-pixels", "10"),
    *("--snapshot-every", "2", "--checkpoint-every", "2"),
    *("--evaluate-networks", "2", "--evaluate-epochs", "3", "--evaluate-full-epochs", "1"),
]


def state() -> distill.State:
    first = Synthetic(torch.zeros(2, 1, 4, 4), torch.zeros(2, 3), torch.tensor(0.02))
    return distill.State.begin(first)


def update(value: float) -> Update:
    images, labels = torch.full((2, 1, 4, 4), value), torch.full((2, 3), 2 * value)
    return Update(torch.tensor(0.5), images, torch.zeros(()), torch.tensor(1.0), {}, labels)


def test_labels_move_by_their_own_rate_and_momentum() -> None:
    settings = DistillConfig(lr_pixels=1.0, momentum=0.5, lr_labels=0.1, labels_momentum=0.9)
    moved = state().moved(update(1.0), settings).moved(update(1.0), settings)
    assert torch.allclose(moved.synthetic.images, torch.tensor(-1.0 - 1.5))
    assert torch.allclose(moved.synthetic.labels, torch.tensor(-0.2 - 0.1 * (0.9 * 2 + 2)))


def test_the_result_is_the_average_over_the_steps(tmp_path: Path) -> None:
    settings = DistillConfig(lr_pixels=1.0, momentum=0.0, ema=0.75)
    moved = state().moved(update(1.0), settings).moved(update(1.0), settings)
    assert torch.allclose(moved.synthetic.images, torch.tensor(-2.0))
    assert torch.allclose(moved.result.images, torch.tensor(0.75 * (0.25 * -1.0) + 0.25 * -2.0))
    moved.save(tmp_path / "state")
    again = distill.State.load(tmp_path / "state", torch.device("cpu"))
    assert torch.equal(again.result.images, moved.result.images)
    assert torch.equal(state().result.images, state().synthetic.images)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_adam_is_pytorchs_over_the_steps_that_are_taken(momentum: float, tmp_path: Path) -> None:
    """One is undone and one skipped between them; the state is saved and loaded after each."""
    settings = DistillConfig(
        optimizer="adam", lr_pixels=0.3, momentum=momentum, lr_labels=0.1, labels_momentum=0.8, max_loss=1.0
    )
    drawn, found = seeds.generator(0, "gradients"), state()
    images, labels = (nn.Parameter(t.clone()) for t in (found.numbers, found.synthetic.labels))
    rates = {"lr": 0.3, "betas": (momentum, 0.999)}, {"lr": 0.1, "betas": (0.8, 0.999)}
    wanted = torch.optim.Adam([{"params": p, **rate} for p, rate in zip((images, labels), rates, strict=True)])
    for loss in (0.5, 0.5, float("nan"), 0.5, 2.0, 0.5, 0.5):
        gradients = torch.randn(2, 1, 4, 4, generator=drawn), torch.randn(2, 3, generator=drawn)
        given = Update(torch.tensor(loss), gradients[0], torch.ones(()), torch.ones(()), {}, gradients[1])
        method = type("Fixed", (), {"update": lambda self, *_, given=given: given})()
        found, row = distill.outer_step(found, method, settings)
        if row["outcome"] == "taken":
            images.grad, labels.grad = gradients
            wanted.step()
        torch.testing.assert_close(found.numbers, images.detach())
        torch.testing.assert_close(found.synthetic.labels, labels.detach())
        found.save(tmp_path / "state")
        found = distill.State.load(tmp_path / "state", torch.device("cpu"))
    assert (found.step, found.undone, found.skipped) == (7, 1, 1)
    velocity = 0.0
    for _ in range(5):
        velocity = momentum * velocity + 1
    assert float(found.step_size_velocity) == pytest.approx(velocity)  # of SGD


def test_a_checkpoint_holds_what_its_optimizer_needs(tmp_path: Path) -> None:
    names = {}
    for optimizer in ("sgd", "adam"):
        state().moved(update(1.0), DistillConfig(optimizer=optimizer)).save(tmp_path / optimizer)
        names[optimizer] = set(runs.read_tensors(tmp_path / optimizer, "checkpoint")[0])
    velocities = {f"{name}_velocity" for name in ("numbers", "labels", "step_size")}
    assert names["sgd"] == {"numbers", "labels", "step_size"} | velocities
    assert names["adam"] == names["sgd"] | {"numbers_squares", "labels_squares"}


def test_a_square_that_overflows_is_not_finite() -> None:
    settings = DistillConfig(optimizer="adam")
    assert state().moved(update(1e10), settings).finite() and not state().moved(update(1e30), settings).finite()


def test_the_window_of_starts_grows() -> None:
    settings = DistillConfig(max_start_epoch=20, first_max_start_epoch=10, window_steps=1000)
    assert [start_bound(settings, step) for step in (0, 99, 100, 550, 1000, 5000)] == [10, 10, 11, 15, 20, 20]
    assert start_bound(replace(settings, first_max_start_epoch=None), 0) == 20


def test_steps_above_the_largest_loss_are_skipped(tmp_path: Path) -> None:
    for bound, moved in ((0.4, False), (0.6, True)):
        settings = replace(DistillConfig(), max_loss=bound)
        method = type("Fixed", (), {"update": lambda self, *_: update(1.0)})()
        after, row = distill.outer_step(state(), method, settings)
        assert row["outcome"] == ("taken" if moved else "skipped") and (after.skipped == 0) == moved


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, list[Tensor], Path]:
    folder = tmp_path_factory.mktemp("teachers")
    settings = Config(
        model=ModelConfig(width=8), teachers=TeachersConfig(folder=str(folder), count=2, epochs=4, lr=0.05)
    )
    dataset = data.load(settings.data)
    teachers.train(settings, dataset, torch.device("cpu"), progress=False)
    network = models.build(settings.model, dataset.shape, 10, seed=0)
    found = store.open_all(folder, settings, dataset, network)
    return settings, [t.rows(4, 4)[0] for t in found], folder


def started(
    settings: Config, init: str, labels: str, ipc: int = 3, space: Parameterization = PIXELS
) -> tuple[Synthetic, nn.Module]:
    dataset = data.load(settings.data)
    network = models.build(settings.model, dataset.shape, 10, seed=0)
    first = synthetic.start(dataset, ipc, init, 0.02, 0)
    found = store.open_all(Path(str(settings.teachers.folder)), settings, dataset, network)
    soft = synthetic.start_from_teachers(first, dataset, network, found, init=init, labels=labels, seed=0, space=space)
    return soft, network


def test_soft_labels_are_the_mean_answer_of_the_teachers_that_are_right(
    trained: tuple[Config, list[Tensor], Path],
) -> None:
    settings, ends, _ = trained
    first, network = started(settings, "real", "soft")
    truth = [k for k in range(10) for _ in range(3)]
    for image, label, logits in zip(first.images, truth, first.labels, strict=True):
        answers = [flat.call(network, end, image[None])[0] for end in ends]
        right = [a for a in answers if int(a.argmax()) == label] or answers
        torch.testing.assert_close(logits, sum(right) / len(right), rtol=1e-3, atol=1e-4)


def test_soft_labels_are_answers_to_what_the_numbers_hold(trained: tuple[Config, list[Tensor], Path]) -> None:
    """Not to the images that the numbers are an approximation of."""
    settings, _, _ = trained
    blurred = Multiformation((1, 8, 8), 4, torch.device("cpu"))
    first, _ = started(settings, "real", "soft", ipc=4, space=blurred)
    plain, _ = started(settings, "real", "soft", ipc=4)
    assert torch.equal(first.images, plain.images) and not torch.allclose(first.labels, plain.labels, atol=0.1)
    dataset = data.load(settings.data)
    network = models.build(settings.model, dataset.shape, 10, seed=0)
    found = store.open_all(Path(str(settings.teachers.folder)), settings, dataset, network)
    truth = torch.arange(10).repeat_interleave(4)
    of = replace(first, images=blurred.decode(blurred.encode(first.images)), labels=truth)
    wanted = synthetic.start_from_teachers(of, dataset, network, found, init="real", labels="soft", seed=0)
    torch.testing.assert_close(first.labels, wanted.labels)


def test_correct_images_are_right_for_a_teacher_and_differ(trained: tuple[Config, list[Tensor], Path]) -> None:
    settings, ends, _ = trained
    first, network = started(settings, "correct", "hard")
    answers = torch.stack([flat.call(network, end, first.images).argmax(1) for end in ends])
    assert bool((answers == first.labels).any(0).all())
    assert len(torch.unique(first.images.flatten(1), dim=0)) == 30
    with pytest.raises(UserError, match=r"--init correct finds \d+ images of class .* --ipc asks for 120"):
        started(settings, "correct", "hard", ipc=120)


def test_flat_minima_on_a_quadratic() -> None:
    """GSAM from two gradients by hand, for one step of plain SGD."""
    model = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.5, -1.0, 0.25], [1.0, 0.75, -0.5]]))
    x, y = torch.randn(4, 3, generator=seeds.generator(0, "x")), torch.tensor([0, 1, 1, 0])
    w = model.weight.detach().clone()

    def gradient(at: Tensor) -> Tensor:
        leaf = at.clone().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(x @ leaf.T, y), leaf)[0]

    g = gradient(w)
    h = gradient(w + 0.1 * w**2 * g / (w * g).norm())
    across = g - (g * h).sum() / (h * h).sum() * h
    recipe = Recipe(1, lr=0.5, batch=4, sharpness_radius=0.1, sharpness_weight=0.3)
    wrapped = nn.Sequential(nn.Flatten(), model)
    assert training.fit(wrapped, x[:, :, None, None], y, recipe, seed=0)
    torch.testing.assert_close(model.weight.detach(), w - 0.5 * (h - 0.3 * across), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "more",
    [
        ["--labels", "soft", "--init", "correct", "--lr-labels", "2", "--first-max-start-epoch", "1"],
        ["--prune", "lowest", "--ema", "0.9", "--nearest-step"],
        ["--prune", "depth", "--engine", "tesla", "--teachers-sharpness-radius", "0.01"],
        ["--lr-importance", "0.01"],
        ["--optimizer", "adam", "--lr-pixels", "0.1", "--labels", "soft", "--lr-labels", "0.1", "--ema", "0.9"],
    ],
    ids=["datm", "pad-ftd-att", "tesla", "iadd", "adam"],
)
def test_the_whole_job_and_a_resumed_one_give_the_same_bytes(more: list[str], tmp_path: Path) -> None:
    argv = [*TOY, *more, "--teachers-folder", str(tmp_path / "teachers")]
    assert distill.main([*argv, "--out", str(tmp_path / "one")]) == 0
    one, two = tmp_path / "one", tmp_path / "two"
    assert distill.main([*argv, "--out", str(two), "--steps", "2"]) == 0
    settings = (two / "config.toml").read_text().replace("\nsteps = 2\n", "\nsteps = 5\n")
    (two / "config.toml").write_text(settings)
    assert distill.main(["--out", str(two), "--resume"]) == 0
    assert (one / "synthetic.safetensors").read_bytes() == (two / "synthetic.safetensors").read_bytes()
    found, _ = synthetic.load(one / "synthetic.safetensors")
    assert found.labels.is_floating_point() == ("soft" in more)
    assert json.loads((one / "results.json").read_text())["steps"]["taken"] == 5


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--method", "dm", "--labels", "soft"], "--labels soft needs a method that learns labels (bptt, ddpp"),
        (["--method", "dsa", "--init", "correct"], "--init correct asks teachers, and method dsa has none"),
        (["--method", "mtt", "--prune", "lowest"], "--prune lowest needs --method ddpp: mtt prunes nothing"),
        (
            ["--method", "dm", "--prune", "lowest"],
            "--prune lowest needs a method that matches trajectories (ddpp, mtt)",
        ),
        (["--method", "kip", "--nearest-step"], "--nearest-step True needs a method that matches trajectories"),
        (["--min-start-epoch", "5"], "start epochs are drawn from --min-start-epoch 5"),
        (["--optimizer", "adam", "--momentum", "1"], "--optimizer adam needs a --momentum below 1, got 1; give 0.9"),
        (["--first-max-start-epoch", "6"], "start epochs are drawn from --min-start-epoch 0"),
    ],
)
def test_options_that_contradict_are_refused(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert distill.main([*argv, "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_configurations_of_the_field_are_complete() -> None:
    for name in config.preset_names():
        settings = Config().with_values(config.read_preset(name), name)
        distill._check(settings, distill.METHODS.get(settings.distill.method))
