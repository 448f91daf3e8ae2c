"""The machine: what it is, what runs on it, and how fast its memory copies."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

# Of variables that change how threads work.
_PREFIXES = ("OMP_", "GOMP_", "KMP_", "MKL_", "MXNET_")
ROOT = Path(__file__).resolve().parents[2]


class Copy:
    """One large ``copy_`` of torch with its default threads, as the STREAM benchmark's Copy.

    Args:
        nbytes: of the source; several times the processor's cache.
    """

    def __init__(self, nbytes: int) -> None:
        self._source = torch.ones(nbytes // 4)
        self._target = torch.zeros(nbytes // 4)
        # As STREAM counts: each byte is read once and written once.
        self.moved_nbytes = 2 * self._source.nbytes

    def time(self, verb: str = "copy", calls: int = 1) -> float:
        """Return the seconds of one copy, whatever others are timed at."""
        del verb, calls
        start = perf_counter()
        self._target.copy_(self._source)
        return perf_counter() - start


def describe() -> dict[str, Any]:
    """Return what the machine is, apart from its load."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_nbytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "torch_threads": torch.get_num_threads(),
        "environment": {name: text for name, text in sorted(os.environ.items()) if name.startswith(_PREFIXES)},
    }


def available_nbytes() -> int:
    """Return how much memory programs can still take without anything being swapped out."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def file_system(path: str) -> str:
    """Return the type of the file system that a folder is on. Linux only; elsewhere it is unknown."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return "unknown"
    under = [(len(where), kind) for where, kind in mounts if Path(path).resolve().is_relative_to(where)]
    return max(under, default=(0, "unknown"))[1]


def load() -> list[float]:
    """Return the load average of the last 1, 5 and 15 minutes."""
    return [round(each, 2) for each in os.getloadavg()]


def versions() -> dict[str, str]:
    """Return the versions of Python and of what is measured in this process."""
    found = {"python": platform.python_version()}
    for package in ("tensorkv", "torch", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def git_revision() -> str | None:
    """Return the commit of this checkout, with ``+changes`` if ``src`` differs from it; None outside of git."""
    git = shutil.which("git")
    if git is None:
        return None
    asked = [git, "--no-optional-locks", "-C", str(ROOT)]
    head = subprocess.run([*asked, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return None
    changed = subprocess.run([*asked, "diff", "--quiet", "HEAD", "--", "src"], capture_output=True)
    return head.stdout.strip() + ("+changes" if changed.returncode else "")


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
