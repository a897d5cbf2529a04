"""``python -m ddpp.info``: what is installed and built, and which implementation each operator uses here.

``python -m ddpp.info --presets cifar10-ipc10``: the published settings whose names have this in them.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import platform
import sys
from collections.abc import Iterator, Sequence

import torch

import ddpp
import ddpp.ops
from ddpp import cli, config
from ddpp.errors import UserError
from ddpp.ops import _library


def lines() -> Iterator[str]:
    """The report, line by line."""
    yield f"ddpp      {ddpp.__version__}"
    yield f"python    {platform.python_version()}, {platform.system()} {platform.machine()}"
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    yield f"torch     {torch.__version__} ({cuda}), {torch.get_num_threads()} threads"
    yield f"GPU       {_gpu()}"
    yield from _build()
    yield ""
    yield "libraries"
    for library, state in _library.status.items():
        yield f"  {library:<20}{state}"
    yield ""
    yield "operators"
    for module in pkgutil.iter_modules(ddpp.ops.__path__):
        importlib.import_module(f"ddpp.ops.{module.name}")
    width = max(map(len, _library.references)) + 2
    for name in sorted(_library.references):
        for device in ("cpu", "cuda"):
            used, why = _library.implementation(name, device)
            yield f"  {name:<{width}}{device:<6}{used} ({_unless_usable(device) or why})"


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    return ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))


def _build() -> Iterator[str]:
    try:
        from ddpp import _info
    except ImportError:
        yield "build     pure Python, nothing compiled"
        return
    facts = _info.build()
    yield f"build     {facts['compiler']}, {facts['build_type']}, torch {facts['torch_headers']} headers"
    if facts["cuda_archs"]:
        yield f"          CUDA {facts['cuda']} for {_archs(facts['cuda_archs'])}"
    else:
        yield "          without CUDA kernels (no nvcc at build time, or DDPP_BUILD_CUDA=0)"
    yield f"CPU       {', '.join(_info.supported_isas())}; {_info.active_isa()} kernels in use"


def _archs(text: str) -> str:
    """CMake's ``80-real 90`` as ``8.0, 9.0 + PTX``."""
    names = []
    for item in text.split():
        number, _, kind = item.partition("-")
        names.append(f"{number[:-1]}.{number[-1]}" + ("" if kind == "real" else " + PTX"))
    return ", ".join(names)


def _unless_usable(device: str) -> str | None:
    return "no GPU here" if device == "cuda" and not torch.cuda.is_available() else None


def presets(words: Sequence[str]) -> Iterator[str]:
    """The settings with one of these words in their name, or all: name, what their authors report, and the source.

    Raises:
        UserError: there is none.
    """
    found = [name for name in config.preset_names() if not words or any(word in name for word in words)]
    if not found:
        raise UserError(f"no preset has {' or '.join(words)} in its name; --presets alone tells all")
    for name in found:
        yield "\n    ".join((name, *config.about_preset(name)))


def _run(_: config.Config, args: argparse.Namespace) -> None:
    print("\n".join(lines() if args.presets is None else presets(args.presets)))


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(
        "info",
        "Show what is installed and built, and which implementation each operator uses here.",
        "info",
        (),
        _run,
        argv,
        arguments=lambda parser: parser.add_argument(
            "--presets",
            nargs="*",
            metavar="WORD",
            help="Published settings instead: those with a word in their name.",
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
