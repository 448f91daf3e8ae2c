"""What only the shard can show: locks, races and devices."""

import gc
import threading
import weakref
from array import array
from contextlib import nullcontext

import numpy as np
import pytest
import torch

import tensorkv
from tensorkv.arrays import interop, rows
from tensorkv.arrays.regions import Region
from tensorkv.arrays.slices import Slices
from tensorkv.arrays.spec import KeySpec
from tensorkv.errors import KeyNotFoundError, StorageError, ValueMismatchError
from tensorkv.shard import native, reduce
from tensorkv.shard.entry import Batch
from tensorkv.shard.optimizers import spec as spec_of
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


@pytest.mark.parametrize("shape", [(1,), (3,), (3, 1), ()])
def test_a_key_that_was_replaced_since_its_regions_and_ids_were_checked(shape):
    shard = shard_with(w=torch.ones(4))
    out, rows_out = torch.zeros(2), torch.zeros(2)
    shard.delete(["w"])
    shard.init(["w"], [torch.full(shape, 7.0)], [spec(torch.ones(shape))])
    with pytest.raises(ValueMismatchError, match=r'^pull\("w"\): the key was re-created with another shape'):
        shard.pull(["w"], [[out]], [Region(((2, 4),))])
    with pytest.raises(ValueMismatchError, match=r'^row_sparse_pull\("w"\): the key was re-created with another shape'):
        shard.pull_rows(["w"], [torch.tensor([1, 3])], [rows_out])
    assert out.tolist() == rows_out.tolist() == [0, 0]


def test_a_key_that_is_a_table_since():
    shard = shard_with(w=torch.ones(4, 1))
    held = rows.Rows(torch.tensor([1]), torch.ones(1, 1), 4)
    out = torch.zeros(4, 1)
    shard.delete(["w"])
    shard.init(["w"], [held], [KeySpec(out.shape, out.dtype, interop.NUMPY, True)])
    for regions in (None, [Region(((0, 4), (0, 1)))]):
        with pytest.raises(ValueMismatchError, match="the key was re-created"):
            shard.pull(["w"], [[out]], regions)


def test_a_key_that_was_deleted_since():
    shard = shard_with(w=torch.ones(3))
    shard.delete(["w"])
    with pytest.raises(KeyNotFoundError):
        shard.pushpull(Batch("pushpull", ["w"], [[torch.ones(3)]]), [[torch.zeros(3)]])


def test_a_round_in_which_only_a_replica_pushes_slices():
    """A replica pushes none of its own, as the value's first process does; other keys have their means."""
    shard = Shard(reduce="mean")
    values = [torch.zeros(3), torch.zeros(2)]
    shard.init(["w", "b"], values, [spec(value) for value in values])
    nothing = Slices(torch.Size([3]), (0, 3), [], [], torch.float32)
    shard.push(Batch("push", ["w", "b"], [[nothing], [torch.full((2,), 6.0)]], [1, 2]), must_complete=True)
    shard.pull(["b"], [[values[1]]])
    assert values[1].tolist() == [3, 3]


def test_of_two_threads_that_close_at_once_the_second_does_nothing():
    with tensorkv.create() as kv:
        close = kv._engine.close

        def close_twice():
            close()
            # The other thread came by before the store knew.
            close()

        kv._engine.close = close_twice
        kv.close()
    kv.close()


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


@pytest.mark.parametrize(
    ("part", "fails"),
    [(torch.full((4,), 9.0)[::2], True), (np.full(2, 9, np.float32), not native.can_look())],
    ids=["parsed", "plain"],
)
def test_an_assignment_that_fails_leaves_the_value_of_a_snapshot(monkeypatch, part, fails):
    memory = []

    def make_like(tensors):
        memory.extend(torch.full_like(each, 5) for each in tensors)
        return memory

    def fail(*_):
        raise MemoryError

    with tensorkv.create() as kv, monkeypatch.context() as patch:
        kv.init("w", np.ones(2, np.float32))
        # The memory into which the value is to go.
        patch.setattr(kv._engine._shard, "make_like", make_like)
        snapshot = kv.snapshot()
        patch.setattr(reduce, "sum_piece", fail)
        with pytest.raises(MemoryError) if fails else nullcontext():
            kv.push("w", part)
        assert len(memory) == 1
        assert kv.pull("w").tolist() == ([1, 1] if fails else [9, 9]), "not what the memory had"
        assert snapshot.pull("w").tolist() == [1, 1]


@pytest.mark.skipif(not native.can_look(), reason="needs the compiled part")
def test_a_value_that_has_moved_is_not_kept_where_it_was():
    shard = shard_with(w=torch.ones(3))
    batch = Batch("push", ["w"], [[torch.ones(3)]])
    shard.push(batch)
    [entry] = shard.freeze()
    old = weakref.ref(entry.value)
    shard.move([entry], lambda values: [value.clone() for value in values])
    gc.collect()
    assert old() is None


