"""A training run from settings to summary: build, run, summarise."""

import dataclasses
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dimr_fast.config import DiMRConfig, preset
from dimr_fast.data.examples import Examples
from dimr_fast.data.images import ImageFolder
from dimr_fast.data.loader import Loader
from dimr_fast.data.scaling import PixelScale, Scale
from dimr_fast.data.sources import open_examples
from dimr_fast.diffusion import noise_schedule
from dimr_fast.model import DiMR
from dimr_fast.optim import EMA, adamw, muon
from dimr_fast.training.averages import AVERAGES, LENGTHS
from dimr_fast.training.config import TrainConfig
from dimr_fast.training.initial import initial_model
from dimr_fast.training.log import LOG, require_tensorboard
from dimr_fast.training.loop import TrainLoop
from dimr_fast.training.objective import Distillation, NoisePrediction, Objective
from dimr_fast.training.parallel import check_batch_split, parallelize
from dimr_fast.training.previews import SAMPLES, Previews
from dimr_fast.training.state import CHECKPOINT, TrainState, read_state
from dimr_fast.training.teacher import Teacher, fingerprints, load_teacher
from dimr_fast.utils.device import (
    DTYPES,
    Precision,
    device_name,
    keep_freed_memory,
    precision_name,
    resolve_precision,
)
from dimr_fast.utils.distributed import Communicator, init_communicator
from dimr_fast.utils.files import (
    LOCK_TIMEOUT,
    lock_folder,
    prepare_output,
    remove_unfinished,
    write_json,
)
from dimr_fast.utils.peers import watch_peers
from dimr_fast.utils.plots import loss_curve, require_matplotlib

CONFIG = "config.yaml"
FILES = (CHECKPOINT, CONFIG, LOG, AVERAGES, "loss.png", "train.json")
"""Files and folders that a run writes to its folder."""
SHARED_TIMEOUT = 90.0
"""Seconds after which a file of one machine must be seen by the others: clients of NFS look for new
files once a minute."""


@dataclass(frozen=True)
class TrainSummary:
    """Summarise a run; losses are means over its first 20 and last 100 finite steps."""

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
    signal: int | None = None
    """Number of the signal that ended the run, if one did."""

    def sentence(self, config: TrainConfig) -> str:
        """Return the summary in words; after an interruption, with the command that resumes."""
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


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    examples: Examples | None = None,
    lock_timeout: float = LOCK_TIMEOUT,
) -> TrainSummary:
    """Train as `config` says, with a progress bar.

    Writes to `config.output`: `checkpoint.safetensors` (model, EMA, optimizer, position), every
    `checkpoint_minutes` and at the end; the settings, `config.yaml`; figures on the way,
    `log.jsonl`; at the end `loss.png` and `train.json`. The first SIGINT (Ctrl-C), SIGTERM or
    SIGHUP ends the run after the current step, with all of them written; the second ends it at
    once. A checkpoint that cannot be written on the way is reported, the previous one stays, and
    the run continues.

    If `examples` is given, it is used instead of `config.data`. With `resume` the run in
    `config.output` continues. All randomness of step n comes from the seed and n, so a run of a
    given number of steps that was interrupted or killed gives the same result as an uninterrupted
    run; on a CPU, the same bits. Started by torchrun or `accelerate launch`, the processes share
    each batch. Another process that trains in the folder is waited for up to `lock_timeout`
    seconds.

    Raises, before any work, ValueError for an unusable setting or an `output` that the machines do
    not share, FileExistsError where `output` holds a run, OSError where it cannot be written or
    another process trains there, CheckpointError where there is none to resume and
    DataUnavailableError without the data; FloatingPointError where the loss or its gradient is no
    longer finite, as `nonfinite` says; ConnectionError where a process on another machine ended
    (see `watch_peers`).
    """
    config.validate()
    path = config.output / CHECKPOINT
    # The checks come after it: where one process fails alone, the others have to notice.
    communicator = init_communicator(config.device)
    hint = (
        f"its own output may say why; {config.output} keeps the newest checkpoint: start the run "
        "again with --resume"
    )
    with watch_peers(communicator, hint), ExitStack() as locks:
        if path.exists() and not resume:
            raise FileExistsError(f"{path} exists already; --resume it or choose another output")
        require_matplotlib()
        if config.tensorboard:
            require_tensorboard()
        if resume:
            _check_shared(path, communicator, timeout=0)
        if resume and path.exists():
            if communicator.is_main:
                # Before the checkpoint is read: a run that is ending may write another one.
                locks.enter_context(lock_folder(config.output, lock_timeout))
            communicator.barrier()
        run = _build(config, resume, examples, communicator)
        if communicator.is_main:
            if not resume:
                prepare_output(config.output, FILES)
                locks.enter_context(lock_folder(config.output, lock_timeout))
            for folder in ("", AVERAGES, SAMPLES):
                remove_unfinished(config.output / folder)
        communicator.barrier()
        ended_by = _run(run, resume)
        return _summarize(run, ended_by)


