"""RDED and SRe2L, which ask one trained network, and networks that learn a teacher's answers."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpp import (
    compare,
    continual,
    data,
    distill,
    evaluate,
    models,
    networks,
    scores,
    search,
    seeds,
    store,
    synthetic,
    teachers,
    training,
)
from ddpp.config import Config
from ddpp.errors import UserError
from ddpp.methods import METHODS, Problem
from ddpp.methods import rded as of_rded
from ddpp.models import Network, flat
from ddpp.training import Backend, Recipe
from ddpp.trajectories import Trajectory

CPU = torch.device("cpu")
NETWORK = {"width": 8, "depth": 2}
TOY = [
    *("--width", "8", "--depth", "2", "--threads", "1", "--teachers-count", "1", "--teachers-epochs", "3"),
    *("--steps", "4", "--rded-candidates", "20", "--optimizer", "adam", "--momentum", "0.5", "--lr-pixels", "0.1"),
    *("--evaluate-networks", "2", "--evaluate-epochs", "3", "--evaluate-full-epochs", "1"),
]
ANSWERS = ["--evaluate-labels", "teacher", "--evaluate-cutmix"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("decoupled") / "teachers"


def configured(folder: Path, **distill_options: object) -> Config:
    values = {"model": NETWORK, "teachers": {"folder": str(folder), "count": 1, "epochs": 3}}
    return Config().with_values({**values, "distill": distill_options}, "test")


def problem_of(config: Config) -> Problem:
    dataset = data.load(config.data)
    network = models.build(config.model, dataset.shape, len(dataset.classes), seed=0)
    found = store.open_all(teachers.train(config, dataset, CPU, progress=False), config, dataset, network)
    return Problem(config, dataset, network, found, (), CPU)


def test_tiles_have_a_patch_of_every_rank() -> None:
    patches = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 1, 2, 2)
    images = of_rded._tiled(patches, 2)
    assert images.shape == (2, 1, 4, 4)
    assert images[0, 0, ::2, ::2].tolist() == [[0, 2], [4, 6]] and images[1, 0, 1::2, 1::2].tolist() == [[1, 3], [5, 7]]


def test_crops_are_squares_of_their_images() -> None:
    ramp = torch.linspace(0, 1, 16)[None, :].expand(16, 16)
    images = torch.stack([ramp, ramp.T])[:, None].repeat(200, 1, 1, 1)
    crops = of_rded._crops(images, 8, torch.Generator().manual_seed(0))
    across, down = crops[::2, 0], crops[1::2, 0]
    assert torch.allclose(across, across[:, :1].expand_as(across), atol=1e-6)  # no image lies in another's crop
    assert torch.allclose(down, down[:, :, :1].expand_as(down), atol=1e-6)
    spans = (across[:, 0, -1] - across[:, 0, 0]) * 8 / 7 * 15 / 16  # share of the side, roughly
    assert spans.min() < 0.45 and spans.max() > 0.9
    assert float(across[:, 0].min()) < 0.05 and float(across[:, 0].max()) > 0.95


@pytest.mark.parametrize("patches", [1, 2])
def test_rded_keeps_the_crops_that_the_teacher_is_surest_of(patches: int, folder: Path) -> None:
    config = configured(folder, method="rded", ipc=2, rded_candidates=20, rded_patches=patches, rded_crops=3)
    problem = problem_of(config)
    dataset, teacher = problem.dataset, store.ended(problem.teachers[0], config, problem.dataset, CPU)
    side = 8 // patches

    def doubt(crops: Tensor) -> Tensor:
        shown = dataset.to_pixels(torch.zeros(len(crops), 1, 8, 8))
        low = (8 - side) // 2
        shown[:, :, low : low + side, low : low + side] = crops
        with torch.no_grad():
            return -teacher(data.from_pixels(dataset.transform, shown)).log_softmax(1)[:, 4]

    draw = seeds.generator(config.run.seed, "rded", 4)
    members = torch.nonzero(dataset.train_labels == 4).flatten()
    members = members[torch.randperm(len(members), generator=draw)[:20]]
    pixels = dataset.to_pixels(dataset.train_images[members])
    crops = torch.stack([of_rded._crops(pixels, side, draw) for _ in range(3)])  # [3, 20, 1, p, p]
    doubts = torch.stack([doubt(each) for each in crops])
    kept = crops[doubts.argmin(0), torch.arange(20)][doubts.amin(0).argsort()]

    found = METHODS.get("rded")(problem).choose()
    shown = dataset.to_pixels(found.images)[found.labels == 4]
    assert found.labels.tolist() == [k for k in range(10) for _ in range(2)]
    torch.testing.assert_close(shown, of_rded._tiled(kept[: 2 * patches**2], patches), atol=1e-5, rtol=0)


def test_sre2l_follows_cross_entropy_and_statistics(folder: Path) -> None:
    config = configured(folder, method="sre2l", ipc=2, sre2l_statistics=0.3, batch=12)
    problem = problem_of(config)
    dataset, teacher = problem.dataset, store.ended(problem.teachers[0], config, problem.dataset, CPU)
    first = synthetic.start(dataset, 2, "real", 0.01, seed=0)
    update = METHODS.get("sre2l")(problem).update(first, 5, {})

    features = list(teacher.features)
    convolutions = [i for i, module in enumerate(features) if isinstance(module, nn.Conv2d)]

    def moments(images: Tensor) -> list[Tensor]:
        found = []
        for i, module in enumerate(features):
            images = module(images)
            if i in convolutions:
                found += [images.mean((0, 2, 3)), images.var((0, 2, 3), correction=0)]
        return found

    draw = seeds.generator(config.run.seed, "sre2l", 5)
    chosen, shift = torch.randperm(20, generator=draw)[:12], torch.randint(2, (2,), generator=draw).tolist()
    images = first.images.clone().requires_grad_()
    shown = torch.roll(images[chosen], shift, (2, 3))
    loss = F.cross_entropy(teacher(shown), first.labels[chosen])
    for layer, (mine, real) in enumerate(zip(moments(shown), moments(dataset.train_images[:]), strict=True)):
        loss = loss + 0.3 * (10 if layer < 2 else 1) * (mine - real.detach()).norm()
    (gradient,) = torch.autograd.grad(loss, images)
    torch.testing.assert_close(update.loss, loss.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(update.images, gradient, rtol=1e-3, atol=1e-6)
    assert int((update.images.flatten(1).abs().sum(1) > 0).sum()) == 12


@pytest.mark.parametrize("name", ["rded", "sre2l"])
def test_the_whole_job(name: str, folder: Path, tmp_path: Path) -> None:
    argv = [*TOY, *ANSWERS, "--method", name, "--teachers-folder", str(folder)]
    for out in ("one", "two"):
        assert distill.main([*argv, "--out", str(tmp_path / out)]) == 0
    one, two = (tmp_path / out / "synthetic.safetensors" for out in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    results = json.loads((tmp_path / "one" / "results.json").read_text())
    assert results["protocol"]["labels"] == "teacher" and results["protocol"]["temperature"] == 20
    text = (tmp_path / "one" / "report.md").read_text()
    assert f"| {name} (own labels) |" in text and "| random real images (own labels) |" in text
    mean = {row: figures["mean"] / 100 for row, figures in results["accuracy"].items()}
    score = compare.compare([tmp_path / "one"], [tmp_path / "two"])["score"]["first"]
    assert score == pytest.approx(
        scores.label_robust_score(
            full_hard=mean["full"], synthetic_hard=mean[f"{name}/own"], synthetic=mean[name], random=mean["random"]
        )
    )
    told = (
        f"on few images with CutMix by a teacher's answers (itself right on {results['protocol']['teacher']:.1f} %) at"
    )
    assert f"{told} temperature 20;" in text and 15 < results["protocol"]["teacher"] <= 100
    assert results == json.loads((tmp_path / "two" / "results.json").read_text()) | {
        name: results[name] for name in ("seconds", "peak_memory_mb")
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--method", "rded", "--ipc", "5", "--rded-patches", "2"],
            "--rded-candidates 19 is less than the 20 patches of a class",
        ),
        (["--method", "rded", "--rded-patches", "3"], "--rded-patches 3 must divide the side of the images, 8 pixels"),
        (
            ["--method", "sre2l", "--model", "mlp"],
            "sre2l follows statistics of convolutions, and this network has none",
        ),
        (["--method", "rded", "--labels", "soft"], "--labels soft needs a method that learns labels"),
        (["--method", "random", "--evaluate-cutmix"], "--cutmix mixes images, whose labels a teacher then gives"),
        (
            ["--method", "random", "--evaluate-optimizer", "adamw"],
            "networks by adamw need a learning rate of their own",
        ),
    ],
)
def test_what_cannot_work_is_refused_at_once(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--rded-candidates", "19", "--teachers-folder", str(tmp_path / "t"), "--out", str(tmp_path / "run")]
    assert distill.main([*TOY, *options, *more]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "run").exists() and not (tmp_path / "t").exists()


def test_a_run_that_could_not_choose_leaves_no_folder(folder: Path, tmp_path: Path) -> None:
    argv = [*TOY, "--method", "rded", "--teachers-folder", str(folder), "--out", str(tmp_path / "run")]
    assert distill.main([*argv, "--ipc", "200", "--rded-candidates", "300"]) == 2
    assert not (tmp_path / "run").exists()
    assert distill.main(argv) == 0


def test_a_class_of_few_images(folder: Path) -> None:
    config = configured(folder, method="rded", ipc=200, rded_candidates=300)
    with pytest.raises(UserError, match=r"class '0' has \d+ training images, and 200 patches take one each"):
        METHODS.get("rded")(problem_of(config)).choose()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_loss_of_a_teachers_answers(temperature: float, fused: bool) -> None:
    """T^2 times the cross-entropy of outputs / T with softmax(answers / T), whatever the labels."""
    config = Config().with_values({"model": NETWORK}, "test")
    network, teacher = (models.build(config.model, (3, 8, 8), 5, seed=seed) for seed in (0, 1))
    images, labels = torch.randn(6, 3, 8, 8, generator=seeds.generator(0, "x")), torch.zeros(6, dtype=torch.int64)
    start = flat.flatten(network)
    leaf = start.clone().requires_grad_()
    targets = (teacher.eval()(images) / temperature).softmax(1).detach()
    loss = -(targets * (flat.call(network, leaf, images) / temperature).log_softmax(1)).sum(1).mean()
    (gradient,) = torch.autograd.grad(temperature**2 * loss, leaf)
    recipe = Recipe(1, lr=0.5, batch=6, temperature=temperature)
    assert training.fit(network, images, labels, recipe, Backend(fused=fused), seed=0, teacher=teacher)
    torch.testing.assert_close(start - flat.flatten(network), 0.5 * gradient, rtol=1e-3, atol=1e-6)


def test_a_temperature_needs_a_teacher() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    recipe = Recipe(1, lr=0.1, temperature=2.0)
    with pytest.raises(UserError, match=r"temperature 2\.0 is that of a teacher's answers, and there is no teacher"):
        training.fit(network, torch.zeros(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64), recipe, seed=0)


def test_cutmix_pastes_one_box_of_another_image() -> None:
    images = torch.arange(7.0).view(7, 1, 1, 1).expand(7, 2, 10, 12)
    areas, moved = [], 0
    for seed in range(300):
        mixed = training._cutmix(images, torch.Generator().manual_seed(seed))
        assert torch.equal(mixed[:, 0], mixed[:, 1])
        outside = mixed[:, 0] == images[:, 0]
        boxes = ~outside.all(0)  # where any image has another's
        rows, columns = boxes.any(1), boxes.any(0)
        assert torch.equal(boxes, rows[:, None] & columns[None, :])
        if boxes.any():
            inside = mixed[:, 0][:, boxes]
            assert torch.equal(inside, inside[:, :1].expand_as(inside))
            assert sorted(inside[:, 0].tolist()) == list(range(7))
            moved += 1
        areas.append(float(boxes.float().mean()))
    assert moved > 200 and 0.2 < sum(areas) / len(areas) < 0.45 and max(areas) > 0.6
    assert images.equal(torch.arange(7.0).view(7, 1, 1, 1).expand(7, 2, 10, 12))


def test_the_teacher_sees_what_the_network_sees() -> None:
    """Augmented by DSA and by a policy, and mixed."""
    seen: dict[str, list[Tensor]] = {"teacher": [], "network": []}

    class Seen(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name, self.linear = name, nn.Linear(64, 3)

        def forward(self, images: Tensor) -> Tensor:
            seen[self.name].append(images.detach().clone())
            return self.linear(images.flatten(1))

    images = torch.randn(6, 1, 8, 8, generator=seeds.generator(0, "x"))
    recipe = Recipe(3, lr=0.1, batch=4, temperature=2.0, cutmix=True)
    training.fit(
        Seen("network"),
        images,
        torch.zeros(6, dtype=torch.int64),
        recipe,
        seed=0,
        groups=("flip", "crop"),
        policy=lambda batch: batch + 1,
        teacher=Seen("teacher"),
    )
    assert len(seen["network"]) == 6 and all(map(torch.equal, seen["network"], seen["teacher"]))
    assert len({float(batch.sum()) for batch in seen["network"]}) == 6


def test_batch_normalisation_of_a_teacher_has_the_statistics_of_real_images(tmp_path: Path) -> None:
    values = {
        "model": {**NETWORK, "norm": "batch"},
        "teachers": {"folder": str(tmp_path), "count": 1, "epochs": 4, "momentum": 0.9},
    }
    config = Config().with_values(values, "test")
    dataset = data.load(config.data)
    teachers.train(config, dataset, CPU, progress=False)
    teacher = Trajectory.open(tmp_path / "teacher-000.safetensors")
    network = store.ended(teacher, config, dataset, CPU)
    first = [m for m in network.features if isinstance(m, nn.Conv2d | nn.BatchNorm2d)][:2]
    with torch.no_grad():
        given = first[0](dataset.train_images[:])
    assert not network.training
    torch.testing.assert_close(first[1].running_mean, given.mean((0, 2, 3)), rtol=0.05, atol=0.01)
    torch.testing.assert_close(first[1].running_var, given.var((0, 2, 3)), rtol=0.05, atol=0.01)
    reached = training.accuracy(network, dataset.val_images, dataset.val_labels)
    assert reached > max(60, teacher.accuracy()[-1] - 5)  # percent; the running mean that it was tested with lags


def test_answers_are_asked_of_an_older_run(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With one's own labels first; then the stage asks for a teacher, and what it needs to be told."""
    run, absent = tmp_path / "run", tmp_path / "absent"
    argv = [*TOY, "--method", "random", "--evaluate-networks", "1", "--teachers-folder"]
    assert distill.main([*argv, str(absent), "--out", str(run)]) == 0
    own = json.loads((run / "results.json").read_text())
    assert evaluate.main([str(run), "--labels", "teacher"]) == 2
    assert f"{absent} holds no first teacher of 3 epochs, whose answers could be learned" in capsys.readouterr().err
    assert teachers.main(["--config", str(run / "config.toml")]) == 0
    assert evaluate.main([str(run), "--labels", "teacher", "--temperature", "3"]) == 0
    asked = json.loads((run / "evaluation.json").read_text())
    assert asked["protocol"]["temperature"] == 3 and "labels" not in own["protocol"]
    assert asked["accuracy"]["full"] == own["accuracy"]["full"]  # all real images keep their labels
    assert asked["accuracy"]["random"]["networks"] != own["accuracy"]["random"]["networks"]
    assert asked["accuracy"]["random/own"] == own["accuracy"]["random"]


