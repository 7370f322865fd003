"""Optimise a trained model for sampling."""

from dimr_fast.inference.optimize import (
    InferenceDiMR,
    PaddedAttention,
    Quantization,
    optimize_for_inference,
)

__all__ = ["InferenceDiMR", "PaddedAttention", "Quantization", "optimize_for_inference"]
