"""Ray in a forked child: it is not used there, and the end of the child ends nothing of it.

Ray would end the parent's servers when the child ends or gets SIGTERM, or wait for threads that the child lacks.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys

import ray

from tensorkv.errors import ForkedStoreError
from tensorkv.runtime import forks

from . import _compat

_in_parent = False


def check() -> None:
    """Raise ForkedStoreError in a forked child of a process that was in a Ray cluster: Ray cannot join from here."""
    if _in_parent:
        raise ForkedStoreError(
            "create: the parent process was in a Ray cluster when it forked this one, and Ray does not work in a "
            'forked child; use the multiprocessing method "spawn" or "forkserver", or fork before you create the store'
        )


def _leave_to_parent() -> None:
    global _in_parent
    if not ray.is_initialized():
        return
    _in_parent = True
    # Objects with threads in Ray's C++ part are never freed: those of its modules, and those in reference cycles.
    gc.freeze()
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "ray":
            for thing in list(vars(module).values()):
                forks.immortalize(thing)
    _compat.leave_to_parent()
    _skip_exit_handlers_of_c()
    handler = signal.getsignal(signal.SIGTERM)
    if str(getattr(handler, "__module__", "")).startswith("ray."):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _skip_exit_handlers_of_c() -> None:
    """Let the process end, with its status, before the handlers that Ray's C++ part has registered run."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "on_exit"):
        # The handler that was registered last runs first; it is called with the status.
        libc.on_exit(ctypes.cast(libc._exit, ctypes.c_void_p), None)


os.register_at_fork(after_in_child=_leave_to_parent)
