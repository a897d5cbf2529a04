"""Tiny ImageNet as its authors pack it: 200 classes, 500 images of 64x64 pixels each to train on and 50 to test on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

from ddpp.config import DataConfig
from ddpp.data import pictures
from ddpp.data.base import DATASETS, EVERY_GROUP, Raw, library
from ddpp.errors import UserError

FOLDER = "tiny-imagenet-200"
URL, MD5 = f"http://cs231n.stanford.edu/{FOLDER}.zip", "90528d7ca1a48142e341f4ef8d21d0de"


@DATASETS.register("tinyimagenet")
def tinyimagenet(config: DataConfig) -> Raw:
    """Reads ``tiny-imagenet-200`` under ``config.data_root``; ``val`` is tested on, since ``test`` has no labels.

    Classes are in the order of their WordNet numbers, named by the first word for them that no other class has.

    Raises:
        UserError: it is missing, incomplete or damaged, or cannot be downloaded.
    """
    root = Path(config.data_root) / FOLDER
    if config.download and not root.is_dir():
        _download(config.data_root)
    numbers = sorted(_lines(root / "wnids.txt", config))
    train = [sorted(map(str, (root / "train" / number / "images").glob("*.JPEG"))) for number in numbers]
    annotations = [line.split("\t") for line in _lines(root / "val" / "val_annotations.txt", config)]
    known = bool(annotations) and all(len(row) > 1 and row[1] in numbers for row in annotations)
    if not known or not all(train):
        raise UserError(f"{root} is incomplete: it lacks images of a class, or classes of images. {_advice(config)}")
    test = [str(root / "val" / "images" / row[0]) for row in annotations]
    train_labels = torch.arange(len(numbers)).repeat_interleave(torch.tensor([len(paths) for paths in train]))
    images, count = pictures.decode([path for paths in train for path in paths] + test), len(train_labels)
    return Raw(
        name=config.dataset,
        classes=_names(numbers, _lines(root / "words.txt", config)),
        train_images=images[:count],
        train_labels=train_labels,
        test_images=images[count:],
        test_labels=torch.tensor([numbers.index(row[1]) for row in annotations]),
        strategy=EVERY_GROUP,
    )


def _names(numbers: list[str], lines: list[str]) -> tuple[str, ...]:
    """Of lines ``number <tab> word, word, ...``; a word that two classes share gives way to their numbers."""
    words = {number: named.split(",")[0] for number, _, named in (line.partition("\t") for line in lines)}
    named = [words.get(number, number) for number in numbers]
    count = Counter(named)
    return tuple(name if count[name] == 1 else number for name, number in zip(named, numbers, strict=True))


def _lines(path: Path, config: DataConfig) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{config.dataset}: cannot read {path} ({type(e).__name__}). {_advice(config)}") from e


def _advice(config: DataConfig) -> str:
    if config.download:
        return f"Remove {Path(config.data_root) / FOLDER} and try again."
    return f"Pass --download to fetch it, or name the folder that holds {FOLDER} with --data-root."


def _download(root: str) -> None:
    try:
        library("torchvision.datasets.utils").download_and_extract_archive(URL, root, md5=MD5)
    except Exception as e:  # whatever a broken download or a damaged archive makes torchvision raise
        raise UserError(f"{URL} could not be fetched or unpacked ({type(e).__name__}: {e}). Try again.") from e