def test_momentum_that_was_made_for_a_push_that_failed_is_made_by_the_next_rows():
    class FullDisk:
        def commit(self, shard, change):
            raise StorageError("no room")

    values = []
    for fails in (True, False):
        with tensorkv.create() as kv:
            kv.init("w", np.zeros((2, 1), np.float32))
            kv.set_optimizer("sgd", lr=1.0, momentum=0.5, dampening=0.25)
            shard = kv._engine._shard
            shard.log = FullDisk() if fails else None
            if fails:
                with pytest.raises(StorageError):
                    kv.push("w", np.full((2, 1), 8, np.float32))
            shard.log = None
            kv.push("w", tensorkv.Rows([0], np.ones((1, 1), np.float32), 2))
            kv.push("w", np.ones((2, 1), np.float32))
            values.append(kv.pull("w").tolist())
    assert values == [[[-2.25], [-0.75]]] * 2


@pytest.mark.parametrize("optimizer", [None, "sgd"])
def test_a_state_that_was_dropped_is_freed(optimizer):
    with tensorkv.create() as kv:
        kv.init("w", np.zeros(4, np.float32))
        kv.set_optimizer("adam", lr=0.1)
        kv.push("w", np.ones(4, np.float32))
        state = weakref.ref(kv._engine._shard._entries["w"].state["exp_avg"])
        kv.push("w", np.ones(4, np.float32))
        assert state() is not None
        kv.set_updater(None) if optimizer is None else kv.set_optimizer(optimizer, lr=0.1)
        gc.collect()
        assert state() is None


@pytest.mark.skipif(not native.can_look(), reason="needs the compiled part")
@pytest.mark.parametrize("optimizer", [None, "sgd", "adam"])
def test_updates_by_pieces_are_those_of_a_push(optimizer):
    values = {"a": torch.arange(6.0), "b": torch.ones(0)}
    shards = [shard_with(**values) for _ in range(2)]
    for shard in shards:
        if optimizer:
            shard.set_optimizer(spec_of(optimizer, {"lr": 0.5}))
    for turn in (1, 2):
        gradient = torch.arange(6.0) * turn
        batch = shards[0].updates(["a", "b"])
        for first, count in ((2, 4), (0, 2)):
            address = gradient.data_ptr() + 4 * first
            batch.update_pieces(array("q", [0, first, count]).tobytes(), [array("Q", [address]).tobytes()], True)
        batch.finish()
        shards[1].push(Batch("push", ["a", "b"], [[gradient], [torch.ones(0)]]))
    held = []
    for shard in shards:
        with shard.frozen() as (entries, _):
            states = [{name: state.tolist() for name, state in entry.state.items()} for entry in entries]
            held.append(([entry.value.tolist() for entry in entries], states, [entry.version for entry in entries]))
    assert held[0] == held[1]
    assert held[0][2] == [2, 2]


def test_updates_that_are_not_made_by_pieces():
    shard = shard_with(a=torch.ones(2), b=torch.ones(2, dtype=torch.complex64))
    assert shard.updates(["b"]) is None
    assert shard.updates(["gone"]) is None
    shard.set_updater(lambda key, received, stored: None)
    assert shard.updates(["a"]) is None
    shard.count_updates(["a"])
    shard.count_updates(["a", "b"])
    with shard.frozen() as (entries, _):
        assert [entry.version for entry in entries] == [2, 1]


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


@pytest.mark.parametrize("optimizer", [None, "sgd", "adadelta"])
def test_rows_whose_ids_change_meanwhile_leave_all_keys_alone(optimizer, monkeypatch):
    """The second key's ids are found to be wrong when the first one's are merged already."""
    kv = tensorkv.create()
    kv.init({key: tensorkv.Rows([1], np.ones((1, 2)), 4) for key in "ab"})
    if optimizer is not None:
        kv.set_optimizer(optimizer, lr=0.5)
    right, fired = rows.merge, []

    def change(parts, *args, **kwargs):
        if len(fired) == 1:
            parts[0].ids[:] = 1 << 40
        fired.append(parts)
        return right(parts, *args, **kwargs)

    monkeypatch.setattr(rows, "merge", change)
    pushed = {key: tensorkv.Rows(torch.tensor([1]), torch.ones(1, 2, dtype=torch.float64), 4) for key in "ab"}
    with pytest.raises(ValueMismatchError, match=f"row id {1 << 40} is out of range"):
        kv.push(pushed)
    assert len(fired) == 2
    assert [info.version for info in kv.info(["a", "b"])] == [0, 0]
    assert all(each.values.tolist() == [[1, 1]] for each in kv.row_sparse_pull(["a", "b"], row_ids=[[1], [1]]))
