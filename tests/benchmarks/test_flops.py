"""Compare counted work with that of the published models and with arithmetic by hand."""

import dataclasses

import pytest

from benchmarks.model.flops import backward_flops, flops, work
from dimr_fast import PRESETS, DiMR

GFLOP = {"DiMR-XL/2R": (320, 646), "DiMR-G/2R": (662, 1333), "DiMR-XL/3R": (412, 829)}


@pytest.mark.parametrize("preset", GFLOP)
def test_counts_equal_published_figures(preset: str) -> None:
    forward, backward = GFLOP[preset]
    assert flops(PRESETS[preset]) / 1e9 == pytest.approx(forward, rel=0.02)
    assert backward_flops(PRESETS[preset]) / 1e9 == pytest.approx(backward, rel=0.02)


def test_two_more_blocks_add_the_flop_computed_by_hand() -> None:
    config = PRESETS["tiny"]
    low, *others = config.stage_configs
    deeper = dataclasses.replace(low, num_blocks=low.num_blocks + 2)
    more = dataclasses.replace(config, stage_configs=(deeper, *others))
    n, d, hidden = low.max_height * low.max_width, low.dim, low.hidden_dim
    q = others[0].max_height // low.max_height
    products = (n + 1) * (4 * d * d + 3 * d * hidden) + 2 * (n + 1) ** 2 * d
    cascade = n * 2 * d * others[0].dim * q**2
    assert flops(more) - flops(config) == 2 * (2 * products + (n + 1) * 2 * d * d + cascade)


def test_traffic_grows_with_images_and_weights_count_once() -> None:
    found = work(PRESETS["tiny"])
    model = DiMR.from_preset("tiny")
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.bytes(1, 2) == 2 * (found.elements + found.parameters)
    assert found.bytes(4, 2) == 2 * found.elements + found.parameters / 2
