"""Names that benchmarks write into results files and that reports look for."""

PUBLISHED = "published"
"""Provider: the published execution, under autocast, with gradient checkpointing."""
PUBLISHED_NO_CHECKPOINTING = "published, no checkpointing"
PUBLISHED_COMPILED = "published, compiled"
"""Provider: `torch.compile` of the published execution without checkpointing."""
REFERENCE_COMPILED = "reference, compiled"
"""Provider: `torch.compile` of dimr_fast's plain PyTorch model."""
OURS = "ours"
OURS_INT8 = "ours, int8"
"""Provider: `optimize_for_inference(quantize="int8")`."""
OURS_FP8 = "ours, fp8"
"""Provider: `optimize_for_inference(quantize="fp8")`."""
TORCHAO_FP8 = "torchao fp8, compiled"
"""Provider: `torch.compile` of the published execution whose linear layers torchao quantised."""
PROVIDERS = (PUBLISHED, PUBLISHED_NO_CHECKPOINTING, PUBLISHED_COMPILED, REFERENCE_COMPILED, OURS)
FP8_PROVIDERS = (OURS_FP8, TORCHAO_FP8)

FORWARD, TRAINING = "forward", "training step"
"""Passes of the whole model."""
FORWARD_AND_BACKWARD, BACKWARD = "forward + backward", "backward"
"""Further passes of an operator."""
FP32, BF16 = "float32", "bfloat16"

OUT_OF_MEMORY = "out of memory"
"""Start of the reason why a row that does not fit the GPU is skipped: a result, not a failure."""
