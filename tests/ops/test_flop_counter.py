"""Counts of `torch.utils.flop_counter`: operators of this package count as the reference does."""

from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dimr_fast import DiMR, ops
from tests.support.cpu_library import each_implementation, needs_cpu
from tests.support.models import inputs_of
from tests.support.oracle import DEVICE, skip_module_without_triton

skip_module_without_triton()


def counted(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@needs_cpu
@pytest.mark.parametrize("norm_type", ["TDRMSN", "LN", "RMSN"])
def test_a_model_counts_as_the_reference(norm_type: str) -> None:
    model = DiMR.from_preset("tiny", norm_type=norm_type)
    batch = inputs_of(model, 2)
    with torch.no_grad():
        plain = counted(lambda: model.set_implementation("reference")(**batch))
        assert plain > 0
        assert counted(lambda: model.set_implementation("cpu")(**batch)) == plain


@each_implementation
def test_attention_counts_its_products_of_matrices(implementation: str) -> None:
    images, tokens, heads, head_dim = 3, 17, 2, 8
    shape = (images, tokens, 3 * heads * head_dim)
    qkv = torch.randn(shape, device=DEVICE, requires_grad=True)
    product = 2 * images * heads * tokens * tokens * head_dim

    def forward() -> torch.Tensor:
        return ops.attention(qkv, heads, implementation=implementation)

    assert counted(forward) == 2 * product
    out = forward().sum()
    # Four gradients; the scores are computed again.
    assert counted(out.backward) == 5 * product


@needs_cpu
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_a_depthwise_convolution_counts_the_gradients_that_are_wanted(
    wanted: tuple[bool, bool],
) -> None:
    images, height, width, channels, k = 2, 5, 6, 16, 3
    x = torch.randn(images, height, width, channels, requires_grad=wanted[0])
    weight = torch.randn(channels, 1, k, k, requires_grad=wanted[1])
    expected = 2 * images * height * width * channels * k * k

    def forward() -> torch.Tensor:
        return ops.depthwise_conv2d(x, weight, implementation="cpu")

    assert counted(forward) == expected
    out = forward().sum()
    assert counted(out.backward) == sum(wanted) * expected
