"""Guard: what workers in step do with a sum that has NaN or Inf."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tensorkv.arrays.arguments import Key
from tensorkv.arrays.rows import Rows
from tensorkv.errors import NonFiniteError, quote
from tensorkv.shard import reduce
from tensorkv.shard.nonfinite import NonFinite

from .group import ProcessGroup


class Guard:
    """Refuses or leaves out sums that are not finite, on every worker alike.

    Args:
        group: of all workers.
        mode: ``"raise"`` or ``"skip"``.
    """

    def __init__(self, group: ProcessGroup, mode: NonFinite) -> None:
        self._group, self._mode = group, mode
        self.counts = {"raised": 0, "skipped": 0}

    def decide(self, mine: Mapping[int, int], names: Sequence[str], doing: str) -> tuple[set[int], Exception | None]:
        """Return which keys are to be left out, and the error if the whole call is refused.

        Args:
            mine: by key, how many elements are not finite in what this worker has summed.
            names: of the keys, for messages.
            doing: the call, for messages.
        """
        bad: dict[int, int] = {}
        for each in self._group.all_gather_json(list(mine.items()), doing):
            for key, count in each:
                bad[key] = bad.get(key, 0) + count
        bad = {key: count for key, count in sorted(bad.items()) if count}
        if bad and self._mode == "raise":
            key, count = next(iter(bad.items()))
            return set(range(len(names))), self._refuse(names[key], count)
        self.counts["skipped"] += len(bad)
        return set(bad), None

    def sift(self, verb: str, merged: dict[Key, Rows]) -> Exception | None:
        """Drop rows of keys whose sums are not finite, or return the error of the refused call."""
        for key in list(merged):
            count = reduce.count_nonfinite(merged[key].values)
            if count and self._mode == "raise":
                return self._refuse(f"{verb}({quote(key)})", count)
            if count:
                self.counts["skipped"] += 1
                del merged[key]
        return None

    def _refuse(self, name: str, count: int) -> NonFiniteError:
        self.counts["raised"] += 1
        return NonFiniteError(
            f"{name}: the sum of all workers' parts has {count} NaN or Inf elements; "
            'the store was created with nonfinite="raise", and nothing was changed'
        )
