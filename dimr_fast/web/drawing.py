"""Draw for the page: check what was entered, show images while they form, name the command."""

import math
import queue
import shlex
import textwrap
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor

from dimr_fast.checkpoint import TrainedModel, demo_model, load_model
from dimr_fast.data.autoencoder import load_decoder
from dimr_fast.diffusion import SOLVERS, SolverName
from dimr_fast.info import describe_network
from dimr_fast.sampling.job import NO_CLASS, SampleConfig, select_classes
from dimr_fast.sampling.sampler import (
    ImageSampler,
    SamplerConfig,
    SamplingPrecision,
    balanced_labels,
)
from dimr_fast.utils.device import device_name, keep_freed_memory, resolve_device

COUNT = (1, 64)
"""Number of images: one batch of `dimr-fast sample`, which draws the same bits."""
STEPS = (1, 250)
GUIDANCE = (-1.0, 20.0)
SEED = (0, 2**32 - 1)
PREVIEWS = 8
"""Maximum number of pictures that show how an image forms."""
GRID_ROWS = 16
"""Maximum number of rows with the name of a class; more classes form a block."""
_SOLVERS = f"one of {', '.join(SOLVERS)}"


@dataclass(frozen=True)
class Preview:
    """Images uint8 [N, 3, H, W] of `labels` [N], predicted at one of `evaluations`."""

    images: Tensor
    labels: Tensor
    evaluation: int
    evaluations: int


@dataclass(frozen=True)
class Drawing:
    """Finished images uint8 [N, 3, H, W] of `labels` [N]; `seconds` without previews."""

    images: Tensor
    labels: Tensor
    seconds: float


