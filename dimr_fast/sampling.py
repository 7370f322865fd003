"""The sampling job: draw images with any number of processes, in any number of runs.

The images are cut into parts of one batch each. A part is always drawn as the same batch, by
whichever process it falls to, and its file appears whole or not at all; so neither the number of
processes nor an interruption changes an image.
"""

import hashlib
import importlib.metadata
import json
import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dimr_fast.autoencoder import Decode, decoding
from dimr_fast.checkpoint import CheckpointError, TrainedModel, demo_model, load_model
from dimr_fast.config import require_fields
from dimr_fast.device import keep_freed_memory, resolve_device
from dimr_fast.files import claim, hold, write_json
from dimr_fast.image_files import write_array, write_npz, write_png
from dimr_fast.model import DiMR
from dimr_fast.pictures import image_grid
from dimr_fast.processes import Place, end_with_launcher, start_processes
from dimr_fast.sampler import (
    ImageSampler,
    Sampler,
    balanced_labels,
    sample_images,
)

__all__ = [
    "FILES",
    "ImageSampler",
    "SampleConfig",
    "Sampler",
    "balanced_labels",
    "sample",
    "sample_images",
]

Format = Literal["grid", "png", "npz"]

REPORT = "sample.json"
OUTPUTS: dict[Format, str] = {"grid": "grid.png", "png": "images", "npz": "samples.npz"}
FILES = (OUTPUTS["grid"], REPORT)
"""What `sample` leaves in its folder by default."""

PARTS = "parts"
GRID_ROWS, GRID_COLUMNS = 32, 16
WAIT = 600.0
"""Seconds that a process of a launcher waits for the first one to begin."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Which images to draw, from what, and how."""

    checkpoint: Path | None = None
    """A checkpoint that training wrote, whose EMA weights are used, or the folder of a saved model;
    None is the model that comes with the package."""
    output: Path
    """Folder for what is written, and for `sample.json`, the whole recipe. The same command again
    goes on with what it holds unfinished; a finished one is left as it is."""
    per_class: int = 10
    """Images of each class."""
    count: int | None = None
    """Images in all, in place of `per_class`: classes are balanced as far as that goes."""
    classes: tuple[str, ...] = ()
    """The classes to draw, by name or number; all of them if none is given."""
    formats: tuple[Format, ...] = ("grid",)
    """grid: `grid.png`, the first images of each of at most 32 classes in a row; where nothing else
    is asked for, no other class is drawn. png: `images/000000.png` and so on. npz: `samples.npz` as
    the ADM evaluation suite takes it, `arr_0` uint8 [N, H, W, 3], with labels as `arr_1`."""
    autoencoder: str | None = None
    """Folder or name of the AutoencoderKL that decodes what a model of latents draws."""
    processes: int | None = None
    """Processes to start; None is one for each GPU, one on a CPU, and one where a launcher such as
    torchrun has started several. Those import a Python script that calls `sample` anew: it must do
    so under `if __name__ == "__main__":`."""
    device: str = "auto"
    sampler: Sampler = field(default_factory=Sampler)

    def validate(self) -> None:
        """ValueError naming a setting that is out of range."""
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


@dataclass(frozen=True)
class _Job:
    """What every process needs to know."""

    config: SampleConfig
    sampler: Sampler
    """Nothing left open, so that all processes and runs draw alike."""
    labels: Tensor
    class_names: tuple[str, ...]
    record: dict[str, Any]
    """All that decides the images and files."""

    def parts(self) -> list[tuple[Path, slice]]:
        """The file of each part, uint8 [n, 3, H, W], and which images are in it."""
        size, folder = self.sampler.batch_size, self.config.output / PARTS
        return [
            (folder / f"{start:08}.npy", slice(start, min(start + size, len(self.labels))))
            for start in range(0, len(self.labels), size)
        ]

    def drawn(self) -> int:
        """How many images are there."""
        return sum(part.stop - part.start for path, part in self.parts() if path.exists())

    def image_path(self, index: int) -> Path:
        return self.config.output / OUTPUTS["png"] / f"{index:06}.png"


def sample(config: SampleConfig) -> list[Path]:
    """Draw images, with a progress bar; returns what was written.

    Finished parts that an earlier run left are kept. Under torchrun or accelerate each process
    draws its share, and the first one waits for the others, writes the files and returns them; the
    others return nothing. Raises, before any work, ValueError for an unusable setting and where
    the output holds another job unfinished; CheckpointError for an unusable checkpoint;
    DataUnavailableError where the autoencoder's package is missing; FileExistsError where a file
    is there already; OSError where nothing can be written or a process fails.
    """
    config.validate()
    end_with_launcher()
    place = Place.from_environment()
    device = resolve_device(config.device)
    processes = _processes(config, place, device)
    first = place.rank == 0
    stored = _unfinished(config.output) if first else None
    trained, decode = _load(config, torch.device("cpu") if processes > 1 else place.device(device))
    if not first:
        stored = _awaited(config.output)
    job = _job(config, trained, device, stored)
    if stored is not None:
        _refuse_another_job(job, stored)
    else:
        claim(config.output, [PARTS, REPORT, *(OUTPUTS[format] for format in config.formats)])
        write_json(config.output / REPORT, job.record | {"finished": False})
    with ExitStack() as held:
        if first:
            (config.output / PARTS).mkdir(exist_ok=True)
            held.enter_context(hold(config.output / PARTS))
            # Another process may have finished it while this one waited.
            _unfinished(config.output)
        return _draw(job, trained, decode, place, device, processes)


