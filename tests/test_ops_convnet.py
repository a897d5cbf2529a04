"""A ConvNet's step as one operator, on every backend, against autograd of the network written in torch."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import Backend
from torch import Tensor

from ddpp.ops import _library, convnet
from ddpp.ops._library import ops
from ddpp.ops.convnet import Architecture, StepAdjoint

STAGES = {"convnet_logits", "convnet_gradient", "convnet_adjoint"}
CLASSES = 5

#: Architecture without its tile, and images.
CASES = [
    ((1, 1, 2, 8, 1e-5), (4, 3, 8, 8)),
    ((3, 3, 3, 17, 1e-5), (2, 1, 28, 28)),
    ((1, 1, 1, 5, 1e-3), (3, 2, 9, 6)),
    ((1, 1, 2, 33, 1e-5), (7, 3, 13, 10)),
]


def parameters(architecture: Architecture, channels: int, height: int, width: int) -> list[tuple[int, ...]]:
    """Shapes in the order of the flat vector."""
    pad_y, pad_x, depth, filters, *_ = architecture
    shapes: list[tuple[int, ...]] = []
    for block in range(depth):
        shapes += [(filters, filters if block else channels, 3, 3), *3 * [(filters,)]]
    features = filters * ((height + 2 * pad_y - 2) >> depth) * ((width + 2 * pad_x - 2) >> depth)
    return [*shapes, (CLASSES, features), (CLASSES,)]


def network(architecture: Architecture, theta: Tensor, images: Tensor) -> Tensor:
    shapes = parameters(architecture, *images.shape[1:])
    sizes = [torch.Size(shape).numel() for shape in shapes]
    *parts, weight, bias = (part.view(shape) for part, shape in zip(theta.split(sizes), shapes, strict=True))
    x = images
    for k in range(architecture.depth):
        w, b, scale, shift = parts[4 * k : 4 * k + 4]
        y = F.conv2d(x, w, b, padding=1 if k else (architecture.pad_y, architecture.pad_x))
        x = F.avg_pool2d(F.relu(F.group_norm(y, architecture.filters, scale, shift, architecture.eps)), 2)
    return F.linear(x.flatten(1), weight, bias)


def problem(
    architecture: Architecture, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, ...]:
    """Parameters, tangent, images, logits of labels."""
    draw = torch.Generator().manual_seed(seed)
    size = sum(torch.Size(s).numel() for s in parameters(architecture, *shape[1:]))
    shapes = (size,), (size,), shape, (shape[0], CLASSES)
    return tuple(torch.randn(s, generator=draw, dtype=torch.float64).to(dtype) for s in shapes)


def exact(architecture: Architecture, theta: Tensor, tangent: Tensor, images: Tensor, labels: Tensor) -> list[Tensor]:
    """Gradient, and phi with its derivatives by parameters, images and labels."""
    leaves = [x.double().requires_grad_() for x in (theta, images, labels)]
    outputs = network(architecture, *leaves[:2])
    loss = -(leaves[2].softmax(1) * outputs.log_softmax(1)).sum() / len(images)
    gradient = torch.autograd.grad(loss, leaves[0], create_graph=True)[0]
    phi = (gradient * tangent.double()).sum()
    return [gradient.detach(), phi.detach(), *torch.autograd.grad(phi, leaves)]


def near(found: Tensor | None, wanted: Tensor, tolerance: float) -> bool:
    return found is not None and bool((found.cpu().double() - wanted).norm() <= tolerance * wanted.norm())


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize(("sizes", "shape"), CASES, ids=str)
def test_against_autograd(
    sizes: tuple[int, int, int, int, float], shape: tuple[int, ...], tile: int, backend: Backend
) -> None:
    architecture = Architecture(*sizes, tile)
    theta, tangent, images, labels = problem(architecture, shape, torch.float64)
    gradient, *adjoint = exact(architecture, theta, tangent, images, labels)
    theta, tangent, images, labels = (x.to(backend.device) for x in (theta, tangent, images, labels))
    targets = labels.softmax(1)
    assert near(convnet.gradient(architecture, theta, images, targets), gradient, 1e-11)
    found = convnet.adjoint(architecture, theta, tangent, images, targets)
    for name, value, wanted in zip(StepAdjoint._fields, found, adjoint, strict=True):
        assert near(value, wanted, 1e-10), name
    outputs = convnet.logits(architecture, theta, images, CLASSES)
    assert near(outputs, network(architecture, theta.cpu(), images.cpu()), 1e-11)


def found_and_exact(
    architecture: Architecture, arguments: tuple[Tensor, Tensor, Tensor, Tensor], backend: Backend
) -> list[tuple[Tensor | None, Tensor]]:
    """Each of :func:`exact`'s results as a backend gives it, and exactly."""
    theta, tangent, images, labels = (x.to(backend.device) for x in arguments)
    gradient = convnet.gradient(architecture, theta, images, labels.softmax(1))
    found = convnet.adjoint(architecture, theta, tangent, images, labels.softmax(1))
    return list(zip((gradient, *found), exact(architecture, *arguments), strict=True))


