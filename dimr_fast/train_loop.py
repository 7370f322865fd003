"""The steps of a training run, between its checkpoints."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from dimr_fast.checkpoint import save_checkpoint
from dimr_fast.data.loader import Batch, Loader
from dimr_fast.data.scaling import LatentScale
from dimr_fast.device import DTYPES
from dimr_fast.diffusion import DiscreteSchedule, multi_scale_loss
from dimr_fast.model import DiMR
from dimr_fast.processes import Processes
from dimr_fast.seeds import derived_seed
from dimr_fast.train_config import TrainConfig
from dimr_fast.train_log import TrainLog, matrix_rate, training_flops
from dimr_fast.train_samples import TrainSamples
from dimr_fast.train_state import CHECKPOINT, TrainState, keep_milestone

NONFINITE = "nonfinite.safetensors"
MOST_SKIPPED = 10
BAR = "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"


def check_split(config: TrainConfig, processes: Processes) -> None:
    """ValueError where a batch cannot be split evenly."""
    parts = processes.count * config.accumulation
    if config.batch_size % parts:
        raise ValueError(
            f"batch_size: got {config.batch_size}, expected a multiple of {parts}: "
            f"{processes.count} processes of {config.accumulation} parts"
        )


def in_parallel(model: DiMR, config: TrainConfig, processes: Processes) -> nn.Module:
    """What to call instead of the model, so that its gradients are those of all processes.

    By FSDP2 the model itself is sharded: parameters, gradients, optimizer and average. They are
    gathered whole for a step, since TD parameters of all blocks are computed at once, at its start.
    """
    if config.sharding == "fsdp2":
        if processes.count == 1:
            raise ValueError("sharding: got 'fsdp2' on one process, expected several, or none")
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(processes.device.type, (processes.count,))
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
        return model
    if processes.count == 1:
        return model
    device = processes.device
    return nn.parallel.DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )


class TrainLoop:
    """Takes steps until a run is over, saving, logging and sampling now and then."""

    def __init__(
        self,
        config: TrainConfig,
        state: TrainState,
        parallel: nn.Module,
        loader: Loader,
        processes: Processes,
        samples: TrainSamples,
    ) -> None:
        self.config, self.state, self.parallel = config, state, parallel
        self.loader, self.processes, self.samples = loader, processes, samples
        self.schedule = DiscreteSchedule(processes.device)
        self.dtype = DTYPES[config.precision]
        self.skipped = 0

    def run(self, stopped: Callable[[], bool]) -> bool:
        """Train to the end, or until any process has `stopped`; returns whether one has."""
        config, state, first = self.config, self.state, self.processes.first
        self.loader.load_state_dict({"step": state.step})
        batches = iter(self.loader)
        log = TrainLog(config.output, state.step, config.tensorboard) if first else None
        rate = Rate(state.step, state.seconds)
        saved = state.seconds
        if state.step:
            # What a kill between the last checkpoint and the next step prevented.
            self._keep_milestone()
            self.samples.draw_when_due(log, made_up=True)
        state.model.train()
        with (
            nullcontext() if log is None else closing(log),
            tqdm(
                total=1.0,
                initial=min(progress(config, state), 1.0),
                bar_format=BAR,
                mininterval=0.5,
                disable=not first,
            ) as bar,
        ):
            self._began = time.monotonic() - state.seconds
            stop, _, _ = self._agree(stopped())
            while progress(config, state) < 1 and not stop:
                lr = learning_rate(config, state.step, progress(config, state))
                for group in state.optimizer.param_groups:
                    group["lr"] = lr
                batch = next(batches)
                gradients = self._gradients(batch)
                stop, mean, norm = self._agree(stopped(), *gradients)
                self._update(batch, mean, norm)
                state.losses.append(mean)
                state.step += 1
                if log is not None:
                    bar.set_postfix_str(
                        f"step {state.step}, loss {_recent(state.losses):.3f}, "
                        f"{rate.overall(config, state):.0f} images/s",
                        refresh=False,
                    )
                    bar.update(min(progress(config, state), 1.0) - bar.n)
                    if state.step % config.log_steps == 0:
                        figures = rate.since_last(config, state, self.processes, self.dtype)
                        log.scalars(
                            state.step, loss=mean, gradient_norm=norm, learning_rate=lr, **figures
                        )
                due = state.seconds - saved > 60 * config.checkpoint_minutes
                if due or _every(config.milestone_steps, state.step):
                    self._save()
                    saved = state.seconds
                paused = time.monotonic()
                if not stop:
                    self.samples.draw_when_due(log)
                self._began += time.monotonic() - paused
        return stop

    def _gradients(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Gradients of this step's batch; this process's loss and the norm of all gradients."""
        config, state, device = self.config, self.state, self.processes.device
        parts = list(self._inputs(batch))
        state.optimizer.zero_grad()
        total = torch.zeros((), device=device)
        for number, (x0, y, step, noise) in enumerate(parts):
            with self._synchronized(number == len(parts) - 1):
                with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
                    predictions = self.parallel(
                        self.schedule.add_noise(x0, noise, step),
                        log_snr=self.schedule.condition(step),
                        y=y,
                    )
                loss = multi_scale_loss(predictions, noise).mean() / len(parts)
                state.scaler.scale(loss).backward()
            total += loss.detach()
        state.scaler.unscale_(state.optimizer)
        parameters = list(state.model.parameters())
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if config.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, config.max_grad_norm, norm)
        return total, norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _inputs(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Images, labels (some dropped), diffusion steps and noise, in `accumulation` parts.

        All processes draw for the whole batch and take their share: so the same numbers come from
        any number of them.
        """
        config, state, device = self.config, self.state, self.processes.device
        size = config.batch_size
        shape = state.model.config.shape
        share = size // self.processes.count
        mine = slice(self.processes.rank * share, (self.processes.rank + 1) * share)
        torch.manual_seed(derived_seed(config.seed, 0, batch.step))
        step = torch.randint(1, self.schedule.num_steps + 1, (size,), device=device)[mine]
        dropped = (torch.rand(size, device=device) < config.label_dropout)[mine]
        noise = torch.randn(size, *shape, device=device)[mine]
        raw = batch.raw.to(device, non_blocking=True)
        if isinstance(state.scale, LatentScale):
            x0 = state.scale.to_model(raw, torch.randn(size, *shape, device=device)[mine])
        else:
            x0 = state.scale.to_model(raw)
        y = batch.labels.to(device, non_blocking=True)
        y = y.masked_fill(dropped, state.model.config.null_class)
        part = share // config.accumulation
        yield from zip(
            x0.split(part), y.split(part), step.split(part), noise.split(part), strict=True
        )

    def _synchronized(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients go to the other processes with the last part of a batch only."""
        if isinstance(self.parallel, nn.parallel.DistributedDataParallel):
            return nullcontext() if last else self.parallel.no_sync()
        if self.config.sharding == "fsdp2":
            self.parallel.set_requires_gradient_sync(last)  # type: ignore[operator]
        return nullcontext()

    def _agree(
        self, stopped: bool, loss: Tensor | float = 0.0, norm: Tensor | float = 0.0
    ) -> tuple[bool, float, float]:
        """Whether any process was stopped, the mean loss and the first one's gradient norm.

        Sets the clock to the first one's. This is where a step waits for the device, once.
        """
        values = torch.zeros(4, dtype=torch.float64, device=self.processes.device)
        values[0] = stopped
        values[1] = loss
        if self.processes.first:
            values[2] = norm
            values[3] = time.monotonic() - self._began
        any_stopped, total, first_norm, self.state.seconds = self.processes.sum(values).tolist()
        return any_stopped > 0, total / self.processes.count, first_norm

    def _update(self, batch: Batch, loss: float, norm: float) -> None:
        """Take the step, if loss and gradient are finite; else do as `nonfinite` says."""
        config, state = self.config, self.state
        if math.isfinite(loss) and math.isfinite(norm):
            self.skipped = 0
            state.scaler.step(state.optimizer)
            state.scaler.update()
            decay = config.ema_decay
            if config.ema_warmup:
                decay = min(decay, (1 + state.step) / (10 + state.step))
            state.ema.update(decay)
            return
        if state.scaler.is_enabled() and math.isfinite(loss) and state.scaler.get_scale() > 1:
            # An overflow of scaled fp16 gradients: the scaler leaves the step out and scales less.
            state.scaler.step(state.optimizer)
            state.scaler.update()
            return
        state.scaler.update()
        kept = self._inspect(batch, loss, norm)
        what = f"loss {loss}, gradient norm {norm} at step {state.step + 1}"
        self.skipped += 1
        if config.nonfinite == "stop" or self.skipped == MOST_SKIPPED:
            count = f", the {MOST_SKIPPED}th in a row" if config.nonfinite == "skip" else ""
            raise FloatingPointError(
                f"{what}{count}; {kept}; {config.output / CHECKPOINT} is the last checkpoint"
            )
        if self.processes.first:
            tqdm.write(f"{what}: step left out; {kept}")

    def _inspect(self, batch: Batch, loss: float, norm: float) -> str:
        """Write what led to a loss that is not finite, inputs and state; what there is to say."""
        names = ("input.x0", "input.y", "input.step", "input.noise")
        parts = zip(*self._inputs(batch), strict=True)
        inputs = {name: torch.cat(part) for name, part in zip(names, parts, strict=True)}
        inputs["input.indices"] = batch.indices
        whole = {name: self.processes.gather(part) for name, part in inputs.items()}
        tensors = self.state.tensors(keep=self.processes.first)
        path = self.config.output / NONFINITE
        kept = f"{path} holds the batch and the state before it"
        if self.processes.first:
            metadata = self.state.metadata() | {"loss": str(loss), "gradient_norm": str(norm)}
            try:
                save_checkpoint(path, tensors | whole, metadata)
            except OSError as error:
                kept = f"the batch could not be written ({error})"
        # The others wait: at the end of one of them a launcher would end the one that writes.
        return self.processes.from_first(kept)

    def _save(self) -> None:
        """Write the checkpoint; where that fails, say so and go on with the previous one."""
        path = self.config.output / CHECKPOINT
        try:
            self.state.save(path, write=self.processes.first)
        except OSError as error:
            tqdm.write(f"no checkpoint at step {self.state.step}: {error}; the previous one stays")
        else:
            self._keep_milestone()

    def _keep_milestone(self) -> None:
        """Keep the checkpoint that is there, of this step, if it is a milestone."""
        if self.processes.first and _every(self.config.milestone_steps, self.state.step):
            path = self.config.output / CHECKPOINT
            try:
                keep_milestone(path, self.state.step, self.config.milestones)
            except OSError as error:
                tqdm.write(f"no milestone at step {self.state.step}: {error}")


class Rate:
    """Images a second, and what share of the device's arithmetic they are."""

    def __init__(self, step: int, seconds: float) -> None:
        self._begin = self._last = (step, seconds)

    def overall(self, config: TrainConfig, state: TrainState) -> float:
        """Images a second since the run was started or resumed."""
        step, seconds = self._begin
        return (state.step - step) * config.batch_size / (state.seconds - seconds)

    def since_last(
        self, config: TrainConfig, state: TrainState, processes: Processes, dtype: torch.dtype
    ) -> dict[str, float]:
        """Images a second since the last call and MFU: model FLOPs over what the devices could do.

        That is what a large matrix product in `dtype` reaches on this device, measured once, times
        the number of processes.
        """
        step, seconds = self._last
        self._last = (state.step, state.seconds)
        rate = (state.step - step) * config.batch_size / (state.seconds - seconds)
        possible = matrix_rate(processes.device, dtype) * processes.count
        return {
            "images_per_second": rate,
            "mfu": rate * training_flops(state.model.config) / possible,
            "seconds": state.seconds,
        }


def progress(config: TrainConfig, state: TrainState) -> float:
    """How far the run has come, from 0 to 1 and beyond."""
    by_time = state.seconds / (60 * config.minutes) if config.minutes else 0.0
    return max(by_time, state.step / config.steps if config.steps else 0.0)


def learning_rate(config: TrainConfig, step: int, progress: float) -> float:
    """The rate at `step`, `progress` (0..1) through the run: warm-up, constant, fall to zero."""
    rise = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    fall = min(1.0, (1 - progress) / config.decay) if config.decay else 1.0
    return config.learning_rate * rise * fall


def _every(interval: int | None, step: int) -> bool:
    return interval is not None and step % interval == 0


def _recent(losses: list[float]) -> float:
    last = losses[-100:]
    return sum(last) / len(last)
