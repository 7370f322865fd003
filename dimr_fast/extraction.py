"""Turn a folder of images into latent shards, with any number of processes, in any number of runs.

Each shard is made whole by one process, of images that depend on the shard's number only, and
carries the settings of the extraction; so processes and runs need to agree on nothing else, and
leave the same files however many they are.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from dimr_fast.autoencoder import Autoencoder
from dimr_fast.config import require_fields
from dimr_fast.data.images import ImageFiles, UnreadableImageError, list_images, read_image
from dimr_fast.data.latents import (
    FORMAT,
    MANIFEST,
    DamagedShardError,
    open_shard,
    read_manifest,
    write_shard,
)
from dimr_fast.data.scaling import LatentScale, scale_to_dict
from dimr_fast.device import DTYPES, resolve_device
from dimr_fast.files import claim, write_json
from dimr_fast.processes import Place, end_with_launcher, start_processes


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """Which images become latents, by which autoencoder, and how.

    The number of processes does not change the latents; batch size and device do by rounding.
    """

    images: Path
    """Folder of images, with a sub-folder for each class; one without sub-folders is one class."""
    autoencoder: str
    """Folder of a diffusers AutoencoderKL, or its name on the Hugging Face Hub."""
    output: Path
    """Folder for the shards and `manifest.json`; what a killed run left there is kept."""
    image_size: int = 256
    """Images are resized and cropped to squares of this many pixels."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Stored numbers. fp32 takes 64 KiB an image of 256 pixels, both views; the others half."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """What the autoencoder computes in."""
    batch_size: int = 32
    shard_size: int = 1024
    """Images in a shard, the unit of work: what a killed process had of one is done again."""
    processes: int | None = None
    """Processes to start; None is one for each GPU or else for each processor, 8 at most, and
    one where a launcher such as torchrun has started several."""
    device: str = "auto"

    def validate(self) -> None:
        """ValueError naming a setting that is out of range."""
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
    """What an extraction has left; `skipped` are (file, reason)."""

    output: Path
    images: int
    classes: int
    shards: int
    skipped: tuple[tuple[str, str], ...]
    finished: bool
    """Whether all shards are there; else other processes of the launch are still at work."""

    def sentence(self) -> str:
        """The summary in words, with the first ten skipped files."""
        if not self.finished:
            return f"{self.output}: this process has made its shards; others are at work"
        text = (
            f"wrote {self.output}: {self.images:,} images of {self.classes:,} "
            f"class{'es' * (self.classes != 1)} in {self.shards:,} "
            f"shard{'s' * (self.shards != 1)}; skipped {len(self.skipped):,} unreadable"
        )
        lines = [f"  {name}: {reason}" for name, reason in self.skipped[:10]]
        if len(self.skipped) > 10:
            lines.append(f"  … and {len(self.skipped) - 10:,} more, named in {MANIFEST}")
        return "\n".join([text, *lines])


