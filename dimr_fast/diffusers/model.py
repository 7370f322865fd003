"""A trained model as a component of a diffusers pipeline."""

from pathlib import Path
from typing import Any, Self

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from dimr_fast.checkpoint import TrainedModel, load_model, local_model, notes_of
from dimr_fast.config import DiMRConfig
from dimr_fast.hub import CONFIG, read_config
from dimr_fast.inference import InferenceDiMR, optimize_for_inference
from dimr_fast.utils.device import resolve_precision


class DiMRModel(ModelMixin):
    """A trained DiMR that predicts noise with a copy made by `optimize_for_inference`.

    The copy is made at the first call. A new one is made after the model was moved or cast, and
    after its weights were changed once `refresh` is called. A model that cannot be optimised, such
    as one with adapters or in float64, is called itself.

    A model with weights in float32 computes in the dtype that is faster on its device, bfloat16 or
    float32, until a dtype is named: in `from_pretrained`, `to`, `float`, … Others compute in the
    dtype of their weights.

    `trained` is the model with the facts about its training, and `notes` are further entries of its
    `config.json`: `recipe`, `scores`, `license`.
    """

    _supports_group_offloading = False  # the copy takes the weights as a whole

    def __init__(self, trained: TrainedModel, notes: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.model, self.trained, self.notes = trained.model, trained, notes or {}
        self._dtype_is_named = False
        # In a tuple, it is no part of this module. None: not made yet.
        self._copy: tuple[InferenceDiMR | None] | None = None
        self._copied: list[tuple[int, int]] = []

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        device_map: Any = None,
        quantization_config: Any = None,
        **options: Any,
    ) -> Self:
        """Load a training checkpoint or a model folder; see `load_model` for both and for errors.

        `torch_dtype` is another name of `dtype`. `options` are those that pipelines pass to every
        model and that have no meaning here. Raises ValueError for a `device_map` that is not one
        device and for a `quantization_config`.
        """
        if quantization_config is not None:
            raise ValueError("quantization_config: got one, expected None: not supported for DiMR")
        device = device_map.get("") if isinstance(device_map, dict) else device_map
        if device_map is not None and device is None:
            raise ValueError(f"device_map: got {device_map!r}, expected one device")
        path = local_model(Path(pretrained_model_name_or_path))
        trained = load_model(path)
        notes = {}
        if path.is_dir():
            _, written = read_config(path / CONFIG)
            known = notes_of(trained)
            notes = {name: value for name, value in written.items() if name not in known}
        model = cls(trained, notes)
        given = {"device": device, "dtype": dtype or torch_dtype}
        return model.to(**{name: value for name, value in given.items() if value is not None})

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write a model folder, which `load_model` and `dimr-fast sample` read, too."""
        notes = self.notes | notes_of(self.trained)
        self.model.save_pretrained(save_directory, config=notes)

    @property
    def config(self) -> DiMRConfig:
        """The configuration of the model."""
        return self.model.config

    def forward(self, x: Tensor, log_snr: Tensor, y: Tensor) -> Tensor:
        """Return the noise in `x` at full resolution; arguments and errors as for `DiMR.forward`.

        `x` has any floating-point dtype, which is that of the result.
        """
        if self._copy is None:
            self._copied = self._versions()
            self._copy = (self._optimised(),)
        (fast,) = self._copy
        if fast is None:
            return self.model(x.to(self.model.dtype), log_snr=log_snr, y=y)[-1].to(x.dtype)
        return fast(x, log_snr=log_snr, y=y, last_only=True)[0]

    def refresh(self) -> None:
        """Make a new copy at the next call if weights were changed or replaced since the last."""
        if self._copy is not None and self._copied != self._versions():
            self._copy = None

    def set_attention_backend(self, backend: str) -> None:
        """Use the named implementation for attention: see `DiMR.set_attention_backend`."""
        self.model.set_attention_backend(backend)
        self._copy = None

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or cast the model; from now on it computes in a dtype that is given."""
        given = (*args, *kwargs.values())
        if not self._dtype_is_named and any(isinstance(value, torch.dtype) for value in given):
            self._dtype_is_named, self._copy = True, None
        # ModelMixin's own warns of parts that are to stay in float32, even if there are none.
        return nn.Module.to(self, *args, **kwargs)

    def float(self, *args: Any) -> Self:
        """Cast the model to float32, and compute in it."""
        return self.to(torch.float32)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        before = self.model.device, self.model.dtype
        super()._apply(fn, recurse)
        # Hooks that offload models call `to` before each evaluation, mostly for nothing.
        if (self.model.device, self.model.dtype) != before:
            self._copy = None
        return self

    def _optimised(self) -> InferenceDiMR | None:
        dtype = self.model.dtype
        if dtype == torch.float32 and not self._dtype_is_named:
            dtype = resolve_precision("auto", self.model.device)
        try:
            return optimize_for_inference(self.model, dtype)
        except ValueError:  # for replaced layers, and for float64
            return None

    def _versions(self) -> list[tuple[int, int]]:
        """Return what changes when a weight is changed in place or replaced."""
        weights = [weight for weight in self.model.parameters() if not weight.is_inference()]
        return [(weight.data_ptr(), weight._version) for weight in weights]
