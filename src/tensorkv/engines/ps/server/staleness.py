"""The round of each worker: who is alive, who is ahead of whom, and who has to wait. No arrays, no messages.

A worker's round is how often it has pushed the key that it has pushed most. Bounded staleness after Ho et al.,
"More Effective Distributed ML via a Stale Synchronous Parallel Parameter Server", NeurIPS 2013.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tensorkv.arrays.arguments import Key


@dataclass(slots=True)
class _Worker:
    """Of one rank: its last message, its state, and its round, which is counted from a base."""

    last_seen: float | None = None
    has_left: bool = False
    is_dead: bool = False
    base: int = 0
    counts: Counter[Key] = field(default_factory=Counter)
    most: int = 0

    @property
    def round(self) -> int:
        return self.base + self.most

    @property
    def is_live(self) -> bool:
        return not self.is_dead and not self.has_left

    def restart_at(self, base: int) -> None:
        self.base, self.counts, self.most = base, Counter(), 0


class StalenessClock:
    """The workers of a store as one server sees them; every method may be called from several threads.

    Args:
        num_workers: expected ranks, whether they have connected yet or not.
        heartbeat_timeout_s: a worker that has not been heard of for so long is dead, and no round waits for it.
        now: a clock in seconds.

    >>> clock = StalenessClock(2, heartbeat_timeout_s=5)
    >>> clock.heartbeat(0)
    False
    >>> clock.count_push(0, ["w"])
    >>> clock.ahead(0), clock.behind(0, 0)
    (1, [1])
    """

    def __init__(self, num_workers: int, heartbeat_timeout_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self._num_workers, self._heartbeat_timeout_s = num_workers, heartbeat_timeout_s
        self._now = now
        self._workers = {rank: _Worker() for rank in range(num_workers)}
        self._lock = threading.RLock()
        self.most_ahead = 0
        """The largest lead over the slowest live worker that a worker has had after a push."""

    # ------------------------------------------------------------ who is alive

    def heartbeat(self, rank: int) -> bool:
        """Note that a worker is alive; return whether it was dead, and has to be revived."""
        with self._lock:
            worker = self._workers[rank]
            # Before any look at the others, which would find this worker dead again.
            worker.last_seen = self._now()
            return worker.is_dead

    def revive(self, rank: int) -> None:
        """Wait again for a worker that was dead."""
        with self._lock:
            self._workers[rank].is_dead = False

    def mark_dead(self, rank: int) -> None:
        """Stop waiting for a worker that was here once and has ended."""
        with self._lock:
            worker = self._workers[rank]
            worker.last_seen, worker.is_dead = float("-inf"), True

    def leave(self, rank: int) -> None:
        """Stop waiting for a worker that has called ``leave``."""
        with self._lock:
            self._logged(rank).has_left = True

    def disconnect(self, rank: int) -> None:
        """Stop waiting for a worker that has closed the store; no round waits for a reader anyway."""
        with self._lock:
            worker = self._workers.get(rank)
            if worker is not None:
                worker.has_left, worker.is_dead, worker.last_seen = True, False, None

    def live(self) -> list[int]:
        """Return the ranks that rounds wait for: those alive, and those that have not connected yet."""
        with self._lock:
            return [rank for rank, _ in self._live()]

    def connected(self) -> list[int]:
        """Return the live ranks that have connected."""
        with self._lock:
            return [rank for rank, worker in self._live() if worker.last_seen is not None]

    def dead(self) -> list[int]:
        """Return the ranks whose heartbeats have stopped."""
        with self._lock:
            self._update_dead()
            return sorted(
                rank for rank, worker in self._workers.items() if worker.is_dead and worker.last_seen is not None
            )

    def all_left(self) -> bool:
        """Return whether every worker has left or is dead."""
        with self._lock:
            return not self._live()

    def describe(self, ranks: Sequence[int]) -> str:
        """Return how a message names ranks, and which of them never connected."""
        with self._lock:
            unseen = [rank for rank in ranks if self._workers[rank].last_seen is None]
            if not unseen:
                return f"ranks {list(ranks)}"
            who = "never connected" if unseen == list(ranks) else f"{unseen} never connected"
            return f"ranks {list(ranks)} ({who}; num_workers={len(self._workers)})"

    # ------------------------------------------------------------ rounds

    def count_push(self, rank: int, keys: Sequence[Key]) -> None:
        """Count a push of some keys."""
        with self._lock:
            worker = self._logged(rank)
            worker.counts.update(keys)
            worker.most = max(worker.most, max(map(worker.counts.__getitem__, keys), default=0))
            self.most_ahead = max(self.most_ahead, self.ahead(rank))

    def forget_keys(self, keys: Iterable[Key]) -> None:
        """Forget how often keys that are gone were pushed; the rounds stay."""
        with self._lock:
            for worker in self._workers.values():
                for key in keys:
                    worker.counts.pop(key, None)

    def rounds(self) -> dict[int, int]:
        """Return every worker's round."""
        with self._lock:
            return {rank: worker.round for rank, worker in sorted(self._workers.items())}

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

    def spread(self) -> int:
        """Return by how many rounds the fastest live worker is ahead of the slowest."""
        with self._lock:
            rounds = [worker.round for _, worker in self._live()]
            return max(rounds, default=0) - min(rounds, default=0)

    def slowest_but(self, rank: int) -> int:
        """Return the round of the slowest live worker other than one."""
        with self._lock:
            return min((each.round for other, each in self._live() if other != rank), default=0)

    def base_for_revival(self, rank: int) -> int:
        """Return the base with which a worker that was dead continues at the round of the slowest."""
        with self._lock:
            worker = self._workers[rank]
            others = [each.round for other, each in self._live() if other != rank]
            return max(worker.base, min(others, default=worker.round) - worker.most)

    def set_base(self, rank: int, base: int) -> None:
        """Count a worker's pushes from another base on."""
        with self._lock:
            self._logged(rank).base = base

    def start(self, rank: int, base: int) -> None:
        """Wait for a worker that begins at a round: one that had left, or a replacement."""
        with self._lock:
            worker = self._logged(rank)
            worker.has_left, worker.is_dead = False, False
            worker.restart_at(base)

    def start_all(self, ranks: Sequence[int]) -> None:
        """Count every worker from round 0 on, and wait again for these, which had left."""
        with self._lock:
            for rank, worker in self._workers.items():
                worker.restart_at(0)
                worker.has_left = worker.has_left and rank not in ranks

    # ------------------------------------------------------------ in a snapshot of the log

    def to_plain(self) -> list[Any]:
        """Return the round of each worker as plain data, for ``restore``."""
        with self._lock:
            return [
                [rank, each.base, each.has_left, list(each.counts.items()), each.most]
                for rank, each in self._workers.items()
                if each.base or each.has_left or each.most
            ]

    def restore(self, described: Sequence[Any]) -> None:
        """Take over what ``to_plain`` returned; which workers are dead, and when each was seen last, stays."""
        with self._lock:
            for rank in [rank for rank in self._workers if rank >= self._num_workers]:
                # Of a store that had more workers, in the same folder.
                del self._workers[rank]
            for worker in self._workers.values():
                worker.restart_at(0)
                worker.has_left = False
            self.most_ahead = 0
            for rank, base, has_left, counts, most in described:
                worker = self._workers.setdefault(rank, _Worker())
                worker.base, worker.has_left, worker.counts, worker.most = base, has_left, Counter(dict(counts)), most

    def _logged(self, rank: int) -> _Worker:
        """Return a worker that a log names; the log may begin with a store that had more workers."""
        return self._workers.setdefault(rank, _Worker())

    def _live(self) -> list[tuple[int, _Worker]]:
        self._update_dead()
        return [(rank, worker) for rank, worker in sorted(self._workers.items()) if worker.is_live]

    def _update_dead(self) -> None:
        horizon = self._now() - self._heartbeat_timeout_s
        for worker in self._workers.values():
            if worker.last_seen is not None and worker.last_seen < horizon:
                worker.is_dead = True
