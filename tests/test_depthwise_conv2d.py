import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_as_accurate

from dimr_fast import _extension, reference
from dimr_fast.ops import depthwise_conv2d

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NO_CPU_LIBRARY = _extension.why_not("cpu")
compiled = pytest.mark.skipif(NO_CPU_LIBRARY is not None, reason=f"cpu library: {NO_CPU_LIBRARY}")
IMPLEMENTATIONS = ["reference", pytest.param("cpu", marks=compiled)]


def make(b, h, w, d, k, *, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(b, h, w, d), (d, 1, k, k), (d,)]
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


def cpu(x, weight, bias=None):
    return depthwise_conv2d(x, weight, bias, implementation="cpu")


def gradients(function):
    """`function` followed by backward of a fixed, uneven sum: the gradients of its inputs."""

    def run(*inputs):
        leaves = [t.detach().requires_grad_() for t in inputs]
        y = function(*leaves)
        scale = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view(y.shape)
        return torch.autograd.grad(y, leaves, scale)

    return run


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("b", "h", "w", "d", "k"),
    [
        (1, 32, 32, 480, 7),
        (2, 16, 16, 240, 7),
        (1, 1, 1, 17, 7),
        (3, 5, 1, 1, 3),
        (2, 9, 13, 50, 3),
        (2, 9, 13, 50, 5),
        (2, 8, 4, 33, 9),
        (1, 7, 11, 15, 11),
    ],
)
def test_cpu_is_as_accurate_as_torch(b, h, w, d, k, dtype):
    x, weight, bias = make(b, h, w, d, k)
    assert_as_accurate(cpu, reference.depthwise_conv2d, x, weight, bias, dtype=dtype)
    assert_as_accurate(cpu, reference.depthwise_conv2d, x, weight, dtype=dtype)


@compiled
@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 3),
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(1, 40),
    st.sampled_from([1, 3, 5, 7, 9, 11]),
    st.sampled_from(DTYPES),
    st.integers(0, 2**16),
)
def test_cpu_on_any_shape(b, h, w, d, k, dtype, seed):
    inputs = make(b, h, w, d, k, seed=seed)
    assert_as_accurate(cpu, reference.depthwise_conv2d, *inputs, dtype=dtype)


STRIDED = {
    "sliced channels": lambda x: x[..., ::2],
    "sliced rows": lambda x: x[:, 1::3],
    "permuted": lambda x: x.permute(0, 2, 1, 3),
    "one image, expanded": lambda x: x[:1].expand(3, -1, -1, -1),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", STRIDED)
def test_strided_inputs(name, implementation):
    x, weight, bias = make(2, 8, 9, 20, 5)
    strided = STRIDED[name](x)
    d = strided.shape[-1]
    weight = weight[:d].permute(0, 1, 3, 2)  # strided too
    bias = bias.repeat_interleave(2)[::2][:d]
    assert_as_accurate(
        lambda x, w, b: depthwise_conv2d(STRIDED[name](x), w, b, implementation=implementation),
        lambda x, w, b: reference.depthwise_conv2d(STRIDED[name](x), w, b),
        x,
        weight,
        bias,
        dtype=torch.float32,
    )


@compiled
def test_result_depends_neither_on_threads_nor_on_fresh_memory():
    x, weight, bias = make(2, 19, 21, 70, 7)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = cpu(x, weight, bias)
        torch.set_num_threads(3)
        torch.use_deterministic_algorithms(True)  # fills fresh tensors with NaN
        assert torch.equal(one, cpu(x, weight, bias))
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_empty_batch(implementation):
    x, weight, bias = (t.requires_grad_() for t in make(0, 4, 5, 6, 3))
    y = depthwise_conv2d(x, weight, bias, implementation=implementation)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert not weight.grad.any()
    assert not bias.grad.any()


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_as_accurate_as_torch(dtype):
    inputs = make(2, 9, 7, 21, 7)
    assert_as_accurate(gradients(cpu), gradients(reference.depthwise_conv2d), *inputs, dtype=dtype)


def test_reference_gradient_is_the_derivative():
    inputs = [t.double().requires_grad_() for t in make(2, 4, 5, 3, 3)]
    assert torch.autograd.gradcheck(depthwise_conv2d, inputs)


@compiled
@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True)]
)
def test_only_the_wanted_gradients(wanted):
    inputs = [t.requires_grad_(flag) for t, flag in zip(make(1, 4, 5, 6, 3), wanted, strict=True)]
    cpu(*inputs).sum().backward()
    assert tuple(t.grad is not None for t in inputs) == wanted


@compiled
@pytest.mark.parametrize("with_bias", [True, False])
def test_opcheck(with_bias):
    x, weight, bias = make(2, 6, 5, 9, 3)
    bias = bias if with_bias else None
    packets = torch.ops.dimr_fast
    torch.library.opcheck(packets.depthwise_conv2d_fwd.default, (x, weight, bias, with_bias))
    for wanted in [(True, False, True), (False, True, False)]:
        arguments = (x, x, weight, with_bias, *wanted)
        torch.library.opcheck(packets.depthwise_conv2d_bwd.default, arguments)


