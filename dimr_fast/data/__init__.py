"""Training data: images, latents, their scaling and their order."""

from dimr_fast.data.examples import Examples
from dimr_fast.errors import DataUnavailableError

__all__ = ["DataUnavailableError", "Examples"]
