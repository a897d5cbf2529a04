"""A set that is there already, evaluated, compared and used as one distilled here: another program's, or one shared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpp import data, runs, synthetic
from ddpp.config import Config
from ddpp.data import Dataset
from ddpp.errors import UserError
from ddpp.methods import METHODS, Problem
from ddpp.synthetic import Synthetic

_TOO_BRIGHT = 16  # for pixels in which 1 is white
_OF_NUMPY = ("float64", "float32", "int64", "int32")  # accuracies that stand beside images in a file


@METHODS.register("given")
class Given:
    """Files of ``--given``: images [N, C, H, W], N = ipc of each class, with labels, class by class without.

    Labels are class indices [N], or soft ones [N, K] with ``--labels soft``: rows that sum to 1 are probabilities,
    others logits. One file may hold all, as ``{"data": (images, labels)}`` or, as DC's code writes it, a list of such
    pairs, of which the first is taken, or as arrays ``images`` and ``labels`` of an ``.npz``; a folder holds pictures,
    ``<class>/*``. Channels may stand last. Networks are trained at the set's step size, or at ``--step-size`` without.
    """

    needs_teachers = False
    learns_labels = True

    @staticmethod
    def check(config: Config) -> None:
        """Files must be named.

        Raises:
            UserError: they are not, or too many are.
        """
        if not 1 <= len(config.distill.given) <= 3:
            raise UserError(
                "--method given needs --given FILE: images.pt [labels.pt [lr.pt]] or the same as .npy, one .pt or .npz "
                f"of images and labels, or a set of ddpp; got {len(config.distill.given)} files"
            )

    def __init__(self, problem: Problem) -> None:
        settings, dataset = problem.config.distill, problem.dataset
        self._files = " ".join(settings.given)
        images, labels, step_size = _read(problem.config, dataset)
        images = _channels_first(images, dataset)
        self._check_images(images, dataset, settings.ipc)
        if not (torch.isfinite(step_size) and step_size > 0):
            raise UserError(f"{self._files}: the step size must be positive, got {float(step_size)}")
        images = self._in_networks_space(images, problem.config, dataset)
        labels = self._labels(labels, len(dataset.classes), settings.ipc)
        if labels.is_floating_point() != (settings.labels == "soft"):
            held, other = ("soft", "hard") if labels.is_floating_point() else ("hard", "soft")
            raise UserError(f"{self._files} has {held} labels, and --labels is {other}; give --labels {held}")
        order = _class_by_class(labels, settings.ipc)
        self._held = Synthetic(images[order], labels[order], step_size)

    def choose(self) -> Synthetic:
        return self._held

    def _check_images(self, images: Tensor, dataset: Dataset, ipc: int) -> None:
        classes = len(dataset.classes)
        if tuple(images.shape[1:]) != dataset.shape:
            shape = ", ".join(map(str, dataset.shape))
            raise UserError(f"{self._files}: images must be [N, {shape}] for {dataset.name}, got {list(images.shape)}")
        if len(images) != ipc * classes:
            raise UserError(
                f"{self._files} holds {len(images)} images, and --ipc {ipc} means {ipc * classes}; give the set's --ipc"
            )
        if not torch.isfinite(images).all():
            raise UserError(f"{self._files} holds pixels that are no numbers")

    def _in_networks_space(self, images: Tensor, config: Config, dataset: Dataset) -> Tensor:
        space, name = config.distill.given_space, config.data.dataset
        if space == "networks":
            if images.min() >= 0 and images.max() <= 1:
                print(f"{self._files}: all numbers are from 0 to 1; if they are pixels, give --given-space pixels")
            return images
        if space == "published":
            transform = data.published_transform(name, "--given-space published")
            images = images * transform["std"].view(-1, 1, 1) + transform["mean"].view(-1, 1, 1)
        else:
            self._check_pixels(float(images.min()), float(images.max()))
        return data.from_pixels(dataset.transform, images)

    def _check_pixels(self, least: float, most: float) -> None:
        """Distilled ones may leave what can be shown, but not as far as other scales do."""
        expected = f"{self._files}: pixels are from 0 to 1, or whole numbers to 255 as uint8"
        found = f"{expected}, and these go from {least:.3g} to {most:.3g}"
        if most > _TOO_BRIGHT:
            raise UserError(f"{found}; divide them by 255")
        if least < -1 or most > 2:
            print(f"{found}; if they were normalised, --given-space says how")

    def _labels(self, given: Tensor | None, classes: int, ipc: int) -> Tensor:
        """Class indices [N], or logits [N, K]."""
        if given is None:
            return torch.arange(classes).repeat_interleave(ipc)
        expected = f"labels must be classes [{ipc * classes}] from 0 to {classes - 1}, {ipc} of each, or soft ones"
        if given.is_floating_point() and given.shape == (ipc * classes, classes) and torch.isfinite(given).all():
            probable = (given >= 0).all() and torch.allclose(given.sum(1), torch.ones(len(given)), atol=1e-3)
            return given.clamp_min(torch.finfo(torch.float32).tiny).log() if probable else given
        if given.is_floating_point() or given.shape != (ipc * classes,):
            found = f"{given.dtype} {list(given.shape)}"
            raise UserError(f"{self._files}: {expected} [{ipc * classes}, {classes}], got {found}")
        if given.min() < 0 or given.max() >= classes:
            raise UserError(f"{self._files}: {expected} [{ipc * classes}, {classes}], got {given.unique().tolist()}")
        counts = torch.bincount(given, minlength=classes)
        if not (counts == ipc).all():
            odd = int((counts != ipc).nonzero()[0])
            raise UserError(f"{self._files}: {expected} [{ipc * classes}, {classes}], got {counts[odd]} of class {odd}")
        return given


def _channels_first(images: Tensor, dataset: Dataset) -> Tensor:
    channels, height, width = dataset.shape
    last = images.shape[1:] == (height, width, channels) and images.shape[1:] != dataset.shape
    return images.movedim(-1, 1).contiguous() if last else images


def _class_by_class(labels: Tensor, ipc: int) -> Tensor:
    """The order by class, of soft labels by the likeliest one; as given where that is not as many of each. [N]"""
    of = labels.argmax(1) if labels.is_floating_point() else labels
    counts = torch.bincount(of, minlength=len(labels) // ipc)
    return of.argsort(stable=True) if (counts == ipc).all() else torch.arange(len(labels))


def _read(config: Config, dataset: Dataset) -> tuple[Tensor, Tensor | None, Tensor]:
    """Images as they are given, labels if there are any, and the step size."""
    settings = config.distill
    first, *others = [file for name in settings.given for file in _files_of(Path(name))]
    if first.suffix == ".safetensors":
        if others or settings.given_space != "networks":
            raise UserError(f"{first} is a set of ddpp, which holds all; leave out other files and --given-space")
        held, meta = synthetic.load(first)
        if "fingerprint" not in meta:
            raise UserError(f"{first} does not say of what data it is; give a run's synthetic.safetensors")
        runs.check_same_data(first, meta, dataset.fingerprint)
        return held.images, held.labels, held.step_size
    if first.is_dir():
        if others or settings.given_space != "pixels":
            raise UserError(f"{first} is a folder of pictures; name it alone and give --given-space pixels")
        pixels, of_classes = data.folder.read_classes(first, dataset.classes, config.data.image_size)
        return pixels, of_classes, torch.tensor(settings.step_size)
    images, *more = *_pair(_load(first), first), *(_tensor(_load(path), path) for path in others)
    labels, step_size = [*more, None, None][:2]
    if labels is not None:
        labels = labels.float() if labels.is_floating_point() else labels.long()
    if step_size is not None and step_size.numel() != 1:
        raise UserError(f"{others[-1]}: the step size must be one number, got {list(step_size.shape)}")
    whole = images.dtype == torch.uint8
    if whole and settings.given_space != "pixels":
        raise UserError(f"{first} holds whole numbers, as pixels are; give --given-space pixels")
    images = images.float() / 255 if whole else images.float()
    return images, labels, torch.tensor(settings.step_size if step_size is None else float(step_size))


def _files_of(path: Path) -> list[Path]:
    """What is meant by a run folder, or by one that ddpp.export wrote; else the path itself."""
    if (path / "synthetic.safetensors").is_file():
        return [path / "synthetic.safetensors"]
    exported = [path / f"{name}.pt" for name in ("images", "labels", "lr")]
    return exported if all(file.is_file() for file in exported) else [path]


def _pair(found: Any, path: Path) -> list[Tensor]:
    """Images alone, or images and labels where a file holds both."""
    held = found.get("data", found) if isinstance(found, dict) else found
    while isinstance(held, list | tuple) and held and not isinstance(held[0], Tensor):
        held = held[0]
    return [_tensor(part, path) for part in (held[:2] if isinstance(held, list | tuple) and held else [held])]


def _tensor(found: Any, path: Path) -> Tensor:
    if isinstance(found, float):
        return torch.tensor(found)
    if not isinstance(found, Tensor):
        kind = type(found).__name__
        raise UserError(f'{path} holds a {kind} where a tensor or {{"data": (images, labels)}} was expected')
    return found.detach()


def _load(path: Path) -> Any:
    """What torch.save or numpy wrote; code in a file is not run."""
    if path.suffix in (".npy", ".npz"):
        return _of_numpy(path)
    scalar = np.float64(0).__reduce__()[0]
    known: list[Any] = [np.dtype, scalar, (scalar, "numpy.core.multiarray.scalar")]  # the older name too
    known += [type(np.dtype(name)) for name in _OF_NUMPY]
    return runs.read_pickle(path, "Give files that torch.save wrote.", known)


def _of_numpy(path: Path) -> Any:
    """The tensor of an ``.npy``; images, and labels where they are there, of an ``.npz``."""
    try:
        with open(path, "rb") as file:
            found = np.load(file, allow_pickle=False)
            if isinstance(found, np.ndarray):
                return torch.from_numpy(found)
            if "images" not in found:
                raise ValueError(f"its arrays are {', '.join(found) or 'none'}, and images would be called images")
            return {"data": [torch.from_numpy(found[name]) for name in ("images", "labels") if name in found]}
    except Exception as e:  # a damaged file may end in any
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise UserError(f"cannot read {path}: {reason}. Give numbers that numpy wrote, without objects.") from e
