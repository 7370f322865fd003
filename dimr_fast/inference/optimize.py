"""Optimise a trained model for sampling: the same call without gradients."""

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple, NoReturn, Self, TypeVar, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dimr_fast import ops
from dimr_fast.inference.cpu import CPUBranch, CPUFeatures
from dimr_fast.inference.fp8 import FP8Linear, FP8Norm, check_fp8, implementation_in_fp8
from dimr_fast.layers import (
    Attention,
    Block,
    DepthwiseConv2d,
    GatedMLP,
    Linear,
    Operation,
    RMSNorm,
    TDParameter,
    TDRMSNorm,
    TDValues,
)
from dimr_fast.model import Branch, DiMR, check_inputs
from dimr_fast.utils.cuda_graphs import Capture, CUDAGraphs, capture_graph

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

Quantization = Literal["int8", "fp8"]
"""Formats of `optimize_for_inference(quantize=…)`; `None` there means no quantisation."""

Module = TypeVar("Module", bound=nn.Module)


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

    Raises TypeError for another model; ValueError for any other dtype, for `cuda_graphs=True` if
    the model is not on a GPU, and for `quantize` where it cannot be used.
    """
    model = _unwrapped(model)
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
    if quantize == "int8" and not _uses_cpu_library(model, dtype):
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


class InferenceDiMR(nn.Module):
    """A model optimised for inference, made by `optimize_for_inference`.

    `capture` replaces the capture of CUDA graphs by another one, for tests.

    Its device and dtype cannot change. Calls of one instance must not overlap: they share buffers,
    which are as large as the largest batch so far. `torch.compile` does not trace its calls: they
    run our own kernels and oneDNN on weights in oneDNN's layout, and Inductor makes none of these
    faster.
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
        self.uses_cpu_library = quantize != "fp8" and _uses_cpu_library(model, dtype)
        factors = ops.Factors.INT8 if quantize == "int8" else _FACTORS[dtype]
        self.stages = nn.ModuleList(
            CPUBranch(cast(Branch, branch), dtype, factors)
            if self.uses_cpu_library
            else _Branch(cast(Branch, branch), dtype, quantize == "fp8")
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

    @torch.compiler.disable(reason="an optimised model is compiled code already")
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
        buffers: "list[_Buffers | CPUFeatures]",
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

    def _allocate(self, batch: int) -> "list[_Buffers | CPUFeatures]":
        return [cast(_Branch | CPUBranch, stage).allocate(batch) for stage in self.stages]

    def _buffers_for(self, batch: int) -> "list[_Buffers | CPUFeatures]":
        if batch > self.shared_buffers[0].pairs.shape[1]:
            self.shared_buffers = self._allocate(batch)
        return [buffers.of_batch(batch) for buffers in self.shared_buffers]

    def _apply(self, fn: Any, recurse: bool = True) -> NoReturn:
        raise RuntimeError(
            "an optimised model cannot be moved or cast: move the DiMR, then optimise it again"
        )


class _Buffers(NamedTuple):
    """Memory for a branch's features between blocks, arranged so that nothing is concatenated.

    A skip connection joins the output of an earlier block to the input of a later one. The two are
    the halves of one tensor. `pairs` `[num_blocks // 2, B, tokens, 2, D]` stores the outputs of all
    blocks except the last. `tokens` `[B, tokens, D]` is the input of a transformer's first block:
    the class token and the positions.
    """

    pairs: Tensor
    tokens: Tensor

    def of_batch(self, batch: int) -> "_Buffers":
        """Return the part of the buffers for a smaller batch."""
        return _Buffers(self.pairs[:, :batch], self.tokens[:batch])

    def slot(self, block: int) -> Tensor | None:
        """Return the memory for the output of a block, None for the last block."""
        depth = len(self.pairs)
        if block == 2 * depth:
            return None
        pair, half = (depth - 1 - block, 1) if block < depth else (block - depth, 0)
        return self.pairs[pair].select(-2, half)


class _Branch(nn.Module):
    """`model.Branch` that keeps its features in `_Buffers`."""

    def __init__(self, branch: Branch, dtype: torch.dtype, fp8: bool) -> None:
        super().__init__()
        self.depth = branch.depth
        self.is_transformer = branch.is_transformer
        self.input_layer = _copy(branch.input_layer, dtype)
        if self.is_transformer:
            self.class_embeds = _copy(branch.class_embeds, dtype)
        if hasattr(branch, "upsample"):
            self.upsample = _copy(branch.upsample, dtype)
        self.blocks = nn.ModuleList(
            _Block(cast(Block, block), dtype, fp8) for block in branch.blocks
        )
        self.skip_denses = nn.ModuleList(
            _Linear.of(cast(Linear, dense), dtype) for dense in branch.skip_denses
        )
        self.output_layer = _copy(branch.output_layer, dtype)

    def allocate(self, batch: int) -> _Buffers:
        positions = self.input_layer.get_parameter("3.position_embeddings.weight")
        count, width = positions.shape
        count += self.is_transformer
        tokens = (batch, count, width) if self.is_transformer else (batch, 0, width)
        pairs = positions.new_empty(self.depth, batch, count, 2, width)
        return _Buffers(pairs, positions.new_empty(tokens))

    def forward(
        self,
        image: Tensor,
        features: Sequence[Tensor] | None,
        y: Tensor,
        td: TDValues,
        buffers: _Buffers,
        predicts: bool,
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Return the prediction, if wanted, and the features `[B, h·w, D]` for the next branch.

        The features are the input embedding and the output of each block.
        """
        x = self.input_layer(image)
        if features:
            x = self.upsample(x, features, td)
        if self.is_transformer:
            buffers.tokens[:, 0] = self.class_embeds(y)
            buffers.tokens[:, 1:] = x
            x = buffers.tokens
        outputs = [x]
        for j, block in enumerate(self.blocks):
            if j > self.depth:
                pair = j - self.depth - 1
                x = self.skip_denses[pair](buffers.pairs[pair].flatten(-2))
            x = block(x, td, buffers.slot(j))
            outputs.append(x)
        if self.is_transformer:
            outputs = [output[:, 1:] for output in outputs]
        return self.output_layer(outputs[-1], td) if predicts else None, outputs


_FACTORS = {
    torch.bfloat16: ops.Factors.BFLOAT16,
    torch.float16: ops.Factors.FLOAT32,
    torch.float32: ops.Factors.FLOAT32,
}
"""The factors of the CPU library's products. It has none in float16, and no processor gains."""


def _uses_cpu_library(model: DiMR, dtype: torch.dtype) -> bool:
    """Return whether the CPU library can run every operator of every branch, and may."""
    for stage in model.stages:
        branch = cast(Branch, stage)
        positions = branch.input_layer.get_parameter("3.position_embeddings.weight")
        count, width = positions.shape
        for module in branch.modules():
            if isinstance(module, Operation):
                shape: tuple[int, ...] = (1, count, width)
                if isinstance(module, Attention):
                    shape = (1, count + 1, 3, module.num_heads, width // module.num_heads)
                x = torch.empty(shape, dtype=dtype, device=positions.device)
                named = module.implementation not in ("auto", "cpu")
                if named or ops.OPERATORS[module.operator].why_not("cpu", x) is not None:
                    return False
    return True


class _Block(nn.Module):
    """`layers.Block` that writes its result to `out`, if given."""

    def __init__(self, block: Block, dtype: torch.dtype, fp8: bool) -> None:
        super().__init__()
        if isinstance(block.block1, Attention):
            self.block1: nn.Module = _attention(block.block1, dtype, fp8)
        else:
            self.block1 = _copy(block.block1, dtype)
        self.block2 = _GatedMLP(block.block2, dtype, fp8)

    def forward(self, x: Tensor, td: TDValues, out: Tensor | None) -> Tensor:
        if isinstance(self.block1, DepthwiseConv2d):
            return self.block2(self.block1(x, td, residual=True), td, None, out)
        return self.block2(self.block1(x, td), td, x, out)


class _GatedMLP(nn.Module):
    """`layers.GatedMLP` with its input projections merged, including the residual add."""

    def __init__(self, mlp: GatedMLP, dtype: torch.dtype, fp8: bool) -> None:
        super().__init__()
        self.implementation = mlp.implementation
        self.gate: Any = ops.gated_gelu
        self.norm: nn.Module = _copy(mlp.norm, dtype)
        if fp8:
            self.implementation = implementation_in_fp8("gated_gelu", mlp.implementation)
            self.gate = ops.gated_gelu_fp8
            self.norm = FP8Norm(self.norm)
        linear = FP8Linear if fp8 else _Linear
        self.w01 = linear(
            torch.cat([mlp.w0.weight, mlp.w1.weight]), torch.cat([mlp.w0.bias, mlp.w1.bias]), dtype
        )
        self.w2 = linear.of(mlp.w2, dtype)

    def forward(
        self, x: Tensor, td: TDValues, residual: Tensor | None, out: Tensor | None
    ) -> Tensor:
        """Return `s + MLP(norm(s))`, where `s = x (+ residual)`; write it to `out`, if given."""
        if out is not None and self._adds_in_place(x):
            norm = cast(TDRMSNorm | RMSNorm, self.norm)
            normed = ops.td_rms_norm_into(out, x, norm.value(td), residual, self.w2.bias)
            # The matrix product adds to `out` in place. A separate add would read two more tensors.
            rows = out.view(-1, out.shape[-1])
            rows.addmm_(self._hidden(normed).flatten(0, 1), self.w2.weight.mT)
            return out
        normed = self.norm(x, td, residual)
        if residual is not None:
            x, normed = normed
        return torch.add(x, self.w2(self._hidden(normed)), out=out)

    def _hidden(self, normed: Tensor) -> Tensor:
        return self.gate(self.w01(normed), implementation=self.implementation)

    def _adds_in_place(self, x: Tensor) -> bool:
        if not isinstance(self.norm, TDRMSNorm | RMSNorm) or self.w2.uses_onednn:
            return False
        operator = ops.OPERATORS[self.norm.operator]
        return operator.select(self.norm.implementation, x) == "triton"


def _attention(attention: Attention, dtype: torch.dtype, fp8: bool) -> "PaddedAttention":
    """Return a copy; on a GPU its heads are padded to multiples of 16 bytes, the widest load."""
    head_dim = attention.dense.weight.shape[1] // attention.num_heads
    multiple = 1
    if attention.dense.weight.device.type == "cuda":
        # In FP8 the width of all heads together must be a multiple of 16.
        multiple = 16 if fp8 and attention.num_heads % 2 else 8
    return PaddedAttention(attention, head_dim + -head_dim % multiple, dtype, fp8)


class PaddedAttention(nn.Module):
    """`layers.Attention` with heads padded by zero weights, which computes the same.

    Wider heads have a smaller scale `head_dim^-½`; the weights of the queries compensate for it
    before they are rounded to `dtype`.
    """

    def __init__(
        self, attention: Attention, head_dim: int, dtype: torch.dtype, fp8: bool = False
    ) -> None:
        super().__init__()
        self.implementation = attention.implementation
        self.num_heads = attention.num_heads
        qkv = attention.query_key_value.weight.unflatten(0, (3, self.num_heads, -1))
        dense = attention.dense.weight.unflatten(1, (self.num_heads, -1))
        narrow = qkv.shape[2]
        if head_dim != narrow:
            scale = qkv.new_tensor([(head_dim / narrow) ** 0.5, 1, 1]).view(3, 1, 1, 1)
            qkv = F.pad(qkv * scale, (0, 0, 0, head_dim - narrow))
            dense = F.pad(dense, (0, head_dim - narrow))
        norm = _copy(attention.norm, dtype)
        self.norm: nn.Module = FP8Norm(norm) if fp8 else norm
        self.query_key_value = (FP8Linear if fp8 else _Linear)(qkv.flatten(0, 2), None, dtype)
        self.dense = _Linear(dense.flatten(1), attention.dense.bias, dtype)

    def forward(self, x: Tensor, td: TDValues) -> Tensor:
        qkv = self.query_key_value(self.norm(x, td))
        return self.dense(ops.attention(qkv, self.num_heads, implementation=self.implementation))


class _Linear(Linear):
    """`layers.Linear` with given weights in `dtype`.

    In bfloat16 on a CPU, `forward` calls oneDNN directly. The weight is stored in oneDNN's layout;
    PyTorch would convert it at every call. The bias is passed to oneDNN; PyTorch would first copy
    it to every row of the result.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        self.weight = nn.Parameter(weight.to(dtype, copy=True), requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias.to(dtype, copy=True), requires_grad=False)
        self._pack()

    def _pack(self) -> None:
        self.uses_onednn = (
            (self.weight.device.type, self.weight.dtype) == ("cpu", torch.bfloat16)
            and torch.backends.mkldnn.is_available()
            and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )
        if self.uses_onednn:
            packed = torch.ops.mkldnn._reorder_linear_weight(self.weight)
            self.weight = nn.Parameter(packed, requires_grad=False)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state with the weight in PyTorch's layout, which can be copied."""
        if not self.uses_onednn:
            return self.__dict__
        weight = nn.Parameter(self.weight.to_dense(), requires_grad=False)
        return {**self.__dict__, "_parameters": {**self._parameters, "weight": weight}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pack()

    @classmethod
    def of(cls, linear: nn.Linear, dtype: torch.dtype) -> Self:
        return cls(linear.weight, linear.bias, dtype)

    def forward(self, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        if self.uses_onednn:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)


def _copy(module: Module, dtype: torch.dtype) -> Module:
    """Return a copy without gradients: projections in `dtype`, parameters of norms in float32.

    A time-dependent parameter keeps only its index; `InferenceDiMR.td_vectors` has its vectors.
    """
    copied = copy.deepcopy(module).requires_grad_(False)
    for part in copied.modules():
        if isinstance(part, TDParameter):
            for name in [name for name, _ in part.named_parameters()]:
                delattr(part, name)
        elif isinstance(part, nn.Linear | nn.Conv2d | nn.Embedding):
            part.to(dtype)
        else:
            for parameter in part.parameters(recurse=False):
                parameter.data = parameter.float()
    return copied


def _no_autocast(device: torch.device) -> Any:
    if ops.autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
