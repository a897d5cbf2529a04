"""Analytic kernels against closed forms, loops, and networks that are wide and random."""

import math
from itertools import pairwise, product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, jacrev, vmap

from ddpp import ntk
from ddpp.errors import UserError
from ddpp.ntk import BIAS_VARIANCE, WEIGHT_VARIANCE, WideNetwork


def images(count: int, seed: int = 0, channels: int = 2, side: int = 4) -> Tensor:
    return torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Finite(torch.nn.Module):
    """The network that the kernels are the limit of, at a width."""

    def __init__(self, kind: str, depth: int, shape: tuple[int, int, int], width: int, seed: int) -> None:
        super().__init__()
        self.kind = kind
        draw = torch.Generator().manual_seed(seed)
        channels, height, width_in = shape
        filters = () if kind == "fc" else (3, 3)
        layers = depth + 1 if kind == "convnet" else depth
        sizes = [channels * height * width_in if kind == "fc" else channels, *[width] * layers]
        shapes = [(out, fan, *filters) for fan, out in pairwise(sizes)]
        positions = {"conv": height * width_in, "convnet": (height >> depth) * (width_in >> depth)}
        last = width * positions.get(kind, 1)
        self.weights = torch.nn.ParameterList(torch.randn(s, generator=draw) for s in [*shapes, (1, last)])
        self.biases = torch.nn.ParameterList(torch.randn(len(w), generator=draw) for w in self.weights)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1) if self.kind == "fc" else x
        for number, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if number == len(self.weights) - 1:
                x = x.mean((2, 3)) if self.kind == "conv-gap" else x.flatten(1)
            weight = weight * math.sqrt(WEIGHT_VARIANCE / weight[0].numel())
            bias = bias * math.sqrt(BIAS_VARIANCE)
            x = F.conv2d(x, weight, bias, padding=1) if weight.dim() == 4 else F.linear(x, weight, bias)
            x = x if number == len(self.weights) - 1 else x.relu()
            if self.kind == "convnet" and 0 < number < len(self.weights) - 1:
                x = F.avg_pool2d(x, 2)
        return x[:, 0]


def empirical_ntk(network: Finite, x: Tensor) -> Tensor:
    """Products of the gradients of the output by all parameters. [n, n]"""
    parameters = dict(network.named_parameters())
    gradients = vmap(jacrev(lambda p, one: functional_call(network, p, one[None])[0]), (None, 0))(parameters, x)
    flat = torch.cat([g.flatten(1) for g in gradients.values()], 1)
    return flat @ flat.T


WIDE = [("fc", 3, 2048, 8), ("conv", 2, 256, 16), ("conv-gap", 2, 256, 64), ("convnet", 2, 256, 64)]


def small(kind: str) -> WideNetwork:
    """As deep as images of 3 pixels a side allow."""
    return WideNetwork(kind, 1 if kind == "convnet" else 3)


@pytest.mark.parametrize(("kind", "depth", "width", "networks"), WIDE)
def test_wide_random_networks_have_this_kernel(kind: str, depth: int, width: int, networks: int) -> None:
    """Four standard errors of the mean over networks, and 2 % for what the width leaves."""
    x = images(4)
    found = torch.stack([empirical_ntk(Finite(kind, depth, (2, 4, 4), width, n), x.float()) for n in range(networks)])
    error = found.std(0) / math.sqrt(networks)
    wanted = WideNetwork(kind, depth).ntk(x, x)
    assert error.max() < 0.05 * wanted.max()
    assert ((found.mean(0) - wanted).abs() < 4 * error + 0.02 * wanted.abs()).all()


def arc_cosine(x: Tensor, y: Tensor) -> tuple[float, float]:
    """E[relu relu] and E[relu' relu'] as Cho and Saul write them, by angle."""
    a, b = (math.sqrt(WEIGHT_VARIANCE * float(v @ v) / len(v) + BIAS_VARIANCE) for v in (x, y))
    angle = math.acos((WEIGHT_VARIANCE * float(x @ y) / len(x) + BIAS_VARIANCE) / (a * b))
    ramps = a * b * (math.sin(angle) + (math.pi - angle) * math.cos(angle)) / (2 * math.pi)
    return ramps, (math.pi - angle) / (2 * math.pi)


def test_one_hidden_layer_against_the_arc_cosine_kernels() -> None:
    first, second = images(3), images(2, seed=1)
    found = WideNetwork("fc", 1).kernels(first, second)
    for i, x in enumerate(first.flatten(1)):
        for j, y in enumerate(second.flatten(1)):
            ramps, steps = arc_cosine(x, y)
            nngp = WEIGHT_VARIANCE * ramps + BIAS_VARIANCE
            below = WEIGHT_VARIANCE * float(x @ y) / len(x) + BIAS_VARIANCE
            assert float(found.nngp[i, j]) == pytest.approx(nngp, rel=1e-12)
            assert float(found.ntk[i, j]) == pytest.approx(nngp + WEIGHT_VARIANCE * steps * below, rel=1e-12)


