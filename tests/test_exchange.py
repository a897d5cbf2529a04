"""Sets that come from elsewhere and sets that go there: the same images, labels and figures on both sides."""

import json
import resource
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpp import config, data, distill, evaluate, export, runs, synthetic
from ddpp.config import DataConfig
from ddpp.data import Dataset
from ddpp.data.preprocess import PUBLISHED
from ddpp.errors import UserError

TOY = [
    *("--width", "8", "--threads", "1", "--evaluate-networks", "2", "--evaluate-epochs", "3"),
    *("--evaluate-full-epochs", "0"),
]
LEARNED = ["--method", "dm", "--real-batch", "16", "--lr-pixels", "1", "--steps", "2", "--ipc", "2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "dm"
    assert distill.main([*TOY, *LEARNED, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "dm"
    assert export.main([str(run), "--to", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return data.load(DataConfig())


def saved(path: Path, value: Any) -> str:
    torch.save(value, path)
    return str(path)


def given(out: Path, files: list[str], *more: str) -> int:
    return distill.main([*TOY, "--method", "given", "--ipc", "2", "--out", str(out), *more, "--given", *files])


def figures(folder: Path, method: str) -> list[float]:
    found: list[float] = json.loads((folder / "results.json").read_text())["accuracy"][method]["networks"]
    return found


def result(folder: Path) -> synthetic.Synthetic:
    return synthetic.load(folder / "synthetic.safetensors")[0]


def test_what_went_out_comes_in_with_the_same_figures(run: Path, exported: Path, tmp_path: Path) -> None:
    files = [str(exported / name) for name in ("images.pt", "labels.pt", "lr.pt")]
    for name, named in (("tensors", files), ("shared", [str(run / "synthetic.safetensors")])):
        assert given(tmp_path / name, named) == 0
        wanted, found = result(run), result(tmp_path / name)
        assert torch.equal(found.images, wanted.images) and torch.equal(found.labels, wanted.labels)
        assert found.step_size == wanted.step_size
        assert figures(tmp_path / name, "given") == figures(run, "dm")


def test_a_set_in_a_program_of_ones_own_is_tested_as_a_run_is(run: Path, digits: Dataset) -> None:
    held, settings = result(run), runs.saved_config(run)
    tested = evaluate.networks_on(held, digits, settings)
    assert [scores.test for scores in tested] == figures(run, "dm") and all(scores.finite for scores in tested)
    wrong = synthetic.Synthetic(held.images[:, :, :4], held.labels, held.step_size)
    learned = synthetic.Synthetic(held.images.clone().requires_grad_(), held.labels, held.step_size)
    with torch.no_grad():
        assert evaluate.networks_on(learned, digits, settings) == tested
    with pytest.raises(UserError, match=r"images must be float32 \[N, 1, 8, 8\], got torch.float32 \[20, 1, 4, 8\]"):
        evaluate.networks_on(wrong, digits, settings)
    with pytest.raises(UserError, match=r"the step size must be positive, got -1\.0"):
        evaluate.networks_on(synthetic.Synthetic(held.images, held.labels, torch.tensor(-1.0)), digits, settings)


def brought_there(export: Path, pixels: Tensor) -> Tensor:
    """By the two lines of an export's README."""
    lines = [line.strip() for line in (export / "README.md").read_text().splitlines() if line.startswith("    ")]
    names: dict[str, Any] = {"torch": torch, "pixels": pixels}
    exec("\n".join(lines).replace('"transform.pt"', f"{str(export / 'transform.pt')!r}"), names)
    found: Tensor = names["x"]
    return found


def test_the_readers_of_an_export_can_bring_other_images_there(exported: Path, digits: Dataset) -> None:
    found, text = brought_there(exported, digits.to_pixels(digits.test_images[:])), (exported / "README.md").read_text()
    torch.testing.assert_close(found, digits.test_images[:], atol=1e-5, rtol=1e-5)
    assert "[20, 1, 8, 8]" in text and "crop_scale_rotate" in text and "Classes: 0, 1" in text


def test_an_export_of_whitened_images_tells_how_to_whiten(tmp_path: Path) -> None:
    argv = [*TOY, "--method", "random", "--zca", "--out", str(tmp_path / "run")]
    assert distill.main(argv) == 0 and export.main([str(tmp_path / "run"), "--to", str(tmp_path / "out")]) == 0
    dataset = data.load(DataConfig(zca=True))
    found = brought_there(tmp_path / "out", dataset.to_pixels(dataset.test_images[:50]))
    torch.testing.assert_close(found, dataset.test_images[:50], atol=1e-3, rtol=1e-3)


def test_the_folder_of_an_export_or_of_a_run_comes_in(run: Path, exported: Path, tmp_path: Path) -> None:
    for name, folder in (("of the export", exported), ("of the run", run)):
        assert given(tmp_path / name, [str(folder)]) == 0
        assert figures(tmp_path / name, "given") == figures(run, "dm")


def test_pixels_that_may_be_meant_are_asked_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = saved(tmp_path / "images.pt", torch.rand(20, 1, 8, 8))
    for space, told in (("networks", True), ("pixels", False)):
        assert given(tmp_path / space, [images], "--given-space", space) == 0
        assert ("if they are pixels, give --given-space pixels" in capsys.readouterr().out) == told


def test_pictures_of_an_export_are_its_pixels(run: Path, exported: Path, digits: Dataset, tmp_path: Path) -> None:
    """Read as a data set, both parts the same."""
    for part in ("train", "test"):
        (tmp_path / part).symlink_to(exported / "pixels")
    found = data.load(DataConfig(dataset="folder", data_root=str(tmp_path), validation=0.0))
    assert found.classes == digits.classes and found.test_labels.tolist() == [k for k in range(10) for _ in range(2)]
    wanted = digits.to_pixels(result(run).images)
    torch.testing.assert_close(
        found.to_pixels(found.test_images[:]), wanted.expand(found.test_images.shape), atol=3e-3, rtol=0
    )


def test_an_export_overwrites_nothing(run: Path, exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export.main([str(run), "--to", str(exported)]) == 2
    assert "exists and is not empty. Choose another --to." in capsys.readouterr().err
    assert export.main([str(exported), "--to", str(exported / "new")]) == 2
    assert "there is no synthetic set at" in capsys.readouterr().err


def test_an_export_onto_a_full_disk_is_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A real write that fails in the middle."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))
    try:
        assert export.main([str(run), "--to", str(tmp_path / "to")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert "cannot write" in capsys.readouterr().err and not list((tmp_path / "to").glob("*.pt"))


def test_a_folder_of_pictures_comes_in(run: Path, exported: Path, digits: Dataset, tmp_path: Path) -> None:
    assert given(tmp_path / "run", [str(exported / "pixels")], "--given-space", "pixels") == 0
    wanted, found = result(run), result(tmp_path / "run")
    assert torch.equal(found.labels, wanted.labels)
    torch.testing.assert_close(digits.to_pixels(found.images), digits.to_pixels(wanted.images), atol=3e-3, rtol=0)


def test_classes_of_pictures_are_known_by_name(tmp_path: Path) -> None:
    pixels = torch.rand(6, 3, 8, 8)
    data.pictures.write(tmp_path / "set", pixels, ["T-shirt/top", "Bag", "Coat"])
    found, labels = data.folder.read_classes(tmp_path / "set", ["Coat", "T-shirt/top", "Bag"])
    order = labels.argsort(stable=True)
    torch.testing.assert_close(found[order], pixels[[4, 5, 0, 1, 2, 3]], atol=3e-3, rtol=0)
    with pytest.raises(UserError, match="one folder a class of the data set; only one of both has Bag, Hat"):
        data.folder.read_classes(tmp_path / "set", ["Coat", "T-shirt/top", "Hat"])


def layouts(images: Tensor, labels: Tensor, folder: Path) -> dict[str, list[str]]:
    """The same set as programs write it."""
    pair = [images, labels]
    accuracies = {"ConvNet": [np.float64(50.0), 3.5]}
    return {
        "images alone": [saved(folder / "images.pt", images)],
        "images and labels": [str(folder / "images.pt"), saved(folder / "labels.pt", labels)],
        "32-bit labels": [str(folder / "images.pt"), saved(folder / "labels32.pt", labels.int())],
        "a pair": [saved(folder / "pair.pt", {"data": tuple(pair)})],
        "several experiments": [saved(folder / "all.pt", {"data": [pair, [images + 1, labels]], "accs": accuracies})],
        "learned by autograd": [saved(folder / "leaf.pt", images.clone().requires_grad_())],
        "double": [saved(folder / "double.pt", images.double())],
    }


def test_files_as_other_programs_write_them(digits: Dataset, tmp_path: Path) -> None:
    images, labels = torch.randn(20, 1, 8, 8), torch.arange(10).repeat_interleave(2)
    for number, (name, files) in enumerate(layouts(images, labels, tmp_path).items()):
        assert given(tmp_path / str(number), files, "--step-size", "0.07") == 0, name
        found = result(tmp_path / str(number))
        assert torch.equal(found.images, images) and torch.equal(found.labels, labels), name
        assert float(found.step_size) == pytest.approx(0.07)


def test_arrays_of_numpy_come_in_with_channels_first_or_last(tmp_path: Path) -> None:
    images, labels = np.random.default_rng(0).normal(size=(20, 1, 8, 8)).astype(np.float32), np.arange(20) // 2
    np.savez(tmp_path / "set.npz", images=np.moveaxis(images, 1, -1), labels=labels)
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "labels.npy", labels.astype(np.int32))
    np.save(tmp_path / "lr.npy", 0.03)
    for name, files in (("one", ["set.npz"]), ("three", ["images.npy", "labels.npy", "lr.npy"])):
        assert given(tmp_path / name, [str(tmp_path / file) for file in files]) == 0
        found = result(tmp_path / name)
        assert torch.equal(found.images, torch.from_numpy(images))
        assert torch.equal(found.labels, torch.from_numpy(labels))
    assert result(tmp_path / "three").step_size == pytest.approx(0.03)


def test_images_are_put_class_by_class(tmp_path: Path) -> None:
    images, labels = torch.randn(20, 1, 8, 8), torch.arange(20) % 10
    files = [saved(tmp_path / "images.pt", images), saved(tmp_path / "labels.pt", labels)]
    assert given(tmp_path / "run", files) == 0
    found = result(tmp_path / "run")
    assert found.labels.tolist() == sorted(labels.tolist())
    assert torch.equal(found.images[:4], images[[0, 10, 1, 11]])


def test_soft_labels_are_logits_or_probabilities(tmp_path: Path) -> None:
    logits = 3 * torch.randn(20, 10)
    images, out = saved(tmp_path / "images.pt", torch.randn(20, 1, 8, 8)), []
    for name, labels in (("logits", logits), ("probabilities", logits.softmax(1))):
        files = [images, saved(tmp_path / f"{name}.pt", labels)]
        assert given(tmp_path / name, files, "--labels", "soft") == 0
        out.append(result(tmp_path / name).labels.softmax(1))
    torch.testing.assert_close(out[0], logits.softmax(1))
    torch.testing.assert_close(out[1], logits.softmax(1))


def test_images_with_soft_labels_are_put_class_by_class_too(tmp_path: Path) -> None:
    images, labels = torch.randn(20, 1, 8, 8), torch.nn.functional.one_hot(torch.arange(20) % 10).float()
    files = [saved(tmp_path / "images.pt", images), saved(tmp_path / "labels.pt", labels)]
    assert given(tmp_path / "run", files, "--labels", "soft") == 0
    found = result(tmp_path / "run")
    assert found.labels.argmax(1).tolist() == sorted(found.labels.argmax(1).tolist())
    assert torch.equal(found.images[:4], images[[0, 10, 1, 11]])


def test_pixels_may_be_whole_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (torch.arange(20 * 64) * 7 % 256).to(torch.uint8).view(20, 1, 8, 8)
    space, found = ("--given-space", "pixels"), []
    for name, images in (("whole", whole), ("shares", whole / 255)):
        assert given(tmp_path / name, [saved(tmp_path / f"{name}.pt", images)], *space) == 0
        found.append(result(tmp_path / name).images)
    assert torch.equal(*found)
    assert given(tmp_path / "large", [saved(tmp_path / "large.pt", whole.float())], *space) == 2
    assert "these go from 0 to 255; divide them by 255" in capsys.readouterr().err


def test_an_export_without_pictures_where_there_can_be_none(tmp_path: Path) -> None:
    held = synthetic.Synthetic(torch.randn(4, 5, 8, 8), torch.tensor([0, 0, 1, 1]), torch.tensor(0.1))
    meta = {
        "dataset": "five",
        "method": "dm",
        "ipc": 2,
        "classes": ["a", "b"],
        "augmentation": {"groups": [], "mode": "one"},
        "fingerprint": "of five channels",
        "steps": 0,
        "seed": 0,
    }
    (tmp_path / "run").mkdir()
    held.save(tmp_path / "run" / "synthetic.safetensors", meta, {"mean": torch.zeros(5), "std": torch.ones(5)})
    export.export(tmp_path / "run", tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"images.pt", "labels.pt", "lr.pt", "transform.pt", "README.md"}
    assert "pixels/" not in (tmp_path / "out" / "README.md").read_text()


def test_an_unfinished_run_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs.write_text(tmp_path / "run" / "config.toml", config.Config().to_toml())
    assert export.main([str(tmp_path / "run"), "--to", str(tmp_path / "out")]) == 2
    told = f"is not finished; continue it with ddpp.distill --out {tmp_path / 'run'} --resume"
    assert told in capsys.readouterr().err


def test_classes_whose_folders_would_be_one_have_two(tmp_path: Path) -> None:
    pixels, names = torch.rand(4, 3, 8, 8), ["a/b", "a-b"]
    data.pictures.write(tmp_path / "set", pixels, names)
    found, labels = data.folder.read_classes(tmp_path / "set", names)
    torch.testing.assert_close(found[labels.argsort(stable=True)], pixels, atol=3e-3, rtol=0)


@pytest.mark.parametrize("space", ["pixels", "published"])
@pytest.mark.parametrize("zca", [False, True])
def test_images_of_another_space_are_brought_to_that_of_networks(zca: bool, space: str, tmp_path: Path) -> None:
    """A folder is normalised by ImageNet's constants in published codes."""
    generator = torch.Generator().manual_seed(0)
    for part in ("train", "test"):
        data.pictures.write(tmp_path / part, torch.rand(12, 3, 8, 8, generator=generator), ["cat", "dog"])
    dataset = data.load(DataConfig(dataset="folder", data_root=str(tmp_path), zca=zca))
    pixels = torch.rand(2, 3, 8, 8, generator=generator)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in PUBLISHED["folder"])
    file = saved(tmp_path / "images.pt", pixels if space == "pixels" else (pixels - mean) / std)
    options = ["--dataset", "folder", "--data-root", str(tmp_path), "--zca" if zca else "--no-zca", "--ipc", "1"]
    assert given(tmp_path / "run", [file], *options, "--given-space", space) == 0
    torch.testing.assert_close(
        result(tmp_path / "run").images, data.from_pixels(dataset.transform, pixels), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("preset", ["pad-cifar10-ipc1", "datm-cifar10-ipc10", "tesla-cifar10-ipc1", "dm-cifar10-ipc1"])
def test_the_preset_that_a_set_was_made_by_gives_the_protocol(preset: str, tmp_path: Path) -> None:
    for part in ("train", "test"):
        data.pictures.write(tmp_path / part, torch.rand(40, 3, 8, 8), ["cat", "dog"])
    options = ["--preset", preset, "--dataset", "folder", "--data-root", str(tmp_path), "--ipc", "2"]
    options += ["--constants", "measured"]
    values = config.read_preset(preset)
    soft = values["distill"].get("labels") == "soft"
    labels = saved(tmp_path / "labels.pt", torch.randn(4, 2) if soft else torch.tensor([0, 0, 1, 1]))
    assert given(tmp_path / "run", [saved(tmp_path / "images.pt", torch.randn(4, 3, 8, 8)), labels], *options) == 0
    used = config.load(tmp_path / "run" / "config.toml")
    assert used.data.zca == values["data"]["zca"] and used.evaluate.weight_decay == values["evaluate"]["weight_decay"]


def test_a_set_that_does_not_fit_is_one_line(
    run: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def file(name: str, value: Any) -> str:
        return saved(tmp_path / name, value)

    images, text = file("images.pt", torch.zeros(20, 1, 8, 8)), tmp_path / "text.pt"
    text.write_text("no tensor")
    (tmp_path / "cut.pt").write_bytes(b"")
    nan = torch.full((20, 1, 8, 8), torch.nan)
    np.savez(tmp_path / "x.npz", x=np.zeros(3))
    np.savez(tmp_path / "objects.npz", images=np.array([{}]))
    np.save(tmp_path / "names.npy", np.array(["a", "b"]))
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04")
    (tmp_path / "odd.pt").write_bytes(b"a.")  # takes from a stack that is empty
    (tmp_path / "open.npy").write_bytes(b"\x93NUMPY\x01\x00\x0b\x00{'descr': (")
    cases: list[tuple[list[str], str]] = [
        ([str(tmp_path / "none.pt")], "cannot read"),
        ([str(text)], "Give files that torch.save wrote."),
        ([str(tmp_path / "cut.pt")], "Give files that torch.save wrote."),
        ([str(tmp_path / "none.npy")], "cannot read"),
        ([str(tmp_path / "x.npz")], "its arrays are x, and images would be called images"),
        ([str(tmp_path / "objects.npz")], "Give numbers that numpy wrote, without objects."),
        ([str(tmp_path / "names.npy")], "Give numbers that numpy wrote, without objects."),
        ([str(tmp_path / "text.npy")], "Give numbers that numpy wrote, without objects."),
        ([str(tmp_path / "cut.npz")], "Give numbers that numpy wrote, without objects."),
        ([str(tmp_path / "odd.pt")], "Give files that torch.save wrote."),
        ([str(tmp_path / "open.npy")], "Give numbers that numpy wrote, without objects."),
        ([images, images, images], "step size must be one number, got [20, 1, 8, 8]"),
        ([file("whole.pt", torch.zeros(20, 1, 8, 8, dtype=torch.uint8))], "as pixels are; give --given-space pixels"),
        ([images, file("floats.pt", torch.zeros(20))], "got torch.float32 [20]"),
        ([file("model.pt", torch.nn.Linear(2, 2))], "Give files that torch.save wrote."),
        ([file("state.pt", {"weight": torch.zeros(2)})], "holds a dict where a tensor"),
        ([file("empty.pt", {"data": []})], "holds a list where a tensor"),
        ([file("large.pt", torch.zeros(20, 3, 32, 32))], "images must be [N, 1, 8, 8] for digits, got [20, 3, 32, 32]"),
        ([file("few.pt", torch.zeros(10, 1, 8, 8))], "holds 10 images, and --ipc 2 means 20; give the set's --ipc"),
        ([file("nan.pt", nan)], "holds pixels that are no numbers"),
        ([images, file("short.pt", torch.zeros(3, dtype=torch.int64))], "labels must be classes [20] from 0 to 9"),
        ([images, file("uneven.pt", torch.zeros(20, dtype=torch.int64))], "2 of each"),
        ([images, file("wide.pt", torch.arange(20))], "labels must be classes [20] from 0 to 9"),
        ([images, file("soft.pt", torch.zeros(20, 10))], "has soft labels, and --labels is hard; give --labels soft"),
        ([images, file("lr.pt", torch.tensor(0.1))], "got torch.float32 []"),
        ([images, file("l.pt", torch.arange(20) % 10), file("0.pt", 0.0)], "the step size must be positive, got 0.0"),
        ([images] * 4, "got 4 files"),
        ([str(exported / "pixels")], "is a folder of pictures; name it alone and give --given-space pixels"),
        ([str(run / "synthetic.safetensors"), images], "which holds all; leave out other files"),
        ([str(run / "images.png")], "cannot read"),
        ([str(run / "snapshots" / "step-000000.safetensors")], "does not say of what data it is"),
    ]
    for files, message in cases:
        assert given(tmp_path / "run", files) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, (files, error)
        assert not (tmp_path / "run").exists()
    assert given(tmp_path / "run", [str(run / "synthetic.safetensors")], "--validation", "0.2") == 2
    assert "was distilled from other data" in capsys.readouterr().err
    assert given(tmp_path / "run", [str(tmp_path / "large.pt")], "--given-space", "pixels") == 2
    assert "images must be [N, 1, 8, 8] for digits, got [20, 3, 32, 32]" in capsys.readouterr().err
    assert given(tmp_path / "run", [images], "--given-space", "published") == 2
    assert "--given-space published is for cifar10, cifar100" in capsys.readouterr().err
    assert given(tmp_path / "run", [images], "--labels", "soft") == 2
    assert "has hard labels, and --labels is soft; give --labels hard" in capsys.readouterr().err
    assert distill.main([*TOY, "--method", "given", "--out", str(tmp_path / "run")]) == 2
    assert "--method given needs --given FILE" in capsys.readouterr().err
    assert distill.main([*TOY, "--given", images, "--out", str(tmp_path / "run")]) == 2
    assert "--given names a set for --method given, got it with ddpp" in capsys.readouterr().err
