"""List the kernel launches whose times `predict.py` predicts, with the work of each.

They are the launches of a training step of XL/2R in bfloat16. Operator, shape and pass are named as
in the rows of `ops/bench_<operator>.py`, which time them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from dimr_fast.kernels import attention, gated_gelu, td_layer_norm, td_parameters, td_rms_norm
from dimr_fast.kernels import upsample_add as cascade_add
from dimr_fast.kernels.configuration import configuration
from dimr_fast.kernels.rows import chunks

BATCH = 64
FP8, BF16, FP32 = 1, 2, 4


@dataclass(frozen=True)
class Work:
    """The work of one launch.

    `bytes` move to or from memory. `trips` are the iterations of each loop, in order of address and
    averaged over the programs. `reread` bytes are read a second time; each program re-reads
    `reread_per_program` bytes, so that they may have left the L2 cache. A further `cached` bytes
    come from the L2 cache.
    """

    bytes: float
    trips: Sequence[float] = ()
    reread: float = 0
    reread_per_program: float = 0
    cached: float = 0
    flops: float = 0


@dataclass(frozen=True)
class LaunchCase:
    """A call of launchers, with the work of its launches by kernel, in launch order.

    `products` are the FLOP of matrix products that a library computes between the launches.
    `targets` are the architectures to compile for, `oldest` the first that has what they need.
    """

    operator: str
    case: str
    x: tuple[int, ...]
    direction: str
    call: Callable[[], Any]
    work: Mapping[str, Sequence[Work]]
    products: float = 0
    targets: tuple[str, ...] = ("sm_90",)
    oldest: int = 80

    @property
    def name(self) -> str:
        """Return a name that no other case has."""
        return f"{self.operator}, {self.case}, {'×'.join(map(str, self.x))}, {self.direction}"


def cases() -> list[LaunchCase]:
    """Return the cases of all operators."""
    return [*_norms(), *_gates(), *_quantizing(), *_attentions(), *_cascades(), *_parameters()]


def aot_launches() -> list[LaunchCase]:
    """Return the cases to `tests/support/aot.py`, which compiles them ahead of time."""
    return cases()


def _meta(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16, device="meta")


def _fp32(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.float32, device="meta")


def _constants(kernel: str, size: int) -> Mapping[str, int]:
    return configuration(kernel, size, torch.device("meta"))


def run_in_sequence(*calls: Callable[[], Any]) -> None:
    """Call the launchers of a case one after another."""
    for call in calls:
        call()


def _sum_partials(width: int, count: int, times: int) -> Work:
    """Return the work of summing `count` rows for each of `times`."""
    return Work(
        FP32 * times * width * (count + 1), [-(-count // _constants("sum_partials", width)["ROWS"])]
    )


def _norms() -> Iterator[LaunchCase]:
    for operator, times in (("td_rms_norm", BATCH), ("rms_norm", 1)):
        for branch, tokens, width in (("transformer", 257, 960), ("convolutions", 1024, 480)):
            x, scale, rms = _meta(BATCH, tokens, width), _fp32(times, width), _fp32(BATCH, tokens)
            size = BF16 * x.numel()
            scales = FP32 * x.numel() / _constants("td_rms_norm_fwd", width)["ROWS"]
            back = _constants("td_rms_norm_bwd", width)
            rows = back["ROWS"]
            programs, per_program = chunks(
                BATCH, tokens, rows, td_rms_norm.BACKWARD_WARPS // back["num_warps"]
            )
            partials = FP32 * BATCH * programs * width
            sums = _sum_partials(width, BATCH * programs // times, times)
            for residual, name in ((x, ""), (None, ", no residual")):
                tensors = 2 if residual is None else 4
                forward = Work(tensors * size, cached=scales)
                yield LaunchCase(
                    operator,
                    f"XL/2R {branch}{name}",
                    x.shape,
                    f"forward{name}",
                    partial(td_rms_norm.launch_fwd, x, residual, scale, x.dtype),
                    {"_td_rms_norm_fwd_kernel": [forward]},
                )
                tensors = 4 if residual is None else 5
                backward = Work(tensors * size + partials, [per_program / rows])
                yield LaunchCase(
                    operator,
                    f"XL/2R {branch}{name}",
                    x.shape,
                    f"backward{name}",
                    partial(td_rms_norm.launch_bwd, x, residual, x, scale, rms, True),
                    {"_td_rms_norm_bwd_kernel": [backward], "_sum_partials_kernel": [sums]},
                )


def _gates() -> Iterator[LaunchCase]:
    for branch, tokens, hidden in (("transformer", 257, 1920), ("convolutions", 1024, 960)):
        x, dy = _meta(BATCH, tokens, 2 * hidden), _meta(BATCH, tokens, hidden)
        for direction, call, kernel, tensors in (
            ("forward", partial(gated_gelu.launch_fwd, x), "_gated_gelu_fwd_kernel", 3),
            ("backward", partial(gated_gelu.launch_bwd, dy, x, True), "_gated_gelu_bwd_kernel", 6),
        ):
            work = Work(tensors * BF16 * dy.numel())
            yield LaunchCase(
                "gated_gelu", f"XL/2R {branch}", x.shape, direction, call, {kernel: [work]}
            )


def _quantizing() -> Iterator[LaunchCase]:
    """Yield the norms and the gate as sampling in FP8 launches them: one time for all images."""
    for branch, tokens, width in (("transformer", 257, 960), ("convolutions", 1024, 480)):
        x, scale = _meta(BATCH, tokens, width), _fp32(1, width)
        scales = FP32 * x.numel() / _constants("td_rms_norm_fp8", width)["ROWS"]
        for residual, name in ((x, ""), (None, ", no residual")):
            tensors = 1 if residual is None else 3
            work = Work((tensors * BF16 + FP8) * x.numel(), cached=scales)
            yield LaunchCase(
                "td_rms_norm_fp8",
                f"XL/2R {branch}{name}",
                x.shape,
                f"forward{name}",
                partial(td_rms_norm.launch_fp8, x, residual, scale),
                {"_td_rms_norm_fp8_kernel": [work]},
                oldest=89,
            )
        gate = _meta(BATCH, tokens, 4 * width)
        yield LaunchCase(
            "gated_gelu_fp8",
            f"XL/2R {branch}",
            gate.shape,
            "forward",
            partial(gated_gelu.launch_fp8, gate),
            {"_gated_gelu_fp8_kernel": [Work((2 * BF16 + FP8) * gate.numel() // 2)]},
            oldest=89,
        )


def _attentions() -> Iterator[LaunchCase]:
    """Yield head dimension 60, as trained, and 64, as `optimize_for_inference` pads it."""
    heads, tokens = 16, 257
    for head_dim, name in ((60, "XL/2R"), (64, "XL/2R, heads padded to 64")):
        width = heads * head_dim
        qkv, out = _meta(BATCH, tokens, 3 * width), _meta(BATCH, tokens, width)
        size, flops = BF16 * out.numel(), 2 * BATCH * tokens**2 * width

        def work(
            table: str,
            own: str,
            tensors: int,
            looped: int,
            products: int,
            head_dim: int = head_dim,
            size: int = size,
            flops: int = flops,
        ) -> list[Work]:
            """Return the work of programs that each own one tile and loop over all others.

            One program per head owns the class token instead.
            """
            tiles = _constants(table, head_dim)
            step = tiles["BLOCK_N" if own == "BLOCK_M" else "BLOCK_M"]
            count, trips = -(-(tokens - 1) // tiles[own]), -(-(tokens - 1) // step)
            return [
                Work(
                    tensors * size,
                    [trips / (count + 1), trips * count / (count + 1)],
                    cached=looped * size * count,
                    flops=products * flops,
                )
            ]

        yield LaunchCase(
            "attention",
            name,
            qkv.shape,
            "forward",
            partial(attention.launch_fwd, qkv, heads),
            {"attention_fwd_kernel": work("attention_fwd", "BLOCK_M", 4, 2, 2)},
        )
        parts = _fp32(BATCH, heads, 2, tokens)
        yield LaunchCase(
            "attention",
            name,
            qkv.shape,
            "backward",
            partial(attention.launch_bwd, out, qkv, out, parts, heads),
            {
                "attention_bwd_dq_kernel": work("attention_bwd_dq", "BLOCK_M", 6, 2, 3),
                "attention_bwd_dkdv_kernel": work("attention_bwd_dkdv", "BLOCK_N", 6, 2, 4),
            },
        )


def _cascades() -> Iterator[LaunchCase]:
    """Yield the cascade of 40 features: the input and the outputs of 39 blocks."""
    slots, width, out, q = 40, 960, 480, 2
    channels = slots * width
    for batch in (BATCH, 32):
        pieces = [_meta(batch, 257, width)[:, 1:] for _ in range(slots)]
        buffer, statistic = _meta(batch, 256, channels), _fp32(batch, 256)
        value, value_out, statistic_out = (
            _fp32(batch, channels),
            _fp32(batch, out),
            _fp32(batch, 1024),
        )
        x, projected = _meta(batch, 32, 32, out), _meta(batch, 16, 16, q * q * out)
        size, size_out = BF16 * buffer.numel(), BF16 * x.numel()
        products = 2 * buffer.numel() * q * q * out

        norm = _constants("td_layer_norm_pieces_fwd", width)
        yield LaunchCase(
            "upsample_add",
            "DiMR-XL/2R",
            x.shape,
            "forward",
            partial(
                run_in_sequence,
                partial(td_layer_norm.launch_fwd, value, value, pieces, None, torch.bfloat16),
                partial(cascade_add.launch_fwd, x, projected, value_out, value_out),
            ),
            {
                "pieces_fwd_kernel": [
                    Work(
                        2 * size,
                        reread=size,
                        reread_per_program=norm["ROWS"] * BF16 * channels,
                        cached=2 * FP32 * buffer.numel() / norm["ROWS"],
                    )
                ],
                "_upsample_add_fwd_kernel": [
                    Work(
                        3 * size_out,
                        cached=2 * FP32 * x.numel() / _constants("upsample_add_fwd", out)["ROWS"],
                    )
                ],
            },
            products,
        )

        rows = _constants("upsample_add_bwd", out)["ROWS"]
        programs, per_program = chunks(batch * q * q, 256, rows)
        partials = FP32 * 3 * batch * programs * q * q * out
        means = _constants("td_layer_norm_bwd_means", channels)
        columns = _constants("td_layer_norm_bwd", channels)
        blocks = slots * -(-width // columns["BLOCK"])
        column_programs, column_rows = chunks(batch * blocks, 256, columns["ROWS"])
        sums = [
            _sum_partials(out, programs * q * q, 2 * batch),
            _sum_partials(q * q * out, batch * programs, 1),
        ]
        if column_programs > 1:
            sums.append(_sum_partials(channels, column_programs, 2 * batch))
        yield LaunchCase(
            "upsample_add",
            "DiMR-XL/2R",
            x.shape,
            "backward",
            partial(
                run_in_sequence,
                partial(
                    cascade_add.launch_bwd, x, projected, value_out, *[statistic_out] * 2, batch
                ),
                partial(
                    td_layer_norm.launch_bwd,
                    *(buffer, None, pieces),
                    *(value, value, statistic, statistic),
                    *(True, True),
                ),
            ),
            {
                "_upsample_add_bwd_kernel": [Work(3 * size_out + partials, [per_program / rows])],
                "_sum_partials_kernel": sums,
                "pieces_bwd_means_kernel": [
                    Work(
                        2 * size,
                        [means["GROUP"]] * 5,
                        cached=FP32 * buffer.numel() / means["ROWS"],
                    )
                ],
                "_td_layer_norm_bwd_kernel": [
                    Work(
                        4 * size + 2 * FP32 * batch * column_programs * channels,
                        [column_rows / columns["ROWS"]],
                    )
                ],
            },
            2 * products,
        )


def _parameters() -> Iterator[LaunchCase]:
    from dimr_fast import DiMR

    with torch.device("meta"):
        model = DiMR.from_preset("DiMR-XL/2R")
    kinds = [list(kind) for kind in zip(*(p.vectors for p in model._td_parameters), strict=True)]
    columns = sum(vector.shape[0] for vector in kinds[0])
    tau, values = _fp32(BATCH), _fp32(BATCH, columns)
    for direction, call, kernel, vectors in (
        ("forward", partial(td_parameters.launch_fwd, tau, *kinds), "fwd", 4),
        ("backward", partial(td_parameters.launch_bwd, values, tau, *kinds), "bwd", 8),
    ):
        trips = BATCH / _constants(f"td_parameters_{kernel}", BATCH)["TIMES"]
        work = Work(FP32 * columns * (vectors + BATCH), [trips])
        kernels = {f"_td_parameters_{kernel}_kernel": [work]}
        yield LaunchCase("td_parameters", "DiMR-XL/2R", tau.shape, direction, call, kernels)
