"""List the kernels to tune, the shapes to tune them at, and the candidate configurations.

The shapes are those of the presets; with `small` they are tiny, to show that everything runs.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from dimr_fast.ops import OPERATORS

Constants = dict[str, int]


@dataclass(frozen=True)
class TuningCase:
    """A kernel at a size, with a launch that runs it and the constants to try."""

    kernel: str
    size: int
    launch: Callable[[], Any]
    candidates: list[Constants]


Draw = Callable[..., torch.Tensor]
"""`draw(*shape, dtype=torch.bfloat16)` returns standard normal numbers on a device."""
CaseFunction = Callable[[Draw, bool], Iterator[TuningCase]]


def draw_on(device: torch.device) -> Draw:
    """Return a function that draws standard normal numbers on a device."""

    def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    return draw


def product(**values: list[int]) -> list[Constants]:
    """Return all combinations of the values."""
    return [dict(zip(values, v, strict=True)) for v in itertools.product(*values.values())]


def runs_fp8(x: torch.Tensor) -> bool:
    """Return whether the quantising kernels run on the device of `x`."""
    return OPERATORS["gated_gelu_fp8"].why_not("triton", x) is None


def norms(draw: Draw, small: bool) -> Iterator[TuningCase]:
    """Yield the kernels of the norms over the last dimension."""
    from dimr_fast.kernels import td_layer_norm, td_rms_norm

    batch = 2 if small else 64
    shapes = (
        [(3, 24)] if small else [(257, 960), (1024, 480), (257, 1152), (1024, 576), (4096, 240)]
    )
    space = product(ROWS=[1, 2, 4, 8], BLOCK=[4096], num_warps=[2, 4, 8])
    whole_rows = product(ROWS=[1, 2, 4, 8], num_warps=[1, 2, 4, 8])
    for tokens, width in shapes:
        x, dy = draw(batch, tokens, width), draw(batch, tokens, width)
        scale, shift = (draw(batch, width, dtype=torch.float32) for _ in range(2))
        _, _, rms = td_rms_norm.launch_fwd(x, dy, scale, x.dtype)
        yield TuningCase(
            "td_rms_norm_fwd",
            width,
            lambda x=x, r=dy, s=scale: td_rms_norm.launch_fwd(x, r, s, x.dtype),
            space,
        )
        for kernel, launch in (
            ("td_rms_norm_fp8", lambda x=x, r=dy, s=scale: td_rms_norm.launch_fp8(x, r, s)),
            (
                "td_layer_norm_fp8",
                lambda x=x, r=dy, s=scale, b=shift: td_layer_norm.launch_fp8(x, r, s, b),
            ),
        ):
            if runs_fp8(x):
                yield TuningCase(kernel, width, launch, whole_rows)
        yield TuningCase(
            "td_rms_norm_bwd",
            width,
            lambda x=x, dy=dy, s=scale, rms=rms: td_rms_norm.launch_bwd(dy, dy, x, s, rms, True),
            space,
        )
        _, _, mean, rstd = td_layer_norm.launch_fwd(scale, shift, [x], None, x.dtype)
        yield TuningCase(
            "td_layer_norm_fwd",
            width,
            lambda x=x, r=dy, s=scale, b=shift: td_layer_norm.launch_fwd(s, b, [x], r, x.dtype),
            space,
        )
        yield TuningCase(
            "td_layer_norm_bwd",
            width,
            lambda x=x, dy=dy, s=scale, b=shift, m=mean, r=rstd: td_layer_norm.launch_bwd(
                dy, dy, [x], s, b, m, r, True, True
            ),
            space,
        )


def gates(draw: Draw, small: bool) -> Iterator[TuningCase]:
    """Yield the kernels of the gated GELU."""
    from dimr_fast.kernels import gated_gelu

    batch = 2 if small else 64
    space = product(BLOCK=[512, 1024, 2048, 4096], num_warps=[2, 4, 8])
    whole_rows = product(ROWS=[1, 2, 4, 8], num_warps=[1, 2, 4, 8])
    for tokens, hidden in [(3, 24)] if small else [(257, 1920), (1024, 960), (257, 2304)]:
        x, dy = draw(batch, tokens, 2 * hidden), draw(batch, tokens, hidden)
        yield TuningCase("gated_gelu_fwd", hidden, lambda x=x: gated_gelu.launch_fwd(x), space)
        if runs_fp8(x):
            yield TuningCase(
                "gated_gelu_fp8", hidden, lambda x=x: gated_gelu.launch_fp8(x), whole_rows
            )
        yield TuningCase(
            "gated_gelu_bwd", hidden, lambda x=x, dy=dy: gated_gelu.launch_bwd(dy, x, True), space
        )


def attentions(draw: Draw, small: bool) -> Iterator[TuningCase]:
    """Yield the kernels of attention."""
    from dimr_fast.kernels import attention

    batch = 1 if small else 64
    forward = product(
        BLOCK_M=[32, 64, 128], BLOCK_N=[32, 64, 128], num_warps=[4, 8], num_stages=[2, 3]
    )
    tiles = product(BLOCK_M=[32, 64, 128], BLOCK_N=[32, 64], num_warps=[4, 8], num_stages=[1, 2])
    # 60 as XL/2R is trained, 64 as it samples.
    sizes = [(5, 1, 8)] if small else [(257, 16, 60), (257, 16, 64), (257, 16, 72)]
    for tokens, heads, head_dim in sizes:
        qkv = draw(batch, tokens, 3 * heads * head_dim)
        out, *statistics = attention.launch_fwd(qkv, heads)
        dout = draw(*out.shape)

        def backward(
            dout: torch.Tensor = dout,
            saved: tuple[torch.Tensor, ...] = (qkv, out, *statistics),
            heads: int = heads,
        ) -> torch.Tensor:
            return attention.launch_bwd(dout, *saved, heads)

        yield TuningCase(
            "attention_fwd", head_dim, lambda q=qkv, h=heads: attention.launch_fwd(q, h), forward
        )
        yield TuningCase("attention_bwd_dq", head_dim, backward, tiles)
        yield TuningCase("attention_bwd_dkdv", head_dim, backward, tiles)


def parameters(draw: Draw, small: bool) -> Iterator[TuningCase]:
    """Yield the kernels of the time-dependent parameters."""
    from dimr_fast.kernels import td_parameters

    widths = [24] if small else [960] * 80 + [480] * 24 + [38400] * 2
    vectors = [[draw(width, dtype=torch.float32) for width in widths] for _ in range(4)]
    space = product(TIMES=[1, 4, 8], BLOCK=[128, 256, 512], num_warps=[2, 4])
    for times in (2,) if small else (1, 64):
        tau = draw(times, dtype=torch.float32)
        values = draw(times, sum(widths), dtype=torch.float32)
        yield TuningCase(
            "td_parameters_fwd", times, lambda t=tau: td_parameters.launch_fwd(t, *vectors), space
        )
        yield TuningCase(
            "td_parameters_bwd",
            times,
            lambda t=tau, v=values: td_parameters.launch_bwd(v, t, *vectors),
            space,
        )


def cascades(draw: Draw, small: bool) -> Iterator[TuningCase]:
    """Yield the kernels of the cascade: its norm over all features, and `upsample_add`."""
    from dimr_fast.kernels import td_layer_norm, upsample_add

    batch = 1 if small else 32
    shapes = [(2, 3, 40, 24)] if small else [(16, 40, 960, 480), (16, 58, 1152, 576)]
    for size, slots, width, out in shapes:
        channels = slots * width
        features = [draw(batch, size, size, width) for _ in range(slots)]
        scale, shift = (draw(batch, channels, dtype=torch.float32) for _ in range(2))
        dy = draw(batch, size, size, channels)
        _, _, mean, rstd = td_layer_norm.launch_fwd(scale, shift, features, None, dy.dtype)

        def norm(
            features: list[torch.Tensor] = features,
            scale: torch.Tensor = scale,
            shift: torch.Tensor = shift,
        ) -> Any:
            return td_layer_norm.launch_fwd(scale, shift, features, None, torch.bfloat16)

        def norm_backward(
            dy: torch.Tensor = dy,
            features: list[torch.Tensor] = features,
            saved: tuple[torch.Tensor, ...] = (scale, shift, mean, rstd),
        ) -> Any:
            return td_layer_norm.launch_bwd(dy, None, features, *saved, True, True)

        groups = product(ROWS=[1, 2, 4], BLOCK=[2048, 4096, 8192], num_warps=[8, 16, 32])
        yield TuningCase("td_layer_norm_pieces_fwd", width, norm, groups)
        columns = product(ROWS=[4, 8, 16], BLOCK=[128, 256], num_warps=[2, 4, 8])
        yield TuningCase("td_layer_norm_bwd", channels, norm_backward, columns)
        means = product(ROWS=[1, 2, 4], BLOCK=[512, 1024], GROUP=[4, 8], num_warps=[4, 8])
        yield TuningCase("td_layer_norm_bwd_means", channels, norm_backward, means)

        x, projected = draw(batch, 2 * size, 2 * size, out), draw(batch, size, size, 4 * out)
        weight, bias = (draw(batch, out, dtype=torch.float32) for _ in range(2))
        _, *statistics = upsample_add.launch_fwd(x, projected, weight, bias)
        rows = product(ROWS=[1, 2, 4, 8], num_warps=[2, 4, 8])
        yield TuningCase(
            "upsample_add_fwd",
            out,
            lambda x=x, p=projected, w=weight, b=bias: upsample_add.launch_fwd(x, p, w, b),
            rows,
        )
        yield TuningCase(
            "upsample_add_bwd",
            out,
            lambda x=x, p=projected, w=weight, s=tuple(statistics), t=batch: (
                upsample_add.launch_bwd(x, p, w, *s, t)
            ),
            rows,
        )


CASES: dict[CaseFunction, tuple[str, ...]] = {
    attentions: ("attention",),
    cascades: ("td_layer_norm", "upsample_add"),
    gates: ("gated_gelu",),
    norms: ("td_rms_norm", "td_layer_norm"),
    parameters: ("td_parameters",),
}
"""For each function, the operators whose kernels it yields. Kernels limited by arithmetic come
first, since their times depend more on the configuration than those limited by memory."""
