import subprocess
import sys

import pytest
import torch

from dimr_fast import _extension, info
from dimr_fast.ops.implementations import OPERATORS, Implementations


def test_report_tells_versions_libraries_and_operators(capsys):
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
def test_instructions_that_the_processor_lacks_are_not_used():
    before = _extension.instruction_set()
    assert before in _extension.INSTRUCTION_SETS
    assert not _extension.use_instruction_set("AVX-1024")
    assert _extension.instruction_set() == before


def test_report_agrees_with_the_choice_at_its_example():
    text = info.report()
    for name, implementations in OPERATORS.items():
        x = torch.empty(implementations.example, dtype=torch.bfloat16)
        if torch.cuda.is_available():
            x = x.cuda()
        chosen = implementations.select("auto", x)
        rows = [line.split("]")[1] for line in text.splitlines() if line.startswith(f"  {name} [")]
        assert any(row.split()[0] == chosen and "bfloat16" in row for row in rows)


def test_report_explains_each_choice(monkeypatch):
    monkeypatch.setattr(info, "OPERATORS", {})
    monkeypatch.setattr("dimr_fast.ops.implementations.OPERATORS", {})
    info.OPERATORS["probe"] = Implementations(
        "probe",
        never=lambda x: "no such device",
        slow=lambda x: None,
        half=lambda x: None if x.dtype == torch.float16 else "float16 only",
        slower={"slow": lambda x: "slower than plain torch"},
    )
    lines = [line.strip() for line in info.report().splitlines()]
    assert "probe [2, 256, 64]  reference (float32, bfloat16)" in lines
    assert "probe [2, 256, 64]  half (float16)" in lines
    assert lines.count("not never: no such device") == 2
    assert lines.count("not slow: slower than plain torch") == 2
    assert lines.count("not half: float16 only") == 1
    assert lines.count("not reference: half comes first") == 1


def test_report_where_nothing_was_compiled(monkeypatch):
    monkeypatch.setattr(_extension, "why_not", lambda library: f"not built: no {library} compiler")
    monkeypatch.setattr(_extension, "build_facts", dict)
    text = info.report()
    assert "nothing compiled" in text
    assert "no: not built: no cuda compiler" in text


def test_runs_as_a_module():
    command = [sys.executable, "-m", "dimr_fast.info"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "depthwise_conv2d" in done.stdout
    assert done.stderr == ""
