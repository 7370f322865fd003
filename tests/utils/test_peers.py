"""The connections by which processes on several machines notice that one has ended."""

import queue
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from dimr_fast.utils.distributed import Communicator
from dimr_fast.utils.peers import Timeouts, watch_peers

DEFAULT = Timeouts()
Strangers = Callable[[tuple[str, int], str], list[socket.socket]]


@dataclass(frozen=True)
class TwoThreads(Communicator):
    """Stand for processes by two threads; `strangers` connect to rank 0 before the second does."""

    strangers: Strangers = lambda address, secret: []
    values: "queue.SimpleQueue[Any]" = field(default_factory=queue.SimpleQueue)
    connections: list[socket.socket] = field(default_factory=list)

    def broadcast(self, value: Any) -> Any:
        if self.is_main:
            host, port, _, secret = value
            self.connections.extend(self.strangers((host, port), secret))
            self.values.put(value)
            return value
        return self.values.get(timeout=30)


@pytest.fixture(autouse=True)
def two_machines(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Say that each process is alone on its machine, and listen where rank 0 has its store."""
    with socket.create_server(("127.0.0.1", 0)) as store:
        host, port = store.getsockname()
        words = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1}
        for name, value in (words | {"MASTER_ADDR": host, "MASTER_PORT": port}).items():
            monkeypatch.setenv(name, str(value))
        yield


def connect(address: tuple[str, int], *words: bytes) -> list[socket.socket]:
    """Return a connection for each of `words`, which it has sent."""
    found = [socket.create_connection(address, timeout=10) for _ in words]
    for connection, said in zip(found, words, strict=True):
        connection.sendall(said)
    return found


def strangers(address: tuple[str, int], secret: str) -> list[socket.socket]:
    """Connect without knowing the secret."""
    guess = "0" * len(secret)
    said = [b"GET / HTTP/1.1\r\n\r\n", f"{guess} 1 somebody\n".encode(), b"\xff" * 4096]
    said += [f"{secret[:-1]} 1 somebody\n".encode(), b"\n", b" 1 somebody\n"]
    found = connect(address, *said)
    gone = socket.create_connection(address, timeout=10)
    gone.close()
    return found


def watch(
    ranks: tuple[TwoThreads, TwoThreads],
    blocks: tuple[Callable[[], Any], Callable[[], Any]],
    timeouts: Timeouts = DEFAULT,
) -> list[Any]:
    """Run a block as each of two processes that watch each other; return results or errors."""

    def run(communicator: TwoThreads, block: Callable[[], Any]) -> Any:
        try:
            with watch_peers(communicator, "what to do", timeouts):
                return block()
        except Exception as error:
            return error

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(run, ranks, blocks))


def two_ranks(strangers: Strangers) -> tuple[TwoThreads, TwoThreads]:
    main = TwoThreads(0, 2, torch.device("cpu"), strangers)
    return main, TwoThreads(1, 2, torch.device("cpu"), values=main.values)


def test_strangers_are_neither_peers_nor_a_loss(capsys: pytest.CaptureFixture[str]) -> None:
    ranks = two_ranks(strangers)
    both = threading.Barrier(2, timeout=30)

    def block() -> str:
        both.wait()
        # Rank 0 has closed the connections of strangers, and hears no others.
        for connection in ranks[0].connections:
            # A reset, where it had not read all that they said.
            with connection, suppress(ConnectionResetError):
                assert connection.recv(1) == b""
        ranks[0].connections.clear()
        both.wait()
        return "done"

    assert watch(ranks, (block, lambda: [both.wait(), both.wait(), "done"][-1])) == ["done", "done"]
    assert capsys.readouterr().err == ""


def test_a_stranger_who_says_nothing_does_not_keep_the_others_waiting() -> None:
    ranks = two_ranks(lambda address, secret: connect(address, b"", b"0" * 8))
    assert watch(ranks, (lambda: 0, lambda: 1), Timeouts(handshake=0.2)) == [0, 1]
    for connection in ranks[0].connections:
        connection.close()


def test_the_loss_of_a_peer_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    """A collective fails where its peer has failed; the error then names the peer."""
    failed = threading.Event()

    def fail() -> None:
        failed.set()
        raise KeyError("its own reason")

    def collective() -> None:
        failed.wait(timeout=30)
        raise RuntimeError("connection reset by peer")

    found = watch(two_ranks(lambda address, secret: []), (collective, fail))
    assert isinstance(found[1], KeyError)
    assert isinstance(found[0], ConnectionError)
    name = f"lost process 1 on {socket.gethostname()} (127.0.0.1)"
    assert str(found[0]) == f"{name}; what to do"
    assert capsys.readouterr().err == f"dimr-fast: {name}\n"


def test_peers_that_do_not_connect_are_an_error() -> None:
    alone = TwoThreads(0, 2, torch.device("cpu"), strangers)
    with (
        pytest.raises(ConnectionError, match="0 of 1 processes have connected to rank 0"),
        watch_peers(alone, "what to do", Timeouts(connect=0.3)),
    ):
        pytest.fail("watched")
    for connection in alone.connections:
        connection.close()
