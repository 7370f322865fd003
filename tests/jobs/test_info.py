"""The report of what is installed and which implementations would run."""

import shutil
import subprocess
import sys

import pytest
import torch

from dimr_fast import DiMR, _extension, info, optimize_for_inference
from dimr_fast.ops.implementations import OPERATORS, Implementations
from tests.support.package_copy import copy_package


def test_report_lists_versions_libraries_and_operators(capsys):
    info.main()
    text = capsys.readouterr().out
    for line in ("torch", torch.__version__, "triton", "xformers", "compiled libraries"):
        assert line in text
    for library in _extension.LIBRARIES:
        assert (_extension.why_not(library) or "loaded") in text
    if _extension.why_not("cpu") is None:
        assert f"uses {_extension.instruction_set()}\n" in text
    for operator in OPERATORS:
        assert f"\n  {operator} [" in text


@pytest.mark.skipif(
    _extension.why_not("cpu") is not None, reason=f"cpu library: {_extension.why_not('cpu')}"
)
def test_an_unknown_instruction_set_is_not_used():
    before = _extension.instruction_set()
    assert before in _extension.INSTRUCTION_SETS
    assert not _extension.use_instruction_set("AVX-1024")
    assert _extension.instruction_set() == before


def test_report_agrees_with_the_selection_on_the_example():
    text = info.report()
    for name, implementations in OPERATORS.items():
        x = torch.empty(implementations.example, dtype=torch.bfloat16)
        if torch.cuda.is_available():
            x = x.cuda()
        chosen = implementations.select("auto", x)
        rows = [line.split("]")[1] for line in text.splitlines() if line.startswith(f"  {name} [")]
        assert any(row.split()[0] == chosen and "bfloat16" in row for row in rows)


def test_report_explains_each_choice():
    probe = Implementations(
        "probe",
        never=lambda x: "no such device",
        slow=lambda x: None,
        half=lambda x: None if x.dtype == torch.float16 else "float16 only",
        slower={"slow": lambda x: "slower than plain torch"},
    )
    del OPERATORS["probe"]  # where every new operator registers itself
    lines = [line.strip() for line in info.report({"probe": probe}).splitlines()]
    assert "probe [2, 256, 64]  reference (float32, bfloat16)" in lines
    assert "probe [2, 256, 64]  half (float16)" in lines
    assert lines.count("not never: no such device") == 2
    assert lines.count("not slow: slower than plain torch") == 2
    assert lines.count("not half: float16 only") == 1
    assert lines.count("not reference: half comes first") == 1


REPORT_OF_INCOMPLETE_INSTALLATION = """
import sys
from pathlib import Path

# An editable installation would find the modules that the copy of the package lacks.
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]

import dimr_fast
from dimr_fast.checkpoint import demo_model
from dimr_fast.errors import CheckpointError
from dimr_fast.info import main

main()
try:
    demo_model()
except CheckpointError as error:
    print(error)
folder = Path(dimr_fast.__file__).parent / "pretrained" / "demo"
folder.mkdir(parents=True)
(folder / "config.json").write_text("{}")
print("found", demo_model() == folder)
"""


def test_an_installation_without_libraries_and_demo_model_says_so(tmp_path):
    reasons = {name: f"no {name} compiler" for name in _extension.LIBRARIES}
    environment = copy_package(tmp_path, not_built=reasons)
    shutil.rmtree(tmp_path / "dimr_fast" / "pretrained")
    command = [sys.executable, "-c", REPORT_OF_INCOMPLETE_INSTALLATION]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nothing compiled" in done.stdout
    assert "no: not built: no cuda compiler" in done.stdout
    assert "depthwise_conv2d" in done.stdout
    assert "this installation has no demo model" in done.stdout
    assert done.stdout.endswith("found True\n")
    assert done.stderr == ""


def test_a_network_is_described_by_what_computes_it() -> None:
    model = DiMR.from_preset("tiny")
    if _extension.why_not("cpu") is None:
        described = info.describe_network(optimize_for_inference(model))
        assert described == f"compiled CPU library, {_extension.instruction_set()}"
    plain = optimize_for_inference(model.set_implementation("reference"))
    assert info.describe_network(plain) == "reference"


def test_a_network_of_several_implementations_names_the_operators_of_each() -> None:
    """As on a GPU, where the compiled CPU library computes no branch at once."""
    network = optimize_for_inference(DiMR.from_preset("tiny"))
    network.uses_cpu_library = False
    operators = {
        "b": Implementations("probe", fast=lambda x: None),
        "a": Implementations("probe", fast=lambda x: None),
        "c": Implementations("probe", fast=lambda x: "no such device"),
    }
    del OPERATORS["probe"]
    described = info.describe_network(network, operators)
    assert described == "fast: a, b; reference: c"
