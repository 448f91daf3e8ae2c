"""Virtual environments of peers that cannot live beside a new NumPy, or that bring a library of the system."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass

from benchmarks.common.machine import ROOT


class PeerError(Exception):
    """A peer cannot be installed or started, or does not answer."""


@dataclass(frozen=True)
class Venv:
    """A virtual environment at the root of this checkout.

    Args:
        name: of the peer.
        module: what must be importable in it.
        requirements: what is installed.
        version: the version of Python that they need; None takes this one.
    """

    name: str
    module: str
    requirements: tuple[str, ...]
    version: tuple[int, int] | None = None

    @property
    def folder(self) -> str:
        """Where it is, relative to the root of this checkout."""
        return f".venv-{self.name}"

    def find(self, python: str | None = None, *, may_install: bool) -> str:
        """Return an interpreter that has the peer; install it if it is missing and that is allowed.

        Args:
            python: the interpreter to take instead of this environment's; nothing is installed then.
            may_install: make the environment if there is none.

        Raises:
            PeerError: saying in one line why there is none.
        """
        chosen = python or str(ROOT / self.folder / "bin" / "python")
        problem = self._problem(chosen, python or self.folder)
        if problem and may_install and not python:
            self._install()
            problem = self._problem(chosen, self.folder)
        if problem:
            raise PeerError(problem)
        return chosen

    def _problem(self, python: str, name: str) -> str | None:
        """Return why an interpreter cannot import the peer; None if it can."""
        try:
            ended = subprocess.run(
                [python, "-c", f"import {self.module}"], capture_output=True, text=True, timeout=120, check=False
            )
        except FileNotFoundError:
            return f"there is no {name}"
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{name}: {error}"
        return f"{name}: {last_lines(ended.stderr, 1) or 'no reason given'}" if ended.returncode else None

    def _install(self) -> None:
        python: str | None = sys.executable
        if self.version and sys.version_info[:2] != self.version:
            wanted = "python{}.{}".format(*self.version)
            python = shutil.which(wanted)
            if python is None:
                raise PeerError(f"{self.requirements[0]} needs {wanted}, which is not there")
        print(f"installing {' '.join(self.requirements)} into {self.folder}/ (once)", file=sys.stderr)
        folder = str(ROOT / self.folder)
        for command in (
            [python, "-m", "venv", folder],
            [f"{folder}/bin/python", "-m", "pip", "install", "-q", "--disable-pip-version-check", *self.requirements],
        ):
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
            except (OSError, subprocess.TimeoutExpired) as error:
                raise PeerError(f"{self.name} cannot be installed: {error}") from None
            if done.returncode:
                raise PeerError(f"{self.name} cannot be installed: {last_lines(done.stderr, 1) or 'no reason given'}")


# MXNet 1.9.1 is the last release, and uses names that newer versions of NumPy do not have.
MXNET = Venv("mxnet", "mxnet", ("mxnet==1.9.1", "numpy==1.23.5"), (3, 11))
# Without hiredis, its client takes replies apart in Python.
REDIS = Venv("redis", "redis", ("redis==8.1.0", "hiredis==3.5.0", "numpy>=2.0"))
# The wheel of MPICH brings the library and mpiexec, so that nothing of the system is needed or changed.
MPI = Venv("mpi", "mpi4py.MPI", ("mpi4py==4.1.2", "mpich==5.0.2", "numpy>=2.0"))


def last_lines(text: str, count: int = 5) -> str:
    r"""Return the end of a program's output.

    >>> last_lines("a\nb\n\n", 1)
    'b'
    """
    return "\n".join([line for line in text.splitlines() if line.strip()][-count:])
