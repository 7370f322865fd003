"""Everything worth knowing from a GPU, in one command: `python benchmarks/gpu_report.py --out DIR`.

Builds, tests, measures, tunes, benchmarks and checks memory, most important first, each section in
a process of its own with a time limit: what fails, hangs or crashes costs only itself, and time
that a section does not need goes to those after it. DIR is brought up to date after every section,
so a run that is cut off leaves its best part:

    report.md, results.json    all of it, to read and to compute with
    benchmarks/*.json          pytest-benchmark's, for `benchmarks/results/`
    configurations/*.json      tuned, for `kernels/configurations/` (in this checkout already)
    <section>.log, .json       what a section printed, and what it found

`--archive FILE` packs DIR after every section, and `--resume FILE` goes on from such an archive.
`--only NAME…` runs these sections, after a build where there is none, and keeps what DIR holds of
the others; `NAME:ROWS` runs single rows of a benchmark. `--dry-run` runs everything on the CPU at
tiny sizes. Exits with 0 where every section ran to its end, and well.
benchmarks/README.md plans the calls of an hour with a GPU.
"""

import argparse
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
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
CONFIGURATIONS = ROOT / "kernels" / "configurations"
TAIL = 40
"""Lines of a log that the report shows where a section did not end well."""
SHOWN = 11_000
"""Characters of the report that are printed: some hosts return only so much of the output."""
ENDING = 2.0
"""Seconds that a killed section has to end."""

Results = dict[str, Any]


@dataclass(frozen=True)
class Section:
    """A part of the report: the time it is planned to take, and what it needs.

    `needs_build`: the package and its compiled libraries, in place. `rows`: it can run single ones.
    `command` runs it, if `gpu_sections.py` does not.
    """

    name: str
    seconds: float
    command: Sequence[str] | None = None
    needs_build: bool = True
    rows: bool = False


SECTIONS = (
    Section("machine", 60, needs_build=False),
    Section("build", 120, needs_build=False),
    Section("tests", 45),
    Section("measure", 75),
    Section("kernels", 90),
    Section("tune", 150, rows=True),
    Section("model", 180, rows=True),
    Section("operators", 120, rows=True),
    Section("compiled", 165, rows=True),
    Section("plots", 15, needs_build=False),
    Section("memory", 120),
)
"""In order of importance; `gpu_sections.py` says what each does."""


def run(
    sections: Sequence[Section],
    out: Path,
    *,
    minutes: float,
    only: Mapping[str, str | None] | None = None,
    archive: Path | None = None,
    resume: Path | None = None,
    dry_run: bool = False,
) -> Results:
    """Run the sections, or `only` some of them, within `minutes`; what `results.json` then holds.

    `only` maps names of sections to the rows that are wanted, None for all. A section is given its
    planned time or, where there is more than all of them need, more in proportion.
    """
    end = time.monotonic() + 60 * minutes
    out.mkdir(parents=True, exist_ok=True)
    if resume:
        try:
            with tarfile.open(resume) as packed:
                packed.extractall(out, filter="data")
        except (OSError, tarfile.TarError) as error:
            # What follows is worth having without it.
            print(f"--resume: got {resume}, expected an archive: {error}", file=sys.stderr)
    elif not only:
        # Rows of another state of the code would otherwise stay among the new ones.
        shutil.rmtree(out / "benchmarks", ignore_errors=True)
        (out / "results.json").unlink(missing_ok=True)
    if not dry_run:
        for file in (out / "configurations").glob("*.json"):
            shutil.copy(file, CONFIGURATIONS)
    results = _earlier(out)
    results |= {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "minutes": minutes,
        "dry_run": dry_run,
    }
    done = results.setdefault("sections", {})
    waiting = _chosen(sections, only or {}, dry_run)
    for section in waiting:
        done[section.name] = {"status": "not reached"}
    gpu = None
    while waiting:
        left = end - time.monotonic()
        spare = max(1.0, left / sum(s.seconds for s in waiting))
        section = waiting.pop(0)
        limit = min(left, section.seconds * spare)
        if limit < 1:
            continue
        print(f"{section.name}: up to {limit:.0f} s", flush=True)
        found = _run_section(section, out, limit, dry_run, (only or {}).get(section.name))
        print(f"  {found['status']}", flush=True)
        if section.name == "machine":
            gpu = found.get("facts", {}).get("GPU")
        done[section.name] = found | ({"GPU": gpu} if gpu else {})
        in_order = {s.name: done[s.name] for s in sections if s.name in done}
        results["sections"] = done = in_order | done
        _write(results, out, archive)
        if gpu == "none" and not dry_run:
            print("There is no GPU: only --dry-run runs here.", file=sys.stderr)
            break
    _write(results, out, archive)
    return results


