"""The page for users of the published code: its snippets work, and each difference has a test."""

import ast
import copy
import re
import tomllib
from typing import Any

import pytest
import torch

from dimr_fast import DiMR
from dimr_fast.diffusion import DiscreteSchedule, multi_scale_loss
from tests.support.golden import Golden
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "from-the-published-code.md").read_text()
SCRIPTS = PAGE.split("## In the published scripts")[1].split("\n## ")[0]
SNIPPETS = re.findall(r"```python\n(.*?)```", SCRIPTS, re.DOTALL)


def test_the_changed_lines_run_in_loops_like_the_published_ones() -> None:
    """Training, its state on disk, samples during training and evaluation, through accelerate."""
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate (extra: train)")
    model_line, evaluation_lines = SNIPPETS
    names: dict[str, Any] = {}
    exec(model_line, names)
    golden = Golden("two_branch_tdrms")

    accelerator = accelerate.Accelerator(cpu=True)
    nnet, nnet_ema = (names["MRModel"](golden.config) for _ in range(2))
    nnet_ema.load_state_dict(nnet.state_dict())
    optimizer = torch.optim.AdamW(nnet.parameters(), lr=1e-3, betas=(0.99, 0.99))
    nnet, nnet_ema, optimizer = accelerator.prepare(nnet, nnet_ema, optimizer)

    schedule = DiscreteSchedule()
    x0, y = golden["in/x"], golden["in/y"]
    before = {name: p.detach().clone() for name, p in nnet.named_parameters()}
    for step in range(2):
        nnet.train()
        optimizer.zero_grad()
        n = torch.randint(1, 1001, (len(x0),), generator=torch.manual_seed(step))
        eps = torch.randn(x0.shape, generator=torch.manual_seed(step))
        log_snr = n.float() / 1000 * 8 - 4
        prediction = nnet(schedule.add_noise(x0, eps, n), log_snr=log_snr, y=y)
        accelerator.backward(multi_scale_loss(prediction, eps).mean())
        optimizer.step()
        source = dict(nnet.named_parameters())
        for name, parameter in nnet_ema.named_parameters():
            parameter.data.mul_(0.9).add_(0.1 * source[name].data)
    changed = [name for name, p in nnet.named_parameters() if not torch.equal(p, before[name])]
    assert len(changed) > 0.9 * len(before)

    # As in train.py: time steps and conditions by position.
    t = torch.full((len(x0),), 500.0)
    with torch.no_grad():
        drawn = nnet_ema(x0, t, t / 1000 * 8 - 4, y=y)[-1]

    # As in eval.py.
    state = copy.deepcopy(nnet_ema.state_dict())
    names |= {"nnet": names["MRModel"](golden.config), "accelerator": accelerator}
    names["nnet"] = accelerator.prepare(names["nnet"])
    accelerator.unwrap_model(names["nnet"]).load_state_dict(state)
    names["nnet"].eval()
    exec(evaluation_lines, names)
    with torch.no_grad():
        fast = names["nnet"](x0, log_snr=t / 1000 * 8 - 4, y=y)[-1]
    assert fast.dtype == drawn.dtype
    assert (fast - drawn).norm() < 0.02 * drawn.norm()  # bfloat16


def test_checkpointing_is_set_in_a_published_configuration() -> None:
    config = copy.deepcopy(Golden("two_branch_tdrms").config)
    for mode in ("selective", True):
        for stage in config.stage_configs:
            stage.checkpointing = mode
        assert [b.checkpointing for b in DiMR(config).config.stage_configs] == [mode, mode]


def test_versions_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (torch_,) = (d for d in project["dependencies"] if d.startswith("torch>"))
    (triton,) = (d for d in project["optional-dependencies"]["test"] if d.startswith("triton"))
    table = [line.split("|") for line in SCRIPTS.splitlines() if line.startswith("| ")]
    rows = {cells[1].strip(): cells[3] for cells in table}
    assert f"{project['requires-python'].removeprefix('>=')} or later" in rows["Python"]
    assert f"{torch_.removeprefix('torch>=')} or later" in rows["torch"]
    assert f"{triton.removeprefix('triton>=').split(';')[0]} or later" in rows["Triton"]


TESTS = {
    "activation checkpointing": "model/test_model.py::"
    "test_checkpointing_is_per_branch_and_only_with_grad",
    "host synchronisation": "model/test_model.py::test_forward_never_waits_for_the_device",
    "state between calls": "model/test_model.py::test_deepcopy_after_a_training_forward",
    "precision under autocast": "model/test_model.py::test_autocast_stays_close_to_fp32",
    "guidance": "diffusion/test_guidance.py::test_guidance_is_one_batch_of_twice_the_size",
    "errors": "model/test_model.py::test_bad_inputs_name_the_argument",
    "class-balanced labels": "jobs/test_sampler.py::test_labels_are_balanced",
    "resume": "jobs/test_training_resume.py::"
    "test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one",
    "latents": "jobs/test_extract_features.py::test_shards_hold_the_features",
    "512×512 models (three branches)": "model/test_model.py::"
    "test_outputs_equal_the_published_model",
}
"""For each row of the table of differences, a test that would fail if it were not so."""


def test_each_difference_has_a_test() -> None:
    table = PAGE.split("\n## Differences\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    assert set(rows) - {""} == set(TESTS)  # "": the heading
    for place in TESTS.values():
        file, _, name = place.partition("::")
        tree = ast.parse((ROOT / "tests" / file).read_text())
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert name in functions, place
