"""Test of the bytes that a forward pass saves for its backward pass."""

import dataclasses

from benchmarks.model.memory import bytes_per_image, saved_bytes
from dimr_fast import PRESETS, DiMR


def test_every_image_costs_the_same_and_less_when_blocks_are_computed_again() -> None:
    config = PRESETS["tiny"]
    model = DiMR(config)
    per_image = bytes_per_image(model)
    assert saved_bytes(model, 5) - saved_bytes(model, 3) == 2 * per_image
    branches = tuple(dataclasses.replace(b, checkpointing=True) for b in config.stage_configs)
    again = DiMR(dataclasses.replace(config, stage_configs=branches))
    assert 0 < bytes_per_image(again) < per_image / 2
