"""Options: checked, named with their nearest neighbour, and saved so that they read back equal."""

import argparse
import linecache
import sys
import types
from pathlib import Path

import pytest
import torch

from ddpp import cli, config, registry
from ddpp.config import Config
from ddpp.errors import UserError
from ddpp.registry import Registry


def parsed(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, Config | None, str]:
    seen: list[Config] = []

    def main(found: Config, args: argparse.Namespace) -> None:
        seen.append(found)

    try:
        code = cli.run("distill", "test", "distill", config.SECTIONS, main, argv)
    except SystemExit as e:
        code = int(e.code or 0)
    return code, seen[0] if seen else None, capsys.readouterr().err


@pytest.mark.parametrize("root", ['a "quoted" \\ path', "tab\tand\x7f", "\x00\x1f", "\x85 \u2028 \u00e9"])
def test_saved_configuration_reads_back_equal(root: str, tmp_path: Path) -> None:
    asked = Config().with_values(
        {
            "distill": {"ipc": 7, "lr_step_size": 1e-7, "batch": 5},
            "evaluate": {"models": ["convnet", "vgg11"]},
            "data": {"zca": True, "data_root": root},
        },
        "test",
    )
    (tmp_path / "config.toml").write_text(asked.to_toml(), encoding="utf-8")
    assert config.load(tmp_path / "config.toml") == asked


def test_options_win_over_file_over_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.toml").write_text("[distill]\nsteps = 11\ninner_steps = 3\n")
    argv = ["--preset", "mtt-cifar10-ipc10", "--config", str(tmp_path / "mine.toml"), "--inner-steps", "4"]
    code, found, _ = parsed(argv, capsys)
    assert code == 0 and found is not None
    assert (found.distill.ipc, found.distill.steps, found.distill.inner_steps) == (10, 11, 4)


def test_other_stages_options_carry_their_section(capsys: pytest.CaptureFixture[str]) -> None:
    code, found, _ = parsed(["--teachers-epochs", "3", "--evaluate-epochs", "4", "--no-use-fused-kernels"], capsys)
    assert code == 0 and found is not None
    assert (found.teachers.epochs, found.evaluate.epochs, found.run.use_fused_kernels) == (3, 4, False)


@pytest.mark.parametrize(("argv", "on"), [(["--tf32"], True), ([], False)])
def test_tf32_is_off_unless_asked_for(argv: list[str], on: bool, capsys: pytest.CaptureFixture[str]) -> None:
    code, found, _ = parsed(argv, capsys)
    assert code == 0 and found is not None and found.run.tf32 is on
    assert torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is on


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--ipcs", "3"], "unknown argument --ipcs; did you mean '--ipc'?"),
        (["--select", "val"], "unknown argument --select; did you mean '--evaluate-select'?"),
        (["--lr", "1"], "unknown argument --lr; did you mean '--teachers-lr' or '--evaluate-lr'?"),
        (["--count", "1"], "unknown argument --count; did you mean '--teachers-count'?"),
        (["--xylophone", "1"], "unknown argument --xylophone. See --help."),
        (["--ipc", "0"], "--ipc must be at least 1, got 0"),
        (["--ipc", "one"], "argument --ipc: invalid int value: 'one'"),
        (["--epsilon", "1.5"], "must be between 0 and 1, got 1.5"),
        (["--threads", "1000000000000"], "must be between 1 and 1024, got 1000000000000"),
        (["--lr-pixels", "nan"], "must be a finite number, got nan"),
        (["--lr-pixels", "inf"], "must be a finite number, got inf"),
        (["--seed", str(2**63)], f"--seed must be between 0 and {2**63 - 1}, got {2**63}"),
        (["--batch", str(2**63)], f"--batch must be at most {2**63 - 1}, got {2**63}"),
        (["--init", "noisy"], "must be one of real, correct, noise, got 'noisy'; did you mean 'noise'?"),
        (["--winograd", "3"], "--winograd must be one of 0, 2, 4, got 3"),
        (["--preset", "mtt-cifar10-ip10"], "unknown preset 'mtt-cifar10-ip10'; did you mean 'mtt-cifar10-ipc10'?"),
        (["--preset", "dm-cifar10-ipc1", "--dataset", "digits"], "is a setting for cifar10, not for digits"),
        (["--preset", "dm-cifar10-ipc1", "--dataset", "folder"], "not those of a folder: add --constants measured"),
        (["--config", "absent.toml"], "cannot read the configuration file absent.toml"),
    ],
)
def test_wrong_options_are_named(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, found, text = parsed(argv, capsys)
    assert (code, found) == (2, None)
    assert message in text and "Traceback" not in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[distil]\n", r"unknown section \[distil\]; did you mean 'distill'"),
        ("[distill]\nipcs = 1\n", r"unknown option 'ipcs' in \[distill\]; did you mean 'ipc'"),
        ('[distill]\nipc = "1"\n', "distill.ipc must be of type int, got '1'"),
        ("[distill]\nipc = true\n", "distill.ipc must be of type int, got True"),
        ("[distill\n", "is not valid TOML"),
        ("# caf\u00e9\n", "is not valid TOML: 'utf-8' codec"),
        ("distill = 3\n", r"distill must be a table of options under \[distill\], got 3"),
    ],
)
def test_wrong_files_are_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=message):
        config.load(tmp_path / "c.toml")


