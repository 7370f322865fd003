"""The page in the browser, made with Gradio: `dimr-fast web`."""

import os
import secrets
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from dimr_fast.diffusion import SolverName
from dimr_fast.hub.space import require_gradio
from dimr_fast.sampling.job import OUTPUTS, SampleConfig
from dimr_fast.sampling.sampler import SamplingPrecision
from dimr_fast.sampling.writers import write_array, write_npz
from dimr_fast.utils.plots import image_grid
from dimr_fast.utils.validation import require_fields
from dimr_fast.web.drawing import (
    COUNT,
    GUIDANCE,
    SEED,
    STEPS,
    Drawing,
    Preview,
    Studio,
    sample_command,
)
from dimr_fast.web.guard import Guard
from dimr_fast.web.runs import CURVES, check_run, curve_limits, grid_pictures, read_run

ADDRESS = "127.0.0.1"
WAITING = 200
"""Maximum number of requests that wait; further ones are refused."""
KEPT_SECONDS = 3600
"""Pictures and files of the page are deleted after this time."""
SERVED = "served"
"""Folder of the copies that Gradio makes and serves; others are deleted at once."""
REFRESH_SECONDS = 5
DEFAULT_COUNT = 24
CSS = """
.gradio-container { width: 100% !important; max-width: 1200px !important; margin: auto !important; }
.gradio-container main { width: 100% !important; }
.command code, .command .cm-content { white-space: pre-wrap !important; }
footer { display: none !important; }
"""
SHOW_RESULT = """(...entries) => {
    if (window.innerWidth < 768) document.getElementById("result").scrollIntoView();
    return entries;
}"""
"""On a narrow screen the result is below the settings."""


@dataclass(frozen=True, kw_only=True)
class WebConfig:
    """Settings of the page."""

    checkpoint: Path | None = None
    """A training checkpoint, whose EMA weights are used, or the folder of a saved model. None or
    `demo` is the model that comes with the package, `demo-distilled` its distilled form. On the
    command line also OWNER/REPOSITORY:FILE, a file on the Hugging Face Hub, which is downloaded and
    converted."""
    run: Path | None = None
    """Folder of a training run to show while it is trained. Without a checkpoint the page shows
    only the run."""
    port: int = 7860
    """Port on 127.0.0.1. 0 takes a free one."""
    autoencoder: str | None = None
    """Folder or name of the AutoencoderKL that decodes the latents of a latent model."""
    device: str = "auto"
    precision: SamplingPrecision = "auto"
    """Precision of the model: see `dimr-fast sample --help`."""

    def validate(self) -> None:
        """Raise ValueError naming a setting that is out of range."""
        names = get_args(SamplingPrecision)
        require_fields(
            self,
            port=(0 <= self.port < 2**16, "0..65535"),
            precision=(self.precision in names, f"one of {', '.join(names)}"),
        )
        if self.run is not None:
            check_run(self.run)


def web(config: WebConfig, *, address: str = ADDRESS) -> None:
    """Serve the page until a signal ends the process; print where it is.

    Raises, before it is served, ValueError for an unusable setting, CheckpointError for an unusable
    checkpoint, DataUnavailableError where Gradio is missing, and OSError where the port is taken.
    """
    config.validate()
    require_gradio()
    port = _free_port(address, config.port)
    with tempfile.TemporaryDirectory(prefix="dimr-fast-web-") as name:
        page = _build_page(config, Path(name))
        try:
            page.launch(server_name=address, server_port=port, **_launch_settings(Path(name)))
            print(f"the page is at http://{address}:{port} (Ctrl-C ends it)", flush=True)
            threading.Event().wait()
        finally:
            page.close(verbose=False)


def _build_page(config: WebConfig, folder: Path) -> Any:
    """Return the page as `gradio.Blocks`; its pictures and files are kept in `folder`."""
    # Read when Gradio is imported or makes a page.
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(folder / SERVED)}
    import gradio as gr

    studio = None
    if config.checkpoint is not None or config.run is None:
        studio = Studio(config.checkpoint, config.autoencoder, config.device, config.precision)
    with gr.Blocks(
        title="dimr_fast", analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)
    ) as page:
        if studio is not None and config.run is not None:
            with gr.Tab("Draw"):
                _add_drawing(studio, folder)
            with gr.Tab("Training run"):
                _add_run(config.run, page)
        elif studio is not None:
            _add_drawing(studio, folder)
        elif config.run is not None:
            _add_run(config.run, page)
    page.queue(max_size=WAITING, default_concurrency_limit=1, api_open=False)
    return page


