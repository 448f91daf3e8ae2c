"""Entry: what a shard holds of one key; Batch: the work that one call brings to a shard."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tensorkv.arrays import interop, rows
from tensorkv.arrays.arguments import Key
from tensorkv.arrays.packing import encode_slots
from tensorkv.arrays.rows import Rows
from tensorkv.arrays.slices import Slices
from tensorkv.arrays.spec import KeySpec, numbered
from tensorkv.errors import ArgumentError, quote

from .native import Cell
from .optimizers import State
from .table import Table

Part = torch.Tensor | Rows


class Entry(Cell):
    """What a shard holds of one key.

    Args:
        key, spec: of the key.
        value: a tensor, or the rows of a table.
        version: how many updates the key has had.
        state: of the optimizer, by name.
    """

    __slots__ = ("key", "ready", "slot", "spare")

    def __init__(
        self, key: Key, spec: KeySpec, value: torch.Tensor | Table, version: int = 0, state: State | None = None
    ) -> None:
        super().__init__()
        self.key, self.spec = key, spec
        self.value: torch.Tensor | Table = value
        self.version = version
        if state is not None:
            self.state = state
        self.slot: str | None = None
        """What ``slots_of`` has returned of the key."""
        self.ready: Any = None
        """On CUDA: the moment when the last work on the value is done, for callers on other streams."""
        self.spare: Any = None
        """Memory for the value when it next changes while a snapshot holds it."""

    def freeze(self) -> FrozenEntry:
        """Return what one more snapshot holds of the key as it is now."""
        if self.frozen is None:
            self.frozen = FrozenEntry(self)
        found: FrozenEntry = self.frozen
        found.holders += 1
        return found

    def copy(
        self, *, spec: KeySpec | None = None, value: torch.Tensor | Table | None = None, state: State | None = None
    ) -> Entry:
        """Return an entry that shares what is not given with this one."""
        return Entry(
            self.key,
            self.spec if spec is None else spec,
            self.value if value is None else value,
            self.version,
            self.state if state is None else state,
        )

    @property
    def tensor(self) -> torch.Tensor:
        """The value of a dense key."""
        return self.value  # type: ignore[return-value]

    def dense(self, part: Part) -> torch.Tensor:
        """Return a part as a dense tensor."""
        # In the dtype that sums are made in, so that rows are not rounded before the sum is.
        return part.to_dense(interop.accumulator(self.spec.dtype)) if isinstance(part, Rows) else part

    def merged(self, parts: Sequence[Any], divisor: int = 1) -> Rows:
        """Return the sum of parts that are all Rows, divided, or the only part, on the value's device, in its dtype."""
        device = self.value.device
        moved = [part if part.values.device == device else part.to(device) for part in parts]
        return rows.merge(moved, self.value.dtype, may_share=True, divisor=divisor)

    def read_rows(self, ids: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return copies of rows in the order of ``ids``, in contiguous memory of the value's dtype if it is given."""
        if isinstance(self.value, Table):
            return self.value.read(ids, out=out)
        rows = interop.signed(self.value)[ids].view(self.value.dtype)
        return rows if out is None else out.copy_(rows)

    def write_rows(self, rows: Rows) -> None:
        """Replace the rows that ``rows`` (merged, of the value's dtype) names."""
        if isinstance(self.value, Table):
            self.value.write(rows.ids, rows.values)
        else:
            interop.signed(self.value)[rows.ids] = interop.signed(rows.values)

    def move(self, device: torch.device) -> None:
        """Bring the value to a device, and its state but for counts of steps, which torch keeps on the CPU."""
        self.value, self.spare = self.value.to(device), None
        for name, tensor in self.state.items():
            if tensor.ndim or tensor.shape == self.spec.shape:
                self.state[name] = tensor.to(device)

    def info(self) -> KeyInfo:
        """Describe the key."""
        return KeyInfo.of(self.spec, str(self.value.device), self.version, self.value.nbytes)


def slots_of(entries: Sequence[Entry]) -> list[str]:
    """Return what a layout says of the sum of each of some dense keys."""
    new = [entry for entry in entries if entry.slot is None]
    if new:
        specs, numbers = numbered([entry.spec for entry in new])
        slots = encode_slots([entry.key for entry in new], [("sum", each.dtype, each.shape) for each in specs], numbers)
        for entry, slot in zip(new, slots, strict=True):
            entry.slot = slot
    return [entry.slot for entry in entries]  # type: ignore[misc]


def check_complete(verb: str, entries: Iterable[Entry]) -> None:
    """Raise IncompleteValueError if slices of a push of a value have come and others are missing."""
    for entry in entries:
        if entry.incomplete is not None:
            raise entry.incomplete.incomplete_error(f"{verb}({quote(entry.key)})")


class FrozenEntry(Entry):
    """What snapshots hold of a key: the value that another entry has, or had until that was about to change.

    Args:
        source: the other entry.
    """

    __slots__ = ("content_digest", "holders", "note", "source")

    def __init__(self, source: Entry) -> None:
        super().__init__(source.key, source.spec, source.value, source.version)
        self.source, self.ready = source, source.ready
        self.holders = 0
        """How many snapshots hold it."""
        self.note: Any = None
        """What the shard has noted of the key, under the key's JSON."""
        self.content_digest: int | None = None
        """Of the value, once it was asked for."""

    def release(self) -> bool:
        """Let one snapshot go, and return whether it was the last one of a value that has not changed since.

        After the last one, memory that the source has left to snapshots is for its next change.
        """
        self.holders -= 1
        if self.holders:
            return False
        if self.source.frozen is self:
            self.source.frozen = None
            return True
        # Memory of a GPU may still be read by work that was queued.
        if isinstance(self.value, torch.Tensor) and self.value.is_cpu and self.source.value.device == self.value.device:
            self.source.spare = self.value
        return False


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """What ``KVStore.info`` tells of a key.

    Args:
        shape: of the value.
        dtype: name such as ``"float32"``.
        device: where the value lives, such as ``"cpu"``.
        version: how many updates the key has had.
        nbytes: bytes that the value holds (of a sparse table, the rows it has seen).
        kind: ``"dense"``, or ``"rows"`` for a sparse table.
    """

    shape: tuple[int, ...]
    dtype: str
    device: str
    version: int
    nbytes: int
    kind: str

    @classmethod
    def of(cls, spec: KeySpec, device: str, version: int, nbytes: int) -> KeyInfo:
        """Make it of what a key was initialised with, and what its value is by now."""
        kind = "rows" if spec.is_table else "dense"
        return cls(tuple(spec.shape), interop.dtype_name(spec.dtype), device, version, nbytes, kind)


@dataclass(slots=True)
class Batch:
    """One call's work.

    Args:
        verb: that the user called.
        keys: each once.
        parts: of each key: tensors and Rows, or one that is Slices.
        counts: of how many parts together the parts of each key are the sums (None: each is one).
    """

    verb: str
    keys: list[Key]
    parts: list[list[Any]]
    counts: Sequence[int] | None = None

    @property
    def has_slices(self) -> bool:
        """Whether a key has slices of its value."""
        return any(isinstance(parts[0], Slices) for parts in self.parts)

    def refuse_slices(self, why: str) -> None:
        """Raise ArgumentError if a key has slices of its value; ``why`` ends the message "slices of a value ..."."""
        for key, parts in zip(self.keys, self.parts, strict=True):
            if isinstance(parts[0], Slices):
                raise ArgumentError(f"{self.name(key)}: slices of a value {why}")

    def divisors(self, averages: bool) -> Sequence[int]:
        """Return by what the sum of each key is divided: 1, or for a mean the number of its parts."""
        if not averages:
            return [1] * len(self.keys)
        return [len(parts) for parts in self.parts] if self.counts is None else self.counts

    def name(self, key: Key, part: int | None = None) -> str:
        """Return how messages begin: ``push("w"): part 1``."""
        return f"{self.verb}({quote(key)})" + ("" if part is None else f": part {part}")
