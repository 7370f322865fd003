"""Notice that a process on another machine has ended, whatever ended it.

Collectives do not: NCCL waits for its timeout, gloo too where the machine's network is gone. That
timeout has to be hours long, since rank 0 may draw samples while the others wait. So each process
keeps a TCP connection to rank 0, on which nothing is sent before the end. The operating systems
probe it (keepalive), also while a process is busy.
"""

import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch

from dimr_fast.utils.distributed import Communicator, Worker

IDLE, INTERVAL, PROBES = 20, 10, 4
"""Seconds without data before the first probe and between probes, and the probes that may be lost:
a machine that is silent for a minute is lost."""
GRACE = 5.0
"""Seconds in which a process may end by itself after a loss, with a message of its own, such as
that of an error that all processes have."""
DONE = b"done"


@dataclass(frozen=True)
class Timeouts:
    """Seconds for the processes to connect to rank 0, and for the handshake of a connection."""

    connect: float = 60.0
    handshake: float = 5.0


@contextmanager
def watch_peers(
    communicator: Communicator, hint: str, timeouts: Timeouts = Timeouts()
) -> Iterator[None]:
    """End this process where one on another machine ends before its own block has ended.

    An error of a collective becomes a ConnectionError that names the lost process. A process that
    is in a collective which never ends prints that message and exits with status 1. `hint` is the
    rest of the message: what to do. Processes of one machine need no watch: their launcher ends all
    of them.
    """
    worker = Worker.from_environment()
    if worker.world_size in (1, worker.local_world_size):
        yield
        return
    watch = _Watch(_connect(communicator, timeouts), communicator.is_main, hint)
    try:
        yield
    except BaseException as error:
        # Errors of collectives; gloo's have no class of their own.
        of_torch = type(error) is RuntimeError or isinstance(error, torch.distributed.DistError)
        lost = of_torch and watch.lost.wait(timeout=1)
        watch.close()
        if lost:
            raise ConnectionError(watch.message) from error
        raise
    watch.close(DONE)


class _Watch:
    """Wait in a thread for the end of connections; `names` maps each to its peer in words."""

    def __init__(self, names: dict[socket.socket, str], is_main: bool, hint: str) -> None:
        self.names, self.is_main, self.hint = names, is_main, hint
        self.lost, self.closed = threading.Event(), threading.Event()
        self.message = ""
        self._selector = selectors.DefaultSelector()
        for connection in names:
            self._selector.register(connection, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._wait, daemon=True)
        self._thread.start()

    def close(self, last_words: bytes = b"") -> None:
        """Stop watching; with `last_words` DONE the peers know that this process has not failed."""
        self.closed.set()
        for connection in self.names:
            with suppress(OSError):
                connection.sendall(last_words)
                connection.shutdown(socket.SHUT_WR)
        self._thread.join(timeout=1)

    def _wait(self) -> None:
        while self._selector.get_map() and not self.closed.is_set():
            for key, _ in self._selector.select(timeout=0.2):
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                self._selector.unregister(connection)
                try:
                    words = connection.recv(4096)
                except OSError:  # keepalive: no answer
                    words = b""
                if words != DONE and not self.closed.is_set():
                    self._report(words.decode() or f"lost {self.names[connection]}")

    def _report(self, loss: str) -> None:
        """Tell the other peers and the main thread, and end the process if that does not."""
        self.message = f"{loss}; {self.hint}"
        if self.is_main:
            for connection in self.names:
                with suppress(OSError):
                    connection.sendall(loss.encode())
        self.lost.set()
        # Before the wait: NCCL may end the process when it sees the broken connection.
        print(f"dimr-fast: {loss}", file=sys.stderr, flush=True)
        if not self.closed.wait(GRACE):
            print(f"dimr-fast: error: {self.message}", file=sys.stderr, flush=True)
            os._exit(1)


def _connect(communicator: Communicator, timeouts: Timeouts) -> dict[socket.socket, str]:
    """Connect rank 0 with every other process; every process must call this."""
    name = socket.gethostname()
    if communicator.is_main:
        server = _server()
        host, secret = _own_address(timeouts.connect), secrets.token_hex(16)
        communicator.broadcast((host, server.getsockname()[1], name, secret))
        with server:
            return _accept(server, communicator.world_size - 1, secret, timeouts)
    host, port, name_of_main, secret = communicator.broadcast(("", 0, "", ""))
    try:
        connection = socket.create_connection((host, port), timeout=timeouts.connect)
    except OSError as error:
        raise ConnectionError(
            f"rank 0 is not reached at {host}:{port} ({error}); is a firewall between the machines?"
        ) from error
    connection.sendall(f"{secret} {communicator.rank} {name}\n".encode())
    return {_kept_alive(connection): f"process 0 on {name_of_main} ({host})"}


def _server() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _own_address(timeout: float) -> str:
    """Return the address at which other machines reach this one: that which reaches the store."""
    store = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    with socket.create_connection(store, timeout=timeout) as probe:
        address = str(probe.getsockname()[0])
    # The store is on this machine then, and the others know it by its name.
    return store[0] if address.startswith("127.") or address == "::1" else address


def _accept(
    server: socket.socket, count: int, secret: str, timeouts: Timeouts
) -> dict[socket.socket, str]:
    found: dict[socket.socket, str] = {}
    deadline = time.monotonic() + timeouts.connect
    while len(found) < count:
        server.settimeout(max(0.1, deadline - time.monotonic()))
        try:
            connection, (address, *_) = server.accept()
        except TimeoutError as error:
            raise ConnectionError(
                f"{len(found)} of {count} processes have connected to rank 0 within "
                f"{timeouts.connect:.0f} s; is a firewall between the machines?"
            ) from error
        # Anybody may connect, and say nothing or anything.
        connection.settimeout(timeouts.handshake)
        try:
            line = connection.makefile("rb").readline(1024).decode("utf-8", "replace")
        except OSError:
            line = ""
        given, _, words = line.partition(" ")
        if not secrets.compare_digest(given.encode(), secret.encode()):
            connection.close()
            continue
        rank, _, name = words.strip().partition(" ")
        address = address.removeprefix("::ffff:")
        found[_kept_alive(connection)] = f"process {rank} on {name} ({address})"
    return found


def _kept_alive(connection: socket.socket) -> socket.socket:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", IDLE),
        ("TCP_KEEPINTVL", INTERVAL),
        ("TCP_KEEPCNT", PROBES),
    ):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection
