"""The page's server, asked by programs: many requests at once, bad ones, other files."""

import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dimr_fast.checkpoint import load_model
from dimr_fast.sampling import SamplerConfig, balanced_labels, sample_images
from tests.support.models import trained_model, write_checkpoint
from tests.support.web_server import draw, request, served

pytest.importorskip("gradio", reason="needs the gradio package")
pytestmark = pytest.mark.slow

SETTINGS = ["dpm++2m", 2, 0, 0, 1]


def entries(seed: int, count: int = 2) -> list[Any]:
    """Return what the page sends: classes, count, seed, no comparison, settings twice."""
    return [[], count, seed, False, *SETTINGS, *SETTINGS]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Return the address of a server of a tiny model, and its folder."""
    folder = tmp_path_factory.mktemp("server")
    checkpoint = write_checkpoint(trained_model(), folder / "checkpoint.safetensors")
    with served(["--checkpoint", str(checkpoint), "--precision", "fp32"], folder) as url:
        yield url, folder


def images_of(url: str, data: Any) -> np.ndarray:
    """Download the npz file of an answer and return its images."""
    status, content = request(f"{url}/gradio_api/file={data[4]['path']}")
    assert status == 200
    with np.load(io.BytesIO(content)) as file:
        return file["arr_0"]


def test_a_hundred_requests_at_once_are_all_answered(server: tuple[str, Path]) -> None:
    url, folder = server
    with ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(lambda seed: draw(url, entries(seed)), range(100)))
    assert [event for event, _ in answers] == ["complete"] * 100
    trained = load_model(folder / "checkpoint.safetensors")
    for seed in (0, 57, 99):
        settings = SamplerConfig(solver="dpm++2m", steps=2, guidance=0, seed=seed, precision="fp32")
        direct = sample_images(trained, balanced_labels(2, 6), settings)
        assert np.array_equal(images_of(url, answers[seed][1]), direct.permute(0, 2, 3, 1))


@pytest.mark.parametrize(
    "bad",
    [
        [["desert"], *entries(0)[1:]],
        [[], 65, *entries(0)[2:]],
        [[], 2, None, *entries(0)[3:]],
        [[], 2, -1, *entries(0)[3:]],
        [[], 2, 0, False, "rk4", *SETTINGS[1:], *SETTINGS],
        [[], 2, 0, False, "ddim", 10**9, 0, 0, 1, *SETTINGS],
        [[], 2, 0, True, *SETTINGS, "ddim", 2, 0, 0.9, 0.1],
        [],
        [None] * 14,
        "text",
    ],
    ids=str,
)
def test_bad_entries_are_refused_and_the_server_stays_up(
    server: tuple[str, Path], bad: Any
) -> None:
    url, _ = server
    event, _ = draw(url, bad)
    assert event == "error"
    assert draw(url, entries(1))[0] == "complete"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/gradio_api/call/draw", b"{"),
        ("/gradio_api/call/draw", b""),
        ("/gradio_api/call/draw", b'{"data": [' + b"1," * 10**6 + b"1]}"),
        ("/gradio_api/queue/join", b'{"data": [], "fn_index": 999, "session_hash": "x"}'),
        ("/gradio_api/run/draw", json.dumps({"data": entries(0)}).encode()),
        ("/gradio_api/upload", b"x"),
        (
            "/gradio_api/call/draw",
            b'{"data": [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}]}',
        ),
    ],
    ids=["half", "empty", "long", "unknown function", "past the queue", "upload", "file"],
)
def test_bad_requests_are_refused_and_the_server_stays_up(
    server: tuple[str, Path], path: str, body: bytes
) -> None:
    url, _ = server
    status, _ = request(url + path, body)
    assert 400 <= status < 600
    assert draw(url, entries(1))[0] == "complete"


def test_files_outside_the_servers_folder_are_not_served(server: tuple[str, Path]) -> None:
    url, folder = server
    (folder / "secret.txt").write_text("secret")
    _, data = draw(url, entries(1))
    served_file = data[4]["path"]
    assert request(f"{url}/gradio_api/file={served_file}")[0] == 200
    for path in (
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file%3D/etc/passwd",
        "/gradio_api/file=%2Fetc%2Fpasswd",
        f"/gradio_api/file={folder}/secret.txt",
        f"/gradio_api/file={folder}/checkpoint.safetensors",
        "/gradio_api/file=secret.txt",
        f"/gradio_api/file={Path(served_file).parent}/../../../secret.txt",
        f"/gradio_api/file={Path(served_file).parent}/%2e%2e/%2e%2e/%2e%2e/secret.txt",
        "/gradio_api/file=file:///etc/passwd",
        f"/gradio_api/file={url}/config",
        f"/gradio_api/proxy={url}/config",
        "/gradio_api/file/etc/passwd",
        "/static//etc/passwd",
        "/assets/../../../../../../etc/passwd",
        "/custom_component/1/client/component/../../../../etc/passwd",
    ):
        status, content = request(url + path)
        assert status >= 400 or b"<html" in content, path
        assert b"root:" not in content, path
        assert b"secret" not in content, path


def test_the_folder_of_the_server_is_removed_at_its_end(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(trained_model(), tmp_path / "checkpoint.safetensors")
    with served(["--checkpoint", str(checkpoint)], tmp_path) as url:
        assert draw(url, entries(1))[0] == "complete"
        assert list(tmp_path.glob("dimr-fast-web-*/served/*/grid.png"))
        port = url.rsplit(":", 1)[1]
        with pytest.raises(AssertionError, match="port: got"), served(["--port", port], tmp_path):
            pass
    assert not list(tmp_path.glob("dimr-fast-web-*"))
