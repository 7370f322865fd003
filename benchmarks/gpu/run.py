"""Build, test, measure and tune on a GPU, and write one report.

    python -m benchmarks.gpu.run --out DIR --minutes 9

Sections run in order of importance. Each is a process with a time limit of its own: a section that
fails, hangs or crashes does not stop the others, and time that it does not use goes to those after
it. DIR is updated after every section, so an interrupted run leaves its most important results:

    report.md, results.json    the whole report, for reading and for computing
    benchmarks/*.json          results of pytest-benchmark, for `benchmarks/results/`
    configurations/*.json      tuned configurations, already copied to `kernels/configurations/`
    <section>.log, .json       output and findings of each section

`--archive FILE` packs DIR after every section; `--resume FILE` starts from such an archive. `--only
NAME…` runs these sections, after a build if there is none, and keeps the results of the others;
`NAME:ROWS` runs some rows of a benchmark. `--dry-run` runs everything on the CPU at tiny sizes. The
exit code is 0 if every section passed. benchmarks/README.md plans the calls for an hour with a GPU.
"""

import argparse
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# These load the standard library only: a torch or a driver that crashes must not end the run.
from benchmarks.gpu.render import render
from benchmarks.utils.files import ROOT

CONFIGURATIONS = ROOT / "kernels" / "configurations"
LOG_LINES = 40
"""Last lines of a log that the report shows if its section did not pass."""
PRINTED_CHARACTERS = 11_000
"""Length of the report's beginning that is printed: some hosts return little output."""
KILL_SECONDS = 2.0
"""Time that a killed section has to end."""

Results = dict[str, Any]


@dataclass(frozen=True)
class Section:
    """A section of the report, with its planned time.

    `needs_build`: it needs the package and its compiled libraries. `has_rows`: `--only` can choose
    single rows. `command` runs it, by default `python -m benchmarks.gpu.sections NAME`.
    """

    name: str
    seconds: float
    command: Sequence[str] | None = None
    needs_build: bool = True
    has_rows: bool = False


SECTIONS = (
    Section("machine", 60, needs_build=False),
    Section("build", 120, needs_build=False),
    Section("tests", 45),
    Section("measure", 75),
    Section("kernels", 90),
    Section("tune", 150, has_rows=True),
    Section("model", 180, has_rows=True),
    Section("operators", 120, has_rows=True),
    Section("compiled", 165, has_rows=True),
    Section("fp8", 240, has_rows=True),
    Section("plots", 15, needs_build=False),
    Section("memory", 120),
)
"""In order of importance; `sections.py` implements them."""


def is_built(package: Path = ROOT / "dimr_fast") -> bool:
    """Return True if `package` has its kernels and compiled libraries."""
    needed = ("kernels", "_built.json", "libdimr_fast_cpu.so")
    return all((package / name).exists() for name in needed)


def run(
    sections: Sequence[Section],
    out: Path,
    *,
    minutes: float,
    only: Mapping[str, str | None] | None = None,
    archive: Path | None = None,
    resume: Path | None = None,
    dry_run: bool = False,
    built: Callable[[], bool] = is_built,
    configurations: Path = CONFIGURATIONS,
) -> Results:
    """Run the sections, or `only` some of them, within `minutes`; return what results.json holds.

    `only` maps names of sections to the chosen rows, None for all. A section gets its planned time
    or, if the minutes exceed all plans together, proportionally more. `built` tells whether a build
    is needed first; `configurations` is the folder that receives tuned configurations.
    """
    end = time.monotonic() + 60 * minutes
    only = only or {}
    out.mkdir(parents=True, exist_ok=True)
    if resume:
        _unpack(resume, out)
    elif not only:
        # A whole run starts anew, so that no row of an older commit remains.
        shutil.rmtree(out / "benchmarks", ignore_errors=True)
        (out / "results.json").unlink(missing_ok=True)
    if not dry_run:
        for file in (out / "configurations").glob("*.json"):
            shutil.copy(file, configurations)
    results = _earlier_results(out) | {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "minutes": minutes,
        "dry_run": dry_run,
    }
    finished = results.setdefault("sections", {})
    waiting = _chosen(sections, only, build=not dry_run and not built())
    for section in waiting:
        finished[section.name] = {"status": "not reached"}
    gpu = None
    while waiting:
        left = end - time.monotonic()
        stretch = max(1.0, left / sum(s.seconds for s in waiting))
        section = waiting.pop(0)
        limit = min(left, section.seconds * stretch)
        if limit < 1:
            continue
        print(f"{section.name}: up to {limit:.0f} s", flush=True)
        found = _run_section(section, out, limit, dry_run, only.get(section.name))
        print(f"  {found['status']}", flush=True)
        if section.name == "machine":
            gpu = found.get("facts", {}).get("GPU")
        finished[section.name] = found | ({"GPU": gpu} if gpu else {})
        in_order = {s.name: finished[s.name] for s in sections if s.name in finished}
        results["sections"] = finished = in_order | finished
        _write(results, out, archive)
        if gpu == "none" and not dry_run:
            print("No GPU found. Without one, use --dry-run.", file=sys.stderr)
            break
    _write(results, out, archive)
    return results


