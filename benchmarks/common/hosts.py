"""Hosts: namespaces of this machine, joined by a switch. Linux, as root."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_numbers = itertools.count()


class HostsError(Exception):
    """There can be no hosts here."""


class Host:
    """A host with a network, process ids, a name, mounts and shared memory of its own; on a switch with others.

    Args:
        tag: of its switch.
        number: from 1.
        prefix: of its address, which ends with the number.
        mtu: the bytes of the largest packet that it sends.

    Raises:
        HostsError: it cannot be made.
    """

    def __init__(self, tag: str, number: int, prefix: str, mtu: int) -> None:
        self._netns, self.name, self.address = f"{tag}{number}", f"host{number}", f"{prefix}{number}"
        self._mounts: list[tuple[str, str]] = []
        self._init: subprocess.Popen[str] | None = None
        self.start: list[str] = []
        """The words that start a command here."""
        _ip("netns", "add", self._netns)
        try:
            _ip("link", "add", "eth0", "netns", self._netns, "type", "veth", "peer", "name", self.name, "netns", tag)
            _ip("-n", tag, "link", "set", self.name, "master", "switch", "up")
            # An address of version 6 is usable at once only if no other host is asked whether it has it.
            length, more = ("64", ["nodad"]) if ":" in prefix else ("24", [])
            _ip("-n", self._netns, "addr", "add", f"{self.address}/{length}", "dev", "eth0", *more)
            _ip("-n", self._netns, "link", "set", "eth0", "mtu", str(mtu))
            for interface in ("lo", "eth0"):
                _ip("-n", self._netns, "link", "set", interface, "up")
            self.boot()
        except BaseException:
            self.remove()
            raise

    def boot(self) -> None:
        """Start it; what was mounted before is mounted again."""
        unshare = ["unshare", "--pid", "--uts", "--ipc", "--mount", "--mount-proc", "--fork", "--kill-child"]
        script = f"hostname {self.name} && mount -t tmpfs none /dev/shm && echo ready && exec sleep infinity"
        words = ["ip", "netns", "exec", self._netns, *unshare, "sh", "-c", script]
        self._init = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if self._init.stdout is None or self._init.stdout.readline() != "ready\n":
            _, said = self._init.communicate()
            raise HostsError(f"{' '.join(words[:3])} ... unshare: {said.strip() or 'no reason given'}")
        with open(f"/proc/{self._init.pid}/task/{self._init.pid}/children") as children:
            inside = children.read().strip()
        # With the working directory of who starts it.
        self.start = ["nsenter", "--target", inside, "--net", "--pid", "--uts", "--ipc", "--mount", "--wd=."]
        for source, folder in self._mounts:
            self._bind(source, folder)

    def mount(self, source: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
        """Have a path of this host be another one of the real machine: a local disk, which a crash leaves alone."""
        self._mounts.append((str(source), str(folder)))
        self._bind(*self._mounts[-1])

    def _bind(self, source: str, folder: str) -> None:
        subprocess.run([*self.start, "mount", "--bind", source, folder], check=True)

    def crash(self) -> None:
        """End all of its processes at once."""
        if self._init is not None:
            self._init.kill()
            self._init.communicate()
            self._init = None

    def pause(self) -> None:
        """Have all of its processes stand still, as on a host that hangs."""
        self._signal("STOP")

    def resume(self) -> None:
        """Have them go on."""
        self._signal("CONT")

    def _signal(self, name: str) -> None:
        # To all but the sender and the first process of the host.
        subprocess.run([*self.start, "kill", f"-{name}", "--", "-1"], check=True)

    def unplug(self) -> None:
        """Take its cable out."""
        _ip("-n", self._netns, "link", "set", "eth0", "down")

    def plug(self) -> None:
        """Put its cable in again."""
        _ip("-n", self._netns, "link", "set", "eth0", "up")

    def limit(self, rate: str) -> None:
        """Send no faster than a rate, such as ``1gbit``.

        Raises:
            HostsError: it cannot be limited.
        """
        tc = _find("tc")
        words = [tc, "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", rate, "burst", "256kb", "latency", "100ms"]
        done = subprocess.run([*self.start, *words], capture_output=True, text=True, check=False)
        if done.returncode:
            raise HostsError(f"{' '.join(words)}: {done.stderr.strip() or 'no reason given'}")

    def sent_nbytes(self) -> int:
        """Return the bytes that have gone through its cable so far, both ways."""
        counters = [f"/sys/class/net/eth0/statistics/{way}_bytes" for way in ("rx", "tx")]
        return sum(map(int, _ip("netns", "exec", self._netns, "cat", *counters).split()))

    def remove(self) -> None:
        """End its processes, and take it off the switch."""
        self.crash()
        _ip("netns", "delete", self._netns)


@contextmanager
def hosts(count: int, prefix: str = "10.213.8.", mtu: int = 1500) -> Iterator[list[Host]]:
    """Make hosts that are joined by a switch.

    Args:
        count: how many.
        prefix, mtu: as for ``Host``.

    Raises:
        HostsError: they cannot be made here.
    """
    # Several runs at a time do not get in each other's way; names of interfaces have 15 characters at most.
    tag = f"tkv{os.getpid() % 100_000}x{next(_numbers)}"
    made: list[Host] = []
    _ip("netns", "add", tag)
    try:
        _ip("-n", tag, "link", "add", "switch", "type", "bridge")
        _ip("-n", tag, "link", "set", "switch", "up")
        made.extend(Host(tag, number, prefix, mtu) for number in range(1, count + 1))
        yield made
    finally:
        for host in made:
            host.remove()
        _ip("netns", "delete", tag)


def places(made: Sequence[Host]) -> list[tuple[list[str], str, str]]:
    """Return of each host what is put before a command, the address, and the interface."""
    return [(host.start, host.address, "eth0") for host in made]


def _ip(*words: str) -> str:
    if os.geteuid() != 0:
        raise HostsError("hosts are namespaces, which need root")
    done = subprocess.run([_find("ip"), *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise HostsError(f"ip {' '.join(words)}: {done.stderr.strip() or 'no reason given'}")
    return done.stdout


def _find(command: str) -> str:
    found = shutil.which(command, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if found is None:
        raise HostsError(f"hosts need the command {command}, from the package iproute2")
    return found
