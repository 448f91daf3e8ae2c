"""A shielded call is whole, whatever a signal handler raises or calls while its caller waits."""

import _thread
import contextlib
import contextvars
import ctypes
import gc
import os
import random
import signal
import sys
import threading
import time
import weakref

import pytest
import torch

from tensorkv.runtime import shield
from tests.support.until import LIMIT_S, until


def slow(done, interrupts=1):
    for _ in range(interrupts):
        _thread.interrupt_main()
        time.sleep(0.05)
    done.append(1)


def run_steps(work, *args):
    """Make a call that waits for nobody."""

    def steps():
        return work(*args)
        yield

    return shield.run_steps(steps())


def run_last_step(work, *args):
    """Make a call that may have to wait at its beginning."""

    def steps():
        yield
        return work(*args)

    return shield.run_steps(steps())


WAYS = pytest.mark.parametrize(
    "protect",
    [shield.run, shield.defer, shield.run_here, run_steps, run_last_step],
    ids=["run", "defer", "here", "steps", "last step"],
)


@WAYS
@pytest.mark.parametrize("interrupts", [1, 3])
def test_an_interrupt_is_raised_when_the_work_has_ended(protect, interrupts):
    done = []
    with pytest.raises(KeyboardInterrupt):
        protect(slow, done, interrupts)
    assert done == [1]


@WAYS
def test_what_the_work_raises_is_raised(protect):
    with pytest.raises(ZeroDivisionError):
        protect(lambda: 1 / 0)
    assert protect(int, "7") == 7


# ---------------------------------------------------------------- handlers that wait


@pytest.fixture
def handlers():
    """Sets handlers, and puts back what was there."""
    before = {}

    def set_handler(number, handler):
        before.setdefault(number, signal.getsignal(number))
        signal.signal(number, handler)

    yield set_handler
    for number, handler in before.items():
        signal.signal(number, handler)


def test_handlers_run_after_the_work_and_are_back(handlers):
    order = []

    def handle(number, frame):
        order.append((number, frame is None))

    handlers(signal.SIGUSR1, handle)
    handlers(signal.SIGUSR2, handle)

    def work():
        signal.raise_signal(signal.SIGUSR2)
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR1)
        order.append("worked")
        assert signal.getsignal(signal.SIGUSR1) is not handle
        return 5

    assert shield.defer(work) == 5
    assert order == ["worked", (signal.SIGUSR1, False), (signal.SIGUSR2, False)]
    assert signal.getsignal(signal.SIGUSR1) is handle
    signal.raise_signal(signal.SIGUSR1)
    assert len(order) == 4


def test_every_handler_runs_and_the_first_exception_is_raised(handlers):
    ran = []

    def fail(number, frame):
        ran.append(number)
        raise ValueError(number)

    for number in (signal.SIGUSR1, signal.SIGUSR2):
        handlers(number, fail)

    def work(error=None):
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR2)
        if error is not None:
            raise error

    for error in (None, KeyError("of the work")):
        with pytest.raises(ValueError, match=str(int(signal.SIGUSR1))):
            shield.defer(work, error)
        assert [signal.getsignal(number) for number in ran] == [fail, fail]
        ran.clear()


def test_a_handler_that_the_work_sets_stays(handlers):
    handlers(signal.SIGUSR1, lambda *_: None)
    handlers(signal.SIGUSR2, signal.SIG_IGN)

    def mine(*_):
        pass

    shield.defer(signal.signal, signal.SIGUSR1, mine)
    shield.defer(signal.signal, signal.SIGUSR2, mine)
    assert signal.getsignal(signal.SIGUSR1) is signal.getsignal(signal.SIGUSR2) is mine


def test_a_handler_may_make_calls(handlers):
    done = []
    handlers(signal.SIGUSR1, lambda *_: shield.defer(done.append, "handler"))

    def work():
        signal.raise_signal(signal.SIGUSR1)
        shield.defer(done.append, "inner")
        done.append("outer")

    shield.defer(work)
    assert done == ["inner", "outer", "handler"]


