"""Read results files of the whole model's benchmark."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.utils import machine
from benchmarks.utils.spread import Spread


class Group(NamedTuple):
    """A pass of a model, which several providers execute."""

    preset: str
    title: str
    batch: int
    dtype: str


@dataclass(frozen=True)
class Entry:
    """A row of a results file: its facts, and the seconds of a call."""

    info: Mapping[str, Any]
    seconds: Spread

    @property
    def group(self) -> Group:
        """Return preset, pass, batch and dtype."""
        i = self.info
        return Group(i["preset"], i["pass"], i["batch"], i["dtype"])

    @property
    def provider(self) -> str:
        """Return the name of the provider."""
        return str(self.info["implementation"])

    @property
    def tflops(self) -> Spread:
        """Return TFLOP/s, without recomputed work."""
        return Spread.of([1e-12 * self.info["flops"]]) / self.seconds

    @property
    def gemm_share(self) -> Spread:
        """Return the per cent of the rate of a linear layer, measured beside the row."""
        names = ("gemm_tflops", "gemm_tflops_p20", "gemm_tflops_p80")
        return (self.tflops / Spread(*(self.info[name] for name in names))).scaled(100)


@dataclass(frozen=True)
class ModelResults:
    """The entries of one results file, and the machine it was measured on."""

    name: str
    machine: str
    entries: list[Entry]

    @classmethod
    def read(cls, path: Path) -> "ModelResults":
        """Read a file of pytest-benchmark. Raises ValueError if it has no rows."""
        content: dict[str, Any] = json.loads(path.read_text())
        entries = [
            Entry(b["extra_info"], Spread.of(b["stats"]["data"])) for b in content["benchmarks"]
        ]
        if not entries:
            raise ValueError(f"path: got {path} without benchmarks, expected at least one")
        return cls(path.stem, machine_line(content), entries)

    @property
    def on_cpu(self) -> bool:
        """Return True if the model ran on a CPU."""
        return bool(self.entries[0].info["device"] == "CPU")

    def groups(self) -> dict[Group, dict[str, Entry]]:
        """Return the entries of each group by provider."""
        found: dict[Group, dict[str, Entry]] = {}
        for entry in self.entries:
            found.setdefault(entry.group, {})[entry.provider] = entry
        return found

    def find(self, group: Group, provider: str) -> Entry | None:
        """Return a provider's entry in a group, or None."""
        return self.groups().get(group, {}).get(provider)


def machine_line(content: Mapping[str, Any]) -> str:
    """Return device, threads, version, commit and date of a pytest-benchmark file."""
    info = content["benchmarks"][0]["extra_info"]
    on_cpu = info["device"] == "CPU"
    facts = {
        "device": content["machine_info"]["cpu"]["brand_raw"] if on_cpu else info["device"],
        "torch": info["torch"],
        "commit": content["commit_info"].get("id", "unknown"),
        "date": content["datetime"][:10],
    }
    return machine.summary(facts | ({"threads": info["threads"]} if on_cpu else {}))