def test_answers_are_those_of_the_last_epoch_asked_for(tmp_path: Path) -> None:
    """Where the method reads fewer, the first teacher alone goes on to it; more that are there change nothing."""
    few = ["--teachers-count", "2", "--max-start-epoch", "1", "--teacher-span", "1", "--inner-steps", "2"]
    argv = [*TOY, *ANSWERS, *few, "--method", "mtt", "--evaluate-networks", "1", "--evaluate-full-epochs", "0"]
    lengths, found = [(3, 1), (5, 5)], []
    long = ["--width", "8", "--depth", "2", "--threads", "1", "--count", "2", "--epochs", "5"]
    assert teachers.main([*long, "--folder", str(tmp_path / "1")]) == 0
    for index, expected in enumerate(lengths):
        folder, run = tmp_path / str(index), tmp_path / f"run{index}"
        assert distill.main([*argv, "--teachers-folder", str(folder), "--out", str(run)]) == 0
        assert tuple(Trajectory.open(path).epochs for path in sorted(folder.iterdir())) == expected
        found.append(json.loads((run / "results.json").read_text()))
    one, other = found
    assert one["models"] == other["models"] and one["protocol"] == other["protocol"]


def test_other_stages_refuse_answers(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*TOY, *ANSWERS, "--method", "random", "--evaluate-networks", "1", "--teachers-folder", str(folder)]
    assert distill.main([*argv, "--out", str(tmp_path / "run")]) == 0
    for stage in (continual, search):
        assert stage.main([str(tmp_path / "run")]) == 2
        assert "trains on the set's own labels: give --labels own and --no-cutmix" in capsys.readouterr().err
    less = ["--labels", "own", "--no-cutmix", "--epochs", "1", "--orders", "1"]
    assert continual.main([str(tmp_path / "run"), *less]) == 0


