"""Back-propagation through training against the whole graph written out, and through the whole job."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddpp import augment, config, data, distill, models, runs, synthetic
from ddpp.config import Config, DistillConfig, ModelConfig
from ddpp.errors import UserError
from ddpp.methods import METHODS, Problem
from ddpp.methods._students import draw_batches, draw_plans
from ddpp.models import flat
from ddpp.ops import dsa_augment
from ddpp.synthetic import Synthetic

OF_BPTT = DistillConfig(method="bptt", ipc=2, real_batch=500, inner_steps=3, batch=8)
SETTINGS = Config(model=ModelConfig(width=8, depth=2), distill=OF_BPTT)
TOY = [
    *("--method", "bptt", "--width", "8", "--threads", "1", "--real-batch", "16", "--inner-steps", "3"),
    *("--student-steps", "5", "--inner-optimizer", "adam", "--labels", "soft"),
    *("--steps", "6", "--snapshot-every", "2", "--checkpoint-every", "2"),
    *("--evaluate-networks", "2", "--evaluate-epochs", "3", "--evaluate-full-epochs", "1"),
]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def problem() -> Problem:
    """With a network whose every parameter counts."""
    dataset = data.load(config.DataConfig(dataset="digits"))
    network = models.build(ModelConfig("lenet"), dataset.shape, 10, seed=0)
    return Problem(SETTINGS, dataset, network, [], (), CPU)


def start(problem: Problem, *, soft: bool = False) -> Synthetic:
    first = synthetic.start(problem.dataset, 2, "real", 0.01, 0)
    return synthetic.with_soft_labels(first, 10) if soft else first


def of(problem: Problem, groups: tuple[str, ...] = (), **options: Any) -> Problem:
    settings = replace(SETTINGS, distill=replace(OF_BPTT, **options), model=ModelConfig("lenet"))
    return replace(problem, config=settings, groups=groups)


def moved(theta: Tensor, gradient: Tensor, lr: Tensor, moments: list[Tensor], count: int) -> Tensor:
    """Adam as its paper writes it, where there are moments; of a parameter that has no gradient, without one."""
    if not moments:
        return theta - lr * gradient
    moments[0] = 0.9 * moments[0] + 0.1 * gradient
    moments[1] = 0.999 * moments[1] + 0.001 * gradient**2
    root = (moments[1] / (1 - 0.999**count) + 1e-60).sqrt()
    return theta - lr * (moments[0] / (1 - 0.9**count)) / (root + 1e-8)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("groups", [(), augment.GROUPS])
@pytest.mark.parametrize("soft", [False, True])
def test_the_gradient_is_that_of_the_whole_graph(
    problem: Problem, optimizer: str, groups: tuple[str, ...], soft: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the last three of up to eight steps, by all real images; in float64, since Adam scales rounding errors up."""
    problem = of(problem, groups, inner_optimizer=optimizer, student_steps=8, labels="soft" if soft else "hard")
    first, method = start(problem, soft=soft), METHODS.get("bptt")(problem)
    first = Synthetic(first.images.double(), first.labels.double() if soft else first.labels, first.step_size.double())
    fresh = method._fresh(1).double()
    monkeypatch.setattr(method, "_fresh", lambda step: fresh)
    monkeypatch.setattr(method.by_class, "_images", problem.dataset.train_images[:].double())
    found = method.update(first, 1, {})
    skipped = int(found.note["first"])
    assert skipped > 0
    network, theta = problem.network, fresh
    batches = draw_batches(problem, 20, skipped + 3, 1)
    plans = draw_plans(problem, [len(b) for b in batches], 1) or [None] * len(batches)
    images, lr = first.images.clone().requires_grad_(), first.step_size.clone().requires_grad_()
    labels = first.labels.clone().requires_grad_(soft)
    moments = [torch.zeros_like(theta)] * 2 if optimizer == "adam" else []
    for number, (batch, plan) in enumerate(zip(batches, plans, strict=True)):
        if number <= skipped:
            theta, moments = theta.detach().requires_grad_(), [m.detach() for m in moments]
        seen = images[batch] if plan is None else dsa_augment(images[batch], plan, fused=False)
        loss = F.cross_entropy(flat.call(network, theta, seen), labels[batch].softmax(1) if soft else labels[batch])
        gradient = torch.autograd.grad(loss, theta, create_graph=True)[0]
        theta = moved(theta, gradient, lr, moments, number + 1)
    real, truth = method.real(1)
    assert len(real) == len(problem.dataset.train_labels)
    loss = F.cross_entropy(flat.call(network, theta, real), truth)
    gradients = torch.autograd.grad(loss, [images, lr, *([labels] if soft else [])])
    torch.testing.assert_close(found.loss, loss.detach())
    for got, want in zip((found.images, found.step_size, found.labels), gradients, strict=False):
        assert got is not None and (got - want).norm() <= 1e-9 * want.norm()


