"""Compile the launchers' kernels ahead of time, for GPUs that need not be present.

A test module lists its launches, on meta tensors, in a function `aot_launches() -> list[Launch]`.
`compiled("tests.ops.test_td_rms_norm")` runs them in a process of its own, because Triton may be
interpreting in this one. There Triton's driver is replaced by one that claims the target, and every
launch by its compilation. So what is examined is what a user's call would run: the launcher's
own constants, strides and alignments.
"""

import functools
import importlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tests.support.paths import ROOT

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class Launch:
    """A call whose kernels are compiled: its name, the call, and the targets.

    `oldest` is the first NVIDIA architecture that the kernels can be compiled for.
    """

    name: str
    call: Callable[[], Any]
    targets: tuple[str, ...] = ("sm_90",)
    oldest: int = 80


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel: registers per thread, spilled bytes or registers, SASS by opcode.

    `opcodes` counts full opcodes with their modifiers ("LDG.E.128"), `loops` those of each loop in
    order of address; none for gfx942. `grids` are the programs of each launch, of `warps` each.
    """

    launch: str
    target: str
    configurations: str
    kernel: str
    registers: int
    spilled: int
    shared: int
    warps: int
    grids: list[int]
    opcodes: dict[str, int]
    loops: list[dict[str, int]]

    def count(self, opcode: str) -> int:
        """Return the number of instructions whose opcode begins with `opcode`."""
        return sum(n for name, n in self.opcodes.items() if name.startswith(opcode))


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Return a tensor for a launch: its address is a multiple of 16, and it has no memory."""
    return torch.empty(*shape, dtype=dtype, device="meta")


@functools.cache
def compiled(module: str) -> tuple[Compiled, ...]:
    """Return every kernel that the launches of a test module compile to."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "compiled.json"
        command = [sys.executable, "-m", "tests.support.aot", module, str(output)]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(f"compiling ahead of time failed:\n{result.stdout}{result.stderr}")
        return tuple(Compiled(**entry) for entry in json.loads(output.read_text()))


class _Driver:
    """Replaces the driver of a GPU that is not present."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def _compile(module: str) -> list[Compiled]:
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from dimr_fast.kernels import configuration

    found: dict[int, tuple[str, Any, list[int]]] = {}
    launched: set[Any] = set()
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        launched.add(self)
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        _, _, grids = found.setdefault(id(kernel), (self.__name__, kernel, []))
        grids.append(math.prod(grid))
        return kernel

    JITFunction.run = compile_only
    results = []
    for file in sorted(configuration.FOLDER.glob("*.json")):
        configuration.use_files_of(file.stem)
        for launch in importlib.import_module(module).aot_launches():
            for target in launch.targets if file.stem == "default" else _targets(file.stem):
                arch = target.removeprefix("sm_")
                is_cuda = target != arch
                if is_cuda and int(arch) < launch.oldest:
                    continue
                gpu = GPUTarget("cuda", int(arch), 32) if is_cuda else GPUTarget("hip", arch, 64)
                driver.set_active(_Driver(gpu))
                found.clear()
                for function in launched:
                    # Forget what was compiled for another target.
                    function.device_caches.clear()
                launch.call()
                assert found, f"{launch.name} launched nothing"
                examine = _examine_cuda if is_cuda else _examine_hip
                results += [
                    Compiled(
                        launch.name,
                        target,
                        file.stem,
                        name,
                        warps=kernel.metadata.num_warps,
                        grids=grids,
                        **examine(kernel),
                    )
                    for name, kernel, grids in found.values()
                ]
    return results


def _targets(gpu: str) -> tuple[str, ...]:
    """Return the architecture of a GPU that has its own file of configurations."""
    names = {"A100": "sm_80", "H100": "sm_90", "H200": "sm_90", "GH200": "sm_90", "B200": "sm_100"}
    return tuple({target for name, target in names.items() if name in gpu})


def _examine_cuda(kernel: Any) -> dict[str, Any]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", "-sass", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    pattern = r"^\s+/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]+)([^;]*)"
    found = re.findall(pattern, text, re.MULTILINE)
    assert found, "no SASS read"
    # The padding after the code is not executed: it begins with a branch to itself.
    code = [(int(address, 16), opcode, rest) for address, opcode, rest in found if opcode != "NOP"]
    loops = []
    for address, opcode, rest in code:
        to = re.search(r"0x([0-9a-f]+)", rest) if opcode.startswith("BRA") else None
        if to and int(to[1], 16) < address:
            loops.append(Counter(o for a, o, _ in code if int(to[1], 16) <= a <= address))
    return {
        "registers": usage["REG"],
        "spilled": usage["STACK"] + usage["LOCAL"],
        "shared": kernel.metadata.shared,
        "opcodes": dict(Counter(opcode for _, opcode, _ in code)),
        "loops": [dict(loop) for loop in loops],
    }


def _examine_hip(kernel: Any) -> dict[str, Any]:
    text = kernel.asm["amdgcn"]
    wanted = "vgpr_count|vgpr_spill_count|private_segment_fixed_size"
    fields = dict(re.findall(rf"\.({wanted}):\s+(\d+)", text))
    return {
        "registers": int(fields["vgpr_count"]),
        # Scalar registers do not count: they spill to lanes of a vector register. If they spilled
        # to memory, the private segment would show it.
        "spilled": int(fields["vgpr_spill_count"]) + int(fields["private_segment_fixed_size"]),
        "shared": kernel.metadata.shared,
        "opcodes": {},
        "loops": [],
    }


if __name__ == "__main__":
    _, module, output = sys.argv
    Path(output).write_text(json.dumps([asdict(entry) for entry in _compile(module)]))
