"""Shield: make calls that an exception from a signal handler cannot interrupt halfway.

Python runs signal handlers in the main thread, between any two bytecodes, and what they raise (KeyboardInterrupt, a
TimeoutError of ``signal.alarm``, SystemExit on SIGTERM) unwinds whatever runs there. There are four ways around it:

- ``defer``: handlers run when the call has ended. It costs a few microseconds, and needs the compiled part.
- ``run``: the call is made in another thread while the main thread waits and runs handlers, so that they can end a
  call that waits for other processes. What they raise is raised when the call has ended. A call that a handler makes
  has a thread of its own, so it waits for the one that it interrupts as any thread's call does.
- ``run_steps``: a call written as a generator yields before it waits for other processes. It is made as by ``defer``
  until it yields, and as by ``run`` after that. To hand a call to another thread and back takes 15 to 120 µs, more
  than a short call itself.
- ``run_here``: the call is made as by ``defer``, and handlers also run where it waits and calls ``check``. Handlers may
  make calls there, so the call must hold no lock while it waits.

In each case the call has happened as a whole, or has not begun.

Rejected: undoing a half-made call (values are updated in place), blocking signals (the kernel then delivers them to
another thread, and the main thread still runs their handlers), and a lock that handlers may enter (they would see half
a push).
"""

from __future__ import annotations

import os
import sys
import threading
from _thread import allocate_lock, get_ident
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from contextvars import copy_context
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

from tensorkv.compiled import _signals

T = TypeVar("T")
Steps = Generator[None, None, T]
"""A call written as a generator: a bare ``yield`` means "from here on this call may wait for other processes".

``return`` gives the call's result. ``yield from`` makes one such call within another, ``run_steps`` makes it for the
caller of a verb, and ``finish`` makes it in a thread that may wait at any point.
"""

# How often a caller that waits lets signal handlers run whose signal came to another thread.
_POLL_S = 0.1


class Interrupted(BaseException):
    """Ends a wait for other processes whose caller has been interrupted, who raises what interrupted it."""


class _Call:
    """One call, which a serving thread claims to make it, or its interrupted caller to give it up."""

    __slots__ = ("_claim", "_work", "done", "error", "has_ended", "is_interrupted", "result")

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self._claim = allocate_lock()
        self.done = allocate_lock()
        self.done.acquire()
        self.is_interrupted = self.has_ended = False
        self.result: Any = None
        self.error: BaseException | None = None

    def make(self) -> None:
        """Do the work, unless it has been given up."""
        if not self._claim.acquire(blocking=False):
            return
        _thread.call = self
        try:
            self.result = self._work()
        except BaseException as error:
            self.error = error
        finally:
            _thread.call = None
            self._end()
            self.done.release()

    def wait(self) -> None:
        """Wait until the call has ended; handlers run meanwhile, and may raise."""
        while not self.done.acquire(timeout=_POLL_S):
            pass

    def take_result(self) -> Any:
        """Return what the ended call has returned, or raise what it has raised."""
        result, error = self.result, self.error
        # The error's traceback leads to the call; without this, both would wait for the garbage collector.
        self.error = self.result = None
        if error is None:
            return result
        try:
            raise error
        finally:
            del error

    def _end(self) -> None:
        # The thread remembers its last call, and with it would keep the caller's arrays alive.
        self._work = _nothing
        self.has_ended = True

    def settle(self) -> None:
        """Return when the call has been given up or has ended, whatever else is raised meanwhile."""
        if self._claim.acquire(blocking=False):
            self._end()
        else:
            self.interrupt()

    def interrupt(self) -> None:
        """Have the call's waits end; return when it has ended, whatever else is raised meanwhile."""
        self.is_interrupted = True
        # The interrupted caller may have taken the lock already.
        while not self.has_ended:
            try:
                self.done.acquire(timeout=_POLL_S)
            except BaseException:  # noqa: S112 - what came first is raised
                continue


