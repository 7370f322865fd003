"""DiMR against the published model: results, names, behaviour in a training script."""

import copy
import dataclasses
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import checkpoint

from dimr_fast import PRESETS, DiMR, ops
from dimr_fast.config import DiMRConfig
from dimr_fast.diffusion import multi_scale_loss
from tests.support.golden import CASES, Golden, relative_error
from tests.support.models import randomised

TOLERANCE = 1e-5

PUBLISHED_COUNTS = {
    "DiMR-XL/2R": 505_046_408,
    "DiMR-G/2R": 1_056_352_904,
    "DiMR-XL/3R": 525_027_372,
    "DiMR-M/3R": 132_941_577,
    "DiMR-L/3R": 283_909_689,
}


def golden_model(golden: Golden) -> DiMR:
    model = DiMR(golden.config)
    model.load_state_dict(golden.under("param/"), strict=True)
    return model


def tiny_inputs(batch: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(batch, 3, 16, 16, generator=generator),
        "log_snr": torch.linspace(-3, 4, batch),
        "y": torch.arange(batch) % 7,
    }


def in_training(model: DiMR) -> DiMR:
    """Return the model in training mode, with noise in every parameter."""
    return randomised(model).train()


def one_block_each(**changes: Any) -> DiMRConfig:
    """Return the tiny preset with one block in a branch, since compiling takes seconds a block."""
    config = PRESETS["tiny"]
    branches = [dataclasses.replace(b, num_blocks=1, **changes) for b in config.stage_configs]
    return dataclasses.replace(config, stage_configs=tuple(branches))


