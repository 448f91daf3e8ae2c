"""Pauses of Python's garbage collector while many objects are made that stay."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """Make many objects in this block without a collection.

    While the number of objects grows, the collector runs again and again, and each full collection visits every
    object of the process. Objects that stay alive make that wasted work. A ``gc.disable()`` of another thread is undone
    when the block ends.
    """
    global _is_paused
    if not gc.isenabled():
        yield
        return
    try:
        # In here, for a signal handler may raise as soon as it is done.
        _is_paused = True
        gc.disable()
        yield
    finally:
        gc.enable()
        _is_paused = False


_is_paused = False


def _go_on_in_child() -> None:
    """Let a forked child collect: the thread that would end the pause is not there."""
    global _is_paused
    if _is_paused:
        gc.enable()
        _is_paused = False


os.register_at_fork(after_in_child=_go_on_in_child)
