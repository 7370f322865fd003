"""Tests of the import rules of `benchmarks`, read from its sources."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.utils.files import BENCHMARKS, ROOT

ALLOWED = {
    "utils": set(),
    "ops": {"utils"},
    "model": {"utils", "ops"},
    "gpu": {"utils", "ops", "model"},
    "ablation": {"utils", "model"},
    "training": {"utils", "model"},
    "report": {"utils", "ablation"},
    "conftest": set(),
    "__init__": set(),
}
"""For each package of `benchmarks`, the other packages that it may import."""
SOURCES = sorted(BENCHMARKS.rglob("*.py"))
STANDARD_LIBRARY_ONLY = ("benchmarks.gpu.run", "benchmarks.gpu.section_run", "benchmarks.utils")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def package_of(module: str) -> str:
    return module.split(".")[1]


def imported(path: Path) -> set[str]:
    """Return the modules of `benchmarks` that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(str(node.module))
            # `from package import module`
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    modules = {module_name(source) for source in SOURCES}
    return {name for name in found if name in modules}


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_a_package_imports_only_those_below_it(path: Path) -> None:
    own = package_of(module_name(path))
    assert {package_of(name) for name in imported(path)} - {own} <= ALLOWED[own]


def test_no_import_is_circular() -> None:
    graph = {module_name(path): imported(path) for path in SOURCES}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(SOURCES)


def test_the_package_imports_no_benchmarks() -> None:
    for path in [*ROOT.glob("dimr_fast/**/*.py"), *ROOT.glob("kernels/*.py")]:
        assert not imported(path), path


def test_no_module_names_differ_by_an_ending() -> None:
    for folder in {path.parent for path in SOURCES}:
        names = [path.stem for path in folder.glob("*.py")]
        for name in names:
            similar = [n for n in names if n.startswith(name) and 0 < len(n) - len(name) <= 3]
            assert not similar, folder / name


@pytest.mark.parametrize("name", STANDARD_LIBRARY_ONLY)
def test_the_gpu_report_survives_a_torch_that_does_not_import(name: str) -> None:
    code = f"import sys; sys.modules['torch'] = None; import {name}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
