"""Logs and snapshots with checksums that fit and contents that no store writes: an error, whatever they are."""

import re

import pytest
import torch

from tensorkv import StorageError
from tensorkv.arrays.packing import Item
from tensorkv.storage.durable import open_shard
from tensorkv.storage.record import Record, frame

ENTRY = {
    "key": "w",
    "kind": "dense",
    "shape": [2],
    "dtype": "float32",
    "version": 0,
    "library": "numpy",
    "device": None,
    "state": [],
    "columns": {},
}
BODY = {"kind": "store", "update": "assign", "optimizer": None, "keys": [ENTRY]}
F2 = torch.zeros(2)
INIT = Record.pack({"verb": "init", "body": BODY}, [Item("value/w", "tensor", F2)])
TABLE = {**ENTRY, "key": "t", "kind": "rows", "shape": [9, 2]}
TABLE_INIT = Record.pack(
    {"verb": "init", "body": {**BODY, "keys": [TABLE]}},
    [Item("ids/t", "tensor", torch.tensor([1])), Item("value/t", "tensor", torch.zeros(1, 2))],
)
SGD = {
    "name": "sgd",
    "numbers": {"lr": 0.1},
    "rescale_grad": 1.0,
    "clip_gradient": None,
    "overrides": [],
}


def init(tensors, update=None, **changed):
    body = {**BODY, **(update or {}), "keys": [{**ENTRY, **changed}]}
    return Record.pack(
        {"verb": "init", "body": body}, [Item(name, "tensor", tensor) for name, tensor in tensors.items()]
    )


def push(*items, verb="push", **head):
    return Record.pack({"verb": verb, **head}, [Item(*item) for item in items])


def rows(ids, values, verb="put", key="t"):
    return push((key, "ids", torch.tensor(ids)), (key, "rows", values), verb=verb)


def rule(**changed):
    return Record({"verb": "rule", "update": "optimizer", "optimizer": {**SGD, **changed}})


LOGS = {
    "no verb": Record({}),
    "unknown verb": Record({"verb": "run"}),
    "verb that is no text": Record({"verb": ["push"]}),
    "key that is not there": push(("x", "sum", F2)),
    "key of the other type": push((3, "sum", F2)),
    "sum of another shape": push(("w", "sum", torch.zeros(3))),
    "sum of another dtype": push(("w", "sum", F2.double())),
    "complex sum": push(("w", "sum", F2.to(torch.complex64))),
    "unknown role": push(("w", "value", F2)),
    "key twice in a push": push(("w", "sum", F2), ("w", "sum", F2)),
    "put of another dtype": push(("w", "sum", F2.int()), verb="put"),
    "dense sum for a table": push(("t", "sum", torch.zeros(9, 2))),
    "ids without rows": push(("t", "ids", torch.tensor([1]))),
    "rows of another key": push(("t", "ids", torch.tensor([1])), ("w", "rows", torch.zeros(1, 2))),
    "id out of range": rows([9], torch.zeros(1, 2)),
    "negative id": rows([-1], torch.zeros(1, 2)),
    "id twice": rows([1, 1], torch.zeros(2, 2)),
    "ids that fall": rows([2, 1], torch.zeros(2, 2)),
    "ids that are no int64": rows([1.0], torch.zeros(1, 2)),
    "more ids than rows": rows([1, 2], torch.zeros(1, 2)),
    "rows of another width": rows([1], torch.zeros(1, 3)),
    "init of a key that is there": INIT,
    "init without a body": Record({"verb": "init"}),
    "init without tensors": Record({"verb": "init", "body": {**BODY, "keys": [{**ENTRY, "key": "v"}]}}),
    "init with a tensor too many": init({"value/v": F2, "value/u": F2}, key="v"),
    "init with a huge shape": init({"value/v": F2}, key="v", shape=[1 << 40, 1 << 40]),
    "init with a shape of 8 GB": init({"value/v": F2}, key="v", shape=[1 << 31]),
    "init with a negative shape": init({"value/v": F2}, key="v", shape=[-2]),
    "init with an unknown dtype": init({"value/v": F2}, key="v", dtype="object"),
    "init of an integer key": init({"value/3": F2}, key=3),
    "init with a state": init({"value/v": F2, "state/step": F2}, key="v", state=["step"]),
    "init without values": init(
        {"state/step/v": F2},
        {"kind": "optimizer-states", "update": "optimizer", "optimizer": SGD},
        key="v",
        state=["step"],
    ),
    "delete of nothing": Record({"verb": "delete", "keys": ["x"]}),
    "delete of a text": Record({"verb": "delete", "keys": "wt"}),
    "delete twice": Record({"verb": "delete", "keys": ["w", "w"]}),
    "unknown rule": Record({"verb": "rule", "update": "exec"}),
    "unknown optimizer": rule(name="os.system"),
    "unknown number": rule(numbers={"lr": 0.1, "run": 1}),
    "number out of range": rule(numbers={"lr": -1}),
    "numbers of no key": rule(overrides=[["x", {"lr": 0.1}]]),
    "digest of something else": Record({"verb": "digest", "keys": [["w", 1]]}),
    "digest of nothing": Record({"verb": "digest", "keys": None}),
    "request of nobody": Record({"verb": "delete", "keys": ["w"], "requests": [[None, 1]]}),
    "request without a number": Record({"verb": "delete", "keys": ["w"], "requests": [["a", True]]}),
    "requests that are a number": Record({"verb": "delete", "keys": ["w"], "requests": 3}),
}


