"""Epochs of training, as teachers and evaluation run them, against a plain PyTorch loop over equal tensors.

The plain loop has no data loader either; it draws each batch's augmentation by itself and applies it unfused.
``extra_info`` holds epochs per second of the fastest round. As a table, the rounds of all sides interleaved:

    python benchmarks/bench_training.py [--threads 2] [--rounds 5]

The allocator keeps its pages for every side (see conftest.py).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from machine import processor
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from ddpp import augment, models, networks, training
from ddpp.config import ModelConfig
from ddpp.models import Network
from ddpp.ops import dsa_augment
from ddpp.training import Backend, Recipe

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """ConvNets of width 128 on images of one size, one after the other; ours side by side, as evaluation has them."""

    images: int
    shape: tuple[int, int, int]
    recipe: Recipe
    mode: str
    networks: int = 1

    @property
    def epochs(self) -> int:
        return self.networks * self.recipe.epochs

    def examples(self) -> tuple[Tensor, Tensor]:
        draw = torch.Generator().manual_seed(0)
        labels = torch.randint(10, (self.images,), generator=draw)
        return torch.randn(self.images, *self.shape, generator=draw), labels

    def network(self) -> Network:
        return models.build(ModelConfig(), self.shape, 10, seed=0)


CASES = {
    "teacher 32x32x3, 256 images": Case(256, (3, 32, 32), Recipe(1, lr=0.01, batch=256), "one"),
    "teacher 8x8x1, 1280 images": Case(1280, (1, 8, 8), Recipe(1, lr=0.01, batch=128), "one"),
    "evaluation 32x32x3, 10 images, 4 networks": Case(10, (3, 32, 32), Recipe(5, lr=0.01, momentum=0.9), "all", 4),
    "evaluation 8x8x1, 10 images, 4 networks": Case(10, (1, 8, 8), Recipe(50, lr=0.01, momentum=0.9), "all", 4),
}


def ours(case: Case, images: Tensor, labels: Tensor, **options: object) -> None:
    draws, backend = {"seed": 0, "groups": augment.GROUPS, "mode": case.mode}, Backend(CPU, **options)

    def one() -> bool:
        return training.fit(case.network(), images, labels, case.recipe, backend, **draws)

    assert all(networks.results_of([one] * case.networks, CPU))


def plain(case: Case, images: Tensor, labels: Tensor) -> None:
    for _ in range(case.networks):
        plain_one(case, images, labels)


def plain_one(case: Case, images: Tensor, labels: Tensor) -> None:
    network, recipe, draw = case.network(), case.recipe, torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(network.parameters(), recipe.lr, momentum=recipe.momentum)
    for _ in range(recipe.epochs):
        for chosen in torch.randperm(len(images), generator=draw).split(recipe.batch):
            size = len(chosen), *case.shape[1:]
            plan = augment.draw(1, *size, groups=augment.GROUPS, mode=case.mode, generator=draw)[0]
            batch = dsa_augment(images[chosen], plan, fused=False)
            optimizer.zero_grad()
            F.cross_entropy(network(batch), labels[chosen]).backward()
            optimizer.step()


PLAIN = "plain PyTorch"
SIDES = {
    PLAIN: plain,
    "without fused kernels": partial(ours, fused=False),
    "ddpp": ours,
    "ddpp, F(4, 3)": partial(ours, tile=4),
}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", CASES)
def test_epochs(benchmark: BenchmarkFixture, name: str, side: str) -> None:
    case = CASES[name]
    benchmark.group = name
    benchmark.pedantic(SIDES[side], args=(case, *case.examples()), rounds=3, warmup_rounds=1)
    if benchmark.stats:
        benchmark.extra_info["epochs per second"] = case.epochs / benchmark.stats.stats.min


def row(name: str, rounds: int) -> str:
    """Epochs per second of each side, by medians."""
    from ratios import medians

    case = CASES[name]
    examples = case.examples()
    seconds = medians({side: partial(loop, case, *examples) for side, loop in SIDES.items()}, rounds, repeats=1)
    cells = [f"{case.epochs / s:.3g} ({seconds[PLAIN] / s:.2f}x)" for s in seconds.values()]
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{processor()}, {args.threads} threads, torch {torch.__version__}\n")
    print(f"| epochs per second | {' | '.join(SIDES)} |\n|---|{'---|' * len(SIDES)}")
    for name in CASES:
        print(row(name, args.rounds), flush=True)


if __name__ == "__main__":
    main()
