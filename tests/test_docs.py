"""What the documentation names exists: options, files, settings."""

import contextlib
import importlib
import io
import re
import tomllib
from pathlib import Path

import pytest

from ddpp import config
from ddpp.__main__ import STAGES
from ddpp.config import Config
from ddpp.data import DATASETS
from ddpp.methods import METHODS
from ddpp.models import MODELS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
OF_OTHERS = {"--benchmark-only"}  # pytest's


@pytest.fixture(scope="module")
def options() -> set[str]:
    """All that a stage or a script of the project takes."""
    scripts = [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "scripts").glob("*.sh"), *(ROOT / "tools").glob("*.py")]
    known = set(re.findall(r'"(--[a-z][a-z-]*)"', "".join(path.read_text(encoding="utf-8") for path in scripts)))
    for stage in STAGES:
        known |= set(OPTION.findall(helped(stage)))
    return known


def helped(stage: str) -> str:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
        importlib.import_module(f"ddpp.{stage}").main(["--help"])
    return text.getvalue()


def code(page: Path) -> list[str]:
    """Spans, blocks and indented lines."""
    text = page.read_text(encoding="utf-8")
    return re.findall(r"```.*?```|`[^`]+`|(?<=\n\n)(?:    .*\n)+", text, re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_exist(page: Path, options: set[str]) -> None:
    named = {option for part in code(page) for option in OPTION.findall(part)}
    assert named - options - OF_OTHERS == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_stages_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).is_file()]
    paths = re.findall(r"`((?:ddpp|csrc|tests|scripts|benchmarks|docs)/[\w/.]+)", text)
    missing += [path for path in paths if not list(ROOT.glob(f"{path}*"))]
    missing += [stage for stage in re.findall(r"python -m ddpp\.(\w+)", text) if stage not in STAGES]
    assert missing == []


def test_help_names_what_there_is() -> None:
    """All that is registered, but for a set made elsewhere by plugins."""
    text = helped("distill")
    names = {*METHODS.names(), *DATASETS.names(), *MODELS.names()}
    assert [name for name in names if not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text)] == []


def test_settings_of_the_guide_are_valid() -> None:
    blocks = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "guide.md").read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        found = Config().with_values(tomllib.loads(block), "guide.md")
        METHODS.get(found.distill.method).check(found)


def test_the_number_of_presets_is_told() -> None:
    published = [name for name in config.preset_names() if not name.endswith("-quick")]
    assert f"names a published setting: {len(published)} of them" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("named", ["distill.main", "networks_on", "matching_gradients"])
def test_programs_run(
    named: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for held in ("_entries", "_sources"):
        monkeypatch.setattr(DATASETS, held, dict(getattr(DATASETS, held)))
    pages = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/python.md"))
    blocks = re.findall(r"```python\n(.*?)```", pages, re.DOTALL)
    (text,) = (block for block in blocks if f"{named}(" in block)
    exec(text, {"__name__": "program"})
    assert capsys.readouterr().out