def test_one_signal_is_one_byte_for_an_event_loop(handlers):
    """asyncio reads signals from a pipe, and has a handler that does nothing."""
    handlers(signal.SIGUSR1, lambda *_: None)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer)
    try:
        shield.defer(signal.raise_signal, signal.SIGUSR1)
    finally:
        signal.set_wakeup_fd(before)
    os.close(writer)
    assert os.read(reader, 10) == bytes([signal.SIGUSR1])
    os.close(reader)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the flags where Linux has them")
def test_the_flags_of_a_handler_stay(handlers):
    def restarts():
        action = ctypes.create_string_buffer(256)
        assert ctypes.CDLL(None).sigaction(int(signal.SIGUSR1), None, action) == 0
        return bool(int.from_bytes(action.raw[136:140], sys.byteorder) & 0x10000000)

    handlers(signal.SIGUSR1, lambda *_: None)
    assert not restarts()
    signal.siginterrupt(signal.SIGUSR1, False)
    shield.defer(int)
    assert restarts()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("forker", ["the work", "another thread"])
def test_a_child_that_is_forked_during_a_call_has_the_handlers(handlers, forker):
    def handle(*_):
        pass

    handlers(signal.SIGUSR1, handle)

    def fork():
        child = os.fork()
        if child == 0:
            os._exit(0 if signal.getsignal(signal.SIGUSR1) is handle and shield.defer(int, "3") == 3 else 1)
        statuses.append(os.waitpid(child, 0)[1])

    def work():
        if forker == "the work":
            fork()
        else:
            thread = threading.Thread(target=fork)
            thread.start()
            thread.join()

    statuses = []
    shield.defer(work)
    assert statuses == [0]
    assert signal.getsignal(signal.SIGUSR1) is handle


def test_without_the_compiled_part_another_thread_works(monkeypatch):
    monkeypatch.setattr(shield, "_signals", None)
    assert shield.defer(threading.get_ident) != threading.get_ident()


def test_handlers_are_restored_whenever_one_raises(handlers):
    """Timers of two signals whose handlers raise, while calls begin and end."""

    class Boom(BaseException):
        pass

    def boom(*_):
        raise Boom

    def append_twice(done):
        done.append(1)
        done.append(2)

    handlers(signal.SIGALRM, boom)
    handlers(signal.SIGVTALRM, boom)
    raised, draw = 0, random.Random(0)
    while raised < 300:
        done = []
        try:
            signal.setitimer(signal.ITIMER_REAL, draw.random() * 2e-5 + 1e-6)
            signal.setitimer(signal.ITIMER_VIRTUAL, 1e-6)
            for _ in range(10):
                shield.defer(append_twice, done)
        except Boom:
            raised += 1
        finally:
            for timer in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL):
                with contextlib.suppress(Boom):
                    signal.setitimer(timer, 0)
        assert len(done) % 2 == 0
        assert signal.getsignal(signal.SIGALRM) is signal.getsignal(signal.SIGVTALRM) is boom


# ---------------------------------------------------------------- calls in another thread


def test_an_interrupt_before_the_work_begins_gives_it_up(monkeypatch):
    class Boom(BaseException):
        pass

    def fail(call):
        raise Boom

    shield.run(int)
    monkeypatch.setattr(shield._servers[0], "take", fail)
    done = []
    with pytest.raises(Boom):
        shield.run(done.append, 1)
    monkeypatch.undo()
    shield.run(done.append, 2)
    assert done == [2]


@pytest.mark.parametrize("protect", [shield.run, shield.run_here])
def test_a_wait_for_others_ends_when_its_caller_is_interrupted(protect):
    seen = []

    def wait():
        _thread.interrupt_main()
        try:
            until(shield.check)
        except shield.Interrupted:
            seen.append("interrupted")
            raise

    with pytest.raises(KeyboardInterrupt):
        protect(wait)
    assert seen == ["interrupted"]
    shield.check()
    protect(shield.check)


# ---------------------------------------------------------------- calls that wait in the caller's thread


