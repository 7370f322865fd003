"""The whole model by Triton kernels (interpreted without a GPU) and by the CPU library."""

import copy
import importlib
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dimr_fast import PRESETS, DiMR
from dimr_fast.diffusion import multi_scale_loss
from tests.support.aot import Launch, compiled
from tests.support.cpu_library import needs_cpu
from tests.support.golden import CASES, Golden, relative_error
from tests.support.oracle import DEVICE, assert_as_accurate, skip_module_without_triton

skip_module_without_triton()

TOLERANCE = 1e-5

# In the interpreter a whole model takes up to a minute.
slow_without_gpu = pytest.mark.slow if DEVICE == "cpu" else ()
each_implementation = pytest.mark.parametrize(
    "implementation",
    [
        pytest.param("triton", marks=slow_without_gpu),
        pytest.param("cpu", marks=needs_cpu),
    ],
)


@pytest.fixture(autouse=True)
def full_precision_convolutions() -> None:
    torch.backends.cudnn.allow_tf32 = False


def inputs(golden: Golden, *names: str) -> list[torch.Tensor]:
    return [golden[f"in/{name}"].to(DEVICE) for name in names]


@each_implementation
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("mode", "time"), [("mixed_time", "time"), ("uniform_time", "time_uniform")]
)
def test_outputs_equal_the_published_model(
    case: str, mode: str, time: str, implementation: str
) -> None:
    golden = Golden(case)
    model = DiMR(golden.config).set_implementation(implementation).to(DEVICE)
    model.load_state_dict(golden.under("param/"), strict=True)
    x, log_snr, y = inputs(golden, "x", time, "y")
    for i, output in enumerate(model(x, log_snr=log_snr, y=y)):
        assert relative_error(output.cpu(), golden[f"{mode}/out/{i}"]) < TOLERANCE


@each_implementation
@pytest.mark.parametrize("case", CASES)
def test_every_gradient_equals_the_published_model(case: str, implementation: str) -> None:
    assert_gradients_equal_the_published_model(case, implementation)


@pytest.mark.parametrize(
    "implementation",
    # How a model is captured does not depend on whether kernels are interpreted, which is slow.
    [pytest.param("cpu", marks=needs_cpu), *(["triton"] if DEVICE != "cpu" else [])],
)
def test_every_gradient_equals_the_published_model_when_compiled(implementation: str) -> None:
    assert_gradients_equal_the_published_model("two_branch_tdrms", implementation, compiled=True)


def assert_gradients_equal_the_published_model(
    case: str, implementation: str, compiled: bool = False
) -> None:
    golden = Golden(case)
    model = DiMR(golden.config).set_implementation(implementation).to(DEVICE)
    model.load_state_dict(golden.under("param/"), strict=True)
    x, log_snr, y, noise = inputs(golden, "x", "time", "y", "noise")
    torch._dynamo.reset()  # what other tests have compiled counts against Dynamo's limit
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    loss = multi_scale_loss(run(x, log_snr=log_snr, y=y), noise, golden.loss_coeffs)
    assert relative_error(loss.cpu(), golden["loss/per_image"]) < TOLERANCE
    loss.mean().backward()
    expected = golden.under("grad/")
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert relative_error(parameter.grad.cpu(), expected[name]) < TOLERANCE, name


