"""What the page's server refuses before Gradio sees it."""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

MAX_BODY = 2**16
"""Bytes of the body of a request. The largest honest one lists the names of many classes."""
FILE = "/gradio_api/file="
UNUSED = tuple(
    f"/gradio_api/{name}"
    for name in (
        "upload",
        "proxy=",
        "stream/",
        "file/",
        "process_recording",
        "component_server",
        "deep_link",
        "vibe-",
    )
)
"""Paths of Gradio that take files, fetch other addresses or read media; the page needs none."""


class Guard:
    """ASGI middleware: refuse uploads, other addresses, other files and long bodies.

    Files are served from `folder` alone. Gradio itself would fetch `file=https://…` for a visitor,
    and every address that a body names as a file.
    """

    def __init__(self, app: App, folder: Path) -> None:
        self._app, self._folder = app, folder.resolve()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path: str = scope["path"]
        if path.startswith(UNUSED) or not self._may_be_read(path):
            await _refuse(send, 403, "not part of this page")
            return
        if scope["method"] in ("GET", "HEAD"):
            await self._app(scope, receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message["type"] == "http.request" and message.get("more_body", False)
            if len(body) > MAX_BODY:
                await _refuse(send, 413, f"request: expected at most {MAX_BODY} bytes")
                return
        if _names_file(body):
            await _refuse(send, 403, "not part of this page")
            return
        parts = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def replay() -> Message:
            return next(parts, None) or await receive()

        await self._app(scope, replay, send)

    def _may_be_read(self, path: str) -> bool:
        if not path.startswith(FILE):
            return True
        try:
            return Path(path.removeprefix(FILE)).resolve().is_relative_to(self._folder)
        except (OSError, ValueError):  # a name that no file can have
            return False


def _names_file(body: bytes) -> bool:
    """Return whether Gradio would take a part of the body for a file."""
    found: list[bool] = []

    def see(entry: dict[str, Any]) -> None:
        found.append("path" in entry and "meta" in entry)

    try:
        json.loads(body, object_hook=see)
    except (ValueError, RecursionError):  # Gradio refuses it
        return False
    return any(found)


async def _refuse(send: Send, status: int, reason: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": reason.encode()})
