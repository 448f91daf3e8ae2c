"""Rounds: how far each worker is, who is alive, and who has to wait for whom. No arrays, no messages.

A worker's round is how often it has pushed the key that it has pushed most. Bounded staleness after Ho et al.,
"More Effective Distributed ML via a Stale Synchronous Parallel Parameter Server", NeurIPS 2013.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tensorkv.arrays.arguments import Key


@dataclass(slots=True)
class _Worker:
    seen: float | None = None
    left: bool = False
    lost: bool = False
    base: int = 0
    counts: dict[Key, int] = field(default_factory=dict)
    most: int = 0

    @property
    def round(self) -> int:
        return self.base + self.most


class Rounds:
    """The workers of a store as one server sees them; every method may be called from several threads.

    Args:
        num_workers: ranks that are expected, whether they have come yet or not.
        lost_after_s: a worker that was here and has been silent for so long is lost: nobody waits for it.
        now: a clock in seconds.

    >>> rounds = Rounds(2, lost_after_s=5)
    >>> rounds.seen(0)
    False
    >>> rounds.pushed(0, ["w"])
    >>> rounds.ahead(0), rounds.behind(0, 0)
    (1, [1])
    """

    def __init__(self, num_workers: int, lost_after_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self._num_workers, self._lost_after_s = num_workers, lost_after_s
        self._now = now
        self._workers = {rank: _Worker() for rank in range(num_workers)}
        self._lock = threading.RLock()
        self.most_ahead = 0
        """The largest lead over the slowest live worker that a worker has had after a push."""

    def seen(self, rank: int) -> bool:
        """Note that a worker is alive; tell whether it has been lost, and has to be found again."""
        with self._lock:
            worker = self._workers[rank]
            # First, or it would be found to be lost once more.
            worker.seen = self._now()
            return worker.lost

    def base_of(self, rank: int) -> int:
        """Return the base of a worker that has been lost and comes back: it goes on where the slowest is."""
        with self._lock:
            worker = self._workers[rank]
            others = [each.round for other, each in self._live() if other != rank]
            return max(worker.base, min(others, default=worker.round) - worker.most)

    def find(self, rank: int) -> None:
        """Wait again for a worker that was lost."""
        with self._lock:
            self._workers[rank].lost = False

    def lose(self, rank: int) -> None:
        """Wait no more for a worker that is gone, though it has come once."""
        with self._lock:
            worker = self._workers[rank]
            worker.seen, worker.lost = float("-inf"), True

    def slowest_but(self, rank: int) -> int:
        """Return the round of the slowest live worker other than one."""
        with self._lock:
            return min((each.round for other, each in self._live() if other != rank), default=0)

    def begin(self, rank: int, base: int) -> None:
        """Expect a worker that begins at a round: one that had left, or another in its place."""
        with self._lock:
            worker = self._workers[rank]
            worker.left, worker.lost = False, False
            worker.base, worker.counts, worker.most = base, {}, 0

    def begin_all(self, ranks: Sequence[int]) -> None:
        """Count every worker from round 0 on, and expect those again that had left."""
        with self._lock:
            for rank, worker in self._workers.items():
                worker.base, worker.counts, worker.most = 0, {}, 0
                worker.left = worker.left and rank not in ranks

    def move(self, rank: int, base: int) -> None:
        """Count a worker's pushes from another round on."""
        with self._lock:
            self._workers[rank].base = base

    def pushed(self, rank: int, keys: Sequence[Key]) -> None:
        """Count a push of some keys."""
        with self._lock:
            worker = self._workers.setdefault(rank, _Worker())
            counts = worker.counts
            for key in keys:
                counts[key] = count = counts.get(key, 0) + 1
                if count > worker.most:
                    worker.most = count
            self.most_ahead = max(self.most_ahead, self.ahead(rank))

    def leave(self, rank: int) -> None:
        """Wait for this worker no more."""
        with self._lock:
            self._workers[rank].left = True

    def end(self, rank: int) -> None:
        """Wait for this worker no more, which has said goodbye; for a reader nobody waits anyway."""
        with self._lock:
            worker = self._workers.get(rank)
            if worker is not None:
                worker.left, worker.lost, worker.seen = True, False, None

    def all_left(self) -> bool:
        """Tell whether every worker has left or is lost."""
        with self._lock:
            return not self._live()

    def ahead(self, rank: int) -> int:
        """Return by how many rounds a worker is ahead of the slowest live one."""
        with self._lock:
            live = [worker.round for _, worker in self._live()]
            return max(0, self._workers[rank].round - min(live, default=self._workers[rank].round))

    def behind(self, rank: int, staleness: int) -> list[int]:
        """Return the live workers that are more than so many rounds behind one."""
        with self._lock:
            mine = self._workers[rank].round
            return [other for other, worker in self._live() if mine - worker.round > staleness]

    def live(self) -> list[int]:
        """Return the ranks that are waited for: those alive, and those that have not come yet."""
        with self._lock:
            return [rank for rank, _ in self._live()]

    def here(self) -> list[int]:
        """Return the ranks that have come and are waited for."""
        with self._lock:
            return [rank for rank, worker in self._live() if worker.seen is not None]

    def describe(self, ranks: Sequence[int]) -> str:
        """Return how a message names ranks, and which of them nobody has seen."""
        with self._lock:
            unseen = [rank for rank in ranks if self._workers[rank].seen is None]
            expected = f" ({unseen} of num_workers={len(self._workers)} have not come at all)" if unseen else ""
            return f"ranks {list(ranks)}{expected}"

    def lead(self) -> int:
        """Return by how many rounds the fastest live worker is ahead of the slowest."""
        with self._lock:
            rounds = [worker.round for _, worker in self._live()]
            return max(rounds, default=0) - min(rounds, default=0)

    def dead(self) -> list[int]:
        """Return the ranks that were here and have been silent for too long."""
        with self._lock:
            self._look()
            return sorted(rank for rank, worker in self._workers.items() if worker.lost and worker.seen is not None)

    def has_left(self, rank: int) -> bool:
        """Tell whether a worker is not waited for because it has said so."""
        with self._lock:
            return self._workers[rank].left

    def to_plain(self) -> list[Any]:
        """Return how far each worker is, as plain data: for ``restore``."""
        with self._lock:
            return [
                [rank, each.base, each.left, list(each.counts.items())]
                for rank, each in self._workers.items()
                if each.base or each.left or each.counts
            ]

    def restore(self, described: Sequence[Any]) -> None:
        """Take over what ``to_plain`` returned; which workers are dead, and when each was seen, stays."""
        with self._lock:
            for rank in [rank for rank in self._workers if rank >= self._num_workers]:
                # Of a store that had more workers, in the same folder.
                del self._workers[rank]
            for worker in self._workers.values():
                worker.base, worker.left, worker.counts, worker.most = 0, False, {}, 0
            self.most_ahead = 0
            for rank, base, left, counts in described:
                worker = self._workers.setdefault(rank, _Worker())
                worker.base, worker.left, worker.counts = base, left, dict(counts)
                worker.most = max(worker.counts.values(), default=0)

    def read(self) -> dict[int, int]:
        """Return every worker's round."""
        with self._lock:
            return {rank: worker.round for rank, worker in sorted(self._workers.items())}

    def _live(self) -> list[tuple[int, _Worker]]:
        self._look()
        return [(rank, self._workers[rank]) for rank in sorted(self._workers) if not self._is_gone(rank)]

    def _is_gone(self, rank: int) -> bool:
        return self._workers[rank].lost or self._workers[rank].left

    def _look(self) -> None:
        horizon = self._now() - self._lost_after_s
        for worker in self._workers.values():
            if worker.seen is not None and worker.seen < horizon:
                worker.lost = True
