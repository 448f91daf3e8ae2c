"""Waits: requests that have to wait for others wait a moment, and are then answered with whom they wait for.

The worker asks again. So neither a lost worker nor a lost server keeps a thread for ever.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

# How long a request waits before it is answered.
PATIENCE_S = 1.0
# How often somebody who waits looks whether a worker has been lost.
_LOOK_S = 0.05


class AwakeClock:
    """A clock that counts only the time in which this process was running, for judging who is silent.

    Somebody has to look at it often: of the time between two looks, no more than a limit counts. A server that stood
    still, and has messages that it has not read yet, so takes nobody for lost.

    Args:
        now: a clock in seconds.
        limit_s: of the time between two looks.

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


class Waits(Exception):  # noqa: N818
    """What is waited for, as an answer to a request."""


class Monitor:
    """A lock with changes to wait for.

    >>> monitor = Monitor(patience_s=0.01)
    >>> with monitor:
    ...     monitor.wait_until(lambda: True, lambda: "nobody")
    >>> with monitor:
    ...     monitor.wait_until(lambda: False, lambda: "rank 1")
    Traceback (most recent call last):
        ...
    tensorkv.engines.ps.server.wait.Waits: rank 1
    """

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self._condition = threading.Condition(threading.RLock())
        self._patience_s = patience_s
        self._own = threading.local()
        self.count = 0
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._condition.__enter__()

    def __exit__(self, *_: object) -> None:
        self._condition.__exit__(None, None, None)

    def changed(self) -> None:
        """Let all who wait look again."""
        self._condition.notify_all()

    def be_patient(self, seconds: float | None) -> None:
        """Let this thread's waits be shorter than usual, for a client whose time is running out."""
        self._own.patience_s = self._patience_s if seconds is None else min(self._patience_s, seconds)

    def wait_until(self, holds: Callable[[], bool], whom: Callable[[], str]) -> None:
        """Wait, without the lock, until something holds.

        Raises:
            Waits: it does not hold yet; the text is what ``whom`` says.
        """
        if holds():
            return
        start, patience_s = time.monotonic(), getattr(self._own, "patience_s", self._patience_s)
        self.count += 1
        try:
            while (left := start + patience_s - time.monotonic()) > 0:
                self._condition.wait(min(left, _LOOK_S))
                if holds():
                    return
        finally:
            self.seconds += time.monotonic() - start
        raise Waits(whom())
