"""The steps of a training run, with its checkpoints, log lines and previews."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from dimr_fast.checkpoint import save_checkpoint
from dimr_fast.data.loader import Batch, Loader
from dimr_fast.data.scaling import LatentScale
from dimr_fast.training.averages import AVERAGES, decay_of
from dimr_fast.training.config import TrainConfig
from dimr_fast.training.log import TrainLog
from dimr_fast.training.objective import Objective
from dimr_fast.training.parallel import gradient_sync
from dimr_fast.training.previews import Previews
from dimr_fast.training.state import CHECKPOINT, TrainState, keep_milestone
from dimr_fast.training.throughput import Throughput
from dimr_fast.utils.device import DTYPES
from dimr_fast.utils.distributed import Communicator
from dimr_fast.utils.seeds import derived_seed

NONFINITE = "nonfinite.safetensors"
MAX_SKIPPED_STEPS = 10
"""Consecutive non-finite steps after which a run stops: it has diverged then."""
BAR = "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"


class TrainLoop:
    """Take steps until the run ends; write checkpoints, log lines and previews on the way.

    `parallel` is the module to call (see `parallelize`), `state.model` the model inside it.
    """

    def __init__(
        self,
        config: TrainConfig,
        state: TrainState,
        parallel: nn.Module,
        objective: Objective,
        loader: Loader,
        communicator: Communicator,
        previews: Previews,
    ) -> None:
        self.config, self.state, self.parallel = config, state, parallel
        self.objective = objective
        self.loader, self.communicator, self.previews = loader, communicator, previews
        self.dtype = DTYPES[config.precision]
        self.skipped_steps = 0

    def run(self, stop_requested: Callable[[], bool]) -> bool:
        """Train to the end, or until `stop_requested` on any process; return True in that case."""
        config, state, is_main = self.config, self.state, self.communicator.is_main
        self.loader.load_state_dict({"step": state.step})
        batches = iter(self.loader)
        log = TrainLog(config.output, state.step, config.tensorboard) if is_main else None
        throughput = Throughput(config.batch_size, state.step, state.seconds)
        saved = state.seconds
        if state.step:
            # A kill between the last checkpoint and the next step may have prevented these.
            self._keep_milestone()
            self._save_averages_if_due()
            self.previews.draw_if_due(log, catch_up=True)
        state.model.train()
        with (
            nullcontext() if log is None else closing(log),
            tqdm(
                total=1.0,
                initial=min(progress(config, state), 1.0),
                bar_format=BAR,
                mininterval=0.5,
                disable=not is_main,
            ) as bar,
        ):
            self._start = time.monotonic() - state.seconds
            stop, _, _ = self._synchronize(stop_requested())
            while progress(config, state) < 1 and not stop:
                lr = learning_rate(config, state.step, progress(config, state))
                for group in state.optimizer.param_groups:
                    group["lr"] = lr
                batch = next(batches)
                gradients = self._forward_backward(batch)
                stop, loss, norm = self._synchronize(stop_requested(), *gradients)
                self._update(batch, loss, norm)
                state.losses.append(loss)
                state.step += 1
                if log is not None:
                    rate = throughput.overall(state.step, state.seconds)
                    bar.set_postfix_str(
                        f"step {state.step}, loss {_mean_of_last(state.losses):.3f}, "
                        f"{rate:.0f} images/s",
                        refresh=False,
                    )
                    bar.update(min(progress(config, state), 1.0) - bar.n)
                    if state.step % config.log_steps == 0:
                        figures = throughput.since_last_call(
                            state.step,
                            state.seconds,
                            state.model.config,
                            self.communicator,
                            self.dtype,
                        )
                        log.scalars(
                            state.step, loss=loss, gradient_norm=norm, learning_rate=lr, **figures
                        )
                due = state.seconds - saved > 60 * config.checkpoint_minutes
                if due or _is_multiple(state.step, config.milestone_steps):
                    self._save()
                    saved = state.seconds
                self._save_averages_if_due()
                paused = time.monotonic()
                if not stop:
                    self.previews.draw_if_due(log)
                self._start += time.monotonic() - paused
        return stop

    def _forward_backward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Compute and clip the gradients; return this rank's loss and the norm before clipping."""
        config, state, device = self.config, self.state, self.communicator.device
        micro_batches = list(self._micro_batches(batch))
        state.optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float32, device=device)
        for index, micro_batch in enumerate(micro_batches):
            with gradient_sync(self.parallel, enabled=index == len(micro_batches) - 1):
                losses = self.objective.loss(self.parallel, *micro_batch)
                loss = losses.mean() / len(micro_batches)
                state.scaler.scale(loss).backward()
            total += loss.detach()
        state.scaler.unscale_(state.optimizer)
        parameters = list(state.model.parameters())
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if config.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, config.max_grad_norm, norm)
        return total, norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _micro_batches(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Yield x0, labels (some dropped), draws of times and noise of each micro-batch.

        Every process draws random numbers for the whole batch and takes its share, so that they do
        not depend on the number of processes.
        """
        config, state, device = self.config, self.state, self.communicator.device
        size = config.batch_size
        shape = state.model.config.shape
        share = size // self.communicator.world_size
        own = slice(self.communicator.rank * share, (self.communicator.rank + 1) * share)
        torch.manual_seed(derived_seed(config.seed, 0, batch.step))
        times = self.objective.draw(size)[own]
        draw: Any = {"dtype": torch.float32, "device": device}
        dropped = (torch.rand(size, **draw) < config.label_dropout)[own]
        noise = torch.randn(size, *shape, **draw)[own]
        raw = batch.raw.to(device, non_blocking=True)
        if isinstance(state.scale, LatentScale):
            x0 = state.scale.to_model(raw, torch.randn(size, *shape, **draw)[own])
        else:
            x0 = state.scale.to_model(raw)
        y = batch.labels.to(device, non_blocking=True)
        y = y.masked_fill(dropped, state.model.config.null_class)
        micro = share // config.accumulation
        yield from zip(
            x0.split(micro), y.split(micro), times.split(micro), noise.split(micro), strict=True
        )

    def _synchronize(
        self, stop_requested: bool, loss: Tensor | float = 0.0, norm: Tensor | float = 0.0
    ) -> tuple[bool, float, float]:
        """Return whether any rank has to stop, the mean loss and rank 0's gradient norm.

        Also sets `state.seconds` to rank 0's clock. The host waits for the device only here.
        """
        values = torch.zeros(4, dtype=torch.float64, device=self.communicator.device)
        values[0] = stop_requested
        values[1] = loss
        if self.communicator.is_main:
            values[2] = norm
            values[3] = time.monotonic() - self._start
        stop, total, norm_of_main, self.state.seconds = self.communicator.all_reduce(
            values
        ).tolist()
        return stop > 0, total / self.communicator.world_size, norm_of_main

    def _update(self, batch: Batch, loss: float, norm: float) -> None:
        """Update parameters and EMA if loss and gradient are finite; else follow `nonfinite`."""
        config, state = self.config, self.state
        if math.isfinite(loss) and math.isfinite(norm):
            self.skipped_steps = 0
            state.scaler.step(state.optimizer)
            state.scaler.update()
            decay = config.ema_decay
            if config.ema_warmup:
                decay = min(decay, (1 + state.step) / (10 + state.step))
            state.ema.update(decay)
            for length, average in state.averages.items():
                average.update(decay_of(length, state.step + 1))
            return
        if state.scaler.is_enabled() and math.isfinite(loss) and state.scaler.get_scale() > 1:
            # Scaled fp16 gradients overflowed: the scaler skips the step and lowers its scale.
            state.scaler.step(state.optimizer)
            state.scaler.update()
            return
        state.scaler.update()
        written = self._write_nonfinite(batch, loss, norm)
        what = f"loss {loss}, gradient norm {norm} at step {state.step + 1}"
        self.skipped_steps += 1
        if config.nonfinite == "stop" or self.skipped_steps == MAX_SKIPPED_STEPS:
            count = f", the {MAX_SKIPPED_STEPS}th in a row" if config.nonfinite == "skip" else ""
            raise FloatingPointError(
                f"{what}{count}; {written}; {config.output / CHECKPOINT} is the last checkpoint"
            )
        if self.communicator.is_main:
            tqdm.write(f"{what}: step skipped; {written}")

    def _write_nonfinite(self, batch: Batch, loss: float, norm: float) -> str:
        """Write the batch and the state before a non-finite loss; return a message about it."""
        names = ("input.x0", "input.y", "input.step", "input.noise")
        columns = zip(*self._micro_batches(batch), strict=True)
        own = {name: torch.cat(column) for name, column in zip(names, columns, strict=True)}
        own["input.indices"] = batch.indices
        inputs = {name: self.communicator.all_gather(tensor) for name, tensor in own.items()}
        tensors = self.state.tensors(keep=self.communicator.is_main)
        path = self.config.output / NONFINITE
        message = f"{path} holds the batch and the state before it"
        if self.communicator.is_main:
            metadata = self.state.metadata() | {"loss": str(loss), "gradient_norm": str(norm)}
            try:
                save_checkpoint(path, tensors | inputs, metadata)
            except OSError as error:
                message = f"the batch could not be written ({error})"
        # The other ranks wait here: if one of them exited, the launcher would kill all ranks,
        # including rank 0 while it writes.
        return self.communicator.broadcast(message)

    def _save(self) -> None:
        """Write the checkpoint; if that fails, report it and keep the previous one."""
        path = self.config.output / CHECKPOINT
        try:
            self.state.save(path, write=self.communicator.is_main)
        except OSError as error:
            tqdm.write(f"no checkpoint at step {self.state.step}: {error}; the previous one stays")
        else:
            self._keep_milestone()

    def _save_averages_if_due(self) -> None:
        """Write the averages if they are due after this step; if that fails, report it."""
        if not _is_multiple(self.state.step, self.config.average_steps):
            return
        try:
            self.state.save_averages(self.config.output / AVERAGES, write=self.communicator.is_main)
        except OSError as error:
            tqdm.write(f"no averages of step {self.state.step}: {error}")

    def _keep_milestone(self) -> None:
        """Keep the checkpoint of this step under another name if the step is a milestone."""
        if self.communicator.is_main and _is_multiple(self.state.step, self.config.milestone_steps):
            path = self.config.output / CHECKPOINT
            try:
                keep_milestone(path, self.state.step, self.config.milestones)
            except OSError as error:
                tqdm.write(f"no milestone at step {self.state.step}: {error}")


def progress(config: TrainConfig, state: TrainState) -> float:
    """Return the fraction of the run that is done, by time or by steps; it may exceed 1."""
    by_time = state.seconds / (60 * config.minutes) if config.minutes else 0.0
    return max(by_time, state.step / config.steps if config.steps else 0.0)


def learning_rate(config: TrainConfig, step: int, progress: float) -> float:
    """Return the learning rate: linear warm-up, constant, linear decay to zero.

    The warm-up begins with a learning rate of 0 at step 0, as published. `progress` (0..1) is the
    fraction of the run that is done at `step`.
    """
    warmup = min(1.0, step / config.warmup_steps) if config.warmup_steps else 1.0
    decay = min(1.0, (1 - progress) / config.decay) if config.decay else 1.0
    return config.learning_rate * warmup * decay


def _is_multiple(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0


def _mean_of_last(losses: list[float], count: int = 100) -> float:
    last = losses[-count:]
    return sum(last) / len(last)
