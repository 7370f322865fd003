"""`dimr-fast …`: a thin shell over the jobs."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from dimr_fast.checkpoint import CheckpointError
from dimr_fast.convert import ConvertConfig
from dimr_fast.convert import convert as convert_job
from dimr_fast.data import DataUnavailableError
from dimr_fast.demo import DemoConfig
from dimr_fast.demo import demo as demo_job
from dimr_fast.evaluation import EvaluateConfig
from dimr_fast.evaluation import evaluate as evaluate_job
from dimr_fast.export import ExportConfig
from dimr_fast.export import export as export_job
from dimr_fast.extraction import ExtractConfig
from dimr_fast.extraction import extract as extract_job
from dimr_fast.info import main as info_job
from dimr_fast.sampling import SampleConfig
from dimr_fast.sampling import sample as sample_job
from dimr_fast.train_config import TrainConfig
from dimr_fast.training import CONFIG
from dimr_fast.training import train as train_job


def demo(config: Annotated[DemoConfig, tyro.conf.OmitArgPrefixes]) -> None:
    """Train on satellite tiles, draw a grid of images and score them."""
    demo_job(config)


def train(
    config: str | None = None,
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    output: Path | None = None,
    resume: bool = False,
) -> None:
    """Train a model; by torchrun or `accelerate launch` with -m dimr_fast.training, on many GPUs.

    Args:
        config: a YAML file of settings, or a shipped recipe: demo, imagenet256_xl2r,
            imagenet256_g2r, imagenet512_xl3r. Without one the demo's, or with --resume the run's.
        set: KEY=VALUE, a setting to change, as often as needed.
        output: folder of the run.
        resume: go on with the run in the output folder.
    """
    if config is None and resume and output is not None and (output / CONFIG).exists():
        config = str(output / CONFIG)
    settings = TrainConfig.read(config or "demo", set, output)
    summary = train_job(settings, resume=resume)
    if int(os.environ.get("RANK", "0")) == 0:
        print(summary.sentence(settings))


def sample(config: Annotated[SampleConfig, tyro.conf.OmitArgPrefixes]) -> None:
    """Draw images from a checkpoint: grids, folders of PNGs, npz for evaluation."""
    for path in sample_job(config):
        print(f"wrote {path}")


def evaluate(config: Annotated[EvaluateConfig, tyro.conf.OmitArgPrefixes]) -> None:
    """Score images against real ones."""
    print(evaluate_job(config))


def export(config: Annotated[ExportConfig, tyro.conf.OmitArgPrefixes]) -> None:
    """Write a trained model as a folder to share: weights, configuration and model card."""
    print(f"wrote {export_job(config)}; read its README.md before you share it")


def convert(config: Annotated[ConvertConfig, tyro.conf.OmitArgPrefixes]) -> None:
    """Turn a published .pth into safetensors or a folder, or back, and verify what was written."""
    print(convert_job(config))


def extract(config: Annotated[ExtractConfig, tyro.conf.OmitArgPrefixes]) -> None:
    """Turn a folder of images into latents; the same command again goes on or repairs."""
    print(extract_job(config).sentence())


def info() -> None:
    """Say what is installed and which implementation of each operator would run here."""
    info_job()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 2 where the user has to put something right."""
    commands: dict[str, Callable[..., None]] = {
        "demo": demo,
        "extract": extract,
        "train": train,
        "sample": sample,
        "evaluate": evaluate,
        "export": export,
        "convert": convert,
        "info": info,
    }
    try:
        tyro.extras.subcommand_cli_from_dict(
            commands, prog="dimr-fast", description=__doc__, args=arguments
        )
    except BrokenPipeError:
        # Whoever read the output has seen enough; nothing more can be printed, at exit neither.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, CheckpointError, DataUnavailableError) as error:
        print(f"dimr-fast: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dimr-fast: interrupted", file=sys.stderr)
        return 130
    except FloatingPointError as error:
        print(f"dimr-fast: stopped: {error}", file=sys.stderr)
        return 1
    return 0