@pytest.mark.parametrize("implementation", ["auto", *IMPLEMENTATIONS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_compiles_as_one_graph_forward_and_backward(implementation, dtype):
    inputs = [t.to(dtype).requires_grad_() for t in make(2, 6, 5, 9, 3)]

    def run(*inputs):
        return depthwise_conv2d(*inputs, implementation=implementation)

    torch._dynamo.reset()
    compiled_run = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected, actual = gradients(run)(*inputs), gradients(compiled_run)(*inputs)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    torch.testing.assert_close(compiled_run(*inputs), run(*inputs), rtol=0, atol=0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast_casts_as_for_a_convolution(implementation):
    x, weight, bias = (t.requires_grad_() for t in make(1, 4, 5, 6, 3))
    with torch.autocast("cpu", torch.bfloat16):
        y = depthwise_conv2d(x.bfloat16(), weight, bias, implementation=implementation)
        wide = depthwise_conv2d(x.double(), weight.double())
    assert y.dtype == torch.bfloat16
    assert wide.dtype == torch.float64
    y.sum().backward()
    assert weight.grad.dtype == torch.float32


def test_meta_tensors_have_only_a_shape():
    x, weight, bias = make(2, 4, 5, 6, 3, device="meta")
    assert depthwise_conv2d(x, weight, bias).shape == x.shape


@compiled
def test_one_graph_serves_every_size():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    run = torch.compile(cpu, fullgraph=True, backend=backend, dynamic=True)
    for size in (5, 7, 9):
        inputs = make(2, size, size + 1, 9, 3)
        torch.testing.assert_close(run(*inputs), cpu(*inputs), rtol=0, atol=0)
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("error", "argument", "change"),
    [
        (TypeError, "x", lambda x, w, b: (x.numpy(), w, b)),
        (TypeError, "x", lambda x, w, b: (x.int(), w.int(), b.int())),
        (ValueError, "x", lambda x, w, b: (x[0], w, b)),
        (ValueError, "x", lambda x, w, b: (x[:, :0], w, b)),
        (TypeError, "weight", lambda x, w, b: (x, None, b)),
        (TypeError, "weight", lambda x, w, b: (x, w.double(), b)),
        (ValueError, "weight", lambda x, w, b: (x, w[:-1], b)),
        (ValueError, "weight", lambda x, w, b: (x, w[..., :2, :2], b)),
        (ValueError, "weight", lambda x, w, b: (x, w[..., :1], b)),
        (ValueError, "weight", lambda x, w, b: (x, w.sum(), b)),
        (ValueError, "weight", lambda x, w, b: (x, w.to("meta"), b)),
        (TypeError, "bias", lambda x, w, b: (x, w, 1.0)),
        (TypeError, "bias", lambda x, w, b: (x, w, b.half())),
        (ValueError, "bias", lambda x, w, b: (x, w, b[1:])),
        (ValueError, "bias", lambda x, w, b: (x, w, b.to("meta"))),
    ],
)
def test_wrong_arguments_are_named(error, argument, change):
    with pytest.raises(error, match=f"^{argument}: got .*expected"):
        depthwise_conv2d(*change(*make(1, 4, 5, 6, 3)))


def test_an_implementation_that_cannot_run_says_why():
    x, weight, bias = make(1, 4, 5, 6, 3)
    with pytest.raises(ValueError, match=r"implementation: 'cuda' .* x is on cpu"):
        depthwise_conv2d(x, weight, bias, implementation="cuda")
    with pytest.raises(ValueError, match=r"implementation: 'cpu' .* x is float64"):
        depthwise_conv2d(x.double(), weight.double(), implementation="cpu")
    with pytest.raises(ValueError, match="implementation: got 'fast'"):
        depthwise_conv2d(x, weight, bias, implementation="fast")


@compiled
@pytest.mark.parametrize(
    "change",
    [
        lambda x, w, b: (x[0], w, b),
        lambda x, w, b: (x.transpose(2, 3), w, b),
        lambda x, w, b: (x, w[1:], b),
        lambda x, w, b: (x, w[..., :2].contiguous(), b),
        lambda x, w, b: (x, w.transpose(2, 3), b),
        lambda x, w, b: (x, w.half(), b),
        lambda x, w, b: (x, w, b[1:]),
        lambda x, w, b: (x, w, b.double()),
        lambda x, w, b: (x.double(), w.double(), b.double()),
    ],
)
def test_the_bare_operator_refuses_what_it_cannot_read(change):
    arguments = change(*make(1, 4, 5, 6, 3))
    with pytest.raises(RuntimeError, match=r"(x|weight|bias): "):
        torch.ops.dimr_fast.depthwise_conv2d_fwd(*arguments, False)


@compiled
@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("dy", lambda dy, x, w: (dy[:, 1:], x, w)),
        ("dy", lambda dy, x, w: (dy.transpose(2, 3).contiguous().transpose(2, 3), x, w)),
        ("dy", lambda dy, x, w: (dy.half(), x, w)),
        ("x", lambda dy, x, w: (dy, x[0], w)),
        ("weight", lambda dy, x, w: (dy, x, w[1:])),
        ("weight", lambda dy, x, w: (dy, x, w.double())),
    ],
)
def test_the_bare_gradient_refuses_what_it_cannot_read(argument, change):
    x, weight, _ = make(1, 4, 5, 6, 3)
    with pytest.raises(RuntimeError, match=rf"{argument}: "):
        torch.ops.dimr_fast.depthwise_conv2d_bwd(*change(x, x, weight), False, True, True, True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_is_as_accurate_as_torch(dtype):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if _extension.why_not("cuda"):
        pytest.skip(f"cuda library: {_extension.why_not('cuda')}")

    def cuda(x, weight, bias):
        return depthwise_conv2d(x, weight, bias, implementation="cuda")

    for shape in [(2, 32, 32, 480, 7), (1, 1, 1, 17, 7), (2, 9, 13, 50, 3), (0, 4, 4, 8, 3)]:
        inputs = make(*shape, device="cuda")
        assert_as_accurate(cuda, reference.depthwise_conv2d, *inputs, dtype=dtype)
