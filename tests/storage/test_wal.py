"""The write-ahead log: what is read back after a cut, a flipped bit, a lost file; and who may write."""

import json
import os
import random
import shutil
import threading

import pytest
import torch

from tensorkv import ArgumentError, StorageError
from tensorkv.arrays.interop import NUMPY
from tensorkv.arrays.packing import Item
from tensorkv.arrays.spec import KeySpec
from tensorkv.shard.entry import Batch
from tensorkv.storage.durable import open_shard
from tensorkv.storage.folder import Folder
from tensorkv.storage.record import Reader, Record
from tensorkv.storage.wal import WriteAheadLog
from tests.storage import kills
from tests.support.amount import amount

SEED = int(os.environ.get("TENSORKV_TEST_SEED", "20"))


def open_wal(path, durability="process", **options):
    wal = WriteAheadLog(str(path), durability, wait_s=0, **options)
    try:
        found = read(wal)
        wal.begin()
    except BaseException:
        wal.close()
        raise
    return wal, found


def plain(record):
    payload = b"".join(bytes(buffer) for buffer in record.payload)
    return record.head, record.layout, payload


def read(wal):
    return [(plain(record), of_snapshot) for record, of_snapshot in wal.read()]


def numbers(count, size=64):
    return [
        Record.pack({"verb": "push", "i": i}, [Item("w", "sum", torch.full((size,), float(i)))]) for i in range(count)
    ]


def write_segment(path, records):
    wal, _ = open_wal(path)
    for record in records:
        wal.append(record)
    wal.close()
    (segment,) = path.glob("log-*")
    return segment


def lsns(segment):
    with Reader(Folder(segment.parent), segment.name) as reader:
        found = [lsn for lsn, _ in reader.records()]
        return found, reader.is_torn


def test_what_was_appended_is_read(tmp_path):
    records = numbers(5)
    write_segment(tmp_path, records)
    wal, found = open_wal(tmp_path)
    wal.close()
    assert found == [(plain(record), False) for record in records]


def test_a_log_that_is_cut_anywhere_ends_with_its_last_whole_record(tmp_path):
    segment = write_segment(tmp_path, numbers(17, 1000))
    ends = [0]
    with Reader(Folder(segment.parent), segment.name) as reader:
        for _ in reader.records():
            ends.append(ends[-1] + reader.record_nbytes)
    assert ends[-1] == segment.stat().st_size > 1 << 16
    whole = len(ends) - 1
    for size in range(ends[-1], -1, -amount(7, 1)):
        os.truncate(segment, size)
        while ends[whole] > size:
            whole -= 1
        assert lsns(segment) == (list(range(1, whole + 1)), size > ends[whole]), size


def test_a_tail_of_zeros_is_a_write_that_was_not_finished(tmp_path):
    segment = write_segment(tmp_path, numbers(3))
    data = segment.read_bytes()
    record = len(data) // 3
    for kept in range(2 * record, 3 * record):
        for size in (3 * record, kept + 1, kept + 5000 if kept < 2 * record + 36 else 3 * record):
            segment.write_bytes(data[:kept].ljust(size, b"\0")[: max(size, kept)])
            assert lsns(segment) == ([1, 2], True), (kept, size)


def test_zeros_in_the_middle_are_damage(tmp_path):
    segment = write_segment(tmp_path, numbers(3))
    data = segment.read_bytes()
    record = len(data) // 3
    segment.write_bytes(data[:record] + bytes(record) + data[2 * record :])
    with pytest.raises(StorageError, match=f"damaged at byte {record}"):
        lsns(segment)


@pytest.mark.parametrize("index", [0, 1])
def test_a_damaged_log_can_be_read_again_after_what_the_message_says(index, tmp_path):
    write_segment(tmp_path, numbers(4))
    wal, _ = open_wal(tmp_path)
    for record in numbers(3):
        wal.append(record)
    wal.close()
    segments = sorted(tmp_path.glob("log-*"))
    data = bytearray(segments[index].read_bytes())
    at = len(data) // (4 - index) * 2
    data[at + 40] ^= 1
    segments[index].write_bytes(data)
    with pytest.raises(StorageError, match=f"{segments[index].name}: damaged at byte {at}: .* truncate") as caught:
        open_wal(tmp_path)
    assert ("remove the log files of higher numbers" in str(caught.value)) == (index == 0)
    os.truncate(segments[index], at)
    for later in segments[index + 1 :]:
        later.unlink()
    wal, found = open_wal(tmp_path)
    wal.close()
    assert [head["i"] for (head, _, _), _ in found] == [[0, 1], [0, 1, 2, 3, 0, 1]][index]