@pytest.mark.parametrize("implementation", ["auto", "reference"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("mode", "time"), [("mixed_time", "time"), ("uniform_time", "time_uniform")]
)
def test_outputs_equal_the_published_model(
    case: str, mode: str, time: str, implementation: str
) -> None:
    golden = Golden(case)
    model = golden_model(golden).set_implementation(implementation)
    outputs = model(golden["in/x"], t=None, log_snr=golden[f"in/{time}"], y=golden["in/y"])
    assert len(outputs) == len(golden.config.stage_configs)
    for i, output in enumerate(outputs):
        assert relative_error(output, golden[f"{mode}/out/{i}"]) < TOLERANCE


@pytest.mark.parametrize("checkpointing", [False, True, "selective"])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_every_gradient_equal_the_published_model(
    case: str, checkpointing: bool | str
) -> None:
    golden = Golden(case)
    for stage in golden.config.stage_configs:
        stage.checkpointing = checkpointing
    model = golden_model(golden)
    outputs = model(golden["in/x"], log_snr=golden["in/time"], y=golden["in/y"])
    loss = multi_scale_loss(outputs, golden["in/noise"], golden.loss_coeffs)
    assert relative_error(loss, golden["loss/per_image"]) < TOLERANCE
    loss.mean().backward()
    expected = golden.under("grad/")
    found = {name: p.grad for name, p in model.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient) < TOLERANCE, name


@pytest.mark.parametrize("name", PUBLISHED_COUNTS)
def test_published_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        model = DiMR.from_preset(name)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED_COUNTS[name]


def published_xl2r_layout() -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the published DiMR-XL/2R state dict."""
    layout: dict[str, tuple[int, ...]] = {}

    def td(name: str, dim: int) -> None:
        for vector in ("param0", "param1", "nodecay_weight", "nodecay_bias"):
            layout[f"{name}.{vector}"] = (dim,)

    def linear(name: str, out: int, inner: int) -> None:
        layout[f"{name}.weight"], layout[f"{name}.bias"] = (out, inner), (out,)

    for i, dim, blocks, patch, positions in ((0, 960, 39, 2, 256), (1, 480, 21, 1, 1024)):
        stage = f"stages.{i}"
        layout[f"{stage}.input_layer.1.weight"] = (dim, 4, patch, patch)
        layout[f"{stage}.input_layer.1.bias"] = (dim,)
        layout[f"{stage}.input_layer.3.position_embeddings.weight"] = (positions, dim)
        for j in range(blocks):
            block = f"{stage}.blocks.{j}"
            if i == 0:
                td(f"{block}.block1.norm.scale", 960)
                layout[f"{block}.block1.query_key_value.weight"] = (2880, 960)
                linear(f"{block}.block1.dense", 960, 960)
            else:
                layout[f"{block}.block1.1.weight"] = (480, 1, 7, 7)
                layout[f"{block}.block1.1.bias"] = (480,)
            td(f"{block}.block2.norm.scale", dim)
            linear(f"{block}.block2.w0", 2 * dim, dim)
            linear(f"{block}.block2.w1", 2 * dim, dim)
            linear(f"{block}.block2.w2", dim, 2 * dim)
        for k in range(blocks // 2):
            linear(f"{stage}.skip_denses.{k}", dim, 2 * dim)
        td(f"{stage}.output_layer.0.weight", dim)
        td(f"{stage}.output_layer.0.bias", dim)
        layout[f"{stage}.output_layer.2.weight"] = (4, dim, 3, 3)
        layout[f"{stage}.output_layer.2.bias"] = (4,)
    layout["stages.0.class_embeds.weight"] = (1001, 960)
    td("stages.1.upsample.0.weight", 38400)
    td("stages.1.upsample.0.bias", 38400)
    linear("stages.1.upsample.1.kernel", 1920, 38400)
    td("stages.1.upsample.2.weight", 480)
    td("stages.1.upsample.2.bias", 480)
    return layout


def test_xl2r_loads_and_saves_the_published_layout_strictly() -> None:
    layout = published_xl2r_layout()
    with torch.device("meta"):
        model = DiMR.from_preset("DiMR-XL/2R")
        published = {name: torch.empty(shape) for name, shape in layout.items()}
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == layout
    model.load_state_dict(published, strict=True, assign=True)
    incomplete = {
        name: t for name, t in published.items() if name != "stages.0.class_embeds.weight"
    }
    with pytest.raises(RuntimeError, match="class_embeds"):
        model.load_state_dict(incomplete, strict=True)


def test_state_dict_round_trip_keeps_the_outputs() -> None:
    model = in_training(DiMR.from_preset("tiny"))
    other = DiMR.from_preset("tiny")
    other.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        for a, b in zip(model(**tiny_inputs()), other(**tiny_inputs()), strict=True):
            assert torch.equal(a, b)


def test_initial_values() -> None:
    torch.manual_seed(0)
    model = DiMR.from_preset("demo")
    state = model.state_dict()
    for name, value in state.items():
        if name.endswith(("nodecay_weight", "nodecay_bias")):
            assert (value == 0).all(), name
        elif name.endswith(("scale.param0", "scale.param1")):
            assert (value == 1).all(), name
    assert (state["stages.1.upsample.0.bias.param1"] == 0).all()
    assert (state["stages.0.blocks.0.block1.dense.bias"] == 0).all()
    assert abs(state["stages.0.class_embeds.weight"].std().item() - 0.02) < 0.003
    assert abs(state["stages.1.upsample.1.kernel.weight"].std().item() - 0.02) < 0.001


def test_at_initialisation_nothing_depends_on_time() -> None:
    torch.manual_seed(0)
    model = DiMR.from_preset("tiny")
    inputs = tiny_inputs()
    early = model(**(inputs | {"log_snr": torch.tensor([-4.0])}))
    late = model(**(inputs | {"log_snr": torch.tensor([4.0])}))
    assert all(torch.equal(a, b) for a, b in zip(early, late, strict=True))


def test_weight_decay_groups_by_name() -> None:
    names = [name for name, _ in DiMR.from_preset("tiny").named_parameters() if "nodecay_" in name]
    assert names
    assert all(name.endswith(("nodecay_weight", "nodecay_bias")) for name in names)


def test_deepcopy_after_a_training_forward() -> None:
    model = in_training(DiMR.from_preset("tiny"))
    sum(o.square().mean() for o in model(**tiny_inputs())).backward()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        assert all(o.abs().max() == 0 for o in model(**tiny_inputs()))
        assert all(o.abs().max() > 0 for o in twin(**tiny_inputs()))


def test_a_call_leaves_nothing_behind() -> None:
    model = in_training(DiMR.from_preset("tiny"))

    def attributes() -> dict[str, Any]:
        return {
            f"{name}.{key}": id(value)
            for name, module in model.named_modules()
            for key, value in vars(module).items()
        }

    before = attributes()
    model(**tiny_inputs())
    assert attributes() == before


def test_forward_never_waits_for_the_device() -> None:
    """Meta tensors have no values: reading one on the host raises."""
    with torch.device("meta"):
        model = DiMR.from_preset("tiny")
        outputs = model(
            torch.empty(2, 3, 16, 16), log_snr=torch.empty(2), y=torch.empty(2, dtype=torch.int64)
        )
    assert [tuple(o.shape) for o in outputs] == [(2, 3, 4, 4), (2, 3, 8, 8), (2, 3, 16, 16)]


@pytest.mark.versions
@pytest.mark.parametrize("checkpointing", [False, True, "selective"])
def test_compiles_without_a_graph_break_forward_and_backward(checkpointing: bool | str) -> None:
    model = in_training(DiMR(one_block_each(checkpointing=checkpointing)))
    model.set_implementation("reference")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = tiny_inputs()
    expected = torch.autograd.grad(
        sum(o.square().mean() for o in model(**inputs)), list(model.parameters())
    )
    actual = torch.autograd.grad(
        sum(o.square().mean() for o in compiled(**inputs)), list(model.parameters())
    )
    for (name, _), a, b in zip(model.named_parameters(), actual, expected, strict=True):
        assert relative_error(a, b) < TOLERANCE, name


@pytest.mark.versions
def test_compiles_without_a_graph_break_without_gradients() -> None:
    model = in_training(DiMR(one_block_each())).set_implementation("reference")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        outputs = zip(compiled(**tiny_inputs()), model(**tiny_inputs()), strict=True)
    for actual, expected in outputs:
        assert relative_error(actual, expected) < TOLERANCE


@pytest.mark.slow
@pytest.mark.versions
@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_compiled_it_takes_batches_of_any_size(implementation: str) -> None:
    """From the second size on Dynamo knows sizes as symbols, not numbers."""
    torch.compiler.reset()  # models of other tests count towards Dynamo's limit
    model = in_training(DiMR(one_block_each())).set_implementation(implementation)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for batch, times in ((2, 2), (3, 3), (4, 1)):
        inputs = tiny_inputs(batch)
        inputs["log_snr"] = inputs["log_snr"][:times]
        for actual, expected in zip(compiled(**inputs), model(**inputs), strict=True):
            assert relative_error(actual, expected) < TOLERANCE, batch


def test_checkpointing_is_per_branch_and_only_with_grad(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(b.checkpointing for c in PRESETS.values() for b in c.stage_configs)
    config = PRESETS["tiny"]
    middle = dataclasses.replace(config.stage_configs[1], checkpointing=True)
    branches = (config.stage_configs[0], middle, config.stage_configs[2])
    model = DiMR(dataclasses.replace(config, stage_configs=branches))
    calls: list[nn.Module] = []
    original = checkpoint.checkpoint

    def counting(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(block)
        return original(block, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "checkpoint", counting)
    with torch.no_grad():
        model(**tiny_inputs())
    assert calls == []
    model(**tiny_inputs())
    assert calls == list(model.stages[1].blocks)


def test_block_grad_to_lowres_stops_the_cascade_gradient() -> None:
    for blocked in (False, True):
        model = in_training(DiMR.from_preset("tiny", block_grad_to_lowres=blocked))
        model(**tiny_inputs())[-1].square().mean().backward()
        gradient = model.stages[0].class_embeds.weight.grad
        assert (gradient is None) == blocked


def test_dropout_acts_in_training_only() -> None:
    config = PRESETS["tiny"]
    branches = tuple(dataclasses.replace(b, dropout_prob=0.5) for b in config.stage_configs)
    model = in_training(DiMR(dataclasses.replace(config, stage_configs=branches)))
    inputs = tiny_inputs()
    assert not torch.equal(model(**inputs)[-1], model(**inputs)[-1])
    model.eval()
    assert torch.equal(model(**inputs)[-1], model(**inputs)[-1])


def test_autocast_stays_close_to_fp32() -> None:
    model = in_training(DiMR.from_preset("tiny"))
    with torch.no_grad():
        expected = model(**tiny_inputs())
        with torch.autocast("cpu", torch.bfloat16):
            actual = model(**tiny_inputs())
    for a, b in zip(actual, expected, strict=True):
        assert relative_error(a.float(), b) < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_in_another_dtype(dtype: torch.dtype) -> None:
    model = in_training(DiMR.from_preset("tiny"))
    inputs = tiny_inputs()
    with torch.no_grad():
        expected = model(**inputs)
        actual = model.to(dtype)(**(inputs | {"x": inputs["x"].to(dtype)}))
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == dtype
        assert relative_error(a.double(), b.double()) < 8 * torch.finfo(torch.bfloat16).eps


def test_empty_batch() -> None:
    outputs = DiMR.from_preset("tiny")(
        torch.empty(0, 3, 16, 16), log_snr=torch.zeros(1), y=torch.empty(0, dtype=torch.int64)
    )
    assert [tuple(o.shape) for o in outputs] == [(0, 3, 4, 4), (0, 3, 8, 8), (0, 3, 16, 16)]


BAD_INPUTS = [
    ({"x": torch.zeros(2, 4, 16, 16)}, r"x: got shape \(2, 4, 16, 16\), expected \[B, 3, 16, 16\]"),
    ({"x": torch.zeros(2, 3, 16, 8)}, r"x: got shape \(2, 3, 16, 8\)"),
    ({"x": torch.zeros(3, 16, 16)}, "x: got shape"),
    ({"x": torch.zeros(2, 3, 16, 16, dtype=torch.uint8)}, r"x: got dtype torch.uint8"),
    ({"x": torch.zeros(2, 3, 16, 16, dtype=torch.float64)}, r"x: got dtype torch.float64"),
    ({"x": torch.zeros(2, 3, 16, 16, device="meta")}, "x: got device meta, expected cpu"),
    ({"y": torch.zeros(2, dtype=torch.int64, device="meta")}, "y: got device meta"),
    ({"log_snr": torch.zeros(2, device="meta")}, "log_snr: got device meta"),
    ({"log_snr": None}, "log_snr: got None"),
    ({"log_snr": torch.zeros(3)}, r"log_snr: got shape \(3,\), expected \[2\] or \[1\]"),
    ({"log_snr": torch.zeros(2, 1)}, "log_snr: got shape"),
    ({"log_snr": torch.zeros(2, dtype=torch.bool)}, "log_snr: got dtype torch.bool"),
    ({"y": None}, "y: got None"),
    ({"y": torch.zeros(3, dtype=torch.int64)}, r"y: got shape \(3,\), expected \[2\]"),
    ({"y": torch.zeros(2)}, "y: got dtype torch.float32"),
]


@pytest.mark.parametrize(("change", "message"), BAD_INPUTS)
def test_bad_inputs_name_the_argument(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiMR.from_preset("tiny")(**(tiny_inputs() | change))


def test_set_implementation_reaches_the_operators_that_have_it() -> None:
    model = DiMR.from_preset("tiny").set_implementation("sdpa")
    chosen = {
        module.operator: module.implementation
        for module in model.modules()
        if hasattr(module, "operator")
    }
    assert chosen.pop("attention") == "sdpa"
    assert "td_parameters" in chosen
    assert set(chosen.values()) == {"auto"}
    with pytest.raises(ValueError, match="implementation: got 'cuda12'"):
        model.set_implementation("cuda12")


@pytest.mark.versions
def test_import_needs_neither_triton_nor_compiled_libraries() -> None:
    """A fresh interpreter in which triton cannot be imported runs a model."""
    import subprocess

    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from dimr_fast import DiMR\n"
        "m = DiMR.from_preset('tiny')\n"
        "o = m(torch.zeros(1, 3, 16, 16), log_snr=torch.zeros(1), y=torch.zeros(1).long())\n"
        "print(len(o), 'dimr_fast.kernels' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "False"]


def test_every_operator_says_why_not() -> None:
    x = torch.zeros(1, 4, 6)
    for operator in ops.OPERATORS.values():
        assert operator.names[-1] == "reference"
        assert operator.why_not("reference", x) is None
        with pytest.raises(ValueError, match="implementation: got 'magic'"):
            operator.why_not("magic", x)
