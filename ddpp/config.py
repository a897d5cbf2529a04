"""Every option of every stage: frozen dataclasses, one sentence a field, read from and written to TOML.

A section is a dataclass; :class:`Config` holds one of each. A stage shows its own section's options bare and other
stages' options behind the section's name: ``--epochs`` of ``ddpp.teachers`` is ``--teachers-epochs`` of
``ddpp.distill``.
"""

from __future__ import annotations

import json
import math
import tomllib
from dataclasses import dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_type_hints

from ddpp.errors import UserError, nearest

_LARGEST = 2**63 - 1  # that a tensor holds
_MOST_STEPS = 100_000  # of a student: their batches are drawn at once


def option(
    default: Any, text: str, *, choices: tuple[Any, ...] = (), low: float | None = None, high: float | None = None
) -> Any:
    """A dataclass field with its help sentence and the values it accepts."""
    return field(default=default, metadata={"help": text, "choices": choices, "low": low, "high": high})


@dataclass(frozen=True)
class DataConfig:
    dataset: str = option(
        "digits",
        "Data set: digits (needs no files), cifar10, cifar100, svhn, mnist, fashionmnist, tinyimagenet, or folder, any "
        "tree of images.",
    )
    data_root: str = option("data", "Folder of the data sets; for folder, the tree with train/ and test/, or val/.")
    download: bool = option(False, "Download the data set into the data root if it is missing.")
    image_size: int | None = option(None, "Resize images of a folder data set to this many pixels a side.", low=4)
    classes: tuple[str, ...] = option((), "Use only these classes of a folder data set.")
    zca: bool = option(False, "Whiten images with ZCA instead of normalising each channel.")
    constants: str = option(
        "measured",
        "Means and deviations that normalise the channels: those of the training images, or published codes'.",
        choices=("measured", "published"),
    )
    validation: float = option(0.1, "Share of the training images held out, for selection on them.", low=0, high=0.9)


@dataclass(frozen=True)
class ModelConfig:
    model: str = option(
        "convnet",
        "Architecture: convnet, convnet-kip, alexnet, vgg11, resnet18, resnet18_ap, lenet or mlp.",
    )
    width: int = option(128, "Channels of each ConvNet layer.", low=1)
    depth: int | None = option(
        None, "Blocks of the ConvNet; by default 3 at 32 pixels, one more at each doubling.", low=1
    )
    norm: str = option(
        "instance", "Normalisation of the ConvNet.", choices=("instance", "group", "layer", "batch", "none")
    )
    activation: str = option("relu", "Activation of the ConvNet.", choices=("relu", "leakyrelu", "sigmoid", "swish"))
    pooling: str = option("avg", "Pooling of the ConvNet.", choices=("avg", "max", "none"))


@dataclass(frozen=True)
class AugmentConfig:
    strategy: str = option("auto", "Augmentation groups joined by _, 'none', or 'auto': what suits the data set.")
    mode: str = option(
        "one",
        "Augmentation (DSA): apply one randomly drawn group per batch, or all in sequence.",
        choices=("one", "all"),
    )


@dataclass(frozen=True)
class TeachersConfig:
    folder: str | None = option(None, "Folder of the trajectories; by default named after data set and architecture.")
    count: int = option(10, "Number of teachers.", low=1)
    epochs: int = option(7, "Epochs of each teacher; one snapshot after each.", low=1)
    lr: float = option(0.02, "Learning rate of the teachers' SGD.", low=0)
    momentum: float = option(0.0, "Momentum of the teachers' SGD.", low=0, high=1)
    weight_decay: float = option(0.0, "Weight decay of the teachers' SGD.", low=0)
    batch: int = option(128, "Images in a batch.", low=1)
    sharpness_radius: float = option(
        0.0, "Radius of the sharpness-aware search for flat minima (GSAM, as FTD); 0 is plain SGD.", low=0
    )
    sharpness_weight: float = option(0.3, "Weight of GSAM's surrogate gap.", low=0)