def test_a_damaged_snapshot_is_not_to_be_truncated(folder_with_both, tmp_path):
    folder = shutil.copytree(folder_with_both, tmp_path / "copy")
    (file,) = folder.glob("snapshot-*")
    data = bytearray(file.read_bytes())
    data[40] ^= 1
    file.write_bytes(data)
    with pytest.raises(StorageError, match=f"{file.name}: damaged at byte 0: ") as caught:
        open_wal(folder)
    assert str(caught.value).endswith("; restore the folder from a copy")


@pytest.mark.parametrize("kind", ["log", "snapshot"])
def test_files_of_another_version_are_not_called_damaged(kind, folder_with_both, tmp_path):
    folder = shutil.copytree(folder_with_both, tmp_path / "copy")
    file = max(folder.glob(f"{kind}-*"))
    data = file.read_bytes()
    for rest in (data[4:], b"\x01" * 1000, b""):
        file.write_bytes(b"tkv2" + rest)
        with pytest.raises(StorageError, match="of another version, tkv2; this one reads tkv1") as caught:
            open_wal(folder)
        assert file.name in str(caught.value)
        assert "truncate" not in str(caught.value)
    # In the middle of a file it is damage.
    file.write_bytes(data + b"tkv2" + data[4:])
    with pytest.raises(StorageError, match=f"damaged at byte {len(data)}"):
        open_wal(folder)


# ---------------------------------------------------------------- single bits


@pytest.fixture(scope="module")
def folder_with_both(tmp_path_factory):
    """A snapshot of two keys with a segment of later pushes."""
    path = tmp_path_factory.mktemp("both")
    shard = open_shard(str(path), threads=1)
    kills.prepare(shard)
    for i in range(4):
        kills.push(shard, i)
    shard.log.snapshot(shard)
    for i in range(4, 8):
        kills.push(shard, i)
    shard.close()
    return path


def flips(folder, count):
    files = [file for file in sorted(folder.iterdir()) if file.name != "lock" and file.stat().st_size]
    places = [(file, at) for file in files for at in range(file.stat().st_size)]
    for _ in range(count):
        file, at = random.choice(places)
        data = file.read_bytes()
        bit = 1 << random.randrange(8)
        file.write_bytes(data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :])
        yield file.name, at, bit
        file.write_bytes(data)


def flip_and_read(folder, count):
    """Flip single bits; what is read is an error, or everything as it was. Return how many errors there were."""
    wal = WriteAheadLog(str(folder), "process", wait_s=0)
    try:
        expected = read(wal)
        assert len(expected) == 6
        errors = 0
        for where in flips(folder, count):
            try:
                assert read(wal) == expected, where
            except StorageError:
                errors += 1
        return errors
    finally:
        wal.close()


def test_no_flipped_bit_changes_what_is_read(folder_with_both, tmp_path):
    random.seed(SEED)
    folder = shutil.copytree(folder_with_both, tmp_path / "copy")
    flips = amount(2_000, 10_000)
    assert flip_and_read(folder, flips) == flips


def test_no_flipped_bit_changes_values(folder_with_both, tmp_path):
    random.seed(SEED)
    if not kills.HISTORY:
        kills.write_history()
    folder = shutil.copytree(folder_with_both, tmp_path / "copy")
    for where in flips(folder, 200):
        shard = None
        try:
            shard = open_shard(str(folder), threads=1, wait_s=0)
        except StorageError:
            continue
        shard.close()
        pytest.fail(f"{where} went unnoticed")
    shard = open_shard(str(folder), threads=1, wait_s=0)
    assert kills.bits(shard) == kills.HISTORY[8]
    shard.close()


def unchecked(frame, head, payload):
    return Record(json.loads(head[: frame.json_nbytes]), head[frame.json_nbytes :], [payload])


def test_flipped_bits_without_checksums_would_be_noticed(folder_with_both, tmp_path, monkeypatch):
    random.seed(SEED)
    monkeypatch.setattr("tensorkv.storage.record.read_record", unchecked)
    folder = shutil.copytree(folder_with_both, tmp_path / "copy")
    with pytest.raises((AssertionError, ValueError)):
        flip_and_read(folder, 1000)


# ---------------------------------------------------------------- files that are not there


