"""Test of the bytes that a forward pass saves for its backward pass."""

import dataclasses

from benchmarks.model.memory import bytes_per_image, saved_bytes
from dimr_fast import PRESETS, DiMR


def test_saved_bytes_grow_linearly_and_checkpointing_reduces_them() -> None:
    config = PRESETS["tiny"]
    model = DiMR(config)
    per_image = bytes_per_image(model)
    assert saved_bytes(model, 5) - saved_bytes(model, 3) == 2 * per_image
    branches = tuple(dataclasses.replace(b, checkpointing=True) for b in config.stage_configs)
    again = DiMR(dataclasses.replace(config, stage_configs=branches))
    assert 0 < bytes_per_image(again) < per_image / 2