@dataclass(frozen=True)
class DistillConfig:
    method: str = option(
        "ddpp",
        "Method: ddpp, mtt, bptt, dc, dsa, dm, cafe, kip or sre2l; random, herding, kcenter or forgetting, which "
        "select real images; rded, which selects parts of them; or given, a set made elsewhere.",
    )
    ipc: int = option(1, "Synthetic images per class: the storage, which --images-in-one may fill with more.", low=1)
    parameterization: str = option(
        "pixels",
        "What is learned: pixels, the frequencies that matter most in a class (FreD), or squares of smaller images, "
        "each enlarged (IDC's multi-formation).",
        choices=("pixels", "frequencies", "multiformation"),
    )
    images_in_one: int = option(
        1, "Images decoded from the storage of one; needs a --parameterization other than pixels.", low=1
    )
    steps: int = option(200, "Outer steps: updates of the synthetic images.", low=1)
    inner_steps: int = option(20, "Inner steps: student updates in each outer step (J).", low=1, high=_MOST_STEPS)
    inner_optimizer: str = option("sgd", "Rule of the updates of bptt's students.", choices=("sgd", "adam"))
    student_steps: int | None = option(
        None,
        "Updates of bptt's students: up to so many, a random number, of which the last --inner-steps are "
        "differentiated; by default these alone.",
        low=1,
        high=_MOST_STEPS,
    )
    teacher_span: int = option(2, "Epochs between the teacher's start and target (K).", low=1)
    max_start_epoch: int = option(5, "Start epochs are drawn below this bound.", low=1)
    epsilon: float = option(
        0.1, "DDPP prunes a parameter if student/target or target/student is below this.", low=0, high=1
    )
    lr_pixels: float = option(30.0, "Learning rate of the pixels.", low=0)
    lr_step_size: float = option(3e-5, "Learning rate of the student's step size.", low=0)
    step_size: float = option(0.02, "First value of the learned step size.", low=1e-12)
    momentum: float = option(0.5, "Momentum of pixels and step size.", low=0, high=1)
    optimizer: str = option(
        "sgd",
        "Outer steps by SGD with momentum, or by Adam, whose first decay is --momentum.",
        choices=("sgd", "adam"),
    )
    batch: int | None = option(None, "Synthetic images in an inner step; by default all.", low=1)
    init: str = option(
        "real",
        "Synthetic images start as real training images, as those that a teacher classifies right, or as noise.",
        choices=("real", "correct", "noise"),
    )
    labels: str = option(
        "hard",
        "Labels: fixed classes, or soft ones that are learned, from the teachers' answers on where there are teachers.",
        choices=("hard", "soft"),
    )
    lr_labels: float = option(1.0, "Learning rate of soft labels' logits.", low=0)
    labels_momentum: float = option(0.9, "Momentum of soft labels.", low=0, high=1)
    min_start_epoch: int = option(0, "Start epochs are drawn from this one on.", low=0)
    first_max_start_epoch: int | None = option(
        None, "Bound of the start epochs at the first outer step; it grows to --max-start-epoch.", low=1
    )
    window_steps: int = option(1000, "Outer steps until the bound of the start epochs has grown.", low=1)
    max_loss: float | None = option(None, "Skip outer steps whose loss exceeds this; by default none.", low=0)
    ema: float = option(
        0.0,
        "Decay of a moving average of the images, which is then the result; 0 takes the last images.",
        low=0,
        high=1,
    )
    prune: str = option(
        "ratio",
        "Parameters left out of the distance: by ratio to the target (DDPP), none (MTT), a share of difference "
        "(furthest from the target), lowest (nearest to it) or depth (earliest layers).",
        choices=("ratio", "none", "difference", "lowest", "depth"),
    )
    prune_share: float = option(
        0.25, "Share of the parameters left out by difference, lowest and depth.", low=0, high=0.99
    )
    lr_importance: float = option(
        0.0, "Learning rate of a weight for each parameter in the distance (IADD); 0 weighs all alike.", low=0
    )
    nearest_step: bool = option(False, "Match after the inner step that is nearest to the target, not after the last.")
    real_batch: int = option(256, "Real images of each class in an outer step of bptt, dc, dsa, dm and cafe.", low=1)
    loops: int | None = option(
        None, "Outer steps that dc and dsa take with one network; by default the papers' for the ipc.", low=1
    )
    loop_epochs: int | None = option(
        None,
        "Epochs that this network is trained on the synthetic images between outer steps, for cafe at most; by default "
        "the papers'.",
        low=0,
    )
    lr_network: float = option(0.01, "Learning rate of the network of dc, dsa and cafe.", low=0)
    discrimination: float = option(0.01, "Weight of cafe's discrimination loss.", low=0)
    inner_change: float = option(
        0.03,
        "cafe stops training its network when an epoch changes the accuracy by less than this fraction.",
        low=0,
        high=1,
    )
    outer_change: float = option(
        0.04,
        "cafe takes a fresh network when ten outer steps change the accuracy by less than this fraction.",
        low=0,
        high=1,
    )
    engine: str = option(
        "adjoint",
        "How gradients are computed: adjoint (exact; keeps only parameters per inner step), unrolled (exact; keeps the "
        "whole graph), tesla (approximate).",
        choices=("adjoint", "unrolled", "tesla"),
    )
    keep_every: int = option(1, "Inner steps between kept student parameters; those between are computed again.", low=1)
    snapshot_every: int = option(
        100, "Outer steps between saved snapshots, which an evaluation can select from.", low=1
    )
    checkpoint_every: int = option(50, "Outer steps between checkpoints.", low=1)
    kip_kernel: str = option(
        "conv",
        "Infinitely wide network of kip: convolutional, fully connected, convolutional with global average pooling, or "
        "the paper's, of one convolution and then blocks of a convolution and average pooling.",
        choices=("conv", "fc", "conv-gap", "convnet"),
    )
    kip_depth: int = option(3, "Hidden layers of the network of kip, blocks of the paper's.", low=1)
    kip_batch: int = option(500, "Real images in an outer step of kip.", low=1)
    kip_ridge: float = option(1e-6, "Ridge of the regression of kip, in units of the kernel's mean diagonal.", low=0)
    rded_candidates: int = option(300, "Random real images of each class that rded looks at.", low=1)
    rded_crops: int = option(5, "Random crops of each of them, of which rded keeps one.", low=1)
    rded_patches: int = option(
        1,
        "Crops along each side of an image of rded; the paper takes 1 for images of 32 pixels, 2 for larger ones.",
        low=1,
    )
    sre2l_statistics: float = option(0.01, "Weight of the statistics of real images in the loss of sre2l.", low=0)
    own: tuple[str, ...] = option((), "Options of a plugin's method, each as NAME=VALUE.")
    given: tuple[str, ...] = option(
        (),
        "Set of method given: .pt or .npy files of its images, labels and step size, the last two where they are "
        "there, one .pt or .npz file of images and labels, a folder of pictures, or a set of ddpp.",
    )
    given_space: str = option(
        "networks",
        "Those images are what networks are trained on here, pixels from 0 to 1, or normalised by the constants of "
        "published codes.",
        choices=("networks", "pixels", "published"),
    )


