"""The exact gradients of J student steps, against a plain graph of all steps written out here."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from ddpp import augment, models
from ddpp.config import ModelConfig
from ddpp.errors import UserError
from ddpp.models import flat
from ddpp.ops import dsa_augment
from ddpp.unroll import PROVIDERS, Gradients, matching_gradients, provider, training_gradients

CLASSES, IPC, STEPS = 3, 2, 4


def problem(model: str = "convnet", size: int = 8, *, soft: bool = False, seed: int = 0) -> dict[str, Any]:
    """A small matching problem in float64: mini-batches smaller than the set, all groups of augmentation."""
    draw = torch.Generator().manual_seed(seed)
    network = models.build(ModelConfig(model=model, width=8, depth=2), (3, size, size), CLASSES, seed=seed).double()
    start = flat.flatten(network)
    target = start + 0.05 * start.abs().mean() * torch.randn(start.shape, generator=draw, dtype=start.dtype)
    n = CLASSES * IPC
    labels = torch.arange(CLASSES).repeat_interleave(IPC)
    return {
        "network": network,
        "start": start,
        "target": target,
        "images": torch.randn(n, 3, size, size, generator=draw, dtype=torch.float64),
        "labels": torch.randn(n, CLASSES, generator=draw, dtype=torch.float64) if soft else labels,
        "lr": torch.tensor(0.03, dtype=torch.float64),
        "batches": [torch.randperm(n, generator=draw)[: n - 2] for _ in range(STEPS)],
        "plans": augment.draw(STEPS, n - 2, size, size, groups=augment.GROUPS, mode="all", generator=draw),
    }


def oracle(p: dict[str, Any], epsilon: float | None) -> tuple[Tensor, list[Tensor]]:
    """Trajectory matching as it is usually written, the mask from the ratios themselves."""
    images, lr = p["images"].clone().requires_grad_(), p["lr"].clone().requires_grad_()
    soft = p["labels"].is_floating_point()
    labels = p["labels"].clone().requires_grad_(soft)
    names = [name for name, _ in p["network"].named_parameters()]
    shapes = [q.shape for q in p["network"].parameters()]
    theta = p["start"].clone().requires_grad_()
    for batch, plan in zip(p["batches"], p["plans"], strict=True):
        parts = theta.split([s.numel() for s in shapes])
        parameters = {n: t.view(s) for n, t, s in zip(names, parts, shapes, strict=True)}
        out = functional_call(p["network"], parameters, (dsa_augment(images[batch], plan, fused=False),))
        y = labels[batch]
        loss = -(y.softmax(1) * out.log_softmax(1)).sum(1).mean() if soft else F.cross_entropy(out, y)
        theta = theta - lr * torch.autograd.grad(loss, theta, create_graph=True)[0]
    mask = torch.ones_like(theta)
    if epsilon is not None:
        ratio = theta.detach() / p["target"]
        mask = ((ratio >= epsilon) & (1 / ratio >= epsilon) | ((theta.detach() == 0) & (p["target"] == 0))).double()
    loss = (mask * (theta - p["target"])).square().sum() / (mask * (p["start"] - p["target"])).square().sum()
    leaves = [images, lr, labels] if soft else [images, lr]
    return loss.detach(), list(torch.autograd.grad(loss, leaves))


def close(got: Tensor, want: Tensor) -> bool:
    return bool((got - want).norm() <= 1e-9 * want.norm())


@pytest.mark.parametrize("engine", ["adjoint", "unrolled"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("epsilon", [None, 0.1])
@pytest.mark.parametrize("soft", [False, True])
def test_gradients_equal_a_plain_graph(engine: str, fused: bool, epsilon: float | None, soft: bool) -> None:
    p = problem(soft=soft)
    loss, gradients = oracle(p, epsilon)
    found = matching_gradients(**p, epsilon=epsilon, engine=engine, fused=fused)
    assert close(found.loss, loss)
    got = [found.images, found.lr, found.labels] if soft else [found.images, found.lr]
    for name, one, other in zip(("images", "lr", "labels"), got, gradients, strict=False):
        assert one is not None and close(one, other), name
    assert int(found.kept) == len(p["start"]) if epsilon is None else 0 < int(found.kept) < len(p["start"])


@pytest.mark.parametrize("model", models.MODELS.names())
def test_engines_and_providers_agree_on_every_architecture(model: str) -> None:
    # At ten times the rate ResNet18, whose last planes are 2x2, multiplies rounding errors of 1e-16 by 1e8.
    p = problem(model, size=16, soft=True) | {"lr": torch.tensor(0.003, dtype=torch.float64)}
    wanted = matching_gradients(**p, engine="unrolled")
    for name in ("autograd", "auto"):
        found = matching_gradients(**p, step=provider(p["network"], name))
        assert torch.equal(found.kept, wanted.kept)
        for field in ("loss", "images", "lr", "labels", "end"):
            assert close(getattr(found, field), getattr(wanted, field)), (name, field)


def test_tesla_takes_every_step_for_the_last() -> None:
    """Its gradient is the exact one of steps whose starting points are constants."""
    p = problem()
    images, lr, theta = p["images"].clone().requires_grad_(), p["lr"].clone().requires_grad_(), p["start"]
    total: Tensor | float = 0.0
    for batch, plan in zip(p["batches"], p["plans"], strict=True):
        held = theta.clone().requires_grad_()
        out = flat.call(p["network"], held, dsa_augment(images[batch], plan, fused=False))
        gradient = torch.autograd.grad(F.cross_entropy(out, p["labels"][batch]), held, create_graph=True)[0]
        total, theta = total + gradient, (theta - p["lr"] * gradient).detach()
    end = p["start"] - lr * total
    loss = (end - p["target"]).square().sum() / (p["start"] - p["target"]).square().sum()
    wanted = torch.autograd.grad(loss, [images, lr])
    found = matching_gradients(**p, epsilon=None, engine="tesla")
    assert close(found.loss, loss) and close(found.images, wanted[0]) and close(found.lr, wanted[1])
    exact = matching_gradients(**p, epsilon=None)
    assert not close(exact.images, found.images)


@pytest.mark.parametrize("engine", ["adjoint", "unrolled"])
def test_the_nearest_step_is_matched(engine: str) -> None:
    p = problem()
    ends = [matching_gradients(**shorter(p, n)).end for n in range(1, STEPS + 1)]
    p["target"] = ends[1] + 1e-6 * torch.sign(p["start"])
    found, wanted = matching_gradients(**p, engine=engine, nearest_step=True), matching_gradients(**shorter(p, 2))
    assert close(found.end, ends[1]) and close(found.images, wanted.images) and close(found.lr, wanted.lr)


def shorter(p: dict[str, Any], steps: int) -> dict[str, Any]:
    return {**p, "batches": p["batches"][:steps], "plans": p["plans"][:steps]}


@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize("soft", [False, True])
def test_providers_equal_a_plain_graph(name: str, soft: bool) -> None:
    p = problem(soft=soft)
    loss, gradients = oracle(p, 0.1)
    found = matching_gradients(**p, step=provider(p["network"], name))
    assert close(found.loss, loss) and close(found.images, gradients[0]) and close(found.lr, gradients[1])
    assert found.labels is None if not soft else found.labels is not None and close(found.labels, gradients[2])


@pytest.mark.parametrize("name", ["autograd", "dual"])
@pytest.mark.parametrize("every", [2, 3, 10])
def test_checkpoints_change_no_bit(name: str, every: int) -> None:
    p = problem(soft=True)
    step = provider(p["network"], name)
    found = [matching_gradients(**p, step=step, checkpoint_every=k) for k in (1, every)]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_the_fused_network_is_the_same_function() -> None:
    p = problem()
    theta = p["start"]
    images, labels = p["images"], p["labels"]
    plain, fused = (provider(p["network"], name) for name in ("autograd", "fused"))
    assert close(fused.gradient(theta, images, labels), plain.gradient(theta, images, labels))
    adjoint = torch.randn(theta.shape, dtype=theta.dtype, generator=torch.Generator().manual_seed(3))
    for one, other in zip(
        fused.adjoint(theta, adjoint, images, labels), plain.adjoint(theta, adjoint, images, labels), strict=True
    ):
        assert one is other is None or close(one, other)


def test_inputs_are_left_alone() -> None:
    p = problem()
    before = {name: p[name].clone() for name in ("start", "target", "images", "lr")}
    matching_gradients(**p)
    for name, value in before.items():
        assert torch.equal(p[name], value) and not p[name].requires_grad, name


def test_nothing_to_match_is_marked() -> None:
    p = problem()
    p["target"] = p["start"].clone()
    found = matching_gradients(**p)
    assert int(found.kept) == 0 and float(found.loss) == 0 and not found.images.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {"start": p["start"][:-1]}, "start must be flat with the network's"),
        (lambda p: {"target": p["target"].float()}, "target must be torch.float64"),
        (lambda p: {"labels": p["labels"][1:]}, "labels must be as many as images"),
        (lambda p: {"labels": p["labels"].int()}, r"labels must be class indices \[N\] int64, or logits \[N, 3\]"),
        (
            lambda p: {"labels": torch.zeros(6, 4).double()},
            r"logits \[N, 3\] .*, got \[6, 4\] torch.float64",
        ),
        (lambda p: {"labels": torch.zeros(6, 3)}, r"logits \[N, 3\] torch.float64, got \[6, 3\] torch.float32"),
        (lambda p: {"labels": p["labels"] - 1}, r"labels must be from 0 to 2, got \[-1, 0, 1\]"),
        (
            lambda p: {"labels": p["labels"] - 1, "network": torch.nn.Sequential(*p["network"].children())},
            r"labels must be 0 or more, got \[-1, 0, 1\]",
        ),
        (lambda p: {"labels": p["labels"] + 1}, r"labels must be from 0 to 2, got \[1, 2, 3\]"),
        (lambda p: {"images": p["images"][0]}, r"images must be \[N, C, H, W\], got \[3, 8, 8\]"),
        (lambda p: {"images": p["images"][:, :1]}, r"images \[4, 1, 8, 8\] and 3 classes need .* of another size"),
        (
            lambda p: {"images": p["images"][..., :4, :4]},
            r"images \[4, 3, 4, 4\] and 3 classes need",
        ),
        (lambda p: {"lr": 0.1}, "lr must be a tensor, got float"),
        (lambda p: {"lr": p["lr"][None]}, r"lr must be one positive number \[\], got \[0.03\]"),
        (lambda p: {"lr": -p["lr"]}, r"lr must be one positive number \[\], got -0.03"),
        (lambda p: {"lr": p["lr"] * torch.nan}, r"lr must be one positive number \[\], got nan"),
        (lambda p: {"batches": []}, "at least one inner step"),
        (lambda p: {"batches": [b.tolist() for b in p["batches"]]}, r"each a tensor \[n\] int64, got \["),
        (lambda p: {"batches": [b < 9 for b in p["batches"]]}, r"int64, got \[4\] torch.bool"),
        (lambda p: {"batches": [b[:0] for b in p["batches"]]}, r"int64, got \[0\] torch.int64"),
        (lambda p: {"batches": [b + 1 for b in p["batches"]]}, "batches must hold indices from 0 to 5"),
        (lambda p: {"batches": [b - 1 for b in p["batches"]]}, "batches must hold indices from 0 to 5"),
        (lambda p: {"plans": p["plans"][1:]}, "plans must be one an inner step"),
        (lambda p: {"checkpoint_every": 0}, "checkpoint_every must be at least 1"),
        (lambda p: {"engine": "adjont"}, "unknown engine 'adjont'; did you mean 'adjoint'"),
    ],
)
def test_wrong_arguments_are_named(change: Any, message: str) -> None:
    p: dict[str, Any] = problem()
    with pytest.raises(ValueError, match=message):
        matching_gradients(**{**p, **change(p)})


def single(p: dict[str, Any]) -> dict[str, Any]:
    """The problem in float32; the network given is left in float64."""
    cast = {k: v.float() if isinstance(v, Tensor) and v.dtype == torch.float64 else v for k, v in p.items()}
    return {**cast, "network": copy.deepcopy(p["network"]).float()}


@pytest.mark.parametrize(("name", "tile"), [("autograd", 0), ("fused", 0), ("dual", 0), ("dual", 2), ("dual", 4)])
def test_float32_gradients_match_float64_to_rounding(name: str, tile: int) -> None:
    for seed in range(10):
        p = problem(seed=seed)
        exact = matching_gradients(**p, engine="unrolled")
        rounded = single(p)
        found = matching_gradients(**rounded, step=provider(rounded["network"], name, tile=tile))
        cosine = F.cosine_similarity(found.images.double().flatten(), exact.images.flatten(), dim=0)
        assert 1 - cosine < 1e-3 and abs(float(found.loss) / float(exact.loss) - 1) < 1e-4


@pytest.mark.parametrize("engine", ["adjoint", "unrolled", "tesla"])
def test_gradients_are_given_where_nothing_is_recorded(engine: str) -> None:
    given = problem()
    expected = matching_gradients(**given, engine=engine)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            moved = {name: x.clone() if name in ("start", "images") else x for name, x in given.items()}
            found = matching_gradients(**moved, engine=engine)
        assert torch.equal(found.images, expected.images) and torch.equal(found.lr, expected.lr)


def test_a_network_that_draws_is_refused() -> None:
    given = problem("alexnet", 32)
    given["network"].features.append(torch.nn.Dropout(0.5))
    with pytest.raises(UserError, match=r"network must not draw random numbers .* Set the p of its dropout to 0"):
        matching_gradients(**given)
    given["network"].features[-1].p = 0.0
    assert matching_gradients(**given).loss.isfinite()


def training(p: dict[str, Any], **options: Any) -> Gradients:
    """Of the cross-entropy of the set's own images, without augmentation, after the last step."""
    truth = torch.arange(CLASSES).repeat_interleave(IPC)

    def objective(end: Tensor) -> tuple[Tensor, Tensor]:
        return F.cross_entropy(flat.call(p["network"], end, p["images"]), truth), torch.ones(())

    given = {name: p[name] for name in ("network", "start", "images", "labels", "lr", "batches", "plans")}
    return training_gradients(**given, objective=objective, **options)


