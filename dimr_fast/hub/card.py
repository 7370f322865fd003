"""Fill in the model card of a saved model."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from dimr_fast.config import DiMRConfig, preset_of

PAPER = "https://arxiv.org/abs/2406.09416"
LISTED_CLASSES = 30
"""Maximum number of class names on the card: a thousand would hide everything else."""
TEMPLATE = Path(__file__).with_name("card_template.md")


def model_card(
    name: str,
    config: DiMRConfig,
    parameters: int,
    *,
    classes: list[str] | None = None,
    scale: dict[str, Any] | None = None,
    schedule: str | None = None,
    sampling_defaults: str | None = None,
    evaluations: int | None = None,
    recipe: dict[str, Any] | None = None,
    scores: dict[str, Any] | None = None,
    license: str | None = None,
    pictures: Sequence[str] = (),
) -> ModelCard:
    """Return a model's card: Markdown with the metadata that the Hub reads.

    `classes`, `scale` (of `scale_to_dict`), `schedule`, `recipe` and `scores` are JSON values; the
    card says which of them are unknown. `sampling_defaults`: "published" for a model that is
    sampled as published by default. `evaluations`: the number of network evaluations of a distilled
    model. `license` is an identifier of the Hub, such as "apache-2.0".
    `pictures` are names of files beside the card.
    """
    metadata = ModelCardData(
        library_name="dimr_fast", license=license, tags=["dimr", "diffusion", "image-generation"]
    )
    return ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        name=name,
        config=config,
        parameters=parameters,
        preset=preset_of(config),
        kind="latents" if scale and scale.get("kind") == "latents" else "images",
        paper=PAPER,
        classes=classes,
        listed_classes=LISTED_CLASSES,
        scale=scale,
        schedule=schedule,
        sampling_defaults=sampling_defaults,
        evaluations=evaluations,
        recipe=recipe,
        scores=scores,
        license=license,
        pictures=pictures,
        as_json=lambda values: json.dumps(values, indent=2, ensure_ascii=False),
    )
