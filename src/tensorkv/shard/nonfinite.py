"""FiniteSums: what a shard does with a sum that has NaN or Inf."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from tensorkv.arrays.rows import Rows
from tensorkv.errors import ArgumentError, NonFiniteError, show

from . import reduce
from .entry import Batch, Entry

NonFinite = Literal["pass", "raise", "skip"]


class FiniteSums:
    """Refuses or leaves out sums that are not finite.

    Args:
        mode: ``"pass"`` (nobody looks), ``"raise"`` or ``"skip"``.

    Raises:
        ArgumentError: another mode.
    """

    def __init__(self, mode: NonFinite) -> None:
        if not isinstance(mode, str) or mode not in ("pass", "raise", "skip"):
            raise ArgumentError(f'nonfinite is {show(mode)}; expected "pass", "raise" or "skip"')
        self.looks = mode != "pass"
        self._mode = mode
        self.counts = {"raised": 0, "skipped": 0}

    def sums(
        self, batch: Batch, entries: Sequence[Entry], add: Callable[[Entry, Sequence[Any]], Any] | None = None
    ) -> tuple[list[Entry], list[list[Any]]]:
        """Return the entries whose sums are finite, and those sums, made beside the values.

        Args:
            batch: of a push.
            entries: of its keys.
            add: returns the sum of a key's parts (None: as a shard makes it).

        Raises:
            NonFiniteError: a sum is not finite, and the mode is ``"raise"``.
        """
        kept: tuple[list[Entry], list[list[Any]]] = ([], [])
        for entry, key_parts in zip(entries, batch.parts, strict=True):
            made = total(entry, key_parts) if add is None else add(entry, key_parts)
            bad = reduce.count_nonfinite(made.values if isinstance(made, Rows) else made)
            if not bad:
                kept[0].append(entry)
                kept[1].append([made])
            elif self._mode == "raise":
                self.counts["raised"] += 1
                raise NonFiniteError(
                    f"{batch.name(entry.key)}: the sum of {len(key_parts)} parts has {bad} NaN or Inf elements; "
                    'the store was created with nonfinite="raise", and nothing was changed'
                )
            else:
                self.counts["skipped"] += 1
        return kept


def total(entry: Entry, parts: Sequence[Any], *, may_share: bool = False) -> Any:
    """Return the sum of the parts of one key, beside the value (``may_share``: or the only part itself)."""
    if all(isinstance(part, Rows) for part in parts):
        return entry.merged(parts)
    dense = [entry.dense(part) for part in parts]
    return reduce.total(entry.value, dense, may_share=may_share)  # type: ignore[arg-type]
