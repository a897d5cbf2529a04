"""Data sets: reading, splitting, normalising, whitening, and what bad input gets."""

import errno
import gc
import itertools
import os
import pickle
import shutil
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddpp import data, runs, seeds
from ddpp.config import DataConfig
from ddpp.data import pictures, policies, preprocess
from ddpp.data.base import Raw
from ddpp.data.preprocess import PUBLISHED
from ddpp.data.split import stratified
from ddpp.errors import UserError

try:
    import torchvision
    from PIL import Image, PngImagePlugin
except (ImportError, RuntimeError) as reason:
    WHY_NO_TORCHVISION = f"torchvision cannot be imported: {reason}"
    torchvision = None
else:
    WHY_NO_TORCHVISION = ""

needs_torchvision = pytest.mark.skipif(torchvision is None, reason=WHY_NO_TORCHVISION)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ddpp"


def save_image(path: Path, pixels: Any, mode: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(pixels, dtype=np.uint8))
    (image.convert(mode) if mode else image).save(path)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two classes of 6x6 colour images: five each to train on, two each to test on."""
    draw = np.random.default_rng(0)
    for part, count in (("train", 5), ("test", 2)):
        for name in ("cat", "dog"):
            for i in range(count):
                save_image(tmp_path / "pets" / part / name / f"{i}.png", draw.integers(0, 256, (6, 6, 3)))
    return tmp_path / "pets"


def read(tree: Path, **options: Any) -> data.Dataset:
    return data.load(DataConfig(dataset="folder", data_root=str(tree), **options))


def test_hidden_folders_are_no_classes(tree: Path) -> None:
    (tree / "train" / ".ipynb_checkpoints").mkdir()
    assert read(tree).classes == ("cat", "dog")
    for part in ("train", "test"):
        (tree / "hidden" / part / ".cat").mkdir(parents=True)
    with pytest.raises(UserError, match="its folders are hidden; expected images in"):
        read(tree / "hidden")


def test_digits() -> None:
    found = data.load(DataConfig(validation=0.1))
    assert found.shape == (1, 8, 8)
    assert len(found.train_labels) + len(found.val_labels) + len(found.test_labels) == 1797
    assert found.classes == tuple("0123456789")
    assert found.strategy == "crop_scale_rotate"
    for labels in (found.train_labels, found.val_labels, found.test_labels):
        assert labels.dtype == torch.int64
        assert torch.bincount(labels).min() > 0.08 * len(labels)
    for images in (found.train_images, found.val_images, found.test_images):
        assert images[:].dtype == torch.float32
        assert images[:].is_contiguous()
    assert abs(found.train_images[:].mean()) < 1e-5
    assert abs(found.train_images[:].std(correction=0) - 1) < 1e-5


def test_pixels_come_back() -> None:
    from sklearn.datasets import load_digits

    for zca in (False, True):
        found = data.load(DataConfig(zca=zca))
        pixels = torch.cat([found.to_pixels(i[:]) for i in (found.train_images, found.val_images, found.test_images)])
        source = torch.from_numpy(load_digits().images).float() / 16
        torch.testing.assert_close(pixels.sum((1, 2, 3)).sort().values, source.sum((1, 2)).sort().values)
        torch.testing.assert_close(
            data.from_pixels(found.transform, pixels[:5]), found.train_images[:5], atol=1e-4, rtol=0
        )


def test_the_transform_of_a_saved_table_gives_viewable_pixels() -> None:
    found = data.load(DataConfig(zca=True))
    noise = torch.randn(3, *found.shape) * 10
    pixels = data.to_pixels_from({name: t.clone() for name, t in found.transform.items()}, noise)
    assert torch.equal(pixels, found.to_pixels(noise))
    assert 0 <= pixels.min() <= pixels.max() <= 1


def test_twice_the_same_and_other_bytes_other_fingerprint() -> None:
    first, again = data.load(DataConfig()), data.load(DataConfig())
    assert torch.equal(first.train_images[:], again.train_images[:])
    assert first.fingerprint == again.fingerprint
    others = [data.load(DataConfig(zca=True)), data.load(DataConfig(validation=0.2))]
    assert len({first.fingerprint, *(d.fingerprint for d in others)}) == 3


def test_the_held_out_part_is_stratified_and_not_trained_on() -> None:
    without, held = data.load(DataConfig(validation=0.0)), data.load(DataConfig(validation=0.25))
    assert len(without.val_labels) == 0
    assert without.val_images.shape == (0, 1, 8, 8)
    assert len(held.train_labels) + len(held.val_labels) == len(without.train_labels)
    shares = torch.bincount(held.val_labels) / torch.bincount(without.train_labels)
    assert ((shares - 0.25).abs() < 0.01).all()
    parts = held.to_pixels(torch.cat([held.train_images[:], held.val_images[:]])).sum((1, 2, 3))
    whole = without.to_pixels(without.train_images[:]).sum((1, 2, 3))
    torch.testing.assert_close(parts.sort().values, whole.sort().values)
    assert torch.equal(held.test_labels, without.test_labels)


def test_both_parts_keep_one_of_a_small_class() -> None:
    labels = torch.tensor([0, 0, 1, 1, 1, 2])
    first, second = stratified(labels, 0.1, seeds.generator(0))
    assert sorted(torch.cat([first, second]).tolist()) == list(range(6))
    assert labels[second].tolist() == [0, 1]
    assert stratified(labels, 0.0, seeds.generator(0))[1].tolist() == []


def test_channel_statistics_against_numpy() -> None:
    images = torch.randint(0, 256, (2500, 3, 4, 4), dtype=torch.uint8)
    images[:, 2] = 7
    transform = preprocess.fit_channels(preprocess.Images(images))
    pixels = images.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(transform["mean"], pixels.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(transform["std"][:2], pixels.std((0, 2, 3))[:2], rtol=1e-6)
    assert transform["std"][2] == 1
    normalised = preprocess.transformed(transform, preprocess.Images(images))[:].double().numpy()
    expected = (pixels - pixels.mean((0, 2, 3), keepdims=True)) / transform["std"].numpy()[:, None, None]
    np.testing.assert_allclose(normalised, expected, atol=1e-5)


def test_zca_against_an_independent_computation(cache: Path) -> None:
    """The definition by singular values of the centred data, in float64."""
    draw = torch.Generator().manual_seed(0)
    mixed = torch.randn(2100, 12, generator=draw) @ torch.randn(12, 12, generator=draw)
    images = (mixed * 12 + 128).clamp(0, 255).to(torch.uint8).view(2100, 3, 2, 2)
    transform = preprocess.fit_zca(preprocess.Images(images), "key")
    flat = images.double().flatten(1).numpy() / 255
    centred = flat - flat.mean(0)
    _, singular, rotation = np.linalg.svd(centred, full_matrices=False)
    values = singular**2 / (len(flat) - 1)
    whiten = rotation.T @ np.diag((values + 0.1) ** -0.5) @ rotation
    np.testing.assert_allclose(transform["whiten"], whiten, atol=1e-5)
    np.testing.assert_allclose(transform["unwhiten"], np.linalg.inv(whiten), atol=1e-5)
    whitened = preprocess.transformed(transform, preprocess.Images(images))[:].flatten(1).double()
    np.testing.assert_allclose(whitened, centred @ whiten, atol=1e-5)
    expected = rotation.T @ np.diag(values / (values + 0.1)) @ rotation
    np.testing.assert_allclose(np.cov(whitened.numpy().T), expected, atol=1e-5)


def test_the_whitening_is_cached_and_a_damaged_cache_is_computed_again(cache: Path) -> None:
    first = data.load(DataConfig(zca=True))
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    again = data.load(DataConfig(zca=True))
    assert torch.equal(first.train_images[:], again.train_images[:])
    assert path.read_bytes() == whole
    (fitted,) = {p.stat().st_mtime_ns for p in cache.iterdir()}
    assert torch.equal(data.load(DataConfig(zca=True)).train_images[:], first.train_images[:])
    assert path.stat().st_mtime_ns == fitted


def test_a_cache_folder_that_cannot_be_written_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert data.load(DataConfig(zca=True)).preprocessing == "zca"
    assert "not cached" in capsys.readouterr().out


def test_what_has_no_home_keeps_things_where_temporary_files_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    assert data.base.cache_folder() == Path(tempfile.gettempdir()) / "ddpp"


def test_a_long_fit_is_said_once(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = preprocess.Images(torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preprocess, "ZCA_SLOW", 64)
        preprocess.fit_zca(images, "long")
        told = capsys.readouterr().out
        assert told.startswith("fitting the whitening of images of 64 values: minutes, once, then kept in")
        preprocess.fit_zca(images, "long")
    preprocess.fit_zca(images, "short")
    assert capsys.readouterr().out == "" and len(list(cache.iterdir())) == 2


def test_whitened_images_that_memory_cannot_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1024, "SC_PHYS_PAGES": 256}.get)
    with pytest.raises(
        UserError, match=r"--zca keeps whitened images in memory, 0.0 GiB of 1295 training images, and there are"
    ):
        data.load(DataConfig(zca=True))


def test_images_too_large_to_whiten() -> None:
    with pytest.raises(UserError, match="--zca needs images of at most 12288 values, got 49152"):
        preprocess.fit_zca(preprocess.Images(torch.zeros(1, 3, 128, 128, dtype=torch.uint8)), "key")


@needs_torchvision
def test_a_folder(tree: Path) -> None:
    found = read(tree, validation=0.2)
    assert (found.name, found.classes, found.shape) == ("pets", ("cat", "dog"), (3, 6, 6))
    assert [len(labels) for labels in (found.train_labels, found.val_labels, found.test_labels)] == [8, 2, 4]
    assert "flip" in found.strategy
    picture = np.asarray(Image.open(tree / "test" / "dog" / "1.png")).transpose(2, 0, 1) / 255
    np.testing.assert_allclose(found.to_pixels(found.test_images[:])[3], picture, atol=1e-5)
    assert found.test_labels.tolist() == [0, 0, 1, 1]


@needs_torchvision
def test_grey_images_and_palettes(tree: Path) -> None:
    for path in tree.rglob("*.png"):
        save_image(path, np.full((6, 6), 100), "1" if path.name == "0.png" else "LA")
    assert read(tree).shape == (1, 6, 6)
    for path in tree.rglob("*.png"):
        save_image(path, np.full((6, 6, 3), 100), "P" if path.name == "0.png" else "RGBA")
    assert read(tree).shape == (3, 6, 6)


@needs_torchvision
@pytest.mark.parametrize(("part", "name", "index"), [("train", "cat/0.png", 0), ("test", "dog/1.png", 3)])
def test_a_grey_image_among_coloured_ones_is_one_of_them(tree: Path, part: str, name: str, index: int) -> None:
    """As ImageNet has them."""
    save_image(tree / part / name, np.full((6, 6), 100))
    found = read(tree, validation=0.0)
    images = found.train_images if part == "train" else found.test_images
    torch.testing.assert_close(found.to_pixels(images[:])[index], torch.full((3, 6, 6), 100 / 255), atol=1e-5, rtol=0)


@needs_torchvision
def test_a_photograph_is_turned_as_its_camera_says(tree: Path) -> None:
    """Orientation 6: the first row is on the right."""
    before, path = read(tree, validation=0.0), tree / "train" / "cat" / "0.png"
    picture = Image.open(path)
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(path, exif=exif)
    after = read(tree, validation=0.0)
    turned = torch.rot90(before.to_pixels(before.train_images[:1]), -1, (2, 3))
    torch.testing.assert_close(after.to_pixels(after.train_images[:1]), turned)


@needs_torchvision
def test_hidden_files_are_no_images(tree: Path) -> None:
    count = len(read(tree).train_images)
    (tree / "train" / "cat" / ".ipynb_checkpoints").mkdir()
    shutil.copy(tree / "train" / "cat" / "0.png", tree / "train" / "cat" / ".ipynb_checkpoints" / "0.png")
    (tree / "train" / "cat" / "._0.png").write_bytes(b"a system's own")
    assert len(read(tree).train_images) == count


def test_pixels_of_another_kind_are_refused() -> None:
    transform = {"mean": torch.zeros(3), "std": torch.ones(3)}
    with pytest.raises(UserError, match=r"pixels must be numbers from 0 to 1, got torch\.uint8; divide"):
        data.from_pixels(transform, torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(UserError, match=r"pixels must have 3 channels, got \[2, 1, 8, 8\]"):
        data.from_pixels(transform, torch.zeros(2, 1, 8, 8))


@needs_torchvision
def test_images_of_any_size_with_image_size(tree: Path) -> None:
    left_white = np.zeros((10, 30, 3))
    left_white[:, :6] = 255
    save_image(tree / "test" / "dog" / "1.png", left_white)
    found = read(tree, image_size=4)
    assert found.shape == (3, 4, 4)
    torch.testing.assert_close(found.to_pixels(found.test_images[:])[3], torch.zeros(3, 4, 4), atol=1e-5, rtol=0)


def test_images_are_those_of_a_tensor_and_stay_whole_numbers() -> None:
    stored = torch.randint(0, 17, (40, 2, 3, 3), dtype=torch.uint8)
    rows = torch.randperm(40)[:23]
    transform = {"mean": torch.tensor([0.1, 0.4]), "std": torch.tensor([0.3, 2.0])}
    images = preprocess.Images(stored, rows, transform, white=16)
    wanted = data.from_pixels(transform, stored[rows].float() / 16)
    assert len(images) == 23 and images.shape == wanted.shape and images.stored is stored
    for index in (slice(None), slice(2, 20, 5), 4, torch.tensor([5, 0, 5]), torch.arange(23) % 3 == 1, slice(0, 0)):
        assert torch.equal(images[index], wanted[index])
    some = torch.tensor([7, 0, 22])
    assert torch.equal(images.take(some)[:], wanted[some])
    assert torch.equal(preprocess.Images(stored).take(some)[:], stored[some])
    for size in (1, 10, 23, 99):
        for mine, theirs in zip(images.split(size), wanted.split(size), strict=True):
            assert torch.equal(mine, theirs)
    (none,) = preprocess.Images(stored, rows[:0]).split(10)
    assert none.shape == (0, 2, 3, 3)


def test_images_that_are_on_a_device_are_not_copied_there_again() -> None:
    images = preprocess.Images(torch.zeros(5, 1, 2, 2, dtype=torch.uint8))
    assert images.to("cpu") is images
    there = images.to("meta")
    assert there.stored.device.type == "meta" and images.to(torch.device("meta")) is there is there.to("meta")
    freed = weakref.ref(there)
    del there
    gc.collect()
    assert freed() is None


def test_images_are_chosen_by_one_index() -> None:
    """A second one would be of channels before they are normalised."""
    images = data.load(DataConfig()).train_images
    with pytest.raises(TypeError, match="chosen by one index"):
        images[0, 0]  # type: ignore[index]


def test_a_large_data_set_takes_no_memory_for_what_is_held_out_nor_for_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    few = data.load(DataConfig(validation=0.25))
    monkeypatch.setattr(preprocess, "FEW", 1000)
    many = data.load(DataConfig(validation=0.25))
    assert many.train_images.stored.dtype == torch.uint8
    assert many.train_images.stored is many.val_images.stored
    assert many.fingerprint == few.fingerprint
    for part in ("train_images", "val_images", "test_images"):
        assert torch.equal(getattr(many, part)[:], getattr(few, part)[:])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"train_images": torch.zeros(4, 1, 8, 8)}, r"training images torch.float32 \[4, 1, 8, 8\], but .* uint8"),
        ({"test_images": torch.zeros(4, 8, 8, dtype=torch.uint8)}, r"test images torch.uint8 \[4, 8, 8\]"),
        ({"test_images": torch.zeros(4, 1, 8, 6, dtype=torch.uint8)}, r"\[4, 1, 8, 6\], but .* \[N, C, H, H\]"),
        ({"train_labels": torch.tensor([0.0, 1, 0, 1])}, r"training labels torch.float32 \[4\] of 4 images"),
        ({"test_labels": torch.tensor([0, 1, 0])}, r"test labels torch.int64 \[3\] of 4 images, but .* one each"),
        (
            {"train_labels": torch.tensor([1, 2, 1, 2])},
            r"labels from 1 to 2, but .* number the 2 classes from 0",
        ),
        ({"train_labels": torch.tensor([-1, 1, 0, 1])}, r"labels from -1 to 1"),
        ({"test_labels": torch.tensor([0, 0, 0, 0])}, r"mine has no test image of class dog"),
    ],
)
def test_a_reader_of_ones_own_is_told_what_it_gets_wrong(
    wrong: dict[str, torch.Tensor], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
    right = {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels}
    monkeypatch.setitem(
        data.DATASETS._entries, "mine", lambda _: Raw("mine", ("cat", "dog"), **(right | wrong), strategy="crop")
    )
    with pytest.raises(UserError, match=message):
        data.load(DataConfig(dataset="mine"))


@pytest.fixture
def kept(tree: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of images so many that they are kept."""
    monkeypatch.setattr(pictures, "_MANY", 14)
    return tree