@dataclass(frozen=True)
class _Run:
    """The parts of a run; `config.precision` is decided, and `loop` holds all of them."""

    config: TrainConfig
    state: TrainState
    communicator: Communicator
    loop: TrainLoop


def _build(
    config: TrainConfig, resume: bool, examples: Examples | None, communicator: Communicator
) -> _Run:
    """Load the examples, make model, optimizer and loop, and restore the state to resume."""
    path, device = config.output / CHECKPOINT, communicator.device
    if device.type == "cpu":
        keep_freed_memory()
    if examples is None:
        default_size = preset(config.preset).image_size[0]
        examples = open_examples(config.data, config.image_size, default_size)
    check_batch_split(config, communicator)
    loader = Loader(
        examples,
        config.batch_size,
        seed=config.seed,
        rank=communicator.rank,
        world_size=communicator.world_size,
        mirror=config.mirror,
        workers=config.workers,
        pin_memory=device.type == "cuda",
    )
    stored = read_state(path) if resume else None
    if stored is not None:
        _check_same_step(path, stored[1], communicator)
    if stored is not None and config.init != stored[1].get("recipe", {}).get("init"):
        raise ValueError(
            f"init: got {config.init!r} for a run that is resumed, which goes on from its own "
            "checkpoint; expected no other init than its own"
        )
    config = dataclasses.replace(config, precision=_precision(config, stored, communicator))
    torch.manual_seed(config.seed)
    model, scale = _first_model(config, examples, resume, communicator)
    teacher = load_teacher(config, examples, model.config)
    model = model.to(device, torch.float32)
    parallel = parallelize(model, config, communicator)
    state = TrainState(
        model=model,
        optimizer=_new_optimizer(config, model),
        ema=EMA(model),
        scaler=torch.amp.GradScaler(device.type, enabled=DTYPES[config.precision] == torch.float16),
        classes=examples.classes,
        scale=scale,
        schedule=config.schedule,
        recipe=config.recipe | {"data": _describe(examples, communicator)} | fingerprints(teacher),
        evaluations=None if teacher is None else config.evaluations,
        averages={length: EMA(model) for length in LENGTHS if config.average_steps is not None},
    )
    if stored is not None:
        # Its tensors are memory-mapped, and the file stays on disk as long as they exist.
        state.load(path, *stored)
    previews = Previews(config, state, communicator, examples.labels)
    loop = TrainLoop(
        config,
        state,
        parallel,
        _objective(config, teacher, device),
        loader,
        communicator,
        previews,
    )
    return _Run(config, state, communicator, loop)


def _run(run: _Run, resume: bool) -> int | None:
    """Take the steps, between a first and a last checkpoint; return the signal that ended it."""
    config, state, is_main = run.config, run.state, run.communicator.is_main
    path = config.output / CHECKPOINT
    with _stop_on_signal() as received:
        if not resume:
            state.save(path, write=is_main)
            _check_shared(path, run.communicator, SHARED_TIMEOUT)
        if is_main:
            # After the checkpoint: a run that was killed before it can be started again.
            config.write(config.output / CONFIG)
        interrupted = run.loop.run(lambda: bool(received))
        state.save(path, write=is_main)
    if not interrupted:
        return None
    # Another process of the launch may have received it.
    return received[0] if received else signal.SIGTERM


def _summarize(run: _Run, ended_by: int | None) -> TrainSummary:
    """Return the summary; write it and the loss curve on rank 0."""
    config, state, communicator = run.config, run.state, run.communicator
    losses = [loss for loss in state.losses if math.isfinite(loss)]
    summary = TrainSummary(
        steps=state.step,
        seconds=state.seconds,
        images_per_second=state.step * config.batch_size / state.seconds if state.seconds else 0.0,
        first_loss=_mean(losses[:20]),
        last_loss=_mean(losses[-100:]),
        parameters=sum(p.numel() for p in state.model.parameters()),
        processes=communicator.world_size,
        device=device_name(communicator.device),
        precision=config.precision,
        torch=torch.__version__,
        interrupted=ended_by is not None,
        signal=ended_by,
    )
    if communicator.is_main:
        if losses:
            loss_curve(losses, config.output / "loss.png")
        write_json(
            config.output / "train.json",
            {"config": config.to_dict(), "result": dataclasses.asdict(summary)},
        )
    return summary


def _check_shared(path: Path, communicator: Communicator, timeout: float) -> None:
    """Raise ValueError in all processes if some of them, but not all, find the file `path`."""
    deadline = time.monotonic() + timeout
    communicator.barrier()
    while communicator.world_size > 1 and not path.exists() and time.monotonic() < deadline:
        time.sleep(0.5)
    found = communicator.all_gather(torch.tensor([path.exists()], dtype=torch.int64)).tolist()
    if 0 < sum(found) < len(found):
        missing = [str(rank) for rank, there in enumerate(found) if not there]
        raise ValueError(
            f"output: got {path.parent}, where {path.name} is not found by "
            f"{len(missing)} of {len(found)} processes ({', '.join(missing[:10])}); expected a "
            "folder that all machines share"
        )


