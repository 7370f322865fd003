"""The CUDA kernels of `depthwise_conv2d`, emulated on the host and as compiled."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dimr_fast import _extension, reference
from tests.support import cuda_resources
from tests.support.cuda_resources import ARCHITECTURES, DTYPES, LIBRARY, TILED, count
from tests.support.emulation import H100, Emulation, Unavailable, build
from tests.support.oracle import assert_as_accurate


def reference_fwd(x, weight, bias, residual):
    y = reference.depthwise_conv2d(x, weight, bias)
    return y + x if residual else y


def reference_bwd(dy, x, weight, residual):
    """Return dx, dweight and dbias."""
    bias = weight.new_zeros(weight.shape[0])
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    return torch.autograd.grad(reference_fwd(*leaves, residual), leaves, dy)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Use one thread: the reference's tensors are small, and more threads would only wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    try:
        return build(tmp_path_factory.mktemp("cuda_emulation"))
    except Unavailable as reason:
        pytest.skip(str(reason))


def contiguous(x):
    return x.contiguous()


def channels_of_wider(x, before=8, after=8):
    """Return the same values as a slice of channels of a wider buffer that is NaN elsewhere."""
    b, h, w, d = x.shape
    wide = x.new_full((b, h, w, before + d + after), torch.nan)
    wide[..., before : before + d] = x
    return wide[..., before : before + d]


def shifted_channels(x):
    """Return x with strides of whole vectors, but with no vector aligned."""
    return channels_of_wider(x, before=2, after=6)


def unaligned_channels(x):
    return channels_of_wider(x, before=3, after=2)


def every_other_pixel(x):
    b, h, w, d = x.shape
    wide = x.new_full((b, 2 * h, 2 * w + 1, d), torch.nan)
    wide[:, ::2, 1::2] = x
    return wide[:, ::2, 1::2]


def columns_first(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


LAYOUTS = [
    contiguous,
    channels_of_wider,
    shifted_channels,
    unaligned_channels,
    every_other_pixel,
    columns_first,
]


def make(b, h, w, d, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dy, x = (torch.randn(b, h, w, d, generator=generator) for _ in range(2))
    weight, bias = (torch.randn(s, generator=generator) for s in ((d, 1, k, k), (d,)))
    return dy, x, weight, bias


def emulate(program, k):
    """Return an emulated H100, or a smaller GPU for the plain kernels, which have more threads."""
    return Emulation(program, H100 if k in TILED else 4)


def check(emulation, shape, dtype, layout=contiguous, residual=True, has_bias=True):
    dy, x, weight, bias = make(*shape)
    bias = bias if has_bias else None

    def fwd(x, weight, bias=None):
        return emulation.fwd(layout(x), weight, bias, residual)

    def fwd_reference(x, weight, bias=None):
        return reference_fwd(x, weight, bias, residual)

    assert_as_accurate(fwd, fwd_reference, x, weight, bias, dtype=dtype)

    found = []

    def input_gradient(dy, x, weight):
        found[:] = emulation.bwd(layout(dy), layout(x), weight, residual)
        return found[0]

    def input_gradient_reference(dy, x, weight):
        return reference_bwd(dy, x, weight, residual)[0]

    assert_as_accurate(input_gradient, input_gradient_reference, dy, x, weight, dtype=dtype)
    # The others are float32, so they are judged as float32 sums of the same, quantised, values.
    exact = [t.to(dtype).float() for t in (dy, x, weight)]
    assert_as_accurate(
        lambda *_: tuple(found[1:]),
        lambda *inputs: reference_bwd(*inputs, residual)[1:],
        *exact,
        dtype=torch.float32,
    )


NO_SASS = cuda_resources.why_not()
compiled = pytest.mark.skipif(NO_SASS is not None, reason=str(NO_SASS))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 3, 5, 7, 9, 11, 13])
@pytest.mark.parametrize(("h", "w", "d"), [(1, 1, 1), (9, 13, 24), (4, 2, 17)])
def test_every_kernel_and_dtype(program, h, w, d, k, dtype):
    check(emulate(program, k), (2, h, w, d, k), dtype)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("d", "k"), [(24, 7), (40, 5), (8, 13)])
def test_every_layout(program, d, k, dtype, layout):
    check(emulate(program, k), (2, 6, 11, d, k), dtype, layout, residual=False)


@pytest.mark.parametrize(
    ("b", "h", "w", "d", "k"),
    [
        (1, 32, 32, 32, 7),  # whole tiles
        (2, 8, 33, 16, 7),  # a column more than the tiles
        (1, 3, 70, 8, 7),  # lower than the kernel, several tiles wide
        (1, 30, 2, 48, 7),  # narrower than the kernel
        (1, 40, 5, 33, 3),  # a channel more than the lanes
        (1, 12, 19, 20, 9),
        (1, 25, 17, 12, 11),
    ],
)
def test_edges_of_tiles(program, b, h, w, d, k):
    check(Emulation(program), (b, h, w, d, k), torch.bfloat16)


@pytest.mark.parametrize(("k", "processors"), [(7, 1), (7, 3), (7, 1000), (13, 3)])
def test_any_number_of_processors(program, k, processors):
    """With few, each block sums several segments; with many, segments have one or two rows."""
    emulation = Emulation(program, processors)
    check(emulation, (31, 8, 5, 9, k), torch.float32)
    blocks = emulation.launches[1].blocks
    assert k != 7 or (blocks < 31 if processors < 3 else blocks >= 31)


@settings(max_examples=20)
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 20), st.integers(1, 20), st.integers(1, 40)),
    st.sampled_from(TILED),
    st.sampled_from(DTYPES),
    st.sampled_from([1, 4, H100]),
)
def test_any_shape(program, shape, k, dtype, processors):
    check(Emulation(program, processors), (*shape, k), dtype)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("k", [7, 13])
def test_bias_and_residual(program, k, has_bias, residual):
    check(emulate(program, k), (1, 5, 6, 8, k), torch.float16, has_bias=has_bias, residual=residual)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_need_no_alignment(program, dtype):
    check(Emulation(program, weight_offset=1), (1, 5, 6, 16, 7), dtype)


def test_one_image_for_all(program):
    """The batch has a stride of zero."""
    dy, x, weight, _ = make(3, 5, 6, 8, 7)
    shared = x[:1].expand(x.shape)
    for a, b in zip(
        Emulation(program).bwd(dy, shared, weight, False),
        Emulation(program).bwd(dy, shared.contiguous(), weight, False),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_of_nothing_the_gradients_are_zero(program):
    dy, x, weight, bias = make(0, 4, 5, 6, 7)
    assert Emulation(program).fwd(x, weight, bias, True).shape == x.shape
    dx, dweight, dbias = Emulation(program).bwd(dy, x, weight, True)
    assert dx.shape == x.shape
    assert dweight.shape == weight.shape
    assert not dweight.any()
    assert not dbias.any()


def test_infinities_reach_only_their_neighbours(program):
    """Padding and rows of other segments are not multiplied: 0 · inf would be NaN."""
    _, x, weight, bias = make(1, 24, 12, 8, 7)
    x[0, 10, 4, 3] = torch.inf
    y = Emulation(program, processors=64).fwd(x, weight, bias, False)
    hit = torch.zeros_like(x, dtype=torch.bool)
    hit[0, 7:14, 1:8, 3] = True
    assert torch.equal(~y.isfinite(), hit)


def test_gradients_are_the_same_each_time(program):
    dy, x, weight, _ = make(3, 9, 10, 16, 7)
    first, second = (Emulation(program).bwd(dy, x, weight, True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_small_batches_are_cut_into_more_blocks(program):
    """One image uses most of an H100; many images are not split, which would read rows twice."""

    def blocks(batch, h, w, d):
        emulation = Emulation(program)
        _, x, weight, bias = make(batch, h, w, d, 7)
        emulation.fwd(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), True)
        return emulation.launches[0].blocks

    assert blocks(1, 32, 32, 480) >= 100
    assert blocks(1, 8, 8, 480) >= 60
    assert blocks(40, 16, 4, 480) == 40 * 15


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", TILED)
def test_shared_memory_is_as_recorded(program, k, dtype):
    recorded = cuda_resources.recorded()["shared"]
    assert cuda_resources.shared_memory(program, k, dtype) == recorded[f"{_name(dtype)} {k}"]


def _name(dtype):
    return str(dtype).removeprefix("torch.")


@compiled
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_is_spilled(architecture):
    """No stack is used; registers allow three blocks per multiprocessor, two with kernel 11."""
    kernels = examine(architecture)
    assert len(kernels) == 2 * len(DTYPES) * (len(TILED) + 1) + 1
    for name, kernel in kernels.items():
        assert kernel.stack == 0, name
        assert kernel.registers <= (255 if name.endswith(" 11") else 168), name
        if name.endswith(tuple(f" {k}" for k in TILED)):
            assert kernel.opcodes["LDGSTS.E.BYPASS.128"] > 0, name
    if _extension.build_facts()["cuda"] == cuda_resources.recorded()["nvcc"]:
        found = {name: kernel.registers for name, kernel in kernels.items()}
        assert found == cuda_resources.recorded()["registers"][architecture]


@compiled
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_nearly_all_multiplication(architecture, dtype):
    """Count the loops of the presets' kernels; they include slow paths that a row does not take."""
    fwd, weight = (examine(architecture)[f"{op} {_name(dtype)} 7"] for op in ("fwd", "weight"))
    products = 7 * 7 * 8
    for kernel in (fwd, weight):
        assert count(kernel.loop, "FFMA") == products
        # The products move the sums from row to row; move instructions would be 48 or more.
        assert count(kernel.loop, "MOV") < 24
    assert products / fwd.loads > 18
    assert products / fwd.loop.total() > 0.62
    # Each of the 7 places of dy has 8 loads in the code; a row executes one set of them.
    assert products / (weight.loads - 6 * 8) > 12


def examine(architecture):
    if architecture not in _sass_architectures():
        pytest.skip(f"the library is compiled for {' '.join(_sass_architectures())}")
    return cuda_resources.examine(LIBRARY, architecture)


def _sass_architectures():
    built = _extension.build_facts()["cuda_architectures"].split()
    return ["sm_" + a.removesuffix("+PTX").replace(".", "") for a in built]
