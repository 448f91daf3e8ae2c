"""Records: their bytes, to the last one, and what is refused."""

import importlib.util
import os
import struct
import sys
import zlib

import numpy as np
import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st

from tensorkv import StorageError
from tensorkv.arrays.interop import DTYPES, NUMPY, dtype_name
from tensorkv.arrays.packing import Item
from tensorkv.arrays.rowinit import RowInit
from tensorkv.arrays.rows import Rows
from tensorkv.arrays.spec import KeySpec
from tensorkv.shard.entry import Batch
from tensorkv.storage import record
from tensorkv.storage.durable import open_shard
from tensorkv.storage.folder import Folder
from tensorkv.storage.record import Record, crc32, frame, read_frame, read_record

# A change of these is a change of the format: docs/wal-format.md, a new magic, and a reader for the old one.
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
    shard = open_shard(str(folder), threads=1, wait_s=0)
    shard.init(["w"], [torch.zeros(2)], [KeySpec(torch.Size([2]), torch.float32, NUMPY, False)])
    shard.push(Batch("push", ["w"], [[torch.tensor([1.0, 2.0])]]), requests=[("a", 1)])
    shard.log.snapshot(shard)
    shard.push(Batch("push", ["w"], [[Rows(torch.tensor([1]), torch.tensor([5.0]), 2)]]), requests=[("a", 2)])
    shard.close()


def test_the_bytes_of_a_folder_are_fixed(tmp_path):
    write(tmp_path / "new")
    found = {file.name: file.read_bytes() for file in (tmp_path / "new").iterdir()}
    assert found.pop("lock")[:17] == b"0000000000000001 "
    assert found == {"log-0000000000000003-00000001.tkv": LOG, "snapshot-0000000000000002.tkv": SNAPSHOT}


def test_fixed_bytes_are_read(tmp_path):
    (tmp_path / "log-0000000000000003-00000001.tkv").write_bytes(LOG)
    (tmp_path / "snapshot-0000000000000002.tkv").write_bytes(SNAPSHOT)
    shard = open_shard(str(tmp_path), threads=1, wait_s=0)
    out = torch.empty(2)
    shard.pull(["w"], [[out]])
    assert (out.tolist(), shard.entry("pull", "w").version, shard.log.applied.last) == ([1, 5], 2, {"a": 2})
    shard.close()


def test_the_record_of_a_table_that_starts_by_a_rule(tmp_path):
    """A table of any size costs a line, and an older version, which does not know its kind, refuses it."""
    init = RowInit.of("normal", {"std": 0.5}, 7)
    shard = open_shard(str(tmp_path), threads=1, wait_s=0)
    spec = KeySpec(torch.Size([2**62, 2]), torch.float32, NUMPY, True, init)
    none = torch.empty(0, dtype=torch.int64)
    shard.init(["t"], [Rows(none, torch.zeros(0, 2), 2**62, init=init)], [spec])
    first = shard.pull_rows(["t"], [torch.tensor([5])])[0].values
    shard.close()
    body = (
        b'{"kind":"store","update":"assign","optimizer":null,"keys":[{"key":"t","kind":"initialized-rows","shape":'
        b'[4611686018427387904,2],"dtype":"float32","version":0,"library":"numpy","device":null,"state":[],"columns":{},'
        b'"init":{"name":"normal","mean":0.0,"std":0.5,"seed":7}}]}'
    )
    data = (tmp_path / "log-0000000000000001-00000001.tkv").read_bytes()
    assert b'{"verb":"init","body":' + body + b'}[["ids/t","tensor","int64",[0]],["value/t",' in data
    assert len(data) < 500
    shard = open_shard(str(tmp_path), threads=1, wait_s=0)
    assert torch.equal(shard.pull_rows(["t"], [torch.tensor([5])])[0].values, first)
    shard.close()


def joined(made, lsn=1):
    return b"".join(bytes(buffer) for buffer in frame(made, lsn))


def reread(data):
    found = read_frame(data[: record.FRAME_NBYTES])
    head = data[record.FRAME_NBYTES : record.FRAME_NBYTES + found.head_nbytes]
    payload = bytearray(data[record.FRAME_NBYTES + found.head_nbytes : -len(record.END)])
    return read_record(found, head, payload)


