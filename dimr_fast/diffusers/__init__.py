"""DiMR as a pipeline of the library diffusers (extra: hub)."""

try:
    import diffusers as _  # noqa: F401
except ImportError as error:
    raise ImportError(
        'the diffusers package not found; install it with: pip install "dimr_fast[hub]"'
    ) from error

from dimr_fast.diffusers.model import DiMRModel
from dimr_fast.diffusers.pipeline import DiMRPipeline
from dimr_fast.diffusers.scheduler import DiMRScheduler

__all__ = ["DiMRModel", "DiMRPipeline", "DiMRScheduler"]
