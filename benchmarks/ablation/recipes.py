"""Train the demo's model by variants of its recipe, and score loss and samples of each.

    python -m benchmarks.ablation.recipes --state FOLDER [--arms WORDS …] [--seeds SEED …]

An arm is a run of the default settings, with AdamW, for a fixed number of steps and with changes
that `dimr-fast train --set` takes, like "optimizer=muon learning_rate=8e-3". Weights at the start
and batches are the same in all arms of a seed, and so are noise levels and noise where settings do
not change them. Interrupted (Ctrl-C), the same command resumes. `recipes.json` is rewritten after
each run, with all runs in the folder; several processes may train different arms in one folder.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import tyro
from torch import nn

from benchmarks.ablation.report import CODE, RECIPES_RESULT
from benchmarks.ablation.run import CPU, TileBatches, held_out_loss, predict
from benchmarks.model.sampling_curve import sampler_of, score
from benchmarks.utils import machine
from benchmarks.utils.spread import Spread
from dimr_fast.checkpoint import TrainedModel, load_model
from dimr_fast.config import preset
from dimr_fast.data.arrays import ImageArray
from dimr_fast.data.tiles import Tiles, load_tiles
from dimr_fast.diffusion import multi_scale_loss
from dimr_fast.evaluation import EfficientNetLite0Features, TensorImages, compute_statistics
from dimr_fast.model import DiMR
from dimr_fast.optim import adamw, muon
from dimr_fast.sampling import balanced_labels
from dimr_fast.training import CHECKPOINT, TrainConfig, train
from dimr_fast.utils.device import DTYPES, keep_freed_memory, precision_name, resolve_precision
from dimr_fast.utils.files import write_json
from dimr_fast.utils.validation import require, require_fields

T = TypeVar("T")

SAMPLING = {"solver": "dpm++2m", "spacing": "log_snr", "steps": 8, "guidance": 0.5}
"""Settings of the samples that are scored: few evaluations, since the packaged model loses little
by them."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the comparison."""

    state: Path
    """Folder of the runs, from which the same command resumes."""
    output: Path = RECIPES_RESULT.parent
    """Folder of `recipes.json`."""
    arms: tuple[str, ...] = (
        "learning_rate=4e-3",
        "learning_rate=2e-3",
        "learning_rate=8e-3",
        "optimizer=muon learning_rate=4e-3",
        "optimizer=muon learning_rate=8e-3",
        "optimizer=muon learning_rate=16e-3",
        "min_snr=5",
        "half_log_snr=[0.5,1.2]",
        "half_log_snr=[0,1]",
    )
    """Changes of the default settings."""
    seeds: tuple[int, ...] = (0,)
    steps: int = 600
    """Steps of each run; the loss is also measured after half of them."""
    batch_size: int = 32
    images: int = 768
    """Samples of each run that are scored, with balanced classes."""
    timed_steps: int = 10
    """Steps of each optimizer that are timed, in turns."""

    def validate(self) -> None:
        """Raise ValueError naming a setting that is out of range."""
        require_fields(
            self,
            steps=(self.steps >= 2 and self.steps % 2 == 0, "an even number, 2 or more"),
            batch_size=(self.batch_size > 0, "a positive number"),
            images=(self.images > 1, "2 or more"),
            timed_steps=(self.timed_steps > 0, "a positive number"),
        )
        for arm in self.arms:
            self.run_of(arm, 0)

    def run_of(self, arm: str, seed: int) -> TrainConfig:
        """Return the settings of a run. Raises ValueError naming an unusable setting of the arm."""
        fixed: dict[str, Any] = {
            "minutes": None,
            "steps": self.steps,
            "batch_size": self.batch_size,
            "seed": seed,
            # The share of the run that the demo's 100 steps are of 600.
            "warmup_steps": self.steps // 6,
            "milestone_steps": self.steps // 2,
            "checkpoint_minutes": 0.5,
            "device": "cpu",
        }
        words = arm.split()
        folder = f"{'_'.join(words)}-{seed}"
        return with_fixed(arm, TrainConfig.read(None, words, self.state / folder), fixed)


def with_fixed(arm: str, config: TrainConfig, fixed: dict[str, Any]) -> TrainConfig:
    """Return the settings of an arm with those that all arms share.

    Raises ValueError if the arm changes one of them, or for settings that are out of range.
    """
    changed = {word.partition("=")[0] for word in arm.split()} & set(fixed)
    require(not changed, "arms", arm, f"none that changes {', '.join(sorted(changed))}")
    config = dataclasses.replace(config, **fixed)
    config.validate()
    return config