def without_kinks(architecture: Architecture) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A problem of two blocks of 32 filters in which all normalised values are above 0."""
    theta, tangent, images, labels = problem(architecture, (6, 3, 16, 16), torch.float32)
    first, second = 32 * 27, 32 * 32 * 9
    for shift in (first + 64, first + 96 + second + 64):
        theta[shift : shift + 32] = 20
    return theta, tangent, images, labels


@pytest.mark.parametrize("tile", [2, 4])
def test_in_float32(tile: int, backend: Backend) -> None:
    """Away from ReLU's kinks, where a rounding error is no more than that: all normalised values are above 0."""
    architecture = Architecture(1, 1, 2, 32, 1e-5, tile)
    for value, exactly in found_and_exact(architecture, without_kinks(architecture), backend):
        assert near(value, exactly, 2e-5)


def test_planes_in_bfloat16(backend: Backend) -> None:
    """Away from ReLU's kinks: planes are rounded some ten times, each time by up to 1/256 of a value."""
    architecture = Architecture(1, 1, 2, 32, 1e-5, 2, torch.bfloat16)
    arguments = without_kinks(architecture)
    for value, exactly in found_and_exact(architecture, arguments, backend):
        assert value is not None and value.dtype == torch.float32
        assert near(value, exactly, 6 / 256) and not near(value, exactly, 1e-4)
    theta, _, images, _ = arguments
    outputs = convnet.logits(architecture, theta.to(backend.device), images.to(backend.device), CLASSES)
    assert near(outputs, network(architecture, theta.double(), images.double()), 2 / 256)


