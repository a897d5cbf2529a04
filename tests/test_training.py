"""Training on images in memory: the update rule, augmentation, labels, and what divergence does."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddpp import models, training
from ddpp.augment import GROUPS
from ddpp.config import ModelConfig
from ddpp.errors import UserError
from ddpp.models import Network, flat
from ddpp.ops._library import implementation
from ddpp.training import Backend, Recipe


def network(seed: int = 0) -> Network:
    return models.build(ModelConfig(width=8, depth=2), (1, 8, 8), 3, seed=seed)


def examples(count: int = 30) -> tuple[Tensor, Tensor]:
    """Three classes, each brighter in another third of the image."""
    labels = torch.arange(count) % 3
    images = 0.3 * torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for i, label in enumerate(labels):
        images[i, :, :, 3 * label : 3 * label + 2] += 2
    return images, labels


def trained(recipe: Recipe, labels: Tensor | None = None, fused: bool = True, **options: object) -> Tensor:
    model, (images, truth) = network(), examples()
    labels = truth if labels is None else labels
    training.fit(model, images, labels, recipe, Backend(fused=fused), **{"seed": 1, **options})
    return flat.flatten(model)


def test_it_learns() -> None:
    model, (images, labels) = network(), examples()
    before = training.accuracy(model, images, labels)
    assert training.fit(model, images, labels, Recipe(20, lr=0.1, batch=8), seed=0)
    after = training.accuracy(model, images, labels, batch=7)
    assert before < 70
    assert after == 100


def test_a_step_is_sgd_with_momentum_and_weight_decay() -> None:
    """Of whole batches, whose order does not matter: v = 0.9 v + (g + decay theta), theta = theta - lr v."""
    images, labels = examples()
    model = network()
    theta = flat.flatten(model)
    velocity = torch.zeros_like(theta)
    for _ in range(3):
        theta.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(flat.call(model, theta, images), labels), theta)
        theta = theta.detach()
        velocity = 0.9 * velocity + gradient + 0.01 * theta
        theta = theta - 0.05 * velocity
    found = trained(Recipe(3, lr=0.05, momentum=0.9, weight_decay=0.01, batch=30))
    torch.testing.assert_close(found, theta, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("fused", [True, False])
def test_adam_is_pytorchs(fused: bool) -> None:
    """Of whole batches, whose order does not matter; it begins anew where the rate falls."""
    images, labels = examples()
    model, wanted = network().double(), network().double()  # of a small gradient Adam follows the rounding too
    recipe = Recipe(6, lr=0.01, weight_decay=0.01, batch=30, decay=True, optimizer="adam")
    training.fit(model, images.double(), labels, recipe, Backend(fused=fused), seed=1)
    for rate, epochs in ((0.01, 5), (0.001, 1)):
        optimizer = torch.optim.Adam(wanted.parameters(), rate, weight_decay=0.01)
        for _ in range(epochs):
            optimizer.zero_grad()
            F.cross_entropy(wanted(images.double()), labels).backward()
            optimizer.step()
    torch.testing.assert_close(flat.flatten(model), flat.flatten(wanted), atol=1e-9, rtol=0)


RECIPES = {
    "everything": Recipe(6, lr=0.05, momentum=0.9, weight_decay=0.01, batch=8, decay=True),
    "flat minima": Recipe(3, lr=0.05, batch=8, sharpness_radius=0.05, sharpness_weight=0.3),
    "adam": Recipe(6, lr=0.01, weight_decay=0.01, batch=8, decay=True, optimizer="adam"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("tile", [0, 2, 4])
def test_compiled_kernels_train_as_pure_pytorch_does(tile: int, recipe: Recipe, soft: bool, dtype: torch.dtype) -> None:
    images, labels = examples()
    if soft:
        labels = torch.randn(30, 3, generator=torch.Generator().manual_seed(0)).to(dtype)

    def end(**options: object) -> Tensor:
        model = network().to(dtype)
        draws = {"seed": 1, "groups": GROUPS, "mode": "all"}
        training.fit(model, images.to(dtype), labels, recipe, Backend(**options), **draws)
        return flat.flatten(model)

    atol = 1e-11 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(end(tile=tile), end(fused=False), atol=atol, rtol=0)


@pytest.mark.parametrize("fused", [True, False])
def test_the_network_follows_each_step(fused: bool) -> None:
    model, (images, labels) = network(), examples()
    seen = [flat.flatten(model)]
    recipe = Recipe(2, lr=0.1, batch=10)
    options = {"seed": 0, "backend": Backend(fused=fused)}
    training.fit(model, images, labels, recipe, on_step=lambda _: seen.append(flat.flatten(model)), **options)
    assert all(not torch.equal(before, after) for before, after in itertools.pairwise(seen))
    assert torch.equal(seen[-1], flat.flatten(model))


@pytest.mark.parametrize("fused", [True, False])
def test_compiled_kernels_only_where_they_are_wanted_and_suit(fused: bool) -> None:
    """The parameters are then views of one vector."""
    compiled = implementation("norm_relu_pool", "cpu")[0] == "C++"
    for activation in ("relu", "sigmoid"):
        model = models.build(ModelConfig(width=8, activation=activation), (1, 8, 8), 3, seed=0)
        images, labels = examples()
        training.fit(model, images, labels, Recipe(1, lr=0.1), Backend(fused=fused), seed=0)
        memories = {p.untyped_storage().data_ptr() for p in model.parameters()}
        assert (len(memories) == 1) == (fused and compiled and activation == "relu")


def test_the_rate_falls_once_and_the_momentum_is_lost() -> None:
    """Of 6 epochs, 0 to 4 run at the full rate; the last one is a plain step at a tenth."""
    images, labels = examples()
    recipe = Recipe(6, lr=0.1, momentum=0.9, batch=30, decay=True)
    before = trained(Recipe(5, lr=0.1, momentum=0.9, batch=30)).requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(flat.call(network(), before, images), labels), before)
    torch.testing.assert_close(trained(recipe), before.detach() - 0.01 * gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("groups", [(), GROUPS])
@pytest.mark.parametrize("mode", ["one", "all"])
def test_a_seed_gives_the_same_bytes(groups: tuple[str, ...], mode: str) -> None:
    recipe = Recipe(3, lr=0.1, momentum=0.9, batch=8)
    first, again, other = (trained(recipe, seed=seed, groups=groups, mode=mode) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_augmentation_changes_training_and_fusing_it_does_not() -> None:
    recipe = Recipe(3, lr=0.1, batch=8)
    plain, fused, pure = (
        trained(recipe, groups=groups, mode="all", fused=fused)
        for groups, fused in (((), True), (GROUPS, True), (GROUPS, False))
    )
    assert (plain - fused).abs().max() > 1e-3
    torch.testing.assert_close(fused, pure, atol=1e-4, rtol=1e-3)


def test_every_image_is_seen_once_an_epoch() -> None:
    """A network that only counts: its gradient is the sum over the images of an epoch."""
    images = torch.eye(20)[:, None, None, :]  # [20, 1, 1, 20]
    seen = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(20, 2, bias=False))
    with torch.no_grad():
        seen[1].weight.zero_()
    recipe = Recipe(3, lr=1e-6, batch=5)
    training.fit(seen, images, torch.zeros(20, dtype=torch.int64), recipe, seed=0)
    each = 3 * 1e-6 * 0.5 / 5  # at two equal outputs the gradient of an image is 1/2, over a batch of 5
    torch.testing.assert_close(seen[1].weight[0].detach(), torch.full((20,), each), rtol=1e-3, atol=0)


def test_soft_labels_are_logits() -> None:
    _, labels = examples()
    recipe = Recipe(4, lr=0.1, batch=8)
    certain = F.one_hot(labels, 3).float() * 100
    torch.testing.assert_close(trained(recipe, certain), trained(recipe, labels), atol=1e-6, rtol=1e-5)
    soft = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    images, model = examples()[0], network()
    theta = flat.flatten(model).requires_grad_()
    loss = -(soft.softmax(1) * flat.call(model, theta, images).log_softmax(1)).sum(1).mean()
    (gradient,) = torch.autograd.grad(loss, theta)
    torch.testing.assert_close(trained(Recipe(1, lr=0.1, batch=30), soft), theta.detach() - 0.1 * gradient)


@pytest.mark.parametrize("fused", [True, False])
def test_divergence_is_told_and_not_raised(fused: bool) -> None:
    model, (images, labels) = network(), examples()
    assert not training.fit(model, images, labels, Recipe(4, lr=1e30, batch=8), Backend(fused=fused), seed=0)
    assert 0 <= training.accuracy(model, images, labels) <= 100


def test_callbacks_come_after_each_step_and_epoch() -> None:
    calls = []
    trained(
        Recipe(2, lr=0.1, batch=20),
        on_step=calls.append,
        on_epoch=lambda standing: calls.append(f"epoch {standing.epochs}"),
    )
    assert calls == [20, 10, "epoch 1", 20, 10, "epoch 2"]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("batch", [8, 30])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_training_that_was_cut_goes_on_to_the_same_bytes(momentum: float, batch: int, fused: bool) -> None:
    """Cut after each of its epochs, the one at which the rate falls and those that are drawn together among them."""
    recipe = Recipe(20, lr=0.05, momentum=momentum, weight_decay=0.01, batch=batch, decay=True)
    options = {"seed": 1, "backend": Backend(fused=fused), "groups": GROUPS}
    images, labels = examples()
    whole, kept = network(), []
    training.fit(whole, images, labels, recipe, **options, on_epoch=lambda at: kept.append((flat.flatten(whole), at)))
    assert [standing.epochs for _, standing in kept] == list(range(1, 21))
    assert all((standing.velocity is None) == (momentum == 0) for _, standing in kept)
    for theta, standing in kept:
        model = network(seed=5)
        flat.load_flat_(model, theta)
        training.fit(model, images, labels, recipe, **options, start=standing)
        assert torch.equal(flat.flatten(model), kept[-1][0])


class Spare(Network):
    """A network with a parameter that no image reaches."""

    def __init__(self, first: bool) -> None:
        super().__init__(torch.nn.Flatten(), 8 * 8, 3)
        spare = torch.nn.Parameter(torch.ones(3))
        if first:
            self.spare = spare
        else:
            self.last = torch.nn.ParameterList([spare])


@pytest.mark.parametrize("first", [True, False])
def test_a_parameter_without_a_gradient_is_no_obstacle(first: bool) -> None:
    recipe, (images, labels), kept = Recipe(4, lr=0.05, momentum=0.9, batch=8), examples(), []
    options = {"seed": 1, "groups": ()}
    whole = Spare(first)
    begin = flat.flatten(whole)
    training.fit(whole, images, labels, recipe, **options, on_epoch=lambda at: kept.append((flat.flatten(whole), at)))
    assert not torch.equal(kept[0][0], begin)
    for theta, standing in kept:
        model = Spare(first)
        flat.load_flat_(model, theta)
        training.fit(model, images, labels, recipe, **options, start=standing)
        assert torch.equal(flat.flatten(model), kept[-1][0])


def test_soft_labels_may_be_doubles() -> None:
    soft = torch.nn.functional.one_hot(examples()[1], 3).double()
    recipe = Recipe(1, lr=0.05, batch=8)
    ends = [trained(recipe, of_type) for of_type in (soft, soft.float())]
    assert torch.equal(*ends)


def test_accuracy_is_a_share_in_percent_and_leaves_the_mode() -> None:
    model, (images, labels) = network(), examples()
    answers = model(images).argmax(1)
    expected = 100 * float((answers == labels).float().mean())
    model.train()
    for fused in (True, False):
        found = training.accuracy(model, images, labels, Backend(fused=fused), batch=4)
        assert math.isclose(found, expected, rel_tol=1e-6)
    assert model.training


def test_labels_must_match_the_images() -> None:
    images, labels = examples()
    for few, what in ((images[:0], "0 and 30"), (images[:5], "5 and 30")):
        with pytest.raises(UserError, match=f"one label an image, got {what}"):
            training.fit(network(), few, labels, Recipe(1, lr=0.1), seed=0)


@pytest.mark.parametrize("fused", [True, False])
def test_labels_must_be_classes_of_the_network(fused: bool) -> None:
    images, labels = examples()
    soft = torch.zeros(len(images), 7)
    for wrong, found in (
        (labels - 1, r"to \[-1"),
        (labels + 1, r"to \[1, 3\]"),
        (soft, r"\[30, 7\]"),
        (labels.int(), "int32"),
    ):
        message = r"labels must be classes \[N\] int64 from 0 to 2, or soft ones \[N, 3\], got .*" + found
        with pytest.raises(UserError, match=message):
            training.fit(network(), images, wrong, Recipe(1, lr=0.1), Backend(fused=fused), seed=0)
