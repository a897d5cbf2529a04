"""Kernel inducing points against a ridge regression in closed form, and through the whole job."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ddpp import config, data, distill, models, runs, seeds, synthetic
from ddpp.config import Config, DistillConfig, ModelConfig
from ddpp.errors import UserError
from ddpp.methods import METHODS, Problem, kip
from ddpp.ntk import WideNetwork

SETTINGS = Config(
    model=ModelConfig(width=8, depth=2),
    distill=DistillConfig(method="kip", ipc=2, kip_kernel="fc", kip_depth=2, kip_batch=40),
)
TOY = [
    *("--method", "kip", "--ipc", "1", "--width", "8", "--threads", "1", "--kip-batch", "16", "--kip-depth", "2"),
    *("--steps", "4", "--snapshot-every", "2", "--checkpoint-every", "2"),
    *("--evaluate-networks", "2", "--evaluate-epochs", "3", "--evaluate-full-epochs", "1"),
]


@pytest.fixture(scope="module")
def problem() -> Problem:
    dataset = data.load(config.DataConfig(dataset="digits"))
    network = models.build(SETTINGS.model, dataset.shape, 10, seed=0)
    return Problem(SETTINGS, dataset, network, [], (), torch.device("cpu"))


def test_a_linear_kernel_is_ridge_regression() -> None:
    """Coefficients of the kernel against the normal equations of the features."""
    draw = torch.Generator().manual_seed(0)
    x, new = (torch.randn(n, 3, generator=draw, dtype=torch.float64) for n in (8, 5))
    y = torch.randn(8, 2, generator=draw, dtype=torch.float64)
    found = new @ x.T @ kip.fit(x @ x.T, y, 0.1)
    ridge = 0.1 * x.square().sum() / 8
    wanted = new @ torch.linalg.inv(x.T @ x + ridge * torch.eye(3, dtype=torch.float64)) @ x.T @ y
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_targets_are_one_hot_less_their_mean() -> None:
    wanted = torch.tensor([[-0.25, -0.25, 0.75, -0.25], [0.75, -0.25, -0.25, -0.25]], dtype=torch.float64)
    assert torch.equal(kip.targets(torch.tensor([2, 0]), 4), wanted)


def test_soft_targets_are_shares_less_their_mean() -> None:
    first = synthetic.Synthetic(torch.zeros(2, 1, 8, 8), torch.tensor([2, 0]), torch.tensor(0.01))
    soft = synthetic.with_soft_labels(first, 4).labels
    shares = torch.tensor([[1 / 30, 1 / 30, 0.9, 1 / 30], [0.9, 1 / 30, 1 / 30, 1 / 30]], dtype=torch.float64)
    torch.testing.assert_close(kip.targets(soft, 4), shares - 0.25)


def test_the_gradient_of_soft_labels(problem: Problem) -> None:
    """By finite differences of the loss that a step reports."""
    method = METHODS.get("kip")(problem)
    start = synthetic.with_soft_labels(synthetic.start(problem.dataset, 2, "real", 0.01, 0), 10)
    start = replace(start, labels=start.labels.double())
    direction = torch.randn(start.labels.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss(by: float) -> float:
        return float(method.update(replace(start, labels=start.labels + by * direction), 3, {}).loss)

    found = method.update(start, 3, {})
    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    assert found.labels is not None and float((found.labels * direction).sum()) == pytest.approx(slope, rel=1e-5)
    assert (
        METHODS.get("kip")(problem).update(synthetic.start(problem.dataset, 2, "real", 0.01, 0), 3, {}).labels is None
    )


def test_the_loss_of_a_step_and_its_gradient(problem: Problem) -> None:
    """The loss written out image by image, its gradient by finite differences."""
    start = synthetic.start(problem.dataset, 2, "real", 0.01, 0)
    found = METHODS.get("kip")(problem).update(start, 3, {})
    chosen = torch.randperm(len(problem.dataset.train_labels), generator=seeds.generator(0, "kip", 3))[:40]

    def loss(images: torch.Tensor) -> float:
        network, total = WideNetwork("fc", 2), 0.0
        kernel = network.kernels(images, images).ntk
        inverse = torch.linalg.inv(kernel + 1e-6 * kernel.trace() / 20 * torch.eye(20, dtype=torch.float64))
        for n in chosen:
            row = network.kernels(problem.dataset.train_images[n][None], images).ntk[0]
            predicted = row @ inverse @ (torch.eye(10, dtype=torch.float64)[start.labels] - 0.1)
            wanted = torch.eye(10, dtype=torch.float64)[problem.dataset.train_labels[n]] - 0.1
            total += float((predicted - wanted).square().sum()) / 2
        return total / len(chosen)

    images = start.images.double()
    assert float(found.loss) == pytest.approx(loss(images), rel=1e-6)
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slope = (loss(images + 1e-5 * direction) - loss(images - 1e-5 * direction)) / 2e-5
    assert float((found.images * direction).sum()) == pytest.approx(slope, rel=1e-4)
    assert float(found.step_size) == 0 and float(found.kept) == 1


def test_a_step_depends_on_its_number_and_the_seed_alone(problem: Problem) -> None:
    start = synthetic.start(problem.dataset, 2, "real", 0.01, 0)
    one, again = (METHODS.get("kip")(problem) for _ in range(2))
    one.update(start, 0, {})
    first, second, other = one.update(start, 3, {}), again.update(start, 3, {}), again.update(start, 4, {})
    assert torch.equal(first.images, second.images) and not torch.equal(first.images, other.images)


def test_steps_improve_the_regression(problem: Problem) -> None:
    dataset, network = problem.dataset, WideNetwork("fc", 2)
    method = METHODS.get("kip")(problem)
    state = distill.State.begin(synthetic.start(dataset, 2, "real", 0.01, 0))
    begin, end = state, state
    for step in range(40):
        end = end.moved(method.update(end.synthetic, step, {}), SETTINGS.distill)
    before, after = (kip.accuracy_of_krr(network, s.synthetic, dataset, 1e-6) for s in (begin, end))
    assert after > before + 5


def test_the_regression_knows_what_it_was_fitted_to(problem: Problem) -> None:
    held = synthetic.start(problem.dataset, 2, "real", 0.01, 0)
    known = replace(problem.dataset, test_images=data.Images(held.images), test_labels=held.labels)
    assert kip.accuracy_of_krr(WideNetwork("conv", 2), held, known, 1e-6) == 100
    wrong = replace(known, test_labels=(held.labels + 1) % 10)
    assert kip.accuracy_of_krr(WideNetwork("conv", 2), held, wrong, 1e-6) == 0


def test_pooling_that_does_not_fit_is_refused(
    problem: Problem, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of digits 64 * 64 pairs of positions, 2 layers, 24 numbers of 8 bytes: 1.5 MiB."""
    settings = replace(SETTINGS, distill=replace(SETTINGS.distill, kip_kernel="conv-gap"))
    pooled = replace(problem, config=settings)
    METHODS.get("kip")(pooled)
    monkeypatch.setattr(kip, "_memory", lambda device: 2**20)
    with pytest.raises(UserError, match=r"conv-gap needs 0\.0 GiB for a real image and a synthetic one of 1x8x8"):
        METHODS.get("kip")(pooled)
    out = tmp_path / "run"
    assert distill.main([*TOY, "--kip-kernel", "conv-gap", "--out", str(out)]) == 2
    assert not out.exists()  # refused before anything is begun


