"""Save models to folders and the Hugging Face Hub, and load them: configuration, weights, card."""

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Self

import huggingface_hub
import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from torch import Tensor, nn

from dimr_fast.config import DiMRConfig
from dimr_fast.errors import CheckpointError
from dimr_fast.hub.card import model_card
from dimr_fast.hub.published import is_published_run
from dimr_fast.utils.tensors import how_to_convert, read_tensors, write_tensors

CONFIG, WEIGHTS = "config.json", "model.safetensors"
NOTES = (
    "classes",
    "scale",
    "schedule",
    "sampling_defaults",
    "evaluations",
    "intervals",
    "recipe",
    "scores",
    "license",
)
"""Entries that `config.json` may have beside the model's configuration."""

WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Name components that torch.compile, DDP, FSDP and checkpoint wrappers add to parameters."""

DeviceMap = str | int | torch.device | Mapping[str, str | int | torch.device]

DOWNLOAD = (
    "revision",
    "token",
    "cache_dir",
    "local_files_only",
    "force_download",
    "endpoint",
    "etag_timeout",
    "max_workers",
)
"""Options of `huggingface_hub.snapshot_download` that `from_pretrained` takes."""
OPTIONS = ", ".join(("dtype", "torch_dtype", "device_map", "map_location", "subfolder", *DOWNLOAD))


class HubModel(nn.Module, PyTorchModelHubMixin):
    """Base class of models with a `DiMRConfig` that folders and the Hub can store."""

    config: DiMRConfig

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        device_map: DeviceMap | None = None,
        map_location: str | torch.device | None = None,
        subfolder: str = "",
        **download: Any,
    ) -> Self:
        """Load a model from a folder of `save_pretrained` or a repository of the Hub.

        It is in evaluation mode. Its parameters are in `dtype`, by default that of the weights, and
        on one device, by default the CPU. `torch_dtype` is another name of `dtype`, `map_location`
        of `device_map`, which may also be `{"": device}`. `subfolder` is the model's place in the
        folder or repository. `download` are options of `huggingface_hub.snapshot_download`:
        `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`, `endpoint`,
        `etag_timeout` and `max_workers`. No code of the repository is run.
        Raises TypeError for any other option, ValueError for a dtype or device that cannot be used,
        CheckpointError where there is no such model, or where its files are damaged or do not fit
        together.
        """
        for name in download:
            if name not in DOWNLOAD:
                raise TypeError(f"{name}: got an unknown option, expected one of {OPTIONS}")
        dtype = _one_of(dtype=dtype, torch_dtype=torch_dtype)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype: got {dtype!r}, expected a floating-point torch.dtype")
        device = _device(_one_of(device_map=device_map, map_location=map_location))
        folder = _local_folder(str(pretrained_model_name_or_path), subfolder, download)
        model, _ = cls.from_folder(folder)
        return model.to(device, dtype)

    @classmethod
    def from_folder(cls, folder: Path) -> tuple[Self, dict[str, Any]]:
        """Load the model in `folder`, on the CPU, and the other entries of its `config.json`.

        These are listed in `NOTES`. Raises CheckpointError as `from_pretrained` does.
        """
        config, notes = read_config(folder / CONFIG)
        weights, _ = read_tensors(folder / WEIGHTS)
        # Tensors are copied into memory: a memory-mapped file could change while it is in use.
        copies = {name: tensor.clone() for name, tensor in weights.items()}
        return cls.from_weights(config, copies, folder / WEIGHTS), notes

    @classmethod
    def from_weights(cls, config: DiMRConfig, weights: Mapping[str, Tensor], source: Path) -> Self:
        """Return a model in evaluation mode whose parameters are these tensors, not copies.

        Raises CheckpointError naming `source` where they do not fit the configuration.
        """
        with torch.device("meta"):
            model = cls(config)
        misfits = _misfits(model.state_dict(), weights)
        if misfits:
            count = "1 weight does" if len(misfits) == 1 else f"{len(misfits)} weights do"
            raise CheckpointError(
                f"{source}: {count} not fit the configuration, first {misfits[0]}"
            )
        dtypes: dict[torch.dtype, str] = {}
        for name, value in weights.items():
            dtypes.setdefault(value.dtype, name)
        if len(dtypes) > 1:
            found = ", ".join(f"{dtype}, such as {name}" for dtype, name in dtypes.items())
            raise CheckpointError(f"{source}: got weights of {found}; expected one dtype for all")
        model.load_state_dict(dict(weights), strict=True, assign=True)
        return model.eval()

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        config: Any = None,
        model_card_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> str | None:
        """Write `config.json`, `model.safetensors` and, unless there is one, `README.md`.

        `config` has further facts about the model for `config.json` and the card, as JSON values:
        `classes`, `scale`, `schedule` (the name of its noise schedule), `sampling_defaults`,
        `evaluations` and `intervals` (of a distilled model), `recipe`, `scores`, `license`.
        `push_to_hub` takes it likewise. Other options are those of huggingface_hub's mixin. Raises
        ValueError for an entry of another name.
        """
        folder, notes = Path(save_directory), dict(config or {})
        own = self.config.to_dict()
        notes = {name: value for name, value in notes.items() if name not in own}
        for name in notes:
            if name not in NOTES:
                raise ValueError(f"config: got {name!r}, expected only {', '.join(NOTES)}")
        shown = {name: value for name, value in notes.items() if name != "intervals"}
        card = {"name": folder.resolve().name, **shown, **(model_card_kwargs or {})}
        return super().save_pretrained(
            folder, config={**own, **notes}, model_card_kwargs=card, **options
        )

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """Return the model card with the facts that were given to `save_pretrained`."""
        parameters = sum(parameter.numel() for parameter in self.parameters())
        return model_card(config=self.config, parameters=parameters, **kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        weights, _ = canonical(self.state_dict())
        # transformers and others require this entry.
        write_tensors(save_directory / WEIGHTS, weights, {"format": "pt"})


def canonical(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
    """Return the weights under the names of an unwrapped model, and the removed name components.

    Raises ValueError where two names become equal.
    """
    renamed: dict[str, Tensor] = {}
    removed: set[str] = set()
    for name, tensor in weights.items():
        parts = name.split(".")
        removed.update(part for part in parts if part in WRAPPERS)
        bare = ".".join(part for part in parts if part not in WRAPPERS)
        if bare in renamed:
            raise ValueError(f"weights: got two of the name {bare!r}, expected one")
        renamed[bare] = tensor
    return renamed, removed


def read_config(path: Path) -> tuple[DiMRConfig, dict[str, Any]]:
    """Read the model's configuration in a `config.json`, and its other entries: see `NOTES`.

    Raises CheckpointError where the file is missing, damaged or of another kind of model.
    """
    try:
        values = json.loads(path.read_bytes())
        if not isinstance(values, dict):
            raise ValueError(f"holds {type(values).__name__}, expected an object")
        notes = {name: values.pop(name) for name in NOTES if name in values}
        return DiMRConfig.from_dict(values), notes
    except FileNotFoundError as error:
        checkpoint = path.parent / "checkpoint.safetensors"  # in the folder of a training run
        hint = f"; its checkpoint is {checkpoint}" if checkpoint.is_file() else ""
        if is_published_run(path.parent):
            hint = f"; it is of a published run; {how_to_convert(path.parent)}"
        raise CheckpointError(
            f"{path.parent}: not a readable checkpoint (there is no {path.name} in it{hint})"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path.parent}: not a readable checkpoint ({error})") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not the configuration of a DiMR model ({error})") from error


def _one_of(**options: Any) -> Any:
    """Return the value of two names of one option. Raises ValueError where both are given."""
    given = [name for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{given[1]}: got it together with {given[0]}, expected one of them")
    return options[given[0]] if given else None


def _device(device_map: Any) -> torch.device:
    """Return the device of a `device_map`. Raises ValueError unless it names exactly one."""
    given = device_map
    if isinstance(given, Mapping) and set(given) == {""}:
        given = given[""]
    try:
        return torch.device("cpu" if given is None else given)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device_map: got {device_map!r}, expected one device") from error


def _local_folder(name: str, subfolder: str, download: dict[str, Any]) -> Path:
    path = Path(name)
    if path.is_dir():
        return path / subfolder
    if path.is_file():
        raise CheckpointError(
            f"{name}: a file, expected a folder; dimr_fast.checkpoint.load_model reads files"
        )
    try:
        patterns = [str(PurePosixPath(subfolder, file)) for file in (CONFIG, WEIGHTS)]
        found = huggingface_hub.snapshot_download(name, allow_patterns=patterns, **download)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{name}: no such folder, and the Hub gave no model of that name ({reason})"
        ) from error
    return Path(found, subfolder)


def _misfits(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """Describe where names, shapes or number kinds differ."""

    def describe(tensor: Tensor) -> str:
        kind = "" if tensor.is_floating_point() else f"{tensor.dtype} "
        return f"{kind}{list(tensor.shape)}"

    missing = [f"{name} is missing" for name in expected if name not in found]
    unknown = [f"{name} is not a weight of the model" for name in found if name not in expected]
    pairs = {
        name: (describe(found[name]), describe(tensor))
        for name, tensor in expected.items()
        if name in found
    }
    other = [f"{name}: got {a}, expected {b}" for name, (a, b) in pairs.items() if a != b]
    return [*missing, *unknown, *other]
