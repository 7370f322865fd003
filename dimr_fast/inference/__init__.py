"""Optimise a trained model for sampling."""

from dimr_fast.inference.branch import PaddedAttention
from dimr_fast.inference.optimize import InferenceDiMR, Quantization, optimize_for_inference

__all__ = ["InferenceDiMR", "PaddedAttention", "Quantization", "optimize_for_inference"]
