"""The kernels of `upsample_add`, compiled ahead of time."""

from functools import partial
from importlib import metadata

import pytest
import torch

from tests.support.aot import TARGETS, Launch, compiled, meta
from tests.support.oracle import skip_module_without_triton

skip_module_without_triton()

OLD_TRITON = metadata.version("triton").startswith("3.6.")


# Images, size of the low branch, number and width of its features, width of the next branch.
# Triton compiles arguments that are 1 as constants: hence "ones".
CASCADES = {
    "XL/2R": (4, 16, 40, 960, 480, TARGETS),
    "G/2R": (4, 16, 58, 1152, 576, ("sm_90",)),
    "XL/3R": (4, 32, 22, 480, 240, ("sm_90",)),
    "ones": (1, 1, 2, 8, 8, ("sm_90",)),
}


def aot_launches() -> list[Launch]:
    from dimr_fast.kernels import td_layer_norm, upsample_add

    launches = []
    for name, (images, size, slots, width, out, targets) in CASCADES.items():
        low, wide = size * size, torch.float32
        pieces = [
            meta(images, low, width),
            *[meta(images, 1 + low, width)[:, 1:]] * (slots - 1),
        ]
        buffer = meta(images, low, slots * width)
        n, rows = meta(images, slots * width, dtype=wide), meta(images, low, dtype=wide)
        x, projected = meta(images, 2 * size, 2 * size, out), meta(images, size, size, 4 * out)
        m, out_rows = meta(images, out, dtype=wide), meta(images, 4 * low, dtype=wide)
        calls = {
            "norm": partial(td_layer_norm.launch_fwd, n, n, pieces, None, torch.bfloat16),
            "norm backward": partial(
                td_layer_norm.launch_bwd, buffer, None, pieces, n, n, rows, rows, True, True
            ),
            "add": partial(upsample_add.launch_fwd, x, projected, m, m),
            "add backward": partial(
                upsample_add.launch_bwd, x, projected, m, out_rows, out_rows, images
            ),
        }
        launches += [Launch(f"{name} {part}", call, targets) for part, call in calls.items()]
    return launches


@pytest.mark.slow
@pytest.mark.versions
def test_compiled_kernels_do_not_spill() -> None:
    for kernel in compiled("tests.ops.test_upsample_add_compiled"):
        if kernel.target == "gfx942" and kernel.kernel.startswith("pieces_"):
            # The pieces' addresses need more scalar registers than there are. Scalar registers
            # spill into lanes of a vector register, not into memory; no vector register spills.
            continue
        if OLD_TRITON and (kernel.target, kernel.kernel) == ("sm_100", "pieces_fwd_kernel"):
            # Triton 3.6 uses two registers more than the 128 there are; 3.8 does not.
            assert kernel.spilled <= 8, kernel
            continue
        assert kernel.spilled == 0, kernel
        assert kernel.count("LDL") == kernel.count("STL") == 0, kernel


@pytest.mark.slow
def test_features_move_in_16_byte_pieces() -> None:
    """All loads and stores do, except those of statistics (one number per row)."""
    for kernel in compiled("tests.ops.test_upsample_add_compiled"):
        if kernel.target == "gfx942" or kernel.kernel == "_sum_partials_kernel":
            continue
        if kernel.launch.startswith("ones"):
            continue
        means = kernel.kernel == "pieces_bwd_means_kernel"
        # Statistics of two rows can be one load of 8 bytes.
        assert kernel.count("LDG.E.64") <= (2 if means else 0), kernel
        # Stores with the hint "evict first" (EF) count as well.
        assert kernel.count("STG.E.64") == kernel.count("STG.E.EF.64") == 0, kernel
        assert kernel.opcodes["LDG.E.128"] >= 2, kernel
        if not means:
            assert kernel.count("STG.E.128") + kernel.count("STG.E.EF.128") >= 1, kernel
