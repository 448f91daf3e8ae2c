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


def kill_all(start):
    """Kill every process of a host, and what they start meanwhile."""
    while pids := subprocess.run(["ip", "netns", "pids", start[-1]], check=True, capture_output=True).stdout.split():
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
