"""Forks: keep a forked child from destroying what belongs to its parent.

A child has a copy of each object and descriptor of its parent, but none of its threads. A destructor that runs in the
child can wait for a thread that the child does not have, or close a connection that the parent uses: through Gloo, or
to a rendezvous store. So objects from before a fork are never finalized in the child, and exit handlers compare
``count`` first.
"""

from __future__ import annotations

import ctypes
import os
import stat
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

count = 0
"""How many forks lie between this process and the first one. An object that remembers it knows its process by it."""

_pinned: weakref.WeakSet[Any] = weakref.WeakSet()
# Descriptors of sockets that children close, and the kernel's names of the sockets.
_sockets: dict[int, str] = {}


def pin_in_children(thing: Any) -> None:
    """Have forked children never finalize an object, nor what it refers to."""
    _pinned.add(thing)


def close_in_children(descriptor: int) -> None:
    """Have forked children close a socket, and started ones not inherit it.

    While a child has a copy of a connection, the other end does not notice that this process has died. While it has a
    copy of a listening socket, no other process can listen on the port.
    """
    with suppress(OSError):
        os.set_inheritable(descriptor, False)
        _sockets[descriptor] = os.readlink(f"/proc/self/fd/{descriptor}")


@contextmanager
def closing_in_children() -> Iterator[None]:
    """Do so for the sockets that a library opens in this block; those of Python are never inheritable."""
    before = _inheritable_sockets()
    yield
    for descriptor in _inheritable_sockets() - before:
        close_in_children(descriptor)


def _inheritable_sockets() -> set[int]:
    found = set()
    for number in map(int, os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ()):
        # The descriptor of the listing itself is closed by now.
        with suppress(OSError):
            if os.get_inheritable(number) and stat.S_ISSOCK(os.fstat(number).st_mode):
                found.add(number)
    return found


def _close_sockets() -> None:
    for descriptor, name in _sockets.items():
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{descriptor}") == name:
                os.close(descriptor)
    _sockets.clear()


def immortalize(thing: Any) -> None:
    """Never finalize an object, nor what it refers to, not even at the end of the interpreter."""
    # With a reference that nothing holds, no garbage collection frees it.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def _begin_child() -> None:
    global count
    count += 1
    for thing in list(_pinned):
        immortalize(thing)
    _pinned.clear()
    _close_sockets()


os.register_at_fork(after_in_child=_begin_child)
