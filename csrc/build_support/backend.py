"""setuptools' build backend, except that torch is a build requirement only where it is absent.

A fixed requirement would make pip fetch a second torch, of gigabytes, into its isolated build
environment for headers that the target environment already has.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

from build_support.toolchain import OLDEST_TORCH, find_torch, why_no_compiler


def torch_requirement(
    folders: list[Path] | None = None, environ: Mapping[str, str] = os.environ
) -> list[str]:
    """Return torch's requirement if there is a compiler but no torch in `folders`.

    `folders` None means the folders with packages of this environment.
    """
    if find_torch(folders) or why_no_compiler(environ):
        return []
    return ["torch>={}.{}".format(*OLDEST_TORCH)]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + torch_requirement()


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + torch_requirement()
