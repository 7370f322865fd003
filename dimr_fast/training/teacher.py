"""Load the teacher of a distillation, and the model that guides it."""

from dataclasses import dataclass

from dimr_fast.checkpoint import TrainedModel, load_model
from dimr_fast.config import DiMRConfig
from dimr_fast.data.examples import Examples
from dimr_fast.training.config import TrainConfig
from dimr_fast.utils.tensors import sha256_of_named


@dataclass(frozen=True)
class Teacher:
    """A trained model from which a student learns, and the worse model that guides it, if any."""

    trained: TrainedModel
    guide: TrainedModel | None


def load_teacher(config: TrainConfig, examples: Examples, model: DiMRConfig) -> Teacher | None:
    """Load the teacher of a distillation and its guide; None for other runs.

    `model` is the student's configuration. Raises ValueError where one of them is distilled itself
    or was trained with other classes, size, schedule or, for the guide, another scale of inputs.
    """
    if config.teacher is None:
        return None

    def load(setting: str) -> TrainedModel:
        path = getattr(config, setting)
        found = load_model(path)
        if found.evaluations is not None:
            raise ValueError(f"{setting}: {path} is distilled itself, expected its teacher")
        for name, theirs, ours in (
            ("classes", found.classes, examples.classes),
            ("schedule", found.schedule, config.schedule),
            ("image shape", found.model.config.shape, model.shape),
        ):
            if theirs != ours:
                raise ValueError(
                    f"{setting}: {path} has the {name} {theirs}, expected that of this run, {ours}"
                )
        return found

    trained = load("teacher")
    if config.teacher_guide is None:
        return Teacher(trained, None)
    guide = load("teacher_guide")
    if guide.scale != trained.scale:
        raise ValueError(
            f"teacher_guide: {config.teacher_guide} has the scale {guide.scale}, expected that of "
            f"the teacher, {trained.scale}"
        )
    return Teacher(trained, guide)


def fingerprints(teacher: Teacher | None) -> dict[str, str | None]:
    """Return what a run records of its teacher: SHA-256 of the weights, by the settings' names."""
    models = (None, None) if teacher is None else (teacher.trained, teacher.guide)
    return {
        name: None if found is None else sha256_of_named(found.model.state_dict())
        for name, found in zip(("teacher", "teacher_guide"), models, strict=True)
    }
