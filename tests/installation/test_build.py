"""The decisions of the build, and the content of a built package."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dimr_fast import _extension
from tests.support.paths import ROOT

_spec = importlib.util.spec_from_file_location(
    "toolchain", ROOT / "csrc/build_support/toolchain.py"
)
assert _spec is not None
toolchain = sys.modules["toolchain"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toolchain)

NVCC_12 = ("5.0", "7.5", "8.0", "8.6", "9.0")
NVCC_13 = ("7.5", "8.0", "8.6", "9.0", "10.0", "12.0")
CAPABLE = "compute_75\ncompute_80\ncompute_90\ncompute_100\n"


@pytest.fixture
def tools(tmp_path):
    """Return a function that creates programs which print the text given for each."""

    def make(**programs):
        for name, text in programs.items():
            program = tmp_path / name
            program.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
            program.chmod(0o755)
        return str(tmp_path)

    return make


@pytest.mark.parametrize(
    ("text", "supported", "chosen"),
    [
        ("all", NVCC_13, ("8.0", "9.0", "10.0+PTX")),
        ("all", NVCC_12, ("8.0", "9.0+PTX")),
        ("all", ("5.0", "7.5"), ("7.5+PTX",)),
        ("8.6", NVCC_13, ("8.6",)),
        ("8.0;9.0a, 10.0+PTX", NVCC_13, ("8.0", "9.0a", "10.0+PTX")),
    ],
)
def test_chosen_gpu_architectures(text, supported, chosen):
    assert toolchain.choose_architectures(text, supported) == chosen


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("9.x;foo", "'9.x', 'foo'"),
        ("90", "'90'"),
        ("8.0 9.0-PTX", "'9.0-PTX'"),
        (";", "nothing"),
        ("3.5;8.0", "does not support 3.5; it supports 7.5, "),
        ("13.0+PTX", "does not support 13.0"),
    ],
)
def test_bad_architectures_are_named(text, named):
    with pytest.raises(toolchain.BuildError, match="TORCH_CUDA_ARCH_LIST") as error:
        toolchain.choose_architectures(text, NVCC_13)
    assert repr(text) in str(error.value)
    assert named in str(error.value)


def test_architectures_for_cmake():
    assert toolchain.cmake_architectures(("8.0", "9.0a", "10.0+PTX")) == "80-real;90a-real;100"


def test_the_cuda_library_is_built_for_the_gpus_of_the_machine(tools):
    path = tools(**{"g++": "", "nvcc": CAPABLE, "nvidia-smi": "9.0\n8.0\n9.0"})
    plan = toolchain.plan_cuda({"PATH": path})
    assert plan == toolchain.CudaPlan(Path(path, "nvcc"), ("8.0", "9.0"))
    assert plan == toolchain.plan_cuda({"PATH": path, "DIMR_FAST_FORCE_CUDA": "1"})
    named = toolchain.plan_cuda({"PATH": path, "TORCH_CUDA_ARCH_LIST": "10.0"})
    assert named.architectures == ("10.0",)
    assert "SKIP_CUDA" in toolchain.plan_cuda({"PATH": path, "DIMR_FAST_SKIP_CUDA": "1"})
    elsewhere = toolchain.plan_cuda({"PATH": path, "CUDA_HOME": "/nowhere"})
    assert "CUDA_HOME is '/nowhere'" in elsewhere


@pytest.mark.parametrize(
    ("listed", "built"),
    [
        ("12.1", ("10.0+PTX",)),  # newer than this nvcc
        ("8.9\n9.0", ("8.0+PTX", "9.0")),
        ("5.2\n8.0", ("8.0",)),
    ],
)
def test_gpus_that_nvcc_does_not_know(tools, listed, built):
    path = tools(**{"g++": "", "nvcc": CAPABLE, "nvidia-smi": listed})
    assert toolchain.plan_cuda({"PATH": path}).architectures == built


def test_no_nvcc_serves_a_gpu_that_is_too_old(tools):
    path = tools(**{"g++": "", "nvcc": CAPABLE, "nvidia-smi": "5.2"})
    assert toolchain.plan_cuda({"PATH": path}) == (
        "this nvcc supports 7.5, 8.0, 9.0, 10.0, the GPUs here are 5.2"
    )


@pytest.mark.parametrize(
    "programs", [{}, {"nvidia-smi": "No devices were found"}, {"nvidia-smi": "[N/A]"}]
)
def test_without_a_gpu_the_cuda_library_is_built_on_request_only(tools, programs):
    path = tools(**{"g++": "", "nvcc": CAPABLE, **programs})
    reason = toolchain.plan_cuda({"PATH": path})
    assert "nvidia-smi is absent, fails or finds no GPU" in reason
    assert "TORCH_CUDA_ARCH_LIST=all" in reason
    every = ("8.0", "9.0", "10.0+PTX")
    for request, built in [
        ({"TORCH_CUDA_ARCH_LIST": "all"}, every),
        ({"DIMR_FAST_FORCE_CUDA": "1"}, every),
        ({"TORCH_CUDA_ARCH_LIST": "9.0"}, ("9.0",)),
        ({"TORCH_CUDA_ARCH_LIST": "9.0", "DIMR_FAST_FORCE_CUDA": "1"}, ("9.0",)),
    ]:
        assert toolchain.plan_cuda({"PATH": path, **request}).architectures == built


def test_cuda_plan_of_a_machine_without_nvcc(tools):
    environ = {"PATH": tools(**{"g++": "", "nvidia-smi": "9.0"})}
    assert toolchain.plan_cuda(environ) == "no nvcc: not on PATH and CUDA_HOME not set"
    with pytest.raises(toolchain.BuildError, match=r"FORCE_CUDA=1 but .* no nvcc"):
        toolchain.plan_cuda({**environ, "DIMR_FAST_FORCE_CUDA": "1"})
    with pytest.raises(toolchain.BuildError, match="'sm_90'"):
        toolchain.plan_cuda({**environ, "TORCH_CUDA_ARCH_LIST": "sm_90"})
    with pytest.raises(toolchain.BuildError, match="exclude each other"):
        toolchain.plan_cuda({"DIMR_FAST_FORCE_CUDA": "1", "DIMR_FAST_SKIP_CUDA": "1"})


def test_the_compiler_is_that_of_the_environment(tools):
    assert "none of c++, g++, clang++" in toolchain.why_no_compiler({"PATH": ""})
    path = tools(**{"clang++": ""})
    assert toolchain.why_no_compiler({"PATH": path}) is None
    named = toolchain.why_no_compiler({"PATH": path, "CXX": "/nonexistent -O1"})
    assert named == "no C++ compiler: CXX is '/nonexistent -O1', which is not there"


@pytest.mark.parametrize(
    ("version", "found"),
    [("2.10.1", False), ("2.11.0", True), ("2.13.0+cpu", True), ("10.0", True)],
)
def test_torch_is_found_by_its_folders(tmp_path, version, found):
    assert toolchain.find_torch([tmp_path]) is None
    (tmp_path / "torch/include/torch/csrc/stable").mkdir(parents=True)
    (tmp_path / "torch/version.py").write_text(f"__version__ = '{version}'\ndebug = False\n")
    torch_found = toolchain.find_torch([tmp_path / "nothing", tmp_path])
    assert torch_found == (toolchain.Torch(tmp_path / "torch", version) if found else None)


def test_the_build_requires_torch_only_where_there_is_none(tools, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "csrc")
    backend = importlib.import_module("build_support.backend")
    compiler = {"PATH": tools(**{"g++": ""})}
    no_compiler = {"PATH": "", "CXX": "/nonexistent"}
    assert backend.torch_requirement([tmp_path], compiler) == ["torch>=2.11"]
    assert backend.torch_requirement([tmp_path], no_compiler) == []
    assert backend.torch_requirement(None, compiler) == []
    # This environment has a torch.
    for requires in (backend.get_requires_for_build_editable, backend.get_requires_for_build_wheel):
        assert not any(name.startswith("torch") for name in requires())


def test_torch_of_this_environment_is_found():
    assert toolchain.find_torch() == toolchain.Torch(Path(torch.__file__).parent, torch.__version__)


def build(tmp_path, **environ):
    """Run setup.py's build into an empty folder; the process and the folder."""
    pytest.importorskip("setuptools")
    lib = tmp_path / "lib"
    command = ["setup.py", "build_ext", f"--build-lib={lib}", f"--build-temp={tmp_path}/temp"]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
    )
    return done, lib / "dimr_fast"


