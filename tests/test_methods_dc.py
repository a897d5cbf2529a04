"""Gradient matching against a loop over rows, a plain graph of a graph, and through the whole job."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddpp import augment, config, data, distill, models, runs, synthetic
from ddpp.config import Config, DistillConfig, ModelConfig
from ddpp.methods import METHODS, Problem
from ddpp.methods.dc import row_distance
from ddpp.models import flat

SETTINGS = Config(model=ModelConfig(width=8, depth=2), distill=DistillConfig(method="dc", ipc=2, real_batch=500))
TOY = [
    *("--width", "8", "--threads", "1", "--real-batch", "16", "--lr-pixels", "0.1", "--ipc", "2"),
    *("--steps", "5", "--loops", "3", "--loop-epochs", "2", "--snapshot-every", "2", "--checkpoint-every", "2"),
    *("--evaluate-networks", "2", "--evaluate-epochs", "3", "--evaluate-full-epochs", "1"),
]


@pytest.fixture(scope="module")
def problem() -> Problem:
    dataset = data.load(config.DataConfig(dataset="digits"))
    network = models.build(SETTINGS.model, dataset.shape, 10, seed=0)
    return Problem(SETTINGS, dataset, network, [], (), torch.device("cpu"))


def distance_by_loop(found: list[Tensor], target: list[Tensor]) -> Tensor:
    total = torch.zeros((), dtype=found[0].dtype)
    for a, b in zip(found, target, strict=True):
        if a.dim() in (2, 4):
            for row in range(len(a)):
                x, y = a[row].flatten(), b[row].flatten()
                total = total + 1 - x @ y / (x.norm() * y.norm() + 1e-6)
    return total


def test_the_distance_is_a_sum_over_output_rows(problem: Problem) -> None:
    parameters = [torch.randn(p.shape, dtype=torch.float64) for p in problem.network.parameters()]
    others = [torch.randn_like(p) for p in parameters]
    found, target = (torch.cat([p.flatten() for p in ps]) for ps in (parameters, others))
    got = row_distance(found, target, flat.layout(problem.network))
    torch.testing.assert_close(got, distance_by_loop(parameters, others))


def test_the_gradient_is_that_of_a_graph_of_a_graph(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a batch of all real images, nothing but the network is random."""
    monkeypatch.setattr(models, "build", lambda *_, **__: problem.network)
    start = synthetic.start(problem.dataset, 2, "real", 0.01, 0)
    found = METHODS.get("dc")(problem).update(start, 0, {})
    images = start.images.clone().requires_grad_()
    parameters = list(problem.network.parameters())
    total = torch.zeros(())
    for label in range(10):
        real = problem.dataset.train_images[problem.dataset.train_labels == label]
        mine = images[start.labels == label]
        target, gradient = (
            torch.autograd.grad(
                F.cross_entropy(problem.network(x), torch.full((len(x),), label)), parameters, create_graph=graph
            )
            for x, graph in ((real, False), (mine, True))
        )
        total = total + distance_by_loop(list(gradient), list(target))
    torch.testing.assert_close(found.loss, total.detach(), rtol=1e-4, atol=1e-4)
    (wanted,) = torch.autograd.grad(total, images)
    assert float((found.images - wanted).norm() / wanted.norm()) < 1e-3
    assert torch.equal(found.memory["network"], flat.flatten(problem.network))


def test_the_network_learns_between_steps_and_is_fresh_after_the_last(problem: Problem) -> None:
    settings = replace(SETTINGS, distill=replace(SETTINGS.distill, loops=2, loop_epochs=3, lr_network=0.1))
    method = METHODS.get("dc")(replace(problem, config=settings))
    start = synthetic.start(problem.dataset, 2, "real", 0.01, 0)
    first = method.update(start, 0, {}).memory
    second = method.update(start, 1, first).memory
    third = method.update(start, 2, second).memory

    def loss(theta: Tensor) -> float:
        return float(F.cross_entropy(flat.call(problem.network, theta, start.images), start.labels))

    assert loss(second["network"]) < loss(first["network"])
    assert not torch.equal(third["network"], second["network"]) and not torch.equal(third["network"], first["network"])
    plain = first["network"]
    for _ in range(3):  # all images are one batch
        leaf = plain.clone().requires_grad_()
        out = flat.call(problem.network, leaf, start.images)
        plain = plain - 0.1 * torch.autograd.grad(F.cross_entropy(out, start.labels), leaf)[0]
    torch.testing.assert_close(second["network"], plain, rtol=1e-4, atol=1e-5)


def test_dsa_augments_real_and_synthetic_images_alike(problem: Problem) -> None:
    """Synthetic images that are the real ones have no distance, but for the 1e-6 of 260 rows, under any draw."""
    augmented = replace(problem, groups=augment.GROUPS)
    dataset = problem.dataset
    everything = synthetic.Synthetic(dataset.train_images[:], dataset.train_labels, torch.tensor(0.01))
    found = METHODS.get("dsa")(augmented).update(everything, 0, {})
    plain = METHODS.get("dsa")(problem).update(everything, 0, {})
    assert float(found.loss) < 0.05 and float(plain.loss) < 0.05
    assert not torch.allclose(found.loss, plain.loss, rtol=1e-3)


@pytest.mark.parametrize("name", ["dc", "dsa"])
def test_the_whole_job_and_a_resumed_one_give_the_same_bytes(name: str, tmp_path: Path) -> None:
    argv = [*TOY, "--method", name]
    assert distill.main([*argv, "--out", str(tmp_path / "one")]) == 0
    settings = config.load(tmp_path / "one" / "config.toml")
    dataset = data.load(settings.data)
    network = models.build(settings.model, dataset.shape, 10, seed=0)
    groups = augment.groups_for("auto", dataset.strategy)
    method = METHODS.get(name)(Problem(settings, dataset, network, [], groups, torch.device("cpu")))
    first = synthetic.start(dataset, 2, "real", settings.distill.step_size, 0)
    (tmp_path / "two").mkdir()
    for steps in (2, 5):  # the checkpoint after two steps holds the network
        state = distill.distill(replace(settings.distill, steps=steps), first, method, tmp_path / "two")
    whole, _ = synthetic.load(tmp_path / "one" / "synthetic.safetensors")
    assert torch.equal(state.synthetic.images, whole.images)
    assert [row["outcome"] for row in runs.read_log(tmp_path / "one" / "log.jsonl")] == ["taken"] * 5
