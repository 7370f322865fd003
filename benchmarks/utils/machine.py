"""Describe the machine and the code that a measurement ran on."""

import datetime
import platform
import re
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.utils.files import ROOT


def processor() -> str:
    """Return the model name of the CPU."""
    with suppress(OSError):
        names = re.findall(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.M)
        if names:
            return str(names[0])
    return platform.processor() or "unknown processor"


def commit(*paths: str) -> str:
    """Return the hash of the current commit, with "+" if files under `paths` differ from it.

    Without `paths`, every file counts. Returns "unknown" outside a git checkout.
    """
    revision = _git("rev-parse", "HEAD")
    if not revision:
        return "unknown"
    return revision + ("+" if _git("status", "--porcelain", "--", *paths) else "")


def description(*paths: str) -> dict[str, Any]:
    """Return hardware, versions, commit (see `commit`) and date, for a results file."""
    import torch

    on_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(*paths),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def summary(facts: Mapping[str, Any]) -> str:
    """Return device, threads, version of torch, commit and date in one line, if they are known."""
    threads = facts.get("threads")
    formats = {
        "device": "{}",
        "threads": "{} thread" if threads == 1 else "{} threads",
        "torch": "torch {}",
        "commit": "commit {:.9}",
        "date": "{}",
    }
    return ", ".join(form.format(facts[key]) for key, form in formats.items() if key in facts)


def _git(*arguments: str) -> str:
    with suppress(OSError):
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()
    return ""
