"""The pool runs everything to its end, leaves torch's threads as it found them, and ends when it is closed."""

import _thread
import threading
import time

import pytest
import torch

from tensorkv.errors import ArgumentError
from tensorkv.pool import WORTH_A_THREAD, OneTorchThread, Pool, default_threads


@pytest.fixture
def pool():
    made = Pool(2)
    yield made
    made.close()


@pytest.mark.parametrize("count", [1, 2, 3, 50])
def test_every_job_runs_once(pool, count):
    done = []
    pool.run([lambda i=i: done.append(i) for i in range(count)], then=lambda: done.append("then"))
    assert sorted(done[:-1]) == list(range(count))
    assert done[-1] == "then"


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
        pool.run([fail, lambda: done.append(1)], then=lambda: done.append("then"))
    assert done == [1]
    pool.run([lambda: done.append(2)])
    assert done == [1, 2]


def test_an_interrupt_waits_for_the_work(pool):
    done = []
    pool.run([int])

    def slow():
        _thread.interrupt_main()
        time.sleep(0.3)
        done.append(1)

    with pytest.raises(KeyboardInterrupt):
        pool.run([slow], then=lambda: done.append("then"))
    assert done == [1, "then"]


def test_a_closed_pool_starts_again(pool):
    pool.run([int])
    assert any(thread.name.startswith("tensorkv") for thread in threading.enumerate())
    pool.close()
    pool.close()
    assert not any(thread.name.startswith("tensorkv") for thread in threading.enumerate())
    pool.run([int])


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


def test_threads_option():
    assert Pool().threads == default_threads() >= 1
    for bad in (0, -1, 1.5, True, "two"):
        with pytest.raises(ArgumentError, match="threads"):
            Pool(bad)
