"""Encode a folder of images, or copy published features, as latent shards: `dimr-fast extract`.

Each shard is written by one worker, from images that its position determines, and carries the
settings of the extraction (see `utils.sharded`). So workers and runs need no other coordination,
and the files do not depend on their number.
"""

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dimr_fast.data.autoencoder import Autoencoder
from dimr_fast.data.features import BATCH, FeatureFiles, list_features
from dimr_fast.data.imagenet import default_classes
from dimr_fast.data.images import ImageFiles, list_images, read_image
from dimr_fast.data.latents import FORMAT, MANIFEST, open_shard, read_manifest, write_shard
from dimr_fast.data.scaling import LatentScale, scale_to_dict
from dimr_fast.errors import DamagedShardError, UnreadableImageError
from dimr_fast.utils.device import DTYPES, resolve_device
from dimr_fast.utils.distributed import Worker, exit_with_launcher
from dimr_fast.utils.files import prepare_output, remove_unfinished, write_json
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
READERS = 16
"""Threads that read features, which mostly wait for the disk."""


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """Settings of an extraction.

    The number of processes does not change the latents; batch size and device change their
    rounding.
    """

    images: Path | None = None
    """Folder of images with one sub-folder for each class; without sub-folders it is one class."""
    from_features: Path | None = None
    """Instead of `images`: a folder of features that the published script extracted, 0.npy, 1.npy
    and so on. They are copied without encoding again, and without running code from them."""
    feature_batch: int = BATCH
    """Images in a batch of the script that wrote the features: their mirror images come after
    them."""
    autoencoder: str | None = None
    """For `images`: folder of a diffusers AutoencoderKL, its name on the Hugging Face Hub, or a
    file autoencoder_kl_ema.pth of the published code."""
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
        given = [path for path in (self.images, self.from_features) if path is not None]
        if len(given) != 1:
            raise ValueError(f"images, from_features: got {len(given)} of them, expected one")
        encodes = self.images is not None
        wanted = "an AutoencoderKL" if encodes else "None: features are encoded already"
        require_fields(
            self,
            autoencoder=((self.autoencoder is not None) == encodes, wanted),
            feature_batch=(self.feature_batch > 0, "1 or more"),
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
            return (
                f"{self.output}: this process has written its shards; others are at work. If one "
                "of them was killed, give the command again"
            )
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
    """Write the latents of all readable images below a folder, or of features, with a progress bar.

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
    source = config.images or config.from_features
    assert source is not None
    if config.output.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"output: got {config.output}, expected a folder outside {source}")
    exit_with_launcher()
    if config.from_features is None:
        return _encode(config)
    files = list_features(config.from_features, config.feature_batch)
    settings = {
        "features": files.fingerprint(),
        "dtype": config.dtype,
        "shard_size": config.shard_size,
    }
    job = _CopyJob(config, files.count, settings, files)
    worker, cpu = Worker.from_environment(), torch.device("cpu")
    processes = _process_count(job, worker, cpu)
    prepare_output(config.output, ())
    _refuse_other_latents(job)
    run_sharded(job, files if processes == 1 else None, worker, cpu, processes, "copying")
    return _finish(job, worker, LatentScale(), None)


def _encode(config: ExtractConfig) -> ExtractSummary:
    """Encode the images of a folder."""
    assert config.images is not None
    device = resolve_device(config.device)
    files = list_images(config.images)
    worker = Worker.from_environment()
    job = _EncodeJob(config, len(files.names), {}, files)
    processes = _process_count(job, worker, device)
    own_device = worker.device(device) if processes == 1 else torch.device("cpu")
    autoencoder = job.load(own_device)
    scale, downsampling = autoencoder.scale, autoencoder.downsampling
    divisible = config.image_size % downsampling == 0
    require_fields(config, image_size=(divisible, f"a multiple of {downsampling}"))
    settings = {
        "images": files.fingerprint(),
        "autoencoder": autoencoder.fingerprint(),
        **{name: getattr(config, name) for name in ("image_size", "dtype", "precision")},
        "shard_size": config.shard_size,
    }
    job = replace(job, settings=settings)
    prepare_output(config.output, ())
    _refuse_other_latents(job)
    own_model = autoencoder if processes == 1 else None
    del autoencoder
    run_sharded(job, own_model, worker, device, processes, "extracting")
    return _finish(job, worker, scale, files.classes)


def _process_count(job: "_Job", worker: Worker, device: torch.device) -> int:
    on_cpu = min(_cpu_count(), MAX_CPU_PROCESSES)
    return min(choose_process_count(job.config.processes, worker, device, on_cpu), len(job.shards))


@dataclass(frozen=True)
class _Job:
    """An extraction, as every worker process needs it (see `utils.sharded.ShardedJob`).

    `settings` is everything that decides the content of the shards.
    """

    config: ExtractConfig
    count: int
    settings: dict[str, Any]

    @cached_property
    def shards(self) -> list[Shard]:
        output = self.config.output
        return split_into_shards(
            self.count,
            self.config.shard_size,
            lambda index, start: output / f"shard-{index:05}.safetensors",
        )

    def is_complete(self, shard: Shard) -> bool:
        try:
            found = open_shard(shard.path)
        except DamagedShardError:
            return False
        about = found.about
        return about.get("number") == shard.index and about.get("sha256") == found.checksum()

    def write(
        self, shard: Shard, moments: Tensor, labels: Tensor, skipped: list[tuple[str, str]]
    ) -> None:
        about = {"number": shard.index, "settings": self.settings, "skipped": skipped}
        write_shard(shard.path, moments, labels, about)


@dataclass(frozen=True)
class _EncodeJob(_Job):
    """Encode the images of a folder."""

    files: ImageFiles

    def load(self, device: torch.device) -> Autoencoder:
        assert self.config.autoencoder is not None
        return Autoencoder.load(self.config.autoencoder, device, DTYPES[self.config.precision])

    def make(self, shard: Shard, model: Autoencoder, worker: Worker, progress: Progress) -> None:
        threads = torch.get_num_threads()
        # The order of sums, and so their rounding, would depend on the number of threads.
        torch.set_num_threads(1)
        decoders = max(1, _cpu_count() // worker.local_world_size)
        try:
            with ThreadPoolExecutor(decoders) as pool:
                _encode_shard(self, shard, model, pool, progress)
        finally:
            torch.set_num_threads(threads)


@dataclass(frozen=True)
class _CopyJob(_Job):
    """Copy the features of a folder."""

    files: FeatureFiles

    def load(self, device: torch.device) -> FeatureFiles:
        return self.files

    def make(self, shard: Shard, model: FeatureFiles, worker: Worker, progress: Progress) -> None:
        images = range(shard.images.start, shard.images.stop)
        with ThreadPoolExecutor(READERS) as pool:
            views, labels = [], []
            for pair, label in pool.map(model.read, images):
                views.append(pair)
                labels.append(label)
                progress(1)
        shapes = {tuple(pair.shape) for pair in views}
        if len(shapes) > 1 or len({label is None for label in labels}) > 1:
            raise ValueError(
                f"from_features: got images {images.start} to {images.stop - 1} of shapes "
                f"{shapes}, expected one shape, and a label in all files or in none"
            )
        moments = torch.stack(views).to(DTYPES[self.config.dtype])
        if not moments.isfinite().all():
            raise FloatingPointError(
                f"moments not finite in {self.config.dtype}: images {images.start} to "
                f"{images.stop - 1} of {model.root}"
            )
        self.write(shard, moments, torch.tensor([label or 0 for label in labels]), [])


def _cpu_count() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
                    if name in ("images", "autoencoder", "features")
                    else f"{name} {settings.get(name)}, not {value}"
                )
                raise ValueError(
                    f"output: got {output}, which holds latents of {other}; expected an empty "
                    "folder or an extraction to go on with"
                )


def _encode_shard(
    job: _EncodeJob,
    shard: Shard,
    autoencoder: Autoencoder,
    pool: ThreadPoolExecutor,
    progress: Progress,
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
    job.write(shard, moments, labels, skipped)


def _decoded_batches(
    job: _EncodeJob, names: tuple[str, ...], pool: ThreadPoolExecutor
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


def _finish(
    job: _Job, worker: Worker, scale: LatentScale, classes: tuple[str, ...] | None
) -> ExtractSummary:
    """Write the manifest if all shards are there; without other processes they must be.

    Without `classes` they are as many as the labels need.
    """
    config, output = job.config, job.config.output
    source = config.images or config.from_features
    assert source is not None
    paths = [shard.path for shard in job.shards]
    try:
        shards = [open_shard(path) for path in paths]
    except DamagedShardError:
        if worker.world_size == 1:
            raise
        return ExtractSummary(output, 0, 0, 0, (), (), finished=False)
    skipped = [(name, reason) for shard in shards for name, reason in shard.about["skipped"]]
    counts = torch.cat([shard.labels for shard in shards]).bincount(minlength=len(classes or ()))
    if counts.sum() == 0:
        name, reason = skipped[0]
        raise ValueError(f"images: got {source} with none readable ({name}: {reason})")
    classes = classes or default_classes(len(counts))
    manifest = {
        "format": FORMAT,
        "count": int(counts.sum()),
        "classes": dict(zip(classes, counts.tolist(), strict=True)),
        "shape": list(shards[0].moments.shape[2:]),
        "views": ["plain", "mirrored"],
        "dtype": config.dtype,
        "scale": scale_to_dict(scale),
        "source": str(source.resolve()),
        "image_size": config.image_size if config.images else None,
        "autoencoder": config.autoencoder,
        "settings": job.settings,
        "shards": [
            {"file": path.name, "count": len(shard.labels), "sha256": shard.about["sha256"]}
            for path, shard in zip(paths, shards, strict=True)
        ],
        "skipped": [{"file": name, "reason": reason} for name, reason in skipped],
    }
    write_json(output / MANIFEST, manifest)
    if worker.world_size == 1:  # other processes of a launch may be writing the same manifest
        remove_unfinished(output, MANIFEST)
    return ExtractSummary(
        output,
        int(counts.sum()),
        len(classes),
        len(shards),
        tuple(skipped),
        tuple(name for name, count in zip(classes, counts.tolist(), strict=True) if count == 0),
        finished=True,
    )
