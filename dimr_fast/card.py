"""What a saved model says of itself: its model card."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from dimr_fast.config import DiMRConfig, preset_of

PAPER = "https://arxiv.org/abs/2406.09416"
LISTED_CLASSES = 30


def model_card(
    name: str,
    config: DiMRConfig,
    parameters: int,
    *,
    classes: list[str] | None = None,
    scale: dict[str, Any] | None = None,
    recipe: dict[str, Any] | None = None,
    scores: dict[str, Any] | None = None,
    license: str | None = None,
    pictures: Sequence[str] = (),
) -> str:
    """The card of a model in Markdown, with the metadata that the Hub reads.

    `classes`, `scale` (of `scale_to_dict`), `recipe` and `scores` are JSON values; what is not
    given is said to be unknown. `license` is an identifier of the Hub's, such as "apache-2.0".
    `pictures` are files beside the card.
    """
    metadata = ModelCardData(
        library_name="dimr_fast", license=license, tags=["dimr", "diffusion", "image-generation"]
    )
    height, width = config.image_size
    kind = "latents" if scale and scale.get("kind") == "latents" else "images"
    preset = preset_of(config)
    sections = [
        f"# {name}",
        f"A [DiMR]({PAPER}) diffusion model of {parameters:,} parameters"
        + (f" (preset `{preset}`)" if preset else "")
        + f". It draws {kind} of {config.channels}×{height}×{width} "
        f"by class and predicts noise at {len(config.stage_configs)} resolutions.",
        _branches(config),
        *(f"![{Path(picture).stem}]({picture})" for picture in pictures),
        "## Data",
        _data(config, classes, scale),
        "## Training",
        _block(recipe, "How it was trained, whole:", "How it was trained is not recorded."),
        "## Scores",
        _block(
            scores,
            "A score means something only beside how it was made, so here is all of it:",
            "It has not been scored.",
        ),
        "## Use",
        _use(name, kind, scalable=classes is not None and scale is not None),
        "## Limits",
        "It knows the classes and the size above and nothing else, and it repeats whatever its "
        "training pictures show too often or not at all. What it draws is no record of anything "
        "that exists.",
        "## Licence",
        f"The weights are under `{license}`." if license else "No licence was given for them.",
    ]
    return f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def _branches(config: DiMRConfig) -> str:
    rows = ["| branch | resolution | blocks | width |", "|---|---|---|---|"]
    for branch in config.stage_configs:
        size = f"{branch.max_height}×{branch.max_width}"
        blocks = branch.num_blocks // 2 * 2 + 1
        rows.append(f"| {branch.block_type} | {size} | {blocks} | {branch.dim} |")
    return "\n".join(rows)


def _data(config: DiMRConfig, classes: list[str] | None, scale: Mapping[str, Any] | None) -> str:
    if classes is None:
        named = f"{config.num_classes - 1} classes, whose names are not recorded"
    else:
        named = f"{len(classes)} classes: {', '.join(classes[:LISTED_CLASSES])}"
        if len(classes) > LISTED_CLASSES:
            named += f" and {len(classes) - LISTED_CLASSES} more, all in `config.json`"
    if scale is None:
        return f"{named}. How its inputs were scaled is not recorded."
    values = ", ".join(f"{key} {value}" for key, value in scale.items() if key != "kind")
    return f"{named}. Its inputs are {scale.get('kind')}, scaled with {values}."


def _block(values: dict[str, Any] | None, introduction: str, unknown: str) -> str:
    if not values:
        return unknown
    return f"{introduction}\n\n```json\n{json.dumps(values, indent=2, ensure_ascii=False)}\n```"


def _use(name: str, kind: str, scalable: bool) -> str:
    python = (
        "With `dimr_fast` installed:\n\n```python\nfrom dimr_fast import DiMR\n\n"
        f'model = DiMR.from_pretrained("{name}")  # this folder, or its name on the Hub\n'
        "predictions = model(x, log_snr=log_snr, y=y)  # noise, from low to high resolution\n```"
    )
    if not scalable:
        return python
    parts, option = "this folder", ""
    if kind == "latents":
        parts, option = "this folder and the autoencoder of its latents", " --autoencoder FOLDER"
    return (
        f"{python}\n\nTo draw pictures, from a copy of {parts}:\n\n"
        f"```sh\ndimr-fast sample --checkpoint {name}{option} --output samples\n```"
    )
