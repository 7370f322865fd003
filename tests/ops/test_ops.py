"""The public functions of the operators: the reference against PyTorch, and invalid input."""

from typing import Any

import pytest
import torch

from dimr_fast import ops
from tests.support.oracle import seeded

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [960, 7, 1])
def test_norms_against_torch_in_double(width: int, dtype: torch.dtype) -> None:
    """PyTorch's own norms in fp64 are the truth; half precision adds one rounding error."""
    x = (3 * seeded(2, 5, width) + 1).to(dtype)
    scale, shift = seeded(2, width), seeded(1, width)
    exact = torch.nn.functional.layer_norm(x.double(), (width,), eps=1e-5)
    exact = exact * scale[:, None].double() + shift[:, None].double()
    actual = ops.td_layer_norm(x, scale, shift)
    assert actual.dtype == dtype
    tolerance = 4 * torch.finfo(dtype).eps * max(exact.abs().max().item(), 1)
    torch.testing.assert_close(actual.double(), exact, atol=tolerance, rtol=0)

    rms = torch.nn.functional.rms_norm(x.double(), (width,), eps=0.0)
    actual = ops.td_rms_norm(x, scale)
    torch.testing.assert_close(
        actual.double(), rms * scale[:, None].double(), atol=tolerance, rtol=tolerance
    )
    actual = ops.rms_norm(x, shift[0])
    torch.testing.assert_close(
        actual.double(), rms * shift[0].double(), atol=tolerance, rtol=tolerance
    )


X = torch.zeros(2, 5, 6)
ONE = torch.ones(1, 6)
IMAGE, LOW = torch.zeros(2, 4, 4, 3), [torch.zeros(2, 2, 2, 5)]
NORM_IN, NORM_OUT = (torch.ones(1, 5), torch.zeros(1, 5)), (torch.ones(1, 3), torch.zeros(1, 3))
WEIGHT, BIAS = torch.zeros(12, 5), torch.zeros(12)

BAD: list[tuple[Any, str]] = [
    (lambda: ops.td_rms_norm(X, torch.ones(3, 6)), r"scale: got shape \(3, 6\)"),
    (lambda: ops.td_rms_norm(X, torch.ones(1, 5)), "scale: got width 5"),
    (lambda: ops.td_rms_norm(X, torch.ones(1, 6, device="meta")), "scale: got device meta"),
    (lambda: ops.td_rms_norm(torch.zeros(6), ONE), r"x: got shape \(6,\)"),
    (lambda: ops.td_layer_norm(X, ONE, torch.ones(6)), r"bias: got shape \(6,\)"),
    (lambda: ops.rms_norm(X, ONE), r"scale: got shape \(1, 6\)"),
    (lambda: ops.rms_norm(X, torch.ones(5)), "scale: got width 5"),
    (lambda: ops.upsample_add(IMAGE, [], NORM_IN, WEIGHT, BIAS, NORM_OUT), "features: got none"),
    (
        lambda: ops.upsample_add(IMAGE, LOW, NORM_IN, WEIGHT[:8], BIAS, NORM_OUT),
        r"weight: got shape \(8, 5\), expected \(12, 5\)",
    ),
    (
        lambda: ops.upsample_add(IMAGE, LOW, NORM_IN, WEIGHT, BIAS[:8], NORM_OUT),
        r"bias: got shape \(8,\)",
    ),
    (
        lambda: ops.upsample_add(IMAGE, LOW, NORM_OUT, WEIGHT, BIAS, NORM_OUT),
        r"norm_in: got shape \(1, 3\)",
    ),
    (
        lambda: ops.upsample_add(IMAGE, [torch.zeros(2, 3, 3, 5)], NORM_IN, WEIGHT, BIAS, NORM_OUT),
        r"features: got size \(3, 3\)",
    ),
    (lambda: ops.td_rms_norm(X.int(), ONE), "x: got dtype torch.int32, expected floating"),
    (lambda: ops.td_rms_norm(X, ONE.int()), "scale: got dtype torch.int32"),
    (lambda: ops.td_rms_norm(X, ONE, X.int()), "residual: got dtype torch.int32"),
    (lambda: ops.td_layer_norm(X, ONE, ONE.int()), "bias: got dtype torch.int32"),
    (lambda: ops.rms_norm(X.int(), ONE[0]), "x: got dtype torch.int32"),
    (lambda: ops.gated_gelu(X.int()), "x: got dtype torch.int32"),
    (lambda: ops.attention(X.int(), 2), "qkv: got dtype torch.int32"),
    (lambda: ops.td_parameters(torch.ones(2).int(), []), "tau: got dtype torch.int32"),
    (
        lambda: ops.upsample_add(IMAGE.int(), LOW, NORM_IN, WEIGHT, BIAS, NORM_OUT),
        "x: got dtype torch.int32",
    ),
    (
        lambda: ops.upsample_add(IMAGE, [LOW[0].int()], NORM_IN, WEIGHT, BIAS, NORM_OUT),
        r"features\[0\]: got dtype torch.int32",
    ),
    (lambda: ops.rms_norm(X, ONE[0], implementation="sdpa"), "implementation: got 'sdpa'"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_names_the_argument(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
