"""Memory: what a push adds to the peak of a process, beyond the values, the parts and the optimizer's state."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common.launch import alone
from benchmarks.common.machine import available_nbytes
from benchmarks.common.report import nbytes_text, section
from benchmarks.common.runner import progress
from benchmarks.common.work import Rule, Work
from benchmarks.local.contenders import NAMES

# Of 1 GB of values each, in 4 parts.
_SHAPES = ((1, 262_144_000), (4000, 65_536))
_QUICK_SHAPES = ((1, 262_144), (8, 4096))
# MXNet holds a copy of each part, too.
_NEEDED_NBYTES = 14e9
_CLASSES = {"tensorkv": "TensorKV", "torch": "PlainTorch", "numpy": "PlainNumPy", "mxnet": "MXNet"}


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
    rules: tuple[Rule, ...] = ("assign",) if quick else ("assign", "momentum")
    works = [
        Work(keys, (elements,), 4, rule) for keys, elements in (_QUICK_SHAPES if quick else _SHAPES) for rule in rules
    ]
    contenders = {"tensorkv": sys.executable, "torch": sys.executable}
    if mxnet_python is not None:
        contenders["mxnet"] = mxnet_python
    return [measure_one(work, name, python) for work in works for name, python in contenders.items()]


def measure_one(work: Work, name: str, python: str = sys.executable) -> dict[str, Any]:
    """Return what ``measure`` does, of one contender with one work."""
    progress(f"memory, {work.name}: {name}")
    team = alone(name, f"benchmarks.local.contenders:{_CLASSES[name]}", python)
    try:
        team.build(work)
        [before] = team.ask("memory")
        # As often as it takes to go through every way of doing it.
        for _ in range(work.warm_up):
            team.time("push")
        [after] = team.ask("memory")
    finally:
        team.end()
    state = work.value_nbytes if work.rule == "momentum" else 0
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


def section_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the section of the report."""
    cells = []
    for row in rows:
        found = [nbytes_text(row[each]) for each in ("before_nbytes", "state_nbytes", "added_nbytes")]
        cells.append([row["work"], NAMES[row["who"]], *found, f"{row['added_nbytes'] / row['value_nbytes']:.2f}"])
    return section(
        "Memory of a push",
        "Of a process of its own. Before: what is resident before the first push, that is values, parts and the "
        "libraries. State: the optimizer's momentum. Added: the peak during some pushes, less the two.",
        ["work", "who", "before", "state", "added", "added ÷ values"],
        cells,
    )
