"""Hosts of a small network: network namespaces with addresses of their own, on this machine.

They share its files, as machines of a cluster share a folder.
"""

import json
import os
import secrets
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import pytest


@dataclass(frozen=True)
class Host:
    """A network namespace, the address of its one interface, and the interface's name."""

    namespace: str
    address: str
    interface: str

    def start(self, words: list[str], **options: object) -> "subprocess.Popen[str]":
        """Start a command on this host."""
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "GLOO_SOCKET_IFNAME": self.interface,
            # There is no name server, and waiting for its answers would take a minute.
            "RES_OPTIONS": "timeout:1 attempts:1",
        }
        return subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            **options,  # type: ignore[call-overload]
        )

    def sent(self) -> int:
        """Return the bytes that this host has sent to the other, with all headers."""
        (facts,) = json.loads(_ip("-n", self.namespace, "-s", "-j", "link", "show", self.interface))
        return int(facts["stats64"]["tx"]["bytes"])

    def disconnect(self) -> None:
        """Lose every packet from and to this host, as when its power fails."""
        _ip("-n", self.namespace, "link", "set", self.interface, "down")

    def kill(self) -> None:
        """Kill all processes of this host at once."""
        for number in _ip("netns", "pids", self.namespace).split():
            try:
                psutil.Process(int(number)).kill()
            except psutil.NoSuchProcess:
                continue


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Connect two hosts by a cable; remove them, with their processes, at the end.

    Skips the test where this user cannot make network namespaces.
    """
    run = secrets.token_hex(4)
    names = [f"dimr-{run}-{letter}" for letter in "ab"]
    made: list[Host] = []
    try:
        for number, name in enumerate(names, 1):
            try:
                _ip("netns", "add", name)
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', error)}")
            made.append(Host(name, f"10.213.7.{number}", "cable"))
        a, b = made
        _ip(
            *("-n", a.namespace, "link", "add", a.interface, "type", "veth"),
            *("peer", "name", b.interface, "netns", b.namespace),
        )
        for host in made:
            _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", host.interface)
            for interface in ("lo", host.interface):
                _ip("-n", host.namespace, "link", "set", interface, "up")
        yield a, b
    finally:
        for host in made:
            host.kill()
            _ip("netns", "delete", host.namespace)


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=True)
    return done.stdout
