"""Encode a folder of images as latent shards: `dimr-fast extract`.

Each shard is written by one worker, from images that its position determines, and carries the
settings of the extraction (see `utils.sharded`). So workers and runs need no other coordination,
and the files do not depend on their number.
"""

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dimr_fast.data.autoencoder import Autoencoder
from dimr_fast.data.images import ImageFiles, list_images, read_image
from dimr_fast.data.latents import FORMAT, MANIFEST, open_shard, read_manifest, write_shard
from dimr_fast.data.scaling import LatentScale, scale_to_dict
from dimr_fast.errors import DamagedShardError, UnreadableImageError
from dimr_fast.utils.device import DTYPES, resolve_device
from dimr_fast.utils.distributed import Worker, exit_with_launcher
from dimr_fast.utils.files import prepare_output, write_json
from dimr_fast.utils.sharded import (
    Progress,
    Shard,
    choose_process_count,
    run_sharded,
    split_into_shards,
)
from dimr_fast.utils.validation import require_fields

MAX_CPU_PROCESSES = 8
"""Default limit of processes on a CPU: each holds an autoencoder in memory."""


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """Settings of an extraction.

    The number of processes does not change the latents; batch size and device change their
    rounding.
    """

    images: Path
    """Folder of images with one sub-folder for each class; without sub-folders it is one class."""
    autoencoder: str
    """Folder of a diffusers AutoencoderKL, or its name on the Hugging Face Hub."""
    output: Path
    """Output folder for the shards and `manifest.json`; shards of a killed run are kept."""
    image_size: int = 256
    """Images are resized and cropped to squares of this many pixels."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Stored dtype. An image of 256 pixels and its mirror image take 64 KiB in fp32, else 32."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Dtype in which the autoencoder computes."""
    batch_size: int = 32
    shard_size: int = 1024
    """Images in one shard, the unit of work: a killed process loses at most one shard."""
    processes: int | None = None
    """Processes to start. None starts one for each GPU, or one for each CPU core up to 8, and one
    where a launcher such as torchrun has started several."""
    device: str = "auto"

    def validate(self) -> None:
        """Raise ValueError naming a setting that is out of range."""
        require_fields(
            self,
            image_size=(self.image_size > 0, "1 or more"),
            dtype=(self.dtype in DTYPES, f"one of {', '.join(DTYPES)}"),
            precision=(self.precision in ("fp32", "bf16"), "fp32 or bf16"),
            batch_size=(self.batch_size > 0, "1 or more"),
            shard_size=(self.shard_size > 0, "1 or more"),
            processes=(self.processes is None or self.processes > 0, "1 or more, or None"),
        )


@dataclass(frozen=True)
class ExtractSummary:
    """Summary of an extraction. `skipped`: pairs of (file, reason)."""

    output: Path
    images: int
    classes: int
    shards: int
    skipped: tuple[tuple[str, str], ...]
    empty_classes: tuple[str, ...]
    """Classes of which no image was readable."""
    finished: bool
    """True if all shards exist; otherwise other processes of the launch are still working."""

    def sentence(self) -> str:
        """Return the summary in words, with the first ten skipped files."""
        if not self.finished:
            return f"{self.output}: this process has written its shards; others are at work"
        text = (
            f"wrote {self.output}: {self.images:,} images of {self.classes:,} "
            f"class{'es' * (self.classes != 1)} in {self.shards:,} "
            f"shard{'s' * (self.shards != 1)}; skipped {len(self.skipped):,} unreadable"
        )
        lines = [f"  {name}: {reason}" for name, reason in self.skipped[:10]]
        if len(self.skipped) > 10:
            lines.append(f"  … and {len(self.skipped) - 10:,} more, listed in {MANIFEST}")
        lines += [
            f"no image of {name} could be read: a model cannot learn to draw it"
            for name in self.empty_classes
        ]
        return "\n".join([text, *lines])


