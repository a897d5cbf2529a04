"""The result: a synthetic set and its file, which holds all that is needed to use it without the run."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddpp import runs, seeds
from ddpp.data import Dataset, Transform
from ddpp.errors import UserError
from ddpp.models import flat
from ddpp.parameterization import PIXELS, Parameterization
from ddpp.trajectories import Trajectory

FORMAT = 1
FIRST_SHARE = 0.9  # of an image's class in the soft labels that no teacher gives
_AT_ONCE = 500  # images
_TRANSFORM, _LEARNED = "transform.", "learned."
_OF_A_RESULT = ("dataset", "fingerprint", "classes", "ipc", "method", "augmentation", "steps", "seed")  # its metadata


@dataclass(frozen=True)
class Synthetic:
    """Images in the space the networks are trained in, their labels, and the step size learned with them."""

    images: Tensor  # [N, C, H, W]
    labels: Tensor  # [N] int64, or logits [N, K]
    step_size: Tensor  # []

    def to(self, device: torch.device) -> Synthetic:
        return Synthetic(self.images.to(device), self.labels.to(device), self.step_size.to(device))

    def fault(self, shape: Sequence[int], classes: int, each: int, *, soft: bool) -> str:
        """What keeps this from being ``each`` images of every class, class by class: the end of a sentence, or nothing.

        Images with ``soft`` labels may stand in any order.
        """
        count = each * classes
        wanted = {
            "images": (torch.float32, (count, *shape)),
            "labels": (torch.float32, (count, classes)) if soft else (torch.int64, (count,)),
            "step_size": (torch.float32, ()),
        }
        for name, (dtype, size) in wanted.items():
            value = getattr(self, name)
            if not isinstance(value, Tensor) or value.dtype != dtype or value.shape != size:
                found = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                return f"must have {name} as {dtype} {list(size)}, got {found}"
            if not torch.isfinite(value).all():
                return f"has {name} with numbers that are not finite"
        if not soft and not torch.equal(self.labels.cpu(), torch.arange(classes).repeat_interleave(each)):
            return f"must have labels class by class, {each} of each"
        return "" if self.step_size > 0 else f"must have a step_size above 0, got {float(self.step_size):g}"

    def save(
        self,
        path: Path,
        meta: dict[str, Any],
        transform: dict[str, Tensor] | None = None,
        learned: dict[str, Tensor] | None = None,
    ) -> None:
        """Writes images, labels and step size, and with ``transform`` the way back to pixels in [0, 1].

        ``learned``: what the images are decoded from; see :mod:`ddpp.parameterization`.
        """
        tensors = {"images": self.images, "labels": self.labels, "step_size": self.step_size}
        tensors |= {_TRANSFORM + name: t for name, t in (transform or {}).items()}
        tensors |= {_LEARNED + name: t for name, t in (learned or {}).items()}
        runs.write_tensors(path, tensors, {"format": FORMAT, **meta})


def load(path: Path, needed: Collection[str] = ()) -> tuple[Synthetic, dict[str, Any]]:
    """A synthetic set and its metadata, which must tell what is ``needed``.

    Raises:
        UserError: the file is missing, damaged, foreign, or of a later version.
    """
    folder = Path(path).parent
    if not Path(path).is_file() and (folder / "config.toml").is_file():
        raise UserError(f"the run in {folder} is not finished; continue it with ddpp.distill --out {folder} --resume")
    tensors, meta = runs.read_tensors(path, "synthetic set")
    if meta.get("format") != FORMAT or not tensors.keys() >= {"images", "labels", "step_size"}:
        raise UserError(
            f"{path} is no synthetic set of format {FORMAT}; it was written by another version or stage of ddpp"
        )
    held = Synthetic(tensors["images"], tensors["labels"], tensors["step_size"])
    if lacking := [name for name in needed if name not in meta]:
        raise _damaged(path, f"does not tell {', '.join(lacking)}")
    sizes = [list(t.shape) for t in (held.images, held.labels, held.step_size)]
    if [len(size) for size in sizes] not in ([4, 1, 0], [4, 2, 0]) or sizes[0][0] != sizes[1][0]:
        images, labels, step_size = sizes
        found = f"images {images}, labels {labels} and a step size {step_size}"
        raise _damaged(path, f"must hold images [N, C, H, W], labels [N] or [N, K] and a step size [], got {found}")
    return held, meta


def of_run(folder: Path, dataset: Dataset | None = None) -> tuple[Synthetic, dict[str, Any]]:
    """A run's result and its metadata, with all that stages read of them.

    Raises:
        UserError: what :func:`load` refuses, a set that does not fit the run's data, or ``dataset`` is other data.
    """
    path, described = folder / "synthetic.safetensors", folder / "data.json"
    held, meta = load(path, _OF_A_RESULT)
    if dataset:
        runs.check_same_data(folder, meta, dataset.fingerprint)
    known = {"shape": dataset.shape} if dataset else runs.read_json(described) if described.is_file() else {}
    each = meta["ipc"] * meta.get("images_in_one", 1)
    check_fits(path, held, known.get("shape", held.images.shape[1:]), len(meta["classes"]), each)
    return held, meta


def check_fits(path: Path, held: Synthetic, shape: Sequence[int], classes: int, each: int | None = None) -> None:
    """Refuses a file's set that is not of such images, ``each`` or as many as there are of every class.

    Raises:
        UserError: it is not.
    """
    each = len(held.images) // classes if each is None else each
    if fault := held.fault(shape, classes, each, soft=held.labels.is_floating_point()):
        raise _damaged(path, fault)


def _damaged(path: Path, fault: str) -> UserError:
    return UserError(f"{path} is damaged or foreign: it {fault}. Restore it from a copy, or distil again.")


def snapshots(folder: Path) -> dict[int, Path]:
    """A run's, by their outer steps, the first one first; files of other names are none."""
    found = {path.stem.removeprefix("step-"): path for path in (folder / "snapshots").glob("step-*.safetensors")}
    return dict(sorted((int(step), path) for step, path in found.items() if step.isdecimal()))


