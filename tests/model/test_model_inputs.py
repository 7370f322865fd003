"""Arguments of a model that are of the right kind but out of range, or of another kind."""

from typing import Any

import pytest
import torch

from dimr_fast import DiMR, optimize_for_inference
from tests.support.models import inputs


@pytest.fixture(params=[lambda model: model, optimize_for_inference])
def model(request: pytest.FixtureRequest) -> Any:
    return request.param(DiMR.from_preset("tiny"))


@pytest.mark.parametrize("label", [-1, 7, 1007])
def test_labels_out_of_range_are_named(model: Any, label: int) -> None:
    y = torch.tensor([0, label])
    with pytest.raises(ValueError, match=rf"^y: got {label}, expected 0\.\.6$"):
        model(**(inputs() | {"y": y}))


@pytest.mark.parametrize("change", [{"x": 0.5}, {"y": 3}, {"y": [1, 2]}, {"log_snr": [1.0, 2.0]}])
def test_numbers_in_place_of_tensors_are_named(model: Any, change: dict[str, Any]) -> None:
    ((name, value),) = change.items()
    message = f"^{name}: got {type(value).__name__}, expected a tensor$"
    with pytest.raises(TypeError, match=message):
        model(**(inputs() | change))
