"""The import order of the package, read from its sources; docs/design.md gives the reasons."""

import ast
import tomllib
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PACKAGE = ROOT / "dimr_fast"

FLOORS = (
    {"errors", "reference"},
    {"utils"},
    {"_extension"},
    {"diffusion", "config", "optim", "ops"},
    {"layers", "hub", "data"},
    {"model"},
    {"inference", "checkpoint"},
    {"__init__"},
    {"sampling.sampler", "sampling.writers"},
    {
        "evaluation.features",
        "evaluation.frechet",
        "evaluation.image_sets",
        "evaluation.metrics",
        "evaluation.real_images",
        "evaluation.statistics",
    },
    {
        "training.averages",
        "training.config",
        "training.initial",
        "training.log",
        "training.loop",
        "training.objective",
        "training.parallel",
        "training.previews",
        "training.state",
        "training.teacher",
        "training.throughput",
    },
    {
        "convert",
        "diffusers",
        "evaluation.job",
        "export",
        "extraction",
        "info",
        "sampling.job",
        "training.distillation",
        "training.run",
    },
    {"sampling", "evaluation", "training", "train_config"},
    {"demo", "web"},
    {"cli"},
    {"__main__", "training.__main__"},
)
"""From low to high: a module imports modules of lower floors, and those of its own package that are
on its own floor. No floor lets a job import another job. A package stands for all its modules that
no other entry names; `sampling`, `evaluation` and `training` alone are their `__init__`, which
re-exports."""


def modules() -> dict[str, Path]:
    """Return the modules by dotted name without "dimr_fast."; a package by its own name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] == "kernels":
            continue
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        found[name] = path
    return found


MODULES = modules()


def imported_names(path: Path) -> list[tuple[str, bool]]:
    """Return the absolute names that a file imports, and whether at its own import.

    Imports under TYPE_CHECKING and in functions happen later or never.
    """
    tree = ast.parse(path.read_text())
    later = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.FunctionDef)
        or (isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING")
        for node in ast.walk(block)
    }
    found: list[tuple[str, bool]] = []
    for node in ast.walk(tree):
        at_import = id(node) not in later
        if isinstance(node, ast.Import):
            found += [(alias.name, at_import) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                assert PACKAGE not in path.parents, f"{path}: relative import"
                continue
            # A name may be a module of its own: `from dimr_fast import ops`.
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                own = whole.removeprefix("dimr_fast.")
                found.append((whole if own in MODULES else str(node.module), at_import))
    return found


def floor(module: str) -> int:
    """Return the floor of a module: that of its own entry, else of its package."""
    for name in (module, module.split(".")[0]):
        for number, entries in enumerate(FLOORS):
            if name in entries:
                return number
    raise AssertionError(f"{module} is on no floor")


def own_imports(path: Path, at_import_only: bool) -> set[str]:
    """Return the modules of dimr_fast that a file imports."""
    return {
        name.removeprefix("dimr_fast.")
        for name, at_import in imported_names(path)
        if name.startswith("dimr_fast.") and (at_import or not at_import_only)
        if not name.startswith("dimr_fast.kernels")
    }


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_lower_floors_only(module: str) -> None:
    package = module.split(".")[0]
    for other in own_imports(MODULES[module], at_import_only=False):
        same_package = other.split(".")[0] == package
        assert floor(other) < floor(module) or (same_package and floor(other) == floor(module)), (
            f"{module} imports {other}"
        )


def test_every_entry_of_the_floors_exists() -> None:
    packages = {module.split(".")[0] for module in MODULES}
    assert set().union(*FLOORS) <= set(MODULES) | packages
    assert sum(map(len, FLOORS)) == len(set().union(*FLOORS))


def test_no_imports_form_a_circle() -> None:
    graph = {m: own_imports(path, at_import_only=False) - {m} for m, path in MODULES.items()}
    finished: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module not in finished:
            for other in sorted(graph.get(module, ())):
                visit(other, (*trail, module))
            finished.add(module)

    for module in graph:
        visit(module, ())


def test_the_root_has_few_rooms() -> None:
    """A newcomer can read the list at one glance."""
    rooms = {module.split(".")[0] for module in MODULES} - {"__init__", "__main__"}
    assert len(rooms) <= 26, sorted(rooms)


def test_the_wheel_lists_every_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in PACKAGE.rglob("__init__.py")
        if "kernels" not in path.parts
    }
    assert set(settings["packages"]) == folders | {"dimr_fast.kernels"}


@pytest.mark.parametrize("module", MODULES)
def test_heavy_and_optional_packages_are_imported_where_they_are_used(module: str) -> None:
    optional = {
        "triton",
        "flash_attn",
        "xformers",
        "matplotlib",
        "scipy",
        "efficientnet_lite_pytorch",
        "accelerate",
        "tensorboard",
        "diffusers",
        "gradio",
        "pandas",
        "tyro",
    }
    if module.startswith("diffusers"):
        optional -= {"diffusers"}  # its classes are subclasses
    found = imported_names(MODULES[module])
    assert not {name.split(".")[0] for name, at_import in found if at_import} & optional
    if not module.startswith("ops."):
        assert not any(name.startswith("dimr_fast.kernels") for name, _ in found)


@pytest.mark.parametrize("module", ["cli", "errors", "__init__", "__main__"])
def test_the_help_needs_no_torch(module: str) -> None:
    """`dimr-fast --help` answers at once."""
    names = {name.split(".")[0] for name, now in imported_names(MODULES[module]) if now}
    assert "torch" not in names
    below = own_imports(MODULES[module], at_import_only=True)
    assert below <= {"cli", "errors"}


SHARED_BY_KERNELS = {
    "dimr_fast.kernels.attention_backward",
    "dimr_fast.kernels.attention_tiles",
    "dimr_fast.kernels.configuration",
    "dimr_fast.kernels.fp8",
    "dimr_fast.kernels.rows",
    "dimr_fast.kernels.td_layer_norm_pieces",
}
"""What a kernel's file may import from another; never another operator."""
CONFIGURATION = {"configuration.py": {"contextlib", "functools", "json", "pathlib"}}


def test_reference_and_kernels_stand_alone() -> None:
    names = {name.split(".")[0] for name, _ in imported_names(MODULES["reference"])}
    assert names <= {"torch", "math", "collections", "typing"}
    for path in (ROOT / "kernels").glob("*.py"):
        found = {name for name, _ in imported_names(path)}
        names = {name.split(".")[0] for name in found} - {"dimr_fast"}
        allowed = {"torch", "triton", "math", "typing", "dataclasses", "collections"}
        assert names <= allowed | CONFIGURATION.get(path.name, set()), path
        assert {name for name in found if name.startswith("dimr_fast")} <= SHARED_BY_KERNELS, path


def test_neither_package_nor_kernels_import_tests_or_benchmarks() -> None:
    """The root is on the path of pytest, so that these would be found."""
    for folder in ("dimr_fast", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            names = {name.split(".")[0] for name, _ in imported_names(path)}
            assert not names & {"tests", "benchmarks"}, path


def test_nobody_imports_the_kernels_folder_by_its_bare_name() -> None:
    """`kernels` on the package index is another project."""
    for folder in ("dimr_fast", "tests", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            names = {name.split(".")[0] for name, _ in imported_names(path)}
            assert "kernels" not in names, path
