"""Samples and scores while a run trains, from its averaged weights."""

from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from dimr_fast.checkpoint import EMA_PREFIX, TrainedModel
from dimr_fast.data.tiles import load_tiles
from dimr_fast.evaluation import EfficientNetLite0Features, frechet_distance, image_statistics
from dimr_fast.model import DiMR
from dimr_fast.pictures import image_grid
from dimr_fast.processes import Processes
from dimr_fast.sampling import Sampler, sample_images
from dimr_fast.seeds import derived_seed
from dimr_fast.train_config import TrainConfig
from dimr_fast.train_log import TrainLog
from dimr_fast.train_state import TrainState

ROWS, COLUMNS = 8, 8


class TrainSamples:
    """Draws grids every `sample_steps` and scores every `score_steps`, in the first process.

    The grids show the first classes, the same noise each time. Scores are Fréchet distances on
    EfficientNet-Lite0 of `score_images` samples, labels drawn as in training, against the held-out
    tiles. Raises DataUnavailableError where the feature network or the tiles are missing.
    """

    def __init__(self, config: TrainConfig, state: TrainState, processes: Processes) -> None:
        self.config, self.state, self.processes = config, state, processes
        self.sampler = Sampler(precision=config.precision, seed=config.seed)
        if config.score_steps is not None and processes.first:
            self.features = EfficientNetLite0Features().to(processes.device)
            tiles = load_tiles(state.model.config.image_size[0])
            self.labels = tiles.train_labels
            self.reference = image_statistics(self.features, tiles.val_images)

    def draw_when_due(self, log: TrainLog | None) -> None:
        """Draw and score what is due after this step; every process calls this."""
        step = self.state.step
        grid, score = (
            every is not None and step % every == 0
            for every in (self.config.sample_steps, self.config.score_steps)
        )
        if not grid and not score:
            return
        tensors = self.state.tensors()
        if log is not None:
            trained = self._averaged(tensors)
            if grid:
                self._draw_grid(trained, log)
            if score:
                log.scalars(step, frechet_distance=self._score(trained))
        self.processes.wait()

    def _averaged(self, tensors: dict[str, torch.Tensor]) -> TrainedModel:
        branches = self.state.model.config.stage_configs
        plain = tuple(replace(branch, checkpointing=False) for branch in branches)
        model = DiMR(replace(self.state.model.config, stage_configs=plain))
        model.load_state_dict(
            {
                name.removeprefix(EMA_PREFIX): value
                for name, value in tensors.items()
                if name.startswith(EMA_PREFIX)
            }
        )
        model.to(self.processes.device).eval()
        return TrainedModel(model, self.state.classes, self.state.scale)

    def _draw_grid(self, trained: TrainedModel, log: TrainLog) -> None:
        rows = min(ROWS, len(trained.classes))
        labels = torch.arange(rows).repeat_interleave(COLUMNS)
        images = sample_images(trained, labels, self.sampler).unflatten(0, (rows, COLUMNS))
        path = self.config.output / "samples" / f"{self.state.step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        image_grid(images, trained.classes[:rows], path, scale=max(1, 96 // images.shape[-1]))
        with Image.open(path) as picture:
            log.image(self.state.step, torch.from_numpy(np.asarray(picture.convert("RGB")).copy()))

    def _score(self, trained: TrainedModel) -> float:
        generator = torch.Generator().manual_seed(derived_seed(self.config.seed, 3))
        chosen = torch.randint(len(self.labels), (self.config.score_images,), generator=generator)
        images = sample_images(trained, self.labels[chosen], self.sampler)
        found = image_statistics(self.features, images)
        score = frechet_distance(
            found.mean, found.covariance, self.reference.mean, self.reference.covariance
        )
        tqdm.write(
            f"step {self.state.step}: Fréchet distance on {self.features.recipe} {score:.1f} "
            f"({len(images)} samples, guidance {self.sampler.guidance})"
        )
        return score
