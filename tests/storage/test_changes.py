"""Changes as records: what was logged, decoded and applied in a loop, leads to the same bits."""

import json

import pytest
import torch

from tensorkv.arrays.interop import NUMPY
from tensorkv.arrays.regions import Region
from tensorkv.arrays.rows import Rows
from tensorkv.arrays.slices import Slices
from tensorkv.arrays.spec import KeySpec
from tensorkv.errors import StorageError
from tensorkv.shard import native, optimizers
from tensorkv.shard.changes import Change, Push, Restore, SetNotes
from tensorkv.shard.entry import Batch
from tensorkv.shard.rules import Assign
from tensorkv.shard.shard import Shard
from tensorkv.storage.changes import Events, decode, encode
from tensorkv.storage.record import Record
from tests.storage.kills import bits

MANY = [f"many-{i}" for i in range(10)]


class Recorder:
    """A log that keeps its records, as a file would give them back."""

    def __init__(self):
        self.records, self.kinds, self.counts = [], [], {}

    def commit(self, shard, change):
        if isinstance(change, Push):
            change = change.summed()
        record = encode(change)
        head = json.loads(json.dumps(record.head))
        self.records.append(Record(head, record.layout, [bytearray(b"".join(record.payload))]))
        self.kinds.append(type(change).__name__)
        return shard.apply(change)

    def close(self):
        pass


def add(shard, **values):
    specs = []
    for value in values.values():
        is_rows = isinstance(value, Rows)
        specs.append(KeySpec(torch.Size(value.shape), value.values.dtype if is_rows else value.dtype, NUMPY, is_rows))
    shard.init(list(values), list(values.values()), specs)


def rows(ids, number):
    return Rows(torch.tensor(ids), torch.full((len(ids), 2), number), 100)


def use(shard):
    """Make every kind of change that a log has."""
    generator = torch.Generator().manual_seed(0)
    add(shard, w=torch.randn(300, generator=generator), s=torch.zeros(3), t=rows([5], 1.0), old=torch.zeros(2))
    add(shard, **{key: torch.zeros(50) for key in MANY})
    shard.push(Batch("push", ["w", "t"], [[torch.ones(300), torch.ones(300)], [rows([7, 5], 0.5)]]))
    shard.set_optimizer(optimizers.spec("adam", {"lr": 0.1}))
    shard.set_hyperparameters({"lr": 0.2}, ["w"])
    for number in range(5):
        gradients = [torch.full((50,), 0.1 * number + i) for i in range(len(MANY))]
        if not shard.try_compiled(native.Call(None, "push", MANY, gradients, None, 0)):
            shard.push(Batch("push", MANY, [[gradient] for gradient in gradients]))
        shard.push(Batch("push", ["w", "t"], [[torch.randn(300, generator=generator)], [rows([number], 1.0)]]))
    for place in range(5):
        part = Slices(torch.Size([3]), (0, 3), [Region(((place % 3, place % 3 + 1),))], [torch.ones(1)], torch.float32)
        shard.push(Batch("push", ["s", "w"], [[part], [torch.ones(300)]]))
    shard.commit(SetNotes({"place": {"server": 1}, "gone": 1}))
    shard.commit(SetNotes({"gone": None}))
    shard.delete(["old"])


def test_replaying_the_records_of_changes_leads_to_the_same_bits():
    shard, other = Shard(threads=1), Shard(threads=1)
    shard.log = log = Recorder()
    use(shard)
    assert {record.head["verb"] for record in log.records} >= {"slices", "push"}
    assert {"Init", "Push", "PlainPush", "SetRule", "SetNotes", "Delete"} <= set(log.kinds)
    for record in log.records:
        other.apply(decode(record, other))
    assert bits_of_all(other) == bits_of_all(shard)
    assert (other.keys(), other.notes, other.optimizer) == (shard.keys(), shard.notes, shard.optimizer)


def bits_of_all(shard):
    dense = Shard(threads=1)
    with shard.frozen() as (entries, _):
        dense.add([entry for entry in entries if not entry.spec.is_table])
        tables = [entry for entry in entries if entry.spec.is_table]
    held = [(e.key, e.version, e.value.ids.tolist(), e.value.read(e.value.ids).tolist()) for e in tables]
    columns = [[e.value.read(e.value.ids, name).tolist() for name in e.value.columns] for e in tables]
    return bits(dense), held, columns


def test_the_ids_of_requests_are_logged_with_their_change():
    shard = Shard(threads=1)
    shard.log = log = Recorder()
    add(shard, w=torch.zeros(3))
    shard.push(Batch("push", ["w"], [[torch.ones(3)]]), requests=[("a", 1), ("b", 7, {"rank": 1})])
    assert [record.head.get("requests") for record in log.records] == [None, [["a", 1], ["b", 7, {"rank": 1}]]]


@pytest.mark.parametrize("change", [Change(), Events([["new"]])])
def test_a_shard_applies_only_its_own_changes(change):
    with pytest.raises(TypeError, match=type(change).__name__):
        Shard().apply(change)


def test_a_log_has_no_record_of_a_restore():
    with pytest.raises(TypeError, match="Restore"):
        encode(Restore([], Assign()))


def test_a_shard_that_has_failed_refuses_every_verb_but_close():
    shard = Shard()
    add(shard, w=torch.zeros(3))
    shard.fail("planted")
    calls = [
        lambda: shard.push(Batch("push", ["w"], [[torch.ones(3)]])),
        lambda: shard.pull(["w"], [[torch.zeros(3)]]),
        lambda: shard.entry("info", "w"),
        lambda: shard.delete(["w"]),
        lambda: shard.frozen().__enter__(),
    ]
    for call in calls:
        with pytest.raises(StorageError, match="planted"):
            call()
    shard.close()
