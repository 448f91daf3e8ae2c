"""PushQueue: the thread that finishes pushes while their caller goes on."""

from __future__ import annotations

import atexit
import threading
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile

from tensorkv.errors import TensorKVError, WorkerError
from tensorkv.runtime import forks, shield

from .allreduce import AllReduce
from .chain import Chain, Presence
from .host import HostGroup, fingerprint
from .schedule import StagingBuffer

# How long the end of a process or a store waits for the thread.
_LAST_WORDS_S = 5.0


@dataclass(eq=False)
class _Job:
    exchange: AllReduce
    priority: int
    here: list[int] = field(default_factory=list)
    parts_come: bool = False

    @property
    def number(self) -> int:
        return self.exchange.number

    @cached_property
    def mark(self) -> bytes:
        return fingerprint(self.exchange.doing)

    @property
    def presence(self) -> Presence:
        return Presence(self.here, self.parts_come)


class PushQueue:
    """Pushes whose parts lie in the stage, and a thread that does the rest of them.

    The one with the highest priority comes first among those whose parts every worker has laid out; where none
    is complete, the oldest is waited for. Over hosts the worker of the first one chooses for those that it is linked
    with: a push that all of them have laid out, since a worker may wait for an older push before it makes the next.

    Args:
        host: of this worker's host.
        chain: to other hosts.
    """

    def __init__(self, host: HostGroup, chain: Chain) -> None:
        self._host, self._chain = host, chain
        self._jobs: list[_Job] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._forks = forks.count

    def add(self, exchange: AllReduce, priority: int) -> None:
        """Take over a push."""
        with self._changed:
            self._jobs.append(_Job(exchange, priority))
            if self._thread is None and not self._closing:
                self._start()
            self._changed.notify_all()
            is_served = self._thread is not None and self._thread.is_alive()
        if not is_served:
            # The interpreter is at its end.
            self._serve(list(self._jobs))

    def _start(self) -> None:
        thread = threading.Thread(target=self._work, name="tensorkv-dist", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            # From Python 3.12 on there are no new threads in an exit handler.
            return
        self._thread = thread
        forks.keep(self)
        atexit.register(self._leave_process)

    def wait_for(self, what: AllReduce | StagingBuffer | None) -> None:
        """Wait until a push, every push on a stage, or every push is done as far as this worker is concerned."""
        with self._changed:
            while any(what in (None, job.exchange, job.exchange.stage) for job in self._jobs):
                self._host.check()
                shield.check()
                self._changed.wait(0.1)
        self._host.check()

    def _leave_process(self) -> None:
        if self._forks != forks.count:
            # The thread, the pushes and the links are the parent's.
            return
        # A process that ends while the thread waits inside of Gloo would be aborted.
        with self._changed:
            is_done = self._changed.wait_for(lambda: not self._jobs, _LAST_WORDS_S)
        if not is_done:
            self._host.group.disconnect()
        # Exit handlers that were registered earlier run later, and may still push.
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
            self._serve(jobs)
            # Else they would hold their stage until the next push.
            del jobs

    def _serve(self, jobs: list[_Job]) -> None:
        """Do the one of these pushes that comes next."""
        job: _Job | None = None
        try:
            job = self._agreed(jobs)
            job.exchange.serve(job.presence)
            if self._chain.linked:
                self._chain.report(self._reach(), job.exchange.doing)
            for _, problem in job.exchange.failed:
                raise problem
        except TensorKVError as error:
            self._host.stop(error)
            job = None
        except BaseException as error:
            self._host.stop(WorkerError(f"a push broke off in the background: {type(error).__name__}: {error}"))
            job = None
        with self._changed:
            if job is None:
                self._jobs.clear()
            else:
                self._jobs.remove(job)
            self._changed.notify_all()

    def _agreed(self, jobs: list[_Job]) -> _Job:
        """Return the push that comes next, all hosts having agreed on it."""
        before = None
        if self._chain.before is None:
            job = self._choose(jobs)
        else:
            # The first host has chosen.
            number, before = self._chain.hear({each.number: (each.mark, each.exchange.doing) for each in jobs})
            job = next(each for each in jobs if each.number == number)
        for each in jobs[: jobs.index(job) + 1]:
            self._compare(each)
        if self._chain.linked:
            job.parts_come = self._chain.go_on(job.number, job.mark, job.exchange.doing, before).parts_come
        return job

    def _choose(self, jobs: list[_Job]) -> _Job:
        complete = [each for each in takewhile(self._is_complete, jobs) if each.number <= self._chain.reach]
        return max(complete, key=lambda job: job.priority, default=jobs[0])

    def _is_complete(self, job: _Job) -> bool:
        """Tell whether all workers of this host have laid their parts out; asked in the order of the calls."""
        if not job.here and not self._host.has_been_entered(job.number):
            return False
        self._compare(job)
        return job.exchange.is_staged(job.here)

    def _compare(self, job: _Job) -> None:
        # In the order of the calls, for entries are written over in that order.
        job.here = job.here or self._host.agree(job.number, job.exchange.doing)

    def _reach(self) -> int:
        """Return the last call up to which all workers of this host have laid their parts out."""
        with self._changed:
            jobs = list(self._jobs)
        return max((job.number for job in takewhile(self._is_complete, jobs)), default=-1)
