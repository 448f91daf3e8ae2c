"""Values on CUDA devices: where they live, and the order of work on them across streams."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from tensorkv.arrays.rows import Rows

from .entry import Entry


@contextmanager
def in_order(entries: Sequence[Entry]) -> Iterator[None]:
    """Put work on CUDA values after all earlier work on them, whatever stream the caller is on."""
    on_cuda = [entry for entry in entries if entry.value.device.type == "cuda"]
    for entry in on_cuda:
        if entry.ready is not None:
            torch.cuda.current_stream(entry.value.device).wait_event(entry.ready)
    try:
        yield
    finally:
        for entry in on_cuda:
            entry.ready = torch.cuda.current_stream(entry.value.device).record_event()


def move_to_parts(entries: Sequence[Entry], parts: Sequence[Sequence[Any]]) -> list[Entry]:
    """Bring CPU values to the GPU where their parts are, once: from then on they stay there. Return those."""
    moved = []
    for entry, key_parts in zip(entries, parts, strict=True):
        first = key_parts[0].values if isinstance(key_parts[0], Rows) else key_parts[0]
        if first.is_cuda and entry.value.device.type == "cpu":
            entry.move(first.device)
            moved.append(entry)
    return moved
