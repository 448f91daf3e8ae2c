"""Update rules: what a shard does with the sum of a push: assign it, call a function, or step an optimizer.

The checks of a push stand here, too: whether every part fits its value and the rule.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, Protocol

import torch

from tensorkv.arrays import interop
from tensorkv.arrays.arguments import Key
from tensorkv.arrays.regions import Region
from tensorkv.arrays.rows import Rows, unchecked_rows
from tensorkv.arrays.slices import Slices
from tensorkv.errors import UpdaterError, ValueMismatchError, quote

from . import native, reduce
from .entry import Batch, Entry, Part
from .fused import Kernel
from .norm import Clipping
from .optimizers import Optimizer, OptimizerSpec, check_numbers, finish
from .optimizers import spec as make_spec
from .pool import WORTH_A_THREAD, Job, Pool

Updater = Callable[[Any, Any, Any], Any]
Parts = Sequence[list[torch.Tensor]]


class Rule(Protocol):
    """How values change. Sums reach a rule as parts, so that it can add them slice by slice."""

    running: bool
    """Whether code of the user is being run, which must not call the store."""

    clipping: Clipping | None
    """How the gradients of a push are clipped, None where they are not."""

    def scaled(self, scale: float) -> Rule:
        """Return the rule for gradients that are multiplied by a number."""

    @property
    def plain_steps(self) -> tuple[Any, Any] | None:
        """The steps that the compiled part makes with plain sums, of all keys and of single ones, if it can."""

    def check(self, entry: Entry, *, by_rows: bool) -> None:
        """Raise if the rule cannot update this value; changes nothing."""

    def apply(self, entries: Sequence[Entry], parts: Parts, pool: Pool) -> None:
        """Update dense values from the sums of their parts."""

    def sees_whole(self, entry: Entry) -> bool:
        """Return whether a step of this dense CPU value changes it in ``finish`` alone."""

    def step(self, entry: Entry, pool: Pool) -> Step:
        """Begin an update of a dense CPU value whose sum comes in pieces."""

    def apply_rows(self, entry: Entry, received: Rows) -> None:
        """Update the rows that ``received`` (merged, of the value's dtype) names; touch no others."""


class Step(Protocol):
    """One update of one dense value, of which the sums come piece by piece."""

    def apply(self, start: int, stop: int, parts: Sequence[torch.Tensor], divisor: int = 1) -> None:
        """Take the sum of parts, divided, for some elements of the flattened value."""

    def finish(self) -> None:
        """Count the update, every element having been given."""


class _AssignStep:
    def __init__(self, entry: Entry) -> None:
        self._entry = entry

    def apply(self, start: int, stop: int, parts: Sequence[torch.Tensor], divisor: int = 1) -> None:
        value = self._entry.tensor
        reduce.sum_piece(value.view(-1)[start:stop], parts, divisor)

    def finish(self) -> None:
        self._entry.version += 1


class WholeStep:
    """Puts the sum together beside the value and applies the rule to the whole of it."""

    def __init__(self, rule: Rule, entry: Entry, pool: Pool) -> None:
        self._rule, self._entry, self._pool = rule, entry, pool
        self.total = torch.empty_like(entry.tensor)

    def apply(self, start: int, stop: int, parts: Sequence[torch.Tensor], divisor: int = 1) -> None:
        reduce.sum_piece(self.total.view(-1)[start:stop], parts, divisor)

    def count_nonfinite(self) -> int:
        """Return how many elements of the sum are NaN or Inf."""
        return reduce.count_nonfinite(self.total)

    def finish(self) -> None:
        self._rule.apply([self._entry], [[self.total]], self._pool)


class _KernelStep:
    """One step of a fused kernel, of which the gradient may come piece by piece."""

    def __init__(self, optimizer: Optimizer, kernel: Kernel, entry: Entry) -> None:
        self._entry, self._kernel = entry, kernel
        self._count, is_first = optimizer.begin(kernel, entry.key, entry.tensor, entry.state)
        self._is_first = is_first or entry.is_new
        self._tensors = [entry.tensor, *(entry.state[name] for name in kernel.columns)]

    def apply(self, start: int, stop: int, parts: Sequence[torch.Tensor], divisor: int = 1) -> None:
        value, *states = [tensor.view(-1)[start:stop] for tensor in self._tensors]
        grad = reduce.scratch(value, value.dtype, "gradient")
        reduce.sum_piece(grad.view(parts[0].shape), parts, divisor)
        native.step(self._kernel, value, grad, states, self._count, is_first=self._is_first)

    def finish(self) -> None:
        finish(self._entry.state, self._count)
        self._entry.is_new = False
        self._entry.version += 1


class Assign:
    """The sum replaces the value; a push of Rows replaces those rows."""

    running = False
    clipping: Clipping | None = None
    plain_steps: tuple[Any, Any] | None = (None, None)

    def scaled(self, scale: float) -> Rule:
        return self

    def check(self, entry: Entry, *, by_rows: bool) -> None:
        pass

    def apply(self, entries: Sequence[Entry], parts: Parts, pool: Pool) -> None:
        small: dict[int, list[int]] = {}
        jobs: list[Job] = []
        for index, (entry, key_parts) in enumerate(zip(entries, parts, strict=True)):
            if len(entries) > 1 and reduce.is_small(entry.tensor, key_parts):
                small.setdefault(len(key_parts), []).append(index)
                continue
            jobs += [partial(reduce.sum_piece, piece, own) for piece, *own in reduce.cut([entry.tensor, *key_parts])]
        for members in small.values():
            reduce.sum_many([entries[index].tensor for index in members], [parts[index] for index in members])
        _run(jobs, entries, parts, pool)
        _count_versions(entries)

    def sees_whole(self, entry: Entry) -> bool:
        return False

    def step(self, entry: Entry, pool: Pool) -> Step:
        return _AssignStep(entry)

    def apply_rows(self, entry: Entry, received: Rows) -> None:
        entry.write_rows(received)
        entry.version += 1


def _run(jobs: list[Job], entries: Sequence[Entry], parts: Parts, pool: Pool) -> None:
    if jobs and _is_worth_threads(entries, parts):
        pool.run(jobs)
        return
    for job in jobs:
        job()


def _is_worth_threads(entries: Sequence[Entry], parts: Parts) -> bool:
    """Return whether this is work for the pool, whose threads are not on the caller's CUDA streams."""
    if sum([entry.spec.shape.numel() for entry in entries]) < WORTH_A_THREAD:
        return False
    on_cpu = all(entry.value.device.type == "cpu" for entry in entries)
    return on_cpu and all(part.is_cpu for key_parts in parts for part in key_parts)


def _count_versions(entries: Sequence[Entry]) -> None:
    for entry in entries:
        entry.version += 1


class CallUpdater:
    """``updater(key, received, stored)`` changes ``stored`` in place.

    The function sees a copy, which is taken over when it has returned: one that raises leaves its
    key as it was, and one that keeps ``stored`` holds no memory of the store.
    """

    clipping: Clipping | None = None
    plain_steps: tuple[Any, Any] | None = None

    def __init__(self, updater: Updater) -> None:
        self._updater = updater
        self.running = False

    def scaled(self, scale: float) -> Rule:
        return self

    def check(self, entry: Entry, *, by_rows: bool) -> None:
        pass

    def apply(self, entries: Sequence[Entry], parts: Parts, pool: Pool) -> None:
        for entry, key_parts in zip(entries, parts, strict=True):
            value = entry.tensor
            value.copy_(self.updated(entry, reduce.total(value, key_parts)))
            entry.version += 1

    def sees_whole(self, entry: Entry) -> bool:
        return True

    def step(self, entry: Entry, pool: Pool) -> Step:
        return WholeStep(self, entry, pool)

    def apply_rows(self, entry: Entry, received: Rows) -> None:
        entry.write_rows(self.updated_rows(entry, received))
        entry.version += 1

    def updated(self, entry: Entry, received: torch.Tensor) -> torch.Tensor:
        """Return what the function makes of a value, which stays as it is."""
        scratch = entry.tensor.clone()
        stored = interop.view(scratch.view_as(scratch), entry.spec.origin)
        self._call(entry, interop.view(received, entry.spec.origin), stored)
        # What the function computed with may require gradients.
        return scratch.detach()

    def updated_rows(self, entry: Entry, received: Rows) -> Rows:
        """Return what the function makes of some rows, which stay as they are."""
        scratch = Rows(received.ids.clone(), entry.read_rows(received.ids), received.num_rows)
        own = Rows(received.ids, received.values.clone(), received.num_rows)
        stored = _view_rows(scratch, entry.spec.origin)
        ids, values = stored.ids, stored.values
        self._call(entry, _view_rows(own, entry.spec.origin), stored)
        if stored.ids is not ids or stored.values is not values:
            raise UpdaterError(
                f"updater({quote(entry.key)}) assigned stored.{'ids' if stored.values is values else 'values'}; "
                "an updater changes stored.values in place (stored.values += ...) and leaves stored.ids alone"
            )
        return unchecked_rows(scratch.ids, scratch.values.detach(), scratch.num_rows)

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


class LostUpdater(CallUpdater):
    """Stands for a function that updated values in a process that has ended."""

    def __init__(self) -> None:
        super().__init__(self._refuse)

    def _refuse(self, key: Key, received: Any, stored: Any) -> None:
        raise UpdaterError(
            f"push({quote(key)}): this store's updater was a function of a process that has ended, and is not kept; "
            "call set_updater again, or set_updater(None) for assignment"
        )


def _view_rows(rows: Rows, origin: interop.Origin) -> Rows:
    # The updater's own copies: what it does to them changes neither rows of the store nor the caller's arrays.
    return Rows(interop.view(rows.ids.clone(), origin), interop.view(rows.values, origin), rows.num_rows)


class StepOptimizer:
    """The sum is the gradient of one step of an optimizer."""

    running = False

    def __init__(self, spec: OptimizerSpec) -> None:
        self.optimizer = Optimizer(spec)
        self.clipping = None if spec.max_grad_norm is None else Clipping(spec.rescale_grad, spec.max_grad_norm)

    def scaled(self, scale: float) -> StepOptimizer:
        if scale == 1:
            return self
        rule = copy(self)
        rule.__dict__.pop("plain_steps", None)
        rule.optimizer = self.optimizer.scaled(scale)
        return rule

    @cached_property
    def plain_steps(self) -> tuple[Any, Any] | None:
        """The optimizer's, made when a plain call first asks for them."""
        return self.optimizer.plain_steps()

    def of_keys(self, keys: Container[Key]) -> StepOptimizer:
        """Return the rule without what was set for other keys than these; itself if there is nothing."""
        spec = self.optimizer.spec
        kept = {key: own for key, own in spec.overrides.items() if key in keys}
        return self if len(kept) == len(spec.overrides) else StepOptimizer(replace(spec, overrides=kept))

    def changed(self, numbers: dict[str, Any], keys: Sequence[Key] | None) -> StepOptimizer:
        """Return the rule with other numbers for some keys, or for all (which ends what was set for some)."""
        spec = self.optimizer.spec
        changed, overrides = spec, dict(spec.overrides)
        if keys is None:
            changed = make_spec(spec.name, {**spec.to_numbers(), **numbers})
            left = {
                id(own): {word: number for word, number in own.items() if word not in numbers}
                for own in spec.overrides.values()
            }
            overrides = {key: left[id(own)] for key, own in spec.overrides.items()}
        else:
            numbers = check_numbers(spec.name, numbers)
            # Keys that have had the same numbers share what they have now.
            made: dict[int, dict[str, Any]] = {}
            for key in keys:
                own = overrides.get(key, spec.numbers)
                if id(own) not in made:
                    made[id(own)] = {**(own if key in overrides else {}), **numbers}
                overrides[key] = made[id(own)]
        return StepOptimizer(replace(changed, overrides={key: own for key, own in overrides.items() if own}))

    def check(self, entry: Entry, *, by_rows: bool) -> None:
        self.optimizer.check(entry.key, entry.value, by_rows=by_rows)
        self.optimizer.check_numbers(entry.key, entry.value)

    def apply(self, entries: Sequence[Entry], parts: Parts, pool: Pool) -> None:
        jobs: list[Job] = []
        steps: list[_KernelStep] = []
        whole: list[int] = []
        for index, (entry, key_parts) in enumerate(zip(entries, parts, strict=True)):
            kernel = self.optimizer.kernel(entry.key, entry.tensor)
            if kernel is None:
                whole.append(index)
                continue
            step = _KernelStep(self.optimizer, kernel, entry)
            steps.append(step)
            start = 0
            for piece, *own in reduce.cut([entry.tensor, *key_parts]):
                jobs.append(partial(step.apply, start, start + piece.numel(), own))
                start += piece.numel()
        _run(jobs, entries, parts, pool)
        for step in steps:
            step.finish()
        if whole:
            self._step_whole([entries[i] for i in whole], [parts[i] for i in whole])

    def sees_whole(self, entry: Entry) -> bool:
        return self.optimizer.kernel(entry.key, entry.tensor) is None

    def step(self, entry: Entry, pool: Pool) -> Step:
        kernel = self.optimizer.kernel(entry.key, entry.tensor)
        return WholeStep(self, entry, pool) if kernel is None else _KernelStep(self.optimizer, kernel, entry)

    def _step_whole(self, entries: Sequence[Entry], parts: Parts) -> None:
        values = [entry.tensor for entry in entries]
        may_share = not self.optimizer.changes_grads
        grads = [reduce.total(v, p, may_share=may_share) for v, p in zip(values, parts, strict=True)]
        self.optimizer.step([e.key for e in entries], values, grads, [e.state for e in entries])
        _count_versions(entries)

    def apply_rows(self, entry: Entry, received: Rows) -> None:
        if entry.is_new:
            # The momentum was made for a dense step, which has not come: this step is the first.
            entry.state.pop("momentum_buffer", None)
            entry.is_new = False
        self.optimizer.step_rows(entry.key, entry.value, received, entry.state)
        entry.version += 1


# ---------------------------------------------------------------- checks of a push, which change nothing


def check_push(batch: Batch, entries: Sequence[Entry], rule: Rule, averages: bool = False) -> None:
    """Raise if a part does not fit.

    Args:
        batch: of a push.
        entries: of its keys.
        rule: that is to be applied.
        averages: whether it takes means of the parts.

    Raises:
        ValueMismatchError: a part's shape or dtype; the message names the part.
        OptimizerError: a value that the rule cannot update.
    """
    for key, parts, entry in zip(batch.keys, batch.parts, entries, strict=True):
        spec, by_rows = entry.spec, False
        shape, dtype = spec.shape, spec.dtype
        # Sums that are added to others are not rounded yet.
        wide = dtype if batch.counts is None else interop.accumulator(dtype)
        for index, part in enumerate(parts):
            if isinstance(part, Rows):
                by_rows = True
                kind = part.values.dtype
            else:
                kind = part.dtype
            if part.shape != shape or (kind is not dtype and kind is not wide and not interop.may_push(kind, dtype)):
                raise _mismatch(batch, entry, index, part)
        if spec.is_table and not all(isinstance(part, Rows) for part in parts):
            raise ValueMismatchError(
                f"{batch.name(key)}: a part is dense, the key was initialised with Rows; push Rows"
            )
        if by_rows and not shape:
            raise ValueMismatchError(f"{batch.name(key)}: the value is 0-d and has no rows; push an array")
        if averages and not has_means(entry):
            raise ValueMismatchError(
                f"{batch.name(key)}: a mean of {interop.dtype_name(dtype)} is not of this dtype, and the store was "
                'created with reduce="mean"; keep integers and bools in a store with reduce="sum"'
            )
        rule.check(entry, by_rows=by_rows)


def has_means(entry: Entry) -> bool:
    """Return whether a key's dtype is one of floating-point or complex numbers, which can be divided."""
    return entry.spec.dtype.is_floating_point or entry.spec.dtype.is_complex


def fit(entry: Entry, outs: Sequence[torch.Tensor]) -> bool:
    """Return whether outs have the shape of a dense value; a table, which has none, fits no outs but an empty list."""
    return all(not entry.spec.is_table and out.shape == entry.spec.shape for out in outs)


def check_outs(
    verb: str,
    entries: Sequence[Entry],
    outs: Sequence[Sequence[torch.Tensor]],
    regions: Sequence[Region] | None = None,
) -> None:
    """Raise if outs that fitted their values, or parts of them, when a pull began do not fit them now.

    Raises:
        ValueMismatchError: another thread has re-created the key.
    """
    if regions is None:
        fitting = [fit(entry, own) for entry, own in zip(entries, outs, strict=True)]
    else:
        fitting = [
            region.lies_in(entry.spec) and all(out.shape == region.shape for out in own)
            for entry, own, region in zip(entries, outs, regions, strict=True)
        ]
    _refuse_recreated(verb, entries, fitting)


def check_ids(verb: str, entries: Sequence[Entry], ids: Sequence[torch.Tensor]) -> None:
    """Raise if sorted ids that were those of rows when a pull began are not now; errors as of ``check_outs``."""
    pairs = zip(entries, ids, strict=True)
    fitting = [bool(entry.spec.shape) and (not len(own) or int(own[-1]) < entry.spec.shape[0]) for entry, own in pairs]
    _refuse_recreated(verb, entries, fitting)


def _refuse_recreated(verb: str, entries: Sequence[Entry], fitting: Sequence[bool]) -> None:
    for entry, fits in zip(entries, fitting, strict=True):
        if not fits:
            raise ValueMismatchError(
                f"{verb}({quote(entry.key)}): the key was re-created with another shape; pull again"
            )


def _mismatch(batch: Batch, entry: Entry, index: int, part: Part) -> ValueMismatchError:
    name = batch.name(entry.key, index)
    if tuple(part.shape) != tuple(entry.spec.shape):
        if isinstance(part, Slices):
            return ValueMismatchError(
                f"{batch.name(entry.key)}: a slice is of a value of shape {tuple(part.whole)}, the key was initialised "
                f"with {tuple(entry.spec.shape)}"
            )
        return ValueMismatchError(
            f"{name} has shape {tuple(part.shape)}, the key was initialised with {tuple(entry.spec.shape)}"
        )
    kind = part.dtype if isinstance(part, Rows) else interop.dtype_name(part.dtype)
    return ValueMismatchError(
        f"{name} is {kind}, the key is {interop.dtype_name(entry.value.dtype)}; a push casts to wider dtypes "
        "of the same kind, and between float16, bfloat16 and float32: convert it first"
    )
