"""Architectures, and their parameters as one flat vector."""

import pytest
import torch
from torch import nn

from ddpp import models
from ddpp.config import ModelConfig
from ddpp.errors import UserError
from ddpp.models import MODELS, Network, flat

SHAPES = [(1, 8, 8), (3, 16, 16), (1, 28, 28), (3, 32, 32), (3, 64, 64)]


def build(shape: tuple[int, int, int] = (3, 32, 32), classes: int = 10, seed: int = 0, **options: object) -> Network:
    return models.build(ModelConfig(**options), shape, classes, seed=seed)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "classes", "parameters"),
    [
        ("convnet", 10, 320_010),
        ("convnet", 100, 504_420),
        ("convnet-kip", 10, 467_594),
        ("resnet18", 10, 11_173_962),
        ("vgg11", 10, 9_231_114),
        ("alexnet", 10, 1_872_202),
        ("resnet18_ap", 10, 11_250_762),
        ("lenet", 10, 62_006),
        ("mlp", 10, 411_146),
    ],
)
def test_parameters_at_32_pixels_are_the_published_ones(name: str, classes: int, parameters: int) -> None:
    assert count(build(classes=classes, model=name)) == parameters


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", MODELS.names())
def test_every_architecture_at_every_size(name: str, shape: tuple[int, int, int]) -> None:
    """Finite logits that depend on the image: a normalised single pixel would be a constant."""
    model = build(shape, 7, model=name)
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    logits = model(images)
    assert logits.shape == (2, 7)
    assert torch.isfinite(logits).all()
    assert (logits[0] - logits[1]).abs().max() > 1e-4
    assert torch.equal(model.classifier(model.embed(images)), logits)


def test_the_largest_images() -> None:
    assert build((3, 128, 128), model="vgg11")(torch.zeros(1, 3, 128, 128)).shape == (1, 10)
    assert build((3, 128, 128))(torch.zeros(1, 3, 128, 128)).shape == (1, 10)


def test_kips_network_has_a_convolution_more_which_does_not_pool() -> None:
    options = {"width": 8, "norm": "none", "depth": 3}
    plain, more = (build((3, 8, 8), model=name, **options) for name in ("convnet", "convnet-kip"))
    kinds = [[type(m) for m in model.features if not isinstance(m, nn.Identity)] for model in (plain, more)]
    assert kinds[1] == [nn.Conv2d, nn.ReLU, *kinds[0]]
    assert plain.classifier.weight.shape == more.classifier.weight.shape


@pytest.mark.parametrize(("size", "depth"), [(8, 2), (16, 2), (28, 3), (32, 3), (64, 4), (128, 5)])
def test_depth_follows_the_size(size: int, depth: int) -> None:
    model = build((1, size, size), width=4)
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == depth
    assert models.describe(ModelConfig(width=4), (1, size, size))["depth"] == depth


def test_one_channel_of_28_pixels_is_padded_to_32() -> None:
    assert build((1, 28, 28)).embed(torch.zeros(1, 1, 28, 28)).shape == (1, 128 * 4 * 4)
    assert build((3, 28, 28)).embed(torch.zeros(1, 3, 28, 28)).shape == (1, 128 * 3 * 3)


def test_lenet_sees_what_the_first_one_did() -> None:
    """One-channel images of 28 pixels as if they had 32, and more pixels than a padded plane of 8 has."""
    for shape, side in (((1, 28, 28), 5), ((3, 32, 32), 5), ((1, 8, 8), 2), ((3, 64, 64), 13)):
        layer = next(m for m in build(shape, model="lenet").modules() if isinstance(m, nn.Linear))
        assert layer.in_features == 16 * side * side


def test_instance_normalisation_is_pytorchs() -> None:
    ours = models.base.instance_norm(5)
    theirs = nn.InstanceNorm2d(5, affine=True)
    with torch.no_grad():
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            other.copy_(mine.normal_())
    images = torch.randn(3, 5, 6, 6)
    torch.testing.assert_close(ours(images), theirs(images))


