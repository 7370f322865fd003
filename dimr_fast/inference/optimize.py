"""Optimise a trained model for sampling: the same call without gradients."""

from contextlib import nullcontext
from typing import Any, Literal, NoReturn, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from dimr_fast import ops
from dimr_fast.inference.branch import Buffers, OperatorBranch
from dimr_fast.inference.cpu import FACTORS, CPUBranch, CPUFeatures, uses_cpu_library
from dimr_fast.inference.fp8 import check_fp8
from dimr_fast.layers import TDParameter, is_quantised
from dimr_fast.model import Branch, DiMR, check_inputs
from dimr_fast.utils.compilation import not_compiled
from dimr_fast.utils.cuda_graphs import Capture, CUDAGraphs, capture_graph

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

Quantization = Literal["int8", "fp8"]
"""Formats of `optimize_for_inference(quantize=…)`; `None` there means no quantisation."""


def optimize_for_inference(
    model: nn.Module,
    dtype: torch.dtype = torch.bfloat16,
    cuda_graphs: Literal["auto"] | bool = "auto",
    quantize: Quantization | None = None,
) -> "InferenceDiMR":
    """Return a copy of `model` for sampling, called like it; predictions are equal up to rounding.

    The copy computes in `dtype` (bfloat16, float16 or float32), also under autocast;
    time-dependent parameters and statistics stay float32. It shares nothing with `model`, which can
    be trained further without changing the copy. Dropout is off.

    With `cuda_graphs` a whole forward pass is replayed as one launch. A graph is captured at the
    first call with each combination of batch size, number of times and dtypes of the inputs;
    "auto" uses graphs on a GPU.

    With `quantize="int8"` the linear layers of the blocks and of the cascade multiply 8-bit
    integers. Each row of a weight has a scale, which is found here, and so has each row of the
    layer's input, which is found when it is computed. All else is as without it. It needs a model
    on a CPU whose operators all run by the compiled library.

    With `quantize="fp8"` the linear layers that follow a norm or the gate of an MLP multiply e4m3
    numbers, with such scales; all else is computed in `dtype`, which is bfloat16. It needs a GPU of
    compute capability 8.9 or later; a CPU computes the same, but slowly.

    Predictions of a quantised model differ more than by rounding: see docs/sampling.md.

    `model` is a DiMR, or one in DataParallel, DistributedDataParallel or `torch.compile`. The copy
    can be copied and pickled.

    Raises TypeError for another model; ValueError for a model whose layers were replaced,
    for any other dtype, for `cuda_graphs=True` if the model is not on a GPU, and for `quantize`
    where it cannot be used.
    """
    model = _unwrapped(model)
    _check_layers(model)
    device = next(model.parameters()).device
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype}, expected one of {DTYPES}")
    if cuda_graphs not in ("auto", True, False):
        raise ValueError(f"cuda_graphs: got {cuda_graphs!r}, expected 'auto', True or False")
    if cuda_graphs is True and device.type != "cuda":
        raise ValueError(f"cuda_graphs: got True for a model on {device}, expected one on a GPU")
    _check_quantize(quantize, model, dtype)
    with torch.inference_mode(False), torch.no_grad():
        graphs = device.type == "cuda" and cuda_graphs is not False
        return InferenceDiMR(model, dtype, graphs, quantize=quantize)


def _check_quantize(quantize: object, model: DiMR, dtype: torch.dtype) -> None:
    if quantize not in (None, *get_args(Quantization)):
        names = " or ".join(map(repr, get_args(Quantization)))
        raise ValueError(f"quantize: got {quantize!r}, expected None or {names}")
    if quantize == "int8" and not uses_cpu_library(model, dtype):
        raise ValueError(
            "quantize: got 'int8', expected a model on a CPU whose operators all have the "
            "implementation 'auto' or 'cpu', and the compiled library"
        )
    if quantize == "fp8":
        check_fp8(model, dtype)


def _unwrapped(model: nn.Module) -> DiMR:
    """Return the DiMR in a model that DataParallel, DDP or `torch.compile` has wrapped."""
    found: Any = model
    while not isinstance(found, DiMR):
        inner = getattr(found, "_orig_mod", None) or getattr(found, "module", None)
        if not isinstance(inner, nn.Module):
            raise TypeError(f"model: got {type(model).__name__}, expected a DiMR or one in DDP")
        found = inner
    return found


def _check_layers(model: DiMR) -> None:
    """Raise ValueError naming a layer that was replaced, whose weight alone is not what it does."""
    with torch.device("meta"):
        as_built = DiMR(model.config)
    for name, module in as_built.named_modules():
        for kind in (nn.Linear, nn.Conv2d, nn.Embedding):
            if not isinstance(module, kind):
                continue
            found = model.get_submodule(name)
            # A subclass may compute anything: only the forward as built, or PyTorch's, is known.
            known = (type(module).forward, kind.forward)
            if (
                not isinstance(found, kind)
                or type(found).forward not in known
                or is_parametrized(found)
            ):
                raise ValueError(
                    f"model: got {type(found).__name__} as {name}, expected {kind.__name__}: merge "
                    "adapters and parametrisations into the layers first"
                )
            if is_quantised(found):
                weight = type(found.weight).__name__
                raise ValueError(f"model: got {weight} as {name}.weight, expected Parameter")