def test_build_without_a_compiler_is_pure_python_and_says_so(tmp_path):
    done, folder = build(tmp_path, CXX="/nonexistent", DIMR_FAST_FORCE_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert [file.name for file in folder.iterdir()] == ["_not_built.json"]
    reasons = json.loads((folder / "_not_built.json").read_text())
    assert reasons["cpu"] == "no C++ compiler: CXX is '/nonexistent', which is not there"
    for library in _extension.LIBRARIES:
        message = f"the {library} library is not built: {reasons[library]}"
        assert message in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"TORCH_CUDA_ARCH_LIST": "9.x;foo"}, "error: TORCH_CUDA_ARCH_LIST: got '9.x;foo'"),
        (
            {"CUDA_HOME": "/nowhere", "DIMR_FAST_FORCE_CUDA": "1"},
            "error: DIMR_FAST_FORCE_CUDA=1 but",
        ),
    ],
)
def test_bad_build_settings_stop_the_build(tmp_path, environ, message):
    done, folder = build(tmp_path, **{"DIMR_FAST_SKIP_CUDA": "0", **environ})
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not folder.exists()


def test_each_library_is_loaded_or_has_a_reason():
    with pytest.raises(ValueError, match="library: got 'tpu'"):
        _extension.why_not("tpu")
    for library in _extension.LIBRARIES:
        path = Path(_extension.__file__).parent / f"libdimr_fast_{library}.so"
        reason = _extension.why_not(library)
        assert (reason is None) == (str(path) in torch.ops.loaded_libraries)
        if not path.is_file():
            assert reason.startswith("not built: ")


