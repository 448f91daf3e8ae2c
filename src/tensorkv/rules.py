"""Update rules: what a shard does with the sum of a push. Assign it, call a function, or step an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from . import arrays, reduce
from .entry import Entry
from .errors import UpdaterError, quote
from .optim import Optimizer, OptimizerSpec
from .rows import Rows

Updater = Callable[[Any, Any, Any], Any]


class Rule(Protocol):
    """How values change. Sums reach a rule as parts, so that it can add them where it needs them."""

    running: bool
    """Whether code of the user is being run, which must not call the store."""

    def check(self, entry: Entry, *, by_rows: bool) -> None:
        """Raise if the rule cannot update this value; changes nothing."""

    def apply(self, entries: Sequence[Entry], parts: Sequence[list[torch.Tensor]]) -> None:
        """Update dense values from the sums of their parts."""

    def apply_rows(self, entry: Entry, received: Rows) -> None:
        """Update the rows that ``received`` (merged, of the value's dtype) names; touch no others."""


class Assign:
    """The sum replaces the value; a push of Rows replaces those rows."""

    running = False

    def check(self, entry: Entry, *, by_rows: bool) -> None:
        pass

    def apply(self, entries: Sequence[Entry], parts: Sequence[list[torch.Tensor]]) -> None:
        small: dict[int, list[int]] = {}
        for index, (entry, key_parts) in enumerate(zip(entries, parts, strict=True)):
            value: Any = entry.value
            if len(entries) > 1 and reduce.is_small(value, key_parts):
                small.setdefault(len(key_parts), []).append(index)
            else:
                reduce.sum_into(value, key_parts)
            entry.version += 1
        for members in small.values():
            outs: list[Any] = [entries[index].value for index in members]
            reduce.sum_many(outs, [parts[index] for index in members])

    def apply_rows(self, entry: Entry, received: Rows) -> None:
        entry.write_rows(received)
        entry.version += 1


class CallUpdater:
    """``updater(key, received, stored)`` changes ``stored`` in place.

    The function sees a copy, which is taken over when it has returned: one that raises leaves its
    key as it was, and one that keeps ``stored`` holds no memory of the store.
    """

    def __init__(self, updater: Updater) -> None:
        self._updater = updater
        self.running = False

    def check(self, entry: Entry, *, by_rows: bool) -> None:
        pass

    def apply(self, entries: Sequence[Entry], parts: Sequence[list[torch.Tensor]]) -> None:
        for entry, key_parts in zip(entries, parts, strict=True):
            value: Any = entry.value
            received = reduce.total(value, key_parts)
            scratch = value.clone()
            stored = arrays.view(scratch.view_as(scratch), entry.spec.origin)
            self._call(entry, arrays.view(received, entry.spec.origin), stored)
            value.copy_(scratch)
            entry.version += 1

    def apply_rows(self, entry: Entry, received: Rows) -> None:
        scratch = Rows(received.ids.clone(), entry.read_rows(received.ids), received.num_rows)
        self._call(entry, _view_rows(received, entry.spec.origin), _view_rows(scratch, entry.spec.origin))
        entry.write_rows(scratch)
        entry.version += 1

    def _call(self, entry: Entry, received: Any, stored: Any) -> None:
        self.running = True
        try:
            returned = self._updater(entry.key, received, stored)
        finally:
            self.running = False
        if returned is not None and returned is not stored:
            raise UpdaterError(
                f"updater({quote(entry.key)}) returned a {type(returned).__name__}; "
                "an updater changes stored in place (stored += ...) and returns None"
            )


def _view_rows(rows: Rows, origin: arrays.Origin) -> Rows:
    # The ids are the updater's own copy: what it does to them moves no row of the store.
    return Rows(arrays.view(rows.ids.clone(), origin), arrays.view(rows.values, origin), rows.num_rows)


class StepOptimizer:
    """The sum is the gradient of one step of an optimizer."""

    running = False

    def __init__(self, spec: OptimizerSpec) -> None:
        self.optimizer = Optimizer(spec)

    def check(self, entry: Entry, *, by_rows: bool) -> None:
        self.optimizer.check(entry.key, entry.value, by_rows=by_rows)

    def apply(self, entries: Sequence[Entry], parts: Sequence[list[torch.Tensor]]) -> None:
        values: list[Any] = [entry.value for entry in entries]
        may_share = not self.optimizer.changes_grads
        grads = [reduce.total(v, p, may_share=may_share) for v, p in zip(values, parts, strict=True)]
        self.optimizer.step([e.key for e in entries], values, grads, [e.state for e in entries])
        for entry in entries:
            entry.version += 1

    def apply_rows(self, entry: Entry, received: Rows) -> None:
        self.optimizer.step_rows(entry.key, entry.value, received, entry.state)
        entry.version += 1