@pytest.mark.parametrize("tile", [2, 4])
def test_outputs_are_as_near_to_float64_as_the_plain_network_s(tile: int, two_threads: None) -> None:
    """A ReLU may fall on its other side where an input is off by as much: the fewer, the nearer are gradients.

    How far the plain network is depends on the CPU, for which the vendor's library chooses its sums.
    """
    if _library.status["_cpu"] != "loaded":
        pytest.skip(f"_cpu: {_library.status['_cpu']}")
    architecture = Architecture(1, 1, 3, 128, 1e-5, tile)
    ours, plain = [], []
    for seed in range(9):
        theta, _, images, _ = problem(architecture, (10, 3, 32, 32), torch.float32, seed)
        exactly = network(architecture, theta.double(), images.double())
        outputs = convnet.logits(architecture, theta, images, CLASSES), network(architecture, theta, images)
        for found, errors in zip(outputs, (ours, plain), strict=True):
            errors.append(float((found - exactly).norm()))
    assert statistics.median(ours) <= statistics.median(plain)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_results_depend_on_the_parts_and_not_on_the_threads(parts: int, two_threads: None) -> None:
    if _library.status["_cpu"] != "loaded":
        pytest.skip(f"_cpu: {_library.status['_cpu']}")
    architecture = Architecture(1, 1, 2, 33, 1e-5, 4)
    theta, tangent, images, labels = problem(architecture, (7, 3, 13, 10), torch.float32)

    def run(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        results = [theta.new_full(x.shape, torch.nan) for x in (theta, images, labels, theta[0])]
        with _library.using("compiled"):
            ops().convnet_adjoint.default(
                theta, tangent, images, labels.softmax(1), *architecture.arguments, parts, None, *results
            )
        return results

    first = run(2)
    assert all(torch.isfinite(x).all() for x in first)
    for again in (run(1), run(2)):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_batches_beyond_what_is_held_at_a_time(backend: Backend) -> None:
    architecture = Architecture(1, 1, 1, 4, 1e-5, 2)
    theta, tangent, images, labels = problem(architecture, (23, 1, 32, 32), torch.float64)
    wanted = exact(architecture, theta, tangent, images, labels)
    theta, tangent, images, labels = (x.to(backend.device) for x in (theta, tangent, images, labels))
    assert near(convnet.gradient(architecture, theta, images, labels.softmax(1)), wanted[0], 1e-11)
    found = convnet.adjoint(architecture, theta, tangent, images, labels.softmax(1))
    for value, exactly in zip(found, wanted[1:], strict=True):
        assert near(value, exactly, 1e-10)


def test_an_account_adds_up(backend: Backend) -> None:
    architecture = Architecture(1, 1, 2, 8, 1e-5, 2)
    theta, _, images, labels = problem(architecture, (4, 3, 8, 8), torch.float32)
    account = torch.zeros(len(convnet.TIMES) + len(convnet.BYTES), dtype=torch.float64)
    theta, images, labels = (x.to(backend.device) for x in (theta, images, labels))
    convnet.gradient(architecture, theta, images, labels.softmax(1), account)
    once = account.clone()
    convnet.gradient(architecture, theta, images, labels.softmax(1), account)
    times = len(convnet.TIMES)
    if backend.name != "compiled":
        assert not account.any()
        return
    assert (account[:times] > once[:times]).all() and (once > 0).all()
    assert torch.equal(account[times:], once[times:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_opcheck(dtype: torch.dtype, backend: Backend) -> None:
    architecture = Architecture(1, 1, 2, 8, 1e-5, 2)
    theta, tangent, images, labels = (x.to(backend.device) for x in problem(architecture, (4, 3, 8, 8), dtype))
    results = [torch.zeros_like(x) for x in (theta, images, labels, theta[0])]
    calls = {
        "convnet_logits": (theta, images, *architecture.arguments, 2, results[2].clone()),
        "convnet_gradient": (theta, images, labels.softmax(1), *architecture.arguments, 2, None, results[0].clone()),
        "convnet_adjoint": (theta, tangent, images, labels.softmax(1), *architecture.arguments, 2, None, *results),
    }
    assert set(calls) == STAGES
    for name, arguments in calls.items():
        found = torch.library.opcheck(getattr(_library.ops(), name).default, arguments)
        assert set(found.values()) == {"SUCCESS"}, (name, found)


ARCHITECTURE = Architecture(1, 1, 2, 4, 1e-5, 2)
THETA, TANGENT, IMAGES, LABELS = problem(ARCHITECTURE, (2, 3, 8, 8), torch.float32)


def call(**changes: object) -> Callable[[], None]:
    """A direct call of the operator, some of its arguments changed."""
    arguments = {
        "theta": THETA,
        "tangent": TANGENT,
        "images": IMAGES,
        "targets": LABELS.softmax(1),
        **dict(zip(("pad_y", "pad_x", "depth", "filters", "eps", "m"), ARCHITECTURE.arguments, strict=True)),
        "parts": 2,
        "account": None,
        "gradient": THETA.clone(),
        "d_images": IMAGES.clone(),
        "d_labels": LABELS.clone(),
        "phi": THETA[0].clone(),
    }
    return lambda: ops().convnet_adjoint.default(**arguments | changes)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (call(m=3), "m must be 2 or 4, got 3"),
        (call(parts=3), "parts must be from 1 to the number of images, 2, got 3"),
        (call(parts=0), "parts must be"),
        (call(theta=THETA[1:]), r"theta must be \["),
        (call(theta=THETA.half()), "float32 or float64"),
        (call(depth=4), "too small for 4 poolings"),
        (call(depth=0), "must be positive"),
        (call(images=IMAGES[0]), r"images must be \[N, C, H, W\]"),
        (call(images=IMAGES.mT), "images must be contiguous"),
        (call(images=IMAGES.double()), "images must have the dtype of theta"),
        (call(targets=LABELS[:1]), r"targets must be \[2, 5\]"),
        (call(tangent=TANGENT[:-1]), "tangent must be"),
        (call(gradient=THETA[:-1].clone()), "gradient must be"),
        (call(d_images=IMAGES[:1].clone()), "d_images must be"),
        (call(d_labels=LABELS[:1].clone()), "d_labels must be"),
        (call(phi=THETA[:1].clone()), "phi must be"),
        (call(account=torch.zeros(3, dtype=torch.float64)), r"account must be float64 \[11\]"),
    ],
)
def test_a_direct_call_cannot_reach_foreign_memory(wrong: Callable[[], None], message: str) -> None:
    if _library.status["_cpu"] != "loaded":
        pytest.skip(f"_cpu: {_library.status['_cpu']}")
    with pytest.raises(RuntimeError, match=message):
        wrong()