class Studio:
    """A model that draws for the page, one request at a time.

    `checkpoint` None is the packaged model. Raises as `load_model` and `ImageSampler` do.
    """

    def __init__(
        self,
        checkpoint: Path | None = None,
        autoencoder: str | None = None,
        device: str = "auto",
        precision: SamplingPrecision = "auto",
    ) -> None:
        self._checkpoint, self._autoencoder, self._device = checkpoint, autoencoder, device
        found = resolve_device(device)
        if found.type == "cpu":
            keep_freed_memory()
        self.trained: TrainedModel = load_model(checkpoint or demo_model())
        self.trained.model.to(found)
        shape = self.trained.model.config.shape
        decode, self.size = load_decoder(autoencoder, self.trained.scale, shape, found)
        self._sampler = ImageSampler(self.trained, SamplerConfig(precision=precision), decode)
        network = self._sampler.network
        self.implementation = (
            f"{describe_network(network)}; {self.defaults.precision}; {device_name(found)}"
        )
        self._lock = threading.Lock()

    @property
    def defaults(self) -> SamplerConfig:
        """The settings that the model is drawn with by default."""
        return self._sampler.settings

    @property
    def fixed(self) -> bool:
        """Whether the model was distilled: it is drawn with its default settings only."""
        return self.trained.evaluations is not None

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes to choose from; "none" is not offered for a distilled model, whose teacher
        drew by class."""
        names = self.trained.classes
        return names if self.fixed or NO_CLASS in names else (*names, NO_CLASS)

    def job(
        self,
        classes: object,
        count: object,
        seed: object,
        solver: object,
        steps: object,
        guidance: object,
        low: object,
        high: object,
    ) -> SampleConfig:
        """Return what was entered as a sampling job of one batch.

        `classes` is a list of names, empty for all classes; guidance is applied for times in
        [low, high]. Raises ValueError naming an entry that is missing, of another type or out of
        range, or that a distilled model was not trained for.
        """
        _check(isinstance(classes, list | tuple), "classes", classes, "a list of names")
        names = self.class_names
        for name in cast(Sequence[object], classes):
            _check(name in names, "classes", name, "a class of this model, or none")
        # On a command line a name that starts with "-" would be an option.
        words = [
            str(names.index(name)) if name.startswith("-") else name
            for name in dict.fromkeys(cast(Sequence[str], classes))
        ]
        _check(isinstance(solver, str) and solver in SOLVERS, "solver", solver, _SOLVERS)
        interval = (
            _number("guided from time", low, (0.0, 1.0)),
            _number("to time", high, (0.0, 1.0)),
        )
        ordered = interval[0] <= interval[1]
        _check(ordered, "guided from time", low, f"at most {high}, the value of 'to time'")
        sampler = SamplerConfig(
            solver=cast(SolverName, solver),
            steps=_whole("network evaluations", steps, STEPS),
            guidance=_number("guidance", guidance, GUIDANCE),
            guidance_interval=interval,
            seed=_whole("seed", seed, SEED),
            precision=self.defaults.precision,
        )
        sampler.resolved(self.trained, resolve_device(self._device))
        return SampleConfig(
            checkpoint=self._checkpoint,
            output=Path("samples"),
            count=_whole("images", count, COUNT),
            classes=tuple(words),
            formats=("grid", "png", "npz"),
            autoencoder=self._autoencoder,
            device=self._device,
            sampler=sampler,
        )

    def draw(self, job: SampleConfig) -> Generator[Preview | Drawing, None, None]:
        """Draw the images of a job: yield up to `PREVIEWS` previews, then the drawing.

        Jobs of other threads wait. Drawing ends early if the iterator is closed.
        """
        updates: queue.Queue[Preview | Drawing | BaseException] = queue.Queue()
        closed = threading.Event()

        def work() -> None:
            try:
                with self._lock:
                    if not closed.is_set():
                        updates.put(self._draw(job, updates, closed))
            except BaseException as error:  # raised again by the thread that reads the updates
                updates.put(error)

        threading.Thread(target=work, daemon=True).start()
        try:
            while True:
                update = updates.get()
                if isinstance(update, BaseException):
                    raise update
                yield update
                if isinstance(update, Drawing):
                    return
        finally:
            closed.set()

    def _draw(
        self, job: SampleConfig, updates: "queue.Queue[Any]", closed: threading.Event
    ) -> Drawing:
        chosen = select_classes(job.classes, self.trained.classes)
        count = job.count or 1
        labels = chosen[balanced_labels(count, len(chosen))]
        sampler = self._sampler.with_settings(job.sampler)
        steps = sampler.settings.steps or 1
        interval = math.ceil(steps / PREVIEWS)
        previewing = 0.0

        def watch(evaluation: int, images: Callable[[], Tensor]) -> None:
            nonlocal previewing
            if closed.is_set():
                raise InterruptedError("nobody waits for these images any more")
            if evaluation % interval == 0 and evaluation < steps:
                if self.trained.model.device.type == "cuda":
                    torch.cuda.synchronize()  # the model's own time is not that of the preview
                begin = time.perf_counter()
                updates.put(Preview(images(), labels, evaluation, steps))
                previewing += time.perf_counter() - begin

        begin = time.perf_counter()
        images = sampler(labels, watch=watch)
        return Drawing(images, labels, time.perf_counter() - begin - previewing)

    def arrange(self, images: Tensor, labels: Tensor) -> tuple[Tensor, list[str]]:
        """Return images [N, 3, H, W] as a grid [R, C, 3, H, W] and the names of its rows.

        Each of up to `GRID_ROWS` classes has a row, a single class has several. More classes form a
        block without names. Cells without an image are white.
        """
        names = (*self.trained.classes, NO_CLASS)
        present = list(dict.fromkeys(labels.tolist()))
        if 1 < len(present) <= GRID_ROWS:
            rows = [(labels == label).nonzero().flatten() for label in present]
            row_names = [names[label] for label in present]
        else:
            columns = math.ceil(math.sqrt(len(labels)))
            rows = list(torch.arange(len(labels)).split(columns))
            row_names = [names[present[0]] if len(present) == 1 else "", *[""] * (len(rows) - 1)]
        columns = max(map(len, rows))
        grid = images.new_full((len(rows), columns, *images.shape[1:]), 255)
        for row, indices in zip(grid, rows, strict=True):
            row[: len(indices)] = images[indices]
        return grid, row_names


def sample_command(job: SampleConfig) -> str:
    """Return the command line that draws the images of a job from the page."""
    sampler, interval = job.sampler, job.sampler.guidance_interval
    options: dict[str, Sequence[object]] = {
        "--checkpoint": [] if job.checkpoint is None else [job.checkpoint],
        "--autoencoder": [] if job.autoencoder is None else [job.autoencoder],
        "--classes": job.classes,
        "--count": [job.count],
        "--seed": [sampler.seed],
        "--solver": [sampler.solver],
        "--steps": [sampler.steps],
        "--guidance": [sampler.guidance],
        "--guidance-interval": () if interval == (0, 1) else interval,
        "--precision": [sampler.precision],
        "--device": [] if job.device == "auto" else [job.device],
        "--formats": job.formats,
        "--output": [job.output],
    }
    words = [str(word) for name, values in options.items() if values for word in (name, *values)]
    return shlex.join(["dimr-fast", "sample", *words])


def _whole(name: str, value: object, bounds: tuple[int, int]) -> int:
    """Return a whole number, which may have come as a float, as from JavaScript."""
    low, high = bounds
    number = _is_number(value) and low <= value <= high and value == int(value)
    _check(number, name, value, f"a whole number from {low} to {high}")
    return int(cast(float, value))


def _number(name: str, value: object, bounds: tuple[float, float]) -> float:
    low, high = bounds
    inside = _is_number(value) and low <= value <= high
    _check(inside, name, value, f"a number from {low:g} to {high:g}")
    return float(cast(float, value))


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check(ok: bool, name: str, value: object, expected: str) -> None:
    """Raise ValueError for an entry of the page unless `ok`; it may be long."""
    if not ok:
        shown = "nothing" if value is None else textwrap.shorten(repr(value), 60, placeholder="…")
        raise ValueError(f"{name}: got {shown}, expected {expected}")
