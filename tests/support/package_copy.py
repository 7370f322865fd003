"""A copy of the package's Python files, to run it with other compiled libraries or with none."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from tests.support.paths import ROOT


def copy_package(
    folder: Path, *, libraries: Path | None = None, not_built: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Copy the package to `folder`; return an environment in which `import dimr_fast` finds it.

    Run with `cwd=folder`. `libraries`: a folder whose compiled libraries the copy gets, instead of
    those of this installation. `not_built`: the reason for each library that was not built.
    """
    package = folder / "dimr_fast"
    skip = shutil.ignore_patterns("*.so", "__pycache__", "*_built.json", "kernels")
    shutil.copytree(ROOT / "dimr_fast", package, ignore=skip)
    shutil.copytree(ROOT / "kernels", package / "kernels", ignore=skip)
    if libraries is not None:
        for library in libraries.glob("libdimr_fast_*.so"):
            shutil.copy(library, package)
    if not_built is not None:
        (package / "_not_built.json").write_text(json.dumps(not_built))
    # The tests come from the repository; the copy in `cwd` comes before it for `python -m`.
    return {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
