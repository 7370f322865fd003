"""The operators: public functions, each with a choice of implementation."""

from dimr_fast.ops._checks import autocast_enabled, compute_dtype
from dimr_fast.ops.attention import attention
from dimr_fast.ops.branch import Factors, branch, pack_linear
from dimr_fast.ops.depthwise_conv2d import depthwise_conv2d
from dimr_fast.ops.fp8 import FP8_MULTIPLE, FP8Rows, linear_fp8, quantize_fp8, why_not_fp8
from dimr_fast.ops.gated_gelu import gated_gelu, gated_gelu_fp8
from dimr_fast.ops.implementations import OPERATORS, Implementations
from dimr_fast.ops.linear import linear
from dimr_fast.ops.rms_norm import rms_norm
from dimr_fast.ops.td_layer_norm import td_layer_norm, td_layer_norm_fp8
from dimr_fast.ops.td_parameters import Vectors, td_parameters
from dimr_fast.ops.td_rms_norm import td_rms_norm, td_rms_norm_fp8, td_rms_norm_into
from dimr_fast.ops.upsample_add import upsample_add

__all__ = [
    "FP8_MULTIPLE",
    "OPERATORS",
    "FP8Rows",
    "Factors",
    "Implementations",
    "Vectors",
    "attention",
    "autocast_enabled",
    "branch",
    "compute_dtype",
    "depthwise_conv2d",
    "gated_gelu",
    "gated_gelu_fp8",
    "linear",
    "linear_fp8",
    "pack_linear",
    "quantize_fp8",
    "rms_norm",
    "td_layer_norm",
    "td_layer_norm_fp8",
    "td_parameters",
    "td_rms_norm",
    "td_rms_norm_fp8",
    "td_rms_norm_into",
    "upsample_add",
    "why_not_fp8",
]
