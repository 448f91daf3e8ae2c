"""Files of records: many buffers, short writes, and files that are none."""

import os

import pytest

from tensorkv import JournalError
from tensorkv.storage import record_file
from tensorkv.storage.folder import Folder


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
    end = record_file.write(descriptor, buffers, 5)
    assert os.pread(descriptor, 10_000, 0) == bytes(5) + b"".join(buffers)
    assert end == 5 + sum(map(len, buffers))
    assert max(calls) <= 1024
    assert len(calls) > 1


def test_a_call_takes_a_bounded_number_of_bytes(descriptor, monkeypatch):
    monkeypatch.setattr(record_file, "_CALL_NBYTES", 10)
    assert record_file.write(descriptor, [b"x" * 25, b"y" * 3], 0) == 28
    assert os.pread(descriptor, 100, 0) == b"x" * 25 + b"y" * 3


def test_files_that_are_none(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    with record_file.Reader(Folder(tmp_path), "file") as reader:
        assert list(reader.records()) == []
    for name in ("link", "nothing"):
        with pytest.raises(JournalError, match="cannot be read"):
            record_file.Reader(Folder(tmp_path), name)
    for name in ("pipe", "."):
        with (
            record_file.Reader(Folder(tmp_path), name) as reader,
            pytest.raises(JournalError, match="not a regular file"),
        ):
            next(reader.records())


def test_a_file_that_becomes_shorter_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(bytes(range(100)))
    with record_file.Reader(Folder(tmp_path), "file") as reader:
        monkeypatch.setattr(os, "preadv", lambda *arguments: 0)
        with pytest.raises(JournalError, match="became shorter"):
            next(reader.records())