def test_a_network_is_named_by_the_teacher_that_it_asks(folder: Path) -> None:
    config = configured(folder)
    digits = data.load(config.data)

    def part(teacher: Network | None) -> str:
        progress = networks.images_bar("test", 1, shown=False)
        evaluation = evaluate.Evaluation(config, digits, (), networks.Trainings(training.ON_CPU, progress), teacher)
        return evaluation._part("convnet", Recipe(1, 0.1), 0)

    asked = [models.build(config.model, digits.shape, 10, seed=seed) for seed in (0, 1)]
    assert len({part(None), *map(part, asked)}) == 3 and part(asked[0]) == part(asked[0])


def test_networks_on_all_real_images_have_a_weight_decay_of_their_own() -> None:
    config = Config().with_values({"evaluate": {"weight_decay": 0.01, "optimizer": "adamw"}}, "test")
    assert networks.recipe_on_all(config).weight_decay == 0.01
    config = config.with_values({"evaluate": {"full_weight_decay": 0.0005}}, "test")
    assert networks.recipe_on_all(config).weight_decay == 0.0005 and networks.recipe_on_all(config).optimizer == "sgd"
    assert networks.recipe(config, 0.1).weight_decay == 0.01 and networks.recipe(config, 0.1).optimizer == "adamw"
