"""What the CUDA kernels compile to: registers, memory and instructions.

    python -m tests.support.cuda_resources

records the built library's in `RECORD` and rewrites the table of csrc/cuda/depthwise_conv2d.md
from a fresh compilation of the designs that it compares.
"""

import functools
import importlib.util
import json
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dimr_fast import _extension
from tests.support.emulation import Emulation, build
from tests.support.paths import FILES, ROOT

LIBRARY = ROOT / "dimr_fast" / "libdimr_fast_cuda.so"
RECORD = FILES / "depthwise_conv2d_cuda.json"
NOTE = ROOT / "csrc" / "cuda" / "depthwise_conv2d.md"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
REGISTERS = 64 * 1024  # of a multiprocessor, in each of these architectures
THREADS = 128  # of a block
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TILED = (3, 5, 7, 9, 11)  # kernel sizes with kernels of their own

_TYPES = {"f": "float32", "6__half": "float16", "13__nv_bfloat16": "bfloat16"}
_LOADS = ("LDG", "LDS", "LDGSTS")


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel; `loop` counts the instructions of its innermost loop that multiplies."""

    registers: int
    stack: int
    opcodes: Counter[str]
    loop: Counter[str]

    @property
    def loads(self) -> int:
        """Load instructions of the loop."""
        return count(self.loop, *_LOADS)


def count(opcodes: Counter[str], *names: str) -> int:
    """Instructions of these names, whatever follows the dot."""
    return sum(n for opcode, n in opcodes.items() if opcode.split(".")[0] in names)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def cuobjdump() -> str | None:
    """NVIDIA's disassembler: the toolkit's or the one in Triton's wheel."""
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        tool = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(tool) if tool.is_file() else None
    return found


def why_not() -> str | None:
    """The reason why the library cannot be examined, or None."""
    if not LIBRARY.is_file():
        return f"cuda library: {_extension.why_not('cuda')}"
    return None if cuobjdump() else "no cuobjdump: neither a CUDA toolkit's nor Triton's"


@functools.cache
def examine(file: Path, architecture: str) -> dict[str, Kernel]:
    """The kernels of a library or cubin by short name, such as "fwd bfloat16 7"."""
    usage = {
        name: {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", line)}
        for name, line in re.findall(
            r"Function (\S+):\n(.*)", _run("-res-usage", "-arch", architecture, file)
        )
    }
    kernels = {}
    sass = _run("-sass", "-arch", architecture, file)
    for name, body in re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", sass, re.DOTALL):
        opcodes, loop = _instructions(body)
        used = usage[name]
        kernels[_short(name)] = Kernel(used["REG"], used["STACK"] + used["LOCAL"], opcodes, loop)
    return kernels


def _run(*arguments: object) -> str:
    tool = cuobjdump()
    assert tool is not None
    command = [tool, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _short(name: str) -> str:
    pattern = r"dimr_fast\d+(\w+?)_kernel(?:I(f|\d+__half|\d+__nv_bfloat16)(?:Li(\d+))?)?"
    parts = re.search(pattern, name)
    assert parts, name
    kind = parts[1].removeprefix("depthwise_conv2d_")
    return " ".join(p for p in (kind, _TYPES.get(parts[2] or ""), parts[3]) if p)


def _instructions(body: str) -> tuple[Counter[str], Counter[str]]:
    found = [
        (int(address, 16), opcode, operands)
        for address, predicate, opcode, operands in re.findall(
            r"/\*([0-9a-f]{4,})\*/ +(@!?U?P\w+ )? *([A-Z][\w.]+)([^;]*);", body
        )
        # What never runs, put there to keep instructions apart.
        if opcode != "NOP" and predicate != "@!PT "
    ]
    loops = []
    for address, opcode, operands in found:
        target = re.search(r"0x([0-9a-f]+)", operands)
        if opcode.startswith("BRA") and target and int(target[1], 16) < address:
            start = int(target[1], 16)
            loop = Counter(o for a, o, _ in found if start <= a <= address)
            if count(loop, "FFMA"):
                loops.append(loop)
    innermost = min(loops, key=lambda loop: loop.total(), default=Counter())
    return Counter(opcode for _, opcode, _ in found), innermost


def record() -> dict[str, Any]:
    """What `RECORD` should hold for the built library."""
    with tempfile.TemporaryDirectory() as folder:
        program = build(Path(folder))
        shared = {
            f"{_name(dtype)} {k}": shared_memory(program, k, dtype)
            for dtype in DTYPES
            for k in TILED
        }
    return {
        "nvcc": _extension.build_facts()["cuda"],
        "registers": {
            architecture: {
                name: kernel.registers
                for name, kernel in sorted(examine(LIBRARY, architecture).items())
            }
            for architecture in ARCHITECTURES
        },
        "shared": shared,
    }


def recorded() -> dict[str, Any]:
    """The contents of `RECORD`."""
    return json.loads(RECORD.read_text())


def shared_memory(program: Path, k: int, dtype: torch.dtype) -> list[int]:
    """Bytes of shared memory that a block asks for, forward and for the weight gradient."""
    x = torch.ones(1, 1, 1, 8, dtype=dtype)
    weight, emulation = torch.ones(8, 1, k, k, dtype=dtype), Emulation(program)
    emulation.bwd(x, x, weight, False)
    return [launch.shared for launch in emulation.launches[:2]]


def design_table() -> str:
    """The comparison of designs, compiled now, as a Markdown table."""
    titles = {"vectors": "8 channels × 1 column", "pairs": "2 channels × 4 columns"}
    titles["fwd bfloat16 7"] = "1 channel × 8 columns (shipped)"
    rows = [
        "| design | GPU | registers | warps an SM | FFMA | shared loads | global loads and copies "
        "| moves | whole loop |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    source = ROOT / "tests" / "cuda_emulation" / "designs.cu"
    for architecture in ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "designs.cubin"
            options = ["-std=c++20", "-O3", f"-arch={architecture}", "-cubin", "-I", ROOT / "csrc"]
            subprocess.run(["nvcc", *options, source, "-o", cubin], check=True)
            kernels = examine(cubin, architecture)
        for name, title in titles.items():
            kernel = next(k for n, k in kernels.items() if n.startswith(name))
            blocks = REGISTERS // (THREADS * -(-kernel.registers // 8) * 8)
            numbers = [
                kernel.registers,
                blocks * THREADS // 32,
                count(kernel.loop, "FFMA"),
                count(kernel.loop, "LDS"),
                count(kernel.loop, "LDG", "LDGSTS"),
                count(kernel.loop, "MOV"),
                kernel.loop.total(),
            ]
            rows.append(f"| {title} | {architecture} | {' | '.join(map(str, numbers))} |")
    return "\n".join(rows)


if __name__ == "__main__":
    RECORD.write_text(json.dumps(record(), indent=1) + "\n")
    before, _, after = NOTE.read_text().partition("<!-- designs -->\n")
    after = after.partition("<!-- /designs -->\n")[2]
    table = f"<!-- designs -->\n{design_table()}\n<!-- /designs -->\n"
    NOTE.write_text(before + table + after)
