"""Draw images from a checkpoint as files: `dimr-fast sample`.

The images are split into shards of one batch each (see `utils.sharded`). A shard is always drawn as
the same batch, whichever worker draws it, so neither the number of processes nor an interruption
changes an image.
"""

import difflib
import importlib.metadata
import json
import re
import shutil
import time
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dimr_fast.checkpoint import TrainedModel, demo_model, load_model
from dimr_fast.data.autoencoder import Decode, load_autoencoder
from dimr_fast.data.imagenet import imagenet_labels
from dimr_fast.errors import CheckpointError
from dimr_fast.sampling.sampler import ImageSampler, SamplerConfig, balanced_labels
from dimr_fast.sampling.writers import SAMPLE_REPORT, is_array, write_array, write_npz, write_png
from dimr_fast.utils.device import keep_freed_memory, resolve_device
from dimr_fast.utils.distributed import Worker, exit_with_launcher
from dimr_fast.utils.files import (
    LOCK_TIMEOUT,
    lock_folder,
    prepare_output,
    remove_unfinished,
    write_json,
)
from dimr_fast.utils.plots import image_grid
from dimr_fast.utils.sharded import (
    Heartbeats,
    Progress,
    Shard,
    choose_process_count,
    heartbeat,
    run_sharded,
    split_into_shards,
)
from dimr_fast.utils.tensors import sha256_of_named
from dimr_fast.utils.validation import require_fields

Format = Literal["grid", "png", "npz"]

OUTPUTS: dict[Format, str] = {"grid": "grid.png", "png": "images", "npz": "samples.npz"}
FILES = (OUTPUTS["grid"], SAMPLE_REPORT)
"""Files that `sample` writes by default."""

SHARDS = "parts"
NO_CLASS = "none"
"""Name of the null class, unless a class is called so."""
OF_OTHERS = {"weights": "of other weights", "autoencoder": "of another autoencoder"}
"""How messages call a job whose record has another digest, by the name of the entry."""
GRID_ROWS, GRID_COLUMNS = 32, 16
"""Maximum size of a grid in images: about 1,600 × 3,100 pixels for the demo's images."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Settings of a sampling job."""

    checkpoint: Path | None = None
    """A training checkpoint, whose EMA weights are used, or the folder of a saved model. None or
    `demo` is the model that comes with the package, `demo-distilled` its distilled form. On the
    command line also OWNER/REPOSITORY:FILE, a file on the Hugging Face Hub, which is downloaded and
    converted."""
    output: Path
    """Output folder. It also gets `sample.json`, which holds all settings. The same command resumes
    an unfinished job in it and refuses a finished one."""
    per_class: int = 10
    """Images of each class."""
    count: int | None = None
    """Total number of images, instead of `per_class`; the classes are balanced as far as it
    allows."""
    classes: tuple[str, ...] = ()
    """Classes to draw, by name or number; all classes by default. Models of ImageNet know the names
    of its 1000 classes, such as goldfish. "none" draws images without class."""
    formats: tuple[Format, ...] = ("grid",)
    """grid: `grid.png`, one row for each of at most 32 classes; if it is the only format, further
    classes are not drawn. png: `images/000000.png` and so on. npz: `samples.npz` as the ADM
    evaluation suite reads it, `arr_0` uint8 [N, H, W, 3], with labels as `arr_1`."""
    autoencoder: str | None = None
    """Folder or name of the AutoencoderKL that decodes the latents of a latent model, or a file
    autoencoder_kl_ema.pth of the published code."""
    processes: int | None = None
    """Processes to start. None starts one for each GPU, one on a CPU, and one where a launcher such
    as torchrun has started several. They import the calling Python script anew, so it must call
    `sample` under `if __name__ == "__main__":`."""
    device: str = "auto"
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    def validate(self) -> None:
        """Raise ValueError naming a setting that is out of range."""
        self.sampler.validate()
        require_fields(
            self,
            per_class=(self.per_class > 0, "1 or more"),
            count=(self.count is None or self.count > 0, "1 or more, or None"),
            formats=(
                len(self.formats) > 0 and set(self.formats) <= set(OUTPUTS),
                f"one or more of {', '.join(OUTPUTS)}",
            ),
            processes=(self.processes is None or self.processes > 0, "1 or more, or None"),
        )