def _unpack(archive: Path, out: Path) -> None:
    """Extract an archive into `out`; if that fails, print a warning and continue without it."""
    try:
        with tarfile.open(archive) as packed:
            packed.extractall(out, filter="data")
    except (OSError, tarfile.TarError) as error:
        print(f"--resume: got {archive}, expected a .tar.gz archive: {error}", file=sys.stderr)


def _chosen(
    sections: Sequence[Section], only: Mapping[str, str | None], build: bool
) -> list[Section]:
    """Return the sections to run: those in `only`, "machine" always, and the build if needed."""
    wanted = {s.name for s in sections if not only or s.name in only} | {"machine"}
    if build and any(s.needs_build for s in sections if s.name in wanted):
        wanted.add("build")
    return [s for s in sections if s.name in wanted]


def _write(results: Results, out: Path, archive: Path | None) -> None:
    """Write report and archive; an error is printed, so that later sections still run."""
    try:
        render(results, out)
        if archive:
            pack(out, archive)
    except Exception:
        traceback.print_exc()


def pack(folder: Path, archive: Path) -> None:
    """Replace `archive` atomically by a .tar.gz of `folder`, without hidden files."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    unfinished = archive.with_name(f".{archive.name}.part")
    with tarfile.open(unfinished, "w:gz") as packed:
        for file in sorted(folder.rglob("*")):
            hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
            if file.is_file() and not hidden and file != archive:
                packed.add(file, file.relative_to(folder))
    os.replace(unfinished, archive)


def _earlier_results(out: Path) -> Results:
    path = out / "results.json"
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def _run_section(
    section: Section, out: Path, limit: float, dry_run: bool, rows: str | None
) -> Results:
    """Run a section to its end or its limit; return its status and its findings so far."""
    log, findings = out / f"{section.name}.log", out / f"{section.name}.json"
    findings.unlink(missing_ok=True)
    default = (sys.executable, "-m", "benchmarks.gpu.sections", section.name)
    command = [*(section.command or default), "--out", str(out), "--seconds", str(limit)]
    command += ["--dry-run"] if dry_run else []
    command += ["--rows", rows] if rows else []
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
            # Also ends processes that the section left running: the next section needs the GPU.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            # A process that waits for a driver may survive even this; other sections still run.
            with suppress(subprocess.TimeoutExpired):
                process.wait(KILL_SECONDS)
    seconds = time.monotonic() - start
    found: Results = {}
    with suppress(OSError, ValueError):
        found = json.loads(findings.read_text())
    status = _status(code, limit, bool(found.pop("cut_short", False)))
    result: Results = {"status": status, "seconds": round(seconds, 1)} | found
    if status != "passed":
        result["log"] = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
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
    """Return a section's environment, with the tools of this Python and of CUDA on PATH."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    folders = [str(Path(sys.executable).parent), environment.get("PATH", os.defpath)]
    toolkit = Path(environment.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    if not shutil.which("nvcc") and toolkit.is_dir():
        folders.append(str(toolkit))
    environment["PATH"] = os.pathsep.join(folders)
    if dry_run:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    if (ROOT / "dimr_fast" / "kernels").is_dir():
        # Built in place and perhaps not installed: see `build_in_place`.
        others = environment.get("PYTHONPATH", "").split(os.pathsep)
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, others)])
    return environment


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [section.name for section in SECTIONS]
    with_rows = [section.name for section in SECTIONS if section.has_rows]
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=9.0, help="of the whole run (default: 9)")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME[:ROWS]",
        help=f"sections to run: {', '.join(names)}. ROWS (for {', '.join(with_rows)}) is a pytest "
        "-k expression or, for tune, names of kernels",
    )
    parser.add_argument("--archive", type=Path, metavar="FILE", help="pack DIR as .tar.gz")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="archive to start from")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, at tiny sizes")
    options = parser.parse_args()
    only = {}
    for choice in options.only:
        name, _, rows = choice.partition(":")
        if name not in (with_rows if rows else names):
            parser.error(f"--only: got {choice!r}, expected one of {', '.join(names)}")
        only[name] = rows or None
    # The section that is running then ends with this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    out = options.out.resolve()
    results = run(
        SECTIONS,
        out,
        minutes=options.minutes,
        only=only,
        archive=options.archive and options.archive.resolve(),
        resume=options.resume,
        dry_run=options.dry_run,
    )
    report = (out / "report.md").read_text()
    print(report[:PRINTED_CHARACTERS] + ("\n…" if len(report) > PRINTED_CHARACTERS else ""))
    print(f"{out / 'report.md'}")
    wanted = only or names
    return int(any(results["sections"][name]["status"] != "passed" for name in wanted))


if __name__ == "__main__":
    sys.exit(main())