def test_a_lost_snapshot_is_an_error(folder_with_both, tmp_path):
    folder = shutil.copytree(folder_with_both, tmp_path / "copy")
    next(folder.glob("snapshot-*")).unlink()
    for emptied in (False, True):
        if emptied:
            next(folder.glob("log-*")).write_bytes(b"")
        with pytest.raises(StorageError, match="is missing"):
            open_shard(str(folder), wait_s=0)


def test_a_lost_log_is_an_error(tmp_path):
    for _ in range(3):
        wal, _ = open_wal(tmp_path)
        wal.append(numbers(1)[0])
        wal.close()
    segments = sorted(tmp_path.glob("log-*"))
    segments[1].unlink()
    with pytest.raises(StorageError, match="record 2 is missing, 3 comes next"):
        open_wal(tmp_path)


def test_a_removed_lock_does_not_turn_back_the_order_of_logs(tmp_path):
    for _ in range(5):
        open_wal(tmp_path)[0].close()
    (tmp_path / "lock").unlink()
    wal, _ = open_wal(tmp_path)
    wal.append(numbers(1)[0])
    wal.close()
    wal, found = open_wal(tmp_path)
    wal.close()
    assert len(found) == 1


# ---------------------------------------------------------------- who may write


def take_over(folder):
    """Do what another process does where the lock could not keep it out."""
    (folder / "lock").rename(folder.parent / "aside")
    shutil.copy(folder.parent / "aside", folder / "lock")
    wal, found = open_wal(folder)
    # In place, where the first holder looks.
    (folder.parent / "aside").write_bytes((folder / "lock").read_bytes())
    (folder.parent / "aside").unlink()
    return wal, found


@pytest.fixture
def two(tmp_path):
    first, _ = open_wal(tmp_path)
    first.append(numbers(1)[0])
    second, found = take_over(tmp_path)
    assert len(found) == 1
    yield first, second
    first.close()
    second.close()


def test_a_holder_that_was_taken_for_dead_writes_nothing_more(two, tmp_path):
    first, second = two
    size = os.stat(next(tmp_path.glob("log-*1.tkv"))).st_size
    with pytest.raises(StorageError, match="another process has opened this store, taking this one for dead"):
        first.append(numbers(1)[0])
    with pytest.raises(StorageError):
        first.undo()
    second.append(numbers(1)[0])
    assert os.stat(next(tmp_path.glob("log-*1.tkv"))).st_size == size


def test_a_snapshot_of_a_holder_that_was_taken_for_dead_does_not_count(two, tmp_path):
    first, _ = two
    assert not first.snapshot([Record({"verb": "end"})])
    assert not list(tmp_path.glob("snapshot-*"))


def test_a_takeover_during_a_write_is_not_acknowledged(tmp_path, monkeypatch):
    wal, _ = open_wal(tmp_path)
    real = os.pwritev

    def write_and_lose(*arguments):
        done = real(*arguments)
        (tmp_path / "lock").write_bytes(b"%016x          1\n" % 9)
        return done

    monkeypatch.setattr(os, "pwritev", write_and_lose)
    with pytest.raises(StorageError, match="another process"):
        wal.append(numbers(1)[0])
    monkeypatch.undo()
    wal.close()
    # The other may have read it: it stays.
    (segment,) = tmp_path.glob("log-*")
    assert lsns(segment) == ([1], False)


