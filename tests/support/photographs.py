"""Photographs that an installed package contains."""

import importlib.util
import shutil
from pathlib import Path

import pytest


def photographs() -> list[Path]:
    """Return the paths of the 20 ImageNet photographs in the foolbox package."""
    spec = importlib.util.find_spec("foolbox")
    if spec is None or spec.origin is None:
        pytest.skip("needs the photographs in the foolbox package (extra: test)")
    found = sorted((Path(spec.origin).parent / "data").glob("imagenet_*.jpg"))
    assert len(found) == 20
    return found


def copy_photographs(folder: Path, classes: dict[str, int]) -> None:
    """Copy photographs into a folder of classes; `classes`: how many each class gets."""
    files = iter(photographs())
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for _ in range(count):
            shutil.copy(next(files), folder / name)
