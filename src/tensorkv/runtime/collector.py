"""Pauses of Python's garbage collector while many objects are made that stay."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """Make many objects in this block without a collection.

    The collector looks at all objects of the process again and again while their number grows; at a quarter more than
    before it looks at the oldest, too. Those that stay are looked at in vain.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
