"""Long polls: a request that waits for others is answered after a moment with what it waits for, and sent again.

So neither a dead worker nor a dead client holds a thread of the server for long.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

# How long a request waits before it is answered.
POLL_TIMEOUT_S = 1.0
# How often a waiting request evaluates its condition without a notification: workers die by the clock alone.
_RECHECK_S = 0.05


class AwakeClock:
    """A clock that counts only the time in which this process was running, for judging missing heartbeats.

    It has to be read often: of the time between two readings, no more than a limit counts. So a server that was
    stopped, and has heartbeats that it has not read yet, takes no worker for dead.

    Args:
        now: a clock in seconds.
        limit_s: of the time between two readings.

    >>> times = iter([10.0, 11.0, 500.0])
    >>> clock = AwakeClock(lambda: next(times), 2.0)
    >>> clock(), clock()
    (1.0, 3.0)
    """

    def __init__(self, now: Callable[[], float], limit_s: float) -> None:
        self._now, self._limit_s = now, limit_s
        self._lock = threading.Lock()
        self._at, self._awake = now(), 0.0

    def __call__(self) -> float:
        with self._lock:
            at = self._now()
            self._awake += max(0.0, min(at - self._at, self._limit_s))
            self._at = at
            return self._awake


class RetryLater(Exception):  # noqa: N818
    """The condition of a request does not hold yet; the text says what it waits for. The client sends it again."""


class Condition:
    """A lock with a condition variable whose waits are limited to the poll timeout.

    >>> condition = Condition(poll_timeout_s=0.01)
    >>> with condition:
    ...     condition.wait_for(lambda: True, lambda: "nothing")
    >>> with condition:
    ...     condition.wait_for(lambda: False, lambda: "rank 1")
    Traceback (most recent call last):
        ...
    tensorkv.engines.ps.server.wait.RetryLater: rank 1
    """

    def __init__(self, poll_timeout_s: float = POLL_TIMEOUT_S) -> None:
        self._condition = threading.Condition(threading.RLock())
        self._poll_timeout_s = poll_timeout_s
        self._of_thread = threading.local()
        self.count = 0
        """How many waits there were."""
        self.seconds = 0.0
        """How long all of them took."""

    def __enter__(self) -> None:
        self._condition.__enter__()

    def __exit__(self, *_: object) -> None:
        self._condition.__exit__(None, None, None)

    def notify_all(self) -> None:
        """Wake every waiting request."""
        self._condition.notify_all()

    def set_poll_timeout(self, seconds: float | None) -> None:
        """Shorten the waits of this thread, for a client whose deadline is near; None restores the default."""
        self._of_thread.s = self._poll_timeout_s if seconds is None else min(self._poll_timeout_s, seconds)

    def wait_for(self, predicate: Callable[[], bool], reason: Callable[[], str]) -> None:
        """Wait, with the lock released, until a predicate holds.

        Args:
            predicate: called with the lock held.
            reason: returns what is waited for.

        Raises:
            RetryLater: it does not hold yet; the text is the reason.
        """
        if predicate():
            return
        start, poll_timeout_s = time.monotonic(), getattr(self._of_thread, "s", self._poll_timeout_s)
        self.count += 1
        try:
            while (left := start + poll_timeout_s - time.monotonic()) > 0:
                self._condition.wait(min(left, _RECHECK_S))
                if predicate():
                    return
        finally:
            self.seconds += time.monotonic() - start
        raise RetryLater(reason())
