"""Models in folders and on the Hugging Face Hub."""

from dimr_fast.hub.mixin import CONFIG, NOTES, WEIGHTS, HubModel, read_config

__all__ = ["CONFIG", "NOTES", "WEIGHTS", "HubModel", "read_config"]