def transform_of(path: Path) -> Transform:
    """What brought the images of a run's set to the space that networks are trained in; see :mod:`ddpp.data`.

    Raises:
        UserError: the file is missing, damaged or foreign.
    """
    tensors, _ = runs.read_tensors(path, "synthetic set")
    return {name.removeprefix(_TRANSFORM): t for name, t in tensors.items() if name.startswith(_TRANSFORM)}


def size_text(meta: dict[str, Any]) -> str:
    """How large a set is, in words, by its metadata."""
    several = f", {meta['images_in_one']} in the numbers of each" if "images_in_one" in meta else ""
    return f"{meta['ipc']} images per class{several}"


def real_images(dataset: Dataset, ipc: int, *key: str | int, seed: int, in_one: int = 1) -> Synthetic:
    """``ipc * in_one`` random real training images of each class, sorted by class; the step size is left at 0.

    Raises:
        UserError: a class has fewer images.
    """
    draw = seeds.generator(seed, *key)
    chosen = []
    for label, name in enumerate(dataset.classes):
        members = torch.nonzero(dataset.train_labels == label).flatten()
        if len(members) < ipc * in_one:
            asked = f"--ipc {ipc}" + (f" with {in_one} images in one" if in_one > 1 else "")
            held_out = "; others are held out, --validation 0 keeps all" if len(dataset.val_labels) else ""
            raise UserError(f"{asked} is more than the {len(members)} training images of class {name!r}{held_out}")
        chosen.append(members[torch.randperm(len(members), generator=draw)[: ipc * in_one]])
    index = torch.cat(chosen)
    return Synthetic(dataset.train_images[index], dataset.train_labels[index], torch.zeros(()))


