"""Records: their bytes, to the last one, and what is refused."""

import struct
import zlib

import pytest
import torch

from tensorkv import JournalError
from tensorkv.arrays.interop import NUMPY
from tensorkv.arrays.rows import Rows
from tensorkv.arrays.spec import KeySpec
from tensorkv.shard.entry import Batch
from tensorkv.storage import record
from tensorkv.storage.durable import DurableShard
from tensorkv.storage.record import Item, Record, frame, pack, read_frame, read_record, unpack

# A change of these is a change of the format: docs/journal-format.md, a new magic, and a reader for the old one.
LOG = (
    b"tkv12U\xdf\xf1\x03\x00\x00\x00\x00\x00\x00\x00$\x00\x00\x004\x00\x00\x00\x0c\x00\x00\x00\x00\x00\x00\x00mY"
    b'\xf7Zyw\xab8{"verb":"push","requests":[["a",2]]}[["w","ids","int64'
    b'",[1]],["w","rows","float32",[1]]]\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\xa0@end\n'
)
SNAPSHOT = (
    b"tkv1\x92D\xba\xa8\x02\x00\x00\x00\x00\x00\x00\x00\x12\x00\x00\x00$\x00\x00\x00\x08\x00\x00\x00\x00\x00\x00"
    b'\x00\xc2\xe5\xc6zv\xa5?.{"verb":"tensors"}[["value/w","tensor","float32",[2'
    b"]]]\x00\x00\x80?\x00\x00\x00@end\n"
    b"tkv1J\x11\xfe4\x02\x00\x00\x00\x00\x00\x00\x00\xec\x00\x00\x00\x02\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
    b'\x008\xdeN5\x00\x00\x00\x00{"verb":"end","body":{"kind":"store","update":"assi'
    b'gn","optimizer":null,"keys":[{"key":"w","kind":"dense","shap'
    b'e":[2],"dtype":"float32","version":1,"library":"numpy","devi'
    b'ce":null,"state":[],"columns":{}}]},"clients":{"a":1},"notes'
    b'":{}}[]end\n'
)


def write(folder):
    shard = DurableShard(str(folder), threads=1, wait_s=0)
    shard.init(["w"], [torch.zeros(2)], [KeySpec(torch.Size([2]), torch.float32, NUMPY, False)])
    with shard.clients.request("a", 1):
        shard.push(Batch("push", ["w"], [[torch.tensor([1.0, 2.0])]]))
    shard._snapshot()
    with shard.clients.request("a", 2):
        shard.push(Batch("push", ["w"], [[Rows(torch.tensor([1]), torch.tensor([5.0]), 2)]]))
    shard.close()


def test_the_bytes_of_a_folder_are_fixed(tmp_path):
    write(tmp_path / "new")
    found = {file.name: file.read_bytes() for file in (tmp_path / "new").iterdir()}
    assert found.pop("lock")[:17] == b"0000000000000001 "
    assert found == {"log-0000000000000003-00000001.tkv": LOG, "snapshot-0000000000000002.tkv": SNAPSHOT}


def test_fixed_bytes_are_read(tmp_path):
    (tmp_path / "log-0000000000000003-00000001.tkv").write_bytes(LOG)
    (tmp_path / "snapshot-0000000000000002.tkv").write_bytes(SNAPSHOT)
    shard = DurableShard(str(tmp_path), threads=1, wait_s=0)
    out = torch.empty(2)
    shard.pull(["w"], [[out]])
    assert (out.tolist(), shard.entry("pull", "w").version, shard.clients.last) == ([1, 5], 2, {"a": 2})
    shard.close()


def joined(made, lsn=1):
    return b"".join(bytes(buffer) for buffer in frame(made, lsn))


def reread(data):
    found = read_frame(data[: record.FRAME_NBYTES])
    words = data[record.FRAME_NBYTES : record.FRAME_NBYTES + found.words]
    payload = bytearray(data[record.FRAME_NBYTES + found.words : -len(record.END)])
    return read_record(found, words, payload)


@pytest.mark.parametrize("dtype", sorted(record._DTYPES))
def test_every_dtype_comes_back_in_place(dtype):
    kind = record._DTYPES[dtype]
    tensors = [
        torch.ones(3, dtype=torch.uint8),
        torch.ones((), dtype=kind),
        torch.ones((2, 3), dtype=kind).t(),
        torch.ones((0, 2), dtype=kind),
    ]
    items = [Item(i, "sum", tensor) for i, tensor in enumerate(tensors)]
    back = reread(joined(pack({"verb": "x"}, items))).items()
    assert [(i, role) for i, role, _ in back] == [(i, "sum") for i in range(4)]
    for (_, _, tensor), own in zip(back, tensors, strict=True):
        assert tensor.dtype is own.dtype
        assert torch.equal(tensor, own)


LAYOUTS = {
    "no JSON": b"[",
    "no list": b"3",
    "deep": b"[" * 100_000,
    "short": b'[["w","sum","float32"]]',
    "unknown dtype": b'[["w","sum","object",[1]]]',
    "dtype that is no text": b'[["w","sum",["float32"],[1]]]',
    "negative": b'[["w","sum","float32",[-1]]]',
    "two negatives": b'[["w","sum","float32",[-2,-2]]]',
    "half": b'[["w","sum","float32",[0.5]]]',
    "bool as a size": b'[["w","sum","float32",[true]]]',
    "overflow": b'[["w","sum","float32",[4294967296,4294967296]]]',
    "overflow to nothing": b'[["w","sum","float32",[4611686018427387904,4]]]',
    "beyond int64": b'[["w","sum","float32",[99999999999999999999]]]',
    "beyond what Python reads": b'[["w","sum","float32",[' + b"9" * 5000 + b"]]]",
    "no key": b'[[null,"sum","float32",[1]]]',
    "bool as a key": b'[[true,"sum","float32",[1]]]',
    "role that is no text": b'[["w",3,"float32",[1]]]',
    "NaN": b'[["w","sum","float32",[NaN]]]',
    "more than there is": b'[["w","sum","float32",[3]]]',
    "less than there is": b'[["w","sum","uint8",[3]]]',
    "not UTF-8": b'[["\xff","sum","float32",[1]]]',
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_that_do_not_fit_are_refused(layout):
    with pytest.raises(JournalError):
        unpack(layout, bytearray(8))


def test_bytes_that_are_no_bool_are_refused():
    with pytest.raises(JournalError, match="no bool"):
        unpack(b'[["w","sum","bool",[2]]]', bytearray(b"\1\2"))


@pytest.mark.parametrize("head", [b"[]", b"3", b"{", b'{"a":' * 100_000, b"\xff"])
def test_heads_that_are_no_object_are_refused(head):
    with pytest.raises(JournalError):
        read_record(record.Frame(1, len(head), 0, 0, zlib.crc32(head), 0), head, b"")


def test_a_frame_with_a_huge_head_is_refused():
    rest = struct.pack("<QIIQII", 1, 1 << 31, 1 << 31, 0, 0, 0)
    with pytest.raises(JournalError, match="a head of"):
        read_frame(b"tkv1" + struct.pack("<I", zlib.crc32(rest)) + rest)


def test_numbers_that_json_lacks_are_not_written():
    with pytest.raises(ValueError, match="JSON"):
        frame(Record({"lr": float("nan")}), 1)
