"""Command lines made from the configuration: one option a field, errors in one line."""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import torch

from ddpp import config as configuration
from ddpp import runs
from ddpp.config import SECTIONS, Config
from ddpp.errors import UserError, nearest
from ddpp.registry import load_plugins

Main = Callable[[Config, argparse.Namespace], None]
IN_USE = 75  # EX_TEMPFAIL of sysexits.h
_MEMORY_ADVICE = (
    "out of memory. Take smaller batches or a smaller network; a run that had begun continues with --resume, from its "
    "last checkpoint"
)


class _Parser(argparse.ArgumentParser):
    """Names the nearest option instead of guessing, and says errors in one line."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise SystemExit(2)

    def parse_all(self, argv: Sequence[str] | None) -> argparse.Namespace:
        args, unknown = self.parse_known_args(argv)
        if unknown:
            name = unknown[0].split("=")[0]
            self.error(f"unknown argument {name}{self._meant(name)} See --help.")
        return args

    def _meant(self, name: str) -> str:
        """The end of a sentence: the option of another section or stage of that name, or the nearest one."""
        known = self._option_string_actions
        if of_a_section := [option for s in SECTIONS if (option := name.replace("--", f"--{s}-", 1)) in known]:
            return f"; did you mean {' or '.join(map(repr, of_a_section))}?"
        if any(name == f"--{flag(s, f.name, s)}" for s in SECTIONS for f in fields(getattr(Config(), s))):
            return ", which is an option of another stage."
        return nearest(name, known)


def run(
    stage: str,
    description: str,
    own: str,
    sections: tuple[str, ...],
    main: Main,
    argv: Sequence[str] | None = None,
    *,
    arguments: Callable[[argparse.ArgumentParser], object] | None = None,
    base: Callable[[argparse.Namespace], Config | None] = lambda args: None,
    without: Collection[str] = (),
) -> int:
    """Parses a stage's command line and runs it.

    Args:
        stage: module name after ``ddpp.``.
        own: the section whose options are bare; options of ``data``, ``model``, ``augment`` and ``run`` always are.
        sections: all sections this stage reads.
        arguments: adds the stage's arguments that are no configuration.
        base: a saved configuration to start from, or None.
        without: options of the stage's own section that it does not read.

    Returns:
        The exit code: 0, 2 for wrong input, :data:`IN_USE` where another process has the run, 128 + n after signal n.
    """
    parser = _parser(stage, description, own, sections, without)
    if arguments:
        arguments(parser)
    args = parser.parse_all(argv)
    try:
        _check_text(args)
        config = _resolve(args, base(args), own, sections)
        load_plugins(config.run.plugins)
        keep_pages()
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = config.run.tf32
        torch.backends.cudnn.deterministic = True  # the same seed gives the same bytes on a GPU too
        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        main(config, args)
        sys.stdout.flush()
    except BrokenPipeError:  # as of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try again at its end
        print(f"ddpp.{stage}: stopped: nobody reads what it prints", file=sys.stderr)
        return 128 + 13  # SIGPIPE
    except OSError as e:  # as of names longer than the file system takes
        where = f": {e.filename}" if e.filename else ""
        print(f"ddpp.{stage}: error: {e.strerror or e}{where}", file=sys.stderr)
        return 2
    except UserError as e:
        print(f"ddpp.{stage}: error: {e}", file=sys.stderr)
        return IN_USE if isinstance(e, runs.InUse) else 2
    except (MemoryError, RuntimeError) as e:
        if not _out_of_memory(e):
            raise
        print(f"ddpp.{stage}: error: {_MEMORY_ADVICE} ({str(e).splitlines()[0]})", file=sys.stderr)
        return 2
    except runs.Stopped as e:
        print(f"ddpp.{stage}: {e}", file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt:
        print(f"ddpp.{stage}: stopped", file=sys.stderr)
        return 130
    return 0


def run_on_run(
    stage: str,
    description: str,
    main: Main,
    argv: Sequence[str] | None,
    *,
    arguments: Callable[[argparse.ArgumentParser], object],
    without: Collection[str] = (),
) -> int:
    """:func:`run` for a stage that trains networks on a run's set, by the options that the run was evaluated with."""
    sections = ("evaluate", "run")
    return run(
        stage, description, "evaluate", sections, main, argv, arguments=arguments, base=config_of_run, without=without
    )