def start(dataset: Dataset, ipc: int, init: str, step_size: float, seed: int, in_one: int = 1) -> Synthetic:
    """The set that distillation begins with: ``ipc * in_one`` real images of each class, or unit normal noise.

    What only teachers can choose stands for random real images here; see :func:`start_from_teachers`.
    """
    images = real_images(dataset, ipc, "start", seed=seed, in_one=in_one)
    if init == "noise":
        noise = torch.randn(images.images.shape, generator=seeds.generator(seed, "noise"))
        images = replace(images, images=noise)
    return replace(images, step_size=torch.tensor(step_size))


def with_soft_labels(first: Synthetic, classes: int) -> Synthetic:
    """Logits whose softmax gives an image's class :data:`FIRST_SHARE` and the others alike what is left."""
    height = math.log(FIRST_SHARE / (1 - FIRST_SHARE) * (classes - 1))
    return replace(first, labels=height * torch.nn.functional.one_hot(first.labels, classes).float())


@torch.no_grad()
def start_from_teachers(
    first: Synthetic,
    dataset: Dataset,
    network: nn.Module,
    teachers: Sequence[Trajectory],
    *,
    init: str,
    labels: str,
    seed: int,
    space: Parameterization = PIXELS,
) -> Synthetic:
    """The start where it asks for teachers: images that they classify right, and their answers as soft labels.

    As DATM does (arXiv 2310.05773). ``init`` "correct": of each class the first images of a random order that a teacher
    classifies right after its last epoch; where one has not enough, the next teacher's follow. ``labels`` "soft": the
    mean logits of the teachers that classify an image right, of all teachers where none does, each image as ``space``
    gives it back.

    Raises:
        UserError: all teachers together classify fewer images of a class right than there are to be.
    """
    if init != "correct" and labels != "soft":
        return first

    def ends() -> Iterator[Tensor]:  # one at a time: together they may not fit
        return (t.rows(t.epochs, t.epochs)[0].to(first.images.device) for t in teachers)

    images = first.images
    if init == "correct":
        images = _correct_images(first, dataset, network, ends(), seed)
    if labels != "soft":
        return replace(first, images=images)
    shown = space.decode(space.encode(images))
    of_all, of_right = torch.zeros(2, len(images), len(dataset.classes), device=images.device)
    count = torch.zeros(len(images), 1, device=images.device)
    for end in ends():
        answers = _answers(network, end, shown)
        right = (answers.argmax(1) == first.labels)[:, None]
        of_all, of_right, count = of_all + answers, of_right + answers * right, count + right
    return replace(first, images=images, labels=torch.where(count > 0, of_right / count, of_all / len(teachers)))


def _correct_images(
    first: Synthetic, dataset: Dataset, network: nn.Module, ends: Iterator[Tensor], seed: int
) -> Tensor:
    """[N, C, H, W]"""
    ipc, device = len(first.images) // len(dataset.classes), first.images.device
    chosen: list[list[int]] = [[] for _ in dataset.classes]
    images = dataset.train_images.to(device)
    for end in ends:
        if all(len(of_class) == ipc for of_class in chosen):
            break
        answers = torch.cat([_answers(network, end, part).argmax(1).cpu() for part in images.split(_AT_ONCE)])
        right = answers == dataset.train_labels
        for label, of_class in enumerate(chosen):
            members = torch.nonzero(right & (dataset.train_labels == label)).flatten()
            order = torch.randperm(len(members), generator=seeds.generator(seed, "correct", label))
            new = [i for i in members[order].tolist() if i not in of_class]
            of_class += new[: ipc - len(of_class)]
    for name, of_class in zip(dataset.classes, chosen, strict=True):
        if len(of_class) < ipc:
            raise UserError(
                f"--init correct finds {len(of_class)} images of class {name!r} that a teacher classifies right, and "
                f"--ipc asks for {ipc}. Train teachers longer, or give --init real."
            )
    return dataset.train_images[torch.tensor(chosen).flatten()].to(device)


def _answers(network: nn.Module, parameters: Tensor, images: Tensor) -> Tensor:
    """Logits. [N, K]"""
    parts = [flat.call(network, parameters, part.to(parameters.device)) for part in images.split(_AT_ONCE)]
    return torch.cat(parts)
