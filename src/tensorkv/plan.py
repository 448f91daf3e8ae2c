"""Plans: calls that name the same many small keys again and again, done on a few flat arrays.

For small keys the price is per array, not per byte. A plan keeps the values of its keys side by side in
flat chunks, checks the arrays of a call by whole lists, and gathers and scatters each chunk in one call of
NumPy or torch. Whatever is out of the ordinary goes the general way, which also words the errors.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from . import arrays, reduce
from .entry import Entry
from .keys import Key

# Below this many keys, a plan saves nothing worth having.
MANY = 8
# Values of more elements are worth a call of their own.
_SMALL = 1 << 16
# As many elements as stay in a core's cache together with the parts.
_CHUNK = reduce.SLICE
_TORCH_TYPES = {torch.Tensor, torch.nn.Parameter}
_REMEMBERED_CALLS = 256

Column = Sequence[Any]


@dataclass(slots=True)
class _Flat:
    """One flat array, and the keys' shapes in it as torch and as NumPy see them."""

    tensor: torch.Tensor
    array: np.ndarray[Any, Any]
    tensors: list[torch.Tensor]
    arrays: list[np.ndarray[Any, Any]]

    @classmethod
    def make(cls, shapes: Sequence[torch.Size], dtype: torch.dtype) -> _Flat:
        sizes = [shape.numel() for shape in shapes]
        flat = torch.empty(sum(sizes), dtype=dtype)
        tensors = [piece.view(shape) for piece, shape in zip(torch.split(flat, sizes), shapes, strict=True)]
        return cls(flat, flat.numpy(), tensors, [tensor.numpy() for tensor in tensors])

    def gather(self, column: Column) -> None:
        if type(column[0]) is np.ndarray:
            np.concatenate(column, axis=None, out=self.array, casting="no")
        else:
            torch._foreach_copy_(self.tensors, list(column))

    def scatter(self, column: Column) -> None:
        if type(column[0]) is np.ndarray:
            for out, value in zip(column, self.arrays, strict=True):
                out[...] = value
        else:
            torch._foreach_copy_(list(column), self.tensors)


@dataclass(slots=True)
class _Chunk:
    start: int
    stop: int
    values: _Flat
    scratch: list[_Flat]


class Plan:
    """The same keys in the same order, with their values in flat chunks.

    Args:
        entries: dense CPU values of one dtype; their memory moves into the plan's.
    """

    def __init__(self, entries: list[Entry]) -> None:
        self.entries = entries
        self.keys = [entry.key for entry in entries]
        self._nbytes = [entry.value.nbytes for entry in entries]
        self._moved: dict[int, list[int]] = {}
        self._shapes = [entry.spec.shape for entry in entries]
        self._dtype = entries[0].spec.dtype
        self._numpy_dtype = torch.empty(0, dtype=self._dtype).numpy().dtype
        self._chunks = [self._move_in(start, stop) for start, stop in _cuts(entries)]
        self._outs_apart: list[Any] = []

    def columns(self, values: Any) -> list[Column] | None:
        """Return the parts as columns, one array of each key, if every one is exactly what its key asks for."""
        columns = self._transpose(values)
        if columns is None or not all(self._fits(column) for column in columns):
            return None
        return columns

    def targets(self, outs: Any) -> list[Column] | None:
        """Return outs as columns if every one can be written and no two share memory."""
        columns = self.columns(outs)
        if columns is None or self._known_apart(columns):
            return columns
        targets = [arrays.target(out) for column in columns for out in column if _is_writable(out)]
        if len(targets) < len(columns) * len(self.keys) or any(finish for _, finish in targets):
            return None
        if arrays.overlapping([tensor for tensor, _ in targets]) is not None:
            return None
        self._outs_apart = [_signature(column) for column in columns]
        return columns

    def moved(self, count: int) -> list[int]:
        """Return the bytes that a call with so many columns and targets moves for each key."""
        if count not in self._moved:
            self._moved[count] = [count * nbytes for nbytes in self._nbytes]
        return self._moved[count]

    def run(self, columns: list[Column], targets: list[Column]) -> None:
        """Make the values the sums of the columns (none: leave them), then copy them to the targets."""
        with torch.no_grad():
            if columns:
                for chunk in self._chunks:
                    self._assign(chunk, [column[chunk.start : chunk.stop] for column in columns])
            # Only now, since an out may be the part of another key.
            for target in targets:
                for chunk in self._chunks:
                    chunk.values.scatter(target[chunk.start : chunk.stop])
        if columns:
            for entry in self.entries:
                entry.version += 1

    def _assign(self, chunk: _Chunk, columns: list[Column]) -> None:
        if len(columns) == 1:
            chunk.values.gather(columns[0])
            return
        scratch = self._scratch(chunk, len(columns))
        for part, column in zip(scratch, columns, strict=True):
            part.gather(column)
        reduce.sum_into(chunk.values.tensor, [part.tensor for part in scratch])

    def _move_in(self, start: int, stop: int) -> _Chunk:
        entries = self.entries[start:stop]
        values = _Flat.make(self._shapes[start:stop], self._dtype)
        for entry, room in zip(entries, values.tensors, strict=True):
            entry.value = room.copy_(entry.value)  # type: ignore[arg-type]
        return _Chunk(start, stop, values, [])

    def _scratch(self, chunk: _Chunk, count: int) -> list[_Flat]:
        while len(chunk.scratch) < count:
            chunk.scratch.append(_Flat.make(self._shapes[chunk.start : chunk.stop], self._dtype))
        return chunk.scratch[:count]

    def _transpose(self, values: Any) -> list[Column] | None:
        if type(values) not in (list, tuple) or len(values) != len(self.keys):
            return None
        if type(values[0]) not in (list, tuple):
            return [values]
        if not set(map(type, values)) <= {list, tuple} or len(set(map(len, values))) > 1:
            return None
        return list(zip(*values, strict=True)) or None

    def _fits(self, column: Column) -> bool:
        types = set(map(type, column))
        count = len(column)
        if types == {np.ndarray}:
            return [a.dtype for a in column].count(self._numpy_dtype) == count and [
                a.shape for a in column
            ] == self._shapes
        if not types <= _TORCH_TYPES:
            return False
        return (
            [t.is_cpu for t in column].count(True) == count
            and [t.layout for t in column].count(torch.strided) == count
            and [t.dtype for t in column].count(self._dtype) == count
            and not any(t.is_nested for t in column)
            and [t.shape for t in column] == self._shapes
        )

    def _known_apart(self, columns: list[Column]) -> bool:
        return len(columns) == len(self._outs_apart) and all(map(_matches, columns, self._outs_apart))