class _CallHere:
    """A call in the main thread, and what a signal handler has raised while it waited."""

    __slots__ = ("error",)

    def __init__(self) -> None:
        self.error: BaseException | None = None

    @property
    def is_interrupted(self) -> bool:
        """Whether the call is to end; handlers of signals that have come run now."""
        if self.error is None:
            # What a handler calls is a call of its own.
            _thread.call = None
            try:
                _signals.run_handlers()
            except BaseException as error:
                self.error = error
            finally:
                _thread.call = self
        return self.error is not None


def _nothing() -> None:
    pass


class _Server:
    """A thread that makes calls for the main thread, one after the other."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[_Call] = SimpleQueue()
        self._last: _Call | None = None
        threading.Thread(target=self._serve, name="tensorkv-calls", daemon=True).start()

    @property
    def is_idle(self) -> bool:
        """Whether the call that it was given last has ended."""
        return self._last is None or self._last.has_ended

    def take(self, call: _Call) -> None:
        """Make a call as soon as the one before has ended."""
        self._last = call
        self._calls.put(call)

    def _serve(self) -> None:
        while True:
            call = self._calls.get()
            call.make()
            # Otherwise the caller's arrays would stay alive until the next call.
            del call


_thread = threading.local()
# The first makes the calls; a call that a signal handler makes during another has the next.
_servers: list[_Server] = []
_main = threading.main_thread().ident


def _reset() -> None:
    global _main
    # A forked child has none of the threads of its parent.
    _servers.clear()
    _thread.call = None
    _main = get_ident()
    if _signals is not None:
        _signals.after_fork()


os.register_at_fork(after_in_child=_reset)


def _idle_server() -> _Server | None:
    """Return a thread that has nothing to do; None where none can be started."""
    for server in _servers:
        if server.is_idle:
            return server
    try:
        _servers.append(_Server())
    except RuntimeError:
        # The interpreter is ending, and nobody interrupts it any more, or the system is out of threads.
        return None
    return _servers[-1]


def defer(work: Callable[..., T], *args: Any) -> T:
    """Make a call that waits for no other process, and have signal handlers run when it has ended.

    Args:
        work: the call; made in this thread, or as by ``run`` where the compiled part is missing.
        *args: its arguments.

    Returns:
        What the work returns.

    Raises:
        What the work raises; or what a signal handler raises, when the work has ended or before it has begun.

    >>> defer(max, 1, 2)
    2
    """
    if _signals is None:
        return run(work, *args)
    return work(*args) if get_ident() != _main or sys.is_finalizing() else _signals.defer(work, *args)


def run(work: Callable[..., T], *args: Any) -> T:
    """Make a call that no exception from a signal handler interrupts halfway.

    Args:
        work: the call; in the main thread it is made in another thread, in which the caller's context variables,
            grad mode, autocast, default device and CUDA streams hold. Elsewhere it is made at once, since no handler
            runs there.
        *args: its arguments.

    Returns:
        What the work returns.

    Raises:
        What the work raises; or what a signal handler has raised, when the work has ended or before it has begun.

    >>> run(max, 1, 2)
    2
    """
    if get_ident() != _main or sys.is_finalizing() or _is_here() or (server := _idle_server()) is None:
        return work(*args)
    call = _Call(_with_callers_modes(work, args))
    try:
        server.take(call)
        call.wait()
    except BaseException:
        call.settle()
        raise
    return call.take_result()  # type: ignore[no-any-return]


def run_here(work: Callable[..., T], *args: Any) -> T:
    """Make a call that no exception from a signal handler interrupts halfway, in this thread.

    Args:
        work: the call. Where it waits it calls ``check`` now and then, and holds no lock.
        *args: its arguments.

    Returns:
        What the work returns.

    Raises:
        What the work raises; or what a signal handler has raised, when the work has ended or before it has begun.

    >>> run_here(max, 1, 2)
    2
    """
    if get_ident() != _main or sys.is_finalizing():
        return work(*args)
    if _signals is None or _signals.is_deferring():
        # In a call as by ``defer``, which may hold locks, no handler may run.
        return run(work, *args)
    return _signals.defer(_make_here, work, args)


def _make_here(work: Callable[..., T], args: tuple[Any, ...]) -> T:
    call = _thread.call = _CallHere()
    try:
        return work(*args)
    finally:
        _thread.call = None
        error, call.error = call.error, None
        if error is not None:
            try:
                raise error
            finally:
                # The traceback leads here, and with this would wait for the garbage collector.
                del error


def _is_here() -> bool:
    """Return whether this thread makes a call as by ``run_here``."""
    return isinstance(getattr(_thread, "call", None), _CallHere)


def run_steps(steps: Steps[T]) -> T:
    """Make a call that no exception from a signal handler interrupts halfway, and that may have to wait for others.

    Args:
        steps: the call, which yields where it may have to wait for long. In the main thread, handlers run when it has
            ended or yielded; what comes after that is made as by ``run``. It must not leave settings of its thread,
            such as a grad mode, changed where it yields.

    Returns:
        What the steps return.

    Raises:
        What the steps raise; or what a signal handler has raised, when they have ended or before they have begun.

    >>> def steps():
    ...     yield
    ...     return 5
    >>> run_steps(steps())
    5
    """
    if get_ident() != _main or sys.is_finalizing():
        return finish(steps)
    if _signals is None:
        return run(finish, steps)
    handed: list[_Call] = []
    try:
        result = _signals.defer(_begin, steps, handed)
        if handed:
            handed[0].wait()
    except BaseException:
        if handed:
            # It has begun, and so it has to end.
            handed[0].interrupt()
        raise
    return handed[0].take_result() if handed else result  # type: ignore[return-value]


def _begin(steps: Steps[T], handed: list[_Call]) -> T | None:
    """Make a call up to where it yields, and hand the rest to another thread."""
    try:
        next(steps)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    server = _idle_server()
    if server is None:
        return finish(steps)
    call = _Call(_with_callers_modes(finish, (steps,)))
    handed.append(call)
    server.take(call)
    return None


def finish(steps: Steps[T]) -> T:
    """Make all steps of a call in this thread.

    >>> finish(value for value in ())
    """
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]


def check() -> None:
    """Raise ``Interrupted`` if the caller has been interrupted; for waits that may be given up.

    >>> check()
    """
    call: _Call | _CallHere | None = getattr(_thread, "call", None)
    if call is not None and call.is_interrupted:
        raise Interrupted("a signal handler raised an exception while the call waited")


def _with_callers_modes(work: Callable[..., Any], args: tuple[Any, ...]) -> Callable[[], Any]:
    context = copy_context()
    # An updater is the caller's function, and runs with the caller's settings.
    mode: AbstractContextManager[Any] = nullcontext() if torch.is_grad_enabled() else torch.no_grad()
    default = torch.get_default_device()
    device: AbstractContextManager[Any] = nullcontext() if default.type == "cpu" else default
    casts = [
        torch.autocast(kind, torch.get_autocast_dtype(kind), cache_enabled=torch.is_autocast_cache_enabled())
        for kind in ("cpu", "cuda")
        if torch.is_autocast_enabled(kind)
    ]
    streams = _Streams() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]

    def make() -> Any:
        with mode, device, ExitStack() as stack:
            for cast in casts:
                stack.enter_context(cast)
            if streams is not None:
                streams.enter()
            return context.run(work, *args)

    return make


class _Streams:
    """The caller's CUDA device, and its current stream on every device."""

    def __init__(self) -> None:
        self._device = torch.cuda.current_device()
        self._streams = [torch.cuda.current_stream(device) for device in range(torch.cuda.device_count())]

    def enter(self) -> None:
        """Make them current in this thread."""
        for device, stream in enumerate(self._streams):
            # Setting one takes memory of its device, also where this process uses another.
            if stream != torch.cuda.current_stream(device):
                torch.cuda.set_stream(stream)
        torch.cuda.set_device(self._device)
