"""The short way of one small key does what the general way does, and leaves the rest to it."""

import numpy as np
import pytest
import torch

import tensorkv
from tensorkv.shard import quick

F32 = np.float32


@pytest.fixture
def taken(monkeypatch):
    """What the short way returned at each call."""
    results = []
    exchange = quick.exchange
    monkeypatch.setattr(quick, "exchange", lambda *a: (results.append(exchange(*a)), results[-1])[1])
    return results


@pytest.fixture
def kv():
    with tensorkv.create() as store:
        store.init("w", np.zeros((2, 3), F32))
        yield store


@pytest.mark.parametrize("wrap", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_plain_arrays_take_it(kv, taken, wrap):
    part, out = np.arange(6, dtype=F32).reshape(2, 3), np.zeros((2, 3), F32)
    kv.push("w", wrap(part))
    kv.pull("w", out=wrap(out))
    assert np.array_equal(out, part)
    kv.pushpull("w", wrap(part + 1), out=wrap(out))
    assert np.array_equal(out, part + 1)
    kv.pushpull("w", wrap(part.T.copy().T), out=wrap(out))
    assert taken == [24, 24, 48, 48]
    assert kv.info("w").version == 3
    stats = kv.stats()
    assert stats["keys"]["w"]["pushpull"] == {"calls": 2, "nbytes": 96}
    assert stats["verbs"]["push"]["nbytes"] == 24
    part[:] = 9
    out[:] = 9
    assert kv.pull("w").tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    "part",
    [
        np.ones((2, 3), np.float16),
        np.ones((2, 3), ">f4"),
        [np.ones((2, 3), F32)] * 2,
        torch.ones(2, 3, requires_grad=True),
        np.float32(1) * np.ones((2, 3), F32)[::-1],
    ],
    ids=["float16", "big-endian", "parts", "requires grad", "flipped"],
)
def test_the_rest_is_left_to_the_general_way(kv, part):
    kv.push("w", part)
    assert (kv.pull("w") == (2 if isinstance(part, list) else 1)).all()


@pytest.mark.parametrize(
    "out",
    [
        lambda: torch.zeros(1, 3).expand(2, 3),
        lambda: np.zeros((3, 2), F32),
        lambda: np.broadcast_to(F32(0), (2, 3)),
        lambda: np.zeros((2, 3), np.int32),
    ],
    ids=["expanded", "shape", "read-only", "dtype"],
)
def test_a_bad_out_stops_the_push(kv, taken, out):
    with pytest.raises(tensorkv.TensorKVError):
        kv.pushpull("w", np.ones((2, 3), F32), out=out())
    assert kv.pull("w").tolist() == [[0] * 3] * 2
    assert taken[0] is None


def test_outs_of_other_dtypes_and_strides(kv):
    kv.push("w", np.ones((2, 3), F32))
    for out in (np.zeros((2, 3)), np.zeros((2, 6), F32)[:, ::2], torch.zeros(3, 2).t()):
        kv.pull("w", out=out)
        assert np.asarray(out).tolist() == [[1] * 3] * 2


def test_an_updater_and_nonfinite_keep_it_shut(kv, taken):
    kv.set_updater(lambda key, received, stored: np.add(stored, received, out=stored))
    for _ in range(2):
        kv.push("w", np.ones((2, 3), F32))
    assert kv.pull("w").tolist() == [[2] * 3] * 2
    with tensorkv.create(nonfinite="raise") as strict:
        strict.init("w", np.zeros(1, F32))
        with pytest.raises(tensorkv.NonFiniteError):
            strict.push("w", np.array([np.nan], F32))
    assert taken == []


def test_keys_that_only_look_alike():
    with tensorkv.create() as kv:
        kv.init(1, np.zeros(1, F32))
        for key in (True, 1.0):
            with pytest.raises(tensorkv.KeyTypeError):
                kv.push(key, np.ones(1, F32))
        kv.push(np.int64(1), np.ones(1, F32))
        assert kv.pull(1).tolist() == [1]


def test_it_follows_a_value_that_moves(kv, taken, tmp_path):
    kv.push("w", np.ones((2, 3), F32))
    kv.save(tmp_path)
    kv.push("w", 2 * np.ones((2, 3), F32))
    kv.load(tmp_path)
    out = np.zeros((2, 3), F32)
    kv.pull("w", out=out)
    assert out.tolist() == [[1] * 3] * 2
    kv.delete("w")
    kv.init("w", np.full((2, 3), 5, F32))
    kv.pull("w", out=out)
    assert out.tolist() == [[5] * 3] * 2
    assert None not in taken