def by_torch(p: dict[str, Any], optimizer: str) -> Tensor:
    """Where torch's own optimiser brings the student."""
    network = copy.deepcopy(p["network"])
    flat.load_flat_(network, p["start"])
    kind = torch.optim.Adam if optimizer == "adam" else torch.optim.SGD
    moving = kind(network.parameters(), lr=float(p["lr"]))
    for batch, plan in zip(p["batches"], p["plans"], strict=True):
        moving.zero_grad()
        seen = dsa_augment(p["images"][batch], plan, fused=False)
        F.cross_entropy(network(seen), p["labels"][batch]).backward()
        moving.step()
    return flat.flatten(network)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_student_moves_as_torch_moves_it(optimizer: str) -> None:
    """Convolutions' biases, which instance normalisation takes out, have gradients of rounding alone: Adam scales them
    up to a step's size, so that they are compared without."""
    p = problem()
    wanted, layout = by_torch(p, optimizer), flat.layout(p["network"])
    for engine in ("adjoint", "unrolled"):
        found = training(p, optimizer=optimizer, engine=engine).end
        for name, part in flat.unflatten(found - wanted, layout).items():
            free = name.endswith("bias") and "features" in name and part.shape == (8,) and optimizer == "adam"
            assert free or part.norm() < 1e-9, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first": STEPS}, r"first must be from 0 to below the 4 inner steps, got 4"),
        ({"first": -1}, "first must be from 0"),
        ({"first": 1, "nearest_to": torch.zeros(3)}, "first must be 0 with nearest_to, which may end before it, got 1"),
        ({"optimizer": "adm"}, "unknown optimizer 'adm'; did you mean 'adam'"),
        ({"optimizer": "adam", "engine": "tesla"}, "engine 'tesla' is an approximation for SGD, got it with optimizer"),
    ],
)
def test_what_a_training_cannot_be_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        training(problem(), **options)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("every", [2, 3, 10])
def test_checkpoints_change_no_bit_of_the_last_steps(optimizer: str, every: int) -> None:
    p = problem(soft=True)
    found = [training(p, optimizer=optimizer, first=1, checkpoint_every=k) for k in (1, every)]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("first", [0, 2, STEPS - 1])
@pytest.mark.parametrize("soft", [False, True])
def test_the_way_back_through_an_optimizer(optimizer: str, first: int, soft: bool) -> None:
    p = problem("lenet", 16, soft=soft)
    wanted = training(p, optimizer=optimizer, first=first, engine="unrolled")
    for name in ("autograd", "auto"):
        found = training(p, optimizer=optimizer, first=first, step=provider(p["network"], name))
        for field in ("loss", "images", "lr", "end", *(["labels"] if soft else [])):
            assert close(getattr(found, field), getattr(wanted, field)), (name, field)
