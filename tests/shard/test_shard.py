"""What only the shard can show: locks, races and devices."""

import threading

import numpy as np
import pytest
import torch

import tensorkv
from tensorkv.arrays import interop, rows
from tensorkv.arrays.spec import KeySpec
from tensorkv.errors import KeyNotFoundError, ValueMismatchError
from tensorkv.shard.entry import Batch
from tensorkv.shard.shard import Shard


def spec(value):
    return KeySpec(value.shape, value.dtype, interop.NUMPY, False)


def shard_with(**values):
    shard = Shard()
    tensors = {key: torch.as_tensor(value) for key, value in values.items()}
    shard.init(list(tensors), list(tensors.values()), [spec(value) for value in tensors.values()])
    return shard


def test_values_are_copies():
    value = torch.ones(2)
    shard = shard_with(w=value)
    value.fill_(9)
    with shard.frozen() as (entries, _):
        assert entries[0].value.tolist() == [1, 1]


def test_a_key_that_was_replaced_since_the_outs_were_checked():
    shard = shard_with(w=torch.ones(3))
    out = torch.zeros(3)
    shard.delete(["w"])
    shard.init(["w"], [torch.full((1,), 7.0)], [spec(torch.ones(1))])
    with pytest.raises(ValueMismatchError, match="shape"):
        shard.pull(["w"], [[out]])
    assert out.tolist() == [0, 0, 0]


def test_a_key_that_was_deleted_since():
    shard = shard_with(w=torch.ones(3))
    shard.delete(["w"])
    with pytest.raises(KeyNotFoundError):
        shard.pushpull(Batch("pushpull", ["w"], [[torch.ones(3)]]), [[torch.zeros(3)]])


def test_frozen_keeps_pushes_out():
    shard = shard_with(w=torch.zeros(1))
    batch = Batch("push", ["w"], [[torch.ones(1)]])
    thread = threading.Thread(target=shard.push, args=(batch,))
    with shard.frozen() as (entries, _):
        thread.start()
        thread.join(timeout=0.2)
        assert thread.is_alive()
        assert entries[0].value.item() == 0
    thread.join()
    assert entries[0].value.item() == 1


def test_several_keys_are_pushed_and_pulled_as_one():
    """Readers see all keys of a batch from the same push, or none."""
    keys = [f"k{i}" for i in range(6)]
    with tensorkv.create() as kv:
        kv.init(keys, [np.zeros(100)] * 6)
        stop, torn = threading.Event(), []

        def read():
            while not stop.is_set():
                values = kv.pull(keys)
                if len({float(x) for value in values for x in value}) > 1:
                    torn.append(values)

        readers = [threading.Thread(target=read) for _ in range(2)]
        for reader in readers:
            reader.start()
        for number in range(200):
            kv.push(keys, [np.full(100, float(number))] * 6)
        stop.set()
        for reader in readers:
            reader.join()
    assert not torn


def test_adding_in_order_of_occurrence_is_what_the_cpu_does():
    """The way that is taken on CUDA, where index_add_ keeps no order."""
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(0, 10, (500,), generator=generator)
    values = torch.randn(500, 3, generator=generator) * 10.0 ** torch.randint(-5, 5, (500, 1), generator=generator)
    expected = torch.zeros(10, 3).index_add_(0, places, values)
    added = torch.zeros(10, 3)
    rows.add_by_turns(added, places, values)
    assert torch.equal(added, expected)
    backwards = torch.zeros(10, 3).index_add_(0, places.flip(0), values.flip(0))
    assert not torch.equal(backwards, expected), "the order makes no difference here"
