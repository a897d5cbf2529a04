"""The ConvNet's step on dual numbers, against reverse over reverse of the plain network."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddpp import models
from ddpp.config import ModelConfig
from ddpp.dual import ConvNetStep, StepAdjoint
from ddpp.errors import UserError
from ddpp.models import flat
from ddpp.unroll import AutogradStep, provider

CLASSES = 4


def network(shape: tuple[int, int, int] = (3, 8, 8), seed: int = 0, **options: Any) -> models.Network:
    config = ModelConfig(**{"width": 8, "depth": 2, **options})
    return models.build(config, shape, CLASSES, seed=seed).double()


def inputs(net: models.Network, shape: tuple[int, int, int], n: int, soft: bool = False) -> tuple[Tensor, ...]:
    """Parameters, their cotangent, images and labels."""
    draw = torch.Generator().manual_seed(n)
    theta = flat.flatten(net)
    theta = theta + 0.1 * torch.randn(theta.shape, generator=draw, dtype=theta.dtype)
    adjoint = torch.randn(theta.shape, generator=draw, dtype=theta.dtype)
    images = torch.randn(n, *shape, generator=draw, dtype=theta.dtype)
    logits = torch.randn(n, CLASSES, generator=draw, dtype=theta.dtype)
    return theta, adjoint, images, logits if soft else logits.argmax(1)


def close(found: Tensor | None, wanted: Tensor | None) -> bool:
    if found is None or wanted is None:
        return found is wanted
    return bool((found - wanted).norm() <= 1e-10 * wanted.norm())


def agree(step: ConvNetStep, net: nn.Module, theta: Tensor, adjoint: Tensor, images: Tensor, labels: Tensor) -> None:
    plain = AutogradStep(net)
    assert close(step.gradient(theta, images, labels), plain.gradient(theta, images, labels))
    assert close(step.logits(theta, images), flat.call(net, theta, images))
    found, wanted = (s.adjoint(theta, adjoint, images, labels) for s in (step, plain))
    for name in StepAdjoint._fields:
        assert close(getattr(found, name), getattr(wanted, name)), name


@pytest.mark.parametrize("tile", [0, 2, 4])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((3, 8, 8), {}),
        ((1, 28, 28), {"depth": 3}),  # a wider border at the first layer
        ((1, 9, 9), {"depth": 1, "width": 5}),
        ((3, 20, 20), {"depth": 4, "width": 17}),
        ((3, 13, 13), {"depth": 2, "width": 33}),
    ],
    ids=str,
)
def test_any_size_depth_and_width(shape: tuple[int, int, int], options: dict[str, Any], tile: int) -> None:
    net = network(shape, **options)
    agree(ConvNetStep(net, tile), net, *inputs(net, shape, 3))


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 9, 9), (1, 28, 28)], ids=str)
def test_with_weights_channels_last(shape: tuple[int, int, int], soft: bool) -> None:
    """The order that vectors have within an unroll where nothing compiled does the whole step."""
    net = network(shape, depth=3 if shape[1] > 9 else 2)
    theta, adjoint, images, labels = inputs(net, shape, 5, soft)
    plain = ConvNetStep(net, 0)
    step = plain.on(theta.device)
    assert plain.on(theta.device) is step and step.on(theta.device) is step
    assert not torch.equal(step.pack(theta), theta) and torch.equal(step.unpack(step.pack(theta)), theta)
    assert close(step.unpack(step.gradient(step.pack(theta), images, labels)), plain.gradient(theta, images, labels))
    wanted = plain.adjoint(theta, adjoint, images, labels)
    found = step.adjoint(step.pack(theta), step.pack(adjoint), images, labels)
    for mine, theirs in zip(found._replace(theta=step.unpack(found.theta)), wanted, strict=True):
        assert close(mine, theirs)


def test_a_compiled_step_keeps_the_order_of_parameters() -> None:
    step = ConvNetStep(network(), 2)
    assert step.on(torch.device("cpu")) is step


@pytest.mark.parametrize("tile", [0, 2])
@pytest.mark.parametrize("soft", [False, True])
def test_batches_of_any_size_one_after_the_other(tile: int, soft: bool) -> None:
    net = network()
    step = ConvNetStep(net, tile)
    for n in (1, 10, 170, 3, 10):  # more than a micro-batch, and buffers of an earlier one
        agree(step, net, *inputs(net, (3, 8, 8), n, soft))


def test_results_do_not_change_when_the_next_step_is_computed() -> None:
    net = network()
    step = ConvNetStep(net)
    theta, adjoint, images, labels = inputs(net, (3, 8, 8), 5)
    first = step.adjoint(theta, adjoint, images, labels)
    kept = [t.clone() for t in first if t is not None]
    step.adjoint(theta + 1, adjoint * 2, images * 3, labels)
    assert all(torch.equal(t, k) for t, k in zip([t for t in first if t is not None], kept, strict=True))


@pytest.mark.parametrize(
    "options",
    [{"activation": "leakyrelu"}, {"pooling": "max"}, {"norm": "batch"}, {"norm": "group"}, {"model": "vgg11"}],
    ids=str,
)
def test_other_networks_do_not_suit(options: dict[str, Any]) -> None:
    net = network((3, 32, 32), **options)
    assert not ConvNetStep.suits(net)
    assert isinstance(provider(net), AutogradStep)
    with pytest.raises(UserError, match="provider 'dual' needs a ConvNet"):
        provider(net, "dual")
    with pytest.raises(UserError, match="--bf16 is there for a ConvNet"):
        provider(net, bf16=True)


@pytest.mark.parametrize(
    ("name", "tile", "message"), [("duall", 2, "unknown provider 'duall'; did you mean 'dual'"), ("dual", 3, "tile")]
)
def test_wrong_names_and_tiles(name: str, tile: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        provider(network(), name, tile=tile)


class Doubled(models.Network):
    def forward(self, images: Tensor) -> Tensor:
        return 2 * super().forward(images)


def test_a_network_that_does_more_than_its_blocks_is_not_written_out() -> None:
    plain = models.build(ModelConfig(width=8, depth=1), (3, 8, 8), 2, seed=0)
    assert ConvNetStep.suits(plain)
    assert not ConvNetStep.suits(Doubled(plain.features, 8 * 4 * 4, 2))
    without_bias, deeper = (copy.deepcopy(plain) for _ in range(2))
    without_bias.classifier = nn.Linear(8 * 4 * 4, 2, bias=False)
    deeper.classifier = nn.Sequential(plain.classifier, nn.Linear(2, 2))  # type: ignore[assignment]
    assert not ConvNetStep.suits(without_bias) and not ConvNetStep.suits(deeper)
