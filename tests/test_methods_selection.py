"""Selections of real images against brute force, and through the whole job."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddpp import config, data, distill, models, runs, synthetic
from ddpp.config import Config, ModelConfig, TeachersConfig
from ddpp.methods import Problem
from ddpp.methods._real import embedder, trained_network
from ddpp.methods.forgetting import forgotten
from ddpp.methods.herding import herd
from ddpp.methods.kcenter import centers

SELECTIONS = ["random", "herding", "kcenter", "forgetting"]
TOY = [
    *("--width", "8", "--threads", "1", "--ipc", "3", "--teachers-epochs", "3"),
    *("--evaluate-networks", "2", "--evaluate-epochs", "3", "--evaluate-full-epochs", "1"),
]


@pytest.fixture
def points() -> Tensor:
    return torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_herding_takes_the_best_next_one(points: Tensor) -> None:
    chosen = herd(points, 5).tolist()
    assert len(set(chosen)) == 5
    for k, last in enumerate(chosen):

        def distance(i: int, before: list[int] = chosen[:k]) -> float:
            return float((points[[*before, i]].mean(0) - points.mean(0)).norm())

        assert last == min(set(range(len(points))) - set(chosen[:k]), key=distance)


def test_centers_are_always_the_farthest_next(points: Tensor) -> None:
    chosen = centers(points, 5).tolist()
    assert chosen[0] == int((points - points.mean(0)).norm(dim=1).argmin())
    for k in range(1, 5):
        distances = [min(float((p - points[i]).norm()) for i in chosen[:k]) for p in points]
        assert distances[chosen[k]] == max(distances)


def test_equal_images_are_chosen_once_each() -> None:
    assert sorted(centers(torch.ones(4, 2), 4).tolist()) == [0, 1, 2, 3]
    assert sorted(herd(torch.ones(4, 2), 4).tolist()) == [0, 1, 2, 3]


def test_forgetting_counts_of_a_history_by_hand() -> None:
    history = torch.tensor(
        [  # epochs by images: always right, never, learned late, forgotten once, forgotten twice
            [1, 0, 0, 1, 1],
            [1, 0, 0, 1, 0],
            [1, 0, 1, 0, 1],
            [1, 0, 1, 1, 0],
        ],
        dtype=torch.bool,
    )
    assert forgotten(history).tolist() == [0, 3, 0, 1, 2]
    assert sum(int(a and not b) for a, b in pairwise(history[:, 4].tolist())) == 2


@pytest.mark.parametrize("name", SELECTIONS)
def test_the_whole_job(name: str, tmp_path: Path) -> None:
    for out in ("one", "two"):
        assert distill.main([*TOY, "--method", name, "--out", str(tmp_path / out)]) == 0
    one, two = (tmp_path / out / "synthetic.safetensors" for out in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    found, meta = synthetic.load(one)
    dataset = data.load(config.DataConfig(dataset="digits"))
    assert found.labels.tolist() == [k for k in range(10) for _ in range(3)] and meta["steps"] == 0
    index = [torch.nonzero((dataset.train_images[:] == image).flatten(1).all(1)).flatten() for image in found.images]
    assert all(
        len(i) >= 1 and dataset.train_labels[i[0]] == label for i, label in zip(index, found.labels, strict=True)
    )
    assert runs.read_log(tmp_path / "one" / "log.jsonl") == []
    results = json.loads((tmp_path / "one" / "results.json").read_text())
    assert set(results["accuracy"]) == {"random", name, "full"} and results["steps"]["taken"] == 0


def test_an_embedding_does_not_depend_on_what_is_embedded_beside_it() -> None:
    settings = Config(model=ModelConfig(width=8, norm="batch"), teachers=TeachersConfig(epochs=1))
    dataset = data.load(settings.data)
    network = models.build(settings.model, dataset.shape, 10, seed=0)
    problem = Problem(settings, dataset, network, [], (), torch.device("cpu"))
    embedded = embedder(trained_network(problem), problem)
    torch.testing.assert_close(embedded(torch.arange(20))[:5], embedded(torch.arange(5)))


def test_more_images_than_a_class_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert distill.main([*TOY, "--method", "herding", "--ipc", "500", "--out", str(tmp_path / "a")]) == 2
    assert "--ipc 500 is more than" in capsys.readouterr().err