@each_implementation
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_as_accurate_as_the_reference(dtype: torch.dtype, implementation: str) -> None:
    """The error against fp32 is at most twice the reference's under the same autocast."""
    torch.manual_seed(0)
    config = PRESETS["tiny"]
    model = DiMR(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model = model.to(DEVICE)
    x = torch.randn(2, config.channels, *config.image_size, device=DEVICE)
    log_snr, y = torch.tensor([-3.0, 2.0], device=DEVICE), torch.tensor([0, 1], device=DEVICE)

    def run(implementation: str, enabled: bool) -> list[torch.Tensor]:
        model.set_implementation(implementation)
        with torch.no_grad(), torch.autocast(DEVICE, dtype, enabled=enabled):
            return [o.float() for o in model(x, log_snr=log_snr, y=y)]

    exact = run("reference", False)
    found = run(implementation, True)
    for ours, plain, truth in zip(found, run("reference", True), exact, strict=True):
        assert relative_error(ours, truth) <= 2 * relative_error(plain, truth)


@pytest.mark.parametrize(
    ("preset", "dtype", "implementation"),
    [
        *(
            pytest.param(preset, dtype, "cpu", marks=needs_cpu)
            for preset in ("DiMR-XL/2R", "DiMR-G/2R", "DiMR-M/3R")
            for dtype in (torch.float32, torch.bfloat16)
        ),
        pytest.param("DiMR-XL/2R", torch.bfloat16, "triton", marks=slow_without_gpu),
        pytest.param("DiMR-M/3R", torch.float32, "triton", marks=slow_without_gpu),
    ],
)
def test_presets_widths_at_reduced_depth_and_size(
    preset: str, dtype: torch.dtype, implementation: str
) -> None:
    """Compare outputs and all gradients with fp64.

    In fp32 the tolerance is that of the golden numbers, in bf16 twice the reference's error.
    """
    torch.manual_seed(0)
    config = PRESETS[preset]
    branches = tuple(
        replace(b, num_blocks=2, max_height=b.max_height // 8, max_width=b.max_width // 8)
        for b in config.stage_configs
    )
    model = DiMR(replace(config, stage_configs=branches, num_classes=3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model = model.to(DEVICE, dtype)
    config = model.config
    x = torch.randn(1, config.channels, *config.image_size, device=DEVICE, dtype=dtype)
    noise = torch.randn_like(x)
    log_snr, y = torch.tensor([2.0], device=DEVICE), torch.tensor([1], device=DEVICE)

    names = [
        *(f"output {i}" for i in range(len(branches))),
        *(f"gradient of {name}" for name, _ in model.named_parameters()),
    ]

    def outputs_and_gradients(
        implementation: str, x: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        module = copy.deepcopy(model).to(x.dtype).set_implementation(implementation)
        condition = log_snr.to(torch.promote_types(x.dtype, log_snr.dtype))
        outputs = module(x, log_snr=condition, y=y)
        multi_scale_loss(outputs, noise).mean().backward()
        gradients = [parameter.grad for parameter in module.parameters()]
        assert all(gradient is not None for gradient in gradients)
        return (*(o.detach() for o in outputs), *gradients)

    ours = partial(outputs_and_gradients, implementation)
    plain = partial(outputs_and_gradients, "reference")
    if dtype == torch.float32:
        pairs = zip(names, ours(x, noise), plain(x.double(), noise.double()), strict=True)
        for name, found, truth in pairs:
            assert relative_error(found, truth) <= TOLERANCE, name
        return
    # Triton's interpreter truncates when it casts to bf16: errors are twice those of rounding.
    times = 4 if implementation == "triton" and DEVICE == "cpu" else 2
    assert_as_accurate(ours, plain, x, noise, dtype=dtype, times=times, names=names)


@needs_cpu
def test_a_cpu_takes_its_own_kernels_unasked() -> None:
    """Every operator; the backward pass of attention is batched products of PyTorch."""
    called: set[str] = set()

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            if func.namespace == "dimr_fast":
                called.add(f"{func.overloadpacket.__name__}.{func._overloadname}")
            return func(*args, **(kwargs or {}))

    model = DiMR.from_preset("tiny")
    x, y = torch.randn(2, 3, 16, 16), torch.tensor([0, 1])
    with Spy():
        multi_scale_loss(model(x, log_snr=torch.zeros(2), y=y), x).mean().backward()
    operators = ("depthwise_conv2d", "gated_gelu", "td_layer_norm", "td_parameters")
    operators += ("td_rms_norm", "upsample_add")
    kernels = {f"{o}_{way}.default" for o in operators for way in ("fwd", "bwd")}
    assert called == kernels | {"attention_fwd.default"}


class _Launchers(TorchDispatchMode):
    """Calls the launchers on the meta device, where PyTorch would only compute shapes."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace != "dimr_fast" or func._overloadname != "triton":
            return func(*args, **(kwargs or {}))
        operator, direction = func.overloadpacket.__name__.rsplit("_", 1)
        kernels = importlib.import_module(f"dimr_fast.kernels.{operator}")
        return getattr(kernels, f"launch_{direction}")(*args)


def aot_launches() -> list[Launch]:
    def step(preset: str, batch: int) -> None:
        with torch.device("meta"):
            model = DiMR.from_preset(preset).to(torch.bfloat16).set_implementation("triton")
            config = model.config
            x = torch.empty(batch, config.channels, *config.image_size, dtype=torch.bfloat16)
            log_snr, y = torch.empty(batch), torch.empty(batch, dtype=torch.int64)
        with _Launchers():
            sum(o.sum() for o in model(x, log_snr=log_snr, y=y)).backward()

    presets = {"DiMR-XL/2R": 2, "DiMR-M/3R": 2, "tiny": 1}
    return [Launch(p, lambda p=p, batch=b: step(p, batch)) for p, b in presets.items()]


@pytest.mark.slow
def test_all_that_a_training_step_launches_compiles_without_spills() -> None:
    """Compile with the strides, offsets and dtypes that the model passes to the launchers."""
    kernels = compiled("tests.model.test_model_kernels")
    assert {kernel.launch for kernel in kernels} >= {"DiMR-XL/2R", "tiny"}
    for kernel in kernels:
        assert kernel.spilled == 0, kernel
