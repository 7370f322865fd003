"""Ask nvidia-smi for the state of the GPU."""

import subprocess
import time
from collections.abc import Callable


def query(fields: str, meanwhile: Callable[[], object] | None = None) -> dict[str, str]:
    """Return the first GPU's values of comma-separated fields; {} without nvidia-smi.

    `meanwhile` is called repeatedly until the answer arrives.
    """
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    end = time.monotonic() + 20
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    except OSError:
        return {}
    with process:
        while meanwhile and process.poll() is None and time.monotonic() < end:
            meanwhile()
        try:
            answer, _ = process.communicate(timeout=max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            return {}
    values = answer.splitlines()[0].split(",") if process.returncode == 0 else []
    return dict(zip(fields.split(","), map(str.strip, values), strict=False))