@pytest.mark.parametrize("norm", ["instance", "group", "layer", "batch", "none"])
@pytest.mark.parametrize("pooling", ["avg", "max", "none"])
def test_options_of_the_convnet(norm: str, pooling: str) -> None:
    for activation in ("relu", "leakyrelu", "sigmoid", "swish"):
        model = build((1, 8, 8), width=8, norm=norm, pooling=pooling, activation=activation)
        loss = model(torch.randn(3, 1, 8, 8)).square().sum()
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, list(model.parameters())))


def test_a_seed_gives_the_network_and_leaves_the_global_state() -> None:
    before = torch.get_rng_state()
    first, again, other = (flat.flatten(build(seed=seed)) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 8, 8), {"depth": 4}, "depth 4 pools images of 8 pixels below one pixel"),
        ((1, 1, 1), {}, "depth 2 pools images of 1 pixels below one pixel. Take larger images or no pooling"),
        ((3, 32, 32), {"norm": "group", "width": 6}, "width must be divisible by 4"),
        ((3, 32, 24), {}, "must be square, got 32x24"),
        ((3, 32, 32), {"model": "convnett"}, "did you mean 'convnet'"),
        ((3, 3, 3), {"model": "lenet"}, "lenet halves the image twice and needs 4 pixels a side or more, got 3"),
        ((3, 32, 32), {"norm": "instnce"}, "did you mean 'instance'"),
    ],
)
def test_what_does_not_fit_is_named(shape: tuple[int, int, int], options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(shape, **options)


def test_the_default_options_do_not_matter_to_other_architectures() -> None:
    assert models.describe(ModelConfig(model="vgg11", width=7), (3, 32, 32)) == {"model": "vgg11"}


def test_flat_parameters_and_back() -> None:
    model = build((1, 8, 8), width=4)
    vector, layout = flat.flatten(model), flat.layout(model)
    assert vector.shape == (flat.size(layout),) == (count(model),)
    parts = flat.unflatten(vector, layout)
    for name, parameter in model.named_parameters():
        assert torch.equal(parts[name], parameter)
        assert parts[name].untyped_storage().data_ptr() == vector.untyped_storage().data_ptr()


def test_a_flat_vector_is_a_copy() -> None:
    model = build((1, 8, 8), width=4)
    vector = flat.flatten(model)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    assert not torch.equal(vector, flat.flatten(model))
    target = torch.randn_like(vector)
    flat.load_flat_(model, target)
    assert torch.equal(flat.flatten(model), target)
    target.zero_()
    assert flat.flatten(model).abs().sum() > 0


def test_a_call_uses_the_flat_vector_alone() -> None:
    model, other = build((1, 8, 8), width=4), build((1, 8, 8), width=4, seed=1)
    images = torch.randn(2, 1, 8, 8)
    theta = flat.flatten(other)
    assert torch.equal(flat.call(model, theta, images), other(images))


def test_gradients_through_a_call_are_those_of_the_network() -> None:
    model = build((1, 8, 8), width=4).double()
    images = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    theta = flat.flatten(model).requires_grad_()
    (flat_gradient,) = torch.autograd.grad(flat.call(model, theta, images).exp().sum(), theta, create_graph=True)
    expected = torch.autograd.grad(model(images).exp().sum(), list(model.parameters()))
    torch.testing.assert_close(flat_gradient, torch.cat([g.flatten() for g in expected]))
    (second,) = torch.autograd.grad(flat_gradient.square().sum(), theta)
    assert torch.isfinite(second).all()
    assert second.abs().sum() > 0


def test_a_vector_of_another_size_is_refused() -> None:
    model = build((1, 8, 8), width=4)
    with pytest.raises(UserError, match=r"flat must have the shape \[\d+\] of its layout, got \[3\]"):
        flat.call(model, torch.zeros(3), torch.zeros(1, 1, 8, 8))
