"""What is learned in place of pixels: linear maps with their transposes, and whole runs of them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.fft import dctn
from torch import Tensor

from ddpp import continual, data, distill, evaluate, export, parameterization, report, runs, synthetic
from ddpp.config import Config, DataConfig, DistillConfig
from ddpp.data import Dataset
from ddpp.errors import UserError
from ddpp.methods import Memory, Update
from ddpp.parameterization import Frequencies, Multiformation, Parameterization
from ddpp.synthetic import Synthetic

CPU = torch.device("cpu")
TOY = [
    *("--width", "8", "--threads", "1", "--device", "cpu"),
    *("--teachers-count", "2", "--teachers-epochs", "3", "--max-start-epoch", "2", "--teacher-span", "1"),
    *("--steps", "4", "--inner-steps", "3", "--snapshot-every", "2", "--checkpoint-every", "2"),
    *("--evaluate-networks", "2", "--evaluate-epochs", "3", "--evaluate-full-epochs", "1"),
]
BOTH = pytest.mark.parametrize("name", ["frequencies", "multiformation"])


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return data.load(DataConfig())


def made(name: str, dataset: Dataset, images_in_one: int = 4) -> Parameterization:
    settings = DistillConfig(parameterization=name, images_in_one=images_in_one)
    return parameterization.make(settings, dataset, CPU)


def drawn(shape: Any, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@BOTH
def test_the_gradient_is_pulled_back_by_the_transpose(name: str, digits: Dataset) -> None:
    space = made(name, digits)
    numbers, gradient = drawn(space.encode(drawn((40, 1, 8, 8))).shape, 1), drawn((40, 1, 8, 8), 2)
    assert numbers.numel() == 10 * 64  # of ten images
    along = (space.decode(numbers) * gradient).sum()
    assert float((numbers * space.pull_back(gradient)).sum()) == pytest.approx(float(along), rel=1e-5)
    leaf = numbers.clone().requires_grad_()
    (by_autograd,) = torch.autograd.grad((space.decode(leaf) * gradient).sum(), leaf)
    assert torch.allclose(space.pull_back(gradient), by_autograd, atol=1e-5)


@BOTH
def test_what_is_encoded_decodes_to_the_nearest_images(name: str, digits: Dataset) -> None:
    space, images = made(name, digits), drawn((40, 1, 8, 8))
    nearest = space.decode(space.encode(images))
    assert space.pull_back(images - nearest).abs().max() < 1e-5  # what is left is orthogonal to all that can be decoded
    assert torch.allclose(space.decode(space.encode(nearest)), nearest, atol=1e-5)


def test_frequencies_are_those_of_the_cosine_transform(digits: Dataset) -> None:
    space, images = Frequencies.of(digits, 4, CPU), drawn((20, 1, 8, 8))
    places = space.fixed["places"]
    expected = torch.from_numpy(dctn(images.numpy(), axes=(2, 3), norm="ortho")).flatten(2)
    assert places.shape == (10, 16)
    for n, of_image in enumerate(space.encode(images)):
        assert torch.allclose(of_image, expected[n, :, places[n // 2]], atol=1e-5)


def test_a_class_keeps_the_frequencies_without_which_its_images_lose_most(digits: Dataset) -> None:
    places = Frequencies.of(digits, 4, CPU).fixed["places"]
    for label in range(10):
        images = digits.train_images[digits.train_labels == label].numpy()
        energy = torch.from_numpy(dctn(images, axes=(2, 3), norm="ortho")).square().sum((0, 1)).flatten()
        kept = energy[places[label]]
        assert len(set(places[label].tolist())) == 16
        assert float(kept.sum()) == pytest.approx(float(energy.topk(16).values.sum()), rel=1e-6)


def test_images_of_several_channels_and_of_two_sides() -> None:
    space = Multiformation((3, 8, 12), 4, CPU)
    numbers = drawn((5, 3, 8, 12))
    images = space.decode(numbers)
    for n in range(5):
        for part in range(4):
            y, x = 4 * (part // 2), 6 * (part % 2)
            small = numbers[n : n + 1, :, y : y + 4, x : x + 6]
            enlarged = F.interpolate(small, size=(8, 12), mode="bilinear")[0]
            assert torch.allclose(images[4 * n + part], enlarged, atol=1e-6)
    assert torch.allclose(space.encode(images), numbers, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "images_in_one", "message"),
    [
        ("pixels", 4, "give both options, or leave out both"),
        ("frequencies", 1, "frequencies and multiformation 2 or more"),
        ("frequencies", 65, "--images-in-one 65 is more than the 64 frequencies of an image"),
        ("multiformation", 2, "must be a square number for multiformation"),
        ("multiformation", 9, "its root must divide both sides of the images, which are 8x8"),
    ],
)
def test_what_does_not_suit_is_refused(name: str, images_in_one: int, message: str, digits: Dataset) -> None:
    with pytest.raises(UserError, match=message):
        made(name, digits, images_in_one)


@pytest.mark.parametrize("method", ["random", "herding"])
def test_a_method_that_learns_nothing_refuses_them(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert distill.main(["--method", method, "--parameterization", "frequencies", "--images-in-one", "4"]) == 2
    assert f"{method} learns nothing" in capsys.readouterr().err


def test_a_set_that_is_given_stands_for_itself(finished: Path, tmp_path: Path) -> None:
    """Options that say how it was made change nothing."""
    made_by = ["--parameterization", "frequencies", "--images-in-one", "4", "--ipc", "4"]
    given = ["--method", "given", "--given", str(finished / "synthetic.safetensors")]
    assert distill.main([*TOY, *made_by, *given, "--out", str(tmp_path / "run")]) == 0
    theirs, here = (synthetic.load(folder / "synthetic.safetensors")[0] for folder in (finished, tmp_path / "run"))
    assert torch.equal(theirs.images, here.images)
    assert "given, 4 images per class\n" in (tmp_path / "run" / "report.md").read_text()


@pytest.fixture(scope="module", params=["frequencies", "multiformation"])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp(request.param) / "run"
    teachers = tmp_path_factory.getbasetemp() / "teachers-of-parameterizations"
    options = ["--parameterization", request.param, "--images-in-one", "4", "--ema", "0.5"]
    assert distill.main([*TOY, *options, "--teachers-folder", str(teachers), "--out", str(out)]) == 0
    return out


def test_a_run_holds_more_images_in_as_many_numbers(finished: Path, digits: Dataset) -> None:
    held, meta = synthetic.load(finished / "synthetic.safetensors")
    tensors, _ = runs.read_tensors(finished / "synthetic.safetensors", "set")
    assert held.images.shape == (40, 1, 8, 8) and held.labels.tolist() == [n // 4 for n in range(40)]
    assert tensors["learned.numbers"].numel() == 10 * 64
    assert torch.equal(made(meta["parameterization"], digits).decode(tensors["learned.numbers"]), held.images)
    first, _ = synthetic.load(finished / "snapshots" / "step-000000.safetensors")
    assert not torch.equal(first.images, held.images)
    if "learned.places" in tensors:
        assert torch.equal(tensors["learned.places"], Frequencies.of(digits, 4, CPU).fixed["places"])


def test_it_is_evaluated_beside_random_images_of_its_storage(
    finished: Path, monkeypatch: pytest.MonkeyPatch, bars: list[Any]
) -> None:
    trained: list[int] = []
    plain = evaluate.Evaluation.network

    def noted(self: evaluate.Evaluation, model: str, images: Any, *rest: Any) -> evaluate.Scores:
        trained.append(len(images))
        return plain(self, model, images, *rest)

    monkeypatch.setattr(evaluate.Evaluation, "network", noted)
    argv = [str(finished), "--networks", "1", "--epochs", "2", "--full-epochs", "0"]
    assert evaluate.main([*argv, "--search-lr", "--augmentations", "none"]) == 0
    assert sorted(set(trained)) == [10, 40]
    assert bars[-1].n == bars[-1].total


def test_other_stages_know_its_size(finished: Path, tmp_path: Path, bars: list[Any]) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    assert report.main([str(folder)]) == 0
    assert "1 images per class, 4 in the numbers of each" in (folder / "report.md").read_text()
    assert export.main([str(folder), "--to", str(tmp_path / "out")]) == 0
    assert "1 images per class, 4 in the numbers of each" in (tmp_path / "out" / "README.md").read_text()
    assert len(list((tmp_path / "out" / "pixels" / "3").iterdir())) == 4
    assert continual.main([str(folder), "--orders", "1", "--steps", "2", "--epochs", "2"]) == 0
    assert bars[-1].n == bars[-1].total
    results = json.loads((folder / "continual.json").read_text())
    assert set(results["accuracy"]) == {"ddpp", "herding", "random"}


class _TowardsZero:
    """A method whose gradient depends on the images."""

    needs_teachers = learns_labels = False

    @staticmethod
    def check(config: Config) -> None: ...

    def update(self, held: Synthetic, step: int, memory: Memory) -> Update:
        gradient = held.images * (1 + step)
        return Update(gradient.square().sum(), gradient, torch.zeros(()), torch.ones(()), {})


@BOTH
def test_a_run_that_was_cut_goes_on_to_the_same_bytes(name: str, digits: Dataset, tmp_path: Path) -> None:
    space, first = made(name, digits), synthetic.start(digits, 1, "real", 0.02, 0, 4)

    def until(steps: int, folder: Path) -> distill.State:
        settings = DistillConfig(steps=steps, lr_pixels=0.01, snapshot_every=2, ema=0.9)
        return distill.distill(settings, first, _TowardsZero(), folder, space)

    until(3, tmp_path / "cut")
    cut, whole = until(6, tmp_path / "cut"), until(6, tmp_path / "whole")
    assert torch.equal(cut.numbers, whole.numbers) and torch.equal(cut.result.images, whole.result.images)
    last = "snapshots/step-000006.safetensors"
    assert (tmp_path / "cut" / last).read_bytes() == (tmp_path / "whole" / last).read_bytes()
    # Steps of the numbers are those of the images, brought into what can be decoded.
    assert torch.allclose(space.decode(space.encode(whole.result.images)), whole.result.images, atol=1e-5)
    assert float(whole.synthetic.images.norm()) < float(first.images.norm())


def test_a_run_that_goes_on_keeps_its_frequencies(digits: Dataset, tmp_path: Path) -> None:
    """Another machine, with other rounding, may find others."""
    settings = DistillConfig(steps=2, lr_pixels=0.01)
    first = synthetic.start(digits, 1, "real", 0.02, 0, 4)
    state = distill.distill(settings, first, _TowardsZero(), tmp_path, Frequencies.of(digits, 4, CPU))
    elsewhere = Frequencies(state.space.fixed["places"].flip(1) + 1, digits.shape)
    again = distill.State.load(tmp_path / "checkpoint.safetensors", CPU, elsewhere)
    assert torch.equal(again.synthetic.images, state.synthetic.images)


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path) -> None:
    runs.write_tensors(tmp_path / "checkpoint.safetensors", {"images": torch.zeros(1)}, {"step": 3})
    with pytest.raises(UserError, match="written by another version of ddpp"):
        distill.State.load(tmp_path / "checkpoint.safetensors", CPU)
