"""Imports inside the package point down only."""

from __future__ import annotations

import ast
from pathlib import Path

import mmbal_fast

PACKAGE = Path(mmbal_fast.__file__).parent

LAYERS = (
    ("_version",),
    ("_backend",),
    ("reference", "_progress", "_task"),
    ("functional",),
    ("nn",),
    ("training",),
    ("fusion",),
    ("measures",),
    ("methods",),
    ("integrations",),
    ("compare",),
    ("demo",),
    ("bench", "info"),
    ("cli",),
    ("__main__",),
)
"""From the lowest up: a layer uses those above it in this list, and itself."""

RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def imported(tree: ast.AST, package: str) -> set[str]:
    """The parts of `mmbal_fast` that a module imports, wherever it does."""
    found: set[str] = set()
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{package} imports relatively"
            base = node.module or ""
            names = [base]
            if base == "mmbal_fast":
                names = [f"mmbal_fast.{each.name}" for each in node.names]
        found.update(name.split(".")[1] for name in names if name.startswith("mmbal_fast."))
    return found


def test_imports_point_down() -> None:
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        layer = parts[0]
        if layer == "__init__":
            continue  # shows all of them
        for other in imported(ast.parse(path.read_text()), layer):
            # Else a name that the package shows, as in `from mmbal_fast import OGMGE`.
            rank = RANK.get(other, RANK["methods"])
            if other != layer and rank >= RANK[layer]:
                wrong.append(f"{'/'.join(parts)} imports {other}")
    assert wrong == []


def test_every_part_of_the_package_has_a_layer() -> None:
    parts = {
        path.stem if path.is_file() else path.name
        for path in PACKAGE.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert parts - {"__init__"} <= set(RANK)


def test_the_core_knows_no_torch() -> None:
    """No file of csrc includes a torch header, and no loop includes what belongs to Python."""
    source = PACKAGE.parent / "csrc"
    for path in source.rglob("*"):
        if path.suffix not in (".h", ".cpp", ".cu", ".cuh"):
            continue
        included = [
            line.split()[1].strip('"<>')
            for line in path.read_text().splitlines()
            if line.startswith("#include")
        ]
        layer = path.relative_to(source).parts[0]
        assert not any(name.startswith(("torch/", "ATen/", "c10/")) for name in included), path
        if layer == "math":
            assert not any(name.startswith(("cpu/", "cuda/", "python/")) for name in included), path
        if layer in ("cpu", "cuda"):
            other = "cuda/" if layer == "cpu" else "cpu/"
            assert not any(name.startswith((other, "python/")) for name in included), path
