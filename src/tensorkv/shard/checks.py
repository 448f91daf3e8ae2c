"""Checks of a push before anything changes: every part of every key fits its value and the update rule."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tensorkv.arrays import interop
from tensorkv.arrays.rows import Rows
from tensorkv.errors import ValueMismatchError, quote

from .entry import Batch, Entry, Part
from .rules import Rule


def check_push(batch: Batch, entries: Sequence[Entry], rule: Rule) -> None:
    """Raise if a part does not fit.

    Args:
        batch: of a push.
        entries: of its keys.
        rule: that is to be applied.

    Raises:
        ValueMismatchError: a part's shape or dtype; the message names the part.
        OptimizerError: a value that the rule cannot update.
    """
    for key, parts, entry in zip(batch.keys, batch.parts, entries, strict=True):
        spec, by_rows = entry.spec, False
        shape, dtype = spec.shape, spec.dtype
        for index, part in enumerate(parts):
            if isinstance(part, Rows):
                by_rows = True
                kind = part.values.dtype
            else:
                kind = part.dtype
            if part.shape != shape or (kind is not dtype and not interop.may_push(kind, dtype)):
                raise _mismatch(batch, entry, index, part)
        if spec.is_table and not all(isinstance(part, Rows) for part in parts):
            raise ValueMismatchError(
                f"{batch.name(key)}: a part is dense, the key was initialised with Rows; push Rows"
            )
        if by_rows and not shape:
            raise ValueMismatchError(f"{batch.name(key)}: the value is 0-d and has no rows; push an array")
        rule.check(entry, by_rows=by_rows)


def fit(entry: Entry, outs: Sequence[torch.Tensor]) -> bool:
    """Tell whether outs have the shape of a value."""
    return all(out.shape == entry.spec.shape for out in outs)


def check_outs(entries: Sequence[Entry], outs: Sequence[Sequence[torch.Tensor]]) -> None:
    """Raise if outs that fitted their values when a pull began do not fit them now.

    Raises:
        ValueMismatchError: another thread has made the key anew.
    """
    for entry, key_outs in zip(entries, outs, strict=True):
        if not fit(entry, key_outs):
            raise ValueMismatchError(
                f"pull({quote(entry.key)}): the key was deleted and initialised anew with another shape; pull again"
            )


def _mismatch(batch: Batch, entry: Entry, index: int, part: Part) -> ValueMismatchError:
    name = batch.name(entry.key, index)
    if tuple(part.shape) != tuple(entry.spec.shape):
        return ValueMismatchError(
            f"{name} has shape {tuple(part.shape)}, the key was initialised with {tuple(entry.spec.shape)}"
        )
    kind = part.dtype if isinstance(part, Rows) else interop.dtype_name(part.dtype)
    return ValueMismatchError(
        f"{name} is {kind}, which does not fit the key's {interop.dtype_name(entry.value.dtype)} "
        "without silent loss; convert it first"
    )