def sample(
    config: SampleConfig, *, start_timeout: float = 600.0, lock_timeout: float = LOCK_TIMEOUT
) -> list[Path]:
    """Draw images, with a progress bar; return the paths of the files that were written.

    Shards that an earlier run finished are kept. Under torchrun or `accelerate launch` each process
    draws its share; rank 0 waits for the others, writes the files and returns them, and the others
    return an empty list. They wait up to `start_timeout` seconds for rank 0 to begin, and rank 0
    as long for a heartbeat of a process whose images are missing. Rank 0 waits up to
    `lock_timeout` seconds for another command that is drawing the same job. Raises, before any
    work, ValueError for an unusable setting and where the output holds another unfinished job;
    CheckpointError for an unusable checkpoint; DataUnavailableError where the autoencoder's package
    is missing; FileExistsError where a file exists already; OSError where nothing can be written,
    another command is drawing the job or a process fails; TimeoutError where rank 0 does not begin
    or another process sends no heartbeat.
    """
    config.validate()
    exit_with_launcher()
    worker = Worker.from_environment()
    if worker.world_size > 1 and config.processes not in (None, 1):
        raise ValueError(
            f"processes: got {config.processes}, expected None or 1 where a launcher has "
            f"started {worker.world_size}"
        )
    device = resolve_device(config.device)
    processes = choose_process_count(config.processes, worker, device, on_cpu=1)
    stored = _read_unfinished(config.output) if worker.is_main else None
    own_device = torch.device("cpu") if processes > 1 else worker.device(device)
    loaded = _load(config, own_device)
    if not worker.is_main:
        stored = _wait_for_report(config.output, start_timeout)
    job = _job(config, loaded, device, stored)
    if stored is not None:
        _check_same_job(job, stored)
    else:
        outputs = [SHARDS, SAMPLE_REPORT, *(OUTPUTS[format] for format in config.formats)]
        prepare_output(config.output, outputs)
        write_json(config.output / SAMPLE_REPORT, job.record | {"finished": False})
    sampler = None if processes > 1 else ImageSampler(loaded.trained, job.sampler, loaded.decode)
    if not worker.is_main:
        with heartbeat(job.heartbeat_file(worker.rank)):
            run_sharded(job, sampler, worker, device, processes, "sampling")
        return []
    (config.output / SHARDS).mkdir(exist_ok=True)
    with lock_folder(config.output / SHARDS, lock_timeout):
        # Another process may have finished the job while this one waited for the lock.
        _read_unfinished(config.output)
        run_sharded(job, sampler, worker, device, processes, "sampling")
        _wait_for_shards(job, worker.world_size, start_timeout)
        return _finish(job)


@dataclass(frozen=True)
class _Job:
    """A sampling job, as every worker process needs it (see `utils.sharded.ShardedJob`)."""

    config: SampleConfig
    sampler: SamplerConfig
    """Resolved settings, so that all processes and runs draw alike."""
    labels: Tensor
    size: tuple[int, int]
    """(height, width) of the images."""
    class_names: tuple[str, ...]
    record: dict[str, Any]
    """Everything that decides the images and files."""

    @cached_property
    def shards(self) -> list[Shard]:
        """Shards of one batch, uint8 [n, 3, H, W] each."""
        folder = self.config.output / SHARDS
        return split_into_shards(
            len(self.labels),
            self.sampler.batch_size,
            lambda index, start: folder / f"{start:08}.npy",
        )

    def heartbeat_file(self, rank: int) -> Path:
        """Return the file that the process `rank` of a launch touches while it draws."""
        return self.config.output / SHARDS / f"process-{rank}"

    def load(self, device: torch.device) -> ImageSampler:
        loaded = _load(self.config, device)
        for path, name in (
            (self.config.checkpoint, "weights"),
            (self.config.autoencoder, "autoencoder"),
        ):
            if loaded.digests[name] != self.record[name]:
                raise CheckpointError(f"{path}: has changed since the job began")
        return ImageSampler(loaded.trained, self.sampler, loaded.decode)

    def is_written(self, shard: Shard) -> bool:
        """Return whether the file of a shard is there and whole."""
        return is_array(shard.path, (len(shard), 3, *self.size))

    def is_complete(self, shard: Shard) -> bool:
        # Rank 0 removes the shards of a finished job, maybe before a late worker has looked.
        return self.is_written(shard) or _is_finished(self.config.output)

    def make(self, shard: Shard, model: ImageSampler, worker: Worker, progress: Progress) -> None:
        png_folder = self.config.output / OUTPUTS["png"]
        shard.path.parent.mkdir(exist_ok=True)
        images = model(self.labels[shard.images], first=shard.images.start)
        if "png" in self.config.formats:
            png_folder.mkdir(exist_ok=True)
            for index, image in enumerate(images.permute(0, 2, 3, 1).numpy(), shard.images.start):
                write_png(image, png_folder / f"{index:06}.png")
        write_array(images.numpy(), shard.path)
        progress(len(shard))