@pytest.mark.parametrize("known", [True, False])
def test_memory_that_does_not_suffice_is_said_in_a_line(known: bool, capsys: pytest.CaptureFixture[str]) -> None:
    def main(found: Config, args: argparse.Namespace) -> None:
        if not known:
            raise RuntimeError("another failure")
        torch.empty(2**60, dtype=torch.uint8)

    def stage() -> int:
        return cli.run("distill", "test", "distill", config.SECTIONS, main, [])

    if known:
        assert stage() == 2
        assert "error: out of memory. Take smaller batches" in capsys.readouterr().err
    else:
        with pytest.raises(RuntimeError, match="another failure"):
            stage()


@pytest.mark.parametrize("name", config.preset_names())
def test_every_preset_parses(name: str) -> None:
    found = Config().with_values(config.read_preset(name), name)
    method, dataset, size = name.split("-")
    assert {"ftd": "mtt", "tesla": "mtt", "att": "mtt", "fred": "mtt", "datm": "ddpp", "pad": "ddpp"}.get(
        method, method
    ) == (found.distill.method)
    assert ("folder" if dataset.startswith("image") else dataset) == found.data.dataset
    assert size in (f"ipc{found.distill.ipc}", "quick")


def test_every_option_has_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.run("distill", "test", "distill", config.SECTIONS, lambda *_: None, ["--help"])
    text = capsys.readouterr().out
    for section in config.SECTIONS:
        table = getattr(Config(), section)
        for name, entry in type(table).__dataclass_fields__.items():
            assert entry.metadata["help"].endswith("."), f"{section}.{name}"
            assert name.replace("_", "-") in text


def test_registry_names_the_nearest() -> None:
    table: Registry[int] = Registry("colour")
    table.register("green")(1)
    assert table.get("green") == 1
    with pytest.raises(UserError, match="unknown colour 'gren'; did you mean 'green'"):
        table.get("gren")
    with pytest.raises(KeyError, match="registered twice"):
        table.register("green")(2)


def test_a_cell_of_a_notebook_may_register_again() -> None:
    """What a session registers it may edit; another one of that name stays an error."""
    table: Registry[type] = Registry("colour")
    for shade in (1, 2):
        table.register("green")(type("Green", (), {"__module__": "__main__", "shade": shade}))
    assert table.get("green").shade == 2
    with pytest.raises(KeyError, match="registered twice"):
        table.register("green")(type("Other", (), {"__module__": "__main__"}))


def test_an_edited_cell_is_another_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or teachers of the network that it made before would be taken for its own."""
    monkeypatch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))
    monkeypatch.setattr(registry, "_plugins", set())
    table: Registry[object] = Registry("colour")
    found = []
    for number, text in enumerate(["def green():\n    return 1\n", "def green():\n    return 2\n"]):
        file = f"<cell {number}>"
        monkeypatch.setitem(linecache.cache, file, (len(text), None, text.splitlines(keepends=True), file))
        cell = {"__name__": "__main__"}
        exec(compile(text, file, "exec"), cell)
        table.register("green")(cell["green"])
        found.append(table.source("green"))
    assert len(set(found)) == 2