@needs_torchvision
def test_many_images_are_decoded_once(
    kept: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = read(kept)
    (path,) = cache.iterdir()
    assert f"the decoded images are kept in {path}" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "_read", None)
        again = read(kept)
    assert again.fingerprint == first.fingerprint
    assert torch.equal(again.train_images[:], first.train_images[:])
    assert read(kept, image_size=4).shape == (3, 4, 4)


@needs_torchvision
def test_images_that_changed_are_decoded_again(kept: Path, cache: Path) -> None:
    before = read(kept)
    save_image(kept / "test" / "dog" / "1.png", np.full((6, 6, 3), 200))
    after = read(kept)
    torch.testing.assert_close(after.to_pixels(after.test_images[:])[3], torch.full((3, 6, 6), 200 / 255))
    assert after.fingerprint != before.fingerprint
    newest = max(cache.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    left_by_a_killed_process = newest.with_name(f"{runs.TEMPORARY}{newest.stem}-xyz.npy")
    left_by_a_killed_process.write_text("")
    for damaged in (newest.read_bytes()[:-10], b""):
        newest.write_bytes(damaged)
        assert read(kept).fingerprint == after.fingerprint
    assert len(list(cache.iterdir())) == 2


@needs_torchvision
def test_a_damaged_image_among_many_leaves_nothing(kept: Path, cache: Path) -> None:
    cut(kept / "train" / "dog" / "3.png")
    with pytest.raises(UserError, match=r"cannot read the image .*dog/3\.png"):
        read(kept)
    (kept / "train" / "dog" / "3.png").unlink()
    (kept / "train" / "dog" / "3.png").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"cannot read the image .*dog/3\.png"):
        read(kept)
    assert not list(cache.iterdir())


