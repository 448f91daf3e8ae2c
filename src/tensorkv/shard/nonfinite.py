"""NonFinitePolicy: what a store does with a sum that has NaN or Inf; and what it decides about a push as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

from tensorkv.arrays.rows import Rows
from tensorkv.arrays.slices import Slices
from tensorkv.errors import ArgumentError, NonFiniteError, show

from . import native, reduce
from .entry import Batch, Entry
from .norm import Clipping, PushResult, SquareSum
from .pool import Pool

NonFinite = Literal["pass", "raise", "skip", "skip_step"]
MODES = ("pass", "raise", "skip", "skip_step")


class Decided(NamedTuple):
    """What is to be done with a push, whose sums were looked at.

    Args:
        entries: of the keys to be updated.
        sums: of these keys, each in a list.
        scale: of all gradients.
        result: what the caller is told.
    """

    entries: Sequence[Entry]
    sums: list[list[Any]]
    scale: float
    result: PushResult


class NonFinitePolicy:
    """Refuses or leaves out sums that are not finite.

    Args:
        mode: ``"pass"`` (sums are not checked), ``"raise"``, ``"skip"`` or ``"skip_step"``.
        all_gather: returns what each worker gives, for sums of which each worker has a part (None: one worker).

    Raises:
        ArgumentError: another mode.
    """

    def __init__(self, mode: NonFinite, all_gather: Callable[[Any], list[Any]] | None = None) -> None:
        if not isinstance(mode, str) or mode not in MODES:
            raise ArgumentError(f'nonfinite is {show(mode)}; expected "pass", "raise", "skip" or "skip_step"')
        self.checks = mode != "pass"
        self.skips = mode in ("skip", "skip_step")
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
        left_out = set(range(len(names))) if found and self._mode == "skip_step" else set(found)
        self.counts["skipped"] += len(left_out)
        return left_out

    def decide(
        self,
        batch: Batch,
        entries: Sequence[Entry],
        averages: bool,
        clipping: Clipping | None,
        add: Callable[..., Any] | None = None,
    ) -> Decided:
        """Make the sums of a push beside the values, and decide by all of them what to do.

        Args:
            batch: of a push.
            entries: of its keys.
            averages: whether means are made instead of sums.
            clipping: of the gradients (None: there is none).
            add: returns the sum of a key's parts, divided by a number (None: as a shard makes it).

        Raises:
            NonFiniteError: a sum is not finite, and the mode is ``"raise"``.
        """
        columns = zip(entries, batch.parts, batch.divisors(averages), strict=True)
        sums = [(add or total)(entry, parts, divisor=divisor) for entry, parts, divisor in columns]
        found_inf, left_out = None, set[int]()
        if self.checks:
            bad = {position: count_nonfinite(each) for position, each in enumerate(sums)}
            left_out = self.left_out(bad, [batch.name(entry.key) for entry in entries], is_whole=True)
            found_inf = bool(left_out)
        kept = [position for position in range(len(sums)) if position not in left_out]
        taken, wanted = [entries[position] for position in kept], [sums[position] for position in kept]
        squares = SquareSum() if clipping is None else squares_of(taken, wanted, clipping.rescale)
        scale, result = clip(squares, clipping, found_inf)
        return Decided(taken, [[each] for each in wanted], scale, result)

    def decide_plain(
        self, batch: native.Batch, clipping: Clipping | None, pool: Pool
    ) -> tuple[float, PushResult] | None:
        """Return the factor on the gradients of a plain batch, and what the caller is told; None: ask ``decide``."""
        if clipping is None and not self.checks:
            return 1.0, PushResult()
        rescale = 1.0 if clipping is None else clipping.rescale
        pool.share(batch.numel, partial(batch.add_squares, rescale))
        squares = SquareSum.of_batch(batch.squares)
        # What leaves sums out, or raises, is not done here.
        if self.checks and squares.rest != 0:
            return None
        return clip(squares, clipping, False if self.checks else None)

    def check_part(self, name: str, part: Any) -> None:
        """Raise NonFiniteError if a part is not finite and the mode is ``"raise"``; other modes look at whole sums.

        Args:
            name: of the call and the key, for messages.
            part: a tensor, Rows or Slices, in the dtype of the key, in which a number may be Inf.
        """
        if self._mode == "raise":
            count = sum(map(reduce.count_nonfinite, part.values)) if isinstance(part, Slices) else count_nonfinite(part)
            self.left_out({0: count}, [name], is_whole=True)

    @property
    def skips_steps(self) -> bool:
        """Whether one sum that is not finite has all of a push left out."""
        return self._mode == "skip_step"


def squares_of(entries: Sequence[Entry], sums: Sequence[Any], rescale: float) -> SquareSum:
    """Return the sum of the squares of some keys' rescaled sums."""
    held = {entry.key: entry for entry in entries}
    batch = native.look(held, list(held), list(sums), None, None, None) if entries and native.can_look() else None
    if batch is not None:
        batch.add_squares(rescale, 0, batch.numel)
        return SquareSum.of_batch(batch.squares)
    if len(entries) == 1:
        return SquareSum.of(sums[0], rescale)
    # What is not plain does not keep the others from the compiled part.
    return sum((squares_of([entry], [each], rescale) for entry, each in zip(entries, sums, strict=True)), SquareSum())


def clip(squares: SquareSum, clipping: Clipping | None, found_inf: bool | None) -> tuple[float, PushResult]:
    """Return the factor on all gradients, and what the caller of a push is told.

    Args:
        squares: of the gradients that are not left out.
        clipping: of them (None: there is none).
        found_inf: whether a sum had NaN or Inf (None: they were not checked).
    """
    if clipping is None:
        return 1.0, PushResult(found_inf)
    norm = squares.norm()
    is_finite = math.isfinite(norm)
    return clipping.factor(norm), PushResult(not is_finite if found_inf is None else found_inf, norm)


def count_nonfinite(total: Any) -> int:
    """Return how many elements of a sum, dense or Rows, are NaN or Inf."""
    return reduce.count_nonfinite(total.values if isinstance(total, Rows) else total)


def total(entry: Entry, parts: Sequence[Any], *, may_share: bool = False, divisor: int = 1) -> Any:
    """Return the sum of the parts of one key, divided, beside the value (``may_share``: or the only part itself)."""
    if all(isinstance(part, Rows) for part in parts):
        return entry.merged(parts, divisor)
    dense = [entry.dense(part) for part in parts]
    return reduce.total(entry.tensor, dense, may_share=may_share, divisor=divisor)
