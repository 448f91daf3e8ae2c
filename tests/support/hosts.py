"""Hosts for tests: namespaces of network, process ids and more, made with ``ip`` and ``unshare`` alone."""

import itertools
import os
import shutil
import signal
import subprocess
from contextlib import contextmanager, suppress

# What starts a command in a network namespace, before its name.
IN_NETNS = ["ip", "netns", "exec"]
CAN_MAKE = os.geteuid() == 0 and shutil.which("ip") is not None
_numbers = itertools.count()


def _ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextmanager
def two_hosts():
    """Make two hosts and give, for each, the words that start a command there, its address, and its interface."""
    tag = f"tkv{os.getpid() % 100_000}x{next(_numbers)}"
    names = [f"{tag}a", f"{tag}b"]
    made = []
    try:
        for name in names:
            _ip("netns", "add", name)
            made.append(name)
        ends = ["veth0", "veth1"]
        _ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
        hosts = []
        for number, (name, end) in enumerate(zip(names, ends, strict=True), start=1):
            address = f"10.213.7.{number}"
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            _ip("-n", name, "link", "set", end, "up")
            _ip("-n", name, "link", "set", "lo", "up")
            hosts.append(([*IN_NETNS, name], address, end))
        yield hosts
    finally:
        for name in made:
            kill_all([*IN_NETNS, name])
            _ip("netns", "del", name)


def cut(host):
    """Take down a host's end of the wire."""
    start, _, end = host
    _ip("-n", start[-1], "link", "set", end, "down")


@contextmanager
def pid_namespaces(count):
    """Make PID namespaces on one network and give, for each, what ``two_hosts`` gives of a host."""
    leaders = []
    try:
        for _ in range(count):
            words = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
            words += ["sh", "-c", "echo ready; sleep infinity"]
            leaders.append(subprocess.Popen(words, stdout=subprocess.PIPE, text=True))
            assert leaders[-1].stdout.readline() == "ready\n"
        hosts = []
        for leader in leaders:
            with open(f"/proc/{leader.pid}/task/{leader.pid}/children") as children:
                inside = children.read().strip()
            hosts.append((["nsenter", "--target", inside, "--pid", "--mount"], "127.0.0.1", None))
        yield hosts
    finally:
        for leader in leaders:
            leader.kill()
            leader.wait()
            leader.stdout.close()


class Machine:
    """A host with a network, process ids, a name, mounts and shared memory of its own; on a switch with others.

    Args:
        tag: of its switch.
        number: from 1.
    """

    def __init__(self, tag, number):
        self._netns, self.name, self.address = f"{tag}{number}", f"host{number}", f"10.213.8.{number}"
        self._mounts, self._init = [], None
        _ip("netns", "add", self._netns)
        _ip("link", "add", "eth0", "netns", self._netns, "type", "veth", "peer", "name", self.name, "netns", tag)
        _ip("-n", tag, "link", "set", self.name, "master", "switch", "up")
        _ip("-n", self._netns, "addr", "add", f"{self.address}/24", "dev", "eth0")
        for interface in ("lo", "eth0"):
            _ip("-n", self._netns, "link", "set", interface, "up")
        self.boot()

    def boot(self):
        """Start it; what was mounted before is mounted again."""
        words = [*IN_NETNS, self._netns, "unshare", "--pid", "--uts", "--ipc", "--mount", "--mount-proc", "--fork"]
        script = f"hostname {self.name} && mount -t tmpfs none /dev/shm && echo ready && exec sleep infinity"
        self._init = subprocess.Popen([*words, "--kill-child", "sh", "-c", script], stdout=subprocess.PIPE, text=True)
        assert self._init.stdout.readline() == "ready\n"
        with open(f"/proc/{self._init.pid}/task/{self._init.pid}/children") as children:
            inside = children.read().strip()
        self.start = ["nsenter", "--target", inside, "--net", "--pid", "--uts", "--ipc", "--mount"]
        """The words that start a command here."""
        for source, folder in self._mounts:
            self._bind(source, folder)

    def mount(self, source, folder):
        """Have a folder of this host be another one of the real machine: a local disk, which a crash leaves alone."""
        self._mounts.append((source, folder))
        self._bind(source, folder)

    def _bind(self, source, folder):
        subprocess.run([*self.start, "mount", "--bind", str(source), str(folder)], check=True)

    def crash(self):
        """End all of its processes at once."""
        if self._init is not None:
            self._init.kill()
            self._init.wait()
            self._init.stdout.close()
            self._init = None

    def unplug(self):
        """Take its cable out."""
        _ip("-n", self._netns, "link", "set", "eth0", "down")

    def plug(self):
        """Put its cable in again."""
        _ip("-n", self._netns, "link", "set", "eth0", "up")

    def remove(self):
        self.crash()
        _ip("netns", "del", self._netns)


@contextmanager
def machines(count):
    """Make hosts that are joined by a switch."""
    tag = f"tks{os.getpid() % 100_000}x{next(_numbers)}"
    made = []
    _ip("netns", "add", tag)
    try:
        _ip("-n", tag, "link", "add", "switch", "type", "bridge")
        _ip("-n", tag, "link", "set", "switch", "up")
        made.extend(Machine(tag, number) for number in range(1, count + 1))
        yield made
    finally:
        for machine in made:
            machine.remove()
        _ip("netns", "del", tag)


def kill_all(start):
    """Kill every process of a host, and what they start meanwhile."""
    while pids := subprocess.run(["ip", "netns", "pids", start[-1]], check=True, capture_output=True).stdout.split():
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
