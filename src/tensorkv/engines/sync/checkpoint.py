"""Checkpoints of a dist_sync store, written by the workers of a host in parallel, under one manifest.

The format is that of every store: what four ranks have saved, three can load, or a local store.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from tensorkv.arrays import interop
from tensorkv.arrays.arguments import Key
from tensorkv.arrays.packing import decode_layout, encode_layout
from tensorkv.compression import Compressor
from tensorkv.engines.base import refuse_releases
from tensorkv.engines.partition import part_of
from tensorkv.engines.transport.segment import aligned
from tensorkv.errors import CheckpointError
from tensorkv.shard.entry import Entry
from tensorkv.shard.optimizers import State
from tensorkv.shard.shard import Shard
from tensorkv.storage import checkpoint, manifest
from tensorkv.storage.manifest import Contents, Kind, Tensors

from . import coded
from .chain import Chain
from .desync import name_ranks
from .group import ProcessGroup
from .host import HostGroup
from .schedule import PartitionedEntry

_ONE_DIRECTORY = (
    "all workers load from one directory: move the checkpoint to a file system that all hosts share, and give its path "
    "there"
)
# File numbers that each writer has for itself; names have room for five digits.
_FILES, _ALL_FILES = 1000, 100_000


class ShardedCheckpoint:
    """Gathers values and optimizer state from the workers. All workers call each method together, but for ``check``.

    Args:
        group, host, chain: of this worker.
        shard: of this worker.
        values: of dense keys, and who owns which part of them.
        compressor: of this worker's gradients.
    """

    def __init__(
        self,
        group: ProcessGroup,
        host: HostGroup,
        chain: Chain,
        shard: Shard,
        values: Mapping[Key, PartitionedEntry],
        compressor: Compressor,
    ) -> None:
        self._group, self._host, self._chain, self._shard, self._values = group, host, chain, shard, values
        self._compressor = compressor

    def save(self, path: str, kind: Kind) -> None:
        """Write what the workers hold; the host that updates values writes.

        Raises:
            CheckpointError: on every worker, if one cannot write; the old checkpoint is in force then.
        """
        host, writes = self._host, self._chain.is_last
        leads = writes and host.local_rank == 0
        contents = self.gather(everywhere=False)
        with ExitStack() as stack:

            def start() -> str:
                token = secrets.token_hex(8)
                stack.enter_context(checkpoint.writing(path, token))
                return token

            token = next(each for each in self._on_all_ranks(start if leads else None) if each)
            body, tensors = (
                manifest.describe(kind, contents.entries, contents.rule, contents.owed) if writes else ({}, {})
            )
            num_writers = min(host.size, _ALL_FILES // _FILES)
            mine = _share_of(tensors, host.local_rank, num_writers) if writes else {}
            files = self._on_all_ranks(
                lambda: checkpoint.write_files(path, token, host.local_rank * _FILES, mine) if writes else []
            )

            def publish() -> None:
                listed = [file for own in files if own for file in own]
                checkpoint.publish(path, token, {**body, "files": listed})

            self._on_all_ranks(publish if leads else None)

    def is_missing(self, path: str) -> bool:
        """Return whether no worker finds anything that was saved.

        Raises:
            CheckpointError: on every worker, if some find a checkpoint and others do not.
        """
        answers = self._group.all_gather_json(checkpoint.is_missing(path))
        there, missing = ([rank for rank, each in enumerate(answers) if each is which] for which in (False, True))
        if there and missing:
            raise CheckpointError(
                f"{path}: a checkpoint is there on {name_ranks(there)}, and none on {name_ranks(missing)}; "
                f"{_ONE_DIRECTORY}"
            )
        return not there

    def read(self, path: str, kind: Kind) -> Contents:
        """Read a checkpoint on every worker and check that it fits.

        Raises:
            CheckpointError: on every worker, if it does not on one, or if they have read different ones.
        """
        found: list[Contents] = []

        def read() -> str | None:
            found.append(checkpoint.read(path, kind))
            self.check(found[0])
            return found[0].digest

        digests = self._on_all_ranks(read)
        others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if others:
            raise CheckpointError(
                f"{path}: {name_ranks(others)} found another checkpoint there than rank 0; {_ONE_DIRECTORY}; if "
                "another program saves to that directory now, load when it has done so"
            )
        return found[0]

    def check(self, contents: Contents) -> None:
        """Raise CheckpointError if contents do not fit what this worker holds."""
        refuse_releases(contents)
        with self._shard.frozen() as (entries, _):
            manifest.check_fits(contents, {entry.key: entry for entry in entries})

    def _on_all_ranks(self, do: Callable[[], Any] | None) -> list[Any]:
        """Do something and return what every rank's returned; raise on every rank what one has raised."""
        error: Exception | None = None
        said: Any = None
        try:
            said = None if do is None else do()
        except CheckpointError as caught:
            error = caught
        answers = self._group.all_gather_json([said, None if error is None else str(error)])
        if error is not None:
            raise error
        for rank, (_, problem) in enumerate(answers):
            if problem is not None:
                raise CheckpointError(f"rank {rank}: {problem}")
        return [answer for answer, _ in answers]

    # ------------------------------------------------------------ values and state of all workers

    def gather(self, *, everywhere: bool) -> Contents:
        """Return whole values and whole state, which the workers of a host put together in shared memory.

        Args:
            everywhere: whether the workers of every host need the state; otherwise only those of the last host,
                which updates values, have it.
        """
        host, is_last = self._host, self._chain.is_last
        owed = coded.gather_owed(self._group, self._compressor.owed)
        with self._shard.frozen() as (entries, rule):
            mine = {}
            for index, entry in enumerate(entries):
                if entry.key in self._values and entry.state and is_last:
                    mine[index] = {name: [interop.dtype_name(t.dtype), t.shape] for name, t in entry.state.items()}
            found: dict[int, dict[str, list[Any]]] = {}
            for own in self._on_all_ranks(lambda: mine):
                for index, names in own.items():
                    found.setdefault(int(index), {}).update(names)
            places, nbytes = self._places(entries, found)
            if not (is_last or everywhere):
                return Contents("store", entries, rule)
            memory = host.allocate(nbytes) if places else None
            states: dict[int, dict[str, torch.Tensor]] = {}
            for index, name, dtype, shape, offset in places:
                whole = memory.tensor(offset, shape, dtype)  # type: ignore[union-attr]
                states.setdefault(index, {})[name] = whole
                if name in mine.get(index, {}):
                    _part(whole, self._values[entries[index].key], self._chain.owner).copy_(entries[index].state[name])
            host.barrier()
            if everywhere and memory is not None:
                self._chain.broadcast([memory.bytes_at(0, nbytes)], from_last=True)
                host.barrier()
            return Contents(
                "store",
                [
                    each.copy(value=self._values[each.key].whole, state=states.get(index, {}))
                    if each.key in self._values
                    else each
                    for index, each in enumerate(entries)
                ],
                rule,
                owed,
            )

    def _places(
        self, entries: list[Entry], found: Mapping[int, Mapping[str, list[Any]]]
    ) -> tuple[list[tuple[int, str, torch.dtype, torch.Size, int]], int]:
        """Return where each state tensor is to lie, whole, and how many bytes all take."""
        places, at = [], 0
        for index, names in sorted(found.items()):
            entry = self._values[entries[index].key]
            for name, (dtype_name, own_shape) in names.items():
                dtype, shape = getattr(torch, dtype_name), torch.Size(own_shape)
                if _is_divided(entry) and len(shape) == entry.whole.ndim:
                    shape = entry.whole.shape
                places.append((index, name, dtype, shape, at))
                at += aligned(shape.numel() * dtype.itemsize)
        return places, at

    def broadcast(self, contents: Contents) -> Contents:
        """Return rank 0's contents on every worker, in shared memory; new arrays are like this worker's own."""
        is_first = self._group.rank == 0
        body, tensors = manifest.describe(contents.kind, contents.entries, contents.rule, contents.owed)
        layout = encode_layout((name, "tensor", each.dtype, each.shape) for name, each in tensors.items())
        body, told = self._group.all_gather_json([body, layout.decode()] if is_first else None)[0]
        slots = decode_layout(told.encode())
        memory = self._host.allocate(slots[-1].stop if slots else 1)
        tensors_here = {str(slot.key): memory.tensor(slot.start, slot.shape, slot.dtype) for slot in slots}
        if is_first:
            for name, tensor in tensors.items():
                tensors_here[name].copy_(tensor)
        self._chain.broadcast(list(tensors_here.values()))
        self._host.barrier()
        origins = {each.key: each.spec.origin for each in contents.entries}
        found = manifest.restore(body, tensors_here)
        return replace(found, entries=[each.copy(spec=each.spec.of(origins[each.key])) for each in found.entries])


def _part(whole: torch.Tensor, value: PartitionedEntry, owner: int) -> torch.Tensor:
    """Return an owner's part of a tensor that may have the shape of the value."""
    return part_of(whole, value.whole.shape, value.borders[owner], value.borders[owner + 1])


def _is_divided(value: PartitionedEntry) -> bool:
    """Tell whether several owners update a value; only optimizers that treat each element alone allow it."""
    rows = value.borders[-1]
    return rows not in [high - low for low, high in pairwise(value.borders)]


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


def own_state(saved: Entry, value: PartitionedEntry, owner: int) -> State:
    """Return what an owner keeps of a whole key's state."""
    if value.borders[owner] == value.borders[owner + 1]:
        return {}
    return {name: _part(each, value, owner).clone() for name, each in saved.state.items()}
