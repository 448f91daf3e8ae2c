"""NonFinitePolicy: what a store does with a sum that has NaN or Inf."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from tensorkv.arrays.rows import Rows
from tensorkv.errors import ArgumentError, NonFiniteError, show

from . import reduce
from .entry import Batch, Entry

NonFinite = Literal["pass", "raise", "skip"]


class NonFinitePolicy:
    """Refuses or leaves out sums that are not finite.

    Args:
        mode: ``"pass"`` (sums are not checked), ``"raise"`` or ``"skip"``.
        all_gather: returns what each worker gives, for sums of which each worker has a part (None: one worker).

    Raises:
        ArgumentError: another mode.
    """

    def __init__(self, mode: NonFinite, all_gather: Callable[[Any], list[Any]] | None = None) -> None:
        if not isinstance(mode, str) or mode not in ("pass", "raise", "skip"):
            raise ArgumentError(f'nonfinite is {show(mode)}; expected "pass", "raise" or "skip"')
        self.checks = mode != "pass"
        self._mode = mode
        self._all_gather = all_gather
        self.counts = {"raised": 0, "skipped": 0}

    def left_out(self, bad: Mapping[int, int], names: Sequence[str], *, is_whole: bool = False) -> set[int]:
        """Return which sums are to be left out, the same on every worker.

        Args:
            bad: by position, how many elements are NaN or Inf in this worker's part of a sum.
            names: of all sums, for messages.
            is_whole: whether every worker has the whole sums.

        Raises:
            NonFiniteError: a sum is not finite, and the mode is ``"raise"``.
        """
        total: dict[int, int] = {}
        for own in [list(bad.items())] if self._all_gather is None or is_whole else self._all_gather(list(bad.items())):
            for position, count in own:
                total[position] = total.get(position, 0) + count
        found = sorted(position for position, count in total.items() if count)
        if found and self._mode == "raise":
            self.counts["raised"] += 1
            raise NonFiniteError(
                f"{names[found[0]]}: the sum has {total[found[0]]} NaN or Inf elements; "
                'the store was created with nonfinite="raise", and nothing was changed'
            )
        self.counts["skipped"] += len(found)
        return set(found)

    def sums(
        self, batch: Batch, entries: Sequence[Entry], averages: bool, add: Callable[..., Any] | None = None
    ) -> tuple[Sequence[Entry], list[list[Any]]]:
        """Return the entries whose sums are not to be left out, and those sums, made beside the values.

        Args:
            batch: of a push.
            entries: of its keys.
            averages: whether means are made instead of sums.
            add: returns the sum of a key's parts, divided by a number (None: as a shard makes it).

        Raises:
            NonFiniteError: a sum is not finite, and the mode is ``"raise"``.
        """
        wanted = zip(entries, batch.parts, batch.divisors(averages), strict=True)
        sums = [(add or total)(entry, parts, divisor=divisor) for entry, parts, divisor in wanted]
        if not self.checks:
            return entries, [[each] for each in sums]
        bad = {position: count_nonfinite(each) for position, each in enumerate(sums)}
        left_out = self.left_out(bad, [batch.name(entry.key) for entry in entries], is_whole=True)
        kept = [position for position in range(len(sums)) if position not in left_out]
        return [entries[position] for position in kept], [[sums[position]] for position in kept]


def count_nonfinite(total: Any) -> int:
    """Return how many elements of a sum, dense or Rows, are NaN or Inf."""
    return reduce.count_nonfinite(total.values if isinstance(total, Rows) else total)


def total(entry: Entry, parts: Sequence[Any], *, may_share: bool = False, divisor: int = 1) -> Any:
    """Return the sum of the parts of one key, divided, beside the value (``may_share``: or the only part itself)."""
    if all(isinstance(part, Rows) for part in parts):
        return entry.merged(parts, divisor)
    dense = [entry.dense(part) for part in parts]
    return reduce.total(entry.tensor, dense, may_share=may_share, divisor=divisor)
