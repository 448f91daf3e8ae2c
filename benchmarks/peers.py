"""Peers in processes of their own, and the virtual environments that some of them need."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from select import select
from typing import IO, Any

from works import Verb, Work, WrongResultError

HERE = Path(__file__).resolve().parent
MXNET_VENV = HERE.parent / ".venv-mxnet"
# MXNet 1.9.1 is the last release, and uses names that newer versions of NumPy do not have.
MXNET_REQUIREMENTS = ("mxnet==1.9.1", "numpy==1.23.5")
MPI_VENV = HERE.parent / ".venv-mpi"
# The wheel of MPICH brings the library and mpiexec, so that nothing of the system is needed or changed.
MPI_REQUIREMENTS = ("mpi4py==4.1.2", "mpich==5.0.2", "numpy>=2.0")
_REPLY_TIMEOUT_S = 600


class PeerError(Exception):
    """A peer's process cannot be made, or does not answer."""


class ProcessPeer:
    """A contender that runs in another process, and does nothing but wait while others are measured.

    Args:
        name: of the contender.
        python: the interpreter that has its library.

    Raises:
        PeerError: the interpreter is not there or cannot import the library.
    """

    def __init__(self, name: str, python: str | Path = sys.executable) -> None:
        self.name = name
        self.python = str(python)
        self._stderr: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by end()
        try:
            self._process = subprocess.Popen(
                [self.python, str(HERE / "peer_process.py"), name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                text=True,
            )
        except OSError as error:
            self._stderr.close()
            raise PeerError(f"{python}: {error.strerror}") from None
        try:
            self.versions: dict[str, str] = self._ask("hello")
        except PeerError:
            self.end()
            raise

    def build(self, work: Work) -> None:
        """Take on a work, and forget the one before."""
        self._ask("build", **asdict(work))

    def time(self, verb: Verb, calls: int = 1) -> float:
        """As of a contender."""
        seconds: float = self._ask("time", verb=verb, calls=calls)["seconds"]
        return seconds

    def renew(self) -> None:
        """As of a contender."""
        self._ask("renew")

    def check(self) -> None:
        """As of a contender."""
        self._ask("check")

    def memory(self) -> dict[str, int]:
        """Return resident bytes: ``rss`` now, and the ``peak`` since the last call."""
        return self._ask("memory")

    def close(self) -> None:
        """Forget the work; the process stays for the next one."""
        self._ask("close")

    def end(self) -> None:
        """End the process."""
        if self._process.stdin is not None and self._process.stdout is not None:
            # What is still buffered cannot be written when the process is gone already.
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process.stdout.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stderr.close()

    def _ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        process = self._process
        if process.stdin is None or process.stdout is None:
            raise PeerError(f"{self.name}: no pipes")
        try:
            print(json.dumps({"do": do, **arguments}), file=process.stdin, flush=True)
        except BrokenPipeError:
            raise PeerError(f"{self.name}: its process has ended\n{self._last_words()}") from None
        if not select([process.stdout], [], [], _REPLY_TIMEOUT_S)[0]:
            process.kill()
            raise PeerError(f"{self.name}: no answer to {do!r} within {_REPLY_TIMEOUT_S} s")
        line = process.stdout.readline()
        if not line:
            raise PeerError(f"{self.name}: its process ended at {do!r}\n{self._last_words()}")
        return reply_of(self.name, do, line)

    def _last_words(self) -> str:
        self._stderr.seek(0)
        return last_words(self._stderr.read())


def reply_of(name: str, do: str, line: str) -> dict[str, Any]:
    """Return what a process has answered to a command, or raise what it says went wrong."""
    reply: dict[str, Any] = json.loads(line)
    if "wrong" in reply:
        raise WrongResultError(f"{name}: {reply['wrong']}")
    if "error" in reply:
        raise PeerError(f"{name}: {do}: {reply['error']}")
    return reply


def last_words(text: str) -> str:
    """Return the end of what a process said before it ended."""
    return "\n".join(text.splitlines()[-5:])


def start_mxnet(python: str | None = None, *, may_install: bool) -> ProcessPeer:
    """Start MXNet in its own process.

    Args:
        python: an interpreter that has MXNet (None: that of ``.venv-mxnet``).
        may_install: make ``.venv-mxnet`` if it is missing or has no MXNet.

    Raises:
        PeerError: saying in one line why there is no MXNet.
    """
    return _start("mxnet", MXNET_VENV, python, _install_mxnet if may_install else None)


def start_mpi(*, may_install: bool) -> ProcessPeer:
    """Start mpi4py in its own process, one without MPI; see ``start_mxnet``."""
    return _start("mpi4py", MPI_VENV, None, _install_mpi if may_install else None)


def _start(module: str, venv: Path, python: str | None, install: Callable[[], None] | None) -> ProcessPeer:
    chosen = Path(python) if python else venv / "bin" / "python"
    try:
        if not chosen.exists():
            raise PeerError(f"there is no {python or venv.name}")
        return ProcessPeer(module, chosen)
    except PeerError:
        if python or install is None:
            raise
    install()
    return ProcessPeer(module, chosen)


def _install_mxnet() -> None:
    python = sys.executable if sys.version_info[:2] == (3, 11) else shutil.which("python3.11")
    if python is None:
        raise PeerError("MXNet 1.9.1 and its NumPy need python3.11, which is not there")
    _install("MXNet", python, MXNET_VENV, MXNET_REQUIREMENTS)


def _install_mpi() -> None:
    _install("MPI", sys.executable, MPI_VENV, MPI_REQUIREMENTS)


def _install(name: str, python: str, venv: Path, requirements: Sequence[str]) -> None:
    print(f"installing {' '.join(requirements)} into {venv.name}/ (once)", file=sys.stderr)
    in_venv = str(venv / "bin" / "python")
    for command in (
        [python, "-m", "venv", str(venv)],
        [in_venv, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements],
    ):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise PeerError(f"{name} cannot be installed: {error}") from None
        if done.returncode:
            last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
            raise PeerError(f"{name} cannot be installed: {''.join(last) or 'no reason given'}")