def _launch_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of `Blocks.launch`: nothing is shared, fetched or uploaded."""
    import gradio as gr
    from starlette.middleware import Middleware

    return {
        "app_kwargs": {"middleware": [Middleware(Guard, folder=folder / SERVED)]},
        "prevent_thread_lock": True,
        "share": False,
        "ssr_mode": False,
        "quiet": True,
        "footer_links": [],
        "run_history": False,
        # Fonts of the system: others would be fetched.
        "theme": gr.themes.Default(
            font=["system-ui", "sans-serif"], font_mono=["monospace"], primary_hue="blue"
        ),
        "css": CSS,
    }


def _free_port(address: str, port: int) -> int:
    """Return the port, or a free one for 0; raise OSError where it cannot be used."""
    with socket.socket() as found:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((address, port))
        except OSError as error:
            raise OSError(f"port: got {port}, which cannot be used ({error.strerror})") from error
        return int(found.getsockname()[1])


def _add_drawing(studio: Studio, folder: Path) -> None:
    """Add the part of the page that draws."""
    import gradio as gr

    gr.Markdown(_title(studio))
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            classes = gr.Dropdown(
                list(studio.class_names),
                value=[],
                multiselect=True,
                label="Classes",
                info="All classes if none is chosen",
                visible=len(studio.class_names) > 1,
            )
            count = gr.Slider(*COUNT, value=DEFAULT_COUNT, step=1, label="Images")
            seed = gr.Number(0, precision=0, label="Seed of the start noise")
            new_seed = gr.Button("New seed", size="sm")
            with gr.Row():
                start = gr.Button("Draw", variant="primary", scale=2, min_width=120)
                stop = gr.Button("Stop", scale=1, min_width=80)
            first = _add_settings(studio, "Settings")
            compare = gr.Checkbox(
                False, label="Compare with other settings", visible=not studio.fixed
            )
            with gr.Column(visible=False) as others:
                second = _add_settings(studio, "Other settings, the same start noise")
        with gr.Column(scale=2, min_width=320), gr.Row():
            results = [_add_result("result"), _add_result("other-result")]
    compare.change(
        lambda on: [gr.Column(visible=on), gr.Column(visible=on)],
        compare,
        [others, results[1].column],
        api_visibility="private",
    )
    new_seed.click(
        lambda: secrets.randbelow(SEED[1] + 1), None, seed, queue=False, api_visibility="private"
    )

    def draw(
        classes: object, count: object, seed: object, compare: object, *settings: object
    ) -> Iterator[dict[Any, Any]]:
        with _refused_in_words():
            both = settings[: len(first)], settings[len(first) :]
            jobs = [studio.job(classes, count, seed, *own) for own in both[: 1 + bool(compare)]]
            with tempfile.TemporaryDirectory(dir=folder) as name:
                # What is shown already is sent again: a download button would lose its file.
                shown: dict[Any, Any] = {}
                for number, (job, result) in enumerate(zip(jobs, results, strict=False)):
                    files = Path(name, str(number))
                    files.mkdir()
                    with closing(studio.draw(job)) as updates:
                        for update in updates:
                            shown |= _shown(studio, job, update, result, files)
                            yield shown

    event = start.click(
        draw,
        [classes, count, seed, compare, *first, *second],
        [part for result in results for part in result.parts],
        api_name="draw",
        js=SHOW_RESULT,
        show_progress_on=[result.facts for result in results],
        concurrency_limit=1,
    )
    stop.click(None, None, None, cancels=[event], api_visibility="private")


@dataclass(frozen=True)
class _Result:
    """Components that show what was drawn."""

    column: Any
    picture: Any
    facts: Any
    command: Any
    png: Any
    npz: Any

    @property
    def parts(self) -> list[Any]:
        return [self.picture, self.facts, self.command, self.png, self.npz]


def _add_result(name: str) -> _Result:
    import gradio as gr

    with gr.Column(visible=name == "result", min_width=300, elem_id=name) as column:
        picture = gr.Image(
            show_label=False,
            format="png",
            buttons=["fullscreen"],
        )
        facts = gr.Markdown("Nothing is drawn yet.", min_height=48)
        command = gr.Code(
            "# appears when the images are finished",
            label="The command that draws the same images",
            interactive=False,
            wrap_lines=True,
            show_line_numbers=False,
            lines=1,
            elem_classes="command",
        )
        with gr.Row():
            png = gr.DownloadButton("Download PNG", size="sm")
            npz = gr.DownloadButton("Download npz", size="sm")
    return _Result(column, picture, facts, command, png, npz)


def _add_settings(studio: Studio, title: str) -> list[Any]:
    """Add solver, steps, guidance and its interval; return the components.

    For a distilled model they are hidden.
    """
    import gradio as gr

    defaults = studio.defaults
    with gr.Group(visible=not studio.fixed):
        gr.Markdown(f"**{title}**", padding=True)
        solver = gr.Dropdown(list(get_args(SolverName)), value=defaults.solver, label="Solver")
        steps = gr.Slider(*STEPS, value=defaults.steps, step=1, label="Network evaluations")
        guidance = gr.Slider(
            *GUIDANCE,
            value=defaults.guidance,
            step=0.1,
            label="Guidance",
            info="0: none, −1: images without class",
        )
        with gr.Row():
            low = gr.Number(0, label="Guided from time", info="0: image", min_width=100)
            high = gr.Number(1, label="to time", info="1: noise", min_width=100)
    return [solver, steps, guidance, low, high]


def _title(studio: Studio) -> str:
    model, (height, width) = studio.trained.model, studio.size
    facts = [
        f"{sum(p.numel() for p in model.parameters()):,} parameters",
        f"{height}×{width} pixels",
        f"{len(studio.trained.classes)} classes",
    ]
    if studio.fixed:
        number = studio.trained.evaluations
        words = "evaluation" if number == 1 else "evaluations"
        facts.append(f"distilled: {number} {words}, without guidance")
    return f"# Draw with DiMR\n{' · '.join(facts)}"


def _shown(
    studio: Studio, job: SampleConfig, update: Preview | Drawing, result: _Result, folder: Path
) -> dict[Any, Any]:
    """Return new values of the components of a result; files are written to `folder`."""
    picture = folder / OUTPUTS["grid"]
    grid, names = studio.arrange(update.images, update.labels)
    image_grid(grid, names, picture, scale=max(1, min(4, 128 // grid.shape[-1])))
    if isinstance(update, Preview):
        facts = f"Evaluation {update.evaluation} of {update.evaluations}: the predicted images"
        return {result.picture: str(picture), result.facts: facts}
    images, samples = folder / "images.npy", folder / OUTPUTS["npz"]
    write_array(update.images.numpy(), images)
    write_npz([images], update.labels.numpy(), samples)
    return {
        result.picture: str(picture),
        result.facts: _facts(studio, update),
        result.command: sample_command(job),
        result.png: str(picture),
        result.npz: str(samples),
    }


def _facts(studio: Studio, drawing: Drawing) -> str:
    count = len(drawing.images)
    return (
        f"**{count / drawing.seconds:,.1f} images a second**: {count} images in "
        f"{drawing.seconds:.2f} s by {studio.implementation}"
    )


@contextmanager
def _refused_in_words() -> Iterator[None]:
    """Show the errors that a user can correct on the page, and those of the device."""
    import gradio as gr

    try:
        yield
    except (ValueError, FloatingPointError, RuntimeError) as error:
        raise gr.Error(str(error), print_exception=False) from error


def _add_run(folder: Path, page: Any) -> None:
    """Add the part of the page that shows a training run and reads it again every few seconds."""
    import gradio as gr
    import pandas

    gr.Markdown(f"# Training run {folder.absolute().name}")
    summary = gr.Markdown(elem_id="summary")
    with gr.Row():
        plots = [
            gr.LinePlot(x="step", y=name, title=title, y_title=" ", min_width=300, height=260)
            for name, title in CURVES.items()
        ]
    grids = gr.Gallery(
        label="Grids, the newest first", columns=2, object_fit="contain", visible=False
    )
    shown = gr.State()

    def refresh(before: object) -> list[Any]:
        run = read_run(folder)
        values = [
            gr.LinePlot(
                value=pandas.DataFrame({"step": steps, name: values}),
                visible=len(steps) > 0,
                y_lim=curve_limits(values),
            )
            for name, (steps, values) in run.curves.items()
        ]
        names = [path.name for path in run.grids]
        pictures: Any = gr.skip()
        if names != before:
            pictures = gr.Gallery(value=grid_pictures(run.grids), visible=len(names) > 0)
        return [run.summary, *values, pictures, names]

    outputs = [summary, *plots, grids, shown]
    for event in (page.load, gr.Timer(REFRESH_SECONDS).tick):
        event(
            refresh,
            shown,
            outputs,
            show_progress="hidden",
            concurrency_limit=4,
            api_visibility="private",
        )
