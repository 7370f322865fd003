"""Submodules and attributes that scripts of the published code use."""

import copy
import pickle

import pytest
import torch
from torch import nn

from dimr_fast import DiMR
from tests.support.golden import Golden
from tests.support.models import inputs, randomised


@pytest.fixture
def model() -> DiMR:
    return randomised(DiMR.from_preset("tiny"))


def test_children_have_the_published_indices(model: DiMR) -> None:
    config = model.config
    for i, (stage, branch) in enumerate(zip(model.stages, config.stage_configs, strict=True)):
        embedding, head = stage.input_layer, stage.output_layer
        assert (len(embedding), len(head)) == (4, 3)
        assert isinstance(embedding[1], nn.Conv2d)
        assert embedding[1].stride == (branch.input_feature_ratio,) * 2
        positions = branch.max_height * branch.max_width
        assert embedding[3].position_embeddings.weight.shape == (positions, branch.dim)
        assert isinstance(head[2], nn.Conv2d)
        assert head[2] is head[-1]
        assert head[2].out_channels == config.channels
        for block in stage.blocks:
            if branch.block_type == "ConvNeXtBlock":
                assert len(block.block1) == 3
                assert block.block1[1].groups == branch.dim
        if i:
            assert len(stage.upsample) == 3
            assert stage.upsample[1].kernel is stage.upsample.kernel
            assert stage.upsample[1].kernel.weight.shape[0] % branch.dim == 0


def test_a_slice_of_the_children_is_refused(model: DiMR) -> None:
    """It would be called without the steps that the children do not show."""
    layer = model.stages[0].input_layer
    with pytest.raises(TypeError, match="index: got slice"):
        layer[:2]
    assert list(layer)[1:2] == [layer[1]]
    assert [type(child) for child in layer] == [type(layer[i]) for i in range(-4, 0)]


def test_initialising_the_last_layer_to_zero_gives_zero(model: DiMR) -> None:
    """As scripts do with the layer that predicts."""
    for stage in model.stages:
        nn.init.zeros_(stage.output_layer[2].weight)
        nn.init.zeros_(stage.output_layer[2].bias)
    for changed in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(not prediction.any() for prediction in changed(**inputs()))


def test_names_of_parameters_are_only_the_published_ones() -> None:
    for case in ("two_branch_tdrms", "two_branch_tdln", "two_branch_rms", "three_branch_tdrms"):
        golden = Golden(case)
        assert set(DiMR(golden.config).state_dict()) == set(golden.under("param/"))


def test_attributes_of_the_published_model(model: DiMR) -> None:
    assert model.channels == 3
    assert model.block_grad_to_lowres is False
    assert DiMR.from_preset("tiny", block_grad_to_lowres=True).block_grad_to_lowres is True
    assert (model.dtype, model.device) == (torch.float32, torch.device("cpu"))
    assert model.to("meta", torch.bfloat16).dtype == torch.bfloat16
    assert model.device == torch.device("meta")