def _draw(
    job: _Job,
    trained: TrainedModel,
    decode: Decode | None,
    place: Place,
    device: torch.device,
    processes: int,
) -> list[Path]:
    """Draw what is missing, here or in `processes` new ones, and write the files."""
    first = place.rank == 0
    total, done = len(job.labels), job.drawn()
    with tqdm(total=total, initial=done, unit="image", desc="sampling", disable=not first) as bar:
        if processes > 1:
            processes = min(processes, len(job.parts()))
            threads = max(1, torch.get_num_threads() // processes)
            arguments = (job, place, device, processes, threads)
            start_processes(_process, arguments, processes, lambda: bar.update(job.drawn() - bar.n))
        else:
            _draw_share(job, ImageSampler(trained, job.sampler, decode), place, bar)
        while first and job.drawn() < total:
            bar.set_postfix_str("waiting for the other processes")
            time.sleep(0.5)
            bar.update(job.drawn() - bar.n)
    return _finish(job) if first else []


def _processes(config: SampleConfig, place: Place, device: torch.device) -> int:
    if place.count > 1:
        if config.processes not in (None, 1):
            raise ValueError(
                f"processes: got {config.processes}, expected None or 1 where a launcher has "
                f"started {place.count}"
            )
        return 1
    if config.processes is not None:
        return config.processes
    if device.type == "cuda" and device.index is None:
        return torch.cuda.device_count()
    return 1


def _load(config: SampleConfig, device: torch.device) -> tuple[TrainedModel, Decode | None]:
    """The model, on `device`, and what decodes its latents."""
    if device.type == "cpu":
        keep_freed_memory()
    trained = load_model(config.checkpoint or demo_model())
    trained.model.to(device)
    decode, _ = decoding(config.autoencoder, trained.scale, trained.model.config.shape, device)
    return trained, decode


def _job(
    config: SampleConfig,
    trained: TrainedModel,
    device: torch.device,
    stored: dict[str, Any] | None,
) -> _Job:
    chosen = _chosen(config.classes, trained.classes)
    if config.formats == ("grid",):
        chosen = chosen[:GRID_ROWS]
    count = config.count or config.per_class * len(chosen)
    sampler = config.sampler
    if sampler.precision == "auto" and stored is not None:
        # What the machine would choose by itself gives way to what the job began with.
        sampler = replace(sampler, precision=stored["sampler"]["precision"])
    sampler = sampler.resolved(trained.scale, device)
    record = {
        "dimr_fast": importlib.metadata.version("dimr_fast"),
        "checkpoint": str(config.checkpoint or "the model that comes with the package"),
        "weights": _fingerprint(trained.model),
        "count": count,
        "classes": [trained.classes[i] for i in chosen.tolist()],
        "labels": "each class equally often, or once more, going round the classes",
        "autoencoder": config.autoencoder,
        "formats": list(config.formats),
        "sampler": sampler.recipe(trained.scale, device),
    }
    labels = chosen[balanced_labels(count, len(chosen))]
    return _Job(config, sampler, labels, trained.classes, record)


def _chosen(wanted: tuple[str, ...], classes: tuple[str, ...]) -> Tensor:
    """The labels of classes given by name or number, in that order and each once."""
    if not wanted:
        return torch.arange(len(classes))
    labels = []
    for name in wanted:
        if name in classes:
            labels.append(classes.index(name))
        elif name.isdecimal() and int(name) < len(classes):
            labels.append(int(name))
        else:
            known = ", ".join(classes[:10]) + (", …" if len(classes) > 10 else "")
            raise ValueError(
                f"classes: got {name!r}, expected a name ({known}) or 0..{len(classes) - 1}"
            )
    return torch.tensor(list(dict.fromkeys(labels)))


def _fingerprint(model: DiMR) -> str:
    """SHA-256 of the weights."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _unfinished(output: Path) -> dict[str, Any] | None:
    """The record of a job that has begun in that folder; FileExistsError where it is finished."""
    stored = _stored(output)
    if stored is not None and stored["finished"]:
        # What a kill at the very end has left.
        shutil.rmtree(output / PARTS, ignore_errors=True)
        raise FileExistsError(f"{output / REPORT} exists already; choose another output")
    return stored


def _stored(output: Path) -> dict[str, Any] | None:
    """The record of a job that has begun in that folder."""
    path = output / REPORT
    try:
        stored = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise OSError(f"{path}: not readable ({error}); choose another output") from error
    if not isinstance(stored, dict) or not {"finished", "sampler"} <= stored.keys():
        raise FileExistsError(f"{path} exists already; choose another output")
    return stored


def _finished(output: Path) -> bool:
    stored = _stored(output)
    return stored is not None and stored["finished"]


def _awaited(output: Path) -> dict[str, Any]:
    """The record that the first process writes when it begins."""
    deadline = time.monotonic() + WAIT
    while time.monotonic() < deadline:
        stored = _stored(output)
        if stored is not None:
            return stored
        time.sleep(0.1)
    raise TimeoutError(f"{output}: the first process has not begun within {WAIT:.0f} s")


def _refuse_another_job(job: _Job, stored: dict[str, Any]) -> None:
    """ValueError unless the output was begun with these settings."""
    begun = {**stored, **stored["sampler"]}
    for name, value in {**job.record, **job.record["sampler"]}.items():
        # The same weights may have moved; what "sampler" holds is compared one by one.
        if name not in ("checkpoint", "dimr_fast", "sampler") and begun.get(name) != value:
            what = "of other weights" if name == "weights" else f"with {name} {begun.get(name)!r}"
            raise ValueError(
                f"output: got {job.config.output}, where a job {what} is unfinished; expected the "
                "same settings, to go on with it, or another folder"
            )


def _process(
    number: int, job: _Job, place: Place, device: torch.device, processes: int, threads: int
) -> None:
    """What a started process does."""
    torch.set_num_threads(threads)
    place = place.part(number, processes)
    trained, decode = _load(job.config, place.device(device))
    if _fingerprint(trained.model) != job.record["weights"]:
        raise CheckpointError(f"{job.config.checkpoint}: has changed since the job began")
    with tqdm(disable=True) as bar:
        _draw_share(job, ImageSampler(trained, job.sampler, decode), place, bar)


def _draw_share(job: _Job, draw: ImageSampler, place: Place, bar: "tqdm[Any]") -> None:
    """Draw what is missing of the parts of this process."""
    missing = [part for part in job.parts()[place.rank :: place.count] if not part[0].exists()]
    # Where the first process found all parts there, it may have removed them since.
    if not missing or _finished(job.config.output):
        return
    for folder in [PARTS] + [OUTPUTS["png"]] * ("png" in job.config.formats):
        (job.config.output / folder).mkdir(exist_ok=True)
    for path, part in missing:
        images = draw(job.labels[part], first=part.start)
        if "png" in job.config.formats:
            for index, image in enumerate(images.permute(0, 2, 3, 1).numpy(), part.start):
                write_png(image, job.image_path(index))
        write_array(images.numpy(), path)
        bar.update(job.drawn() - bar.n)


def _finish(job: _Job) -> list[Path]:
    """Make the files of the parts, then do without the parts."""
    output = job.config.output
    if "npz" in job.config.formats:
        parts = [path for path, _ in job.parts()]
        write_npz(parts, job.labels.numpy(), output / OUTPUTS["npz"])
    if "grid" in job.config.formats:
        _write_grid(job, output / OUTPUTS["grid"])
    write_json(output / REPORT, job.record | {"finished": True})
    shutil.rmtree(output / PARTS, ignore_errors=True)
    # What a killed process was writing.
    patterns = [f".{name}.*.part" for name in (REPORT, *OUTPUTS.values())]
    for pattern in (*patterns, f"{OUTPUTS['png']}/.*.part"):
        for unfinished in output.glob(pattern):
            unfinished.unlink()
    return [output / name for name in (*(OUTPUTS[f] for f in job.config.formats), REPORT)]


def _write_grid(job: _Job, path: Path) -> None:
    """A row for each class, with as many columns as every one of them fills."""
    # Labels go round the classes, so each is among the first of them.
    classes = job.labels[: len(job.record["classes"])][:GRID_ROWS]
    places = [(job.labels == label).nonzero().flatten() for label in classes]
    columns = min(GRID_COLUMNS, *(len(indices) for indices in places))
    cells = torch.stack([indices[:columns] for indices in places])
    images: dict[int, Tensor] = {}
    for part, inside in job.parts():
        wanted = cells[(cells >= inside.start) & (cells < inside.stop)].tolist()
        if wanted:
            pixels = torch.from_numpy(np.load(part))
            images.update((index, pixels[index - inside.start]) for index in wanted)
    drawn = torch.stack([images[index] for index in cells.flatten().tolist()])
    names = [job.class_names[label] for label in classes.tolist()]
    scale = max(1, min(3, 128 // drawn.shape[-2]))
    image_grid(drawn.unflatten(0, cells.shape), names, path, scale=scale)
