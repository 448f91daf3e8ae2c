"""Compressed gradients between workers: every worker gets the words of all, and sums what they stand for.

Nothing but words travels between hosts: each host makes the same sums and the same updates, so that values need not
come back, and the optimizer's state is on every host as long as gradients are compressed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import torch

from tensorkv.arrays import interop
from tensorkv.arrays.packing import flat_bytes
from tensorkv.compression import Compressor, Owed, Sending, Source, SumMemory, Words, WordsLayout
from tensorkv.engines.partition import Numbers
from tensorkv.shard import reduce
from tensorkv.shard.entry import Entry

from .chain import Chain
from .group import ProcessGroup

# So many bytes of words go at a time.
_PART_NBYTES = 1 << 20


def encode(
    compressor: Compressor, verb: str, rank: int, entries: Sequence[Entry], groups: Sequence[Sequence[Any]]
) -> Sending:
    """Return the words of this worker's gradients, each the sum of its parts.

    Args:
        compressor: of this worker.
        verb: for messages.
        rank: of this worker.
        entries: of the keys.
        groups: of the keys, their parts.

    Raises:
        ValueMismatchError, NonFiniteError: as of ``Compressor.encode``.
    """
    totals = [reduce.unrounded(entry.spec, group) for entry, group in zip(entries, groups, strict=True)]
    return compressor.encode(verb, [(entry.key, rank) for entry in entries], totals)


def exchange(
    compressor: Compressor,
    group: ProcessGroup,
    layout: WordsLayout,
    sending: Sending | None,
    counts: Sequence[int] | Numbers,
    memory: SumMemory,
) -> tuple[list[list[torch.Tensor]], np.ndarray[Any, np.dtype[np.int64]]]:
    """Return the sums of all workers' gradients, added in the order of ranks, and of how many parts each is.

    Args:
        compressor: of this worker; all have the same codec.
        group: of all workers, which call this together.
        layout: of the words of a worker.
        sending: of this worker (None: it has left).
        counts: how many parts this worker has of each key.
        memory: for the sums, which are there until the next call.
    """
    told = group.all_gather(torch.tensor(counts if sending is not None else [], dtype=torch.int64, device="cpu"))
    present = [rank for rank, each in enumerate(told) if len(each) or not layout.shapes]
    total = np.zeros(len(layout.shapes), np.int64)
    for rank in present:
        total += told[rank].numpy()
    words = _AllWords(group, np.zeros(layout.nbytes, np.uint8) if sending is None else sending.words)
    words.begin()
    flat, sums = memory.of(layout)
    found = [words.found[rank] for rank in present]
    # What has come is summed while the rest is on its way.
    for run in layout.runs:
        words.wait_for(run.words.stop)
        layout.decode_sum(found, flat, run)
    words.wait_for(layout.nbytes)
    num_others = len(present) - (sending is not None)
    compressor.traffic.add_received(num_others * layout.nbytes, num_others * layout.raw_nbytes)
    return sums, total


class _AllWords:
    """The words of all workers, which come in parts.

    Args:
        group: of all workers.
        mine: of this worker.
    """

    def __init__(self, group: ProcessGroup, mine: Words) -> None:
        self._group, self._mine, self._nbytes = group, mine, len(mine)
        self.found = [np.empty(self._nbytes, np.uint8) for _ in range(group.size)]
        self._parts: list[tuple[int, Callable[[], None]]] = []
        self._come = 0

    def begin(self) -> None:
        """Send this worker's."""
        mine, found = torch.from_numpy(self._mine), [torch.from_numpy(each) for each in self.found]
        for start in range(0, self._nbytes, _PART_NBYTES):
            part = slice(start, min(start + _PART_NBYTES, self._nbytes))
            self._parts.append((part.stop, self._group.begin_all_gather([each[part] for each in found], mine[part])))

    def wait_for(self, stop: int) -> None:
        """Return when so many bytes of every worker's have come."""
        while self._come < stop:
            self._come, wait = self._parts.pop(0)
            wait()


def spread_states(group: ProcessGroup, chain: Chain, local_rank: int, entries: Sequence[Entry]) -> None:
    """Copy the optimizer's state, which the last host has, to the owners of the same parts on the other hosts."""
    mine: dict[int, list[Any]] = {}
    if chain.is_owner and chain.is_last:
        for index, entry in enumerate(entries):
            names = {name: [interop.dtype_name(each.dtype), each.shape] for name, each in entry.state.items()}
            mine[index] = [entry.is_new, names]
    told = group.all_gather_json(mine)[group.hosts[-1][local_rank] if chain.is_owner else 0]
    if not chain.is_owner:
        return
    for entry, (is_new, names) in zip(entries, told.values(), strict=True):
        if not chain.is_last:
            entry.state = {
                name: torch.empty(shape, dtype=getattr(torch, dtype), device="cpu")
                for name, (dtype, shape) in names.items()
            }
            entry.is_new = is_new
        for name in names:
            flat = flat_bytes(entry.state[name])
            if chain.next is not None and flat.numel():
                chain.recv(flat, chain.next)
            if chain.prev is not None and flat.numel():
                chain.isend(flat, chain.prev)
    chain.flush()


def gather_owed(group: ProcessGroup, owed: Mapping[Source, Owed]) -> dict[Source, Owed]:
    """Return what all workers owe, on every worker."""
    described = [
        [key, rank, [["", list(each.residual.shape)], *([name, list(m.shape)] for name, m in each.memory.items())]]
        for (key, rank), each in owed.items()
    ]
    arrays = [array.reshape(-1) for each in owed.values() for array in (each.residual, *each.memory.values())]
    flat = np.concatenate([np.empty(0, np.float32), *arrays])
    told = group.all_gather_json(described)
    if not any(told):
        return {}
    found: dict[Source, Owed] = {}
    for listed, values in zip(told, group.all_gather(torch.from_numpy(flat)), strict=True):
        rest = values.numpy()
        for key, rank, names in listed:
            own = {}
            for name, shape in names:
                size = prod(shape)
                own[name], rest = rest[:size].reshape(shape).copy(), rest[size:]
            found[key, rank] = Owed(own.pop(""), own)
    return found
