import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dimr_fast import reference
from dimr_fast.ops import depthwise_conv2d
from tests.support.cpu_library import needs_cpu, on_threads
from tests.support.oracle import assert_as_accurate, with_gradients

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IMPLEMENTATIONS = ["reference", pytest.param("cpu", marks=needs_cpu)]


def make(b, h, w, d, k, *, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(b, h, w, d), (d, 1, k, k), (d,)]
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


def cpu(x, weight, bias=None):
    return depthwise_conv2d(x, weight, bias, implementation="cpu")


def cpu_added(x, weight, bias=None):
    return depthwise_conv2d(x, weight, bias, residual=True, implementation="cpu")


def plainly_added(x, weight, bias=None):
    return x + reference.depthwise_conv2d(x, weight, bias)


@needs_cpu
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


STRIDED = {
    "sliced channels": lambda x: x[..., ::2],
    "sliced rows": lambda x: x[:, 1::3],
    "permuted": lambda x: x.permute(0, 2, 1, 3),
    "one image, expanded": lambda x: x[:1].expand(3, -1, -1, -1),
}


@needs_cpu
@settings(max_examples=60)
@given(
    st.integers(1, 3),
    st.integers(2, 20),
    st.integers(1, 20),
    st.integers(1, 40),
    st.sampled_from([1, 3, 5, 7, 9, 11]),
    st.sampled_from(DTYPES),
    st.sampled_from([None, *STRIDED]),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_cpu_on_any_shape(b, h, w, d, k, dtype, layout, residual, seed):
    x, *_ = make(b, h, w, d, k, seed=seed)
    view = STRIDED[layout] if layout else lambda x: x
    _, weight, bias = make(1, 1, 1, view(x).shape[-1], k, seed=seed)
    ours, theirs = (cpu_added, plainly_added) if residual else (cpu, reference.depthwise_conv2d)

    def laid_out(function):
        return with_gradients(lambda x, weight, bias: function(view(x), weight, bias))

    assert_as_accurate(laid_out(ours), laid_out(theirs), x, weight, bias, dtype=dtype)


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


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("b", "h", "w", "d", "k"),
    [
        (2, 16, 32, 32, 3),  # read in place: whole blocks and tiles
        (2, 5, 16, 48, 5),
        (1, 3, 48, 16, 7),
        (2, 9, 8, 24, 7),  # half a tile, half a block more
        (1, 2, 3, 8, 7),  # smaller than the filter
        (3, 6, 7, 33, 3),
        (2, 9, 33, 17, 9),  # any size of filter
        (9, 4, 4, 70, 5),
    ],
)
def test_every_instruction_set(instruction_set, b, h, w, d, k, dtype):
    inputs = make(b, h, w, d, k)
    for ours, theirs in [(cpu, reference.depthwise_conv2d), (cpu_added, plainly_added)]:
        ours, theirs = with_gradients(ours), with_gradients(theirs)
        assert_as_accurate(ours, theirs, *inputs, dtype=dtype)


@needs_cpu
@pytest.mark.parametrize("shape", [(1, 32, 32, 240, 7), (2, 32, 32, 480, 7), (2, 64, 64, 240, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_at_the_presets_sizes(shape, dtype):
    theirs = with_gradients(plainly_added)
    assert_as_accurate(with_gradients(cpu_added), theirs, *make(*shape), dtype=dtype)


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 19, 21, 70, 7), (1, 32, 32, 48, 3)])
def test_result_depends_neither_on_threads_nor_on_fresh_memory(shape, dtype, poisoned_memory):
    inputs = [t.to(dtype) for t in make(*shape)]
    one, three = (on_threads(n, lambda: with_gradients(cpu_added)(*inputs)) for n in (1, 3))
    assert all(map(torch.equal, one, three))


@needs_cpu
def test_autocast_does_not_round_the_residual():
    x, weight, bias = make(2, 6, 16, 32, 7)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = cpu_added(x, weight, bias), plainly_added(x, weight, bias)
    assert ours.dtype == theirs.dtype == torch.float32
    exact = plainly_added(x.double(), weight.double(), bias.double())
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()
    # the convolution itself is rounded as in bf16
    assert (ours - exact).abs().max() > 1e-4


@needs_cpu
def test_inference_mode():
    inputs = make(2, 6, 5, 9, 3)
    with torch.inference_mode():
        y = cpu_added(*inputs)
    assert torch.equal(y, cpu_added(*inputs))


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


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_as_accurate_as_torch(dtype):
    inputs = make(2, 9, 7, 21, 7)
    assert_as_accurate(
        with_gradients(cpu), with_gradients(reference.depthwise_conv2d), *inputs, dtype=dtype
    )


def test_reference_gradient_is_the_derivative():
    inputs = [t.double().requires_grad_() for t in make(2, 4, 5, 3, 3)]
    assert torch.autograd.gradcheck(depthwise_conv2d, inputs)


@needs_cpu
@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True)]
)
def test_only_the_wanted_gradients(wanted):
    inputs = [t.requires_grad_(flag) for t, flag in zip(make(1, 4, 5, 6, 3), wanted, strict=True)]
    cpu(*inputs).sum().backward()
    assert tuple(t.grad is not None for t in inputs) == wanted


@needs_cpu
@pytest.mark.parametrize("with_bias", [True, False])
def test_opcheck(with_bias):
    x, weight, bias = make(2, 6, 5, 9, 3)
    bias = bias if with_bias else None
    packets = torch.ops.dimr_fast
    torch.library.opcheck(packets.depthwise_conv2d_fwd.default, (x, weight, bias, with_bias))
    for wanted in [(True, False, True), (False, True, False)]:
        arguments = (x, x, weight, with_bias, *wanted)
        torch.library.opcheck(packets.depthwise_conv2d_bwd.default, arguments)


@pytest.mark.versions
@pytest.mark.parametrize("implementation", ["auto", *IMPLEMENTATIONS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_compiles_as_one_graph_forward_and_backward(implementation, dtype):
    inputs = [t.to(dtype).requires_grad_() for t in make(2, 6, 5, 9, 3)]

    def run(*inputs):
        return depthwise_conv2d(*inputs, implementation=implementation)

    torch._dynamo.reset()
    compiled_run = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected, actual = with_gradients(run)(*inputs), with_gradients(compiled_run)(*inputs)
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


@needs_cpu
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


@needs_cpu
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


@needs_cpu
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