def _check_same_step(path: Path, metadata: dict[str, Any], communicator: Communicator) -> None:
    """Raise ValueError if the processes have read checkpoints of different steps."""
    own = torch.tensor([int(metadata.get("step", -1))])
    steps = sorted(set(communicator.all_gather(own).tolist()))
    if len(steps) > 1:
        raise ValueError(
            f"output: got {path.parent}, where the processes find checkpoints of steps "
            f"{', '.join(map(str, steps))}; expected a folder that all machines share"
        )


def _precision(
    config: TrainConfig,
    stored: tuple[dict[str, Tensor], dict[str, Any]] | None,
    communicator: Communicator,
) -> Precision:
    """Decide the precision once for all processes, and keep that of a run that is resumed."""
    precision = config.precision
    if stored is not None and precision == "auto":
        precision = stored[1].get("recipe", {}).get("precision", precision)
    # "auto" times the device: close calls could differ between processes.
    return communicator.broadcast(precision_name(resolve_precision(precision, communicator.device)))


def _describe(examples: Examples, communicator: Communicator) -> str | None:
    """Return a description that identifies the examples; only rank 0 reads the files for it."""
    text = None
    if communicator.is_main:
        text = f"{len(examples.labels)} examples, SHA-256 {examples.fingerprint()}"
    return communicator.broadcast(text)


def _first_model(
    config: TrainConfig, examples: Examples, resume: bool, communicator: Communicator
) -> tuple[DiMR, Scale]:
    """Return the model before its first step, random or from given weights, and its input scale.

    The scale is that of the settings, else of the given weights, else of the examples. A run that
    is resumed replaces model and scale by those of its checkpoint.
    """
    adapted = _model_config(config, examples)
    # The scale of a folder is measured when it is used, and here it may not be needed.
    pixels = isinstance(examples, ImageFolder) or isinstance(examples.scale, PixelScale)
    if config.pixel_scale is not None and not pixels:
        raise ValueError(
            f"pixel_scale: got {config.pixel_scale}, expected none: latents have their own scale"
        )
    scale = None if config.pixel_scale is None else PixelScale(*config.pixel_scale)
    if config.init is None or resume:
        return DiMR(adapted), scale or examples.scale
    found = initial_model(adapted, config.init, latents=not pixels)
    if found.schedule not in (None, config.schedule):
        raise ValueError(
            f"schedule: got {config.schedule}, but the weights of init were trained with "
            f"{found.schedule}: set schedule={found.schedule}"
        )
    if communicator.is_main:
        tqdm.write("\n".join(found.remarks))
    return found.model, scale or found.scale or examples.scale


def _objective(config: TrainConfig, teacher: Teacher | None, device: torch.device) -> Objective:
    """Create the objective of a run whose precision is decided."""
    schedule, dtype = noise_schedule(config.schedule, device), DTYPES[config.precision]
    if teacher is None:
        return NoisePrediction(schedule, device, dtype, config.half_log_snr, config.min_snr)
    return Distillation(
        teacher,
        schedule,
        device,
        dtype,
        evaluations=config.evaluations,
        guidance=config.teacher_guidance,
        teacher_steps=config.teacher_steps,
    )


def _model_config(config: TrainConfig, examples: Examples) -> DiMRConfig:
    """Return the preset's configuration, adapted to the examples."""
    channels, height, width = examples.shape
    adapted = preset(config.preset).fitted(channels, (height, width), len(examples.classes) + 1)
    branches = list(adapted.stage_configs)
    for setting, mode in (("checkpointing", True), ("selective_checkpointing", "selective")):
        for number in getattr(config, setting):
            if number >= len(branches):
                raise ValueError(f"{setting}: got branch {number}, expected 0..{len(branches) - 1}")
            branches[number] = dataclasses.replace(branches[number], checkpointing=mode)
    return dataclasses.replace(adapted, stage_configs=tuple(branches))


def _new_optimizer(config: TrainConfig, model: DiMR) -> torch.optim.Optimizer:
    """Create the optimizer of a run whose precision is decided."""
    settings: dict[str, Any] = {"betas": config.betas, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return adamw(model, config.learning_rate, **settings)
    # Not in fp16: its range is too small for the products of Newton–Schulz steps.
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    return muon(model, config.learning_rate, dtype=dtype, **settings)


@contextmanager
def _stop_on_signal() -> Iterator[list[int]]:
    """Append the first SIGINT, SIGTERM or SIGHUP to the yielded list instead of ending at once."""
    received: list[int] = []
    previous: dict[signal.Signals, Any] = {}

    def receive(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(number, previous[signal.Signals(number)])

    # Only the main thread may set handlers; in other threads signals keep their handlers.
    if threading.current_thread() is threading.main_thread():
        for name in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
            # nohup ignores SIGHUP.
            if name not in previous and signal.getsignal(name) != signal.SIG_IGN:
                previous[name] = signal.signal(name, receive)
    try:
        yield received
    finally:
        for name, handler in previous.items():
            signal.signal(name, handler)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
