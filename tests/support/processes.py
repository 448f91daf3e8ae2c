"""Processes of tests: programs and functions that run in children of fork servers, or of their own in a namespace."""

from __future__ import annotations

import atexit
import json
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import cache

from tests.support.forkserver import MESSAGE_NBYTES
from tests.support.hosts import IN_NETNS
from tests.support.until import LIMIT_S

# Children of one server have the same hashes of text; programs that depend on the order of a set fail between two.
SERVERS = 2


class Server:
    """One fork server; it is started once for each process that runs tests, and ends with it."""

    def __init__(self) -> None:
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            os.set_inheritable(theirs.fileno(), True)
            environment = {name: text for name, text in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.forkserver", str(theirs.fileno())],
                # Libraries that start threads when they are imported must not.
                env=environment | {"OPENBLAS_NUM_THREADS": "1"},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        atexit.register(self.close)

    def wait_until_ready(self) -> None:
        if not self._connection.recv(MESSAGE_NBYTES):
            raise RuntimeError(f"the fork server ended with exit status {self._process.wait()}")

    def close(self) -> None:
        self._connection.close()
        self._process.wait()

    def start(self, request: dict, output: int, result: int) -> Process:
        """Fork a child; ``output`` and ``result`` are descriptors of files it writes to."""
        told, status = os.pipe()
        try:
            socket.send_fds(self._connection, [json.dumps(request).encode()], [status, output, result])
        finally:
            os.close(status)
        return Process(json.loads(self._connection.recv(MESSAGE_NBYTES))["pid"], told)


@cache
def servers() -> list[Server]:
    """Start the servers, all before the first worker: workers wait for each other only so long."""
    started = [Server() for _ in range(SERVERS)]
    for server in started:
        server.wait_until_ready()
    return started


class Process:
    """A child of a fork server, with the methods of ``subprocess.Popen`` that tests use."""

    def __init__(self, pid: int, status: int) -> None:
        self.pid, self.returncode = pid, None
        self._status = status

    def poll(self) -> int | None:
        return self._look(0)

    def wait(self, timeout: float | None = LIMIT_S) -> int:
        if self._look(timeout) is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        return self.returncode

    def _look(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            said = os.read(self._status, 64)
            os.close(self._status)
            if not said:
                raise RuntimeError("the fork server has ended")
            self.returncode = int(said)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


class Program:
    """One run of a module or of a function in a process of its own.

    Args:
        what: a module's name, or a function of a module; a function's arguments and result are pickled.
        args: a module's words, or a function's arguments.
        env: variables beside those of this process.
        number: which fork server starts it, by its remainder.
        host: the words that start a command on another host. In a network namespace the process is forked as any
            other; in a PID namespace it starts as a new interpreter.
    """

    def __init__(self, what, *args, env=None, number=0, host=()):
        self._what = what
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by close
        self._result = tempfile.NamedTemporaryFile()  # noqa: SIM115 - closed by close
        environment = {**os.environ, **(env or {})}
        if isinstance(what, str):
            request, words = {"module": what, "args": [str(arg) for arg in args]}, [what, *map(str, args)]
        else:
            name, packed = f"{what.__module__}:{what.__qualname__}", pickle.dumps(args).hex()
            request = {"function": name, "args": packed}
            words = ["tests.support.forkserver", "call", name, packed, self._result.name]
        netns = host[-1] if list(host[:-1]) == IN_NETNS else None
        if host and netns is None:
            self.process = subprocess.Popen(
                [*host, sys.executable, "-m", *words],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
            )
        else:
            self.process = servers()[number % SERVERS].start(
                {**request, "env": environment, "cwd": os.getcwd(), "netns": netns},
                self._output.fileno(),
                self._result.fileno(),
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Kill the process if it runs, and forget what it has printed."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait()
        self._output.close()
        self._result.close()

    def text(self):
        """What the process has printed so far."""
        self._output.seek(0)
        return self._output.read()

    def wait(self):
        """Return the exit status, once the process has ended.

        Raises:
            AssertionError: it does not end within the limit; with what it has printed.
        """
        try:
            return self.process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end after {LIMIT_S} s: {self.text()[-6000:]}") from None

    def wait_for(self, word):
        """Return the first line that begins with a word, once the process has printed it."""
        deadline = time.monotonic() + LIMIT_S
        while True:
            has_ended = self.process.poll() is not None
            for line in self.text().splitlines(keepends=True):
                if line.startswith(word) and line.endswith("\n"):
                    return line
            assert not has_ended, f"it has ended: {self.text()[-6000:]}"
            assert time.monotonic() < deadline, f"no {word!r} after {LIMIT_S} s: {self.text()[-6000:]}"
            time.sleep(0.01)

    def result(self):
        """Return what the function has returned, or raise what it has raised; the process has ended."""
        with open(self._result.name, "rb") as file:
            packed = file.read()
        if not packed:
            raise AssertionError(f"exit status {self.process.poll()}\n{self.text()[-6000:]}")
        value, error = pickle.loads(packed)
        if error is not None:
            raise error
        return value


def call(module, *args, env=None):
    """Run a module to its end; return its exit status and what it has printed, on whichever output."""
    with Program(module, *args, env=env) as program:
        return program.wait(), program.text()


def run(function, *args, env=None):
    """Run a function in a process of its own; return what it returns, or raise what it raises.

    Raises:
        AssertionError: the process has not ended with status 0; with what it has printed.
    """
    with Program(function, *args, env=env) as program:
        status = program.wait()
        result = program.result()
        assert status == 0, program.text()[-6000:]
    return result