@dataclass(frozen=True)
class _Job:
    """What every process needs to know; `settings` is all that decides what the shards hold."""

    config: ExtractConfig
    files: ImageFiles
    settings: dict[str, Any]

    @property
    def count(self) -> int:
        """How many shards there are."""
        return -(-len(self.files.names) // self.config.shard_size)

    def path(self, number: int) -> Path:
        return self.config.output / f"shard-{number:05}.safetensors"

    def shards(self, place: Place) -> range:
        """The numbers of the shards that a process makes."""
        return range(place.rank, self.count, place.count)

    def part(self, number: int) -> slice:
        """Which of the images are in a shard."""
        first = number * self.config.shard_size
        return slice(first, min(first + self.config.shard_size, len(self.files.names)))


def extract(config: ExtractConfig) -> ExtractSummary:
    """Write the latents of all readable images below a folder, with a progress bar.

    Finished shards of an earlier run are kept if their checksums hold. Under torchrun or
    accelerate each process makes its share, and the last to finish writes the manifest. A script
    that lets it start processes needs `if __name__ == "__main__":`, since they import the script.
    Raises, before any work, ValueError for an unusable setting, image folder or autoencoder, and
    where the output holds latents of other settings or images; DataUnavailableError without
    diffusers; OSError where nothing can be written. Later: OSError likewise, ChildProcessError for
    a process that failed, FloatingPointError for moments that are not finite in the stored dtype,
    and ValueError if no image was readable.
    """
    config.validate()
    device = resolve_device(config.device)
    files = list_images(config.images)
    if config.output.resolve().is_relative_to(config.images.resolve()):
        raise ValueError(f"output: got {config.output}, expected a folder outside the images'")
    end_with_launcher()
    place = Place.from_environment()
    shards = -(-len(files.names) // config.shard_size)
    processes = min(_processes(config, device, place), shards)
    own_device = place.device(device) if processes == 1 else torch.device("cpu")
    autoencoder = _load(config, own_device)
    step, scale = autoencoder.downsampling, autoencoder.scale
    require_fields(config, image_size=(config.image_size % step == 0, f"a multiple of {step}"))
    settings = {
        "images": files.fingerprint(),
        "autoencoder": autoencoder.fingerprint(),
        **{name: getattr(config, name) for name in ("image_size", "dtype", "precision")},
        "shard_size": config.shard_size,
    }
    job = _Job(config, files, settings)
    claim(config.output, ())
    _refuse_other_latents(job)
    places = [place.part(number, processes) for number in range(processes)]
    total = sum(_length(job.part(number)) for place in places for number in job.shards(place))
    with tqdm(total=total, unit="image", desc="extracting", disable=place.rank > 0) as bar:
        if processes == 1:
            _make_shards(job, autoencoder, place, bar.update)
        else:
            del autoencoder
            done = torch.zeros(processes, dtype=torch.int64).share_memory_()
            arguments = (job, device, places, done)
            start_processes(
                _process, arguments, processes, lambda: bar.update(int(done.sum()) - bar.n)
            )
    return _finish(job, scale, alone=place.count == 1)


def _processes(config: ExtractConfig, device: torch.device, place: Place) -> int:
    if config.processes is not None:
        return config.processes
    if place.count > 1:
        return 1
    if device.type == "cuda":
        return torch.cuda.device_count() if device.index is None else 1
    return min(_processors(), 8)


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _length(part: slice) -> int:
    return int(part.stop - part.start)


def _load(config: ExtractConfig, device: torch.device) -> Autoencoder:
    return Autoencoder.load(config.autoencoder, device, DTYPES[config.precision])


def _refuse_other_latents(job: _Job) -> None:
    """ValueError where the output holds latents that are not of this job."""
    output = job.config.output
    found = [read_manifest(output)["settings"]] if (output / MANIFEST).exists() else []
    for path in output.glob("shard-*.safetensors"):
        # A damaged one is made anew.
        with contextlib.suppress(DamagedShardError):
            found.append(open_shard(path).about.get("settings", {}))
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


def _process(
    number: int, job: _Job, device: torch.device, places: list[Place], done: Tensor
) -> None:
    """What a started process does; `done` counts its images for the one that started it."""
    place, parent = places[number], os.getppid()

    def progress(images: int) -> None:
        done[number] += images
        if os.getppid() != parent:
            raise SystemExit("stopped: the process that started this one is gone")

    _make_shards(job, _load(job.config, place.device(device)), place, progress)


def _make_shards(
    job: _Job, autoencoder: Autoencoder, place: Place, progress: Callable[[int], object]
) -> None:
    """Make the shards of this place that are not there, and whole, already."""
    threads = torch.get_num_threads()
    # Sums in another number of threads round differently, and processes share the processors.
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(max(1, _processors() // place.local_count)) as decoders:
            for number in job.shards(place):
                path = job.path(number)
                for unfinished in path.parent.glob(f".{path.name}.*.part"):
                    unfinished.unlink()
                if _is_whole(path, number):
                    progress(_length(job.part(number)))
                else:
                    _make_shard(job, autoencoder, number, decoders, progress)
    finally:
        torch.set_num_threads(threads)


def _is_whole(path: Path, number: int) -> bool:
    try:
        shard = open_shard(path)
    except DamagedShardError:
        return False
    return shard.about["number"] == number and shard.about["sha256"] == shard.checksum()


def _make_shard(
    job: _Job,
    autoencoder: Autoencoder,
    number: int,
    decoders: ThreadPoolExecutor,
    progress: Callable[[int], object],
) -> None:
    """Encode the readable images of a shard and write it."""
    config, part = job.config, job.part(number)
    names, labels = job.files.names[part], job.files.labels[part]
    side = config.image_size // autoencoder.downsampling
    shape = (len(names), 2, 2 * autoencoder.channels, side, side)
    moments = torch.empty(shape, dtype=DTYPES[config.dtype])
    readable = torch.zeros(len(names), dtype=torch.bool)
    skipped: list[tuple[str, str]] = []
    for places, results in _decoded(job, names, decoders):
        images = [image for image in results if isinstance(image, Tensor)]
        readable[places] = torch.tensor([isinstance(result, Tensor) for result in results])
        skipped += [
            (name, reason)
            for name, reason in zip(names[places], results, strict=True)
            if isinstance(reason, str)
        ]
        if images:
            batch = torch.stack(images)
            views = torch.stack([autoencoder.moments(x) for x in (batch, batch.flip(3))], 1)
            # Behind those before it, so that the readable ones end up without gaps.
            end = int(readable.sum())
            encoded = moments[end - len(images) : end].copy_(views)
            if not encoded.isfinite().all():
                raise FloatingPointError(
                    f"moments not finite in {config.dtype}: {names[places][0]} or one of the "
                    f"{_length(places) - 1} images after it"
                )
        progress(_length(places))
    moments, labels = moments[: int(readable.sum())], labels[readable]
    about = {"number": number, "settings": job.settings, "skipped": skipped}
    write_shard(job.path(number), moments, labels, about)


def _decoded(
    job: _Job, names: tuple[str, ...], decoders: ThreadPoolExecutor
) -> Iterator[tuple[slice, list[Tensor | str]]]:
    """Batch after batch of images, each an image or why it is unreadable.

    The next batch is being decoded while one is in use.
    """

    def read(name: str) -> Tensor | str:
        try:
            return read_image(job.files.root / name, job.config.image_size)
        except UnreadableImageError as error:
            return error.reason

    ahead: list[tuple[slice, Iterator[Tensor | str]]] = []
    for first in range(0, len(names), job.config.batch_size):
        places = slice(first, min(first + job.config.batch_size, len(names)))
        ahead.append((places, decoders.map(read, names[places])))
        if len(ahead) > 1:
            places, results = ahead.pop(0)
            yield places, list(results)
    for places, results in ahead:
        yield places, list(results)


def _finish(job: _Job, scale: LatentScale, alone: bool) -> ExtractSummary:
    """Write the manifest if all shards are there, as they are where this process is alone."""
    output, classes = job.config.output, job.files.classes
    paths = [job.path(number) for number in range(job.count)]
    try:
        shards = [open_shard(path) for path in paths]
    except DamagedShardError:
        if alone:
            raise
        return ExtractSummary(output, 0, len(classes), 0, (), finished=False)
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
        output, int(counts.sum()), len(classes), len(shards), tuple(skipped), finished=True
    )