@dataclass(frozen=True)
class EvaluateConfig:
    models: tuple[str, ...] = option(
        (),
        "Architectures to train, by default the one distilled with; options may follow, as in "
        "convnet:norm=batch,pooling=max or, for the width alone, convnet:256.",
    )
    networks: int = option(5, "Networks trained from scratch for each figure.", low=1)
    epochs: int = option(300, "Epochs on the synthetic images; the rate falls to a tenth halfway.", low=1)
    lr: float | None = option(None, "Learning rate; by default the learned step size.", low=0)
    optimizer: str | None = option(
        None,
        "Optimiser of the networks on synthetic and random real images, by default that of bptt's students, or else "
        "sgd; networks on all real images always train by SGD.",
        choices=("sgd", "adam", "adamw"),
    )
    labels: str = option(
        "own",
        "What networks on synthetic and random real images learn: the images' own labels, or what a teacher answers to "
        "each image as it is shown, augmented (SRe2L, RDED).",
        choices=("own", "teacher"),
    )
    temperature: float = option(20.0, "Temperature at which networks learn a teacher's answers.", low=1e-3)
    cutmix: bool = option(False, "With a teacher's answers: a part of each image is another one's (CutMix).")
    momentum: float = option(0.9, "Momentum of SGD.", low=0, high=1)
    weight_decay: float = option(5e-4, "Weight decay of SGD, Adam and AdamW.", low=0)
    batch: int = option(256, "Images in a batch.", low=1)
    full_epochs: int = option(30, "Epochs on all real images for the upper bound; 0 leaves it out.", low=0)
    full_lr: float = option(0.01, "Learning rate on all real images.", low=0)
    full_weight_decay: float | None = option(
        None, "Weight decay on all real images, by default that on few; AdamW's is of another scale.", low=0
    )
    select: str = option(
        "final",
        "Which snapshot is reported: the last, the best on held-out or on test images, or all three side by side.",
        choices=("final", "val", "test", "all"),
    )
    search_lr: bool = option(
        False,
        "Also report at the best of five learning rates at which no network diverges, beside the learned step size.",
    )
    augmentations: tuple[str, ...] = option(
        (), "Also report with each of these: none, dsa, autoaugment, randaugment, imagenet (the grid of DC-BENCH)."
    )