def test_a_convolution_averages_the_arc_cosine_kernel_of_patches() -> None:
    """One layer: each position is a fully connected one on its patch."""
    x, y = images(2)
    found = WideNetwork("conv", 1).kernels(x[None], y[None]).nngp
    patches = [F.unfold(image[None], 3, padding=1)[0].T for image in (x, y)]  # [H * W, C * 9]
    mean = sum(arc_cosine(p, q)[0] for p, q in zip(*patches, strict=True)) / 16
    assert float(found) == pytest.approx(WEIGHT_VARIANCE * mean + BIAS_VARIANCE, rel=1e-12)


def test_memory_grows_with_the_pairs_of_positions_that_meet() -> None:
    fc, conv, pooled, _ = (WideNetwork(kind, 3).memory((3, 32, 32)) for kind in ntk.KINDS)
    assert conv == 1024 * fc and pooled == 1024 * conv
    layers = 32**4 + 32**4 + 16**4 + 8**4
    assert WideNetwork("convnet", 3).memory((3, 32, 32)) == fc // 3 * layers


@pytest.mark.parametrize("kind", ntk.KINDS)
def test_gradients(kind: str) -> None:
    network, x, y = small(kind), images(3, side=3), images(2, seed=1, side=3)
    x, y = x.requires_grad_(), y.requires_grad_()
    assert torch.autograd.gradcheck(network.kernels, (x, y))


@pytest.mark.parametrize("kind", ntk.KINDS)
def test_gradients_where_images_coincide(kind: str) -> None:
    """An image with itself, and two equal images, where the slope of the tangent kernel jumps."""
    network, x = small(kind), images(2, side=3)
    assert torch.autograd.gradcheck(lambda a: network.ntk(a, a), x.clone().requires_grad_())
    twice = torch.cat([x, x[:1]]).requires_grad_()
    (gradient,) = torch.autograd.grad(network.ntk(twice, twice).sum(), twice)
    assert torch.isfinite(gradient).all()


def test_positions_that_meet_move_together() -> None:
    """The filter's mean over pairs of positions against a loop, on images that are not square."""
    x = torch.randn(1, 2, 4, 3, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    padded, wanted = F.pad(x, (1,) * 8), torch.zeros_like(x)
    for a, b in product(range(3), range(3)):
        wanted += padded[:, :, a : a + 4, b : b + 3, a : a + 4, b : b + 3] / 9
    torch.testing.assert_close(ntk._NeighboursOfPairs.apply(x), wanted, rtol=1e-13, atol=1e-15)


def test_an_image_with_itself() -> None:
    """At cosine 1 the kernels are known: each layer keeps w / 2 of the variance, and half of all slopes are 1."""
    x = images(1)
    found = WideNetwork("fc", 2).kernels(x, x)
    variance = WEIGHT_VARIANCE * float(x.square().mean()) + BIAS_VARIANCE
    tangent = variance
    for _ in range(2):
        variance = WEIGHT_VARIANCE * variance / 2 + BIAS_VARIANCE
        tangent = variance + WEIGHT_VARIANCE * tangent / 2
    assert float(found.nngp) == pytest.approx(variance, rel=1e-12)
    assert float(found.ntk) == pytest.approx(tangent, rel=1e-12)


def test_opposite_signals_share_nothing() -> None:
    """Where one ReLU passes the other does not: both moments are 0 at cosine -1."""
    scale = images(3).square() + 0.1
    covariance = (-scale).requires_grad_()
    ramps, steps = ntk._relu(covariance, scale)
    (gradient,) = torch.autograd.grad((ramps + steps).sum(), covariance)
    for found in (ramps, steps, gradient):
        torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-15)


@pytest.mark.parametrize("kind", ntk.KINDS)
def test_blocks_give_the_same_kernel_and_gradient(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, x, y = WideNetwork(kind, 2), images(5), images(3, seed=1).requires_grad_()
    whole = network.ntk(x, y)
    (wanted,) = torch.autograd.grad(whole.square().sum(), y)
    monkeypatch.setattr(ntk, "_BLOCK_BYTES", 1)
    blocks = network.ntk(x, y)
    (found,) = torch.autograd.grad(blocks.square().sum(), y)
    torch.testing.assert_close(blocks, whole, rtol=1e-13, atol=0)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_what_is_no_network_is_refused() -> None:
    with pytest.raises(UserError, match="kind must be one of fc, conv, conv-gap, convnet, got 'pool'"):
        WideNetwork("pool", 2)
    with pytest.raises(UserError, match="depth must be at least 1, got 0"):
        WideNetwork("fc", 0)
    with pytest.raises(
        UserError, match="depth 3 pools images of 9x7 pixels below one pixel; take a depth of at most 2"
    ):
        WideNetwork("convnet", 3).memory((1, 9, 7))
    with pytest.raises(UserError, match="1x1 pixels below one pixel; take larger images"):
        WideNetwork("convnet", 3).memory((1, 1, 1))
