"""Train the demo's model with AdamW and with Muon at several learning rates, on the same batches.

    python -m benchmarks.ablation.optimizers --state FOLDER

Every run has the demo's recipe with a fixed number of steps; only optimizer and learning rate
differ. Therefore weights at the start, batches, noise levels and noise are the same in all of them.
Interrupted (Ctrl-C), the same command resumes. `optimizers.json` is rewritten after each run.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import tyro
from torch import nn

from benchmarks.ablation.report import CODE, OPTIMIZERS_RESULT
from benchmarks.ablation.run import CPU, TileBatches, held_out_loss, predict
from benchmarks.utils import machine
from benchmarks.utils.spread import Spread
from dimr_fast.checkpoint import load_model
from dimr_fast.config import preset
from dimr_fast.data.arrays import ImageArray
from dimr_fast.data.tiles import Tiles, load_tiles
from dimr_fast.diffusion import multi_scale_loss
from dimr_fast.model import DiMR
from dimr_fast.optim import adamw, muon
from dimr_fast.training import CHECKPOINT, TrainConfig, train
from dimr_fast.utils.device import DTYPES, keep_freed_memory, precision_name, resolve_precision
from dimr_fast.utils.files import write_json
from dimr_fast.utils.validation import require_fields

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the comparison."""

    state: Path
    """Folder of the runs, from which the same command resumes."""
    output: Path = OPTIMIZERS_RESULT.parent
    """Folder of `optimizers.json`."""
    steps: int = 600
    """Steps of each run; the loss is also measured after half of them."""
    batch_size: int = 32
    learning_rate: float = 4e-3
    """AdamW's, that of the demo's recipe."""
    muon_learning_rates: tuple[float, ...] = (4e-3, 8e-3, 16e-3)
    seed: int = 0
    timed_steps: int = 10
    """Steps of each optimizer that are timed, in turns."""

    def validate(self) -> None:
        """Raise ValueError naming a setting that is out of range."""
        rates = self.muon_learning_rates
        require_fields(
            self,
            steps=(self.steps >= 2 and self.steps % 2 == 0, "an even number, 2 or more"),
            batch_size=(self.batch_size > 0, "a positive number"),
            learning_rate=(self.learning_rate > 0, "a positive number"),
            muon_learning_rates=(all(rate > 0 for rate in rates), "positive numbers"),
            timed_steps=(self.timed_steps > 0, "a positive number"),
        )

    def runs(self) -> Iterator[TrainConfig]:
        """Yield the settings of each run."""
        arms = [("adamw", self.learning_rate), *(("muon", r) for r in self.muon_learning_rates)]
        shared: dict[str, Any] = {
            "minutes": None,
            "steps": self.steps,
            "batch_size": self.batch_size,
            "seed": self.seed,
            # The share of the run that the demo's 100 steps are of 600.
            "warmup_steps": self.steps // 6,
            "milestone_steps": self.steps // 2,
            "checkpoint_minutes": 0.5,
            "device": "cpu",
        }
        for name, rate in arms:
            output = self.state / f"{name}-{rate:g}"
            yield TrainConfig(output=output, optimizer=name, learning_rate=rate, **shared)


def compare(settings: Settings, tiles: Tiles | None = None) -> Path:
    """Train and score all runs that are not yet; return the path of `optimizers.json`.

    `tiles` replace those of the installed picture. Raises ValueError for a setting out of range or
    a state folder of another recipe, KeyboardInterrupt after a signal has ended a run, and
    DataUnavailableError without the tiles.
    """
    settings.validate()
    commit = machine.commit(*CODE)
    torch.set_num_threads(1)
    keep_freed_memory()
    data = TileBatches(load_tiles() if tiles is None else tiles)
    precision = resolve_precision("auto", CPU)
    result = settings.output / OPTIMIZERS_RESULT.name
    recipe = {"steps": settings.steps, "batch_size": settings.batch_size, "seed": settings.seed}
    found = kept(settings.state / "recipe.json", lambda: recipe)
    if found != recipe:
        raise ValueError(f"state: got {settings.state}, of recipe {found}, expected {recipe}")
    report: dict[str, Any] = {
        **machine.description(),
        "commit": commit,
        "precision": precision_name(precision),
        **recipe,
        "held_out_tiles": len(data.tiles.val_images),
        "milliseconds": kept(
            settings.state / "times.json", lambda: step_times(data, settings, precision)
        ),
        "runs": [],
    }
    for config in settings.runs():
        report["runs"].append(run_and_score(config, data))
        write_json(result, report)
        print(json.dumps(report["runs"][-1]), flush=True)
    return result


def run_and_score(config: TrainConfig, data: TileBatches) -> dict[str, Any]:
    """Train a run to its end, if it is not there yet, and return its entry of the report."""

    def losses() -> dict[str, float]:
        images = ImageArray(data.tiles.train_images, data.tiles.train_labels, data.tiles.classes)
        resume = (config.output / CHECKPOINT).exists()
        summary = train(config, examples=images, resume=resume)
        if summary.interrupted:
            raise KeyboardInterrupt
        half = f"checkpoint-{summary.steps // 2:08d}.safetensors"
        dtype = DTYPES[summary.precision]
        return {
            name: held_out_loss(load_model(config.output / file).model, data, dtype)
            for name, file in (("half_way", half), ("end", CHECKPOINT))
        }

    return {
        "optimizer": config.optimizer,
        "learning_rate": config.learning_rate,
        "held_out_loss": kept(config.output / "losses.json", losses),
    }


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
        x0, y, n, noise = data.batch(settings.seed, 0, settings.batch_size)
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
