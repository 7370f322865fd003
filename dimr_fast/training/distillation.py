"""Settings of a distillation run, made from its teacher."""

from collections.abc import Sequence
from pathlib import Path

from dimr_fast.checkpoint import demo_model, load_model, local_model
from dimr_fast.config import PRESETS, DiMRConfig
from dimr_fast.errors import CheckpointError
from dimr_fast.training.config import TrainConfig
from dimr_fast.training.run import CONFIG


def distillation_config(
    checkpoint: Path | None,
    output: Path,
    changes: Sequence[str] = (),
    resume: bool = False,
    guide: Path | None = None,
) -> TrainConfig:
    """Return the settings of a run that distils a trained model, starting from its weights.

    They are those of the recipe `distill`, or with `resume` the run's own, with `changes` as in
    `TrainConfig.read`. The teacher is `checkpoint`, the packaged model if it is None; `guide` is
    the model that guides it, if any. Raises CheckpointError where the teacher is unusable, and
    ValueError as `TrainConfig.read` does.
    """
    own = output / CONFIG
    guided = [] if guide is None else [f"teacher_guide={local_model(guide)}"]
    if resume and own.exists():
        words = [] if checkpoint is None else [f"teacher={checkpoint}"]
        return TrainConfig.read(str(own), [*words, *guided, *changes], output)
    teacher = local_model(checkpoint or demo_model())
    trained = load_model(teacher)
    words = [
        f"teacher={teacher}",
        f"init={teacher}",
        f"preset={_preset_of(trained.model.config, teacher)}",
        f"schedule={trained.schedule}",
    ]
    return TrainConfig.read("distill", [*words, *guided, *changes], output)


def _preset_of(config: DiMRConfig, teacher: Path) -> str:
    """Return the preset that `config` is, fitted to its inputs and classes."""
    for name, known in PRESETS.items():
        try:
            if known.fitted(config.channels, config.image_size, config.num_classes) == config:
                return name
        except ValueError:  # the preset cannot have this image size
            continue
    raise CheckpointError(f"{teacher}: its configuration is that of no preset, fitted to its data")
