"""Rules for the tests themselves."""

import ast
from collections import Counter
from pathlib import Path

import pytest

from tests.support.paths import ROOT

TESTS = ROOT / "tests"
FILES = sorted(TESTS.rglob("*.py"))
LOADER = "_extension"
"""The module that loads the compiled libraries. Its functions have no other public name."""
PATCHING = (".setattr", ".delattr", "patch", "patch.object")
"""The ends of the names of functions that replace an attribute: pytest's and unittest.mock's."""
OF_TORCH = {"_overloadname", "_is_zerotensor"}
"""Private attributes of torch's objects that have no public counterpart."""


OURS = ("dimr_fast", "benchmarks")


def our_names(tree: ast.AST) -> set[str]:
    """Return the names that a file gives to our modules and to what it imports from them."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            if ast.unparse(node).split()[1].startswith(OURS):
                found |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Assign):
            value = ast.unparse(node.value)
            if "import_module(" in value and any(name in value for name in OURS):
                found |= set(map(ast.unparse, node.targets))
    return found


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_no_two_test_files_have_one_name() -> None:
    """pytest imports test files by their bare names."""
    names = Counter(path.name for path in TESTS.rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_private_names_are_not_used(path: Path) -> None:
    """Attributes of `self`, and of torch's modules, are no names of ours."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith(OURS):
            names = {*str(node.module).split("."), *(alias.name for alias in node.names)}
            assert set(filter(is_private, names)) <= {LOADER}, ast.unparse(node)
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            root = ast.unparse(node).split(".")[0]
            assert root in ("self", "torch") or node.attr in OF_TORCH, ast.unparse(node)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_our_modules_are_not_patched(path: Path) -> None:
    """Objects and settings are injected instead: see the parameters of the jobs."""
    tree = ast.parse(path.read_text())
    ours = our_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(PATCHING):
            target = ast.unparse(node.args[0])
            assert target.split(".")[0] not in ours, ast.unparse(node)
            assert not target.strip("'\"").startswith(OURS), ast.unparse(node)
        if isinstance(node, ast.Assign):
            for place in map(ast.unparse, node.targets):
                assert "." not in place or place.split(".")[0] not in ours, ast.unparse(node)
