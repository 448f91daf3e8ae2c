"""Counts per verb and key, also from several threads."""

import runpy
import threading

import numpy as np
import pytest

import tensorkv
from tensorkv import Rows, compiled
from tensorkv.runtime import stats
from tensorkv.runtime.stats import Metrics, clock
from tests.support.until import LIMIT_S

F32 = np.float32


def by_key(kv):
    return kv.stats()["keys"]


def test_counts_of_each_verb():
    kv = tensorkv.create()
    kv.init(["a", "b"], [np.zeros(3, F32), np.zeros((2, 2))])
    kv.push("a", [np.ones(3, F32)] * 2)
    kv.push(["a", "b", "a"], [np.ones(3, F32), np.ones((2, 2)), np.ones(3, np.float16)])
    kv.pull(["a", "b"])
    kv.pull("b", out=[np.zeros((2, 2)), np.zeros((2, 2), F32)])
    kv.pushpull("a", np.ones(3, F32))
    kv.broadcast("c", np.ones(1, F32), out=[np.zeros(1, F32)])
    kv.row_sparse_pull("b", row_ids=[1, 1])
    assert by_key(kv) == {
        "a": {
            "init": {"calls": 1, "nbytes": 12},
            "push": {"calls": 2, "nbytes": 24 + 12 + 6},
            "pull": {"calls": 1, "nbytes": 12},
            "pushpull": {"calls": 1, "nbytes": 24},
        },
        "b": {
            "init": {"calls": 1, "nbytes": 32},
            "push": {"calls": 1, "nbytes": 32},
            "pull": {"calls": 2, "nbytes": 32 + 32 + 16},
            "row_sparse_pull": {"calls": 1, "nbytes": 16},
        },
        "c": {"broadcast": {"calls": 1, "nbytes": 4}},
    }
    verbs = kv.stats()["verbs"]
    assert {verb: (counts["calls"], counts["nbytes"]) for verb, counts in verbs.items()} == {
        "init": (1, 44),
        "push": (2, 74),
        "pull": (2, 92),
        "pushpull": (1, 24),
        "broadcast": (1, 4),
        "row_sparse_pull": (1, 16),
    }
    assert all(counts["seconds"] > 0 for counts in verbs.values())


def test_rows_count_what_they_hold():
    kv = tensorkv.create()
    kv.init("t", Rows(np.array([1]), np.ones((1, 2), F32), 2_000_000_000))
    kv.push("t", [Rows(np.array([1, 5]), np.ones((2, 2), F32), 2_000_000_000)] * 2)
    assert by_key(kv)["t"] == {"init": {"calls": 1, "nbytes": 8}, "push": {"calls": 1, "nbytes": 32}}


def test_many_keys_again_and_again():
    keys = list(range(20))
    kv = tensorkv.create()
    kv.init(keys, [np.zeros(2, F32)] * 20)
    for _ in range(5):
        kv.push(keys, [[np.ones(2, F32)] * 2] * 20)
        kv.pull(keys, out=[np.zeros(2, F32) for _ in keys])
        kv.pushpull(keys, [np.ones(2, F32)] * 20)
    assert kv.stats()["verbs"]["push"]["calls"] == 5
    assert kv.stats()["verbs"]["push"]["nbytes"] == 5 * 20 * 16
    assert set(by_key(kv)) == set(keys)
    for counts in by_key(kv).values():
        assert counts["push"] == {"calls": 5, "nbytes": 80}
        assert counts["pull"] == {"calls": 5, "nbytes": 40}
        assert counts["pushpull"] == {"calls": 5, "nbytes": 80}


def test_calls_that_fail_do_not_count():
    kv = tensorkv.create()
    kv.init("a", np.zeros(3, F32))
    before = by_key(kv)
    with pytest.raises(tensorkv.ValueMismatchError):
        kv.push("a", np.zeros(4, F32))
    with pytest.raises(tensorkv.KeyNotFoundError):
        kv.pull("b")
    assert by_key(kv) == before
    assert set(kv.stats()["verbs"]) == {"init"}


def test_a_deleted_key_is_forgotten_but_verbs_keep_their_counts():
    kv = tensorkv.create()
    kv.init(["a", "b"], [np.zeros(3, F32)] * 2)
    kv.push("a", np.ones(3, F32))
    kv.delete("a")
    assert by_key(kv) == {"b": {"init": {"calls": 1, "nbytes": 12}}}
    assert kv.stats()["verbs"]["push"]["calls"] == 1
    kv.init("a", np.zeros(1, F32))
    assert by_key(kv)["a"] == {"init": {"calls": 1, "nbytes": 4}}


def test_what_read_returns_is_the_callers():
    metrics = Metrics()
    metrics.add("push", clock(), ["a"], [4])
    read = metrics.read()
    read["keys"]["a"]["push"]["calls"] = 99
    read["verbs"].clear()
    metrics.add("push", clock(), ["a"], [4])
    assert metrics.read()["keys"] == {"a": {"push": {"calls": 2, "nbytes": 8}}}
    assert metrics.read()["verbs"]["push"]["calls"] == 2


def test_seconds_add_up():
    metrics = Metrics()
    for _ in range(3):
        metrics.add("pull", clock() - 2.0, [], [])
    assert 6.0 <= metrics.read()["verbs"]["pull"]["seconds"] < 60.0
    assert metrics.read()["keys"] == {}


def test_stores_count_by_themselves_without_the_compiled_part(monkeypatch):
    """One that is created in a forked child does not wait for a thread of the parent that was counting."""
    monkeypatch.setattr(compiled, "_native", None)
    record_type = runpy.run_path(stats.__file__)["Record"]
    mine, other = record_type(), record_type()

    def count_other():
        thread = threading.Thread(target=other.add, args=(0.0, ["w"], [8]))
        thread.start()
        thread.join(LIMIT_S)
        assert not thread.is_alive()
        yield "w"

    mine.add(0.0, count_other(), [8])
    assert (mine.nbytes, other.nbytes) == (8, 8)


def test_counts_from_several_threads():
    kv = tensorkv.create()
    kv.init(list(range(4)), [np.zeros(2, F32)] * 4)
    errors = []
    together = threading.Barrier(4)

    def work(me):
        try:
            together.wait(LIMIT_S)
            for _ in range(200):
                kv.push([me, (me + 1) % 4], [np.ones(2, F32)] * 2)
                kv.pull(me)
                kv.stats()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(me,)) for me in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    verbs = kv.stats()["verbs"]
    assert (verbs["push"]["calls"], verbs["push"]["nbytes"]) == (800, 800 * 16)
    assert verbs["pull"]["calls"] == 800
    for key in range(4):
        assert by_key(kv)[key]["push"] == {"calls": 400, "nbytes": 3200}
        assert by_key(kv)[key]["pull"] == {"calls": 200, "nbytes": 1600}
        assert kv.info(key).version == 400
