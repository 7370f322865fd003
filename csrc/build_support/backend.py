"""setuptools' build backend, except that torch is a build requirement only where it is absent.

A fixed requirement would make pip fetch a second torch, of gigabytes, into its isolated build
environment for headers that the target environment already has.
"""

from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

from build_support.toolchain import OLDEST_TORCH, find_torch, why_no_compiler


def _torch_if_needed() -> list[str]:
    if find_torch() or why_no_compiler():
        return []
    return ["torch>={}.{}".format(*OLDEST_TORCH)]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch_if_needed()


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + _torch_if_needed()