@dataclass(frozen=True)
class RunConfig:
    seed: int = option(0, "Seed of every random draw.", low=0, high=2**63 - 1)
    device: str = option("auto", "Device to run on: auto, cpu, cuda or cuda:N.")
    threads: int | None = option(None, "CPU threads; by default torch's choice.", low=1, high=1024)
    plugins: tuple[str, ...] = option((), "Python files or modules that register methods, data sets or architectures.")
    use_fused_kernels: bool = option(
        True, "Use compiled kernels for loss, augmentation and the ConvNet's step; without, pure PyTorch."
    )
    winograd: int = option(
        2, "Side of a ConvNet's Winograd tiles on the CPU: 2, 4 (faster, less exact) or 0, none.", choices=(0, 2, 4)
    )
    cuda_graphs: bool = option(
        True, "On a GPU, capture steps of students and of trainings as CUDA graphs and replay them."
    )
    tf32: bool = option(False, "On a GPU, allow TF32 in convolutions and matrix products: faster, less exact.")
    bf16: bool = option(
        False,
        "Store a ConvNet's activations in bfloat16 while distilling: half as much to move, gradients less exact.",
    )


@dataclass(frozen=True)
class Config:
    """All sections. A stage reads those it needs."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    teachers: TeachersConfig = field(default_factory=TeachersConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def networks_optimizer(self) -> str:
        """What networks on the synthetic set are trained by."""
        return self.evaluate.optimizer or self.distill.inner_optimizer

    def with_values(self, values: dict[str, dict[str, Any]], source: str) -> Config:
        """A copy with the given options set, each checked.

        Raises:
            UserError: unknown section or option, or a value outside the range; the message names ``source``.
        """
        config = self
        for section, table in values.items():
            if section not in SECTIONS:
                raise UserError(
                    f"{source}: unknown section [{section}]{nearest(section, SECTIONS)} Known: {', '.join(SECTIONS)}"
                )
            if not isinstance(table, dict):
                raise UserError(f"{source}: {section} must be a table of options under [{section}], got {table!r}")
            config = replace(config, **{section: _updated(getattr(config, section), section, table, source)})
        return config

    def to_toml(self) -> str:
        return "\n".join(_table(name, getattr(self, name)) for name in SECTIONS)


SECTIONS = tuple(f.name for f in fields(Config))


def read_toml(path: str | Path) -> dict[str, dict[str, Any]]:
    """The tables of a configuration file.

    Raises:
        UserError: the file is missing or is not TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"cannot read the configuration file {path}: {e.strerror}") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{path} is not valid TOML: {e}") from e