def test_what_an_old_holder_writes_later_is_not_read(tmp_path):
    segment = write_segment(tmp_path, numbers(2))
    late = segment.read_bytes()
    os.truncate(segment, len(late) // 2)
    wal, found = open_wal(tmp_path)
    assert len(found) == 1
    wal.append(numbers(3)[2])
    wal.close()
    segment.write_bytes(late)
    wal, found = open_wal(tmp_path)
    wal.close()
    assert [head["i"] for (head, _, _), _ in found] == [0, 2]


def test_a_log_is_read_up_to_where_its_writer_is(tmp_path):
    writer, _ = open_wal(tmp_path)
    records = numbers(300)
    reader = Reader(Folder(tmp_path), next(tmp_path.glob("log-*")).name)
    seen = []
    with reader:
        for record in records[:100]:
            writer.append(record)
        for lsn, _ in reader.records():
            seen.append(lsn)
            writer.append(records[lsn])
    writer.close()
    assert seen == list(range(1, 101))
    assert not reader.is_torn


# ---------------------------------------------------------------- options and sizes


@pytest.mark.parametrize(
    "options", [{"durability": "memory"}, {"durability": None}, {"log_nbytes": 0}, {"log_nbytes": True}]
)
def test_options_out_of_range(tmp_path, options):
    with pytest.raises(ArgumentError):
        WriteAheadLog(str(tmp_path), **{"durability": "process", **options})


def test_the_state_is_seldom_asked_for_its_size(tmp_path):
    wal, _ = open_wal(tmp_path)
    wal.nbytes = 1 << 20
    assert not wal.is_due(lambda: pytest.fail("asked"))
    wal.nbytes = 1 << 27
    assert not wal.is_due(lambda: 1 << 27)
    assert not wal.is_due(lambda: pytest.fail("asked"))
    wal.nbytes = 1 << 30
    assert wal.is_due(lambda: 1 << 27)
    wal.close()


def test_an_append_does_not_copy_its_payload(tmp_path, monkeypatch):
    wal, _ = open_wal(tmp_path)
    tensor = torch.ones(1000)
    written = []
    real = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda fd, buffers, at: (written.extend(buffers), real(fd, buffers, at))[1])
    wal.append(Record.pack({"verb": "push"}, [Item("w", "sum", tensor)]))
    wal.close()
    addresses = [torch.frombuffer(buffer, dtype=torch.uint8).data_ptr() for buffer in written if len(buffer) == 4000]
    assert addresses == [tensor.data_ptr()]


def test_a_head_that_could_not_be_read_again_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr("tensorkv.storage.record._MAX_HEAD_NBYTES", 1000)
    wal, _ = open_wal(tmp_path)
    with pytest.raises(StorageError, match="can be read again"):
        wal.append(Record({"verb": "note", "data": "x" * 1000}))
    assert not wal.snapshot([Record({"verb": "end", "data": "x" * 1000})])
    wal.append(Record({"verb": "note"}))
    wal.close()
    wal, found = open_wal(tmp_path)
    wal.close()
    assert len(found) == 1


def test_a_snapshot_that_fails_is_not_taken_for_one_that_was_under_way(tmp_path, monkeypatch):
    wal, _ = open_wal(tmp_path)
    go_on, sync = threading.Event(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (go_on.wait(), sync(descriptor)))
    wal.begin_snapshot([Record({"verb": "end"})])
    threading.Timer(0.2, go_on.set).start()
    refused = []

    def refuse(*_):
        refused.append(wal.counts["snapshots"])
        raise OSError("the disk is full")

    monkeypatch.setattr(wal, "_write_snapshot", refuse)
    assert not wal.snapshot([Record({"verb": "end"})])
    # The one before was made meanwhile.
    assert refused == [1]
    wal.close()


def test_many_openings_are_worth_a_snapshot(tmp_path):
    for _ in range(40):
        shard = open_shard(str(tmp_path), wait_s=0)
        if "w" not in shard:
            value = torch.zeros(2)
            shard.init(["w"], [value], [KeySpec(value.shape, value.dtype, NUMPY, False)])
        shard.push(Batch("push", ["w"], [[torch.ones(2)]]))
        shard.close()
        assert len(list(tmp_path.glob("log-*"))) <= 20


def test_a_snapshot_removes_what_it_replaces(tmp_path):
    wal, _ = open_wal(tmp_path)
    (tmp_path / "snapshot-00000000000000ff.tmp").write_bytes(b"unfinished")
    for count in range(1, 4):
        for record in numbers(5):
            wal.append(record)
        assert wal.snapshot([Record({"verb": "end"})])
        names = sorted(file.name for file in tmp_path.iterdir())
        last = 5 * count
        assert names == ["lock", f"log-{last + 1:016x}-00000001.tkv", f"snapshot-{last:016x}.tkv"]
    wal.close()


def test_a_snapshot_that_a_killed_process_was_writing_is_removed(tmp_path):
    """It would take room until a snapshot succeeds, which may fail for lack of that room."""
    write_segment(tmp_path, numbers(3))
    (tmp_path / "snapshot-0000000000000003.tmp").write_bytes(b"unfinished")
    wal, found = open_wal(tmp_path)
    wal.close()
    assert len(found) == 3
    assert not list(tmp_path.glob("*.tmp"))


def test_a_holder_that_was_taken_for_dead_removes_no_snapshot_of_another(two, tmp_path):
    first, _ = two
    written = tmp_path / "snapshot-0000000000000001.tmp"
    written.write_bytes(b"being written by the other")
    first.begin()
    assert written.exists()