class InferenceDiMR(nn.Module):
    """A model optimised for inference, made by `optimize_for_inference`.

    `capture` replaces the capture of CUDA graphs by another one, for tests.

    Its device and dtype cannot change. Calls of one instance must not overlap: they share buffers,
    which are as large as the largest batch so far. `torch.compile` does not trace its calls, which
    run compiled kernels on weights in these kernels' layouts.
    """

    td_vectors: Tensor

    def __init__(
        self,
        model: DiMR,
        dtype: torch.dtype,
        cuda_graphs: bool,
        capture: Capture | None = None,
        quantize: Quantization | None = None,
    ) -> None:
        super().__init__()
        self.config = model.config
        self.dtype = dtype
        self.device = next(model.parameters()).device
        self.implementation = model.implementation
        self.uses_cpu_library = quantize != "fp8" and uses_cpu_library(model, dtype)
        factors = ops.Factors.INT8 if quantize == "int8" else FACTORS[dtype]
        self.stages = nn.ModuleList(
            CPUBranch(cast(Branch, branch), dtype, factors)
            if self.uses_cpu_library
            else OperatorBranch(cast(Branch, branch), dtype, quantize == "fp8")
            for branch in model.stages
        )
        # Concatenated, all time-dependent parameters are one wide parameter.
        td = sorted(
            (m for m in model.modules() if isinstance(m, TDParameter)), key=lambda p: p.index
        )
        self.td_widths = [parameter.param0.shape[0] for parameter in td]
        kinds = zip(*(parameter.vectors for parameter in td), strict=True)
        self.register_buffer("td_vectors", torch.stack([torch.cat(kind).float() for kind in kinds]))
        self.shared_buffers = self._allocate(0)
        self._graphs = CUDAGraphs(self._compute, capture or capture_graph) if cuda_graphs else None
        self.eval()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "shared_buffers": self._allocate(0)}

    @property
    def cuda_graphs(self) -> bool:
        """Whether calls replay CUDA graphs."""
        return self._graphs is not None

    @not_compiled("an optimised model is compiled code already")
    def forward(
        self,
        x: Tensor,
        t: object = None,
        log_snr: Tensor | float | None = None,
        y: Tensor | None = None,
        *,
        last_only: bool = False,
    ) -> list[Tensor]:
        """Predict the noise in `x` at the resolution of each branch, from low to high.

        Arguments, result and errors are those of `DiMR.forward`, except that `x` may have any
        floating-point dtype and the predictions have the dtype of `x`. With `last_only` the list
        contains only the last prediction, and those of lower resolution are not computed. Later
        calls do not overwrite the result.
        """
        log_snr, y = check_inputs(self.config, self.device, x, log_snr, y)
        # Buffers outlive this call, and a later call may run in another mode.
        with torch.inference_mode(False), torch.no_grad(), _no_autocast(self.device):
            capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
            if self._graphs is not None and len(x) and not capturing:
                return self._graphs(last_only, x, log_snr, y)
            if capturing:
                return self._compute(last_only, x, log_snr, y)
            return self._run(last_only, x, log_snr, y, self._buffers_for(len(x)))

    def _compute(self, last_only: bool, x: Tensor, log_snr: Tensor, y: Tensor) -> list[Tensor]:
        """Compute with new buffers: a CUDA graph keeps the buffers that it was captured with."""
        return self._run(last_only, x, log_snr, y, self._allocate(len(x)))

    def _run(
        self,
        last_only: bool,
        x: Tensor,
        log_snr: Tensor,
        y: Tensor,
        buffers: "list[Buffers | CPUFeatures]",
    ) -> list[Tensor]:
        vectors = cast(ops.Vectors, self.td_vectors.unbind())
        (values,) = ops.td_parameters(
            log_snr.float() / 4, [vectors], implementation=self.implementation
        )
        td = values.split(self.td_widths, -1)
        # The CPU library reads images in any dtype that it knows.
        image = x if self.uses_cpu_library and x.dtype in DTYPES else x.to(self.dtype)
        predictions = []
        features: Any = None
        for i, branch in enumerate(self.stages):
            wanted = i + 1 == len(self.stages) or not last_only
            prediction, features = branch(image, features, y, td, buffers[i], wanted)
            if wanted:
                predictions.append(prediction.to(x.dtype))
        return predictions

    def _allocate(self, batch: int) -> "list[Buffers | CPUFeatures]":
        return [cast(OperatorBranch | CPUBranch, stage).allocate(batch) for stage in self.stages]

    def _buffers_for(self, batch: int) -> "list[Buffers | CPUFeatures]":
        if batch > self.shared_buffers[0].pairs.shape[1]:
            self.shared_buffers = self._allocate(batch)
        return [buffers.of_batch(batch) for buffers in self.shared_buffers]

    def _apply(self, fn: Any, recurse: bool = True) -> NoReturn:
        raise RuntimeError(
            "an optimised model cannot be moved or cast: move the DiMR, then optimise it again"
        )


def _no_autocast(device: torch.device) -> Any:
    if ops.autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
