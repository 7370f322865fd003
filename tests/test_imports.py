"""Who may import whom: the rooms of the house, read from the sources themselves."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dimr_fast"

LEAVES = {"files", "seeds"}
"""Modules that import nothing of ours and that every job may use."""
TRAINING = {"training", "train_config", "train_loop", "train_log", "train_samples", "train_state"}
JOBS = {*TRAINING, "sampling", "evaluation", "demo"}

ALLOWED = {
    "config": set(),
    "reference": set(),
    "_extension": set(),
    "files": set(),
    "seeds": set(),
    "device": set(),
    "ops": {"reference", "_extension", "ops"},
    "layers": {"ops", "config"},
    "card": {"config"},
    "hub": {"card", "config", "files"},
    "model": {"hub", "layers", "ops", "config"},
    "inference": {"model", "layers", "ops"},
    "diffusion": {"diffusion"},
    "data": {"data", "device", "files", "seeds"},
    "processes": {"data", "device"},
    "optim": set(),
    "checkpoint": {"hub", "model", "config", "data", "files"},
    "pictures": {"data", "files"},
    "metrics": set(),
    "features": {"data"},
    "summaries": {"data", "features", "metrics"},
    "references": {"data", "features", "files", "metrics", "summaries"},
    "image_files": {"files"},
    "sampler": {
        "autoencoder",
        "checkpoint",
        "config",
        "data",
        "device",
        "diffusion",
        "inference",
        "seeds",
    },
    "autoencoder": {"data"},
    "extraction": {"autoencoder", "config", "data", "device", "processes"} | LEAVES,
    **{
        job: {
            "model",
            "inference",
            "config",
            "optim",
            "diffusion",
            "data",
            "checkpoint",
            "pictures",
            "image_files",
            "sampler",
            "autoencoder",
            "device",
            "processes",
            "metrics",
            "features",
            "summaries",
            "references",
        }
        | LEAVES
        | JOBS
        for job in JOBS
    },
    "convert": {"checkpoint", "config", "data", "files", "hub", "model"},
    "export": {"checkpoint", "config"},
    "info": {"ops", "_extension", "dimr_fast"},
    "cli": {"info", "checkpoint", "convert", "data", "export", "extraction", *JOBS},
    "__main__": {"cli"},
    "__init__": {"config", "inference", "model"},
}
"""Room by room, the rooms it may import from."""
# `python -m dimr_fast.training`, as launchers start it, is `dimr-fast train`.
ALLOWED["training"] |= {"cli"}


def imports(path: Path) -> list[tuple[str, bool]]:
    """The absolute names a file imports, and whether it does so when it is itself imported."""
    tree = ast.parse(path.read_text())
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
    }
    package = (
        ("dimr_fast", *path.relative_to(PACKAGE).parent.parts) if PACKAGE in path.parents else ()
    )
    found: list[tuple[str, bool]] = []
    for node in ast.walk(tree):
        top = id(node) not in inside
        if isinstance(node, ast.Import):
            found += [(alias.name, top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == "dimr_fast":
                found += [(f"dimr_fast.{alias.name}", top) for alias in node.names]
            else:
                found.append((module, top))
    return found


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


SHARED_BY_KERNELS = {
    "dimr_fast.kernels.attention_backward",
    "dimr_fast.kernels.attention_tiles",
    "dimr_fast.kernels.configuration",
    "dimr_fast.kernels.rows",
    "dimr_fast.kernels.td_layer_norm_pieces",
}
"""What a kernel's file may import from another; never another operator."""
CONFIGURATION = {"configuration.py": {"contextlib", "functools", "json", "pathlib"}}

SOURCES = sorted(PACKAGE.rglob("*.py"))


def test_every_room_is_known() -> None:
    assert {room(path) for path in SOURCES} == set(ALLOWED)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_stay_within_the_rules(path: Path) -> None:
    own = [name for name, _ in imports(path) if name.split(".")[0] == "dimr_fast"]
    rooms = {name.split(".")[1] if "." in name else "dimr_fast" for name in own}
    # A name of the package itself, such as its version.
    rooms = {"dimr_fast" if r == "__version__" else r for r in rooms}
    assert rooms - {room(path)} <= ALLOWED[room(path)], path


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_and_optional_packages_are_imported_where_they_are_used(path: Path) -> None:
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
    }
    top = {name.split(".")[0] for name, at_import in imports(path) if at_import}
    assert not top & optional, path
    assert "kernels" not in {name.split(".")[0] for name, _ in imports(path)}
    if room(path) != "ops":
        assert not any(name.startswith("dimr_fast.kernels") for name, _ in imports(path))


def test_reference_and_kernels_stand_alone() -> None:
    names = {name.split(".")[0] for name, _ in imports(PACKAGE / "reference.py")}
    assert names <= {"torch", "math", "collections", "typing"}
    for path in (ROOT / "kernels").glob("*.py"):
        names = {name.split(".")[0] for name, _ in imports(path)} - {"dimr_fast"}
        allowed = {"torch", "triton", "math", "typing", "dataclasses", "collections"}
        assert names <= allowed | CONFIGURATION.get(path.name, set()), path
        own = {name for name, _ in imports(path) if name.startswith("dimr_fast")}
        assert own <= SHARED_BY_KERNELS, path


def test_nobody_imports_the_kernels_folder_by_its_bare_name() -> None:
    """`kernels` on the package index is another project."""
    for folder in ("tests", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            assert "kernels" not in {name.split(".")[0] for name, _ in imports(path)}, path
