"""What the page's server refuses, called as a server calls it; without Gradio."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from dimr_fast.web.guard import MAX_BODY, Guard, Message

UNTOUCHED = 200


async def echo(scope: Message, receive: Any, send: Any) -> None:
    """Answer with the body of the request."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message["body"]
        more = message["more_body"]
    await send({"type": "http.response.start", "status": UNTOUCHED, "headers": []})
    await send({"type": "http.response.body", "body": body})


def answer(folder: Path, path: str, parts: tuple[bytes, ...] = (), method: str = "GET") -> Any:
    """Return status and body of the answer to a request whose body comes in parts."""
    sent: list[Message] = []
    waiting = [
        {"type": "http.request", "body": part, "more_body": i + 1 < len(parts)}
        for i, part in enumerate(parts or (b"",))
    ]

    async def receive() -> Message:
        return waiting.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "path": path, "method": method}
    asyncio.run(Guard(echo, folder)(scope, receive, send))
    return sent[0]["status"], sent[1]["body"]


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=etc/passwd",
        "/gradio_api/file={folder}/../secret",
        "/gradio_api/file={folder}/link",
        "/gradio_api/file={folder}-other/secret",
        "/gradio_api/file=https://example.com/",
        "/gradio_api/file=a\0b",
        "/gradio_api/upload",
        "/gradio_api/upload_progress",
        "/gradio_api/proxy=https://example.com/",
        "/gradio_api/stream/1",
        "/gradio_api/file/https://example.com/",
        "/gradio_api/process_recording",
        "/gradio_api/deep_link",
    ],
)
def test_other_files_and_addresses_are_refused(tmp_path: Path, path: str) -> None:
    folder = tmp_path / "served"
    folder.mkdir()
    (tmp_path / "secret").write_text("secret")
    (folder / "link").symlink_to(tmp_path / "secret")
    status, body = answer(folder, path.format(folder=folder))
    assert (status, body) == (403, b"not part of this page")


@pytest.mark.parametrize("path", ["/", "/config", "/gradio_api/file={folder}/a/grid.png"])
def test_what_the_page_needs_is_let_through(tmp_path: Path, path: str) -> None:
    assert answer(tmp_path, path.format(folder=tmp_path)) == (UNTOUCHED, b"")


@pytest.mark.parametrize("kind", ["meta", "m\\u0065ta"])
def test_a_body_that_names_a_file_is_refused(tmp_path: Path, kind: str) -> None:
    """Gradio would download it."""
    file = f'{{"path": "https://example.com/x", "{kind}": {{"_type": "gradio.FileData"}}}}'
    body = f'{{"data": [[{file}], 1]}}'.encode()
    assert answer(tmp_path, "/gradio_api/queue/join", (body,), "POST")[0] == 403
    plain = b'{"data": ["path", "meta"]}'
    assert answer(tmp_path, "/gradio_api/queue/join", (plain,), "POST") == (UNTOUCHED, plain)


def test_a_body_is_let_through_whole_up_to_its_limit(tmp_path: Path) -> None:
    path, half = "/gradio_api/queue/join", b"x" * (MAX_BODY // 2)
    assert answer(tmp_path, path, (half, half), "POST") == (UNTOUCHED, half + half)
    assert answer(tmp_path, path, (), "POST") == (UNTOUCHED, b"")
    status, body = answer(tmp_path, path, (half, half, b"x"), "POST")
    assert (status, body) == (413, f"request: expected at most {MAX_BODY} bytes".encode())
