"""Read files of the published code: weights, folders of a run's state, configurations.

Nothing of them is executed.
"""

import ast
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dimr_fast.config import DiMRConfig
from dimr_fast.errors import CheckpointError
from dimr_fast.utils.tensors import unpickle_tensors

COUNTER = "n_averaged"
"""Entry that `torch.optim.swa_utils.AveragedModel` adds to the weights."""
RUN_WEIGHTS = ("nnet_ema", "nnet")
"""Files of weights in a `STEP.ckpt` folder of the published training, without `.pth`."""


def load_published(path: Path, key: str | None = None) -> dict[str, Tensor]:
    """Read the state dict of a published `.pth` file, for `model.load_state_dict(…, strict=True)`.

    Only tensors are unpickled; they are memory-mapped where the format allows it. A file may also
    hold several state dicts by name beside numbers and optimizer states: `key` is the name of the
    one to read, and may be None if all of them are equal. Raises CheckpointError where the file is
    missing, damaged, holds anything else or several state dicts that differ.
    """
    stored = unpickle_tensors(path)
    if not isinstance(stored, dict):
        raise CheckpointError(f"{path}: holds {type(stored).__name__}, expected a state dict")
    sets = {str(name): value for name, value in stored.items() if _is_state_dict(value)}
    names = ", ".join(sets)
    if key is not None:
        if key not in sets:
            held = f"the weights {names}" if sets else "one state dict without a name"
            raise CheckpointError(f"{path}: got key {key!r}, but it holds {held}")
        return sets[key]
    if not sets:
        for name, value in stored.items():
            if not isinstance(value, Tensor):
                raise CheckpointError(
                    f"{path}: holds {type(value).__name__} at {name!r}, expected a tensor there"
                )
        return stored
    first, *others = sets.values()
    if not all(_same(first, other) for other in others):
        raise CheckpointError(
            f"{path}: holds several weights that differ ({names}); choose by --key NAME"
        )
    return first


def _is_state_dict(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(entry, Tensor) for entry in value.values())
    )


def _same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def is_published_run(path: Path) -> bool:
    """Return whether `path` is a `STEP.ckpt` folder that the published training wrote."""
    return any((path / f"{name}.pth").is_file() for name in RUN_WEIGHTS)


def load_published_run(path: Path, key: str | None = None) -> tuple[dict[str, Tensor], str]:
    """Read the weights of a `STEP.ckpt` folder of the published training, and their name.

    `key` is "nnet_ema", the default, or "nnet". Raises CheckpointError where it is neither, and as
    `load_published` does.
    """
    name = key or RUN_WEIGHTS[0]
    if name not in RUN_WEIGHTS:
        expected = " or ".join(RUN_WEIGHTS)
        raise CheckpointError(f"{path}: got key {key!r}, expected {expected}, a published run's")
    return load_published(path / f"{name}.pth"), name


def read_published_config(path: Path) -> DiMRConfig:
    """Read the model of a published `configs/….py` without executing it.

    The model is the call in the file that has `stage_configs`; its arguments must be written as
    values: numbers, texts, lists and calls like it. Raises CheckpointError naming the line of
    anything else, and for a model that `DiMRConfig.from_published` refuses.
    """
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"{path}: not a readable configuration ({error})") from error
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    models = [call for call in calls if any(k.arg == "stage_configs" for k in call.keywords)]
    if len(models) != 1:
        raise CheckpointError(
            f"{path}: got {len(models)} calls with stage_configs=, expected one, the model; "
            f"{_how_to_write_json()}"
        )
    try:
        return DiMRConfig.from_published(_value(models[0], path))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _value(node: ast.expr, path: Path) -> Any:
    """Return the value of an expression of literals; a call with keywords is an object of them."""
    if isinstance(node, ast.Call) and not node.args and all(k.arg for k in node.keywords):
        return SimpleNamespace(**{str(k.arg): _value(k.value, path) for k in node.keywords})
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(entry, path) for entry in node.elts]
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise CheckpointError(
            f"{path}: line {node.lineno}: got {ast.unparse(node)}, expected a value, since the "
            f"file is not executed; {_how_to_write_json()}"
        ) from error


def _how_to_write_json() -> str:
    return (
        "write the JSON in Python instead: "
        "json.dump(DiMRConfig.from_published(model).to_dict(), file)"
    )
