"""A shielded call is whole, whatever a signal handler raises or calls while its caller waits."""

import _thread
import contextvars
import gc
import os
import sys
import threading
import time
import weakref

import pytest
import torch

from tensorkv.runtime import shield


def slow(done, interrupts=1):
    for _ in range(interrupts):
        _thread.interrupt_main()
        time.sleep(0.05)
    done.append(1)


@pytest.mark.parametrize("interrupts", [1, 3])
def test_an_interrupt_is_raised_when_the_work_has_ended(interrupts):
    done = []
    with pytest.raises(KeyboardInterrupt):
        shield.run(slow, done, interrupts)
    assert done == [1]


def test_what_the_work_raises_is_raised():
    with pytest.raises(ZeroDivisionError):
        shield.run(lambda: 1 / 0)
    assert shield.run(int, "7") == 7


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


def test_a_wait_for_others_ends_when_its_caller_is_interrupted():
    seen = []

    def wait():
        _thread.interrupt_main()
        deadline = time.monotonic() + 60
        try:
            while time.monotonic() < deadline:
                shield.check()
                time.sleep(0.001)
        except shield.Interrupted:
            seen.append("interrupted")
            raise

    with pytest.raises(KeyboardInterrupt):
        shield.run(wait)
    assert seen == ["interrupted"]
    shield.check()
    shield.run(shield.check)


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
        assert done.wait(60)

    import signal

    def handle(*_):
        begun.wait(60)
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


def test_nothing_is_kept_of_a_call():
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
        shield.run(int)
        assert found() is None
    finally:
        gc.enable()


def test_where_no_thread_can_be_started_the_caller_works(monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(shield, "_servers", [])
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert shield.run(threading.get_ident) == threading.get_ident()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_threads_of_its_own():
    shield.run(int)
    child = os.fork()
    if child == 0:
        os._exit(0 if shield.run(int, "3") == 3 and shield.run(threading.get_ident) != threading.get_ident() else 1)
    deadline = time.monotonic() + 60
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        assert time.monotonic() < deadline, "the child hangs"
        time.sleep(0.01)
    assert ended[1] == 0


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