@needs_torchvision
def test_reading_that_is_interrupted_ends_at_once(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, begun, read_one = str(tree / "train" / "dog" / "3.png"), itertools.count(1), pictures._read

    def interrupted(*args: Any) -> Any:
        if next(begun) == 20:
            raise KeyboardInterrupt
        time.sleep(0.005)  # a machine that is busy must wake the thread that waits before a thousand images are read
        return read_one(*args)

    monkeypatch.setattr(pictures, "_read", interrupted)
    monkeypatch.setattr(pictures, "_CHUNK", 1)
    with pytest.raises(KeyboardInterrupt):
        pictures.decode([path] * 1999)
    assert next(begun) < 1000


@needs_torchvision
@pytest.mark.parametrize("why", ["a file in the way", "disk full"])
def test_images_that_cannot_be_kept_are_in_memory(
    kept: Path, cache: Path, why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = read(kept).fingerprint
    shutil.rmtree(cache)
    if why == "disk full":

        def full(*_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "posix_fallocate", full)
    else:
        cache.write_text("")
    capsys.readouterr()
    assert read(kept).fingerprint == wanted
    assert "the decoded images were not cached: " in capsys.readouterr().out
    assert cache.is_file() or not list(cache.iterdir())


@needs_torchvision
def test_processes_that_begin_together_decode_once(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads stand for them: each opens the lock for itself."""
    decoded, decode = [], pictures._decode

    def noted(*args: Any) -> Any:
        decoded.append(args)
        return decode(*args)

    monkeypatch.setattr(pictures, "_decode", noted)
    paths = sorted(map(str, kept.rglob("*.png")))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(pictures.decode, [paths] * 4))
    assert len(decoded) == 1
    assert all(torch.equal(images, found[0]) for images in found)


def remove(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()


def rename(tree: Path) -> None:
    (tree / "test" / "cat").rename(tree / "test" / "cow")


@needs_torchvision
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: (t / "train").rename(t / "training"), r"no folder .*train; expected images in .*<class>"),
        (lambda t: remove(t / "test" / "dog"), r"test: .*classes dog; expected images in .*Add some"),
        (rename, "must have the same classes, but only one has cat, cow"),
        (
            lambda t: save_image(t / "test" / "dog" / "1.png", np.zeros((6, 5, 3))),
            r"1\.png is 5x6 pixels, but .*--image-size",
        ),
        (
            lambda t: (t / "train" / "dog" / "3.png").write_bytes(b"no image"),
            r"cannot read the image .*dog/3\.png",
        ),
        (lambda t: cut(t / "train" / "dog" / "3.png"), r"cannot read the image .*dog/3\.png"),
        (lambda t: deep(t / "train" / "dog" / "3.png"), r"3\.png has more than 8 bits a channel"),
        (lambda t: [remove(d) for d in t.glob("*/*")], "train: .*cat, dog"),
        (lambda t: bloated(t / "train" / "cat" / "0.png"), r"cannot read the image .*0\.png: .*Replace or remove"),
        (
            lambda t: save_image(t / "train" / "cat" / "0.png", np.zeros((6, 5, 3))),
            r"0\.png is 5x6 pixels, but must be square",
        ),
    ],
)
def test_a_damaged_folder_is_named(tree: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(tree)
    with pytest.raises(UserError, match=message):
        read(tree)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def bloated(path: Path) -> None:
    """With more text beside the picture than Pillow takes."""
    text = PngImagePlugin.PngInfo()
    text.add_text("note", "x" * 2**21, zip=True)
    Image.fromarray(np.zeros((6, 6, 3), dtype=np.uint8)).save(path, pnginfo=text)


def deep(path: Path) -> None:
    Image.fromarray(np.zeros((6, 6), dtype=np.uint16)).save(path)


@needs_torchvision
def test_an_empty_root_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--data-root"):
        read(tmp_path)


@needs_torchvision
def test_some_classes_of_a_folder(tree: Path) -> None:
    for part in ("train", "test"):
        (tree / part / "cow").mkdir()
        save_image(tree / part / "cow" / "0.png", np.zeros((6, 6, 3)))
    assert read(tree).classes == ("cat", "cow", "dog")
    found = read(tree, classes=("dog", "cow", "dog"), validation=0.0)
    assert found.classes == ("cow", "dog") and found.train_labels.tolist() == [0, 1, 1, 1, 1, 1]
    assert found.name == "pets-cow-2"  # so that teachers of other classes have another folder
    with pytest.raises(UserError, match=r"--classes catt: .*train has no such class; did you mean 'cat'\?"):
        read(tree, classes=("dog", "catt"))
    with pytest.raises(UserError, match="--classes is for --dataset folder, got it with digits"):
        data.load(DataConfig(classes=("1", "2")))


@needs_torchvision
@pytest.mark.parametrize("unlabelled", [False, True])
def test_val_is_tested_on_where_there_is_no_test(unlabelled: bool, tree: Path) -> None:
    wanted = read(tree)
    (tree / "test").rename(tree / "val")
    if unlabelled:  # as ImageNet's
        save_image(tree / "test" / "0.png", np.zeros((6, 6, 3)))
    found = read(tree)
    assert torch.equal(found.test_images[:], wanted.test_images[:]) and found.fingerprint == wanted.fingerprint
    remove(tree / "val" / "dog"), (tree / "val" / "dog").rmdir()
    with pytest.raises(UserError, match=r"train and val in .* must have the same classes, but only one has dog"):
        read(tree)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Tiny ImageNet of three classes of four images to train on, some grey, and two to test on."""
    root, draw = tmp_path / "data" / "tiny-imagenet-200", np.random.default_rng(0)
    numbers, rows = ["n02", "n01", "n03"], []
    for number in numbers:
        for i in range(4):
            pixels = draw.integers(0, 256, (64, 64) if i == 2 else (64, 64, 3))
            save_image(root / "train" / number / "images" / f"{number}_{i}.JPEG", pixels)
        for _ in range(2):
            rows.append(f"val_{len(rows)}.JPEG\t{number}\t0\t0\t62\t62")
            save_image(root / "val" / "images" / f"val_{len(rows) - 1}.JPEG", draw.integers(0, 256, (64, 64, 3)))
    save_image(root / "test" / "images" / "test_0.JPEG", np.zeros((64, 64, 3)))  # without a label
    (root / "val" / "val_annotations.txt").write_text("\n".join(rows) + "\n")
    (root / "wnids.txt").write_text("\n".join(numbers))
    (root / "words.txt").write_text("n01\tcrane, lifting device\nn02\tcrane\nn03\tgoldfish, Carassius auratus\nn04\tox")
    return root


@needs_torchvision
def test_tiny_imagenet(tiny: Path) -> None:
    found = data.load(DataConfig(dataset="tinyimagenet", data_root=str(tiny.parent), validation=0.0))
    assert found.classes == ("n01", "n02", "goldfish") and found.shape == (3, 64, 64)
    assert found.train_labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert found.test_labels.tolist() == [1, 1, 0, 0, 2, 2]
    for images, index, path in (
        (found.train_images, 5, "train/n02/images/n02_1"),
        (found.test_images, 2, "val/images/val_2"),
    ):
        picture = np.asarray(Image.open(tiny / f"{path}.JPEG")).transpose(2, 0, 1) / 255
        np.testing.assert_allclose(found.to_pixels(images[:])[index], picture, atol=1e-5)
    grey = found.to_pixels(found.train_images[:])[2]
    torch.testing.assert_close(grey[0], grey[2])


@needs_torchvision
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: (t / "wnids.txt").unlink(), r"cannot read .*wnids\.txt .*Pass --download to fetch it"),
        (lambda t: remove(t / "train" / "n03" / "images"), "is incomplete: it lacks images of a class"),
        (lambda t: (t / "wnids.txt").write_text("n01\nn02"), "is incomplete"),
        (lambda t: (t / "wnids.txt").write_text(""), "is incomplete"),
        (lambda t: (t / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn01\nval_1.J"), "is incomplete"),
        (lambda t: (t / "val" / "val_annotations.txt").write_text(""), "is incomplete"),
        (lambda t: (t / "val" / "images" / "val_3.JPEG").unlink(), r"cannot read the image .*val_3\.JPEG"),
    ],
)
def test_an_incomplete_tiny_imagenet_is_named(tiny: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(tiny)
    with pytest.raises(UserError, match=message):
        data.load(DataConfig(dataset="tinyimagenet", data_root=str(tiny.parent)))


@needs_torchvision
def test_tiny_imagenet_is_fetched_once(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import utils

    archive = shutil.make_archive(str(tmp_path / "packed"), "zip", tiny.parent, tiny.name)
    fetched = []

    def fetch(url: str, root: str, md5: str) -> None:
        fetched.append((url, md5))
        time.sleep(0.2)
        utils.extract_archive(archive, root)

    monkeypatch.setattr(utils, "download_and_extract_archive", fetch)
    config = DataConfig(dataset="tinyimagenet", data_root=str(tmp_path / "new"), download=True)
    with ThreadPoolExecutor() as together:  # each opens the lock for itself, as processes do
        first, second = together.map(data.load, [config, config])
    assert first.fingerprint == second.fingerprint == data.load(config).fingerprint
    assert fetched == [(data.tinyimagenet.URL, data.tinyimagenet.MD5)]

    def fails(*args: Any, **options: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(utils, "download_and_extract_archive", fails)
    with pytest.raises(UserError, match=r"could not be fetched or unpacked \(ConnectionError: no route\)\. Try again"):
        data.load(DataConfig(dataset="tinyimagenet", data_root=str(tmp_path / "other"), download=True))


@needs_torchvision
def test_one_class_is_not_enough(tree: Path) -> None:
    for part in ("train", "test"):
        remove(tree / part / "dog")
        (tree / part / "dog").rmdir()
    with pytest.raises(UserError, match="pets has 1 class"):
        read(tree)


def write_cifar10(root: Path) -> None:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        rows = {"data": draw.integers(0, 256, (20, 3072), dtype=np.uint8), "labels": list(range(10)) * 2}
        (folder / name).write_bytes(pickle.dumps(rows))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}))


@needs_torchvision
def test_cifar10_through_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of its format; the checksums alone are not those of the real ones."""
    write_cifar10(tmp_path)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    found = data.load(DataConfig(dataset="cifar10", data_root=str(tmp_path), validation=0.0))
    assert (found.name, found.shape, "flip" in found.strategy) == ("cifar10", (3, 32, 32), True)
    assert (len(found.train_labels), len(found.test_labels)) == (100, 20)
    assert found.classes[3] == "class 3"
    first = pickle.loads((tmp_path / "cifar-10-batches-py" / "data_batch_1").read_bytes())["data"][0]
    np.testing.assert_allclose(found.to_pixels(found.train_images[:])[0], first.reshape(3, 32, 32) / 255, atol=1e-5)


def write_mnist(folder: Path, count: int = 20) -> None:
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        pixels = np.arange(count * 784, dtype=np.uint32).astype(np.uint8).tobytes()
        header = b"".join(n.to_bytes(4, "big") for n in (2051, count, 28, 28))
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + pixels)
        labels = (2049).to_bytes(4, "big") + count.to_bytes(4, "big") + bytes(i % 10 for i in range(count))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(labels)


@needs_torchvision
@pytest.mark.parametrize(
    ("name", "folder", "flip"), [("mnist", "MNIST", False), ("fashionmnist", "FashionMNIST", True)]
)
def test_mnist_through_torchvision(tmp_path: Path, name: str, folder: str, flip: bool) -> None:
    write_mnist(tmp_path / folder / "raw")
    found = data.load(DataConfig(dataset=name, data_root=str(tmp_path)))
    assert (found.shape, "flip" in found.strategy, len(found.classes)) == ((1, 28, 28), flip, 10)


@needs_torchvision
@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "mnist", "fashionmnist"])
def test_missing_data_says_how_to_get_it(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=rf"{name} in .* is missing or incomplete.*--download"):
        data.load(DataConfig(dataset=name, data_root=str(tmp_path)))


@needs_torchvision
def test_half_a_download_is_noticed(tmp_path: Path) -> None:
    write_mnist(tmp_path / "MNIST" / "raw")
    cut(tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte")
    with pytest.raises(UserError, match=r"mnist in .* is missing or incomplete.*--download"):
        data.load(DataConfig(dataset="mnist", data_root=str(tmp_path)))
    write_cifar10(tmp_path)
    with pytest.raises(UserError, match=r"cifar10 in .* is missing or incomplete.*--download"):
        data.load(DataConfig(dataset="cifar10", data_root=str(tmp_path)))


def test_without_torchvision_digits_still_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(UserError, match=r"torchvision cannot be imported: .*pip install"):
        data.load(DataConfig(dataset="cifar10", data_root=str(tmp_path)))
    assert data.load(DataConfig()).name == "digits"


def test_image_size_is_for_folders() -> None:
    with pytest.raises(UserError, match="--image-size is for --dataset folder, got it with digits"):
        data.load(DataConfig(image_size=16))


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown data set 'cifar-10'; did you mean 'cifar10'"):
        data.load(DataConfig(dataset="cifar-10"))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("policy", policies.POLICIES)
def test_a_policy_changes_what_a_network_trains_on_and_nothing_else(policy: str, channels: int) -> None:
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (6, channels, 16, 16), generator=draw) / 255
    transform = {"mean": torch.full((channels,), 0.5), "std": torch.full((channels,), 0.25)}
    images = data.from_pixels(transform, pixels)

    def seen(seed: int) -> torch.Tensor:
        augmented = policies.Policy(policy, transform, side=16, flip=True, seed=seed)
        return torch.stack([augmented(images) for _ in range(3)])

    state = torch.random.get_rng_state()
    first = seen(0)
    assert torch.equal(first, seen(0)) and not torch.equal(first, seen(1))
    assert torch.equal(torch.random.get_rng_state(), state)  # nobody else's draws move
    assert first.shape == (3, *images.shape) and not torch.equal(first[0], first[1])
    values = 255 * data.to_pixels_from(transform, first[0])
    assert torch.allclose(values, values.round(), atol=1e-3) and values.min() >= 0 and values.max() <= 255


def test_constants_of_published_codes_stand_for_those_of_the_images(tree: Path) -> None:
    measured, published = read(tree), read(tree, constants="published")
    std = torch.tensor(PUBLISHED["folder"][1]).view(3, 1, 1)
    mean = torch.tensor(PUBLISHED["folder"][0]).view(3, 1, 1)
    pixels = measured.to_pixels(measured.test_images[:])
    torch.testing.assert_close(published.test_images[:], (pixels - mean) / std, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(published.to_pixels(published.test_images[:]), pixels, atol=1e-5, rtol=1e-5)
    assert published.describe()["preprocessing"] == "published" and published.fingerprint != measured.fingerprint
    with pytest.raises(UserError, match="--constants published normalise, --zca whitens instead"):
        read(tree, constants="published", zca=True)
    with pytest.raises(UserError, match=r"--constants published is for cifar10, .*, not for digits"):
        data.load(DataConfig(constants="published"))


def test_constants_of_published_codes_are_of_colour_images(tree: Path) -> None:
    for path in tree.glob("*/*/*.png"):
        save_image(path, np.zeros((6, 6)))
    with pytest.raises(UserError, match="are for 3 channels, and these images have 1; give --constants measured"):
        read(tree, constants="published")
