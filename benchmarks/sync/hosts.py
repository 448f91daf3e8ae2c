"""Hosts: network namespaces of this machine, joined by a cable. Linux, as root."""

from __future__ import annotations

import os
import shutil
import subprocess
from types import TracebackType


class HostsError(Exception):
    """There can be no two hosts here."""


_COUNT = 2


class Hosts:
    """Two hosts that share nothing but a pair of virtual interfaces; for a ``with`` statement.

    Raises:
        HostsError: they cannot be made here.
    """

    def __init__(self) -> None:
        # Two runs at a time do not get in each other's way; names of interfaces have 15 characters at most.
        own = f"bench{os.getpid()}"
        self._names = [f"{own}{letter}" for letter in "ab"[:_COUNT]]
        self._made: list[str] = []
        self.addresses = [f"10.0.0.{number + 1}" for number in range(_COUNT)]

    def __enter__(self) -> Hosts:
        try:
            for name in self._names:
                _ip("netns", "add", name)
                self._made.append(name)
            first, second = self._names
            _ip("link", "add", first, "netns", first, "type", "veth", "peer", "name", second, "netns", second)
            for name, address in zip(self._names, self.addresses, strict=True):
                _ip("-n", name, "address", "add", f"{address}/24", "dev", name)
                _ip("-n", name, "link", "set", "lo", "up")
                _ip("-n", name, "link", "set", name, "up")
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        # The interfaces go with their namespaces.
        while self._made:
            _ip("netns", "delete", self._made.pop())

    def places(self) -> list[tuple[list[str], str, str]]:
        """Return of each host what is put before a command, the address, and the interface."""
        ip = _find_ip()
        return [
            ([ip, "netns", "exec", name], address, name)
            for name, address in zip(self._names, self.addresses, strict=True)
        ]

    def sent_nbytes(self) -> int:
        """Return the bytes that have gone through the cable so far, both ways."""
        counters = f"/sys/class/net/{self._names[0]}/statistics"
        read = ["cat", f"{counters}/rx_bytes", f"{counters}/tx_bytes"]
        return sum(map(int, _ip("netns", "exec", self._names[0], *read).split()))


def _find_ip() -> str:
    ip = shutil.which("ip", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if ip is None:
        raise HostsError("two hosts need the command ip, from the package iproute2")
    return ip


def _ip(*arguments: str) -> str:
    if os.geteuid() != 0:
        raise HostsError("two hosts are network namespaces, which need root")
    done = subprocess.run([_find_ip(), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise HostsError(f"ip {' '.join(arguments)}: {done.stderr.strip() or 'no reason given'}")
    return done.stdout
