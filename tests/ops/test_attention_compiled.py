"""The kernels of `attention`, compiled ahead of time."""

import re

import pytest
import torch

from tests.support.aot import Compiled, Launch, compiled, meta
from tests.support.oracle import skip_module_without_triton

skip_module_without_triton()

BOTH = ("sm_80", "sm_90")
# head_dim, tokens, dtype, targets
COMPILED: list[tuple[int, int, torch.dtype, tuple[str, ...]]] = [
    (60, 257, torch.bfloat16, (*BOTH, "sm_100")),
    (72, 257, torch.bfloat16, (*BOTH, "sm_100")),
    (80, 257, torch.bfloat16, ("sm_90",)),
    (96, 257, torch.bfloat16, ("sm_90",)),
    (128, 257, torch.bfloat16, BOTH),
    (60, 257, torch.float16, ("sm_90",)),
    (64, 257, torch.float16, ("sm_90",)),
    (72, 257, torch.float16, ("sm_90",)),
    (60, 300, torch.bfloat16, ("sm_80", "gfx942")),
    # One token: Triton compiles an argument that is 1 as a constant.
    (64, 1, torch.bfloat16, ("sm_90",)),
    (60, 257, torch.float32, ("sm_90",)),
    (128, 257, torch.float32, ("sm_90",)),
]


def aot_launches() -> list[Launch]:
    from dimr_fast.kernels.attention import launch_bwd, launch_fwd

    launches = []
    for head_dim, tokens, dtype, targets in COMPILED:
        qkv = meta(4, tokens, 3 * 16 * head_dim, dtype=dtype)
        out = meta(4, tokens, 16 * head_dim, dtype=dtype)
        parts = meta(4, 16, 2, tokens, dtype=torch.float32)
        name = f"head_dim {head_dim}, {tokens} tokens, {dtype}"
        launches += [
            Launch(name, lambda qkv=qkv: launch_fwd(qkv, 16), targets),
            Launch(name, lambda o=out, q=qkv, p=parts: launch_bwd(o, q, o, p, 16), targets),
        ]
    return launches


def head_dim_of(kernel: Compiled) -> int:
    return int(kernel.launch.split()[1].rstrip(","))


def of(target: str, *dtypes: torch.dtype) -> list[Compiled]:
    """Return the kernels compiled for more than one token, which multiply matrices."""
    kernels = [
        kernel
        for kernel in compiled("tests.ops.test_attention_compiled")
        if kernel.target == target
        and kernel.launch.endswith(tuple(map(str, dtypes)))
        and ", 1 tokens" not in kernel.launch
    ]
    assert kernels
    return kernels


@pytest.mark.slow
@pytest.mark.versions
def test_compiled_kernels_neither_spill_nor_outgrow_shared_memory() -> None:
    shared = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}
    for kernel in compiled("tests.ops.test_attention_compiled"):
        assert kernel.spilled == 0, kernel
        assert kernel.count("LDL") == kernel.count("STL") == 0, kernel
        assert kernel.shared <= 1024 * shared[kernel.target], kernel


@pytest.mark.slow
def test_matrix_kernels_use_the_tensor_cores() -> None:
    for kernel in of("sm_90", torch.bfloat16, torch.float16):
        # At 128 the tiles of backward have 32 rows, as larger ones spill on sm_80 under Triton 3.6.
        narrow = head_dim_of(kernel) == 128 and "bwd" in kernel.kernel
        assert (kernel.count("HGMMA") > 0) != narrow, kernel
        # The first token's tile is narrower than a warp group.
        assert kernel.count("HMMA") > 0, kernel
    for kernel in of("sm_80", torch.bfloat16):
        assert kernel.count("HMMA") > 0, kernel
    for kernel in of("sm_100", torch.bfloat16):
        assert kernel.count("UTCHMMA") > 0, kernel


@pytest.mark.slow
def test_head_dim_72_is_multiplied_as_80() -> None:
    """Compare the columns × depth that a warp group multiplies per loop step, and before the loop.

    A product of a tile of S tokens and a head of width W counts S·W, whether W is the columns or
    the depth. The tile of the first token is processed before the loop.
    """
    from dimr_fast.kernels.attention_tiles import FIRST_ROWS, tile_widths

    products = {"fwd": (2, 64), "bwd_dq": (3, 32), "bwd_dkdv": (4, 32)}
    for kernel in of("sm_90", torch.bfloat16, torch.float16):
        head_dim = head_dim_of(kernel)
        if head_dim not in (60, 64, 72):
            continue
        name = kernel.kernel.removeprefix("attention_").removesuffix("_kernel")
        count, step = products[name]
        shapes = {
            tuple(map(int, re.findall(r"\d+", opcode.split(".")[1]))): number
            for opcode, number in kernel.opcodes.items()
            if opcode.startswith("HGMMA")
        }
        assert max(columns for _, columns, _ in shapes) == 64, kernel
        work = sum(columns * depth * number for (_, columns, depth), number in shapes.items())
        tokens = FIRST_ROWS.value + step
        assert work == count * tokens * sum(tile_widths(head_dim)), kernel


@pytest.mark.slow
def test_features_move_in_the_widest_pieces_their_rows_allow() -> None:
    """A head's row moves in 8 bytes at head_dim 60 (120 bytes), otherwise in 16.

    At 72, 80 and 96 the second tile, 16 or 32 wide, may have only 8 bytes per thread. Only
    statistics (4 bytes per row) and the rows of a single token move less at once.
    """
    pieces = {60: {"64"}, 64: {"128"}, 128: {"128"}}
    for kernel in of("sm_90", torch.bfloat16, torch.float16):
        for opcode in ("LDG", "STG"):
            found = {name.split(".")[-1] for name in kernel.opcodes if name.startswith(opcode)}
            found -= {"E", "U16", "LDGDEPBAR"}
            wide = pieces.get(head_dim_of(kernel), {"128", "64"})
            assert found, kernel
            # The statistics, 16 bytes per query.
            others = {"128"} if opcode == "LDG" and "dkdv" in kernel.kernel else set()
            assert found <= wide | others, kernel
            assert max(wide, key=len) in found, kernel
