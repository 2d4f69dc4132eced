"""Imports: docs/architecture.md draws those between the packages, and test
modules share builders instead of importing each other."""

from __future__ import annotations

import ast
import re

import grimp
from conftest import ROOT

PACKAGE = "dagster_project"


def test_the_drawing_has_exactly_the_imports_between_packages() -> None:
    drawing = (ROOT / "docs/architecture.md").read_text().split("```mermaid")[1].split("```")[0]
    drawn = {
        tuple(part.replace("main", "__main__") for part in edge)
        for edge in re.findall(r"^ +(\w+) --> (\w+)$", drawing, re.MULTILINE)
    }
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    units = {module: module.split(".")[1] for module in graph.modules if "." in module}
    imported = {(units[a], units[b]) for a in units for b in graph.find_modules_directly_imported_by(a) if b in units}
    assert drawn == {(a, b) for a, b in imported if a != b and b != "core"}
    assert {b for a, b in imported if a == "core"} <= {"core"}


def test_the_parts_of_a_package_have_no_import_cycles() -> None:
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    for package in ("curation", "training", "evaluation", "orchestration", "lineage"):
        above: dict[str, set[str]] = {}
        for module in graph.find_descendants(f"{PACKAGE}.{package}"):
            part = module.split(".")[2]
            for other in graph.find_modules_directly_imported_by(module):
                if other.startswith(f"{PACKAGE}.{package}.") and other.split(".")[2] != part:
                    above.setdefault(part, set()).add(other.split(".")[2])
        remaining = set(above)
        while free := {part for part in remaining if not above[part] & remaining}:
            remaining -= free
        assert remaining == set(), f"{package}: these import each other in a circle"


def test_no_function_has_more_than_a_hundred_lines() -> None:
    long = {
        f"{path.relative_to(ROOT)}: {node.name}": node.end_lineno - node.lineno + 1
        for path in (ROOT / PACKAGE).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: lines for name, lines in long.items() if lines > 100} == {}


def test_no_module_of_the_tests_imports_a_test_module() -> None:
    imports = {
        path.name: re.findall(r"\b(?:from|import) +(?:tests\.)?test_\w+", path.read_text(encoding="utf-8"))
        for path in (ROOT / "tests").rglob("*.py")
    }
    assert not {name: found for name, found in imports.items() if found}, (
        "move what they share to tests/builders/ or tests/conftest.py"
    )