def test_a_gradient_that_is_much_longer_than_usual_is_shortened(problem: Problem) -> None:
    problem = of(problem)
    first, method = start(problem), METHODS.get("bptt")(problem)
    plain = method.update(first, 0, {})
    length = plain.images.norm()
    torch.testing.assert_close(plain.memory["norm"], length)
    for before, expected in ((length, length), (length / 100, 2 * (0.9 * length / 100 + 0.1 * length))):
        found = method.update(first, 0, {"norm": before})
        torch.testing.assert_close(found.images.norm(), expected)
        torch.testing.assert_close(found.images / found.images.norm(), plain.images / length)
        torch.testing.assert_close(found.memory["norm"], 0.9 * before + 0.1 * length)


def test_students_differ_and_depend_on_the_step_and_the_seed_alone(problem: Problem) -> None:
    problem = of(problem, augment.GROUPS, student_steps=6)
    first = start(problem)
    one, again = (METHODS.get("bptt")(problem) for _ in range(2))
    one.update(first, 0, {})
    found, same, other = one.update(first, 3, {}), again.update(first, 3, {}), again.update(first, 4, {})
    assert torch.equal(found.images, same.images) and not torch.equal(found.images, other.images)
    assert {one._draw_first(step) for step in range(40)} == {0, 1, 2, 3}
    assert METHODS.get("bptt")(of(problem))._draw_first(0) == 0


def test_real_images_are_taken_a_few_at_once(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    for network in ("convnet", "lenet"):
        model = replace(SETTINGS.model, model=network)
        built = models.build(model, problem.dataset.shape, 10, seed=0)
        small = replace(problem, config=replace(SETTINGS, model=model), network=built)
        whole = METHODS.get("bptt")(small).update(start(problem), 0, {})
        monkeypatch.setattr("ddpp.methods.bptt._AT_ONCE", 77)
        parts = METHODS.get("bptt")(small).update(start(problem), 0, {})
        torch.testing.assert_close(parts.images, whole.images, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(parts.loss, whole.loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--student-steps", "2"], "--student-steps 2 must be at least --inner-steps 3, which are the last of them"),
        (["--student-steps", "1000000"], "--student-steps must be between 1 and 100000, got 1000000"),
        (["--norm", "batch"], "--method bptt passes each class through the network by itself, where --norm batch"),
        (["--evaluate-optimizer", "sgd"], "networks by sgd need a learning rate of their own"),
        (["--engine", "tesla"], "--engine tesla approximates trajectory matching; for bptt give adjoint or unrolled"),
        (["--nearest-step"], "--nearest-step True needs a method that matches trajectories (ddpp, mtt), and bptt does"),
        (["--method", "ddpp"], "--inner-optimizer adam needs a method that trains students from scratch (bptt)"),
        (["--method", "dm", "--labels", "hard"], "--inner-optimizer adam needs a method that trains students"),
        (["--init", "correct"], "--init correct asks teachers, and method bptt has none"),
    ],
)
def test_what_cannot_be_is_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert distill.main([*TOY, *options]) == 2
    assert message in capsys.readouterr().err


def test_the_whole_job_cut_and_resumed_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert distill.main([*TOY, "--out", str(whole)]) == 0
    outer_step = distill.outer_step

    def until_the_third(state: distill.State, *rest: Any) -> Any:
        if state.step == 3:
            raise UserError("cut")
        return outer_step(state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(distill, "outer_step", until_the_third)
        assert distill.main([*TOY, "--out", str(cut)]) == 2
    assert distill.main(["--out", str(cut), "--resume"]) == 0
    for name in ("synthetic.safetensors", "log.jsonl"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name
    rows = runs.read_log(whole / "log.jsonl")
    assert [row["outcome"] for row in rows] == ["taken"] * 6 and {row["first"] for row in rows} <= {0, 1, 2}


def test_networks_are_trained_as_the_students_were_unless_another_rule_is_given() -> None:
    settings = replace(SETTINGS, distill=replace(OF_BPTT, inner_optimizer="adam"))
    assert SETTINGS.networks_optimizer == "sgd" and settings.networks_optimizer == "adam"
    assert settings.with_values({"evaluate": {"optimizer": "sgd"}}, "test").networks_optimizer == "sgd"


def test_what_it_learns_is_worth_more_than_what_it_began_with(tmp_path: Path) -> None:
    """In sixty steps of small students."""
    argv = ["--method", "bptt", "--inner-optimizer", "adam", "--step-size", "0.01", "--lr-step-size", "0"]
    argv += ["--width", "16", "--steps", "60", "--inner-steps", "20", "--student-steps", "40", "--threads", "1"]
    argv += ["--real-batch", "16", "--lr-pixels", "300", "--evaluate-networks", "1", "--evaluate-epochs", "1"]
    assert distill.main([*argv, "--evaluate-full-epochs", "0", "--out", str(tmp_path / "run")]) == 0
    losses = [row["loss"] for row in runs.read_log(tmp_path / "run" / "log.jsonl")]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
