"""Compressed gradients between workers: every worker gets the words of all, and sums what they stand for.

Nothing but words travels between hosts: each host makes the same sums and the same updates, so that values need not
come back, and the optimizer's state is on every host as long as gradients are compressed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import torch

from tensorkv.arrays import interop
from tensorkv.compression import Compressor, Floats, Owed, Sending, Source
from tensorkv.engines.transport.segment import aligned
from tensorkv.shard import reduce
from tensorkv.shard.entry import Entry

from .chain import Chain
from .group import ProcessGroup


def encode(
    compressor: Compressor, verb: str, rank: int, entries: Sequence[Entry], groups: Sequence[Sequence[Any]]
) -> list[Sending]:
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
    sendings = []
    for entry, group in zip(entries, groups, strict=True):
        whole = group[0]
        if len(group) > 1 and all(isinstance(part, torch.Tensor) for part in group):
            whole = torch.empty(entry.spec.shape, dtype=interop.accumulator(entry.spec.dtype), device="cpu")
            with torch.no_grad():
                reduce.sum_into(whole, group)
        sendings.append(compressor.encode(verb, (entry.key, rank), whole))
    return sendings


def exchange(
    compressor: Compressor,
    group: ProcessGroup,
    shapes: Sequence[Sequence[int]],
    sendings: Sequence[Sending] | None,
    counts: Sequence[int],
    memory: dict[tuple[int, ...], Floats],
) -> tuple[list[torch.Tensor], np.ndarray[Any, np.dtype[np.int64]]]:
    """Return the sums of all workers' gradients, added in the order of ranks, and of how many parts each is.

    Args:
        compressor: of this worker; all have the same codec.
        group: of all workers, which call this together.
        shapes: of the keys.
        sendings: of this worker (None: it has left).
        counts: how many parts this worker has of each key.
        memory: for the sums, kept by the caller from call to call.
    """
    codec = compressor.codec
    sizes = [0 if codec is None else codec.nbytes(shape) for shape in shapes]
    head = aligned(8 * len(shapes))
    starts = np.cumsum([head, *map(aligned, sizes)]).tolist()
    # One byte more, so that a worker that is here sends something.
    mine = np.zeros(0 if sendings is None else starts[-1] + 1, np.uint8)
    if sendings is not None:
        mine[: 8 * len(shapes)].view(np.int64)[:] = counts
        for start, size, each in zip(starts, sizes, sendings, strict=False):
            mine[start : start + size] = each.words
    found = [each.numpy() for each in group.all_gather(torch.from_numpy(mine))]
    present = [each for each in found if len(each)]
    total = np.sum([each[: 8 * len(shapes)].view(np.int64) for each in present], axis=0)
    sums = []
    for place, (shape, start, size) in enumerate(zip(shapes, starts, sizes, strict=False)):
        whole = memory.get((place, *shape))
        if whole is None:
            whole = memory[(place, *shape)] = np.empty(shape, np.float32)
        compressor.decode_sum([words[start : start + size] for words in present], whole)
        sums.append(torch.from_numpy(whole))
    return sums, total


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
            entry.is_new = is_new
            entry.state = {
                name: torch.empty(shape, dtype=getattr(torch, dtype), device="cpu")
                for name, (dtype, shape) in names.items()
            }
        for name in names:
            flat = entry.state[name].contiguous().view(-1).view(torch.uint8)
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


def own_owed(owed: Mapping[Source, Owed], rank: int, size: int) -> dict[Source, Owed]:
    """Return what one of some workers owes of what workers owed when a checkpoint was saved, perhaps more of them.

    Each goes on with its own; rank 0 also owes what those owe that are no longer there.
    """
    found = {(key, worker): each for (key, worker), each in owed.items() if worker == rank}
    for (key, worker), each in owed.items() if rank == 0 else ():
        if worker >= size:
            before = found.get((key, 0))
            residual = each.residual if before is None else np.asarray(before.residual + each.residual)
            found[key, 0] = Owed(residual, {} if before is None else before.memory)
    return found
