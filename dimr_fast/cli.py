"""The command line, `dimr-fast COMMAND …`. Each command imports its job when it runs."""

import dataclasses
import errno
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO, TypeVar, cast

from dimr_fast.errors import CheckpointError, DataUnavailableError, Interrupted

if TYPE_CHECKING:
    from dimr_fast.training import TrainConfig

T = TypeVar("T")


class Parse(Protocol):
    """Parse the words after a command's name as the dataclass `settings`."""

    def __call__(self, settings: type[T]) -> T: ...


def demo(parse: Parse) -> None:
    """Train on satellite tiles, draw a grid of images and score them."""
    from dimr_fast.demo import DemoConfig
    from dimr_fast.demo import demo as run_demo

    run_demo(parse(DemoConfig))


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """Command-line arguments of `train`."""

    config: str | None = None
    """A YAML file of settings, or a shipped recipe: demo, imagenet64_m3r, imagenet64_l3r,
    imagenet256_xl2r, imagenet256_g2r, imagenet512_xl3r. By default the demo's, or with --resume the
    run's own."""
    set: tuple[str, ...] = ()
    """KEY=VALUE, a setting to change. It can be repeated."""
    output: Path | None = None
    """Output folder of the run."""
    resume: bool = False
    """Continue the run in the output folder."""


def train(parse: Parse) -> None:
    """Train a model; on many GPUs by torchrun or `accelerate launch` with -m dimr_fast.training."""
    import tyro

    from dimr_fast.training import CONFIG, TrainConfig

    given = parse(tyro.conf.UseAppendAction[TrainArguments])
    config = given.config
    if config is None and given.resume and given.output and (given.output / CONFIG).exists():
        config = str(given.output / CONFIG)
    _train(TrainConfig.read(config or "demo", given.set, given.output), given.resume)


def _train(settings: "TrainConfig", resume: bool) -> None:
    """Train and print the summary on rank 0; raise Interrupted where a signal ended the run."""
    from dimr_fast.training import train as run_training

    summary = run_training(settings, resume=resume)
    # The other processes of a launch end well: the launcher would kill rank 0 otherwise.
    if int(os.environ.get("RANK", "0")) == 0:
        print(summary.sentence(settings), flush=True)
        if summary.signal is not None:
            raise Interrupted(summary.signal)


@dataclass(frozen=True, kw_only=True)
class DistillArguments:
    """Command-line arguments of `distill`."""

    checkpoint: Path | None = None
    """The teacher: a training checkpoint, whose EMA weights are used, or the folder of a saved
    model. None is the model that comes with the package. A run that is resumed knows its own."""
    output: Path
    """Output folder of the run."""
    evaluations: int | None = None
    """Network evaluations per image of the distilled model, such as 1, 2 or 4. None: those of the
    recipe distill, 2."""
    guidance: float | None = None
    """Strength of the teacher's guidance: by --guide, or classifier-free without one; the distilled
    model is sampled without. None: that of the recipe distill, 0."""
    guide: Path | None = None
    """Guide the teacher by this worse model (autoguidance), such as an earlier average of its run:
    see dimr-fast export --average-step."""
    set: tuple[str, ...] = ()
    """KEY=VALUE, another setting of training to change: minutes, data, learning_rate … It can be
    repeated."""
    resume: bool = False
    """Continue the run in the output folder."""


def distill(parse: Parse) -> None:
    """Train a copy of a model that draws images in one to four steps; see docs/distillation.md."""
    import tyro

    from dimr_fast.training import distillation_config

    given = parse(tyro.conf.UseAppendAction[DistillArguments])
    words = [
        *given.set,
        *([] if given.evaluations is None else [f"evaluations={given.evaluations}"]),
        *([] if given.guidance is None else [f"teacher_guidance={given.guidance}"]),
    ]
    config = distillation_config(
        given.checkpoint, given.output, words, given.resume, guide=given.guide
    )
    _train(config, given.resume)


def sample(parse: Parse) -> None:
    """Draw images from a checkpoint: grids, folders of PNGs, npz for evaluation."""
    from dimr_fast.sampling import SampleConfig
    from dimr_fast.sampling import sample as run_sampling

    for path in run_sampling(_with_local_model(parse(SampleConfig))):
        print(f"wrote {path}")


def evaluate(parse: Parse) -> None:
    """Score images against real ones."""
    from dimr_fast.evaluation import EvaluateConfig
    from dimr_fast.evaluation import evaluate as run_evaluation

    print(run_evaluation(_with_local_model(parse(EvaluateConfig))))


def _with_local_model(settings: T) -> T:
    """Return settings whose checkpoint is local: a file on the Hub is downloaded and converted."""
    from dimr_fast.hub.download import is_hub_file

    checkpoint = getattr(settings, "checkpoint", None)
    if checkpoint is None or not is_hub_file(checkpoint):
        return settings
    from dimr_fast.convert import model_of_hub_file

    found: Any = settings
    return cast(T, dataclasses.replace(found, checkpoint=model_of_hub_file(checkpoint)))


def export(parse: Parse) -> None:
    """Write a trained model as a folder to share: weights, configuration and model card."""
    from dimr_fast.export import ExportConfig
    from dimr_fast.export import export as run_export

    print(f"wrote {run_export(parse(ExportConfig))}; read its README.md before you share it")


def convert(parse: Parse) -> None:
    """Convert a published .pth to safetensors or a folder, or back, and verify the result."""
    from dimr_fast.convert import ConvertConfig
    from dimr_fast.convert import convert as run_conversion

    print(run_conversion(parse(ConvertConfig)))