def extract(config: ExtractConfig) -> ExtractSummary:
    """Write the latents of all readable images below a folder, with a progress bar.

    Finished shards of an earlier run are kept if their checksums match. Under torchrun or
    `accelerate launch` each process writes its share, and the last one to finish writes the
    manifest. A script in which it starts processes needs `if __name__ == "__main__":`, because they
    import the script. Raises, before any work, ValueError for an unusable setting, image folder or
    autoencoder, and where the output holds latents of other settings or images;
    DataUnavailableError without diffusers; OSError where nothing can be written. Later: OSError
    likewise, ChildProcessError for a process that failed, FloatingPointError for moments that are
    not finite in the stored dtype, and ValueError if no image was readable.
    """
    config.validate()
    device = resolve_device(config.device)
    files = list_images(config.images)
    if config.output.resolve().is_relative_to(config.images.resolve()):
        raise ValueError(f"output: got {config.output}, expected a folder outside the images'")
    exit_with_launcher()
    worker = Worker.from_environment()
    shards = -(-len(files.names) // config.shard_size)
    on_cpu = min(_cpu_count(), MAX_CPU_PROCESSES)
    processes = min(choose_process_count(config.processes, worker, device, on_cpu), shards)
    own_device = worker.device(device) if processes == 1 else torch.device("cpu")
    autoencoder = _load(config, own_device)
    scale, downsampling = autoencoder.scale, autoencoder.downsampling
    divisible = config.image_size % downsampling == 0
    require_fields(config, image_size=(divisible, f"a multiple of {downsampling}"))
    settings = {
        "images": files.fingerprint(),
        "autoencoder": autoencoder.fingerprint(),
        **{name: getattr(config, name) for name in ("image_size", "dtype", "precision")},
        "shard_size": config.shard_size,
    }
    job = _Job(config, files, settings)
    prepare_output(config.output, ())
    _refuse_other_latents(job)
    own_model = autoencoder if processes == 1 else None
    del autoencoder
    run_sharded(job, own_model, worker, device, processes, "extracting")
    return _finish(job, scale, alone=worker.world_size == 1)


@dataclass(frozen=True)
class _Job:
    """An extraction, as every worker process needs it (see `utils.sharded.ShardedJob`).

    `settings` is everything that decides the content of the shards.
    """

    config: ExtractConfig
    files: ImageFiles
    settings: dict[str, Any]

    @cached_property
    def shards(self) -> list[Shard]:
        output = self.config.output
        return split_into_shards(
            len(self.files.names),
            self.config.shard_size,
            lambda index, start: output / f"shard-{index:05}.safetensors",
        )

    def load(self, device: torch.device) -> Autoencoder:
        return _load(self.config, device)

    def is_complete(self, shard: Shard) -> bool:
        try:
            found = open_shard(shard.path)
        except DamagedShardError:
            return False
        about = found.about
        return about.get("number") == shard.index and about.get("sha256") == found.checksum()

    def make(self, shard: Shard, model: Autoencoder, worker: Worker, progress: Progress) -> None:
        threads = torch.get_num_threads()
        # The order of sums, and so their rounding, would depend on the number of threads.
        torch.set_num_threads(1)
        decoders = max(1, _cpu_count() // worker.local_world_size)
        try:
            with ThreadPoolExecutor(decoders) as pool:
                _write_shard(self, shard, model, pool, progress)
        finally:
            torch.set_num_threads(threads)


def _cpu_count() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _load(config: ExtractConfig, device: torch.device) -> Autoencoder:
    return Autoencoder.load(config.autoencoder, device, DTYPES[config.precision])


def _refuse_other_latents(job: _Job) -> None:
    """Raise ValueError where the output holds latents of other settings."""
    output = job.config.output
    found = [read_manifest(output)["settings"]] if (output / MANIFEST).exists() else []
    for path in output.glob("shard-*.safetensors"):
        # A damaged shard is written anew.
        with contextlib.suppress(DamagedShardError):
            about = open_shard(path).about
            found += [about["settings"]] if "settings" in about else []
    for settings in found:
        for name, value in job.settings.items():
            if settings.get(name) != value:
                other = (
                    f"other {name}"
                    if name in ("images", "autoencoder")
                    else f"{name} {settings.get(name)}, not {value}"
                )
                raise ValueError(
                    f"output: got {output}, which holds latents of {other}; expected an empty "
                    "folder or an extraction to go on with"
                )


def _write_shard(
    job: _Job, shard: Shard, autoencoder: Autoencoder, pool: ThreadPoolExecutor, progress: Progress
) -> None:
    """Encode the readable images of a shard and write it."""
    config = job.config
    names, labels = job.files.names[shard.images], job.files.labels[shard.images]
    side = config.image_size // autoencoder.downsampling
    shape = (len(names), 2, 2 * autoencoder.channels, side, side)
    moments = torch.empty(shape, dtype=DTYPES[config.dtype])
    readable = torch.zeros(len(names), dtype=torch.bool)
    skipped: list[tuple[str, str]] = []
    for rows, results in _decoded_batches(job, names, pool):
        images = [image for image in results if isinstance(image, Tensor)]
        readable[rows] = torch.tensor([isinstance(result, Tensor) for result in results])
        skipped += [
            (name, reason)
            for name, reason in zip(names[rows], results, strict=True)
            if isinstance(reason, str)
        ]
        if images:
            batch = torch.stack(images)
            views = torch.stack([autoencoder.moments(x) for x in (batch, batch.flip(3))], 1)
            # Right after the readable images before them: unreadable ones leave no gap.
            end = int(readable.sum())
            encoded = moments[end - len(images) : end].copy_(views)
            if not encoded.isfinite().all():
                raise FloatingPointError(
                    f"moments not finite in {config.dtype}: {names[rows][0]} or one of the "
                    f"{len(results) - 1} images after it"
                )
        progress(len(results))
    moments, labels = moments[: int(readable.sum())], labels[readable]
    about = {"number": shard.index, "settings": job.settings, "skipped": skipped}
    write_shard(shard.path, moments, labels, about)


def _decoded_batches(
    job: _Job, names: tuple[str, ...], pool: ThreadPoolExecutor
) -> Iterator[tuple[slice, list[Tensor | str]]]:
    """Yield batches of images, each an image or the reason why it is unreadable.

    The pool decodes the next batch while the caller uses this one.
    """

    def read(name: str) -> Tensor | str:
        try:
            return read_image(job.files.root / name, job.config.image_size)
        except UnreadableImageError as error:
            return error.reason

    pending: list[tuple[slice, Iterator[Tensor | str]]] = []
    for first in range(0, len(names), job.config.batch_size):
        rows = slice(first, min(first + job.config.batch_size, len(names)))
        pending.append((rows, pool.map(read, names[rows])))
        if len(pending) > 1:
            rows, results = pending.pop(0)
            yield rows, list(results)
    for rows, results in pending:
        yield rows, list(results)


def _finish(job: _Job, scale: LatentScale, alone: bool) -> ExtractSummary:
    """Write the manifest if all shards are there; with one process (`alone`) they must be."""
    output, classes = job.config.output, job.files.classes
    paths = [shard.path for shard in job.shards]
    try:
        shards = [open_shard(path) for path in paths]
    except DamagedShardError:
        if alone:
            raise
        return ExtractSummary(output, 0, len(classes), 0, (), (), finished=False)
    skipped = [(name, reason) for shard in shards for name, reason in shard.about["skipped"]]
    counts = torch.cat([shard.labels for shard in shards]).bincount(minlength=len(classes))
    if counts.sum() == 0:
        name, reason = skipped[0]
        raise ValueError(f"images: got {job.files.root} with none readable ({name}: {reason})")
    manifest = {
        "format": FORMAT,
        "count": int(counts.sum()),
        "classes": dict(zip(classes, counts.tolist(), strict=True)),
        "shape": list(shards[0].moments.shape[2:]),
        "views": ["plain", "mirrored"],
        "dtype": job.config.dtype,
        "scale": scale_to_dict(scale),
        "source": str(job.files.root.resolve()),
        "image_size": job.config.image_size,
        "autoencoder": job.config.autoencoder,
        "settings": job.settings,
        "shards": [
            {"file": path.name, "count": len(shard.labels), "sha256": shard.about["sha256"]}
            for path, shard in zip(paths, shards, strict=True)
        ],
        "skipped": [{"file": name, "reason": reason} for name, reason in skipped],
    }
    write_json(output / MANIFEST, manifest)
    return ExtractSummary(
        output,
        int(counts.sum()),
        len(classes),
        len(shards),
        tuple(skipped),
        tuple(name for name, count in zip(classes, counts.tolist(), strict=True) if count == 0),
        finished=True,
    )