@dataclass(frozen=True)
class _Loaded:
    """A model on its device with the decoder of its outputs (None for pixels)."""

    trained: TrainedModel
    decode: Decode | None
    size: tuple[int, int]
    """(height, width) of the images."""
    digests: dict[str, str | None]
    """SHA-256 of the model's weights and of the autoencoder's, by their names in the record."""


def _load(config: SampleConfig, device: torch.device) -> _Loaded:
    """Load the model on `device` and, for a latent model, its autoencoder."""
    if device.type == "cpu":
        keep_freed_memory()
    trained = load_model(config.checkpoint or demo_model())
    trained.model.to(device)
    shape = trained.model.config.shape
    autoencoder, size = load_autoencoder(config.autoencoder, trained.scale, shape, device)
    digests = {
        "weights": sha256_of_named(trained.model.state_dict()),
        "autoencoder": None if autoencoder is None else autoencoder.fingerprint(),
    }
    return _Loaded(trained, None if autoencoder is None else autoencoder.decode, size, digests)


def _job(
    config: SampleConfig,
    loaded: _Loaded,
    device: torch.device,
    stored: dict[str, Any] | None,
) -> _Job:
    trained = loaded.trained
    chosen = select_classes(config.classes, trained.classes)
    if config.formats == ("grid",):
        chosen = chosen[:GRID_ROWS]
    names = (*trained.classes, NO_CLASS)  # the last label is that of the null class
    count = config.count or config.per_class * len(chosen)
    sampler = config.sampler
    if sampler.precision == "auto" and stored is not None:
        # A resumed job keeps its precision, also on a machine where "auto" means another one.
        sampler = replace(sampler, precision=stored["sampler"].get("precision", "auto"))
    sampler = sampler.resolved(trained, device)
    record = {
        "dimr_fast": importlib.metadata.version("dimr_fast"),
        "checkpoint": str(config.checkpoint or "the model that comes with the package"),
        "weights": loaded.digests["weights"],
        "count": count,
        "classes": [names[i] for i in chosen.tolist()],
        # Compared when a job is resumed, also one of an earlier version: the text stays as it is.
        "labels": "each class equally often, or once more, going round the classes",
        "autoencoder": loaded.digests["autoencoder"],
        "formats": list(config.formats),
        "sampler": sampler.recipe(trained, device),
    }
    labels = chosen[balanced_labels(count, len(chosen))]
    return _Job(config, sampler, labels, loaded.size, names, record)


def select_classes(wanted: tuple[str, ...], classes: tuple[str, ...]) -> Tensor:
    """Return the labels of classes given by name or number, in that order, without duplicates.

    A model of ImageNet also knows its classes by the names of ImageNet. The label after those of
    the classes means no class.
    """
    if not wanted and classes:
        return torch.arange(len(classes))
    labels = []
    imagenet = imagenet_labels(classes)
    for name in wanted or (NO_CLASS,):
        if name in classes:
            labels.append(classes.index(name))
        elif name in imagenet:
            labels.append(imagenet[name])
        elif name == NO_CLASS:
            labels.append(len(classes))
        elif name.isdecimal() and int(name) < len(classes):
            labels.append(int(name))
        else:
            names = tuple(imagenet) or classes
            near = difflib.get_close_matches(name, names, n=3)
            known = ", ".join(near or names[:10]) + (", …" if len(names) > 10 else "")
            raise ValueError(
                f"classes: got {name!r}, expected a name ({known}) or 0..{len(classes) - 1}, "
                f"or {NO_CLASS!r}"
            )
    return torch.tensor(list(dict.fromkeys(labels)))


def _read_report(output: Path) -> dict[str, Any] | None:
    """Read the report of a job in `output`, or return None where no job has begun there."""
    path = output / SAMPLE_REPORT
    try:
        stored = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise OSError(f"{path}: not readable ({error}); choose another output") from error
    begun = isinstance(stored, dict) and "finished" in stored
    if not (begun and isinstance(stored.get("sampler"), dict)):
        raise FileExistsError(f"{path} exists already; choose another output")
    return stored


def _read_unfinished(output: Path) -> dict[str, Any] | None:
    """Read the report as `_read_report` does; raise FileExistsError where the job is finished."""
    stored = _read_report(output)
    if stored is not None and stored["finished"]:
        # A kill at the very end leaves the shards behind.
        shutil.rmtree(output / SHARDS, ignore_errors=True)
        raise FileExistsError(f"{output / SAMPLE_REPORT} exists already; choose another output")
    return stored


