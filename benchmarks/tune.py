"""Find the best launch configurations of the kernels on this GPU: `python benchmarks/tune.py`.

Tries every candidate on the presets' shapes, random data, and writes the fastest of each to
`kernels/configurations/<GPU>.json`, or to a file named by `--out`; entries that it did not get to,
for `--minutes` ran out or `--only` left them aside, keep what the file had. A candidate that does
not compile or disagrees with the default configuration is passed over. With `--dry-run` it takes
tiny shapes and two candidates each, to show that it runs, also under Triton's interpreter.
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

from dimr_fast.files import write_json
from dimr_fast.kernels import configuration

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


CASES: list[Callable[[bool], Iterator[Case]]] = [norms, gates]


def tune(case: Case, *, dry_run: bool) -> tuple[Constants, dict[str, float]]:
    """The fastest constants of a case, and the median milliseconds of each that was timed."""
    default = dict(configuration.configuration(case.kernel, case.size, DEVICE))
    expected = case.launch()
    others = [c for c in case.candidates if c != default]
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
    for cases in CASES:
        for case in cases(options.dry_run):
            if time.monotonic() > end or (options.only and case.kernel not in options.only):
                continue
            best, times = tune(case, dry_run=options.dry_run)
            print(f"{case.kernel} {case.size}: {best} of {len(times)} tried", flush=True)
            by_size = table.setdefault(case.kernel, {}) | {str(case.size): best}
            table[case.kernel] = dict(sorted(by_size.items(), key=lambda item: int(item[0])))
            write_json(out, table)


if __name__ == "__main__":
    main()
