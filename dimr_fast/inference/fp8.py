"""The FP8 layers of a model optimised for inference; kernels/fp8.md says which layers and why."""

from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from dimr_fast import ops
from dimr_fast.layers import Linear, RMSNorm, TDLayerNorm, TDRMSNorm, TDValues
from dimr_fast.model import DiMR


def check_fp8(model: DiMR, dtype: torch.dtype) -> None:
    """Raise ValueError if the device, `dtype` or a width of `model` does not allow FP8."""
    device = next(model.parameters()).device
    if (reason := ops.why_not_fp8(device)) is not None:
        raise ValueError(f"quantize: got 'fp8' for a model on {device}, but {reason}")
    if dtype != torch.bfloat16:
        raise ValueError(f"dtype: got {dtype}, expected torch.bfloat16 with quantize='fp8'")
    for i, branch in enumerate(model.config.stage_configs):
        for name in ("dim", "hidden_dim"):
            size = getattr(branch, name)
            if size % ops.FP8_MULTIPLE:
                raise ValueError(
                    f"quantize: got 'fp8' for stage_configs[{i}].{name} = {size}, expected a "
                    f"multiple of {ops.FP8_MULTIPLE}"
                )


class FP8Norm(nn.Module):
    """A norm of `layers` whose result is FP8 rows."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = cast(TDLayerNorm | TDRMSNorm | RMSNorm, norm)
        base = "td_layer_norm" if isinstance(norm, TDLayerNorm) else "td_rms_norm"
        self.implementation = implementation_in_fp8(base, self.norm.implementation)

    def forward(self, x: Tensor, td: TDValues, residual: Tensor | None = None) -> Any:
        """Return the rows or, with a residual, the sum and the rows."""
        if isinstance(self.norm, TDLayerNorm):
            summed, rows = ops.td_layer_norm_fp8(
                x, *self.norm.values(td), residual, implementation=self.implementation
            )
        else:
            summed, rows = ops.td_rms_norm_fp8(
                x, self.norm.value(td), residual, implementation=self.implementation
            )
        return rows if residual is None else (summed, rows)


class FP8Linear(Linear):
    """`layers.Linear` of FP8 rows, whose weight is quantised once; `dtype` is that of the bias."""

    scales: Tensor
    uses_onednn = False

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        values, scales = ops.quantize_fp8(weight)
        self.weight = nn.Parameter(values, requires_grad=False)
        self.register_buffer("scales", scales)
        if bias is not None:
            self.bias = nn.Parameter(bias.to(dtype, copy=True), requires_grad=False)

    @classmethod
    def of(cls, linear: nn.Linear, dtype: torch.dtype) -> Self:
        return cls(linear.weight, linear.bias, dtype)

    def forward(self, *inputs: Any) -> Tensor:
        (rows,) = inputs
        return ops.linear_fp8(rows, ops.FP8Rows(self.weight, self.scales), self.bias)


def implementation_in_fp8(operator: str, implementation: str) -> str:
    """Return the implementation that a model was set to, or "auto" if it does not quantise."""
    return implementation if implementation in ops.OPERATORS[f"{operator}_fp8"].names else "auto"
