"""Train a model on labelled images or latents, on one process or many."""

import dataclasses
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dimr_fast.config import preset
from dimr_fast.data import Examples
from dimr_fast.data.arrays import ImageArray
from dimr_fast.data.images import ImageFolder
from dimr_fast.data.latents import MANIFEST, LatentShards
from dimr_fast.data.loader import Loader
from dimr_fast.data.tiles import load_tiles
from dimr_fast.device import (
    DTYPES,
    device_name,
    keep_freed_memory,
    precision_name,
    resolve_precision,
)
from dimr_fast.files import claim, hold, remove_unfinished, write_json
from dimr_fast.model import DiMR
from dimr_fast.optim import EMA, adamw
from dimr_fast.pictures import loss_curve, require_matplotlib
from dimr_fast.processes import Processes, join_processes
from dimr_fast.train_config import TrainConfig
from dimr_fast.train_log import LOG, require_tensorboard
from dimr_fast.train_loop import TrainLoop, check_split, in_parallel
from dimr_fast.train_samples import TrainSamples
from dimr_fast.train_state import CHECKPOINT, TrainState, read_state

CONFIG = "config.yaml"
FILES = (CHECKPOINT, CONFIG, LOG, "loss.png", "train.json")
"""What a run leaves in its folder."""


@dataclass(frozen=True)
class TrainSummary:
    """How a run went; losses are means over its first 20 and last 100 steps that were finite."""

    steps: int
    seconds: float
    images_per_second: float
    first_loss: float
    last_loss: float
    parameters: int
    processes: int
    device: str
    precision: str
    torch: str
    interrupted: bool

    def sentence(self, config: TrainConfig) -> str:
        """The end of the run in words; how to go on, where it was interrupted."""
        verb = "stopped" if self.interrupted else "trained"
        several = f", {self.processes} processes" if self.processes > 1 else ""
        text = (
            f"{verb} at step {self.steps:,} after {self.seconds / 60:.1f} minutes "
            f"({self.images_per_second:.0f} images/s, {self.parameters:,} parameters, "
            f"{self.precision}, {self.device}{several}); "
            f"loss {self.first_loss:.3f} -> {self.last_loss:.3f}; "
            f"wrote {config.output / CHECKPOINT}"
        )
        if self.interrupted:
            text += f"\ngo on with: dimr-fast train --output {config.output} --resume"
        return text


def train(config: TrainConfig, *, resume: bool = False) -> TrainSummary:
    """Train as `config` says, with a progress bar.

    Writes to `config.output`: `checkpoint.safetensors` (model, its EMA, optimizer, position of the
    run), every `checkpoint_minutes` and at the end; the settings, `config.yaml`; figures on the
    way, `log.jsonl`; at the end `loss.png` and `train.json`. Ctrl-C ends the run after the step in
    progress, with all of them written; a second one ends it at once. A checkpoint that cannot be
    written on the way is reported, the previous one stays, and the run goes on.

    With `resume` the run in `config.output` goes on. All randomness of step n comes from the seed
    and n, so a run of a given number of steps that was interrupted, or killed, ends as one that was
    not; on a CPU bit for bit. Started by torchrun or `accelerate launch` the processes share each
    batch.

    Raises, before any work, ValueError for an unusable setting, FileExistsError where `output`
    holds a run, OSError where it cannot be written or another process trains there, CheckpointError
    where there is none to resume and DataUnavailableError without the data; FloatingPointError
    where the loss or its gradient is no longer finite, as `nonfinite` says.
    """
    config.validate()
    path = config.output / CHECKPOINT
    if path.exists() and not resume:
        raise FileExistsError(f"{path} exists already; --resume it or choose another output")
    require_matplotlib()
    if config.tensorboard:
        require_tensorboard()
    processes = join_processes(config.device)
    with ExitStack() as held:
        if resume and path.exists():
            if processes.first:
                # Before the checkpoint is read: a run that ends is about to write another one.
                held.enter_context(hold(config.output))
            processes.wait()
        return _train(config, resume, processes)