def compare(settings: Settings, tiles: Tiles | None = None) -> Path:
    """Train and score all runs that are not yet; return the path of `recipes.json`.

    `tiles` replace those of the installed picture. Raises ValueError for a setting out of range or
    a state folder of another comparison, KeyboardInterrupt after a signal has ended a run, and
    DataUnavailableError without the tiles.
    """
    settings.validate()
    commit = machine.commit(*CODE)
    torch.set_num_threads(1)
    keep_freed_memory()
    data = TileBatches(load_tiles() if tiles is None else tiles)
    precision = resolve_precision("auto", CPU)
    result = settings.output / RECIPES_RESULT.name
    same = {name: getattr(settings, name) for name in ("steps", "batch_size", "images")}
    found = kept(settings.state / "recipe.json", lambda: same)
    if found != same:
        raise ValueError(f"state: got {settings.state}, of {found}, expected {same}")
    scorer = Scorer(data, settings.images)
    report: dict[str, Any] = {
        **machine.description(),
        "commit": commit,
        "precision": precision_name(precision),
        **same,
        "held_out_tiles": len(data.tiles.val_images),
        "sampling": SAMPLING,
        "features": scorer.features.recipe,
        "milliseconds": kept(
            settings.state / "times.json", lambda: step_times(data, settings, precision)
        ),
    }
    for seed in settings.seeds:
        for arm in settings.arms:
            scores = train_and_score(settings, arm, seed, scorer, commit)
            print(json.dumps(scores), flush=True)
            runs = [json.loads(p.read_text()) for p in sorted(settings.state.glob("*/scores.json"))]
            write_json(result, report | {"runs": runs})
    return result


class Scorer:
    """Score a model: loss on the held-out tiles, and Fréchet distance of samples to them."""

    def __init__(self, data: TileBatches, images: int) -> None:
        self.data, self.images = data, images
        self.features = EfficientNetLite0Features()
        self.reference = compute_statistics(
            self.features, TensorImages(data.tiles.val_images, "held out")
        )

    def loss(self, trained: TrainedModel, dtype: torch.dtype) -> float:
        """Return the mean squared error of the noise at uniform times."""
        return held_out_loss(trained.model, self.data, dtype)

    def sample_scores(self, trained: TrainedModel) -> dict[str, float]:
        """Return Fréchet distance, precision and recall of samples."""
        labels = balanced_labels(self.images, len(trained.classes))
        draw = sampler_of(trained, SAMPLING, {})
        found = score(draw, labels, self.features, self.reference)
        return {name: found[name] for name in ("frechet", "precision", "recall")}


def train_and_score(
    settings: Settings, arm: str, seed: int, scorer: Scorer, commit: str
) -> dict[str, Any]:
    """Train a run to its end and score it, if it is not yet; return its entry of the report.

    The entry names the `commit` that has scored it.
    """
    config = settings.run_of(arm, seed)

    def scores() -> dict[str, Any]:
        tiles = scorer.data.tiles
        images = ImageArray(tiles.train_images, tiles.train_labels, tiles.classes)
        resume = (config.output / CHECKPOINT).exists()
        summary = train(config, examples=images, resume=resume)
        if summary.interrupted:
            raise KeyboardInterrupt
        dtype = DTYPES[summary.precision]
        half = f"checkpoint-{summary.steps // 2:08d}.safetensors"
        end = load_model(config.output / CHECKPOINT)
        return {
            "arm": arm,
            "seed": seed,
            "commit": commit,
            "optimizer": config.optimizer,
            "half_way_loss": scorer.loss(load_model(config.output / half), dtype),
            "held_out_loss": scorer.loss(end, dtype),
            **scorer.sample_scores(end),
        }

    return kept(config.output / "scores.json", scores)


def kept(path: Path, make: Callable[[], T]) -> T:
    """Return the contents of a JSON file; write what `make` returns if there is none."""
    if not path.exists():
        made = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, made)
    return json.loads(path.read_text())  # type: ignore[no-any-return]


class TorchMuon:
    """`torch.optim.Muon` for the matrices that `muon` would move, and AdamW for the others."""

    def __init__(self, model: nn.Module) -> None:
        matrices, *others = muon(model, 1e-4).param_groups
        self.muon = torch.optim.Muon(
            matrices["params"], lr=1e-4, weight_decay=0.03, adjust_lr_fn="match_rms_adamw"
        )
        rest = [parameter for group in others for parameter in group["params"]]
        self.adamw = torch.optim.AdamW(rest, lr=1e-4, fused=True)

    def step(self) -> None:
        self.muon.step()
        self.adamw.step()


def step_times(
    data: TileBatches, settings: Settings, precision: torch.dtype
) -> dict[str, dict[str, float]]:
    """Return the CPU milliseconds of the gradient of a batch, and of each optimizer's update.

    The model is the demo's. The optimizers take turns, so that other load on the machine affects
    all of them alike.
    """
    torch.manual_seed(0)
    model = DiMR(preset("demo"))
    dtype = torch.bfloat16 if precision == torch.bfloat16 else torch.float32
    steps: dict[str, Callable[[], object]] = {
        "adamw": adamw(model, 1e-4).step,
        "muon": muon(model, 1e-4, dtype=dtype).step,
        "torch.optim.Muon": TorchMuon(model).step,
    }
    times: dict[str, list[float]] = {name: [] for name in ("gradient", *steps)}

    def timed(name: str, function: Callable[[], object]) -> None:
        begun = time.process_time()
        function()
        times[name].append(1000 * (time.process_time() - begun))

    def gradient() -> None:
        x0, y, n, noise = data.batch(0, 0, settings.batch_size)
        predictions = predict(model, data.schedule, x0, y, n, noise, precision)
        model.zero_grad()
        multi_scale_loss(predictions, noise).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    gradient()
    for function in steps.values():
        function()
    times = {name: [] for name in times}
    for _ in range(settings.timed_steps):
        timed("gradient", gradient)
        for name, function in steps.items():
            timed(name, function)
    return {name: dataclasses.asdict(Spread.of(values)) for name, values in times.items()}


if __name__ == "__main__":
    print("wrote", compare(tyro.cli(Settings)))
