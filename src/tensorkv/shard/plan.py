"""Plans: calls that name the same many keys again and again.

For many keys the price is per array, not per byte. A plan keeps the values of its keys side by side in flat
chunks, checks the arrays of a call by whole columns, and sums, steps and copies out whole columns at once.
Whatever is out of the ordinary goes the general way, which also words the errors.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from tensorkv.arrays import interop
from tensorkv.arrays.arguments import Key
from tensorkv.arrays.packing import encode_layout

from . import native, reduce
from .entry import Entry
from .fused import Kernel
from .optimizers import Optimizer, State
from .pool import WORTH_A_THREAD, Job, OneTorchThread, Pool

# Below this many keys, a plan saves nothing worth having.
MANY = 8
# Values of more elements are worth a call of their own, unless the compiled kernel does all in one.
_SMALL = 1 << 13
# As many elements as stay in a core's cache together with the parts.
_CHUNK = 1 << 18
_REMEMBERED_CALLS = 256


class Column:
    """One array of each key: a part or an out, every one exactly as its key asks for.

    Args:
        addresses: as the compiled kernel takes them.
        arrays: all of NumPy or all of torch, in the order of the keys; None: the pieces of ``flat``.
        flat: the tensor in which all lie side by side, if they do.
        split: makes pieces of it, when somebody asks for them.
    """

    def __init__(
        self,
        addresses: bytes,
        arrays: tuple[Any, ...] | None,
        flat: torch.Tensor | None = None,
        split: Callable[[torch.Tensor], tuple[Any, ...]] | None = None,
    ) -> None:
        self.addresses, self.flat = addresses, flat
        self._arrays, self._split = arrays, split

    @property
    def arrays(self) -> tuple[Any, ...]:
        """The arrays, in the order of the keys."""
        if self._arrays is None and self.flat is not None and self._split is not None:
            self._arrays = self._split(self.flat)
        return self._arrays or ()


class Form:
    """What the arrays of some keys of one dtype must be, to go the short way.

    Args:
        shapes: of each key's value.
        dtype: of all values.
    """

    def __init__(self, shapes: Sequence[torch.Size], dtype: torch.dtype) -> None:
        self.shapes = list(shapes)
        self.dtype = dtype
        self.counts = [shape.numel() for shape in shapes]
        self.nbytes = [count * dtype.itemsize for count in self.counts]
        self._moved: dict[int, list[int]] = {}
        self._apart: tuple[bytes, ...] | None = None

    def columns(self, values: Any, *, writable: bool = False) -> list[Column] | None:
        """Return parts or outs as columns, if every array is exactly what its key asks for."""
        found = []
        transposed = self._transpose(values)
        if len(transposed) > native.MOST_COLUMNS:
            return None
        for column in transposed:
            addresses = native.addresses(column, self.dtype, self.shapes, writable=writable)
            if addresses is None:
                return None
            found.append(Column(addresses, column))
        return found or None

    def flat(self, tensor: torch.Tensor) -> Column:
        """Return arrays that lie side by side in a flat tensor as a column."""
        return Column(native.column_beside(tensor, self.counts), None, tensor, self._split)

    def targets(self, outs: Any) -> list[Column] | None:
        """Return outs as columns if every one can be written and no two share memory."""
        columns = self.columns(outs, writable=True)
        if columns is None or native.overlap([column.addresses for column in columns], self.nbytes):
            return None
        return columns

    def moved(self, count: int) -> list[int]:
        """Return the bytes that a call with so many columns and targets moves for each key."""
        if count not in self._moved:
            self._moved[count] = [count * nbytes for nbytes in self.nbytes]
        return self._moved[count]

    def are_apart(self, parts: Sequence[bytes], outs: Sequence[bytes]) -> bool:
        """Return whether outs may be written before all parts have been read; asked once for the same arrays."""
        called = (*parts, *outs)
        if self._apart != called:
            if not native.are_apart(parts, outs, self.nbytes):
                return False
            self._apart = called
        return True

    def _split(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        pieces = torch.split(tensor, self.counts)
        return tuple(piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True))

    def _transpose(self, values: Any) -> list[tuple[Any, ...]]:
        """Return one tuple per part or out, with the array of each key; an empty list for other forms."""
        if type(values) not in (list, tuple) or len(values) != len(self.shapes):
            return []
        if type(values[0]) not in (list, tuple):
            return [tuple(values)]
        if not set(map(type, values)) <= {list, tuple} or len(set(map(len, values))) > 1:
            return []
        return list(zip(*values, strict=True))


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

    def gather(self, column: Sequence[Any]) -> None:
        if type(column[0]) is np.ndarray:
            np.concatenate(column, axis=None, out=self.array, casting="no")
        else:
            torch._foreach_copy_(self.tensors, list(column))

    def scatter(self, column: Sequence[Any]) -> None:
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
        self.counts = [shape.numel() for shape in self.shapes]
        self.numel = sum(self.counts)
        self.parts: list[_Flat] = []
        held = [entry.tensor for entry in entries[self.cut]]
        self.values = _Flat(self.shapes, held[0].view(-1)) if len(held) == 1 else self.make(held[0].dtype)
        if len(held) > 1:
            for entry, room in zip(entries[self.cut], self.values.tensors, strict=True):
                entry.value = room.copy_(entry.tensor)

    def make(self, dtype: torch.dtype) -> _Flat:
        return _Flat(self.shapes, torch.empty(self.numel, dtype=dtype, device="cpu"))


@dataclass(slots=True)
class _Joined:
    """The optimizer state of a plan's keys, side by side as their values are."""

    optimizer: Optimizer
    kernel: Kernel
    is_first: bool
    views: dict[str, list[torch.Tensor]]
    flats: list[list[torch.Tensor]]
    counters: list[torch.Tensor]
    versions: list[int]

    def is_of(self, optimizer: Optimizer, states: Sequence[State]) -> bool:
        """Return whether nobody has replaced a state or counted a step since."""
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
        self.form = Form([entry.spec.shape for entry in entries], entries[0].spec.dtype)
        self._counts, self._dtype = self.form.counts, self.form.dtype
        # A chunk steps in one thread; a longer one is to be shared between threads.
        self.can_step = max(self._counts) <= reduce.SLICE
        self._chunks = [_Chunk(entries, start, stop) for start, stop in _cuts(entries)]
        self._values = native.column_of([entry.tensor for entry in entries])
        self._buffers: list[torch.Tensor] = []
        self._joined: _Joined | None = None

    @cached_property
    def layout(self) -> bytes:
        """Layout of the keys' sums in a log."""
        return encode_layout((entry.key, "sum", entry.spec.dtype, entry.spec.shape) for entry in self.entries)

    @property
    def is_compiled(self) -> bool:
        """Whether the compiled kernel adds these values."""
        return native.can_sum(self._dtype)

    def total(self, columns: list[Column]) -> torch.Tensor:
        """Return the sums of the columns side by side in one flat tensor, made by the compiled kernel."""
        if len(columns) == 1 and columns[0].flat is not None:
            return columns[0].flat
        total = torch.empty(sum(self._counts), dtype=self._dtype, device="cpu")
        rooms = native.column_beside(total, self._counts)
        native.Pass([rooms], [column.addresses for column in columns], self._counts, self._dtype).jobs(1)[0]()
        return total

    def takes_flat(self, flats: Sequence[torch.Tensor | None]) -> bool:
        """Return whether these may hold the keys' arrays side by side."""
        numel = sum(self._counts)
        return self.is_compiled and all(
            each is None or (each.dtype is self._dtype and each.ndim == 1 and len(each) == numel) for each in flats
        )

    def run(self, columns: list[Column], targets: list[Column], optimizer: Optimizer | None, pool: Pool) -> None:
        """Push the columns, if any, stepping the optimizer whose state was joined, and fill the targets."""
        if columns and optimizer is not None and self._joined is not None:
            self.step(columns, targets, self._joined, pool)
        elif columns:
            self.assign(columns, targets, pool)
        else:
            self.fill(targets, pool)

    def assign(self, columns: list[Column], targets: list[Column], pool: Pool) -> None:
        """Make the values the sums of the columns, and copy them to the targets."""
        if not native.can_sum(self._dtype):
            with torch.no_grad(), OneTorchThread():
                for chunk in self._chunks:
                    reduce.sum_into(chunk.values.tensor, self._gather(chunk, columns))
            self._count()
            self.fill(targets, pool)
            return
        parts = [column.addresses for column in columns]
        outs = [target.addresses for target in targets]
        at_once = self.form.are_apart(parts, outs)
        self._sum([self._values, *(outs if at_once else ())], parts, pool)
        self._count()
        if not at_once:
            # An out is the part of another key, which had to be read first.
            self._sum(outs, [self._values], pool)

    def step(self, columns: list[Column], targets: list[Column], joined: _Joined, pool: Pool) -> None:
        """Step the optimizer, the sums of the columns being the gradients; copy the values to the targets."""
        counter = joined.counters[0] + 1 if joined.counters else None
        parts, outs = ([column.addresses for column in each] for each in (columns, targets))
        at_once = native.can_sum(self._dtype) and self.form.are_apart(parts, outs)
        jobs: list[Job] = [
            partial(self._step_chunk, chunk, columns, outs if at_once else [], joined, state, counter)
            for chunk, state in zip(self._chunks, joined.flats, strict=True)
        ]
        if not native.can_sum(self._dtype):
            jobs = [partial(_run_all, jobs)]
        pool.run(jobs)
        self._count_steps(joined, counter)
        if not at_once:
            # An out is the part of another key, which had to be read first.
            self.fill(targets, pool)

    def _step_chunk(
        self,
        chunk: _Chunk,
        columns: list[Column],
        outs: list[bytes],
        joined: _Joined,
        state: list[torch.Tensor],
        counter: torch.Tensor | None,
    ) -> None:
        with torch.no_grad():
            grad = self._gradient(chunk, columns)
            count = 1.0 if counter is None else float(counter)
            native.step(joined.kernel, chunk.values.tensor, grad, state, count, is_first=joined.is_first)
        if outs:
            # In this thread, while the values are in its cache.
            cut = slice(8 * chunk.cut.start, 8 * chunk.cut.stop)
            sums = native.Pass([out[cut] for out in outs], [self._values[cut]], chunk.counts, self._dtype)
            past_cache = len(outs) if native.leaves_cache(sum(self.form.nbytes) * len(outs)) else 0
            sums.jobs(1, past_cache=past_cache)[0]()

    def _gradient(self, chunk: _Chunk, columns: list[Column]) -> torch.Tensor:
        """Return the sum of a chunk's parts."""
        if not native.can_sum(self._dtype):
            parts = self._gather(chunk, columns)
            if len(parts) > 1:
                reduce.sum_into(parts[0], parts)
            return parts[0]
        if len(chunk.counts) == len(columns) == 1:
            return interop.take(columns[0].arrays[chunk.cut.start]).view(-1)
        grad = reduce.scratch(chunk.values.tensor, self._dtype, "gradient")
        cut = slice(8 * chunk.cut.start, 8 * chunk.cut.stop)
        rooms = native.column_beside(grad, chunk.counts)
        native.Pass([rooms], [column.addresses[cut] for column in columns], chunk.counts, self._dtype).jobs(1)[0]()
        return grad

    def _count_steps(self, joined: _Joined, counter: torch.Tensor | None) -> None:
        if counter is not None:
            torch._foreach_copy_(joined.counters, [counter] * len(joined.counters))
        joined.versions = [counter._version for counter in joined.counters]
        joined.is_first = False
        self._count()

    def fill(self, targets: list[Column], pool: Pool) -> None:
        """Copy the values to the targets."""
        if targets and native.can_sum(self._dtype):
            self._sum([target.addresses for target in targets], [self._values], pool)
            return
        with torch.no_grad(), OneTorchThread():
            for target in targets:
                for chunk in self._chunks:
                    chunk.values.scatter(target.arrays[chunk.cut])

    def join(self, optimizer: Optimizer) -> bool:
        """Bring the keys' optimizer state side by side; False if they are not all at the same step."""
        joined, states = self._joined, [entry.state for entry in self.entries]
        if not self.can_step:
            return False
        if joined is None or not joined.is_of(optimizer, states):
            self._joined = self._join(optimizer, states)
        return self._joined is not None

    def _join(self, optimizer: Optimizer, states: Sequence[State]) -> _Joined | None:
        if any(key in optimizer.spec.overrides for key in self.keys):
            return None
        kernel = optimizer.kernel(self.keys[0], self.entries[0].tensor)
        firsts = {"momentum_buffer" not in state for state in states}
        if kernel is None or len(firsts) > 1:
            return None
        for entry in self.entries:
            optimizer.begin(kernel, entry.key, entry.tensor, entry.state)
        counters = [state["step"] for state in states if "step" in state]
        if len({float(counter) for counter in counters}) > 1:
            return None
        flats: list[list[torch.Tensor]] = [[] for _ in self._chunks]
        views: dict[str, list[torch.Tensor]] = {name: [] for name in kernel.columns}
        for name in kernel.columns:
            for chunk, held in zip(self._chunks, flats, strict=True):
                alone = states[chunk.cut.start][name] if len(chunk.counts) == 1 else None
                if alone is not None and alone.is_contiguous():
                    held.append(alone.view(-1))
                    views[name].append(alone)
                    continue
                flat = chunk.make(self._dtype)
                for state, room in zip(states[chunk.cut], flat.tensors, strict=True):
                    state[name] = room.copy_(state[name])
                held.append(flat.tensor)
                views[name] += flat.tensors
        return _Joined(optimizer, kernel, firsts.pop(), views, flats, counters, [c._version for c in counters])

    def _gather(self, chunk: _Chunk, columns: list[Column]) -> list[torch.Tensor]:
        """Copy a chunk's parts side by side, into memory that all chunks share."""
        while len(self._buffers) < len(columns):
            self._buffers.append(torch.empty(max(each.numel for each in self._chunks), dtype=self._dtype, device="cpu"))
        while len(chunk.parts) < len(columns):
            chunk.parts.append(_Flat(chunk.shapes, self._buffers[len(chunk.parts)][: chunk.numel]))
        for part, column in zip(chunk.parts, columns, strict=False):
            part.gather(column.arrays[chunk.cut])
        return [part.tensor for part in chunk.parts[: len(columns)]]

    def _count(self) -> None:
        for entry in self.entries:
            entry.version += 1

    def _sum(self, outs: list[bytes], parts: list[bytes], pool: Pool) -> None:
        sums = native.Pass(outs, parts, self._counts, self._dtype)
        if sum(self._counts) >= WORTH_A_THREAD * 4:
            pool.run(sums.jobs(pool.threads))
        else:
            sums.jobs(1)[0]()


def _run_all(jobs: Sequence[Job]) -> None:
    for job in jobs:
        job()


def _are(left: Sequence[Any], right: Sequence[Any]) -> bool:
    return len(left) == len(right) and all(map(operator.is_, left, right))


def _cuts(entries: Sequence[Entry]) -> list[tuple[int, int]]:
    cuts, start, size, last = [], 0, 0, 0
    for index, entry in enumerate(entries):
        numel = entry.spec.shape.numel()
        # A long value stays where it is, alone.
        if size and (size + numel > _CHUNK or max(numel, last) > _SMALL):
            cuts.append((start, index))
            start, size = index, 0
        size, last = size + numel, numel
    return [*cuts, (start, len(entries))]


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
    most = None if native.can_sum(dtype) else _SMALL
    fits = (
        not entry.spec.is_table
        and entry.spec.dtype is dtype
        and entry.value.device.type == "cpu"
        and (most is None or entry.spec.shape.numel() <= most)
        for entry in entries
    )
    return dtype is not torch.bfloat16 and all(fits)