def _train(config: TrainConfig, resume: bool, processes: Processes) -> TrainSummary:
    path, device = config.output / CHECKPOINT, processes.device
    if device.type == "cpu":
        keep_freed_memory()
    examples = load_examples(config)
    check_split(config, processes)
    loader = Loader(
        examples,
        config.batch_size,
        seed=config.seed,
        rank=processes.rank,
        processes=processes.count,
        mirror=config.mirror,
        workers=config.workers,
        pin_memory=device.type == "cuda",
    )
    stored = read_state(path) if resume else None
    precision = config.precision
    if stored is not None and precision == "auto":
        # Timing the machine again might choose otherwise.
        precision = stored[1].get("recipe", {}).get("precision", precision)
    # Each process times the machine for itself, and close calls fall either way.
    precision = processes.from_first(precision_name(resolve_precision(precision, device)))
    dtype = DTYPES[precision]
    config = dataclasses.replace(config, precision=precision)
    torch.manual_seed(config.seed)
    model = _new_model(config, examples).to(device)
    parallel = in_parallel(model, config, processes)
    state = TrainState(
        model=model,
        optimizer=adamw(
            model, config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
        ),
        ema=EMA(model),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        classes=examples.classes,
        scale=examples.scale,
        recipe=config.recipe | {"data": processes.from_first(_in_words(examples, processes))},
    )
    if stored is not None:
        state.load(path, *stored)
        stored = None  # else the file would stay mapped, and take its space when it is replaced
    samples = TrainSamples(config, state, processes, examples.labels)
    loop = TrainLoop(config, state, parallel, loader, processes, samples)
    with ExitStack() as held, _stop_on_signal() as stopped:
        if processes.first:
            if not resume:
                claim(config.output, FILES)
                held.enter_context(hold(config.output))
            remove_unfinished(config.output)
        processes.wait()
        if not resume:
            state.save(path, write=processes.first)
        if processes.first:
            # After the checkpoint: a run that was killed before that can be started again.
            config.write(config.output / CONFIG)
        interrupted = loop.run(stopped)
        state.save(path, write=processes.first)
    finite = [loss for loss in state.losses if math.isfinite(loss)]
    summary = TrainSummary(
        steps=state.step,
        seconds=state.seconds,
        images_per_second=state.step * config.batch_size / state.seconds if state.seconds else 0.0,
        first_loss=_mean(finite[:20]),
        last_loss=_mean(finite[-100:]),
        parameters=sum(p.numel() for p in model.parameters()),
        processes=processes.count,
        device=device_name(device),
        precision=precision,
        torch=torch.__version__,
        interrupted=interrupted,
    )
    if processes.first:
        if finite:
            loss_curve(finite, config.output / "loss.png")
        write_json(
            config.output / "train.json",
            {"config": config.to_dict(), "result": dataclasses.asdict(summary)},
        )
    return summary


def load_examples(config: TrainConfig) -> Examples:
    """What `data` names, in the preset's size or as the latents are."""
    size = config.image_size or preset(config.preset).image_size[0]
    if config.data == "tiles":
        tiles = load_tiles(size, 16)
        return ImageArray(tiles.train_images, tiles.train_labels, tiles.classes)
    folder = Path(config.data)
    if not folder.is_dir():
        raise FileNotFoundError(f"data: got {config.data!r}, expected 'tiles' or a folder")
    if not (folder / MANIFEST).exists():
        return ImageFolder(folder, size)
    if config.image_size is not None:
        raise ValueError(
            f"image_size: got {config.image_size}, expected none: latents have their own"
        )
    return LatentShards(folder)


def _in_words(examples: Examples, processes: Processes) -> str | None:
    """What tells these examples from others; a network's drive is asked by one process only."""
    if not processes.first:
        return None
    return f"{len(examples.labels)} examples, SHA-256 {examples.fingerprint()}"


def _new_model(config: TrainConfig, examples: Examples) -> DiMR:
    """The preset, fitted to the data."""
    channels, height, width = examples.shape
    fitted = preset(config.preset).fitted(channels, (height, width), len(examples.classes) + 1)
    branches = list(fitted.stage_configs)
    for number in config.checkpointing:
        if number >= len(branches):
            raise ValueError(f"checkpointing: got branch {number}, expected 0..{len(branches) - 1}")
        branches[number] = dataclasses.replace(branches[number], checkpointing=True)
    return DiMR(dataclasses.replace(fitted, stage_configs=tuple(branches)))


@contextmanager
def _stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a flag that the block can read."""
    received: list[int] = []
    previous: dict[signal.Signals, Any] = {}

    def receive(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(number, previous[signal.Signals(number)])

    # Only the main thread may set handlers; elsewhere signals act as they always do.
    if threading.current_thread() is threading.main_thread():
        for name in (signal.SIGINT, signal.SIGTERM):
            previous[name] = signal.signal(name, receive)
    try:
        yield lambda: bool(received)
    finally:
        for name, handler in previous.items():
            signal.signal(name, handler)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


if __name__ == "__main__":
    # As `accelerate launch -m dimr_fast.training` and torchrun start it.
    from dimr_fast.cli import main

    status = main(["train", *sys.argv[1:]])
    if status == 0 and torch.distributed.is_initialized():
        # NCCL warns at exit otherwise. After an error the others might not come here.
        torch.distributed.destroy_process_group()
    sys.exit(status)
