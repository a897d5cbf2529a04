"""Distribution matching against class means written out, and through the whole job."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddpp import augment, config, data, distill, models, runs, synthetic
from ddpp.config import Config, DistillConfig, ModelConfig
from ddpp.methods import METHODS, Problem

SETTINGS = Config(model=ModelConfig(width=8, depth=2), distill=DistillConfig(method="dm", ipc=2, real_batch=500))
TOY = [
    *("--method", "dm", "--width", "8", "--threads", "1", "--real-batch", "16", "--lr-pixels", "1"),
    *("--steps", "4", "--snapshot-every", "2", "--checkpoint-every", "2"),
    *("--evaluate-networks", "2", "--evaluate-epochs", "3", "--evaluate-full-epochs", "1"),
]


@pytest.fixture(scope="module")
def problem() -> Problem:
    dataset = data.load(config.DataConfig(dataset="digits"))
    network = models.build(SETTINGS.model, dataset.shape, 10, seed=0)
    return Problem(SETTINGS, dataset, network, [], (), torch.device("cpu"))


def test_the_loss_is_the_distance_of_the_class_means(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without augmentation, and with a batch of all real images, nothing but the network is random."""
    monkeypatch.setattr(models, "build", lambda *_, **__: problem.network)
    start = synthetic.start(problem.dataset, 2, "real", 0.01, 0)
    found = METHODS.get("dm")(problem).update(start, 0, {})

    def loss(images: Tensor) -> Tensor:
        total = torch.zeros(())
        for label in range(10):
            real = problem.dataset.train_images[problem.dataset.train_labels == label]
            means = [
                torch.stack([problem.network.embed(x[None])[0] for x in part]).mean(0)
                for part in (
                    real,
                    images[start.labels == label],
                )
            ]
            total = total + ((means[0] - means[1]) ** 2).sum()
        return total

    images = start.images.clone().requires_grad_()
    wanted = loss(images)
    torch.testing.assert_close(found.loss, wanted.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.images, torch.autograd.grad(wanted, images)[0], rtol=1e-3, atol=1e-5)
    assert float(found.step_size) == 0 and float(found.kept) == 1


def test_a_step_depends_on_its_number_and_the_seed_alone(problem: Problem) -> None:
    augmented = replace(problem, groups=augment.GROUPS)
    start = synthetic.start(problem.dataset, 2, "real", 0.01, 0)
    one, again = (METHODS.get("dm")(augmented) for _ in range(2))
    one.update(start, 0, {})
    first, second, other = one.update(start, 3, {}), again.update(start, 3, {}), again.update(start, 4, {})
    assert torch.equal(first.images, second.images) and not torch.equal(first.images, other.images)


def test_the_whole_job_and_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert distill.main([*TOY, "--out", str(tmp_path / name)]) == 0
    one, two = (tmp_path / name / "synthetic.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    rows = runs.read_log(tmp_path / "one" / "log.jsonl")
    assert [row["outcome"] for row in rows] == ["taken"] * 4
    found, _ = synthetic.load(one)
    assert float(found.step_size) == pytest.approx(DistillConfig().step_size)
