"""The reference against the published model's numbers, and its derivatives against themselves."""

import pytest
import torch

from dimr_fast import reference
from dimr_fast.diffusion import multi_scale_loss
from tests.support.golden import CASES, Golden, relative_error

TOLERANCE = 1e-5
MODES = [("mixed_time", "time"), ("uniform_time", "time_uniform")]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("mode", "time"), [("mixed_time", "time"), ("uniform_time", "time_uniform")]
)
def test_outputs_equal_the_published_model(case: str, mode: str, time: str) -> None:
    golden = Golden(case)
    outputs = reference.dimr(
        golden.config, golden.under("param/"), golden["in/x"], golden[f"in/{time}"], golden["in/y"]
    )
    assert len(outputs) == len(golden.config.stage_configs)
    for i, output in enumerate(outputs):
        assert relative_error(output, golden[f"{mode}/out/{i}"]) < TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_loss_and_every_gradient_equal_the_published_model(case: str) -> None:
    golden = Golden(case)
    state = {name: p.clone().requires_grad_() for name, p in golden.under("param/").items()}
    outputs = reference.dimr(
        golden.config, state, golden["in/x"], golden["in/time"], golden["in/y"]
    )
    loss = multi_scale_loss(outputs, golden["in/noise"], golden.loss_coeffs)
    assert relative_error(loss, golden["loss/per_image"]) < TOLERANCE
    loss.mean().backward()
    expected = golden.under("grad/")
    assert expected.keys() == state.keys()
    for name, gradient in expected.items():
        found = state[name].grad
        assert found is not None, name
        assert relative_error(found, gradient) < TOLERANCE, name


def _double(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("times", [1, 2])
def test_derivatives_of_every_operator_by_finite_differences(times: int) -> None:
    torch.manual_seed(0)
    check = torch.autograd.gradcheck
    x, value, shift = _double(2, 3, 4), _double(times, 4), _double(times, 4)
    tau = torch.randn(times, dtype=torch.float64)
    vectors = [_double(4) for _ in range(4)]
    assert check(lambda *v: reference.td_parameter(tau, *v), vectors)
    assert check(reference.td_rms_norm, (x, value))
    assert check(reference.td_layer_norm, (x, value, shift))
    assert check(reference.rms_norm, (x, _double(4)))
    assert check(reference.gated_gelu, (x,))
    assert check(lambda qkv: reference.attention(qkv, 2), (_double(2, 3, 12),))
    assert check(reference.depthwise_conv2d, (_double(2, 4, 3, 2), _double(2, 1, 3, 3), _double(2)))

    def cascade(x, f0, f1, in_scale, in_shift, weight, bias, out_scale, out_shift):  # type: ignore[no-untyped-def]
        norms = (in_scale, in_shift), (out_scale, out_shift)
        return reference.upsample_add(x, [f0, f1], norms[0], weight, bias, norms[1])

    features = _double(2, 2, 1, 3), _double(2, 2, 1, 3)
    norm_in, norm_out = (
        (_double(times, 6), _double(times, 6)),
        (_double(times, 2), _double(times, 2)),
    )
    inputs = (_double(2, 4, 2, 2), *features, *norm_in, _double(8, 6), _double(8), *norm_out)
    assert check(cascade, inputs)


def test_rms_norm_of_zeros_has_a_finite_gradient() -> None:
    x = torch.zeros(2, 3, 4, requires_grad=True)
    reference.td_rms_norm(x, torch.ones(1, 4)).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_pixel_shuffle_order() -> None:
    """Position (h·q + i, w·q + j) takes channels (i·q + j)·D onwards of the projection."""
    torch.manual_seed(0)
    q, dim, h, w = 2, 3, 2, 4
    features = torch.randn(1, h, w, 5)
    weight, bias = torch.randn(dim * q * q, 5), torch.randn(dim * q * q)
    one, zero = torch.ones(1, 5), torch.zeros(1, 5)
    x = torch.zeros(1, h * q, w * q, dim)
    norm_out = torch.ones(1, dim), torch.zeros(1, dim)
    actual = reference.upsample_add(x, [features], (one, zero), weight, bias, norm_out)
    normed = torch.nn.functional.layer_norm(features, (5,))
    projected = normed @ weight.T + bias
    for row, column, i, j in [(0, 0, 0, 1), (1, 3, 1, 0), (1, 2, 1, 1), (0, 1, 0, 0)]:
        box = projected[0, row, column].reshape(q, q, dim)[i, j]
        expected = torch.nn.functional.layer_norm(box, (dim,))
        torch.testing.assert_close(actual[0, row * q + i, column * q + j], expected)
