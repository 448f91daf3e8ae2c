"""Changes of arrays that are all plain, which are written without Python's work for each."""

import signal

import numpy as np
import pytest
import torch

import tensorkv
from tensorkv.releases import changes, elements
from tensorkv.shard import native

pytestmark = pytest.mark.skipif(not native.can_look(), reason="needs the compiled part")


class Unused:
    """What is made for each array elsewhere."""

    def __init__(self, *arguments):
        raise AssertionError("an array was not taken as plain")


@pytest.fixture
def releases():
    """A store with two releases, and what was in them."""
    chance = np.random.default_rng(0)
    dtypes = [np.float32, np.float64, np.int32, np.float16, np.uint8]
    old = {f"k{n}": (100 * chance.standard_normal((7, n + 1))).astype(dtypes[n % 5]) for n in range(40)}
    new = {key: value.copy() for key, value in old.items()}
    for number, value in enumerate(new.values()):
        if number % 3:
            value[number % 7, 0] += 1
    with tensorkv.create() as kv:
        kv.init(old)
        kv.publish("a")
        kv.push(new)
        kv.publish("b")
        with kv.open_release("a") as first, kv.open_release("b") as second:
            yield old, new, second.changes(since="a"), first.digest


def copies(values, kind):
    if kind == "torch":
        return {key: torch.from_numpy(value.copy()) for key, value in values.items()}
    listed = [(key, value.copy()) for key, value in values.items()]
    return dict(listed[::-1] if kind == "reversed" else listed)


class AlarmError(Exception):
    """What a signal handler raises."""


@pytest.mark.parametrize("base", [False, True], ids=["checked whole", "with a base"])
def test_a_signal_handler_that_raises_leaves_no_array_half_written(releases, base, monkeypatch):
    old, new, *_ = releases
    monkeypatch.setattr(changes, "_SMALL_NUMEL", 50_000)
    large = np.zeros(70_000, np.float32)
    with tensorkv.create() as kv:
        kv.init({**old, "large": large})
        kv.publish("a")
        kv.push({**new, "large": large + (np.arange(70_000) % 2).astype(np.float32)})
        kv.publish("b")
        with kv.open_release("a") as first, kv.open_release("b") as second:
            found, digest = second.changes(since="a"), first.digest
    exchange, fired = elements.exchange, []

    def interrupted(*arguments):
        number = exchange(*arguments)
        fired.append(signal.raise_signal(signal.SIGALRM))
        return number

    def raise_alarm(*_):
        raise AlarmError

    monkeypatch.setattr(elements, "exchange", interrupted)
    monkeypatch.setattr(changes, "_apply_plain", lambda *_: False)
    mine = {**copies(old, "numpy"), "large": large.copy()}
    before = signal.signal(signal.SIGALRM, raise_alarm)
    try:
        with pytest.raises(AlarmError):
            tensorkv.apply_changes(mine, found, base=digest if base else None)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert fired
    assert all(np.array_equal(mine[key], value) for key, value in new.items())
    assert mine["large"].sum() == 35_000


@pytest.mark.parametrize("kind", ["numpy", "torch", "reversed"])
def test_plain_arrays_need_no_work_of_their_own(kind, releases, monkeypatch):
    old, new, found, base = releases
    monkeypatch.setattr(changes, "_Work", Unused)
    mine = copies(old, kind)
    for _ in range(2):
        # Applied again, they change nothing.
        assert tensorkv.apply_changes(mine, found, base=base) is mine
        assert all(np.array_equal(mine[key], value) for key, value in new.items())
    if kind == "torch":
        assert mine["k0"]._version > 0


def test_other_arrays_are_worked_on_one_by_one(releases, monkeypatch):
    old, new, found, base = releases
    mine = copies(old, "numpy")
    mine["k3"] = np.asfortranarray(mine["k3"])
    tensorkv.apply_changes(mine, found, base=base)
    assert all(np.array_equal(mine[key], value) for key, value in new.items())
    monkeypatch.setattr(changes, "_Work", Unused)
    mine = copies(old, "numpy")
    mine["k3"] = np.asfortranarray(mine["k3"])
    with pytest.raises(AssertionError, match="not taken as plain"):
        tensorkv.apply_changes(mine, found, base=base)


def test_arrays_of_another_release_stay_as_they_are(releases, monkeypatch):
    old, _, found, base = releases
    monkeypatch.setattr(changes, "_Work", Unused)
    mine = copies(old, "numpy")
    mine["k37"][37 % 7, 0] += 5
    before = {key: value.copy() for key, value in mine.items()}
    with pytest.raises(tensorkv.ReleaseMismatchError, match='"k37"'):
        tensorkv.apply_changes(mine, found, base=base)
    assert all(np.array_equal(mine[key], value) for key, value in before.items())
