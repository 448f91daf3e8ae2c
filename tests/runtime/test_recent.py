"""What is remembered of lists of keys stays small, also where a program names other keys at every step."""

import tracemalloc

import numpy as np
import pytest

pytest.importorskip("ray")

from tensorkv.runtime import recent
from tensorkv.runtime.recent import Recent
from tests.support.fake_servers import Cluster

KEYS, CALLS = 1000, 40


def test_so_many_lists_are_remembered():
    found = Recent(3)
    for name in "abc":
        found.keep(name, name.upper(), 1)
    assert [found.get(name) for name in "abcd"] == ["A", "B", "C", None]
    found.keep("d", "D", 1)
    assert (found.get("d"), found.get("a"), len(found)) == ("D", None, 1)
    found.clear()
    assert len(found) == 0


def test_fewer_long_lists_are_remembered_but_some(monkeypatch):
    monkeypatch.setattr(recent, "_MOST_KEYS", 100)
    found, counts = Recent(64), []
    for name in range(9):
        found.keep(name, None, 30)
        counts.append(len(found))
    assert counts == [1, 2, 3, 4, 1, 2, 3, 4, 1]
    # Four are remembered however long they are.
    for name in range(9, 12):
        found.keep(name, None, 1000)
    assert len(found) == 4
    # A store of many keys may name each of them some times.
    for name in range(12, 16):
        found.keep(name, None, 1000, held=2000)
    assert len(found) == 8
    # Keys of lists that were forgotten do not count, nor do those of a list twice.
    found.clear()
    for name in [*range(50), *range(50)]:
        found.keep(name, name, 2)
    assert (len(found), found.get(0), found.get(49)) == (50, 0, 49)


def halves(seed):
    rng = np.random.default_rng(seed)
    return [sorted(rng.permutation(KEYS)[: KEYS // 2].tolist()) for _ in range(CALLS)]


def push(kv, keys, outs):
    kv.push(keys, [np.ones(4, np.float32)] * len(keys))


def pull(kv, keys, outs):
    kv.pull(keys, out=[outs[key] for key in keys])


def pushpull(kv, keys, outs):
    kv.pushpull(keys, [np.ones(4, np.float32)] * len(keys), out=[outs[key] for key in keys])


CASES = {
    "push": (push, {}, None),
    "pull": (pull, {}, None),
    "pushpull": (pushpull, {}, None),
    "pushpull in mode sync": (pushpull, {"mode": "sync"}, None),
    "pushpull in float16": (pushpull, {"pull_dtype": "fp16"}, None),
    "compressed": (pushpull, {}, {"type": "1bit"}),
}


@pytest.mark.parametrize(("call", "options", "codec"), CASES.values(), ids=CASES)
def test_calls_with_other_keys_each_time_need_no_more_memory_after_a_while(call, options, codec, monkeypatch):
    monkeypatch.setattr(recent, "_MOST_KEYS", 4 * KEYS)
    with Cluster(1, **options) as cluster:
        kv = cluster.store()
        kv.init(list(range(KEYS)), [np.zeros(4, np.float32)] * KEYS)
        kv.set_gradient_compression(codec)
        outs = [np.zeros(4, np.float32) for _ in range(KEYS)]
        tracemalloc.start()
        try:
            held = []
            for seed in (1, 2):
                for keys in halves(seed):
                    call(kv, keys, outs)
                held.append(tracemalloc.get_traced_memory()[0])
        finally:
            tracemalloc.stop()
        # In each list, a key takes at least its place in a tuple, an array of pieces and a text, on both sides.
        # What is remembered is as much after the first calls, which fill it several times, as after the others.
        assert held[1] - held[0] < 20 * KEYS * CALLS
