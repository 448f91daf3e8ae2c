"""Teams: the processes of a contender, which do the same at once or sleep while others are measured."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import re
import selectors
import socket
import struct
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic, perf_counter
from typing import IO, Any

from benchmarks.common.machine import ROOT
from benchmarks.common.venvs import PeerError, last_lines
from benchmarks.common.work import Verb, WrongResultError

_START_TIMEOUT_S = 120
_END_TIMEOUT_S = 10
# How long before a common start its time is told, and how often a team is asked again if a rank heard too late.
_LEAD_S = 0.02
_TRIES = 4
# Of the process at the other end of a socket: its number, user and group.
_CREDENTIALS = struct.Struct("3i")
# Below those that the kernel gives to connections: another host is not asked whether it has used one.
_PORTS = range(20_000, 32_000)
# How often memory is looked at.
_LOOK_S = 0.003
# A variable of these would tell a library of another group than the one that is started.
_STRANGERS = re.compile("RANK|WORLD_SIZE|LOCAL_|GROUP_|MASTER_|DMLC_|PMI_|GLOO_SOCKET_IFNAME|TORCHELASTIC_")


@dataclass(frozen=True)
class Process:
    """What is to be started.

    Args:
        command: with its arguments.
        environment: added to that of this process.
        helps: it is no rank (and starts none), but a server or a scheduler.
    """

    command: Sequence[str]
    environment: dict[str, str]
    helps: bool = False


class Team:
    """All processes of a contender; commands go to every rank at once, and replies come in the order of ranks.

    Args:
        name: of the contender.
        ranks: how many processes will take commands.
        processes: to start; they run ``benchmarks.common.process``, or start something that does, or help.
        options: passed to ``open`` of the contenders.
        reply_timeout_s: how long a command may take.

    Raises:
        PeerError: not all came.
    """

    def __init__(
        self,
        name: str,
        ranks: int,
        processes: Sequence[Process],
        options: Mapping[str, Any] | None = None,
        reply_timeout_s: float = 300,
    ) -> None:
        self.name, self.options, self._reply_timeout_s = name, dict(options or {}), reply_timeout_s
        self._log: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by end()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._helpers: list[int] = []
        self._connections: list[socket.socket] = [None] * ranks  # type: ignore[list-item]
        self._pids = [0] * ranks
        self._broken = True
        try:
            with tempfile.TemporaryDirectory(prefix="bench-") as folder, socket.socket(socket.AF_UNIX) as listener:
                path = str(Path(folder) / "socket")
                listener.bind(path)
                listener.listen(ranks)
                for process in processes:
                    self._start(process, path)
                for _ in range(ranks):
                    self._accept(listener)
            self._broken = False
            self.versions: dict[str, str] = self.ask("start")[0]["versions"]
        except BaseException:
            self.end()
            raise

    def _start(self, process: Process, path: str) -> None:
        environment = {name: text for name, text in os.environ.items() if not _STRANGERS.match(name)}
        environment |= {"BENCH_SOCKET": path, **process.environment}
        try:
            started = subprocess.Popen(
                process.command,
                env=environment,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
            )
        except OSError as error:
            raise PeerError(f"{self.name}: {process.command[0]}: {error.strerror}") from None
        self._processes.append(started)
        if process.helps:
            self._helpers.append(started.pid)

    def _accept(self, listener: socket.socket) -> None:
        listener.settimeout(0.5)
        until = monotonic() + _START_TIMEOUT_S
        while True:
            try:
                connection, _ = listener.accept()
                break
            except TimeoutError:
                ended = any(process.poll() is not None for process in self._processes)
                if ended or monotonic() > until:
                    why = "ended at its start" if ended else f"did not start within {_START_TIMEOUT_S} s"
                    raise PeerError(f"{self.name}: a process {why}\n{self._last_lines()}") from None
        connection.settimeout(self._reply_timeout_s)
        rank = int(_line(connection))
        # As it is seen from here: on another host a process has another number for itself.
        pid, _, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        self._connections[rank], self._pids[rank] = connection, pid

    # ------------------------------------------------------------ commands

    def ask(self, do: str, *, meanwhile: Callable[[], None] | None = None, **arguments: Any) -> list[dict[str, Any]]:
        """Give every rank a command; return their replies.

        Args:
            do: the command.
            meanwhile: called again and again while ranks are busy.
            **arguments: of the command.

        Raises:
            WrongResultError: a rank has found its results wrong.
            PeerError: a rank failed, ended, or did not answer. The team is of no use after that.
        """
        command = json.dumps({"do": do, **arguments}).encode() + b"\n"
        self._broken, healthy = True, not self._broken
        if not healthy:
            raise PeerError(f"{self.name}: {do}: this team has failed before")
        with contextlib.suppress(BrokenPipeError):  # a rank that has ended is noticed below
            for connection in self._connections:
                connection.sendall(command)
        replies = self._replies(do, meanwhile)
        self._broken = False
        return replies

    def _replies(self, do: str, meanwhile: Callable[[], None] | None) -> list[dict[str, Any]]:
        replies: list[dict[str, Any]] = [{} for _ in self._connections]
        until = monotonic() + self._reply_timeout_s
        with selectors.DefaultSelector() as waiting:
            for rank, connection in enumerate(self._connections):
                waiting.register(connection, selectors.EVENT_READ, rank)
            while waiting.get_map():
                if monotonic() > until:
                    raise PeerError(f"{self.name}: no answer to {do!r} within {self._reply_timeout_s:g} s")
                if meanwhile is not None:
                    meanwhile()
                for key, _ in waiting.select(_LOOK_S if meanwhile else 1):
                    replies[key.data] = self._reply(do, self._connections[key.data])
                    waiting.unregister(key.fileobj)
        return replies

    def _reply(self, do: str, connection: socket.socket) -> dict[str, Any]:
        line = _line(connection)
        if not line:
            raise PeerError(f"{self.name}: a rank ended at {do!r}\n{self._last_lines()}")
        reply: dict[str, Any] = json.loads(line)
        if "wrong" in reply:
            raise WrongResultError(f"{self.name}: {reply['wrong']}")
        if "error" in reply:
            raise PeerError(f"{self.name}: {do}: {reply['error']}")
        return reply

    def call(self, method: str, **arguments: Any) -> list[Any]:
        """Call a method of every rank's contender; return the results."""
        return [reply["result"] for reply in self.ask("call", method=method, **arguments)]

    def build(self, work: Any) -> None:
        """Make the arrays of a work, in every rank."""
        self.ask("build", **asdict(work))

    def open(self) -> None:
        """Bring the ranks together for the work that they have built."""
        self.ask("open", port=free_port(), **self.options)

    def time(self, verb: Verb, calls: int = 1) -> float:
        """Return the seconds of one call, from a common start of all ranks to the end of the last one."""
        for attempt in range(_TRIES):
            self.ask("prepare", verb=verb, calls=calls)
            at = perf_counter() + _LEAD_S * 2**attempt if len(self._connections) > 1 else None
            replies = self.ask("time", verb=verb, calls=calls, at=at)
            if not any(reply["late"] for reply in replies):
                break
        slowest: float = max(reply["seconds"] for reply in replies)
        return slowest / calls

    def warm_up(self, verb: Verb, calls: int) -> dict[str, int]:
        """Do some calls; return the most memory that ranks and helpers had at a time during them."""
        most = self.memory()

        def look() -> None:
            for whose, nbytes in self.memory().items():
                most[whose] = max(most[whose], nbytes)

        for _ in range(calls):
            self.ask("prepare", verb=verb, calls=1)
            self.ask("time", verb=verb, calls=1, at=perf_counter(), meanwhile=look)
        return most

    def renew(self) -> None:
        """As of a contender."""
        self.ask("renew")

    def check(self) -> None:
        """As of a contender, in every rank."""
        self.ask("check")

    def close(self) -> None:
        """Forget the work; the processes stay for the next one."""
        self.ask("close")

    def memory(self) -> dict[str, int]:
        """Return the bytes of all ranks and of all helpers now; memory that processes share counts once."""
        return {"ranks": sum(map(_pss, self._pids)), "helpers": sum(map(_pss, self._helpers))}

    # ------------------------------------------------------------ the end

    def dismiss(self) -> None:
        """Let the ranks end, without waiting for it."""
        for connection in self._connections:
            if connection is not None:
                connection.close()

    def end(self) -> None:
        """End the processes that this team has started."""
        self.dismiss()
        # Those of a broken team may wait for each other for a long time.
        if self._broken or not self._have_ended():
            for process in self._processes:
                process.terminate()
            if not self._have_ended():
                for process in self._processes:
                    process.kill()
                self._have_ended()
        self._log.close()

    def _have_ended(self) -> bool:
        until = monotonic() + _END_TIMEOUT_S
        try:
            for process in self._processes:
                process.wait(timeout=max(0.0, until - monotonic()))
        except subprocess.TimeoutExpired:
            return False
        return True

    def _last_lines(self) -> str:
        # Processes that still run write where this one would have moved to.
        return last_lines(os.pread(self._log.fileno(), 1 << 20, 0).decode(errors="replace"))


def _line(connection: socket.socket) -> str:
    """Return the only line that is on its way, without its end; empty if the other side is gone."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while not received.endswith(b"\n"):
            more = connection.recv(1 << 16)
            if not more:
                return ""
            received += more
    return received.decode().strip()


def _pss(pid: int) -> int:
    """Return a process's bytes in memory, of shared ones its share. Linux only; 0 elsewhere.

    Libraries and other files are left out: whoever else maps them changes the share.
    """
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))


def free_port() -> int:
    """Return a TCP port of this host that nobody listens on, and that no host gives to a connection by itself."""
    for port in random.sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError(errno.EADDRINUSE, "no port is free")
