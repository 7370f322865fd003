"""Small sampling jobs."""

from pathlib import Path
from typing import Any

from dimr_fast.checkpoint import TrainedModel
from dimr_fast.sampling import SampleConfig, SamplerConfig
from tests.support.models import write_checkpoint


def small_job(trained: TrainedModel, folder: Path, **changes: Any) -> SampleConfig:
    """Return a job of 12 images in batches of 2 that writes every format to `folder`/out."""
    checkpoint = folder / "checkpoint.safetensors"
    if not checkpoint.exists():
        write_checkpoint(trained, checkpoint)
    values: dict[str, Any] = {
        "checkpoint": checkpoint,
        "output": folder / "out",
        "per_class": 2,
        "formats": ("grid", "png", "npz"),
        "sampler": SamplerConfig(steps=2, batch_size=2, precision="fp32"),
    }
    return SampleConfig(**(values | changes))


def command_words(job: SampleConfig) -> list[str]:
    """Return the words of the same job on the command line."""
    sampler = job.sampler
    options = {
        "--checkpoint": job.checkpoint,
        "--output": job.output,
        "--per-class": job.per_class,
        "--steps": sampler.steps,
        "--batch-size": sampler.batch_size,
        "--precision": sampler.precision,
    }
    words = [str(word) for option in options.items() for word in option]
    return ["sample", *words, "--formats", *job.formats]


def contents(folder: Path) -> dict[str, bytes]:
    """Return the content of every file but the report, which names the folder's checkpoint."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "sample.json"
    }
