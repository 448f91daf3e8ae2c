"""Pool: a few threads that run the slices of a push, each with one torch thread inside."""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch

from tensorkv.errors import ArgumentError, show

Job = Callable[[], Any]

# Work on fewer elements is done before a thread of the pool would have woken up.
WORTH_A_THREAD = 1 << 16
# Elements of at least a cache line.
_ALIGN = 64


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_threads() -> int:
    """Return the number of cores that this process may use, or fewer where ``OMP_NUM_THREADS`` says so.

    ``torchrun`` sets it to 1 where several workers share the cores of a host.
    """
    try:
        most = int(os.environ["OMP_NUM_THREADS"].partition(",")[0])
    except (KeyError, ValueError):
        return num_cores()
    return max(1, min(num_cores(), most))


def length_of_share(total: int, threads: int) -> int:
    """Return how many elements a thread does: a multiple of a cache line, which no two of them write then."""
    return max(_ALIGN, -(-total // threads // _ALIGN) * _ALIGN)


class OneTorchThread:
    """Let torch use one thread in this block: to wake others takes longer than small work does."""

    __slots__ = ("_outside",)

    def __enter__(self) -> None:
        self._outside = torch.get_num_threads()
        if self._outside > 1:
            torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        if self._outside > 1:
            torch.set_num_threads(self._outside)


class Pool:
    """Threads for the pieces of a push; started when first needed, ended by ``close`` or with the pool.

    They are daemons, so work can be given to them until the interpreter has ended, by exit handlers too. Where no
    thread can be started, the caller does the work.

    Args:
        threads: how many (None: as ``default_threads`` says).

    >>> pool = Pool(2)
    >>> done = []
    >>> pool.run([lambda: done.append(1), lambda: done.append(2)])
    >>> sorted(done)
    [1, 2]
    >>> pool.close()
    """

    def __init__(self, threads: int | None = None) -> None:
        if threads is not None and (type(threads) is not int or threads < 1):
            raise ArgumentError(f"threads is {show(threads)}; expected an int of at least 1, or None for the cores")
        self.threads = threads or default_threads()
        self._end: weakref.finalize[Any, Any] | None = None
        self._shares: SimpleQueue[_Share | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._process = 0
        self._starting = threading.Lock()
        _pools.add(self)

    def run(self, jobs: Sequence[Job]) -> None:
        """Run jobs that touch different memory; return when all have run, raise what a failed one raised.

        Args:
            jobs: at least one.
        """
        count = min(self.threads, len(jobs))
        shares = [_Share(jobs[first::count]) for first in range(count)]
        if not self._hand_over(shares):
            with OneTorchThread():
                for job in jobs:
                    job()
            return
        for share in shares:
            share.done.acquire()
        for share in shares:
            if share.error is not None:
                raise share.error

    def share(self, numel: int, work: Callable[[int, int], Any], *, least: int = WORTH_A_THREAD) -> None:
        """Do work on some elements, of which a few threads each take a range if there are enough.

        Args:
            numel: how many.
            work: does those from a first to an end; ranges may be done at the same time.
            least: so many are enough.
        """
        if numel < least or self.threads == 1:
            work(0, numel)
            return
        length = length_of_share(numel, self.threads)
        self.run([partial(work, start, start + length) for start in range(0, numel, length)])

    def is_worth(self, outs: Sequence[torch.Tensor]) -> bool:
        """Return whether filling these tensors is work for the pool.

        Inference tensors are not: the pool's threads are not in the caller's ``torch.inference_mode``.
        """
        return sum([out.numel() for out in outs]) >= WORTH_A_THREAD and all(
            out.is_cpu and not out.is_inference() for out in outs
        )

    def close(self) -> None:
        """End the threads when they have done what they were given; a later ``run`` starts new ones."""
        with self._starting:
            ending, self._threads = self._threads, []
            if self._end is not None:
                self._end()
                self._end = None
        # The interpreter ends daemons without a word.
        for thread in () if sys.is_finalizing() else ending:
            thread.join()

    def _hand_over(self, shares: Sequence[_Share]) -> bool:
        """Give shares to the threads, which are started if they are not; False where that cannot be."""
        # The lock: what is put behind the end of the threads, nobody takes.
        with self._starting:
            if sys.is_finalizing() or not (self._is_started() or self._start_threads()):
                return False
            for share in shares:
                self._shares.put(share)
            return True

    def _is_started(self) -> bool:
        return self._end is not None and self._process == os.getpid()

    def _start_threads(self) -> bool:
        outside = torch.get_num_threads()
        # A forked child has none of its parent's threads.
        self._shares, ready = SimpleQueue(), threading.Semaphore(0)
        self._threads = []
        try:
            for _ in range(self.threads):
                thread = threading.Thread(target=_serve, args=(self._shares, ready), name="tensorkv-pool", daemon=True)
                thread.start()
                self._threads.append(thread)
        except RuntimeError:
            _end_threads(self._shares, len(self._threads))
            return False
        for _ in self._threads:
            ready.acquire()
        # Setting a thread's number also sets what threads that start later will find.
        torch.set_num_threads(outside)
        self._process = os.getpid()
        self._end = weakref.finalize(self, _end_threads, self._shares, self.threads)
        self._end.atexit = False
        return True


class _Share:
    """What one thread does of a call's jobs."""

    __slots__ = ("_jobs", "done", "error")

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = jobs
        self.done = threading.Lock()
        self.done.acquire()
        self.error: BaseException | None = None

    def do(self) -> None:
        try:
            for job in self._jobs:
                job()
        except BaseException as error:
            self.error = error
        finally:
            self._jobs = ()
            self.done.release()


def _serve(shares: SimpleQueue[_Share | None], ready: threading.Semaphore) -> None:
    # torch sets a thread's number when it is first asked for, and would undo ours.
    torch.get_num_threads()
    torch.set_num_threads(1)
    ready.release()
    while (share := shares.get()) is not None:
        share.do()
        # Else its error, and what that leads to, would stay until the next one comes.
        del share


_pools: weakref.WeakSet[Pool] = weakref.WeakSet()


def _unlock_in_child() -> None:
    """Let a forked child start threads: another thread of its parent may have been starting some."""
    for pool in _pools:
        pool._starting = threading.Lock()


os.register_at_fork(after_in_child=_unlock_in_child)


def _end_threads(shares: SimpleQueue[_Share | None], count: int) -> None:
    for _ in range(count):
        shares.put(None)