def test_what_a_handler_raises_is_not_taken_for_an_error_of_the_wait(handlers):
    """A handler's TimeoutError ends the call, and another signal that comes meanwhile does not split it."""
    ended = []

    def expire(*_):
        raise TimeoutError("of the handler")

    def wait():
        signal.raise_signal(signal.SIGUSR1)
        try:
            with contextlib.suppress(TimeoutError):
                shield.check()
        finally:
            signal.raise_signal(signal.SIGUSR1)
            ended.append(1)

    handlers(signal.SIGUSR1, expire)
    with pytest.raises(TimeoutError, match="of the handler"):
        shield.run_here(wait)
    assert ended == [1]


def test_a_handler_that_runs_in_a_wait_may_make_calls(handlers):
    threads = []

    def note():
        threads.append(threading.get_ident())

    def handle(*_):
        # As its own call, not as a part of the one that waits.
        shield.run(note)
        shield.run_here(note)

    def wait():
        signal.raise_signal(signal.SIGUSR1)
        assert threads == []
        shield.check()
        assert len(threads) == 2
        shield.run(note)

    handlers(signal.SIGUSR1, handle)
    shield.run_here(wait)
    main = threading.get_ident()
    assert [thread == main for thread in threads] == [False, True, True]


def test_a_call_inside_of_one_that_may_hold_locks_runs_no_handlers(handlers):
    seen = []

    def wait():
        signal.raise_signal(signal.SIGUSR1)
        shield.run_here(shield.check)
        assert seen == []

    handlers(signal.SIGUSR1, lambda *_: seen.append(1))
    shield.defer(wait)
    assert seen == [1]


# ---------------------------------------------------------------- calls in two threads


def test_a_call_stays_in_its_thread_up_to_where_it_may_wait():
    def steps(waits):
        threads.append(threading.get_ident())
        if waits:
            yield
            threads.append(threading.get_ident())
            yield
            threads.append(threading.get_ident())
        return 5

    threads = []
    assert shield.run_steps(steps(False)) == 5
    assert threads == [threading.get_ident()]
    threads.clear()
    assert shield.run_steps(steps(True)) == 5
    assert threads[0] == threading.get_ident() != threads[1] == threads[2]


@pytest.mark.parametrize("waits", [False, True])
def test_handlers_run_when_steps_have_ended_or_wait(handlers, waits):
    order, may_end = [], threading.Event()

    def handle(*_):
        order.append("handler")
        may_end.set()

    def steps():
        signal.raise_signal(signal.SIGUSR1)
        order.append("first")
        if waits:
            yield
            assert may_end.wait(60)
            order.append("last")

    handlers(signal.SIGUSR1, handle)
    shield.run_steps(steps())
    assert order == (["first", "handler", "last"] if waits else ["first", "handler"])


def test_steps_that_have_begun_end_before_an_exception_is_raised(handlers):
    class Boom(BaseException):
        pass

    def boom(*_):
        raise Boom

    def steps():
        signal.raise_signal(signal.SIGUSR1)
        try:
            yield
            while True:
                shield.check()
                time.sleep(0.001)
        finally:
            ended.append(threading.get_ident() != threading.main_thread().ident)

    handlers(signal.SIGUSR1, boom)
    for _ in range(100):
        ended = []
        with pytest.raises(Boom):
            shield.run_steps(steps())
        assert ended == [True]


