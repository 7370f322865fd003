"""Everything worth knowing from a GPU, in one command: `python benchmarks/gpu_report.py --out DIR`.

Builds, tests, checks memory, measures, tunes and benchmarks, most important first, each section in
a process of its own with its share of the minutes that are left: what fails, hangs or crashes costs
only itself, and time that a section does not need goes to those after it. DIR is brought up to date
after every section, so a run that is cut off leaves its best part:

    report.md, results.json    all of it, to read and to compute with
    benchmarks/*.json          pytest-benchmark's, for `benchmarks/results/`
    configurations/*.json      tuned, for `kernels/configurations/` (in this checkout already)
    <section>.log, .json       what a section printed, and what it found

`--only NAME…` runs these sections again and keeps what DIR holds of the others. `--dry-run` runs
all of it on the CPU at tiny sizes. Exits with 0 where every section ran to its end, and well.
"""

import argparse
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_render import render

# Only the standard library from here: torch, or a driver, that crashes must not end the run.
ROOT = Path(__file__).parent.parent
SECTIONS_FILE = Path(__file__).parent / "gpu_sections.py"
TAIL = 40
"""Lines of a log that the report shows where a section did not end well."""

Results = dict[str, Any]


@dataclass(frozen=True)
class Section:
    """A part of the report, its share of the time, and what runs it if not `gpu_sections.py`."""

    name: str
    share: float
    command: Sequence[str] | None = None


SECTIONS = (
    Section("machine", 10),
    Section("build", 200),
    Section("tests", 45),
    Section("kernels", 70),
    Section("measure", 55),
    Section("memory", 45),
    Section("tune", 70),
    Section("model", 150),
    Section("operators", 90),
    Section("compiled", 40),
    Section("plots", 5),
)
"""In order of importance; `gpu_sections.py` says what each does. Without a build nothing counts, so
its share is ample; what it leaves goes to the others."""


def run(
    sections: Sequence[Section],
    out: Path,
    *,
    minutes: float,
    only: Sequence[str] = (),
    dry_run: bool = False,
) -> Results:
    """Run the sections, or `only` some of them, within `minutes`; what `results.json` then holds.

    A section may take its share of what is left, counted against the sections still to come.
    """
    end = time.monotonic() + 60 * minutes
    out.mkdir(parents=True, exist_ok=True)
    if not only:
        # Rows of another state of the code would otherwise stay among the new ones.
        shutil.rmtree(out / "benchmarks", ignore_errors=True)
        (out / "results.json").unlink(missing_ok=True)
    results = _earlier(out)
    results |= {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "minutes": minutes,
        "dry_run": dry_run,
    }
    done = results.setdefault("sections", {})
    waiting = [s for s in sections if not only or s.name in only]
    for section in waiting:
        done[section.name] = {"status": "not reached"}
    while waiting:
        share = waiting[0].share / sum(s.share for s in waiting)
        section = waiting.pop(0)
        limit = (end - time.monotonic()) * share
        if limit < 1:
            continue
        print(f"{section.name}: up to {limit:.0f} s", flush=True)
        done[section.name] = _run_section(section, out, limit, dry_run)
        print(f"  {done[section.name]['status']}", flush=True)
        in_order = {s.name: done[s.name] for s in sections if s.name in done}
        results["sections"] = done = in_order | done
        try:
            render(results, out)
        except Exception:
            # What a section wrote may be unlike anything foreseen; the others still run.
            traceback.print_exc()
        if section.name == "machine" and not dry_run and _lacks_gpu(done["machine"]):
            print("There is no GPU: only --dry-run runs here.", file=sys.stderr)
            break
    render(results, out)
    return results


def _earlier(out: Path) -> Results:
    path = out / "results.json"
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def _lacks_gpu(machine: Mapping[str, Any]) -> bool:
    return bool(machine.get("facts", {}).get("GPU") == "none")


def _run_section(section: Section, out: Path, limit: float, dry_run: bool) -> Results:
    """Run one section to its end or its limit; its status and all that it found until then."""
    log, part = out / f"{section.name}.log", out / f"{section.name}.json"
    part.unlink(missing_ok=True)
    command = list(section.command or (sys.executable, str(SECTIONS_FILE), section.name))
    command += ["--out", str(out), "--seconds", str(limit), *(["--dry-run"] if dry_run else [])]
    start = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=_environment(dry_run),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        code: int | None = None
        try:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(limit)
        finally:
            # Also what it left running when it ended by itself: the next section wants the GPU.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = time.monotonic() - start
    found: Results = {}
    with suppress(OSError, ValueError):
        found = json.loads(part.read_text())
    status = _status(code, limit, bool(found.pop("cut_short", False)))
    result: Results = {"status": status, "seconds": round(seconds, 1)} | found
    if status != "passed":
        result["log"] = log.read_text(errors="replace").splitlines()[-TAIL:]
    return result


def _status(code: int | None, limit: float, cut_short: bool) -> str:
    if code is None:
        return f"timed out after {limit:.0f} s"
    if code < 0:
        return f"crashed: {signal.Signals(-code).name}"
    if code > 0:
        return f"failed: exit code {code}"
    return "cut short" if cut_short else "passed"


def _environment(dry_run: bool) -> dict[str, str]:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    # Where this Python is not activated, its cmake and ninja are not on PATH; nor is nvcc, often.
    folders = [str(Path(sys.executable).parent), environment.get("PATH", os.defpath)]
    toolkit = Path(environment.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    if not shutil.which("nvcc") and toolkit.is_dir():
        folders.append(str(toolkit))
    environment["PATH"] = os.pathsep.join(folders)
    if dry_run:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    if (ROOT / "dimr_fast" / "kernels").is_dir():
        # Built in place without an installation, as gpu_sections.build does where pip cannot.
        environment["PYTHONPATH"] = str(ROOT)
    return environment


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [section.name for section in SECTIONS]
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=9.0, help="in all (default: 9)")
    parser.add_argument(
        "--only", nargs="+", default=[], choices=names, metavar="NAME", help=", ".join(names)
    )
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    # So that a section in progress ends with this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    out = options.out.resolve()
    results = run(
        SECTIONS, out, minutes=options.minutes, only=options.only, dry_run=options.dry_run
    )
    print(f"{out / 'report.md'}")
    wanted = options.only or names
    return int(any(results["sections"][name]["status"] != "passed" for name in wanted))


if __name__ == "__main__":
    sys.exit(main())
