"""Compare the error of an optimised model at full depth with that of the reference.

    python -m benchmarks.model.accuracy [--preset DiMR-XL/2R] [--dtype bfloat16] [--out FILE]

Errors are root mean squares relative to the reference in float64, one for each branch. The
optimised model may err at most twice as much as the reference under autocast in the same dtype.
The tests do the same with fewer blocks.
"""

import argparse
from pathlib import Path

import torch

from benchmarks.utils import machine
from benchmarks.utils.files import RESULTS
from dimr_fast import PRESETS, DiMR, optimize_for_inference, reference
from dimr_fast.utils.files import write_json


def randomised(model: DiMR) -> DiMR:
    """Add noise to every parameter, so that none stays zero; return the model."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def errors(name: str, dtype: torch.dtype) -> tuple[list[float], list[float]]:
    """Return the errors of the optimised model and of the reference, one for each branch."""
    model = randomised(DiMR.from_preset(name))
    config = model.config
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, config.channels, *config.image_size, generator=generator)
    log_snr, y = torch.tensor([1.0]), torch.tensor([3])
    ours = optimize_for_inference(model, dtype)(x, log_snr=log_snr, y=y)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        theirs = reference.dimr(config, model.state_dict(), x, log_snr, y)
    wide = model.double().state_dict()
    exact = reference.dimr(config, wide, x.double(), log_snr.double(), y)

    def relative(outputs: list[torch.Tensor]) -> list[float]:
        pairs = zip(outputs, exact, strict=True)
        return [float((output - truth).norm() / truth.norm()) for output, truth in pairs]

    return relative(ours), relative(theirs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="DiMR-XL/2R", choices=PRESETS)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--out", type=Path, default=RESULTS / "accuracy.json")
    arguments = parser.parse_args()
    ours, theirs = errors(arguments.preset, getattr(torch, arguments.dtype))
    result = machine.description() | {
        "preset": arguments.preset,
        "dtype": arguments.dtype,
        "optimised": ours,
        "reference_under_autocast": theirs,
        "within_twice": all(our <= 2 * their for our, their in zip(ours, theirs, strict=True)),
    }
    write_json(arguments.out, result)
    print(result)
    if not result["within_twice"]:
        raise SystemExit("the optimised model errs more than twice as much as the reference")


if __name__ == "__main__":
    main()
