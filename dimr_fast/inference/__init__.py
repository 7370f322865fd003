"""Optimise a trained model for sampling."""

from dimr_fast.inference.optimize import (
    InferenceDiMR,
    Quantization,
    optimize_for_inference,
    pad_heads,
)

__all__ = ["InferenceDiMR", "Quantization", "optimize_for_inference", "pad_heads"]
