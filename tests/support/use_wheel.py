"""Use an installed wheel as a user without compilers does: `python use_wheel.py`.

It draws with the packaged model in the working directory. Ends with 1 if the CPU library is absent.
"""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import dimr_fast
from dimr_fast import _extension

COMMAND = Path(sysconfig.get_path("scripts"), "dimr-fast")

assert Path(sysconfig.get_path("platlib")) in Path(dimr_fast.__file__).parents, dimr_fast.__file__
if reason := _extension.why_not("cpu"):
    sys.exit(f"cpu library: {reason}")
information = subprocess.run([COMMAND, "info"], capture_output=True, text=True, check=True).stdout
assert "cpu (float32" in information, information

settings = ["--count", "2", "--steps", "2", "--formats", "png"]
subprocess.run([COMMAND, "sample", "--output", "drawn", *settings], check=True)
pictures = [path.read_bytes() for path in sorted(Path("drawn", "images").glob("*.png"))]
assert [picture[:8] for picture in pictures] == [b"\x89PNG\r\n\x1a\n"] * 2
print(json.dumps({"instruction_set": _extension.instruction_set(), **_extension.build_facts()}))
