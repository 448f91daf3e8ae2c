"""The pool runs everything to its end, leaves torch's threads as it found them, and ends when it is closed."""

import os
import signal
import threading

import pytest
import torch

from tensorkv.errors import ArgumentError
from tensorkv.shard import pool as pool_module
from tensorkv.shard.pool import WORTH_A_THREAD, OneTorchThread, Pool, default_threads


@pytest.fixture
def pool():
    made = Pool(2)
    yield made
    made.close()


@pytest.mark.parametrize("count", [1, 2, 3, 50])
def test_every_job_runs_once(pool, count):
    done = []
    pool.run([lambda i=i: done.append(i) for i in range(count)])
    assert sorted(done) == list(range(count))


def test_torch_threads_are_one_inside_and_untouched_outside(pool):
    before = torch.get_num_threads()
    inside, later = [], []
    pool.run([lambda: inside.append(torch.get_num_threads())] * 4)
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert inside == [1] * 4
    assert torch.get_num_threads() == before
    assert later == [before]


def test_a_job_that_fails(pool):
    done = []

    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        pool.run([fail, lambda: done.append(1)])
    assert done == [1]
    pool.run([lambda: done.append(2)])
    assert done == [1, 2]


def test_without_threads_the_caller_does_the_work(pool, monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    done = []
    pool.run([lambda: done.append(torch.get_num_threads())] * 3)
    assert done == [1] * 3
    monkeypatch.undo()
    pool.run([lambda: done.append(threading.current_thread().name)])
    assert done[3].startswith("tensorkv-pool")


def test_a_pool_that_is_dropped_ends_its_threads():
    pool = Pool(2)
    pool.run([int])
    threads = pool._threads
    del pool
    for thread in threads:
        thread.join()
        assert not thread.is_alive()


def test_a_closed_pool_starts_again(pool):
    pool.run([int])
    assert any(thread.name.startswith("tensorkv-pool") for thread in threading.enumerate())
    pool.close()
    pool.close()
    assert not any(thread.name.startswith("tensorkv-pool") for thread in threading.enumerate())
    pool.run([int])


def test_a_run_during_which_the_pool_is_closed_ends(pool, monkeypatch):
    """As by another thread, or by a finalizer that the garbage collector runs."""

    class ClosingShare(pool_module._Share):
        def __init__(self, jobs):
            super().__init__(jobs)
            pool.close()

    done = []
    pool.run([lambda: done.append(0)] * 2)
    monkeypatch.setattr(pool_module, "_Share", ClosingShare)
    pool.run([lambda: done.append(1)] * 4)
    assert done == [0, 0, 1, 1, 1, 1]


def test_closing_beside_runs(pool):
    done, stop = [], threading.Event()

    def close():
        while not stop.is_set():
            pool.close()

    closing = threading.Thread(target=close)
    closing.start()
    for turn in range(200):
        pool.run([lambda turn=turn: done.append(turn)] * 2)
    stop.set()
    closing.join()
    assert done == [turn for turn in range(200) for _ in range(2)]


def test_a_child_that_is_forked_while_threads_are_started_starts_its_own():
    pool = Pool(2)
    with pool._starting:
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            done = []
            pool.run([lambda: done.append(threading.get_ident())] * 2)
            os._exit(0 if len(done) == 2 and threading.get_ident() not in done else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_one_torch_thread_for_a_block():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with OneTorchThread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        with pytest.raises(ZeroDivisionError), OneTorchThread():
            1 / 0  # noqa: B018
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_what_is_work_for_the_pool(pool):
    assert pool.is_worth([torch.empty(WORTH_A_THREAD - 1), torch.empty(1)])
    assert not pool.is_worth([torch.empty(WORTH_A_THREAD - 1)])
    assert not pool.is_worth([])
    with torch.inference_mode():
        assert not pool.is_worth([torch.empty(WORTH_A_THREAD)])


def test_threads_option(monkeypatch):
    assert Pool().threads == default_threads() >= 1
    monkeypatch.setattr(pool_module, "num_cores", lambda: 8)
    for said, threads in (("1", 1), ("3", 3), ("99", 8), ("2,4", 2), ("0", 1), ("", 8), ("many", 8)):
        monkeypatch.setenv("OMP_NUM_THREADS", said)
        assert Pool().threads == threads
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert Pool().threads == 8
    for bad in (0, -1, 1.5, True, "two"):
        with pytest.raises(ArgumentError, match="threads"):
            Pool(bad)


@pytest.mark.parametrize(("numel", "threads", "alone"), [(0, 2, True), (99, 2, True), (100, 1, True), (1000, 3, False)])
def test_shared_work_covers_every_element_once(numel, threads, alone):
    pool, done = Pool(threads), []
    pool.share(numel, lambda start, stop: done.append((start, stop, threading.get_ident())), least=100)
    covered = sorted(element for start, stop, _ in done for element in range(start, min(stop, numel)))
    assert covered == list(range(numel))
    assert (len(done) == 1) == alone
    assert all((ident == threading.get_ident()) == alone for _, _, ident in done)
    pool.close()
