"""Find the best launch configurations of the kernels on this GPU: `python benchmarks/tune.py`.

Tries every candidate on the presets' shapes, random data, and writes the fastest of each to
`kernels/configurations/<GPU>.json`, or to a file named by `--out`; entries that it did not get to,
for `--minutes` ran out or `--only` left them aside, keep what the file had. All candidates are
compiled first, on all cores. One that does not compile, spills registers or disagrees with the
default configuration is passed over. With `--dry-run` it takes tiny shapes and two candidates each,
to show that it runs, also under Triton's interpreter.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_compile import Verdicts, compile_all

from dimr_fast.kernels import configuration
from dimr_fast.utils.files import write_json

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Constants = dict[str, int]


@dataclass(frozen=True)
class Case:
    """A kernel at a size: a launch that runs it, and the constants to try."""

    kernel: str
    size: int
    launch: Callable[[], Any]
    candidates: list[Constants]


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def product(**values: list[int]) -> list[Constants]:
    return [dict(zip(values, v, strict=True)) for v in itertools.product(*values.values())]


def norms(small: bool) -> Iterator[Case]:
    from dimr_fast.kernels import td_layer_norm, td_rms_norm

    batch = 2 if small else 64
    shapes = (
        [(3, 24)] if small else [(257, 960), (1024, 480), (257, 1152), (1024, 576), (4096, 240)]
    )
    space = product(ROWS=[1, 2, 4, 8], BLOCK=[4096], num_warps=[2, 4, 8])
    for tokens, width in shapes:
        x, dy = random(batch, tokens, width), random(batch, tokens, width)
        scale, shift = (random(batch, width, dtype=torch.float32) for _ in range(2))
        _, _, rms = td_rms_norm.launch_fwd(x, dy, scale, x.dtype)
        yield Case(
            "td_rms_norm_fwd",
            width,
            lambda x=x, r=dy, s=scale: td_rms_norm.launch_fwd(x, r, s, x.dtype),
            space,
        )
        yield Case(
            "td_rms_norm_bwd",
            width,
            lambda x=x, dy=dy, s=scale, rms=rms: td_rms_norm.launch_bwd(dy, dy, x, s, rms),
            space,
        )
        _, _, mean, rstd = td_layer_norm.launch_fwd(scale, shift, [x], None, x.dtype)
        yield Case(
            "td_layer_norm_fwd",
            width,
            lambda x=x, r=dy, s=scale, b=shift: td_layer_norm.launch_fwd(s, b, [x], r, x.dtype),
            space,
        )
        yield Case(
            "td_layer_norm_bwd",
            width,
            lambda x=x, dy=dy, s=scale, b=shift, m=mean, r=rstd: td_layer_norm.launch_bwd(
                dy, dy, [x], s, b, m, r, True, False
            ),
            space,
        )


def gates(small: bool) -> Iterator[Case]:
    from dimr_fast.kernels import gated_gelu

    batch = 2 if small else 64
    space = product(BLOCK=[512, 1024, 2048, 4096], num_warps=[2, 4, 8])
    for tokens, hidden in [(3, 24)] if small else [(257, 1920), (1024, 960), (257, 2304)]:
        x, dy = random(batch, tokens, 2 * hidden), random(batch, tokens, hidden)
        yield Case("gated_gelu_fwd", hidden, lambda x=x: gated_gelu.launch_fwd(x), space)
        yield Case("gated_gelu_bwd", hidden, lambda x=x, dy=dy: gated_gelu.launch_bwd(dy, x), space)


def attentions(small: bool) -> Iterator[Case]:
    from dimr_fast.kernels import attention

    batch = 1 if small else 64
    forward = product(
        BLOCK_M=[32, 64, 128], BLOCK_N=[32, 64, 128], num_warps=[4, 8], num_stages=[2, 3]
    )
    tiles = product(BLOCK_M=[32, 64, 128], BLOCK_N=[32, 64], num_warps=[4, 8], num_stages=[1, 2])
    # 60 as XL/2R is trained, 64 as it samples.
    sizes = [(5, 1, 8)] if small else [(257, 16, 60), (257, 16, 64), (257, 16, 72)]
    for tokens, heads, head_dim in sizes:
        qkv = random(batch, tokens, 3 * heads * head_dim)
        out, *statistics = attention.launch_fwd(qkv, heads)
        dout = random(*out.shape)

        def backward(
            dout: torch.Tensor = dout,
            saved: tuple[torch.Tensor, ...] = (qkv, out, *statistics),
            heads: int = heads,
        ) -> torch.Tensor:
            return attention.launch_bwd(dout, *saved, heads)

        yield Case(
            "attention_fwd", head_dim, lambda q=qkv, h=heads: attention.launch_fwd(q, h), forward
        )
        yield Case("attention_bwd_dq", head_dim, backward, tiles)
        yield Case("attention_bwd_dkdv", head_dim, backward, tiles)


def parameters(small: bool) -> Iterator[Case]:
    from dimr_fast.kernels import td_parameters

    widths = [24] if small else [960] * 80 + [480] * 24 + [38400] * 2
    vectors = [[random(width, dtype=torch.float32) for width in widths] for _ in range(4)]
    space = product(TIMES=[1, 4, 8], BLOCK=[128, 256, 512], num_warps=[2, 4])
    for times in (2,) if small else (1, 64):
        tau = random(times, dtype=torch.float32)
        values = random(times, sum(widths), dtype=torch.float32)
        yield Case(
            "td_parameters_fwd", times, lambda t=tau: td_parameters.launch_fwd(t, *vectors), space
        )
        yield Case(
            "td_parameters_bwd",
            times,
            lambda t=tau, v=values: td_parameters.launch_bwd(v, t, *vectors),
            space,
        )


def cascades(small: bool) -> Iterator[Case]:
    from dimr_fast.kernels import td_layer_norm, upsample_add

    batch = 1 if small else 32
    shapes = [(2, 3, 40, 24)] if small else [(16, 40, 960, 480), (16, 58, 1152, 576)]
    for size, slots, width, out in shapes:
        channels = slots * width
        features = [random(batch, size, size, width) for _ in range(slots)]
        scale, shift = (random(batch, channels, dtype=torch.float32) for _ in range(2))
        dy = random(batch, size, size, channels)
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
        yield Case("td_layer_norm_pieces_fwd", width, norm, groups)
        columns = product(ROWS=[4, 8, 16], BLOCK=[128, 256], num_warps=[2, 4, 8])
        yield Case("td_layer_norm_bwd", channels, norm_backward, columns)
        means = product(ROWS=[1, 2, 4], BLOCK=[512, 1024], GROUP=[4, 8], num_warps=[4, 8])
        yield Case("td_layer_norm_bwd_means", channels, norm_backward, means)

        x, projected = random(batch, 2 * size, 2 * size, out), random(batch, size, size, 4 * out)
        weight, bias = (random(batch, out, dtype=torch.float32) for _ in range(2))
        _, *statistics = upsample_add.launch_fwd(x, projected, weight, bias)
        rows = product(ROWS=[1, 2, 4, 8], num_warps=[2, 4, 8])
        yield Case(
            "upsample_add_fwd",
            out,
            lambda x=x, p=projected, w=weight, b=bias: upsample_add.launch_fwd(x, p, w, b),
            rows,
        )
        yield Case(
            "upsample_add_bwd",
            out,
            lambda x=x, p=projected, w=weight, s=tuple(statistics), t=batch: (
                upsample_add.launch_bwd(x, p, w, *s, t)
            ),
            rows,
        )


CASES: dict[Callable[[bool], Iterator[Case]], tuple[str, ...]] = {
    attentions: ("attention",),
    cascades: ("td_layer_norm", "upsample_add"),
    gates: ("gated_gelu",),
    norms: ("td_rms_norm", "td_layer_norm"),
    parameters: ("td_parameters",),
}
"""The operators of each. First those with the most to gain: kernels limited by arithmetic differ
more from one configuration to another than those that wait for memory."""


def tune(
    case: Case, *, dry_run: bool, verdicts: Verdicts | None = None
) -> tuple[Constants, dict[str, float]]:
    """The fastest constants of a case, and the median milliseconds of each that was timed."""
    default = dict(configuration.configuration(case.kernel, case.size, DEVICE))
    expected = case.launch()
    others = []
    for constants in case.candidates:
        reason = (verdicts or {}).get((case.kernel, case.size, json.dumps(constants)))
        if reason:
            print(f"  {constants}: {reason}")
        elif constants != default:
            others.append(constants)
    times: dict[str, float] = {}
    best, fastest = default, float("inf")
    for constants in [default, *(others[:1] if dry_run else others)]:
        with configuration.trial(case.kernel, constants, DEVICE):
            try:
                found = case.launch()
            except Exception as error:
                # Too many registers or too much shared memory: not one for this GPU.
                print(f"  {constants}: {type(error).__name__}")
                continue
            if not _agree(found, expected):
                print(f"  {constants}: disagrees")
                continue
            milliseconds = _milliseconds(case.launch, dry_run)
        times[json.dumps(constants)] = milliseconds
        if milliseconds < fastest:
            best, fastest = constants, milliseconds
    return best, times


def _agree(found: Any, expected: Any) -> bool:
    if isinstance(expected, torch.Tensor):
        scale = expected.abs().max() if expected.numel() else 0.0
        return bool(((found - expected).abs() <= 0.01 * scale).all())
    return all(_agree(f, e) for f, e in zip(found, expected, strict=True))


def _milliseconds(call: Callable[[], Any], dry_run: bool) -> float:
    if dry_run:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    import triton.testing

    return float(triton.testing.do_bench(call, warmup=5, rep=40, return_mode="median"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--only", nargs="*", help="names of kernels; all without it")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    out = options.out or configuration.path(configuration.gpu_name(DEVICE))
    if DEVICE.type != "cuda" and not (options.dry_run and options.out):
        parser.error("there is no GPU: only --dry-run with --out runs here")
    end = time.monotonic() + 60 * options.minutes
    table: dict[str, dict[str, Mapping[str, int]]] = (
        json.loads(out.read_text()) if out.is_file() else {}
    )
    verdicts: Verdicts = {}
    if not options.dry_run:
        # Before anything is on the GPU; at most half of the time, for what is not timed is in vain.
        verdicts = compile_all(
            options.only,
            gpu=configuration.gpu_name(DEVICE),
            capability=torch.cuda.get_device_capability(DEVICE),
            seconds=(end - time.monotonic()) / 2,
        )
        print(f"{len(verdicts)} candidates compiled", flush=True)
    for cases, operators in CASES.items():
        if options.only and not any(kernel.startswith(operators) for kernel in options.only):
            continue
        for case in cases(options.dry_run):
            if time.monotonic() > end or (options.only and case.kernel not in options.only):
                continue
            best, times = tune(case, dry_run=options.dry_run, verdicts=verdicts)
            print(f"{case.kernel} {case.size}: {best} of {len(times)} tried", flush=True)
            by_size = table.setdefault(case.kernel, {}) | {str(case.size): best}
            table[case.kernel] = dict(sorted(by_size.items(), key=lambda item: int(item[0])))
            write_json(out, table)


if __name__ == "__main__":
    main()