def _cuts(entries: Sequence[Entry]) -> list[tuple[int, int]]:
    cuts, start, size = [], 0, 0
    for index, entry in enumerate(entries):
        numel = entry.spec.shape.numel()
        if size and size + numel > _CHUNK:
            cuts.append((start, index))
            start, size = index, 0
        size += numel
    return [*cuts, (start, len(entries))]


def _is_writable(out: Any) -> bool:
    return bool(out.flags.writeable) if type(out) is np.ndarray else bool(out.is_contiguous())


def _signature(column: Column) -> Any:
    """What shows later that these are the outs that were checked: the arrays themselves, or their addresses."""
    if type(column[0]) is np.ndarray:
        return [weakref.ref(out) for out in column]
    return [out.data_ptr() for out in column]


def _matches(column: Column, signature: Any) -> bool:
    if isinstance(signature[0], weakref.ref):
        same = all(map(operator.is_, column, [known() for known in signature]))
        return same and [out.flags.writeable for out in column].count(True) == len(column)
    if type(column[0]) is np.ndarray or [out.is_contiguous() for out in column].count(True) < len(column):
        return False
    return bool([out.data_ptr() for out in column] == signature)


class Plans:
    """The plans of one shard: made for a list of keys when it comes again, dropped when a key leaves."""

    def __init__(self) -> None:
        self._plans: dict[tuple[Key, ...], Plan] = {}
        self._plan_of: dict[Key, tuple[Key, ...]] = {}
        self._waits: dict[tuple[Key, ...], int] = {}

    def find(self, keys: Sequence[Key], entries: Mapping[Key, Entry]) -> Plan | None:
        """Return the plan for exactly these keys, if there is one or it is time to make it."""
        # True and 1.0 would be found as 1.
        if set(map(type, keys)) not in ({str}, {int}):
            return None
        called = tuple(keys)
        plan = self._plans.get(called)
        if plan is not None or not self._is_due(called):
            return plan
        held = [entries[key] for key in called if key in entries]
        if len(held) < len(called) or len(set(called)) < len(called) or not _can_plan(held):
            return None
        for key in called:
            self.forget(key)
        plan = self._plans[called] = Plan(held)
        self._plan_of.update(dict.fromkeys(called, called))
        return plan

    def forget(self, key: Key) -> None:
        """Drop the plan that holds a key; its values stay where they are."""
        called = self._plan_of.get(key)
        if called is not None:
            del self._plans[called]
            for each in called:
                del self._plan_of[each]
            # Two lists of keys that break up each other's plans must not do so at every call.
            self._waits[called] = 2 * len(self._waits) + 8

    def clear(self) -> None:
        """Drop every plan."""
        self.__init__()  # type: ignore[misc]

    def _is_due(self, called: tuple[Key, ...]) -> bool:
        if len(self._waits) > _REMEMBERED_CALLS:
            self._waits.clear()
        self._waits[called] = self._waits.get(called, 2) - 1
        return self._waits[called] <= 0


def _can_plan(entries: Sequence[Entry]) -> bool:
    dtype = entries[0].spec.dtype
    fits = (
        not entry.spec.is_table
        and entry.spec.dtype is dtype
        and entry.value.device.type == "cpu"
        and entry.spec.shape.numel() <= _SMALL
        for entry in entries
    )
    return dtype is not torch.bfloat16 and all(fits)