def test_more_poolings_than_there_are_pixels_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    options = ["--kip-kernel", "convnet", "--kip-depth", "4", "--out", str(out)]
    assert distill.main([*TOY, *options]) == 2
    assert "--kip-kernel convnet, --kip-depth 4 pools images of 8x8 pixels below one pixel" in capsys.readouterr().err
    assert not out.exists()


def test_numbers_that_are_not_finite_come_back(problem: Problem) -> None:
    """The loop undoes such a step; an error would end the run."""
    start = synthetic.start(problem.dataset, 2, "real", 0.01, 0)
    broken = replace(start, images=start.images * 1e200)
    assert not torch.isfinite(METHODS.get("kip")(problem).update(broken, 0, {}).loss)


def test_the_accuracy_of_the_regression_is_that_of_the_saved_set(tmp_path: Path) -> None:
    """Where the images' average is saved, not of the last ones."""
    options = [
        "--kip-kernel",
        "fc",
        "--steps",
        "20",
        "--lr-pixels",
        "50",
        "--ema",
        "0.9",
        "--out",
        str(tmp_path / "run"),
    ]
    assert distill.main([*TOY, *options]) == 0
    found, _ = synthetic.load(tmp_path / "run" / "synthetic.safetensors")
    dataset = data.load(config.DataConfig(dataset="digits"))
    told = json.loads((tmp_path / "run" / "results.json").read_text())["accuracy_of_method"]
    assert told == kip.accuracy_of_krr(WideNetwork("fc", 2), found, dataset, 1e-6)


def test_the_whole_job_and_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert distill.main([*TOY, "--out", str(tmp_path / name)]) == 0
    soft = tmp_path / "soft"
    assert distill.main([*TOY, "--labels", "soft", "--out", str(soft)]) == 0
    assert synthetic.load(soft / "synthetic.safetensors")[0].labels.is_floating_point()
    one, two = (tmp_path / name / "synthetic.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    rows = runs.read_log(tmp_path / "one" / "log.jsonl")
    assert [row["outcome"] for row in rows] == ["taken"] * 4
    assert all(0 <= row["right"] <= 16 for row in rows)
    results = json.loads((tmp_path / "one" / "results.json").read_text())
    found, _ = synthetic.load(one)
    dataset = data.load(config.DataConfig(dataset="digits"))
    assert results["accuracy_of_method"] == kip.accuracy_of_krr(WideNetwork("conv", 2), found, dataset, 1e-6)
    first, _ = synthetic.load(tmp_path / "one" / "snapshots" / "step-000000.safetensors")
    assert not torch.equal(found.images, first.images)
