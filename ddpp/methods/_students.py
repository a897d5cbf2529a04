"""What methods share that train students: what computes their steps, how they begin, and what each step sees."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpp import augment, models, seeds
from ddpp.dual import Step
from ddpp.gpu import send
from ddpp.methods import Problem
from ddpp.models import flat
from ddpp.unroll import provider


def step_of(problem: Problem) -> Step:
    """What computes a student step and its adjoint, as the run's options have it."""
    run = problem.config.run
    name = "auto" if run.use_fused_kernels else "autograd"
    return provider(problem.network, name, tile=run.winograd, bf16=run.bf16)


def fresh(problem: Problem, *key: str | int) -> Tensor:
    """The parameters of a network with random weights, on the problem's device. [P]"""
    config, dataset = problem.config, problem.dataset
    seed = seeds.derive(config.run.seed, *key)
    network = models.build(config.model, dataset.shape, len(dataset.classes), seed=seed)
    return flat.flatten(network).to(problem.device)


def draw_batches(problem: Problem, images: int, count: int, step: int) -> list[Tensor]:
    """Batches that pass through fresh permutations of the set, of each the shorter one first (as MTT's code).

    Args:
        images: of the set.
        count: of the batches.
        step: the outer step.

    Returns:
        ``count`` of [n] int64, on the problem's device.
    """
    draw = seeds.generator(problem.config.run.seed, "batches", step)
    batches: list[Tensor] = []
    while len(batches) < count:
        batches += reversed(torch.randperm(images, generator=draw).split(problem.config.distill.batch or images))
    batches = batches[:count]
    return list(send(torch.cat(batches), problem.device).split([len(b) for b in batches]))


def draw_plans(problem: Problem, sizes: list[int], step: int, *key: str) -> list[Tensor] | None:
    """An augmentation plan [n, 16] for each batch of these sizes, or None without augmentation."""
    if not problem.groups:
        return None
    plans = augment.draw(
        len(sizes),
        max(sizes),
        *problem.dataset.shape[1:],
        groups=problem.groups,
        mode=problem.config.augment.mode,
        generator=seeds.generator(problem.config.run.seed, "augment", *key, step),
    )
    return [plan[:size] for plan, size in zip(send(plans, problem.device), sizes, strict=True)]
