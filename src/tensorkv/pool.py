"""Pool: a few threads that run the slices of a push, each with one torch thread inside."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch

from .errors import ArgumentError, show

Job = Callable[[], Any]

# Work on fewer elements is done before a thread of the pool would have woken up.
WORTH_A_THREAD = 1 << 16


def default_threads() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
    """Threads for the pieces of a push; started when first needed, ended by ``close``.

    Work in the pool always runs to its end. Python raises KeyboardInterrupt in the main thread only, and
    the main thread here only waits, so an interrupted push is a whole push: the exception is raised
    when the work is done.

    Args:
        threads: how many (None: as many as cores).

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
        self._executor: ThreadPoolExecutor | None = None

    def run(self, jobs: Sequence[Job], then: Job | None = None) -> None:
        """Run jobs that touch different memory; return when all have run, raise what a failed one raised.

        Args:
            jobs: at least one.
            then: what to do in the pool when every job has succeeded.
        """
        executor = self._start()
        count = min(self.threads, len(jobs))
        left = _Countdown(count, then)
        futures = [executor.submit(_run_all, jobs[first::count], left) for first in range(count)]
        _wait_for_all(futures)
        for future in futures:
            future.result()

    def is_worth(self, outs: Sequence[torch.Tensor]) -> bool:
        """Tell whether filling these tensors is work for the pool.

        Inference tensors are not: the pool's threads are not in the caller's ``torch.inference_mode``.
        """
        return sum([out.numel() for out in outs]) >= WORTH_A_THREAD and all(
            out.is_cpu and not out.is_inference() for out in outs
        )

    def close(self) -> None:
        """End the threads; a later ``run`` starts new ones."""
        if self._executor is not None:
            self._executor.shutdown()
            self._executor = None

    def _start(self) -> ThreadPoolExecutor:
        if self._executor is None:
            outside = torch.get_num_threads()
            together = threading.Barrier(self.threads)
            executor = ThreadPoolExecutor(self.threads, thread_name_prefix="tensorkv")
            wait([executor.submit(_use_one_torch_thread, together) for _ in range(self.threads)])
            # Setting a thread's number also sets what threads that start later will find.
            torch.set_num_threads(outside)
            self._executor = executor
        return self._executor


def _use_one_torch_thread(together: threading.Barrier) -> None:
    # Wait for the others, so that each thread of the pool runs this once.
    together.wait(timeout=60)
    # torch sets a thread's number when it is first asked for, and would undo ours.
    torch.get_num_threads()
    torch.set_num_threads(1)


class _Countdown:
    def __init__(self, count: int, then: Job | None) -> None:
        self._count = count
        self._then = then
        self._lock = threading.Lock()

    def down(self) -> None:
        with self._lock:
            self._count -= 1
            last = self._count == 0
        if last and self._then is not None:
            self._then()


def _run_all(jobs: Sequence[Job], left: _Countdown) -> None:
    for job in jobs:
        job()
    left.down()


def _wait_for_all(futures: Sequence[Future[None]]) -> None:
    interrupt: KeyboardInterrupt | None = None
    while True:
        try:
            wait(futures)
            break
        except KeyboardInterrupt as caught:
            interrupt = caught
    if interrupt is not None and not any(future.exception() for future in futures):
        raise interrupt
