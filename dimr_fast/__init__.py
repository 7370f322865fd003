"""DiMR, fast: a multi-resolution diffusion model with time-dependent layer normalisation."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dimr_fast.config import PRESETS, BranchConfig, DiMRConfig
    from dimr_fast.inference import optimize_for_inference
    from dimr_fast.model import DiMR

__all__ = ["PRESETS", "BranchConfig", "DiMR", "DiMRConfig", "optimize_for_inference"]
__version__ = "0.1.0"

_MODULES = {
    "PRESETS": "config",
    "BranchConfig": "config",
    "DiMRConfig": "config",
    "DiMR": "model",
    "optimize_for_inference": "inference",
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use: `dimr-fast --help` must not wait for torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
