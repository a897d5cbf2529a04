"""Feature alignment against means written out, its dynamic loops, and the whole job."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddpp import config, data, distill, models, synthetic
from ddpp.config import Config, DistillConfig, ModelConfig
from ddpp.methods import METHODS, Problem

SETTINGS = Config(model=ModelConfig(width=8, depth=2), distill=DistillConfig(method="cafe", ipc=2, real_batch=500))
TOY = [
    *("--method", "cafe", "--width", "8", "--threads", "1", "--real-batch", "16", "--lr-pixels", "1", "--ipc", "2"),
    *("--loop-epochs", "3", "--snapshot-every", "2", "--checkpoint-every", "2"),
    *("--evaluate-networks", "2", "--evaluate-epochs", "3", "--evaluate-full-epochs", "1"),
]


@pytest.fixture(scope="module")
def problem() -> Problem:
    dataset = data.load(config.DataConfig(dataset="digits"))
    network = models.build(SETTINGS.model, dataset.shape, 10, seed=0)
    return Problem(SETTINGS, dataset, network, [], (), torch.device("cpu"))


def test_the_loss_by_means_written_out(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a ConvNet of two blocks: two activations and the embedding."""
    monkeypatch.setattr(models, "build", lambda *_, **__: problem.network)
    start, network, dataset = synthetic.start(problem.dataset, 2, "real", 0.01, 0), problem.network, problem.dataset
    found = METHODS.get("cafe")(problem).update(start, 0, {})
    blocks = list(network.features.children())

    def layers(x: Tensor) -> list[Tensor]:
        kept = []
        for i, block in enumerate(blocks):
            x = block(x)
            if i % 4 == 2:
                kept.append(x)
        return [*kept, x.flatten(1)]

    images = start.images.clone().requires_grad_()
    total, centres = torch.zeros(()), []
    for label in range(10):
        real = layers(dataset.train_images[dataset.train_labels == label])
        mine = layers(images[start.labels == label])
        weighted = zip((0.1, 1, 2), mine, real, strict=True)
        total = total + sum(w * ((a.mean(0) - b.mean(0)) ** 2).sum() for w, a, b in weighted)
        centres.append(mine[-1].mean(0))
    answers = layers(dataset.train_images[:])[-1].detach() @ torch.stack(centres).T
    total = total + 0.01 * F.cross_entropy(answers, dataset.train_labels, reduction="sum")
    torch.testing.assert_close(found.loss, total.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.images, torch.autograd.grad(total, images)[0], rtol=1e-3, atol=1e-5)


def test_a_network_stays_until_it_settles(problem: Problem) -> None:
    moving = replace(SETTINGS, distill=replace(SETTINGS.distill, loop_epochs=1, lr_network=0.0, outer_change=0.0))
    start = synthetic.start(problem.dataset, 2, "real", 0.01, 0)
    for change, fresh in ((0.0, False), (1.0, True)):  # at a rate of 0 the network changes only if it is replaced
        settings = replace(moving, distill=replace(moving.distill, outer_change=change))
        method, memory = METHODS.get("cafe")(replace(problem, config=settings)), {}
        seen = []
        for step in range(11):
            memory = method.update(start, step, memory).memory
            seen.append(memory["network"])
        assert torch.equal(seen[0], seen[9]) and torch.equal(seen[9], seen[10]) != fresh
        assert len(memory["accuracy"]) == (1 if fresh else 10)


def test_training_stops_where_an_epoch_changes_little(problem: Problem) -> None:
    start = synthetic.start(problem.dataset, 2, "real", 0.01, 0)
    ends = []
    for change in (1.0, 0.0):
        options = replace(SETTINGS.distill, loop_epochs=5, lr_network=0.1, inner_change=change)
        method = METHODS.get("cafe")(replace(problem, config=replace(SETTINGS, distill=options)))
        ends.append(method.update(start, 0, {}).memory["network"])
    begin = METHODS.get("cafe")(problem)._fresh(0)
    assert 0 < float((ends[0] - begin).norm()) < float((ends[1] - begin).norm())


def test_the_whole_job_and_a_resumed_one_give_the_same_bytes(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert distill.main([*TOY, "--steps", "5", "--out", str(one)]) == 0
    assert distill.main([*TOY, "--steps", "2", "--out", str(two)]) == 0
    settings = (two / "config.toml").read_text().replace("\nsteps = 2\n", "\nsteps = 5\n")
    (two / "config.toml").write_text(settings)
    assert distill.main(["--out", str(two), "--resume"]) == 0
    assert (one / "synthetic.safetensors").read_bytes() == (two / "synthetic.safetensors").read_bytes()
