"""Previews of a training run: sample grids and scores of the EMA weights."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dimr_fast.checkpoint import EMA_PREFIX, TrainedModel
from dimr_fast.data.autoencoder import Decode, load_decoder
from dimr_fast.evaluation.features import EfficientNetLite0Features
from dimr_fast.evaluation.frechet import frechet_to_reference
from dimr_fast.evaluation.real_images import Reference
from dimr_fast.model import DiMR
from dimr_fast.sampling.sampler import SamplerConfig, sample_images
from dimr_fast.training.config import TrainConfig
from dimr_fast.training.log import TrainLog
from dimr_fast.training.state import CHECKPOINT, TrainState
from dimr_fast.utils.distributed import Communicator
from dimr_fast.utils.files import user_cache
from dimr_fast.utils.plots import image_grid
from dimr_fast.utils.seeds import derived_seed

SAMPLES = "samples"
"""Folder of a run with its preview grids."""
ROWS, COLUMNS = 8, 8
"""Maximum size of a preview grid in images: one batch of the sampler."""


class Previews:
    """Draw a grid every `sample_steps` and a score every `score_steps`, on rank 0.

    Grids show the first classes, from the same noise each time. A score is the Fréchet distance on
    EfficientNet-Lite0 features of `score_images` samples to `score_reference`; their labels are
    drawn from `labels`, those of the training set. Raises ValueError where latents have no
    autoencoder to decode them or the reference is unusable, and DataUnavailableError where a
    package is missing.
    """

    def __init__(
        self, config: TrainConfig, state: TrainState, communicator: Communicator, labels: Tensor
    ) -> None:
        self.config, self.state = config, state
        self.communicator, self.labels = communicator, labels
        # Without dropped labels the null class is not trained, and guidance would use it.
        guidance = None if config.label_dropout > 0 and config.teacher is None else 0.0
        self.sampler = SamplerConfig(
            guidance=guidance, precision=config.precision, seed=config.seed
        )
        self.decode: Decode | None = None
        wanted = config.sample_steps is not None or config.score_steps is not None
        if not (wanted and communicator.is_main):
            return
        shape = state.model.config.shape
        self.decode, size = load_decoder(
            config.autoencoder, state.scale, shape, communicator.device
        )
        if config.score_steps is not None:
            self.features = EfficientNetLite0Features().to(communicator.device)
            reference = Reference.open(config.score_reference, size)
            reference.check(self.features)
            self.reference = reference.statistics(self.features, user_cache())

    def draw_if_due(self, log: TrainLog | None, *, catch_up: bool = False) -> None:
        """Draw the grid and the score that are due after this step; every process calls this.

        With `catch_up=True` (after a resume), skip outputs that already exist.
        """
        step = self.state.step
        grid, score = (
            interval is not None and step % interval == 0
            for interval in (self.config.sample_steps, self.config.score_steps)
        )
        if catch_up:
            if log is not None:
                grid = grid and not self._grid_path().exists()
                score = score and not log.has(step, "frechet_distance")
            grid, score = self.communicator.broadcast((grid, score))
        if not grid and not score:
            return
        weights = self.state.tensors(EMA_PREFIX, keep=log is not None)
        if log is not None:
            trained = self._trained_model(weights)
            for due, draw in ((grid, self._draw_grid), (score, self._score)):
                try:
                    if due:
                        draw(trained, log)
                except (OSError, FloatingPointError) as error:
                    tqdm.write(f"no samples at step {step}: {error}")
        self.communicator.barrier()

    def _grid_path(self) -> Path:
        return self.config.output / SAMPLES / f"{self.state.step:08d}.png"

    def _trained_model(self, weights: dict[str, Tensor]) -> TrainedModel:
        config = self.state.model.config
        branches = tuple(replace(branch, checkpointing=False) for branch in config.stage_configs)
        named = {name.removeprefix(EMA_PREFIX): value for name, value in weights.items()}
        source = self.config.output / CHECKPOINT
        model = DiMR.from_weights(replace(config, stage_configs=branches), named, source)
        model.to(self.communicator.device)
        return TrainedModel(
            model,
            self.state.classes,
            self.state.scale,
            self.state.schedule,
            evaluations=self.state.evaluations,
        )

    def _draw_grid(self, trained: TrainedModel, log: TrainLog) -> None:
        rows = min(ROWS, len(trained.classes))
        labels = torch.arange(rows).repeat_interleave(COLUMNS)
        samples = sample_images(trained, labels, self.sampler, decode=self.decode)
        images = samples.unflatten(0, (rows, COLUMNS))
        path = self._grid_path()
        path.parent.mkdir(exist_ok=True)
        image_grid(images, trained.classes[:rows], path, scale=max(1, 96 // images.shape[-1]))
        with Image.open(path) as picture:
            log.image(self.state.step, torch.from_numpy(np.asarray(picture.convert("RGB")).copy()))

    def _score(self, trained: TrainedModel, log: TrainLog) -> None:
        generator = torch.Generator().manual_seed(derived_seed(self.config.seed, 3))
        chosen = torch.randint(len(self.labels), (self.config.score_images,), generator=generator)
        images = sample_images(trained, self.labels[chosen], self.sampler, decode=self.decode)
        score = frechet_to_reference(self.features, images, self.reference)
        drawn = self.sampler.resolved(trained, self.communicator.device)
        tqdm.write(
            f"step {self.state.step}: Fréchet distance on {self.features.recipe} {score:.1f} "
            f"({len(images)} samples, {drawn.solver}, {drawn.steps} steps, "
            f"guidance {drawn.guidance})"
        )
        log.scalars(self.state.step, frechet_distance=score)
