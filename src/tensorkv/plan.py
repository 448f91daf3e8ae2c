"""Plans: calls that name the same many small keys again and again, done on a few flat arrays.

For small keys the price is per array, not per byte. A plan keeps the values of its keys side by side in
flat chunks, checks the arrays of a call by whole lists, and gathers and scatters each chunk in one call of
NumPy or torch. Whatever is out of the ordinary goes the general way, which also words the errors.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from . import arrays, reduce
from .entry import Entry
from .kernels import Kernel
from .keys import Key
from .optim import Optimizer, State
from .pool import OneTorchThread

# Below this many keys, a plan saves nothing worth having.
MANY = 8
# Values of more elements are worth a call of their own.
_SMALL = 1 << 13
# As many elements as stay in a core's cache together with the parts.
_CHUNK = 1 << 18
_TORCH_TYPES = {torch.Tensor, torch.nn.Parameter}
_REMEMBERED_CALLS = 256

Column = Sequence[Any]


class _Flat:
    """One flat array, and the keys' shapes in it as torch and as NumPy see them."""

    def __init__(self, shapes: Sequence[torch.Size], flat: torch.Tensor) -> None:
        self._shapes = shapes
        self.tensor = flat
        self.array: np.ndarray[Any, Any] = flat.numpy()

    @cached_property
    def tensors(self) -> list[torch.Tensor]:
        pieces = torch.split(self.tensor, [shape.numel() for shape in self._shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, self._shapes, strict=True)]

    @cached_property
    def arrays(self) -> list[np.ndarray[Any, Any]]:
        return [tensor.numpy() for tensor in self.tensors]

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


class _Chunk:
    """Some keys of a plan that lie side by side in one flat array."""

    def __init__(self, entries: Sequence[Entry], start: int, stop: int) -> None:
        self.cut = slice(start, stop)
        self.shapes = [entry.spec.shape for entry in entries[self.cut]]
        self.numel = sum([shape.numel() for shape in self.shapes])
        self.values = self.make(entries[start].spec.dtype)
        self.parts: list[_Flat] = []
        for entry, room in zip(entries[self.cut], self.values.tensors, strict=True):
            entry.value = room.copy_(entry.value)  # type: ignore[arg-type]

    def make(self, dtype: torch.dtype) -> _Flat:
        return _Flat(self.shapes, torch.empty(self.numel, dtype=dtype))


@dataclass(slots=True)
class _Joined:
    """The optimizer state of a plan's keys, side by side as their values are."""

    optimizer: Optimizer
    kernel: Kernel
    views: dict[str, list[torch.Tensor]]
    flats: list[list[torch.Tensor]]
    counters: list[torch.Tensor]
    versions: list[int]

    def is_of(self, optimizer: Optimizer, states: Sequence[State]) -> bool:
        """Tell whether nobody has replaced a state or counted a step since."""
        return (
            self.optimizer is optimizer
            and all(_are([state.get(name) for state in states], views) for name, views in self.views.items())
            and [counter._version for counter in self.counters] == self.versions
            and (not self.counters or _are([state.get("step") for state in states], self.counters))
        )


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
        self._chunks = [_Chunk(entries, start, stop) for start, stop in _cuts(entries)]
        self._buffers: list[torch.Tensor] = []
        self._outs_apart: list[Any] = []
        self._joined: _Joined | None = None

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

    def assign(self, columns: list[Column]) -> None:
        """Make the values the sums of the columns."""
        with torch.no_grad(), OneTorchThread():
            for chunk in self._chunks:
                if len(columns) == 1:
                    chunk.values.gather(columns[0][chunk.cut])
                else:
                    reduce.sum_into(chunk.values.tensor, self._gather(chunk, columns))
        self._count()

    def step(self, columns: list[Column], joined: _Joined) -> None:
        """Step the optimizer, the sums of the columns being the gradients."""
        optimizer, kernel = joined.optimizer, joined.kernel
        step = joined.counters[0] + 1 if joined.counters else None
        with torch.no_grad():
            for chunk, state in zip(self._chunks, joined.flats, strict=True):
                parts = self._gather(chunk, columns)
                grad = parts[0]
                if len(parts) > 1:
                    reduce.sum_into(grad, parts)
                kernel(chunk.values.tensor, optimizer.prepare(grad), state, step)
            if step is not None:
                torch._foreach_copy_(joined.counters, [step] * len(joined.counters))
        joined.versions = [counter._version for counter in joined.counters]
        joined.kernel = replace(kernel, first=False)
        self._count()

    def fill(self, targets: list[Column]) -> None:
        """Copy the values to the targets."""
        with torch.no_grad(), OneTorchThread():
            for target in targets:
                for chunk in self._chunks:
                    chunk.values.scatter(target[chunk.cut])

    def join(self, optimizer: Optimizer) -> _Joined | None:
        """Return the keys' optimizer state side by side; None if they are not all at the same step."""
        joined, states = self._joined, [entry.state for entry in self.entries]
        if joined is not None and joined.is_of(optimizer, states):
            return joined
        if any(key in optimizer.spec.overrides for key in self.keys):
            return None
        kernels = [optimizer.kernel(e.key, e.value, e.state) for e in self.entries]  # type: ignore[arg-type]
        kernel = kernels[0]
        if kernel is None or any(other != kernel for other in kernels):
            return None
        for entry in self.entries:
            optimizer.complete(kernel, entry.key, entry.value, entry.state)  # type: ignore[arg-type]
        counters = [state["step"] for state in states if "step" in state]
        if len({float(counter) for counter in counters}) > 1:
            return None
        flats: list[list[torch.Tensor]] = [[] for _ in self._chunks]
        views: dict[str, list[torch.Tensor]] = {name: [] for name in kernel.columns}
        for name in kernel.columns:
            for chunk, held in zip(self._chunks, flats, strict=True):
                flat = chunk.make(self._dtype)
                for state, room in zip(states[chunk.cut], flat.tensors, strict=True):
                    state[name] = room.copy_(state[name])
                held.append(flat.tensor)
                views[name] += flat.tensors
        self._joined = _Joined(optimizer, kernel, views, flats, counters, [c._version for c in counters])
        return self._joined

    def _gather(self, chunk: _Chunk, columns: list[Column]) -> list[torch.Tensor]:
        """Copy a chunk's parts side by side, into memory that all chunks share."""
        while len(self._buffers) < len(columns):
            self._buffers.append(torch.empty(max(each.numel for each in self._chunks), dtype=self._dtype))
        while len(chunk.parts) < len(columns):
            chunk.parts.append(_Flat(chunk.shapes, self._buffers[len(chunk.parts)][: chunk.numel]))
        for part, column in zip(chunk.parts, columns, strict=False):
            part.gather(column[chunk.cut])
        return [part.tensor for part in chunk.parts[: len(columns)]]

    def _count(self) -> None:
        for entry in self.entries:
            entry.version += 1

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


def _are(left: Sequence[Any], right: Sequence[Any]) -> bool:
    return len(left) == len(right) and all(map(operator.is_, left, right))


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
        return _are(column, [known() for known in signature]) and [out.flags.writeable for out in column].count(
            True
        ) == len(column)
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
