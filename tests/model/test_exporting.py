"""Exports of the reference: the code of docs/exporting.md, and batches of other sizes."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dimr_fast import DiMR
from tests.support.models import inputs_of, randomised
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow


def run_page(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the Python blocks of the page in `folder` with a model whose parameters all matter."""
    text = (ROOT / "docs/exporting.md").read_text()
    code = "".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    made = 'DiMR.from_preset("tiny")'
    assert made in code
    names: dict[str, Any] = {"randomised": randomised}
    monkeypatch.chdir(folder)
    exec(code.replace(made, f"randomised({made})"), names)
    return names


def test_exported_models_predict_what_the_model_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"needs the {package} package")
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the onnxruntime package")
    model = run_page(tmp_path, monkeypatch)["model"]
    assert isinstance(model, DiMR)
    program = torch.export.load(tmp_path / "dimr.pt2").module()
    session = onnxruntime.InferenceSession(tmp_path / "dimr.onnx")
    assert [i.name for i in session.get_inputs()] == ["x", "log_snr", "y"]
    for batch in (1, 2, 5):
        given = inputs_of(model, batch)
        with torch.no_grad():
            expected = model(**given)
            exported = program(**given)
        outputs = session.run(None, {name: value.numpy() for name, value in given.items()})
        assert len(outputs) == len(exported) == len(expected)
        for wanted, actual, output in zip(expected, exported, outputs, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(torch.from_numpy(output), wanted, rtol=1e-4, atol=1e-5)
