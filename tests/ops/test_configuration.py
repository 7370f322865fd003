"""Launch configurations: the files, and what is looked up in them."""

import json
import re
from pathlib import Path

import pytest
import torch

from dimr_fast.kernels import configuration
from tests.support.oracle import skip_module_without_triton
from tests.support.paths import ROOT

skip_module_without_triton()

CPU = torch.device("cpu")


def test_sizes_take_the_smallest_bucket_that_holds_them(tmp_path: Path) -> None:
    table = {"k": {"256": {"ROWS": 8}, "1024": {"ROWS": 2}}}
    (tmp_path / "default.json").write_text(json.dumps(table))
    sizes = {1: 8, 256: 8, 257: 2, 1024: 2, 10**6: 2}
    found = {s: configuration.look_up("k", s, "default", tmp_path)["ROWS"] for s in sizes}
    assert found == sizes


def test_a_gpus_file_comes_before_the_default(tmp_path: Path) -> None:
    for name, size, rows in (("default", 64, 1), ("Fast_GPU_80", 16, 2)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"k": {str(size): {"ROWS": rows}}}))
    for gpu, rows in (("Fast GPU/80", 2), ("another", 1)):
        assert configuration.look_up("k", 8, gpu, tmp_path)["ROWS"] == rows
        assert configuration.look_up("k", 32, gpu, tmp_path)["ROWS"] == 1
        assert configuration.look_up("k", 128, gpu, tmp_path)["ROWS"] == 1


@pytest.mark.parametrize("size", [8, 10**6])
def test_a_launch_takes_the_files_of_the_package(size: int) -> None:
    """The name of the GPU is that of the device, unless another is asked for."""
    found = configuration.configuration("sum_partials", size, CPU)
    assert found == configuration.look_up("sum_partials", size, "default")
    configuration.use_files_of("Fast GPU")
    try:
        assert configuration.gpu_name(CPU) == "Fast GPU"
        with configuration.trial("sum_partials", {"BLOCK": 3}, CPU):
            assert configuration.look_up("sum_partials", size, "Fast GPU") == {"BLOCK": 3}
            assert configuration.configuration("sum_partials", size, CPU) == {"BLOCK": 3}
            assert configuration.look_up("sum_partials", size, "default") == found
    finally:
        configuration.use_files_of(None)
    assert configuration.gpu_name(CPU) == "default"


def test_a_trial_ends() -> None:
    before = dict(configuration.configuration("sum_partials", 8, CPU))
    with configuration.trial("sum_partials", {"BLOCK": 3}, CPU):
        assert configuration.configuration("sum_partials", 8, CPU) == {"BLOCK": 3}
    assert configuration.configuration("sum_partials", 8, CPU) == before


def test_files_name_kernels_that_there_are() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    default = json.loads(configuration.path("default").read_text())
    assert set(re.findall(r'configuration\(\s*"(\w+)"', sources)) <= set(default)
    for file in configuration.FOLDER.glob("*.json"):
        table = json.loads(file.read_text())
        for kernel, by_size in table.items():
            assert f'"{kernel.removesuffix("_fp32")}"' in sources
            sizes = [int(size) for size in by_size]
            assert sizes == sorted(sizes)
            assert all("num_warps" in constants for constants in by_size.values())