def write(file, *records, snapshot=False):
    buffers = [buffer for i, made in enumerate(records) for buffer in frame(made, 1 if snapshot else i + 1)]
    file.write_bytes(b"".join(bytes(buffer) for buffer in buffers))


def refuse(folder):
    with pytest.raises(StorageError) as caught:
        open_shard(str(folder), threads=1, wait_s=0)
    assert not isinstance(caught.value.__cause__, MemoryError)
    assert not re.search("alloc|memory", str(caught.value)), "memory that is only claimed"


def test_what_the_others_differ_from_is_read(tmp_path):
    log = tmp_path / "log-0000000000000001-00000001.tkv"
    write(
        log,
        INIT,
        TABLE_INIT,
        push(("w", "sum", F2)),
        rows([1, 2], torch.zeros(2, 2)),
        rule(overrides=[["w", {"lr": 0.2}]]),
    )
    shard = open_shard(str(tmp_path), threads=1, wait_s=0)
    assert [shard.entry("pull", key).version for key in ("w", "t")] == [1, 1]
    shard.close()


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("made", LOGS.values(), ids=LOGS)
def test_logs_that_no_store_writes_are_refused(made, tmp_path):
    write(tmp_path / "log-0000000000000001-00000001.tkv", INIT, TABLE_INIT, made)
    refuse(tmp_path)


def end(body=BODY, **changed):
    return Record.pack(
        {"verb": "end", "body": body, "clients": {}, "notes": {}, **changed}, [Item("value/w", "tensor", F2)]
    )


SNAPSHOTS = {
    "no end": [INIT],
    "nothing": [],
    "records after the end": [end(), end()],
    "clients that are a list": [end(clients=[])],
    "client without a number": [end(clients={"a": "1"})],
    "notes that are a number": [end(notes=3)],
    "key twice": [end({**BODY, "keys": [ENTRY, ENTRY]})],
    "tensor twice": [Record.pack({"verb": "tensors"}, [Item("value/w", "tensor", F2)]), end()],
    "no body": [Record({"verb": "end", "clients": {}, "notes": {}})],
    "states alone": [end({**BODY, "kind": "optimizer-states", "update": "optimizer", "optimizer": SGD})],
    "state of another shape": [
        Record.pack(
            {
                "verb": "end",
                "clients": {},
                "notes": {},
                "body": {
                    **BODY,
                    "update": "optimizer",
                    "optimizer": {**SGD, "name": "adam"},
                    "keys": [{**ENTRY, "state": ["step"]}],
                },
            },
            [Item("value/w", "tensor", F2), Item("state/step/w", "tensor", torch.zeros(7))],
        )
    ],
    "numbers of no key": [end({**BODY, "update": "optimizer", "optimizer": {**SGD, "overrides": [["x", {"lr": 1}]]}})],
}


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("records", SNAPSHOTS.values(), ids=SNAPSHOTS)
def test_snapshots_that_no_store_writes_are_refused(records, tmp_path):
    write(tmp_path / "snapshot-0000000000000001.tkv", *records, snapshot=True)
    refuse(tmp_path)