def load(path: str | Path) -> Config:
    """The configuration saved with a run."""
    return Config().with_values(read_toml(path), str(path))


def preset_names() -> list[str]:
    return sorted(p.name.removesuffix(".toml") for p in _presets().iterdir() if p.name.endswith(".toml"))


def read_preset(name: str) -> dict[str, dict[str, Any]]:
    """The tables of a preset of the package.

    Raises:
        UserError: no preset of that name; the message names the nearest.
    """
    if name not in preset_names():
        known = "python -m ddpp.info --presets tells all."
        raise UserError(f"unknown preset {name!r}{nearest(name, preset_names())} {known}")
    return {section: table for section, table in _preset(name).items() if section in SECTIONS}


def about_preset(name: str) -> tuple[str, str]:
    """The accuracy that the authors of a preset's setting report, and where it is from."""
    values = _preset(name)
    return values["published"], values["source"]


def value_type(section: type, name: str) -> tuple[type, bool, bool]:
    """(scalar type, whether None is allowed, whether it is a tuple) of one field."""
    hint = get_type_hints(section)[name]
    parts = get_args(hint)
    if hint == tuple[str, ...]:
        return str, False, True
    if type(None) in parts:
        return next(p for p in parts if p is not type(None)), True, False
    return hint, False, False


def _preset(name: str) -> dict[str, Any]:
    return tomllib.loads((_presets() / f"{name}.toml").read_text(encoding="utf-8"))


def _presets() -> Any:
    return resources.files("ddpp") / "presets"


def _updated(section: Any, name: str, table: dict[str, Any], source: str) -> Any:
    known = {f.name: f for f in fields(section)}
    for key, value in table.items():
        if key not in known:
            raise UserError(f"{source}: unknown option {key!r} in [{name}]{nearest(key, known)}")
        where = source if source.startswith("--") else f"{source}: {name}.{key}"  # an option names itself
        table = {**table, key: _checked(type(section), known[key], value, where)}
    return replace(section, **table)


def _checked(section: type, entry: Any, value: Any, where: str) -> Any:
    scalar, optional, many = value_type(section, entry.name)
    if value is None and optional:
        return None
    if many:
        if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
            raise UserError(f"{where} must be a list of names, got {value!r}")
        return tuple(value)
    if scalar is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, scalar) or (isinstance(value, bool) and scalar is not bool):
        raise UserError(f"{where} must be of type {scalar.__name__}, got {value!r}")
    meta = entry.metadata
    if meta["choices"] and value not in meta["choices"]:
        names = [str(choice) for choice in meta["choices"]]
        raise UserError(f"{where} must be one of {', '.join(names)}, got {value!r}{nearest(str(value), names)}")
    if scalar in (int, float):
        low, high = meta["low"], meta["high"]
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{where} must be a finite number, got {value!r}")
        if (low is not None and value < low) or (high is not None and value > high):
            raise UserError(f"{where} must be {_range(low, high)}, got {value!r}")
        if isinstance(value, int) and abs(value) > _LARGEST:
            raise UserError(f"{where} must be at most {_LARGEST}, got {value!r}")
    return value


def _range(low: float | None, high: float | None) -> str:
    if high is None:
        return f"at least {low}" if low is not None else "a number"
    return f"between {low} and {high}"


def _table(name: str, section: Any) -> str:
    rows = [
        f"{f.name} = {_toml(getattr(section, f.name))}" for f in fields(section) if getattr(section, f.name) is not None
    ]
    return "\n".join([f"[{name}]", *rows, ""])


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if isinstance(value, (bool, str)):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # which TOML takes so alone
    return repr(value)
