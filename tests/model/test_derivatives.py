"""Derivatives other than one backward pass: with "reference" all of them, otherwise an error."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import BackwardCFunction
from torch.func import functional_call, grad, jacrev, jvp, vmap

from dimr_fast import DiMR, ops
from dimr_fast.config import NORM_TYPES
from tests.support.models import inputs, randomised

DIRECTIONS = 3


def model_of(dtype: torch.dtype = torch.float64, **overrides: object) -> DiMR:
    torch.manual_seed(0)
    return randomised(DiMR.from_preset("tiny", **overrides)).to(dtype)


def few_variables(model: DiMR) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """Return the model as a function of a few coordinates of image, time and one parameter."""
    given = inputs()
    dtype = next(model.parameters()).dtype
    x, time = given["x"].to(dtype), given["log_snr"].to(dtype)
    name = "stages.0.blocks.0.block2.w0.weight"
    weight = model.get_parameter(name).detach()
    generator = torch.Generator().manual_seed(1)
    along_x, along_weight = (
        torch.randn(DIRECTIONS, *t.shape, generator=generator, dtype=dtype) for t in (x, weight)
    )

    def function(a: Tensor, time: Tensor, b: Tensor) -> Tensor:
        image = x + torch.einsum("i,i...->...", a, along_x)
        changed = weight + torch.einsum("i,i...->...", b, along_weight)
        arguments = {"x": image, "log_snr": time, "y": given["y"]}
        outputs = functional_call(model, {name: changed}, (), arguments)
        return torch.stack([o.square().mean() for o in outputs])

    start = torch.linspace(-0.1, 0.1, DIRECTIONS, dtype=dtype)
    return function, tuple(t.clone().requires_grad_() for t in (start, time, start))


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_reference_has_every_derivative(norm_type: str) -> None:
    """Against finite differences: backward, forward-mode AD, and backward of backward."""
    model = model_of(norm_type=norm_type).set_implementation("reference")
    function, start = few_variables(model)
    assert torch.autograd.gradcheck(function, start, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, start, fast_mode=True)


def test_reference_is_made_of_operators_of_pytorch() -> None:
    model = model_of().set_implementation("reference")
    function, start = few_variables(model)
    nodes, found = [function(*start).grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in found:
            found.add(node)
            nodes += [following for following, _ in node.next_functions]
    assert len(found) > 100
    assert not any(isinstance(node, BackwardCFunction) for node in found)


def test_reference_has_the_transforms_of_torch_func() -> None:
    model = model_of().set_implementation("reference")
    function, start = few_variables(model)
    at = tuple(t.detach() for t in start)
    ones = tuple(torch.ones_like(t) for t in at)

    def forward(shift: float) -> Tensor:
        return function(*(t + shift for t in at))

    _, tangent = jvp(function, at, ones)
    torch.testing.assert_close(tangent, (forward(1e-5) - forward(-1e-5)) / 2e-5)
    jacobians = jacrev(function, argnums=(0, 1, 2))(*at)
    torch.testing.assert_close(sum(j.sum(1) for j in jacobians), tangent)

    def derivative(a: Tensor) -> Tensor:
        return grad(lambda a: function(a, *at[1:]).sum())(a)

    _, second = jvp(derivative, at[:1], ones[:1])
    step = 1e-5 * ones[0]
    expected = (derivative(at[0] + step) - derivative(at[0] - step)) / 2e-5
    torch.testing.assert_close(second, expected, rtol=1e-5, atol=1e-8)


def test_gradients_of_every_image_at_once() -> None:
    model = model_of().set_implementation("reference")
    given = inputs()
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor, time: Tensor, y: Tensor) -> Tensor:
        arguments = {"x": x[None], "log_snr": time[None], "y": y[None]}
        return functional_call(model, parameters, (), arguments)[-1].square().mean()

    images = (given["x"].double(), given["log_snr"].double(), given["y"])
    detached = {name: p.detach() for name, p in parameters.items()}
    found = vmap(grad(loss), in_dims=(None, 0, 0, 0))(detached, *images)
    for i in range(2):
        one = loss(parameters, *(t[i] for t in images))
        gradients = torch.autograd.grad(one, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            expected = torch.zeros_like(parameters[name]) if gradient is None else gradient
            torch.testing.assert_close(found[name][i], expected, msg=lambda m, n=name: f"{n}: {m}")


def prediction(model: DiMR) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    given = inputs()
    x = given.pop("x").to(next(model.parameters()).dtype)
    return lambda x: model(x, **given)[-1], x


def with_jvp(f: Callable[[Tensor], Tensor], x: Tensor) -> None:
    jvp(f, (x,), (x,))


def with_grad(f: Callable[[Tensor], Tensor], x: Tensor) -> None:
    grad(lambda x: f(x).sum())(x)


def with_vmap(f: Callable[[Tensor], Tensor], x: Tensor) -> None:
    vmap(f)(x[None])


def with_dual_numbers(f: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with forward_ad.dual_level():
        f(forward_ad.make_dual(x, x))


def with_second_derivative(f: Callable[[Tensor], Tensor], x: Tensor) -> None:
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
    first.sum().backward()


NOT_IN_KERNELS = [with_jvp, with_grad, with_vmap, with_dual_numbers, with_second_derivative]
MESSAGE = r'set_implementation\("reference"\)'


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("derivative", NOT_IN_KERNELS)
def test_other_implementations_say_which_one_has_it(
    derivative: Callable[..., None], dtype: torch.dtype
) -> None:
    with pytest.raises(NotImplementedError, match=MESSAGE):
        derivative(*prediction(model_of(dtype)))


@pytest.mark.parametrize("derivative", [with_jvp, with_vmap, with_dual_numbers])
def test_they_also_say_so_without_gradients(derivative: Callable[..., None]) -> None:
    """A tangent that is lost would be a wrong result."""
    function, x = prediction(model_of(torch.float32))
    with torch.no_grad(), pytest.raises(NotImplementedError, match=MESSAGE):
        derivative(function, x)
    weight = torch.ones(4, 1, 3, 3)
    with torch.no_grad(), pytest.raises(NotImplementedError, match=MESSAGE):
        derivative(lambda x: ops.depthwise_conv2d(x, weight), torch.ones(1, 5, 5, 4))


def test_a_first_derivative_with_a_graph_is_the_usual_one() -> None:
    function, x = prediction(model_of(torch.float32))
    x.requires_grad_()
    expected, found = (
        torch.autograd.grad(function(x).sum(), x, create_graph=create_graph)[0]
        for create_graph in (False, True)
    )
    assert found.requires_grad
    assert torch.equal(found, expected)


def test_linear_refuses_an_unknown_implementation() -> None:
    with pytest.raises(ValueError, match="implementation: got 'triton', expected 'auto' or"):
        ops.linear([torch.ones(1, 2)], [torch.ones(3, 2)], [], implementation="triton")
