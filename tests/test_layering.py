"""Imports go one way: models -> modules -> functional -> ops -> backends -> compiled library."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "resnext_kernels"
LAYERS = ["_C", "problem", "backends", "ops", "functional", "modules", "models", "paper", "fuse"]
LAYERS += ["__init__", "__main__"]
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """The layers that the file imports, wherever in it the statement stands."""
    here = path.relative_to(PACKAGE.parent).with_suffix("").parts  # ("resnext_kernels", ...)
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(here[: -node.level]) if node.level else ""
            module = ".".join(filter(None, [package, node.module or ""]))
            whole = module == PACKAGE.name  # from . import ops
            names |= {f"{module}.{alias.name}" for alias in node.names} if whole else {module}
    ours = (name.split(".") for name in names if name.split(".")[0] == PACKAGE.name)
    return {parts[1] if len(parts) > 1 and parts[1] in LAYERS else "__init__" for parts in ours}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    name = path.relative_to(PACKAGE).with_suffix("").parts[0]
    assert name in LAYERS, f"give {name} its place in LAYERS"
    below = set(LAYERS[: LAYERS.index(name)] + [name] * (name == "backends"))
    assert imported(path) <= below


def test_the_compiled_library_knows_nothing_of_torch() -> None:
    sources = [p for p in (PACKAGE.parent / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu")]
    assert sources
    for path in sources:
        includes = [line for line in path.read_text().splitlines() if "#include" in line]
        assert not [line for line in includes if "torch" in line or "ATen" in line], path
