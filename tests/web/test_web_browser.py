"""The page in headless Chromium: load, draw, change a setting, compare, errors, a narrow screen."""

import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dimr_fast import cli
from dimr_fast.checkpoint import TrainedModel, save_model
from tests.support.models import trained_model, write_checkpoint
from tests.support.training import small_run, train_on_plain_images
from tests.support.web_server import served

pytest.importorskip("gradio", reason="needs the gradio package")
playwright = pytest.importorskip("playwright.sync_api", reason="needs the playwright package")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs the program chromium"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as player:
        browser = player.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser") / "run"
    train_on_plain_images(small_run(folder, log_steps=1, sample_steps=4))
    return folder


@pytest.fixture(scope="module")
def address(run: Path) -> Iterator[str]:
    """Return the address of a page that draws with a tiny model and shows a run."""
    checkpoint = write_checkpoint(trained_model(), run.parent / "tiny.safetensors")
    words = ["--checkpoint", str(checkpoint), "--run", str(run), "--precision", "fp32"]
    with served(words, run.parent) as url:
        yield url


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """Return the page in a new window; it must ask no other server and raise no error."""
    yield from opened(browser, address)


def opened(browser: Any, address: str) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(60_000)
    own = (address, "data:", "blob:")
    others, errors = [], []
    page.on("request", lambda r: None if r.url.startswith(own) else others.append(r.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    page.get_by_role("heading").first.wait_for()
    yield page
    context.close()
    assert (others, errors) == ([], [])


def draw(page: Any, *results: str) -> None:
    """Press the button and wait until every result states its speed."""
    page.get_by_role("button", name="Draw", exact=True).click()
    for result in results or ("result",):
        page.locator(f"#{result} .pending, #{result} .generating").first.wait_for(state="detached")
        page.locator(f"#{result}").get_by_text("images a second").wait_for()


def enter(page: Any, label: str, value: object) -> None:
    box = page.get_by_label(label, exact=False).and_(page.locator("input[type=number]")).first
    box.fill(str(value))
    box.press("Tab")


def download(page: Any, what: str, folder: Path, result: str = "result") -> Path:
    with page.expect_download() as started:
        page.locator(f"#{result}").get_by_role("link", name=f"Download {what}").or_(
            page.locator(f"#{result}").get_by_role("button", name=f"Download {what}")
        ).first.click()
    path = folder / f"{result}-{started.value.suggested_filename}"
    started.value.save_as(path)
    return path


def images_of(path: Path) -> np.ndarray:
    with np.load(path) as file:
        return file["arr_0"]


def test_draw_change_a_setting_and_repeat_it_by_the_command(
    page: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(page)
    first = images_of(download(page, "npz", tmp_path))
    assert first.shape == (24, 16, 16, 3)
    with Image.open(download(page, "PNG", tmp_path)) as picture:
        assert picture.height == 6 * (4 * 16 + 2)
        shown = page.locator("#result img").first
        assert shown.evaluate("image => image.naturalHeight") == picture.height
    enter(page, "Network evaluations", 3)
    enter(page, "Seed", 7)
    draw(page)
    command = page.locator("#result .cm-content")
    playwright.expect(command).to_contain_text("--seed 7")
    changed = images_of(download(page, "npz", tmp_path))
    assert not np.array_equal(changed, first)
    program, *words = shlex.split(" ".join(command.inner_text().split()))
    monkeypatch.chdir(tmp_path)
    assert (program, cli.main(words)) == ("dimr-fast", 0)
    assert np.array_equal(images_of(tmp_path / "samples" / "samples.npz"), changed)


def test_two_settings_start_from_the_same_noise(page: Any, tmp_path: Path) -> None:
    assert page.locator("#other-result").is_hidden()
    page.get_by_label("Compare with other settings").check()
    draw(page, "result", "other-result")
    same = [images_of(download(page, "npz", tmp_path, n)) for n in ("result", "other-result")]
    assert np.array_equal(*same)
    second = page.get_by_label("Network evaluations").and_(page.locator("input[type=number]")).last
    second.fill("2")
    second.press("Tab")
    draw(page, "result", "other-result")
    playwright.expect(page.locator("#other-result .cm-content")).to_contain_text("--steps 2")
    playwright.expect(page.locator("#result .cm-content")).to_contain_text("--steps 8")


def test_an_entry_out_of_range_is_explained_and_the_page_goes_on(page: Any) -> None:
    enter(page, "Seed", -5)
    page.get_by_role("button", name="Draw", exact=True).click()
    page.get_by_text("seed: got -5, expected a whole number from 0 to").wait_for()
    enter(page, "Seed", 5)
    draw(page)


def test_a_long_drawing_shows_how_it_forms_and_can_be_stopped(page: Any) -> None:
    enter(page, "Network evaluations", 250)
    enter(page, "Images", 64)
    page.get_by_role("button", name="Draw", exact=True).click()
    page.get_by_text("of 250: the predicted images").first.wait_for()
    assert page.locator("#result img").count() == 1
    page.get_by_role("button", name="Stop", exact=True).click()
    enter(page, "Network evaluations", 2)
    command = page.locator("#result .cm-content")
    for _ in range(30):  # the page ignores the button until the drawing has ended
        page.get_by_role("button", name="Draw", exact=True).click()
        page.wait_for_timeout(2000)
        if "--steps 2" in command.inner_text():
            break
    playwright.expect(command).to_contain_text("--steps 2")


def test_a_narrow_screen_needs_no_sideways_scrolling(page: Any) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    draw(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    box = page.locator("#result img").first.bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 360


def test_the_run_is_shown_as_it_goes(page: Any, run: Path) -> None:
    page.get_by_role("tab", name="Training run").click()
    playwright.expect(page.locator("#summary")).to_contain_text("Step 8 · loss")
    page.get_by_text("step 4", exact=True).first.wait_for()
    page.locator("canvas, svg.marks").first.wait_for()
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 9, "loss": 0.125}\n{"step": 9, "frechet_distance": 77.5}\n')
    playwright.expect(page.locator("#summary")).to_contain_text(
        "Step 9 · loss 0.1250", timeout=30_000
    )
    playwright.expect(page.locator("#summary")).to_contain_text("Fréchet distance 77.5")


def test_a_distilled_model_has_no_settings(browser: Any, tmp_path: Path) -> None:
    tiny = trained_model()
    student = TrainedModel(tiny.model, tiny.classes, tiny.scale, evaluations=2)
    save_model(student, tmp_path / "student")
    with served(["--checkpoint", str(tmp_path / "student")], tmp_path) as url:
        for page in opened(browser, url):
            page.get_by_text("distilled: 2 evaluations, without guidance").wait_for()
            assert page.get_by_label("Solver").count() == 0
            draw(page)
            playwright.expect(page.locator("#result .cm-content")).to_contain_text("--steps 2")
