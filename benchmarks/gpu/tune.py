"""Find the fastest launch configurations of the kernels on this GPU.

    python -m benchmarks.gpu.tune [--out FILE] [--minutes M] [--only KERNEL …]

times every candidate at the presets' shapes on random data and writes the fastest ones to
`kernels/configurations/<GPU>.json`, or to FILE. Entries that were not reached, or that `--only`
excludes, keep the file's earlier values. All candidates are compiled first, on all cores. A
candidate is skipped if it does not compile, spills registers, or gives other results than the
default configuration. `--dry-run` uses tiny shapes and two candidates per kernel, also in Triton's
interpreter.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.compile_ahead import Verdicts, compile_all
from benchmarks.gpu.search_space import CASES, Constants, TuningCase, draw_on
from dimr_fast.kernels import configuration
from dimr_fast.utils.files import write_json

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tune(
    case: TuningCase,
    *,
    dry_run: bool = False,
    verdicts: Verdicts | None = None,
    time_call: Callable[[Callable[[], Any]], float] | None = None,
) -> tuple[Constants, dict[str, float]]:
    """Return the fastest constants of a case, and the milliseconds of each candidate timed.

    A dry run tries one candidate beside the default. `verdicts` are reasons not to time a
    candidate. `time_call` returns the milliseconds of a call; its default is a single call in a dry
    run, else the median of triton.testing.
    """
    time_call = time_call or (single_call_ms if dry_run else median_ms)
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
                # For example too many registers or too much shared memory for this GPU.
                print(f"  {constants}: {type(error).__name__}")
                continue
            if not _agree(found, expected):
                print(f"  {constants}: disagrees")
                continue
            milliseconds = time_call(case.launch)
        times[json.dumps(constants)] = milliseconds
        if milliseconds < fastest:
            best, fastest = constants, milliseconds
    return best, times


def _agree(found: Any, expected: Any) -> bool:
    """Return True if all elements differ by at most 1 % of the largest expected one.

    In FP8 they may differ by a rounding step, which is more.
    """
    if isinstance(expected, torch.Tensor):
        if not expected.numel():
            return True
        wide, allowed = expected.float(), max(0.01, torch.finfo(expected.dtype).eps)
        return bool(((found.float() - wide).abs() <= allowed * wide.abs().max()).all())
    return all(_agree(f, e) for f, e in zip(found, expected, strict=True))


def single_call_ms(call: Callable[[], Any]) -> float:
    """Return the milliseconds of one call on a CPU."""
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def median_ms(call: Callable[[], Any]) -> float:
    """Return the median milliseconds of a call on a GPU."""
    import triton.testing

    return float(triton.testing.do_bench(call, warmup=5, rep=40, return_mode="median"))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--only", nargs="*", help="names of kernels (default: all)")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    out = options.out or configuration.path(configuration.gpu_name(DEVICE))
    if DEVICE.type != "cuda" and not (options.dry_run and options.out):
        parser.error("no GPU found: without one, use --dry-run with --out")
    end = time.monotonic() + 60 * options.minutes
    table: dict[str, dict[str, Mapping[str, int]]] = (
        json.loads(out.read_text()) if out.is_file() else {}
    )
    verdicts: Verdicts = {}
    if not options.dry_run:
        # At most half of the time, so that as much is left to time the candidates.
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
        for case in cases(draw_on(DEVICE), options.dry_run):
            if time.monotonic() > end or (options.only and case.kernel not in options.only):
                continue
            best, times = tune(case, dry_run=options.dry_run, verdicts=verdicts)
            print(f"{case.kernel} {case.size}: {best} of {len(times)} tried", flush=True)
            by_size = table.setdefault(case.kernel, {}) | {str(case.size): best}
            table[case.kernel] = dict(sorted(by_size.items(), key=lambda item: int(item[0])))
            write_json(out, table)


if __name__ == "__main__":
    main()
