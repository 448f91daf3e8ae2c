"""The garbage collector goes on after a pause, however that ends."""

import gc
import os
import threading

import pytest

from tensorkv.runtime import collector


def test_a_pause_ends_with_its_block():
    with collector.paused():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off():
    gc.disable()
    try:
        with collector.paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_the_collector_goes_on_if_a_signal_comes_as_the_pause_begins(monkeypatch):
    pause = gc.disable

    def interrupted():
        pause()
        raise KeyboardInterrupt

    monkeypatch.setattr(gc, "disable", interrupted)
    with pytest.raises(KeyboardInterrupt), collector.paused():
        pass
    assert gc.isenabled()


def test_a_child_that_is_forked_in_a_pause_of_another_thread_collects():
    paused, done = threading.Event(), threading.Event()

    def pause():
        with collector.paused():
            paused.set()
            done.wait()

    pausing = threading.Thread(target=pause)
    pausing.start()
    paused.wait()
    child = os.fork()
    if child == 0:
        os._exit(0 if gc.isenabled() else 1)
    done.set()
    pausing.join()
    assert os.waitpid(child, 0)[1] == 0
    assert gc.isenabled()
