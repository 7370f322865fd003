"""Samples and scores while a run trains, from its averaged weights."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dimr_fast.autoencoder import Decode, decoding
from dimr_fast.checkpoint import EMA_PREFIX, TrainedModel
from dimr_fast.evaluation import quick_score
from dimr_fast.features import EfficientNetLite0Features
from dimr_fast.model import DiMR
from dimr_fast.pictures import image_grid
from dimr_fast.processes import Processes
from dimr_fast.references import Reference, user_cache
from dimr_fast.sampler import Sampler, sample_images
from dimr_fast.seeds import derived_seed
from dimr_fast.train_config import TrainConfig
from dimr_fast.train_log import TrainLog
from dimr_fast.train_state import TrainState

ROWS, COLUMNS = 8, 8


class TrainSamples:
    """Draws grids every `sample_steps` and scores every `score_steps`, in the first process.

    The grids show the first classes, the same noise each time. Scores are Fréchet distances on
    EfficientNet-Lite0 of `score_images` samples, with labels drawn from `labels`, those of the
    training, against `score_reference`. Raises ValueError where latents have no autoencoder to
    decode them or the reference is unusable, and DataUnavailableError where a package is missing.
    """

    def __init__(
        self, config: TrainConfig, state: TrainState, processes: Processes, labels: Tensor
    ) -> None:
        self.config, self.state, self.processes, self.labels = config, state, processes, labels
        self.sampler = Sampler(precision=config.precision, seed=config.seed)
        self.decode: Decode | None = None
        if not processes.first or (config.sample_steps is None and config.score_steps is None):
            return
        shape = state.model.config.shape
        self.decode, size = decoding(config.autoencoder, state.scale, shape, processes.device)
        if config.score_steps is not None:
            self.features = EfficientNetLite0Features().to(processes.device)
            reference = Reference.open(config.score_reference, size)
            reference.check(self.features)
            self.reference = reference.summary(self.features, user_cache())

    def draw_when_due(self, log: TrainLog | None, *, made_up: bool = False) -> None:
        """Draw and score what is due after this step; every process calls this.

        What is there already is left out where it is `made_up` for.
        """
        step = self.state.step
        grid, score = (
            every is not None and step % every == 0
            for every in (self.config.sample_steps, self.config.score_steps)
        )
        if made_up and log is not None:
            grid = grid and not self._grid_path().exists()
            score = score and not log.has(step, "frechet_distance")
        if made_up:
            grid, score = self.processes.from_first((grid, score))
        if not grid and not score:
            return
        averaged = self.state.tensors(EMA_PREFIX, keep=log is not None)
        if log is not None:
            trained = self._trained(averaged)
            for due, draw in ((grid, self._draw_grid), (score, self._score)):
                try:
                    if due:
                        draw(trained, log)
                except (OSError, FloatingPointError) as error:
                    tqdm.write(f"no samples at step {step}: {error}")
        self.processes.wait()

    def _grid_path(self) -> Path:
        return self.config.output / "samples" / f"{self.state.step:08d}.png"

    def _trained(self, averaged: dict[str, Tensor]) -> TrainedModel:
        branches = self.state.model.config.stage_configs
        plain = tuple(replace(branch, checkpointing=False) for branch in branches)
        model = DiMR(replace(self.state.model.config, stage_configs=plain))
        model.load_state_dict(
            {name.removeprefix(EMA_PREFIX): value for name, value in averaged.items()}
        )
        model.to(self.processes.device).eval()
        return TrainedModel(model, self.state.classes, self.state.scale)

    def _draw_grid(self, trained: TrainedModel, log: TrainLog) -> None:
        rows = min(ROWS, len(trained.classes))
        labels = torch.arange(rows).repeat_interleave(COLUMNS)
        drawn = sample_images(trained, labels, self.sampler, decode=self.decode)
        images = drawn.unflatten(0, (rows, COLUMNS))
        path = self._grid_path()
        path.parent.mkdir(exist_ok=True)
        image_grid(images, trained.classes[:rows], path, scale=max(1, 96 // images.shape[-1]))
        with Image.open(path) as picture:
            log.image(self.state.step, torch.from_numpy(np.asarray(picture.convert("RGB")).copy()))

    def _score(self, trained: TrainedModel, log: TrainLog) -> None:
        generator = torch.Generator().manual_seed(derived_seed(self.config.seed, 3))
        chosen = torch.randint(len(self.labels), (self.config.score_images,), generator=generator)
        images = sample_images(trained, self.labels[chosen], self.sampler, decode=self.decode)
        score = quick_score(self.features, images, self.reference)
        tqdm.write(
            f"step {self.state.step}: Fréchet distance on {self.features.recipe} {score:.1f} "
            f"({len(images)} samples, guidance {self.sampler.guidance})"
        )
        log.scalars(self.state.step, frechet_distance=score)
