"""Who may import whom: a level imports lower levels only, and heavy libraries stay where they are needed."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "ddpp"

LEVELS: dict[str, float] = {
    "errors": 0,
    "registry": 0,
    "seeds": 0,
    "config": 0,
    "runs": 0,
    "cli": 0.5,  # makes command lines of level 0
    "ops": 1,
    "data": 2,
    "models": 2,
    "augment": 2,
    "ntk": 2,
    "dual": 2.5,
    "pruning": 2.5,
    "gpu": 2.7,
    "optimizers": 2.8,  # sends to a GPU
    "trajectories": 3,
    "buffers": 3,
    "unroll": 3,
    "training": 3,
    "networks": 3.2,
    "store": 3.2,
    "parameterization": 3,
    "scores": 3,
    "synthetic": 3.5,  # may ask teachers
    "accuracies": 3.7,  # reads synthetic sets
    "methods": 4,
    "teachers": 5,
    "evaluate": 5,
    "report": 5,
    "export": 5,
    "compare": 5,
    "table": 5,
    "continual": 5,
    "search": 5,
    "info": 5,
    "distill": 6,
    "reproduce": 6.5,
    "profile": 6.5,
    "__main__": 7,
}
MAY_IMPORT_THEIR_OWN_LEVEL = {0}

HOMES = {
    "torchvision": {"data"},
    "sklearn": {"data"},
    "PIL": {"data"},
    "matplotlib": {"report", "profile", "reproduce", "continual", "search"},
    "safetensors": {"runs", "trajectories"},
}
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def room(path: Path) -> str:
    """The module or subpackage directly under ``ddpp`` that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of everything imported in a file, at the top or inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    me = room(path)
    assert me in LEVELS, f"give {me} a level here and in the design"
    for name in imported(ast.parse(path.read_text(encoding="utf-8"))):
        package, *rest = name.split(".")
        if package == "ddpp" and rest and rest[0] != me and rest[0] in LEVELS:
            lower = LEVELS[rest[0]] < LEVELS[me]
            beside = LEVELS[rest[0]] == LEVELS[me] and LEVELS[me] in MAY_IMPORT_THEIR_OWN_LEVEL
            assert lower or beside, f"{path.name} (level {LEVELS[me]}) imports {name} (level {LEVELS[rest[0]]})"
        if package in HOMES:
            assert me in HOMES[package], f"{package} belongs in {', '.join(HOMES[package])}, not in {path.name}"


@pytest.mark.parametrize("library", ["torchvision", "sklearn", "PIL"])
def test_optional_libraries_are_imported_by_their_readers_only(library: str) -> None:
    """Not at the top of a module: digits must work without torchvision."""
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        top = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
        names = {name.split(".")[0] for node in top for name in imported(node)}
        assert library not in names, f"{path.name} imports {library} at its top"


def test_every_level_exists() -> None:
    assert {room(p) for p in FILES} <= set(LEVELS)
    rooms = {p.stem for p in PACKAGE.iterdir()}
    assert set(LEVELS) <= rooms, f"without a file: {sorted(set(LEVELS) - rooms)}"
