"""Rows between workers: every worker gets what all have pushed, in the order of ranks, and updates its own rows."""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch

from tensorkv import errors
from tensorkv.arrays import interop, rows
from tensorkv.arrays.arguments import Key
from tensorkv.arrays.packing import flat_bytes
from tensorkv.arrays.rowinit import RowInit
from tensorkv.arrays.rows import Rows
from tensorkv.errors import WorkerError, quote
from tensorkv.shard.entry import Entry
from tensorkv.shard.rules import Rule
from tensorkv.shard.table import Table

from .group import ProcessGroup
from .schedule import PartitionedEntry


def gather(group: ProcessGroup, entry: Entry, mine: Sequence[Rows], divisor: int) -> Rows:
    """Return the sum of every rank's rows, added in the order of ranks and parts, divided, in the value's dtype.

    Args:
        group: of all workers.
        entry: of the key.
        mine: this worker's parts. They travel as they are, since to merge them first would round otherwise.
        divisor: of the sum.
    """
    shape, wide = entry.spec.shape, interop.accumulator(entry.spec.dtype)
    ids = torch.cat([part.ids.cpu() for part in mine])
    values = torch.cat([part.values.cpu().to(wide) for part in mine])
    found_ids = group.all_gather(ids)
    found_values = group.all_gather(flat_bytes(values))
    parts = [
        Rows(own, each.clone().view(wide).view(len(own), *shape[1:]), shape[0])
        for own, each in zip(found_ids, found_values, strict=True)
    ]
    return rows.merge(parts, entry.spec.dtype, divisor=divisor)


def no_rows(entry: Entry) -> Rows:
    """Return no rows of a value, for a worker that has left."""
    shape = entry.spec.shape
    return Rows(
        torch.empty(0, dtype=torch.int64, device="cpu"),
        torch.empty(0, *shape[1:], dtype=entry.spec.dtype, device="cpu"),
        shape[0],
    )


def apply(rule: Rule, entry: Entry, value: PartitionedEntry, owner: int, merged: Rows) -> None:
    """Update those rows of a dense value that this worker owns."""
    low, high = value.borders[owner], value.borders[owner + 1]
    chosen = (merged.ids >= low) & (merged.ids < high)
    version = entry.version
    if high > low:
        rule.apply_rows(entry, Rows(merged.ids[chosen] - low, merged.values[chosen], high - low))
    entry.version = version + 1


def copy_rows(group: ProcessGroup, value: PartitionedEntry, ids: torch.Tensor, source: int, writes: bool) -> None:
    """Copy rows of a dense value from one rank to the hosts that do not update it."""
    signed = interop.signed(value.whole)
    mine = flat_bytes(signed[ids]) if group.rank == source else torch.empty(0, dtype=torch.uint8, device="cpu")
    found = group.all_gather(mine)[source]
    if writes:
        signed[ids] = found.clone().view(signed.dtype).view(len(ids), *signed.shape[1:])


def first_table(group: ProcessGroup, key: Key, value: Rows) -> Table:
    """Return a table with rank 0's rows and rank 0's rule for the others."""
    merged = rows.merge([value], may_share=True)
    first = group.rank == 0
    told = group.all_gather_json(None if value.init is None else value.init.to_json())[0]
    init = None if told is None else RowInit.from_json(told)
    ids = group.all_gather(merged.ids.cpu() if first else torch.empty(0, dtype=torch.int64, device="cpu"))[0]
    sent = flat_bytes(merged.values.cpu()) if first else torch.empty(0, dtype=torch.uint8, device="cpu")
    values = group.all_gather(sent)[0].clone().view(merged.values.dtype)
    held = Rows(ids, values.view(len(ids), *merged.values.shape[1:]), value.num_rows, init=init)
    return Table.of(held, "cpu", key)


def raised_elsewhere(rank: int, key: Key, kind: str, message: str) -> Exception:
    """Return what another worker's updater raised: of the same kind if Python or this package can make it."""
    made: Any = getattr(builtins, kind, None) or getattr(errors, kind, None)
    if isinstance(made, type) and issubclass(made, Exception) and not issubclass(made, OSError | UnicodeError):
        # Some types, such as ExceptionGroup, are not made of a message alone.
        with suppress(Exception):
            error: Exception = made(message)
            error.add_note(f"raised by the updater of {quote(key)} on rank {rank}")
            return error
    return WorkerError(f"the updater of {quote(key)} raised on rank {rank}: {kind}: {message}")