def registered(operator, key):
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"dimr_fast::{operator}", key)


def test_cpu_library_registers_its_kernels():
    importlib.import_module("dimr_fast.ops")
    if _extension.why_not("cpu"):
        pytest.skip(f"cpu library: {_extension.why_not('cpu')}")
    assert registered("depthwise_conv2d_fwd", "CPU")


def test_cuda_library_loads_without_a_gpu_and_registers_its_kernels():
    importlib.import_module("dimr_fast.ops")
    if torch.version.cuda is None or not _extension.build_facts().get("cuda"):
        pytest.skip(f"cuda library: {_extension.why_not('cuda')}")
    assert _extension.why_not("cuda") is None
    assert registered("depthwise_conv2d_fwd", "CUDA")


def test_build_facts():
    facts = _extension.build_facts()
    if _extension.why_not("cpu") is None:
        assert facts["compiler"]
        assert facts["torch"]
        assert bool(facts["cuda"]) == bool(facts["cuda_architectures"])


@pytest.mark.parametrize(
    ("capability", "compiled", "runs"),
    [
        ((9, 0), "8.0 9.0 10.0+PTX", True),
        ((8, 6), "8.0 9.0", True),
        ((8, 0), "8.6", False),
        ((12, 0), "8.0 9.0 10.0+PTX", True),
        ((12, 0), "8.0 9.0 10.0", False),
        ((7, 5), "8.0 9.0 10.0+PTX", False),
        ((9, 0), "9.0a", True),
        ((10, 0), "9.0a+PTX", False),
        ((9, 0), "", False),
    ],
)
def test_which_gpus_compiled_code_runs_on(capability, compiled, runs):
    reason = _extension.why_not_architecture(capability, compiled)
    assert reason is None if runs else f"{capability[0]}.{capability[1]}" in reason


def test_kernels_are_mapped_into_the_package():
    kernels = importlib.import_module("dimr_fast.kernels")
    assert Path(kernels.__file__).name == "__init__.py"
