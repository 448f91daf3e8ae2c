"""Requests: each counts once, and each thread has its own."""

import threading

import pytest

from tensorkv.storage.dedup import Clients


def test_a_request_counts_once():
    clients = Clients()
    for expected in (True, False, False):
        with clients.request("a", 3) as is_new:
            assert is_new is expected
            assert list(clients.current) == ([("a", 3)] if expected else [])
    assert clients.last == {"a": 3}
    assert not clients.current
    with clients.request("a", 2) as is_new:
        assert not is_new
    with clients.request("b", 1) as is_new:
        assert is_new


def test_a_request_that_fails_does_not_count():
    clients = Clients()
    with pytest.raises(ValueError, match="no"), clients.request("a", 1):
        raise ValueError("no")
    assert not clients.current
    with clients.request("a", 1) as is_new:
        assert is_new


def test_several_count_together():
    clients = Clients()
    with clients.together([("a", 1), ("b", 2)]):
        assert not clients.last
    assert clients.last == {"a": 1, "b": 2}


def test_threads_and_others_do_not_see_each_others_requests():
    clients, others, seen = Clients(), Clients(), []
    with clients.request("a", 1):
        assert not others.current
        thread = threading.Thread(target=lambda: seen.append(list(clients.current)))
        thread.start()
        thread.join()
        assert list(clients.current) == [("a", 1)]
    assert seen == [[]]