def _is_finished(output: Path) -> bool:
    stored = _read_report(output)
    return stored is not None and stored["finished"]


def _wait_for_report(output: Path, timeout: float) -> dict[str, Any]:
    """Wait for the report that rank 0 writes before sampling starts."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        stored = _read_report(output)
        if stored is not None:
            return stored
        time.sleep(0.1)
    raise TimeoutError(f"{output}: rank 0 has not begun within {timeout:.0f} s")


def _wait_for_shards(job: _Job, processes: int, timeout: float) -> None:
    """Wait on rank 0 for the shards of the other processes of the launch.

    Raises TimeoutError if one of those that are not ready sends no heartbeat for `timeout` seconds.
    """
    left = [shard for shard in job.shards if not job.is_written(shard)]
    total, heartbeats = len(job.shards), Heartbeats()
    if not left:
        return
    with tqdm(total=total, unit="batch", desc="waiting for other processes") as bar:
        while left:
            bar.update(total - len(left) - bar.n)
            for rank in {shard.index % processes for shard in left}:
                if heartbeats.age(job.heartbeat_file(rank)) > timeout:
                    raise TimeoutError(
                        f"{job.config.output}: process {rank} has sent no heartbeat for "
                        f"{timeout:.0f} s, its own output may say why; the same command again "
                        f"draws the {len(left)} batches that are missing"
                    )
            time.sleep(0.5)
            left = [shard for shard in left if not job.is_written(shard)]


def _check_same_job(job: _Job, stored: dict[str, Any]) -> None:
    """Raise ValueError unless the output was begun with these settings."""
    # A job of an earlier version recorded fewer settings, which had one value then.
    begun = {"schedule": "discrete", **stored, **stored["sampler"]}
    autoencoder = begun.get("autoencoder")
    if isinstance(autoencoder, str) and not re.fullmatch("[0-9a-f]{64}", autoencoder):
        raise ValueError(
            f"output: got {job.config.output}, where an earlier version began a job and recorded "
            f"only the name of its autoencoder, {autoencoder!r}: whether its weights are the same "
            "is unknown; expected another folder"
        )
    for name, value in {**job.record, **job.record["sampler"]}.items():
        # The same weights may be at another path; the entries of "sampler" are compared singly.
        if name not in ("checkpoint", "dimr_fast", "sampler") and begun.get(name) != value:
            what = OF_OTHERS.get(name, f"with {name} {begun.get(name)!r}")
            raise ValueError(
                f"output: got {job.config.output}, where a job {what} is unfinished; expected the "
                "same settings, to go on with it, or another folder"
            )


def _finish(job: _Job) -> list[Path]:
    """Write the output files from the shards, then remove the shards."""
    output = job.config.output
    if "npz" in job.config.formats:
        paths = [shard.path for shard in job.shards]
        write_npz(paths, job.labels.numpy(), output / OUTPUTS["npz"])
    if "grid" in job.config.formats:
        _write_grid(job, output / OUTPUTS["grid"])
    # Before the report: a finished job is not started again.
    for name in (SAMPLE_REPORT, *OUTPUTS.values()):
        remove_unfinished(output, name)
    remove_unfinished(output / OUTPUTS["png"])
    write_json(output / SAMPLE_REPORT, job.record | {"finished": True})
    shutil.rmtree(output / SHARDS, ignore_errors=True)
    return [output / name for name in (*(OUTPUTS[f] for f in job.config.formats), SAMPLE_REPORT)]


def _write_grid(job: _Job, path: Path) -> None:
    """Write one row for each class, with as many columns as every class fills."""
    # Labels cycle through the classes, so the first of them hold each class once.
    classes = job.labels[: len(job.record["classes"])][:GRID_ROWS]
    positions = [(job.labels == label).nonzero().flatten() for label in classes]
    columns = min(GRID_COLUMNS, *(len(indices) for indices in positions))
    cells = torch.stack([indices[:columns] for indices in positions])
    images: dict[int, Tensor] = {}
    for shard in job.shards:
        start, stop = shard.images.start, shard.images.stop
        wanted = cells[(cells >= start) & (cells < stop)].tolist()
        if wanted:
            pixels = torch.from_numpy(np.load(shard.path))
            images.update((index, pixels[index - start]) for index in wanted)
    drawn = torch.stack([images[index] for index in cells.flatten().tolist()])
    names = [job.class_names[label] for label in classes.tolist()]
    scale = max(1, min(3, 128 // drawn.shape[-2]))
    image_grid(drawn.unflatten(0, cells.shape), names, path, scale=scale)
