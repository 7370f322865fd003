"""Test of the counted kernel launches."""

import json

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks.model import launches
from dimr_fast import PRESETS


def test_launches_of_a_forward_pass() -> None:
    """The committed count is current, and each operator is launched as often as expected."""
    found = launches.report()
    assert found["presets"] == json.loads(launches.RESULT.read_text())["presets"]
    for preset, counts in found["presets"].items():
        blocks = sum(2 * (b.num_blocks // 2) + 1 for b in PRESETS[preset].stage_configs)
        ours = counts["triton"]
        assert ours["td_rms_norm"] == sum(
            (2 if b.block_type == "TransformerBlock" else 1) * (2 * (b.num_blocks // 2) + 1)
            for b in PRESETS[preset].stage_configs
        )
        assert ours["gated_gelu"] == blocks
        assert ours["depthwise_conv2d_fwd"] == sum(
            2 * (b.num_blocks // 2) + 1
            for b in PRESETS[preset].stage_configs
            if b.block_type == "ConvNeXtBlock"
        )
        assert ours["td_parameters"] == 1
        assert sum(ours.values()) < counts["published"] / 2