def _chosen(
    sections: Sequence[Section], only: Mapping[str, str | None], dry_run: bool
) -> list[Section]:
    """The sections to run: those wanted and, first, what they need.

    Each run says which machine it was on; a machine that starts bare lacks the build.
    """
    wanted = {s.name for s in sections if not only or s.name in only}
    wanted.add("machine")
    if not dry_run and not built() and any(s.needs_build for s in sections if s.name in wanted):
        wanted.add("build")
    return [s for s in sections if s.name in wanted]


def built(package: Path = ROOT / "dimr_fast") -> bool:
    """Whether the package is there with its kernels and libraries, for this Python."""
    bindings = f"_bindings{sysconfig.get_config_var('EXT_SUFFIX')}"
    needed = ("kernels", bindings, "libdimr_fast_cpu.so")
    return all((package / name).exists() for name in needed)


def _write(results: Results, out: Path, archive: Path | None) -> None:
    try:
        render(results, out)
        if archive:
            pack(out, archive)
    except Exception:
        # What a section wrote may be unlike anything foreseen; the others still run.
        traceback.print_exc()


def pack(folder: Path, archive: Path) -> None:
    """Put a compressed archive of what `folder` holds in the place of `archive`, at once."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    unfinished = archive.with_name(f".{archive.name}.part")
    with tarfile.open(unfinished, "w:gz") as packed:
        for file in sorted(folder.rglob("*")):
            hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
            if file.is_file() and not hidden and file != archive:
                packed.add(file, file.relative_to(folder))
    os.replace(unfinished, archive)


def _earlier(out: Path) -> Results:
    path = out / "results.json"
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def _run_section(
    section: Section, out: Path, limit: float, dry_run: bool, rows: str | None
) -> Results:
    """Run one section to its end or its limit; its status and all that it found until then."""
    log, part = out / f"{section.name}.log", out / f"{section.name}.json"
    part.unlink(missing_ok=True)
    command = list(section.command or (sys.executable, str(SECTIONS_FILE), section.name))
    command += ["--out", str(out), "--seconds", str(limit), *(["--dry-run"] if dry_run else [])]
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
            # Also what it left running when it ended by itself: the next section wants the GPU.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            # One that waits for a driver does not even then end; the others still run.
            with suppress(subprocess.TimeoutExpired):
                process.wait(ENDING)
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
        others = environment.get("PYTHONPATH", "").split(os.pathsep)
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, others)])
    return environment


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [section.name for section in SECTIONS]
    with_rows = [section.name for section in SECTIONS if section.rows]
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=9.0, help="in all (default: 9)")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME[:ROWS]",
        help=f"of {', '.join(names)}; ROWS, of {', '.join(with_rows)}, is a pytest expression (-k) "
        "or, of tune, names of kernels",
    )
    parser.add_argument("--archive", type=Path, metavar="FILE", help="keep DIR in it, as .tar.gz")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="an archive to go on from")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    only = {}
    for choice in options.only:
        name, _, rows = choice.partition(":")
        if name not in (with_rows if rows else names):
            parser.error(f"--only: got {choice!r}, expected one of {', '.join(names)}")
        only[name] = rows or None
    # So that a section in progress ends with this process.
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
    print(report[:SHOWN] + ("\n…" if len(report) > SHOWN else ""))
    print(f"{out / 'report.md'}")
    wanted = only or names
    return int(any(results["sections"][name]["status"] != "passed" for name in wanted))


if __name__ == "__main__":
    sys.exit(main())
