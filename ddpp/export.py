"""STAGE 4: a run's synthetic set for other programs, as tensors and as pictures.

``python -m ddpp.export RUN --to DIR``
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ddpp import cli, data, runs, synthetic
from ddpp.config import Config
from ddpp.errors import UserError

_PICTURES = "| `pixels/` | pictures of the images, for viewing: 8 bits, cut off at black and white |"
_WHITENED = """
Networks saw x = (pixels - mean) @ whiten, of pixels in [0, 1] as one row of C H W values: ZCA fitted on the training
images. Bring other images, test images above all, there before they meet a network trained on this set:

    t = torch.load("transform.pt")
    x = ((pixels.flatten(1) - t["mean"]) @ t["whiten"]).view_as(pixels)
"""
_NORMALISED = """
Networks saw x = (pixels - mean) / std, of pixels in [0, 1], channel by channel. Bring other images, test images above
all, there before they meet a network trained on this set:

    t = torch.load("transform.pt")
    x = (pixels - t["mean"].view(-1, 1, 1)) / t["std"].view(-1, 1, 1)
"""


def export(folder: Path, to: Path) -> None:
    """Writes ``images.pt`` [N, C, H, W], ``labels.pt`` ([N] or logits [N, K]), ``lr.pt`` [] and ``transform.pt``.

    Also ``README.md``, and of grey and RGB images ``pixels/<class>/<number>.png``, cut off at black and white.

    Raises:
        UserError: the folder holds no run's result, ``to`` is not empty, or a file cannot be written.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"{to} exists and is not empty. Choose another --to.")
    path = folder / "synthetic.safetensors"
    held, meta = synthetic.of_run(folder)
    transform = synthetic.transform_of(path)
    tensors = {"images": held.images, "labels": held.labels, "lr": held.step_size, "transform": transform}
    for name, value in tensors.items():
        written = io.BytesIO()  # a full disk is an error of its own to torch
        torch.save(value, written)
        with runs.replacing(to / f"{name}.pt") as temporary:
            temporary.write_bytes(written.getbuffer())
    if _can_be_shown(held):
        data.pictures.write(to / "pixels", data.to_pixels_from(transform, held.images), meta["classes"])
    runs.write_text(to / "README.md", _text(held, meta, "whiten" in transform))


def _can_be_shown(held: synthetic.Synthetic) -> bool:
    return held.images.shape[1] in (1, 3)


def _text(held: synthetic.Synthetic, meta: dict[str, Any], whitened: bool) -> str:
    soft = held.labels.is_floating_point()
    groups = "_".join(meta["augmentation"]["groups"]) or "none"
    lines = [
        f"# {meta['dataset']}, {meta['method']}, {synthetic.size_text(meta)}",
        "",
        "| file | what |",
        "|---|---|",
        f"| `images.pt` | {list(held.images.shape)}, class by class, as networks saw them |",
        f"| `labels.pt` | {list(held.labels.shape)}, {'logits of soft labels' if soft else 'classes'} |",
        "| `lr.pt` | the learned step size of SGD |",
        "| `transform.pt` | what brings pixels to where the images are |",
        *([_PICTURES] if _can_be_shown(held) else []),
        "",
        f"Classes: {', '.join(meta['classes'])}. Distilled with augmentation {groups}, of which each batch had "
        f"{meta['augmentation']['mode']}; train with it too.",
        _WHITENED if whitened else _NORMALISED,
    ]
    return "\n".join(lines)


def _run(config: Config, args: argparse.Namespace) -> None:
    export(Path(args.folder), Path(args.to))
    print(f"written: {', '.join(sorted(str(path) for path in Path(args.to).iterdir()))}")


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN", help="Run folder of ddpp.distill.")
    parser.add_argument("--to", required=True, metavar="DIR", help="Folder to write, new or empty.")


def main(argv: Sequence[str] | None = None) -> int:
    description = "Write a run's synthetic set for other programs, as tensors and as pictures."
    return cli.run("export", description, "export", (), _run, argv, arguments=_arguments)


if __name__ == "__main__":
    sys.exit(main())