def extract(parse: Parse) -> None:
    """Encode a folder of images as latents; the same command again resumes or repairs."""
    from dimr_fast.extraction import ExtractConfig
    from dimr_fast.extraction import extract as run_extraction

    print(run_extraction(parse(ExtractConfig)).sentence())


def web(parse: Parse) -> None:
    """Serve a page in the browser that draws images and shows training runs."""
    from dimr_fast.web import WebConfig
    from dimr_fast.web import web as run_server

    run_server(_with_local_model(parse(WebConfig)))


@dataclass(frozen=True)
class NoArguments:
    """No settings."""


def info(parse: Parse) -> None:
    """Report what is installed and which implementation of each operator would run here."""
    parse(NoArguments)
    from dimr_fast.info import main as run_info

    run_info()


COMMANDS: dict[str, Callable[[Parse], None]] = {
    command.__name__: command
    for command in (demo, extract, train, distill, sample, evaluate, export, convert, web, info)
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    It is 2 for an error that the user can correct, and 128 + N after signal N: 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    with _robust_streams():
        try:
            with _signals_raise():
                return _run_words(words)
        except (ValueError, OSError, CheckpointError, DataUnavailableError) as error:
            # Libraries colour some of their errors.
            text = re.sub(r"\x1b\[[0-9;]*m", "", " ".join(str(error).split()))
            print(f"dimr-fast: error: {text}", file=sys.stderr)
            return 2
        except KeyboardInterrupt as error:
            print("dimr-fast: interrupted", file=sys.stderr)
            return 128 + (error.signal if isinstance(error, Interrupted) else signal.SIGINT)
        except FloatingPointError as error:
            print(f"dimr-fast: stopped: {error}", file=sys.stderr)
            return 1


def _run_words(words: list[str]) -> int:
    """Run the command that the words name and return its exit status."""
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return 0 if words else 2
    if words[0] not in COMMANDS:
        raise ValueError(
            f"command: got {words[0]!r}, expected one of {', '.join(COMMANDS)}; "
            "see dimr-fast --help"
        )
    _run(words[0], words[1:])
    sys.stdout.flush()
    return 0


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Raise Interrupted at SIGINT, SIGTERM and SIGHUP, so that unfinished files are removed."""
    received = []

    def receive(number: int, frame: object) -> None:
        received.append(number)
        raise Interrupted(number)

    previous = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
            # nohup ignores SIGHUP, a shell's background job SIGINT.
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                previous[number] = signal.signal(number, receive)
    try:
        yield
    except Exception as error:
        # C code may replace the exception of a handler by one of its own.
        if received:
            raise Interrupted(received[0]) from error
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Output:
    """A standard stream whose errors do not end a job: what cannot be written is lost.

    `ignored` are the numbers of these errors; None means all.
    """

    def __init__(self, stream: TextIO, ignored: tuple[int, ...] | None) -> None:
        self._stream, self._ignored = stream, ignored

    def write(self, text: str) -> int:
        self._ignore_errors(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._ignore_errors(self._stream.flush)

    def _ignore_errors(self, call: Callable[..., object], *arguments: str) -> None:
        try:
            call(*arguments)
        except OSError as error:
            if self._ignored is not None and error.errno not in self._ignored:
                raise
            # What is still in the buffer would fail again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _robust_streams() -> Iterator[None]:
    """Let no job end because of the standard streams.

    Nobody may read them any more, they may be closed, or show no Unicode. Only results that cannot
    be written to standard output for another reason, such as a full disk, are an error.
    """
    names = {"stdin": None, "stdout": (errno.EPIPE, errno.EIO), "stderr": None}
    before = {name: getattr(sys, name) for name in names}
    for name, ignored in names.items():
        if before[name] is None:
            # It takes the stream's number, which a file of the job would get otherwise.
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
        stream = getattr(sys, name)
        if name != "stdin":
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, _Output(stream, ignored))
    try:
        yield
    finally:
        try:
            sys.stdout.flush()
        finally:
            for name, stream in before.items():
                setattr(sys, name, stream)


def main_of_process(arguments: Sequence[str] | None = None) -> int:
    """Run `main` as the entry point of a process; after success, destroy its process group."""
    status = main(arguments)
    distributed = sys.modules.get("torch.distributed")
    if status == 0 and distributed is not None and distributed.is_initialized():
        # NCCL warns at exit otherwise. After an error the other processes might not come here.
        distributed.destroy_process_group()
    return status


def _run(name: str, words: list[str]) -> None:
    """Run the command `name` with the words after it."""
    import tyro

    command = COMMANDS[name]

    def parse(settings: type[T]) -> T:
        found = tyro.cli(
            tyro.conf.configure(tyro.conf.OmitArgPrefixes)(settings),
            prog=f"dimr-fast {name}",
            description=command.__doc__,
            args=words,
        )
        return _expand_user(found)

    command(parse)


def _expand_user(value: T) -> T:
    """Return settings with the home folder for the `~` of paths, which shells leave in
    --output=~/runs."""
    found: Any = value
    if isinstance(value, Path):
        found = Path(os.path.expanduser(value))
    elif isinstance(value, tuple):
        found = tuple(map(_expand_user, value))
    elif dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        changes = {name: _expand_user(getattr(value, name)) for name in names}
        found = dataclasses.replace(found, **changes)
    return found


def _help() -> str:
    """Return the list of commands."""
    lines = [f"  {name:<9} {command.__doc__}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: dimr-fast COMMAND …",
            "",
            "Train, sample and evaluate DiMR, a multi-resolution diffusion model.",
            "",
            "commands:",
            *lines,
            "",
            "dimr-fast COMMAND --help lists the settings of a command.",
        ]
    )
