"""`depthwise_conv2d` on a GPU: accuracy, streams, graphs, devices."""

import pytest
import torch

from dimr_fast import _extension, reference
from dimr_fast.ops import depthwise_conv2d
from tests.support.oracle import assert_as_accurate, with_gradients

NO_LIBRARY = _extension.why_not("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(NO_LIBRARY is not None, reason=f"cuda library: {NO_LIBRARY}"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def exact_float32():
    """Switch off TF32, so that the reference computes in float32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def make(b, h, w, d, k, device="cuda"):
    generator = torch.Generator().manual_seed(0)
    shapes = [(b, h, w, d), (d, 1, k, k), (d,)]
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


def ours(x, weight, bias):
    return depthwise_conv2d(x, weight, bias, residual=True, implementation="cuda")


def theirs(x, weight, bias):
    return reference.depthwise_conv2d(x, weight, bias) + x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("b", "h", "w", "d", "k"),
    [
        (8, 32, 32, 480, 7),
        (64, 32, 32, 480, 7),
        (1, 32, 32, 576, 7),
        (4, 64, 64, 240, 7),
        (2, 17, 19, 50, 3),
        (2, 17, 19, 50, 5),
        (2, 17, 19, 24, 9),
        (2, 17, 19, 24, 11),
        (2, 17, 19, 24, 13),
        (1, 1, 1, 17, 7),
        (0, 4, 4, 8, 7),
    ],
)
def test_as_accurate_as_torch(b, h, w, d, k, dtype, poisoned_memory):
    inputs = make(b, h, w, d, k)
    assert_as_accurate(with_gradients(ours), with_gradients(theirs), *inputs, dtype=dtype)


@pytest.mark.parametrize("first", [8, 3])
def test_a_slice_of_channels(first):
    def sliced(x, weight, bias):
        wide = torch.nn.functional.pad(x, (first, 5), value=torch.nan)
        return ours(wide[..., first : first + x.shape[-1]], weight, bias)

    inputs = make(3, 20, 21, 48, 7)
    assert_as_accurate(with_gradients(sliced), with_gradients(theirs), *inputs, dtype=torch.half)


def test_the_same_each_time():
    run = with_gradients(ours)
    inputs = [t.bfloat16() for t in make(16, 32, 32, 480, 7)]
    for a, b in zip(run(*inputs), run(*inputs), strict=True):
        assert torch.equal(a, b)


def directions(x, weight, bias):
    y = torch.ops.dimr_fast.depthwise_conv2d_fwd(x, weight, bias, True)
    return y, *torch.ops.dimr_fast.depthwise_conv2d_bwd(y, x, weight, True, True, True, True)


def test_captured_in_a_graph():
    x, weight, bias = make(4, 32, 32, 96, 7)
    directions(x, weight, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = directions(x, weight, bias)
    x.copy_(torch.randn_like(x))
    graph.replay()
    for a, b in zip(captured, directions(x, weight, bias), strict=True):
        assert torch.equal(a, b)


def test_on_the_current_stream():
    x, weight, bias = make(4, 32, 32, 96, 7)
    expected = directions(2 * x, weight, bias)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Earlier work keeps this stream busy: work on another stream would run too early.
        torch.cuda._sleep(50_000_000)
        x *= 2
        found = directions(x, weight, bias)
    stream.synchronize()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_on_the_device_of_its_arguments():
    if torch.cuda.device_count() < 2:
        pytest.skip("only one CUDA device")
    expected = directions(*make(2, 16, 16, 96, 7, device="cuda:0"))
    with torch.cuda.device(0):
        found = directions(*make(2, 16, 16, 96, 7, device="cuda:1"))
    for a, b in zip(found, expected, strict=True):
        assert a.device == torch.device("cuda:1")
        torch.testing.assert_close(a.cpu(), b.cpu())


def test_past_two_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("less than 20 GiB of free memory")
    b, h, w, d = 2200, 32, 32, 960
    x = torch.zeros(b, h, w, d, dtype=torch.bfloat16, device="cuda")
    last, weight, bias = (t.bfloat16() for t in make(1, h, w, d, 7))
    x[-1:] = last
    found = directions(x, weight, bias)
    y, dx, dweight, _ = directions(last, weight, bias)
    assert torch.equal(found[0][-1:], y)
    assert torch.equal(found[1][-1:], dx)
    assert found[2].shape == dweight.shape


@pytest.mark.parametrize(
    "change",
    [
        lambda x, w, b: (x[0], w, b),
        lambda x, w, b: (x.transpose(2, 3), w, b),
        lambda x, w, b: (x, w[1:], b),
        lambda x, w, b: (x, w[..., :2].contiguous(), b),
        lambda x, w, b: (x, w.half(), b),
        lambda x, w, b: (x, w, b[1:]),
        lambda x, w, b: (x, w, b.cpu()),
        lambda x, w, b: (x.double(), w.double(), b.double()),
    ],
)
def test_the_bare_operator_refuses_what_it_cannot_read(change):
    arguments = change(*make(1, 4, 5, 6, 3))
    with pytest.raises(RuntimeError, match=r"(x|weight|bias): "):
        torch.ops.dimr_fast.depthwise_conv2d_fwd(*arguments, False)
