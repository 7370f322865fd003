"""Show what training on several processes sends, and what that may cost on many GPUs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.utils import machine
from benchmarks.utils.markdown import table


@dataclass(frozen=True)
class Cluster:
    """Assumptions about GPUs and their network; none of them is a measurement."""

    flops: float = 400e12
    """FLOP a second of a GPU in training and sampling, bf16."""
    machine_size: int = 8
    """GPUs of one machine."""
    fast: float = 300e9
    """Bytes a second that a GPU sends to another of its machine."""
    slow: float = 200e9
    """Bytes a second that a machine sends to the others, by the network cards of all its GPUs."""
    latency: float = 10e-6
    """Seconds of a message to a neighbour, once for each doubling of the number of GPUs."""

    def sentence(self) -> str:
        """Return the assumptions in words."""
        return (
            f"Assumed, not measured: a GPU computes {self.flops / 1e12:.0f} TFLOP/s, at any number "
            f"of images; it sends {self.fast / 1e9:.0f} GB/s within a machine of "
            f"{self.machine_size} GPUs, and such a machine {self.slow / 1e9:.0f} GB/s to others; a "
            f"message takes {self.latency * 1e6:.0f} µs for each doubling of their number. DDP and "
            "FSDP2 send while a GPU computes. How much is not known, so days are given as a range: "
            "all of it, and nothing."
        )

    def seconds(self, kind: str, messages: int, size: int, gpus: int) -> float:
        """Return the time of `messages` collectives that carry `size` bytes together.

        By ring algorithms: each GPU sends (N − 1)/N of the bytes to gather or to scatter them, and
        twice as many to reduce them in all. Rings through all network cards of a machine share the
        bytes, so the slower of both rates counts.
        """
        rate = self.fast if gpus <= self.machine_size else min(self.fast, self.slow)
        return sent(kind, size, gpus) / rate + messages * self.latency * math.log2(gpus)


ASSUMED = Cluster()
GPUS = (8, 64, 512)
TRAINING = {"steps": 1_000_000, "batch": 1024}
"""The published training at 256×256 (recipes imagenet256_xl2r and imagenet256_g2r)."""
SAMPLES = {"count": 50_000, "evaluations": 25, "batch": 50}
"""Guided samples as `dimr-fast sample` draws latents: two forward passes for each evaluation."""


def sent(kind: str, size: int, processes: int) -> float:
    """Return the bytes that each process sends in a ring for a collective of `size` bytes."""
    rounds = 2 if kind == "all-reduce" else 1
    return rounds * size * (processes - 1) / processes


def communication_text(report: Mapping[str, Any]) -> str:
    """Return the tables of `results/communication.json`: counts, then costs on paper."""
    counted = [
        {
            "preset": name,
            "sharding": _title(sharding),
            "collective": kind,
            "messages": row["messages"],
            "MB": f"{row['bytes'] / 1e6:,.3f}",
        }
        for name, found in report["presets"].items()
        for sharding in ("none", "fsdp2")
        for kind, row in found[sharding].items()
    ]
    return (
        "Collectives of one training step, counted in the step of this code "
        f"({machine.summary(report)}). MB are those of the whole fp32 tensors. A step of any "
        "number of processes has the same, up to padding; sampling and extraction have none.\n\n"
        f"{table(counted)}\n\n{_costs(report)}"
    )


def _costs(report: Mapping[str, Any]) -> str:
    training, samples = [], []
    for name, found in report["presets"].items():
        for gpus in GPUS:
            images = TRAINING["batch"] / gpus
            compute = found["training_flops"] * images / ASSUMED.flops
            row = {"preset": name, "GPUs": gpus, "images a GPU": f"{images:g}"}
            row |= {"computing, ms": f"{compute * 1e3:.1f}"}
            for sharding in ("none", "fsdp2"):
                network = sum(
                    ASSUMED.seconds(kind, part["messages"], part["bytes"], gpus)
                    for kind, part in found[sharding].items()
                )
                days = TRAINING["steps"] * (compute + network) / 86_400
                least = TRAINING["steps"] * max(compute, network) / 86_400
                row |= {
                    f"{_title(sharding)}, sending, ms": f"{network * 1e3:.1f}",
                    f"{_title(sharding)}, days": f"{least:.2f}–{days:.2f}",
                }
            training.append(row)
            batches = math.ceil(SAMPLES["count"] / SAMPLES["batch"])
            image = 2 * SAMPLES["evaluations"] * found["forward_flops"] / ASSUMED.flops
            seconds = math.ceil(batches / gpus) * SAMPLES["batch"] * image
            samples.append(
                {
                    "preset": name,
                    "GPUs": gpus,
                    "batches of a GPU": math.ceil(batches / gpus),
                    "seconds": f"{seconds:.0f}",
                    "GPU hours": f"{seconds * gpus / 3600:.2f}",
                }
            )
    return (
        f"On paper, from these counts and the FLOP of the model. {ASSUMED.sentence()}\n\n"
        f"The published training, {TRAINING['steps']:,} steps of {TRAINING['batch']} images:\n\n"
        f"{table(training)}\n\n"
        f"{SAMPLES['count']:,} guided samples of {SAMPLES['evaluations']} evaluations in batches "
        f"of {SAMPLES['batch']}, without the autoencoder; nothing is sent, and a batch is never "
        f"divided:\n\n{table(samples)}"
    )


def processes_text(report: Mapping[str, Any]) -> str:
    """Return the table of `results/processes.json`."""
    (alone,) = [row for row in report["rows"] if row["processes"] == 1]
    rows = [
        {
            "processes": row["processes"],
            "sharding": "–" if row["processes"] == 1 else _title(row["sharding"]),
            "images/s, all together": f"{row['images_per_second']:.1f}",
            "of one process": f"{row['images_per_second'] / alone['images_per_second']:.0%}",
            "MB of a process": f"{row['resident_bytes_of_a_process'] / 1e6:,.0f}",
        }
        for row in report["rows"]
    ]
    cores = "one core" if report["cores"] == 1 else f"{report['cores']} cores"
    return (
        f"Training steps of the {alone['preset']} preset, {alone['batch']} images for all "
        f"processes together, over {report['backend']} on one machine; they share {cores} "
        f"({machine.summary({k: v for k, v in report.items() if k != 'threads'})}). So this shows "
        "what dividing the work costs, not what more machines gain. MB are the largest resident "
        f"memory, most of it libraries.\n\n{table(rows)}"
    )


def _title(sharding: str) -> str:
    return {"none": "DDP", "fsdp2": "FSDP2"}[sharding]