@pytest.mark.parametrize("dtype", sorted(map(dtype_name, DTYPES)))
def test_every_dtype_comes_back_in_place(dtype):
    kind = getattr(torch, dtype)
    tensors = [
        torch.ones(3, dtype=torch.uint8),
        torch.ones((), dtype=kind),
        torch.ones((2, 3), dtype=kind).t(),
        torch.ones((0, 2), dtype=kind),
    ]
    items = [Item(i, "sum", tensor) for i, tensor in enumerate(tensors)]
    back = reread(joined(Record.pack({"verb": "x"}, items))).items()
    assert [(i, role) for i, role, _ in back] == [(i, "sum") for i in range(4)]
    for (_, _, tensor), own in zip(back, tensors, strict=True):
        assert tensor.dtype is own.dtype
        assert torch.equal(tensor, own)


@pytest.mark.parametrize("head", [b"[]", b"3", b"{", b'{"a":' * 100_000, b"\xff"])
def test_heads_other_than_objects_are_refused(head):
    with pytest.raises(StorageError):
        read_record(record.Frame(1, len(head), 0, 0, zlib.crc32(head), 0), head, b"")


def test_a_frame_with_a_huge_head_is_refused():
    rest = struct.pack("<QIIQII", 1, 1 << 31, 1 << 31, 0, 0, 0)
    with pytest.raises(StorageError, match="a head of"):
        read_frame(b"tkv1" + struct.pack("<I", zlib.crc32(rest)) + rest)


def test_numbers_that_json_lacks_are_not_written():
    with pytest.raises(ValueError, match="JSON"):
        frame(Record({"lr": float("nan")}), 1)


# ---------------------------------------------------------------- checksums

DATA = np.random.default_rng(0).integers(0, 256, 70_000, np.uint8)


@given(start=st.integers(0, 70), nbytes=st.integers(0, 66_000), before=st.integers(0, 2**32 - 1))
def test_the_checksum_is_that_of_zlib(start, nbytes, before):
    data = DATA[start : start + nbytes]
    assert crc32(data, before) == zlib.crc32(data, before)


def test_elements_of_more_than_a_byte_and_read_only_data_have_a_checksum():
    assert crc32(DATA.view(np.float64)) == crc32(DATA.tobytes()) == zlib.crc32(DATA)


def test_without_isal_records_are_the_same(monkeypatch):
    made = Record.pack({"verb": "push"}, [Item("w", "sum", torch.arange(2000))])
    before = joined(made)
    monkeypatch.setitem(sys.modules, "isal.isal_zlib", None)
    name = "record_without_isal"
    spec = importlib.util.spec_from_file_location(f"tensorkv.storage.{name}", record.__file__)
    without = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, without)
    spec.loader.exec_module(without)
    assert without.crc32 is zlib.crc32
    assert b"".join(bytes(buffer) for buffer in without.frame(made, 1)) == before


# ---------------------------------------------------------------- files


@pytest.fixture
def descriptor(tmp_path):
    made = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield made
    os.close(made)


@pytest.mark.parametrize("most", [1, 7, 1 << 30])
def test_buffers_are_written_one_after_another_however_few_bytes_a_call_takes(most, descriptor, monkeypatch):
    real, calls = os.pwritev, []

    def short(fd, buffers, at):
        calls.append(len(buffers))
        return real(fd, [b"".join(bytes(buffer) for buffer in buffers)[:most]], at)

    monkeypatch.setattr(os, "pwritev", short)
    buffers = [bytes([i % 256]) * (i % 4) for i in range(1100)]
    end = record.write(descriptor, buffers, 5)
    assert os.pread(descriptor, 10_000, 0) == bytes(5) + b"".join(buffers)
    assert end == 5 + sum(map(len, buffers))
    assert max(calls) <= 1024
    assert len(calls) > 1


def test_a_call_takes_a_bounded_number_of_bytes(descriptor, monkeypatch):
    monkeypatch.setattr(record, "_CALL_NBYTES", 10)
    assert record.write(descriptor, [b"x" * 25, b"y" * 3], 0) == 28
    assert os.pread(descriptor, 100, 0) == b"x" * 25 + b"y" * 3


def test_files_without_records(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    with record.Reader(Folder(tmp_path), "file") as reader:
        assert list(reader.records()) == []
    for name in ("link", "nothing"):
        with pytest.raises(StorageError, match="cannot be read"):
            record.Reader(Folder(tmp_path), name)
    for name in ("pipe", "."):
        with (
            record.Reader(Folder(tmp_path), name) as reader,
            pytest.raises(StorageError, match="not a regular file"),
        ):
            next(reader.records())


def test_a_file_that_becomes_shorter_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(bytes(range(100)))
    with record.Reader(Folder(tmp_path), "file") as reader:
        monkeypatch.setattr(os, "preadv", lambda *arguments: 0)
        with pytest.raises(StorageError, match="became shorter"):
            next(reader.records())
