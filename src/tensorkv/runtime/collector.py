"""Pauses of Python's garbage collector while many objects are made that stay."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """Make many objects in this block without a collection.

    While the number of objects grows, the collector runs again and again, and each full collection visits every
    object of the process. Objects that stay alive make that wasted work.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
