"""Rules for the tests themselves."""

import ast
from collections import Counter
from pathlib import Path

import pytest

from tests.support.paths import ROOT

TESTS = ROOT / "tests"
FOLDERS = ("data", "diffusion", "hub", "installation", "jobs", "support", "utils")
FILES = [path for folder in FOLDERS for path in sorted((TESTS / folder).glob("*.py"))]
LOADER = "_extension"
"""The module that loads the compiled libraries. Its functions have no other public name."""


def test_no_two_test_files_have_one_name() -> None:
    """pytest imports test files by their bare names."""
    names = Counter(path.name for path in TESTS.rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_private_names_are_not_imported(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("dimr_fast"):
            names = {*str(node.module).split("."), *(alias.name for alias in node.names)}
            assert {name for name in names if name.startswith("_")} <= {LOADER}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_our_modules_are_not_patched(path: Path) -> None:
    """Objects and settings are injected instead: see the parameters of the jobs."""
    tree = ast.parse(path.read_text())
    ours = {
        alias.asname or alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if ast.unparse(node).split()[1].startswith("dimr_fast")
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".setattr"):
            target = ast.unparse(node.args[0])
            assert target.split(".")[0] not in ours, ast.unparse(node)
            assert not target.strip("'\"").startswith("dimr_fast"), ast.unparse(node)
