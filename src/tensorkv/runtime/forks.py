"""Forks: a forked child leaves alone what its parent has made.

A child has a copy of each object of its parent and of each descriptor, but none of its threads. A destructor that runs
in the child can wait for a thread that is not there, or close for both what both have open: links through Gloo, a
rendezvous store. So what was made before a fork is never finalized in the child, and what the interpreter calls at its
end asks ``count`` first.
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
"""How many forks lie between this process and the first one; who made something compares."""

_kept: weakref.WeakSet[Any] = weakref.WeakSet()
# Sockets that no child is to hold, by number: what the kernel calls them.
_own: dict[int, str] = {}


def keep(made: Any) -> None:
    """Have forked children never finalize an object, nor what it refers to."""
    _kept.add(made)


def keep_socket(number: int) -> None:
    """Have children, forked or started, not hold this socket.

    While a child holds a copy of a connection, the other end does not notice that this process has died; while it
    holds one of a socket that listens, nobody else can listen there.
    """
    with suppress(OSError):
        os.set_inheritable(number, False)
        _own[number] = os.readlink(f"/proc/self/fd/{number}")


@contextmanager
def keep_sockets() -> Iterator[None]:
    """Do so with the sockets that a library opens in this block; Python's own are not inheritable from the start."""
    before = _inheritable_sockets()
    yield
    for number in _inheritable_sockets() - before:
        keep_socket(number)


def _inheritable_sockets() -> set[int]:
    found = set()
    for number in map(int, os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ()):
        # One of them was that of the listing.
        with suppress(OSError):
            if os.get_inheritable(number) and stat.S_ISSOCK(os.fstat(number).st_mode):
                found.add(number)
    return found


def _close_sockets() -> None:
    for number, name in _own.items():
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{number}") == name:
                os.close(number)
    _own.clear()


def never_finalize(made: Any) -> None:
    """Keep an object, and what it refers to, beyond the end of the interpreter."""
    # One reference too many: the last collection does not take it for garbage either.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(made))


def _begin_child() -> None:
    global count
    count += 1
    for made in list(_kept):
        never_finalize(made)
    _kept.clear()
    _close_sockets()


os.register_at_fork(after_in_child=_begin_child)
