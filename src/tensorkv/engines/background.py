"""Background: the thread that finishes pushes while their caller goes on."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import TensorKVError, WorkerError
from .exchange import Exchange
from .meeting import Meeting
from .route import Stage

# How long the end of a process or a store waits for the thread.
_LAST_WORDS_S = 5.0


@dataclass(slots=True)
class _Job:
    exchange: Exchange
    who: Callable[[], list[int]]
    priority: int
    present: list[int] | None = None


class Background:
    """Pushes whose parts lie in the stage, and a thread that does the rest of them.

    The one with the highest priority comes first among those whose parts every worker has laid out; where none
    is complete, the oldest is waited for.

    Args:
        meeting: of this worker's host.
        in_order: whether other hosts wait for the pushes in the order in which they were made.
    """

    def __init__(self, meeting: Meeting, *, in_order: bool) -> None:
        self._meeting, self._in_order = meeting, in_order
        self._jobs: list[_Job] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False

    def add(self, exchange: Exchange, who: Callable[[], list[int]], priority: int) -> None:
        """Take over a push; ``who`` is called once and tells which workers take part."""
        with self._changed:
            self._jobs.append(_Job(exchange, who, priority))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="tensorkv-dist", daemon=True)
                self._thread.start()
                atexit.register(self._leave_process)
            self._changed.notify_all()

    def wait_for(self, what: Exchange | Stage | None) -> None:
        """Wait until a push, every push on a stage, or every push is done as far as this worker is concerned."""
        with self._changed:
            while any(what in (None, job.exchange, job.exchange.stage) for job in self._jobs):
                self._meeting.check()
                self._changed.wait(0.1)
        self._meeting.check()

    def _leave_process(self) -> None:
        # A process that ends while the thread waits inside of Gloo would be aborted.
        with self._changed:
            self._changed.wait_for(lambda: not self._jobs, _LAST_WORDS_S)
        self._meeting.group.cut_links()
        self.close()

    def close(self) -> None:
        """End the thread once it has done what it has begun."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(_LAST_WORDS_S)
            atexit.unregister(self._leave_process)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._jobs and not self._closing:
                    self._changed.wait()
                if self._closing:
                    return
                jobs = list(self._jobs)
            try:
                job = self._choose(jobs)
                if job.present is None:
                    job.present = job.who()
                job.exchange.serve(job.present)
                for _, problem in job.exchange.failed:
                    raise problem
            except TensorKVError as error:
                self._meeting.stop(error)
                job = None
            except BaseException as error:
                self._meeting.stop(WorkerError(f"a push broke off in the background: {type(error).__name__}: {error}"))
                job = None
            with self._changed:
                if job is None:
                    self._jobs.clear()
                else:
                    self._jobs.remove(job)
                self._changed.notify_all()
            # Else they would hold their stage until the next push.
            del job, jobs

    def _choose(self, jobs: list[_Job]) -> _Job:
        if self._in_order or len(jobs) == 1:
            return jobs[0]
        complete = []
        for job in jobs:
            if job.present is None:
                # In the order of the calls, for entries are written over in that order.
                if not self._meeting.has_been_entered(job.exchange.number):
                    break
                job.present = job.who()
            if job.exchange.is_laid_out():
                complete.append(job)
        return max(complete, key=lambda job: job.priority, default=jobs[0])
