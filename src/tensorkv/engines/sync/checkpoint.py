"""Checkpoints of a dist_sync store, written by the workers of a host in parallel, under one manifest.

The format is that of every store: what four ranks have saved, three can load, or a local store.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from tensorkv.arrays import interop
from tensorkv.arrays.arguments import Key
from tensorkv.errors import CheckpointError
from tensorkv.shard.entry import Entry
from tensorkv.shard.shard import Shard
from tensorkv.storage import checkpoint, manifest
from tensorkv.storage.manifest import Contents, Kind, Tensors
from tensorkv.transport.segment import aligned

from .chain import Chain
from .group import ProcessGroup
from .host import HostGroup
from .schedule import PartitionedValue

# File numbers that each writer has for itself.
_FILES = 1000


def save(
    group: ProcessGroup,
    host: HostGroup,
    chain: Chain,
    shard: Shard,
    values: Mapping[Key, PartitionedValue],
    path: str,
    kind: Kind,
) -> None:
    """Write what the workers hold; the host that updates values writes.

    Raises:
        CheckpointError: on every worker, if one cannot write; the old checkpoint is in force then.
    """
    writes, leads = chain.is_last, chain.is_last and host.local_rank == 0
    with shard.frozen() as (entries, rule), ExitStack() as stack:
        whole = _whole_entries(group, host, writes, entries, values)

        def start() -> str:
            token = secrets.token_hex(8)
            stack.enter_context(checkpoint.writing(path, token))
            return token

        token = next(each for each in _on_all_ranks(group, start if leads else None) if each)
        body, tensors = manifest.describe(kind, whole, rule) if writes else ({}, {})
        mine = _share_of(tensors, host.local_rank, host.size) if writes else {}
        files = _on_all_ranks(
            group, lambda: checkpoint.write_files(path, token, host.local_rank * _FILES, mine) if writes else []
        )

        def publish() -> None:
            listed = [file for own in files if own for file in own]
            checkpoint.publish(path, token, {**body, "files": listed})

        _on_all_ranks(group, publish if leads else None)


def _on_all_ranks(group: ProcessGroup, do: Callable[[], Any] | None) -> list[Any]:
    """Do something and return what every rank's returned; raise on every rank what one has raised."""
    error: Exception | None = None
    said: Any = None
    try:
        said = None if do is None else do()
    except CheckpointError as caught:
        error = caught
    answers = group.all_gather_json([said, None if error is None else str(error)])
    if error is not None:
        raise error
    for rank, (_, problem) in enumerate(answers):
        if problem is not None:
            raise CheckpointError(f"rank {rank}: {problem}")
    return [answer for answer, _ in answers]


def _whole_entries(
    group: ProcessGroup,
    host: HostGroup,
    writes: bool,
    entries: Sequence[Entry],
    values: Mapping[Key, PartitionedValue],
) -> list[Entry]:
    """Return entries with whole values and whole state, which the host's workers put together in shared memory."""
    mine = {}
    for index, entry in enumerate(entries):
        if entry.key in values and entry.state and writes:
            mine[index] = {name: [interop.dtype_name(each.dtype), each.shape] for name, each in entry.state.items()}
    found: dict[int, dict[str, list[Any]]] = {}
    for own in _on_all_ranks(group, lambda: mine):
        for index, names in own.items():
            found.setdefault(int(index), {}).update(names)
    places, nbytes = _places(entries, values, found)
    if not writes:
        return list(entries)
    memory = host.allocate(nbytes) if places else None
    states: dict[int, dict[str, torch.Tensor]] = {}
    for index, name, dtype, shape, offset in places:
        whole = memory.tensor(offset, shape, dtype)  # type: ignore[union-attr]
        states.setdefault(index, {})[name] = whole
        own = entries[index].state.get(name)
        if own is not None:
            _part_of(whole, values[entries[index].key], host.local_rank).copy_(own)
    host.barrier()
    return [
        replace(entry, value=values[entry.key].value, state=states.get(index, {})) if entry.key in values else entry
        for index, entry in enumerate(entries)
    ]


def _places(
    entries: Sequence[Entry], values: Mapping[Key, PartitionedValue], found: Mapping[int, Mapping[str, list[Any]]]
) -> tuple[list[tuple[int, str, torch.dtype, torch.Size, int]], int]:
    """Return where each state tensor is to lie, whole, and how many bytes all take."""
    places, at = [], 0
    for index, names in sorted(found.items()):
        whole = values[entries[index].key]
        for name, (dtype_name, own_shape) in names.items():
            dtype, shape = getattr(torch, dtype_name), torch.Size(own_shape)
            if _is_divided(whole) and len(shape) == whole.value.ndim:
                shape = whole.value.shape
            places.append((index, name, dtype, shape, at))
            at += aligned(shape.numel() * dtype.itemsize)
    return places, at


def _is_divided(value: PartitionedValue) -> bool:
    """Tell whether several owners update a value; only optimizers that treat each element alone allow it."""
    rows = value.borders[-1]
    return rows not in [high - low for low, high in pairwise(value.borders)]


def _part_of(whole: torch.Tensor, value: PartitionedValue, owner: int) -> torch.Tensor:
    if not _is_divided(value) or whole.shape != value.value.shape:
        return whole
    return whole[value.borders[owner] : value.borders[owner + 1]]


def _share_of(tensors: Tensors, worker: int, workers: int) -> Tensors:
    """Return a worker's share of the tensors, about equal in bytes."""
    total = sum(tensor.nbytes for tensor in tensors.values())
    mine: Tensors = {}
    at = 0
    for name, tensor in tensors.items():
        if min(workers - 1, at * workers // max(1, total)) == worker:
            mine[name] = tensor
        at += tensor.nbytes
    return mine


def read(group: ProcessGroup, shard: Shard, path: str, kind: Kind) -> Contents:
    """Read a checkpoint on every worker and check that it fits.

    Raises:
        CheckpointError: on every worker, if it does not on one.
    """
    found: list[Contents] = []

    def look() -> None:
        contents = checkpoint.read(path)
        if contents.kind != kind:
            raise CheckpointError(f"{path}: holds {contents.kind}, expected {kind}; save and load with the same pair")
        with shard.frozen() as (entries, _):
            if kind == "optimizer-states":
                manifest.check_held(contents, {entry.key: entry for entry in entries})
        manifest.check_states(contents)
        found.append(contents)

    _on_all_ranks(group, look)
    return found[0]


def own_state(saved: Entry, value: PartitionedValue, owner: int) -> dict[str, torch.Tensor]:
    """Return what an owner keeps of a whole key's state."""
    if value.borders[owner] == value.borders[owner + 1]:
        return {}
    return {name: _part_of(each, value, owner).clone() for name, each in saved.state.items()}
