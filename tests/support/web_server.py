"""The page's server as a process of its own, and requests to it."""

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TIMEOUT = 300


@contextmanager
def served(words: list[str], folder: Path, command: tuple[str, ...] = ()) -> Iterator[str]:
    """Run `dimr-fast web` with these words in `folder`; return the page's address.

    `command` replaces the words of the Python interpreter that start the server.
    """
    start = [*(command or ("-m", "dimr_fast", "web", "--port", "0")), *words]
    environment = os.environ | {"TMPDIR": str(folder)}
    with (folder / "server.log").open("w+") as log:
        process = subprocess.Popen(
            [sys.executable, *start],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("the page is at http://"), (folder / "server.log").read_text()
            yield line.split()[4]
            assert process.poll() is None, (folder / "server.log").read_text()
        finally:
            process.terminate()
            process.communicate(timeout=TIMEOUT)


def request(url: str, body: bytes | None = None) -> tuple[int, bytes]:
    """Return status and content of a GET, or of a POST of `body`."""
    headers = {"content-type": "application/json"}
    # No proxy: the address is one of this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url, body, headers), timeout=TIMEOUT) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def draw(url: str, entries: Any) -> tuple[str, Any]:
    """Ask the page to draw as a program; return the last event, complete or error, and its data."""
    status, content = request(f"{url}/gradio_api/call/draw", json.dumps({"data": entries}).encode())
    if status != 200:
        return "error", content.decode()
    event = json.loads(content)["event_id"]
    _, stream = request(f"{url}/gradio_api/call/draw/{event}")
    name, data = stream.decode().strip().split("\n\n")[-1].split("\n", 1)
    return name.removeprefix("event: "), json.loads(data.removeprefix("data: "))
