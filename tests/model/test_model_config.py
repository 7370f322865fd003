"""Configurations of a model: published ones, presets, and errors that name a field."""

import copy
import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dimr_fast import PRESETS, BranchConfig, DiMR, DiMRConfig
from tests.support.golden import Golden


def test_a_published_configuration_is_read_and_left_alone() -> None:
    golden = Golden("two_branch_tdrms")
    golden.config.use_t2i = False
    before = copy.deepcopy(golden.config)
    model = DiMR(golden.config)
    assert golden.config == before
    assert isinstance(model.config, DiMRConfig)
    assert model.config.stage_configs[1].kernel_size == 7
    del golden.config.stage_configs[0].dim
    with pytest.raises(ValueError, match=r"stage_configs\[0\].*'dim'"):
        DiMR(golden.config)


def test_a_published_configuration_without_norm_type_means_ln() -> None:
    golden = Golden("two_branch_tdln")
    assert golden.config.norm_type == "LN"
    del golden.config.norm_type
    model = DiMR(golden.config)
    assert model.config.norm_type == "LN"
    model.load_state_dict(golden.under("param/"), strict=True)


@pytest.mark.parametrize(
    ("place", "field", "value"),
    [
        (None, "pe_type", "Axial_RoPE"),
        (None, "condition_dim", 16),
        (0, "condition_dim", 16),
        (None, "norm_type", "ADARMSN"),
        (1, "image_input_ratio", 2),
        (1, "block_type", "UNetBlock"),
    ],
)
def test_published_fields_of_another_model_are_refused(
    place: int | None, field: str, value: Any
) -> None:
    config = Golden("two_branch_tdrms").config
    setattr(config if place is None else config.stage_configs[place], field, value)
    with pytest.raises(ValueError, match=rf"{field}: got {value!r}, expected"):
        DiMR(config)


@pytest.mark.parametrize(
    ("place", "field"),
    [
        (None, "num_classes"),
        (None, "block_grad_to_lowres"),
        (0, "num_attention_heads"),
        (1, "kernel_size"),
        (0, "final_kernel_size"),
        (1, "dropout_prob"),
    ],
)
def test_published_fields_that_the_published_model_needs_are_needed(
    place: int | None, field: str
) -> None:
    config = Golden("two_branch_tdrms").config
    delattr(config if place is None else config.stage_configs[place], field)
    with pytest.raises(ValueError, match=f"without '{field}', expected that field"):
        DiMR(config)


def test_a_configuration_that_the_published_model_was_built_from_is_read() -> None:
    """The published model writes these fields into every branch."""
    config = Golden("two_branch_rms").config
    expected = DiMRConfig.from_published(config)
    config.pe_type = "APE"
    for stage in config.stage_configs:
        stage.norm_type, stage.pe_type, stage.num_classes = "RMSN", "APE", config.num_classes
    assert DiMRConfig.from_published(config) == expected


def test_config_round_trip() -> None:
    for config in PRESETS.values():
        assert DiMRConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="not a DiMR configuration"):
        DiMRConfig.from_dict({"channels": 3})


def test_preset_overrides() -> None:
    model = DiMR.from_preset("tiny", num_classes=3, norm_type="LN")
    assert model.config.num_classes == 3
    assert model.config.null_class == 2
    assert model.state_dict()["stages.0.class_embeds.weight"].shape[0] == 3


def branch(**changes: Any) -> BranchConfig:
    return dataclasses.replace(PRESETS["tiny"].stage_configs[0], **changes)


def convnext(**changes: Any) -> BranchConfig:
    return dataclasses.replace(PRESETS["tiny"].stage_configs[1], **changes)


def test_fields_of_the_other_block_type_do_not_matter_and_numpy_sizes_are_ints() -> None:
    assert branch(kernel_size=None).kernel_size is None
    assert convnext(num_attention_heads=None).num_attention_heads is None
    wide = branch(dim=np.int64(48))
    assert type(wide.dim) is int
    assert wide.dim == 48


BAD_CONFIGURATIONS = [
    (lambda: DiMR.from_preset("DiMR-XXL"), "preset: got 'DiMR-XXL'.*DiMR-XL/2R"),
    (lambda: DiMR.from_preset("tiny", width=3), "overrides: got 'width'"),
    (lambda: DiMR.from_preset("tiny", norm_type="BN"), "norm_type: got 'BN'.*TDRMSN"),
    (lambda: DiMR.from_preset("tiny", channels=0), "channels: got 0"),
    (lambda: branch(num_attention_heads=5), "num_attention_heads: got 5.*dim = 24"),
    (lambda: branch(block_type="MLP"), "block_type: got 'MLP'"),
    (lambda: convnext(kernel_size=4), "kernel_size: got 4.*odd"),
    (lambda: branch(dropout_prob=None), "dropout_prob: got None"),
    (lambda: branch(num_blocks=True), "num_blocks: got True"),
    (lambda: DiMR.from_preset("tiny", stage_configs=None), "stage_configs: got None"),
    (lambda: branch(dropout_prob=1.0), "dropout_prob: got 1.0"),
    (lambda: branch(image_input_ratio=2), "image_input_ratio: got 2"),
    (lambda: branch(dim=2.5), "dim: got 2.5"),
    (
        lambda: DiMR.from_preset("tiny", stage_configs=(branch(), branch(max_height=6))),
        r"input_feature_ratio.*\(24, 16\)",
    ),
    (
        lambda: DiMR.from_preset(
            "tiny",
            stage_configs=(
                branch(max_height=4, max_width=4, input_feature_ratio=6),
                branch(max_height=6, max_width=6, input_feature_ratio=4),
            ),
        ),
        r"stage_configs\[1\].max_height, max_width: got \(6, 6\)",
    ),
]


@pytest.mark.parametrize(("build", "message"), BAD_CONFIGURATIONS)
def test_bad_configurations_name_the_field(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_published_script_style_namespace() -> None:
    """A configuration only needs attributes."""
    stage = {"num_blocks": 1, "max_height": 4, "max_width": 4, "input_feature_ratio": 2}
    config = SimpleNamespace(
        channels=2,
        num_classes=5,
        norm_type="RMSN",
        block_grad_to_lowres=False,
        stage_configs=[
            SimpleNamespace(
                block_type="TransformerBlock",
                dim=8,
                hidden_dim=16,
                num_attention_heads=2,
                image_input_ratio=1,
                final_kernel_size=3,
                dropout_prob=0,
                **stage,
            )
        ],
    )
    outputs = DiMR(config)(torch.zeros(1, 2, 8, 8), log_snr=torch.zeros(1), y=torch.tensor([4]))
    assert [tuple(o.shape) for o in outputs] == [(1, 2, 4, 4)]


@pytest.mark.parametrize("mode", ["all", 2, None])
def test_an_unknown_checkpointing_is_refused(mode: Any) -> None:
    with pytest.raises(ValueError, match=r"checkpointing: got .*, expected True, False or 'sel"):
        dataclasses.replace(PRESETS["tiny"].stage_configs[0], checkpointing=mode)
