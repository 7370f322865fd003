"""Test of the bytes that a forward pass saves for its backward pass."""

import dataclasses

import pytest

from benchmarks.model.memory import bytes_per_image, saved_bytes, with_checkpointing
from dimr_fast import PRESETS, DiMR
from tests.support.cpu_library import needs_cpu


def test_saved_bytes_grow_linearly_and_checkpointing_reduces_them() -> None:
    config = PRESETS["tiny"]
    model = DiMR(config)
    per_image = bytes_per_image(model)
    assert saved_bytes(model, 5) - saved_bytes(model, 3) == 2 * per_image
    again, selective = (
        bytes_per_image(DiMR(with_checkpointing(config, mode))) for mode in (True, "selective")
    )
    assert 0 < again < per_image / 2 < selective < per_image


@needs_cpu
@pytest.mark.parametrize(
    ("mode", "transformer", "convolutions"), [(False, 10, 6), ("selective", 9, 5)]
)
def test_what_a_block_keeps_for_each_number_of_its_input(
    mode: bool | str, transformer: int, convolutions: int
) -> None:
    """The input, 3 for query, key and value, 4 hidden ones, and what lies between them.

    Measured as the difference between a deeper model and a less deep one.
    """
    tiny = PRESETS["tiny"]
    for index, expected in ((0, transformer), (2, convolutions)):
        branch = dataclasses.replace(tiny.stage_configs[index], num_blocks=1, dim=32, hidden_dim=64)
        branch = dataclasses.replace(branch, input_feature_ratio=1, max_height=8, max_width=8)
        sizes = []
        for blocks in (1, 3):
            config = dataclasses.replace(
                tiny, stage_configs=(dataclasses.replace(branch, num_blocks=blocks),)
            )
            sizes.append(bytes_per_image(DiMR(with_checkpointing(config, mode))))
        tokens = 64 + (index == 0)
        # Two more blocks, and the output of the skip layer between them.
        extra = (sizes[1] - sizes[0]) / (2 * 32 * tokens)
        statistics = 4 * 4 / (2 * 32)  # four numbers in fp32 for each token
        assert 2 * expected <= extra <= 2 * expected + 2 + statistics