def test_steps_end_where_no_thread_can_be_started(monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(shield, "_servers", [])
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert run_last_step(threading.get_ident) == threading.get_ident()


def test_steps_without_the_compiled_part_are_in_another_thread(monkeypatch):
    monkeypatch.setattr(shield, "_signals", None)
    assert run_steps(threading.get_ident) != threading.get_ident()


def test_a_call_inside_of_another_has_a_thread_of_its_own():
    names = []

    def inner():
        names.append(threading.current_thread())

    class Handler:
        # Stands for a signal handler: it runs in the main thread while the outer call is under way.
        ran = False

    begun, done = threading.Event(), threading.Event()

    def outer():
        names.append(threading.current_thread())
        begun.set()
        _thread.interrupt_main()
        assert done.wait(LIMIT_S)

    def handle(*_):
        begun.wait(LIMIT_S)
        shield.run(inner)
        Handler.ran = True
        done.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        shield.run(outer)
    finally:
        signal.signal(signal.SIGINT, before)
    assert Handler.ran
    assert len(set(names)) == 2


def test_other_threads_work_themselves():
    found = []
    thread = threading.Thread(target=lambda: found.append(shield.run(threading.get_ident)))
    thread.start()
    thread.join()
    assert found == [thread.ident]
    assert shield.run(threading.get_ident) != threading.get_ident()


def test_the_callers_modes_hold():
    variable = contextvars.ContextVar("variable", default=0)
    variable.set(5)
    assert shield.run(variable.get) == 5
    with torch.no_grad():
        assert shield.run(torch.is_grad_enabled) is False
    with torch.device("meta"):
        assert shield.run(lambda: torch.empty(1).device.type) == "meta"
    assert shield.run(torch.is_grad_enabled) is True
    product = torch.ones(2, 2) @ torch.ones(2, 2)
    with torch.autocast("cpu", torch.float16):
        assert shield.run(torch.matmul, product, product).dtype is torch.float16
    assert shield.run(torch.matmul, product, product).dtype is torch.float32


def test_nothing_is_kept_of_a_call_that_has_ended():
    class Array:
        pass

    array = Array()
    found = weakref.ref(array)

    def fail(given):
        raise ValueError(str(given))

    gc.disable()
    try:
        shield.run(lambda given: given, array)
        with pytest.raises(ValueError, match="Array"):
            shield.run(fail, array)
        del array
        assert found() is None
    finally:
        gc.enable()


def test_where_no_thread_can_be_started_the_caller_works(monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(shield, "_servers", [])
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert shield.run(threading.get_ident) == threading.get_ident()


def test_only_streams_that_differ_are_set(monkeypatch):
    """On eight GPUs, of which the caller has a stream of its own on one: setting a stream takes memory on its GPU."""
    here, seen = threading.local(), []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.append(("device", device)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: vars(here).get(str(device), (device, "default")))

    def set_stream(stream):
        setattr(here, str(stream[0]), stream)
        seen.append(stream)

    monkeypatch.setattr(torch.cuda, "set_stream", set_stream)
    monkeypatch.setattr(shield, "_servers", [])
    set_stream((3, "own"))
    seen.clear()
    assert shield.run(torch.cuda.current_stream, 3) == (3, "own")
    assert seen == [(3, "own"), ("device", 3)]
    set_stream((3, "default"))
    seen.clear()
    assert shield.run(torch.cuda.current_stream, 3) == (3, "default")
    assert seen == [(3, "default"), ("device", 3)]
    seen.clear()
    shield.run(int)
    assert seen == [("device", 3)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_threads_of_its_own():
    shield.run(int)
    child = os.fork()
    if child == 0:
        os._exit(0 if shield.run(int, "3") == 3 and shield.run(threading.get_ident) != threading.get_ident() else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_every_line_of_a_call_may_raise():
    class Boom(BaseException):
        pass

    def call_with_boom_at(line):
        """Return whether the call returned; the trace function raises at its ``line``-th line."""
        left = [line]

        def trace(frame, event, arg):
            if not frame.f_code.co_filename.endswith("shield.py"):
                return None
            if event == "line":
                left[0] -= 1
                if left[0] < 0:
                    raise Boom
            return trace

        done = []
        sys.settrace(trace)
        try:
            shield.run(done.append, 1)
            return True, done
        except Boom:
            return False, done
        finally:
            sys.settrace(None)

    shield.run(int)
    counts = {0: 0, 1: 0}
    line = 0
    while True:
        returned, done = call_with_boom_at(line)
        if returned:
            break
        counts[len(done)] += 1
        after = []
        shield.run(after.append, 1)
        assert after == [1]
        line += 1
    assert counts[0] >= 5, "no exception came before the work"
    assert counts[1] >= 1, "no exception came after the work"
