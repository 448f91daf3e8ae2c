"""Memory: what a push adds to the peak of a process, beyond the values, the parts and the optimizer's state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compare import WARM_UP_CALLS, progress
from machine import available_nbytes
from peers import ProcessPeer
from works import Rule, Work

# Of 1 GB of values each, in 4 parts.
_SHAPES = ((1, 262_144_000), (4000, 65_536))
_QUICK_SHAPES = ((1, 262_144), (8, 4096))
# MXNet holds a copy of each part, too.
_NEEDED_NBYTES = 14e9


class TooLittleMemoryError(Exception):
    """What is to be measured does not fit into this machine."""


def measure(mxnet_python: str | None, *, quick: bool) -> list[dict[str, Any]]:
    """Return for each work and contender the bytes held before, the state, and what pushes add to the peak.

    Args:
        mxnet_python: an interpreter that has MXNet (None: leave MXNet out).
        quick: tiny sizes.

    Raises:
        TooLittleMemoryError: this machine cannot hold it.
    """
    if not quick and available_nbytes() < _NEEDED_NBYTES:
        raise TooLittleMemoryError(
            f"{available_nbytes() / 1e9:.1f} GB of memory are free; {_NEEDED_NBYTES / 1e9:.0f} GB are needed"
        )
    rules: tuple[Rule, ...] = ("assign",) if quick else ("assign", "sgd")
    works = [
        Work(keys, (elements,), 4, rule) for keys, elements in (_QUICK_SHAPES if quick else _SHAPES) for rule in rules
    ]
    names: Sequence[tuple[str, str | None]] = [("tensorkv", None), ("torch", None)]
    if mxnet_python is not None:
        names = [*names, ("mxnet", mxnet_python)]
    return [measure_one(work, name, python) for work in works for name, python in names]


def measure_one(work: Work, name: str, python: str | None) -> dict[str, Any]:
    """Return what ``measure`` does, of one contender with one work."""
    progress(f"memory, {work.name}: {name}")
    peer = ProcessPeer(name, python) if python else ProcessPeer(name)
    try:
        peer.build(work)
        before = peer.memory()
        # As often as it takes for every way of doing it to have been gone.
        for _ in range(WARM_UP_CALLS):
            peer.time("push")
        after = peer.memory()
    finally:
        peer.end()
    state = work.value_nbytes if work.rule == "sgd" else 0
    return {
        "work": work.name,
        "who": name,
        "value_nbytes": work.value_nbytes,
        "before_nbytes": before["rss"],
        "state_nbytes": state,
        "added_nbytes": after["peak"] - before["rss"] - state,
        "peak_nbytes": after["peak"],
        "settled_nbytes": after["rss"],
    }