def _out_of_memory(error: BaseException) -> bool:
    """The CPU's allocator has no exception of its own."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def add_run_folder(parser: argparse.ArgumentParser) -> None:
    """What stages take that read a run with its data set: its folder, and where its data are by now."""
    parser.add_argument("folder", metavar="RUN", help="Run folder of ddpp.distill.")
    parser.add_argument(
        "--data-root",
        dest="data.data_root",
        default=argparse.SUPPRESS,
        metavar="DIR",
        help="Folder of the data sets, if it is another than when the run was made.",
    )


def config_of_run(args: argparse.Namespace) -> Config:
    """The options that the run of :func:`add_run_folder` was made with."""
    return runs.saved_config(Path(args.folder))


def device(config: Config) -> torch.device:
    """The device that ``--device`` names.

    Raises:
        UserError: it does not exist here, or is of another kind.
    """
    name = config.run.device
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise UserError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {name} is not here: torch sees {torch.cuda.device_count()} CUDA devices. Use --device cpu."
        )
    return found


def _parser(stage: str, description: str, own: str, sections: tuple[str, ...], without: Collection[str]) -> _Parser:
    parser = _Parser(prog=f"python -m ddpp.{stage}", description=description, allow_abbrev=False)
    if sections:
        parser.add_argument(
            "--preset", metavar="NAME", help="Use a published setting; python -m ddpp.info --presets lists them."
        )
        parser.add_argument(
            "--config", metavar="FILE", help="Options from a TOML file; those of the command line override it."
        )
    else:
        parser.set_defaults(preset=None, config=None)
    for section in sections:
        group = parser.add_argument_group(section)
        table = getattr(Config(), section)
        for f in fields(table):
            if section != own or f.name not in without:
                _add_option(group, type(table), f, section, own, "model" in sections)
    return parser


def _add_option(group: Any, table: type, f: Any, section: str, own: str, begins: bool) -> None:
    """Of a stage that begins with the options' defaults, and not with those of a run or of presets."""
    scalar, _, many = configuration.value_type(table, f.name)
    name = f"--{flag(section, f.name, own)}"
    default = f.default if begins else "as the run or preset"
    text = f.metadata["help"] + (f" (default: {default})" if default not in (None, ()) else "")
    common: dict[str, Any] = {
        "dest": f"{section}.{f.name}",
        "default": argparse.SUPPRESS,
        "help": text.replace("%", "%%"),
    }
    if scalar is bool:
        group.add_argument(name, action=argparse.BooleanOptionalAction, **common)
    elif many:
        group.add_argument(name, nargs="+", metavar="NAME", **common)
    else:
        choices = ",".join(map(str, f.metadata["choices"]))
        metavar = f"{{{choices}}}" if choices else scalar.__name__.upper()
        group.add_argument(name, type=scalar, metavar=metavar, **common)


def flag(section: str, name: str, own: str) -> str:
    """An option's name on the command line of the stage whose section is ``own``, without its dashes."""
    bare = section in (own, "data", "model", "augment", "run")
    return (name if bare else f"{section}_{name}").replace("_", "-")


def _check_text(args: argparse.Namespace) -> None:
    """Refuses names that a run could not remember."""
    for value in vars(args).values():
        for text in value if isinstance(value, list | tuple) else [value]:
            try:
                str(text).encode()
            except UnicodeEncodeError:
                raise UserError(f"{os.fsencode(text)!r} is no UTF-8 text; rename that file or folder") from None


def _resolve(args: argparse.Namespace, base: Config | None, own: str, sections: tuple[str, ...]) -> Config:
    """The configuration that is asked for; ``args.given`` then holds the ``section.option`` that anything set."""
    options = [(key.split("."), value) for key, value in vars(args).items() if "." in key]
    layers: list[tuple[dict[str, dict[str, Any]], str]] = []
    if args.preset:
        layers.append((_taken(configuration.read_preset(args.preset), sections), f"preset {args.preset}"))
        _check_dataset(args, Config().with_values(*layers[0]))
    if args.config:
        values = configuration.read_toml(args.config)
        layers.append((_taken(values, sections), args.config))
        if "model" not in sections and (left := [name for name in values if name in SECTIONS and name not in sections]):
            print(f"{args.config}: not for this stage, and ignored: [{'], ['.join(left)}]", file=sys.stderr)
    layers += [({section: {name: value}}, f"--{flag(section, name, own)}") for (section, name), value in options]
    config = base or Config()
    for values, source in layers:
        config = config.with_values(values, source)
    args.given = {f"{section}.{name}" for values, _ in layers for section, table in values.items() for name in table}
    # A run remembers where they are, not how they were called from the folder where it was begun.
    plugins = [str(Path(name).resolve()) if name.endswith(".py") else name for name in config.run.plugins]
    return config.with_values({"run": {"plugins": plugins}}, "--plugins")


def _taken(values: dict[str, Any], sections: tuple[str, ...]) -> dict[str, Any]:
    """The stage's own sections, since a file may hold those of all; what is no section at all is refused later."""
    return {name: table for name, table in values.items() if name in sections or name not in SECTIONS}


def _check_dataset(args: argparse.Namespace, preset: Config) -> None:
    """Refuses a preset on another data set than its own; a folder may hold the same images."""
    given, own = getattr(args, "data.dataset", None), preset.data.dataset
    if given not in (None, own, "folder"):
        raise UserError(
            f"--preset {args.preset} is a setting for {own}, not for {given}: its steps and rates mean nothing there. "
            "Leave out --dataset, or give the options you want one by one."
        )
    if preset.data.constants == "published" and given not in (None, own) and not hasattr(args, "data.constants"):
        raise UserError(
            f"--preset {args.preset} normalises by published constants of {own}, which are not those of a folder: add "
            "--constants measured"
        )


def keep_pages() -> bool:
    """Tells glibc to keep freed memory: large tensors are otherwise mapped and faulted in anew at each step.

    Returns:
        Whether it will; other C libraries have no such setting.
    """
    mmap_max, trim_threshold = -4, -1  # malloc.h
    try:
        libc = ctypes.CDLL(None)
        return bool(libc.mallopt(mmap_max, 0) and libc.mallopt(trim_threshold, 2**31 - 1))
    except (AttributeError, OSError):
        return False
