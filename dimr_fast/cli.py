"""`dimr-fast …`: a thin shell over the jobs."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from dimr_fast.checkpoint import CheckpointError
from dimr_fast.data import DataUnavailableError
from dimr_fast.demo import DemoConfig
from dimr_fast.demo import demo as demo_job
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
    """Draw a grid of images from a checkpoint."""
    print(f"wrote {sample_job(config)}")


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
        "train": train,
        "sample": sample,
        "extract": extract,
        "info": info,
    }
    try:
        tyro.extras.subcommand_cli_from_dict(
            commands, prog="dimr-fast", description=__doc__, args=arguments
        )
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
