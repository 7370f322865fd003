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


def test_sizes_take_the_smallest_bucket_that_holds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"k": {256: {"ROWS": 8}, 1024: {"ROWS": 2}}}
    monkeypatch.setattr(configuration, "_table", lambda gpu: table)
    sizes = {1: 8, 256: 8, 257: 2, 1024: 2, 10**6: 2}
    assert {s: configuration.configuration("k", s, CPU)["ROWS"] for s in sizes} == sizes


def test_a_gpus_file_comes_before_the_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, size, rows in (("default", 64, 1), ("Fast_GPU_80", 16, 2)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"k": {str(size): {"ROWS": rows}}}))
    monkeypatch.setattr(configuration, "FOLDER", tmp_path)
    configuration._table.cache_clear()
    try:
        for gpu, rows in (("Fast GPU/80", 2), ("another", 1)):
            monkeypatch.setattr(configuration, "gpu_name", lambda device, gpu=gpu: gpu)
            assert configuration.configuration("k", 8, CPU)["ROWS"] == rows
            assert configuration.configuration("k", 32, CPU)["ROWS"] == 1
            assert configuration.configuration("k", 128, CPU)["ROWS"] == 1
    finally:
        configuration._table.cache_clear()


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
