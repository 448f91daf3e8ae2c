"""The journal: what is read back after a cut, a flipped bit, a lost file; and who may write."""

import json
import os
import random
import shutil
import threading

import pytest
import torch

from tensorkv import ArgumentError, JournalError
from tensorkv.arrays.interop import NUMPY
from tensorkv.arrays.spec import KeySpec
from tensorkv.shard.entry import Batch
from tensorkv.storage import record_file
from tensorkv.storage.durable import DurableShard
from tensorkv.storage.folder import Folder
from tensorkv.storage.record import Item, Record, pack
from tensorkv.storage.wal import Journal
from tests.storage import kills

SEED = int(os.environ.get("TENSORKV_TEST_SEED", "20"))


def open_journal(path, durability="process", **options):
    journal = Journal(str(path), durability, wait_s=0, **options)
    try:
        found = read(journal)
        journal.begin()
    except BaseException:
        journal.close()
        raise
    return journal, found


def plain(record):
    payload = b"".join(bytes(buffer) for buffer in record.payload)
    return record.head, record.layout, payload


def read(journal):
    return [(plain(record), of_snapshot) for record, of_snapshot in journal.read()]


def numbers(count, size=64):
    return [pack({"verb": "push", "i": i}, [Item("w", "sum", torch.full((size,), float(i)))]) for i in range(count)]


def write_log(path, records):
    journal, _ = open_journal(path)
    for record in records:
        journal.append(record)
    journal.close()
    (log,) = path.glob("log-*")
    return log


def lsns(log):
    with record_file.Reader(Folder(log.parent), log.name) as reader:
        found = [lsn for lsn, _ in reader.records()]
        return found, reader.is_torn


def test_what_was_appended_is_read(tmp_path):
    records = numbers(5)
    write_log(tmp_path, records)
    journal, found = open_journal(tmp_path)
    journal.close()
    assert found == [(plain(record), False) for record in records]


def test_a_log_that_is_cut_anywhere_ends_with_its_last_whole_record(tmp_path):
    log = write_log(tmp_path, numbers(17, 1000))
    ends = [0]
    with record_file.Reader(Folder(log.parent), log.name) as reader:
        for _ in reader.records():
            ends.append(ends[-1] + reader.record_nbytes)
    assert ends[-1] == log.stat().st_size > 1 << 16
    whole = len(ends) - 1
    for size in range(ends[-1], -1, -1):
        os.truncate(log, size)
        while ends[whole] > size:
            whole -= 1
        assert lsns(log) == (list(range(1, whole + 1)), size > ends[whole]), size


def test_a_tail_of_zeros_is_a_write_that_was_not_finished(tmp_path):
    log = write_log(tmp_path, numbers(3))
    data = log.read_bytes()
    record = len(data) // 3
    for kept in range(2 * record, 3 * record):
        for size in (3 * record, kept + 1, kept + 5000 if kept < 2 * record + 36 else 3 * record):
            log.write_bytes(data[:kept].ljust(size, b"\0")[: max(size, kept)])
            assert lsns(log) == ([1, 2], True), (kept, size)


def test_zeros_in_the_middle_are_damage(tmp_path):
    log = write_log(tmp_path, numbers(3))
    data = log.read_bytes()
    record = len(data) // 3
    log.write_bytes(data[:record] + bytes(record) + data[2 * record :])
    with pytest.raises(JournalError, match=f"damaged at byte {record}"):
        lsns(log)


# ---------------------------------------------------------------- single bits


@pytest.fixture(scope="module")
def folder_with_both(tmp_path_factory):
    """A snapshot of two keys with a log of pushes behind it."""
    path = tmp_path_factory.mktemp("both")
    shard = DurableShard(str(path), threads=1)
    kills.prepare(shard)
    for i in range(4):
        kills.push(shard, i)
    shard._snapshot()
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
    journal = Journal(str(folder), "process", wait_s=0)
    try:
        expected = read(journal)
        assert len(expected) == 6
        errors = 0
        for where in flips(folder, count):
            try:
                assert read(journal) == expected, where
            except JournalError:
                errors += 1
        return errors
    finally:
        journal.close()


def test_no_flipped_bit_changes_what_is_read(folder_with_both, tmp_path):
    random.seed(SEED)
    folder = shutil.copytree(folder_with_both, tmp_path / "copy")
    assert flip_and_read(folder, 10_000) == 10_000


def test_no_flipped_bit_changes_values(folder_with_both, tmp_path):
    random.seed(SEED)
    if not kills.HISTORY:
        kills.write_history()
    folder = shutil.copytree(folder_with_both, tmp_path / "copy")
    for where in flips(folder, 200):
        shard = None
        try:
            shard = DurableShard(str(folder), threads=1, wait_s=0)
        except JournalError:
            continue
        shard.close()
        pytest.fail(f"{where} went unnoticed")
    shard = DurableShard(str(folder), threads=1, wait_s=0)
    assert kills.bits(shard) == kills.HISTORY[8]
    shard.close()


def unchecked(frame, words, payload):
    head, layout = words[: frame.head_nbytes], words[frame.head_nbytes :]
    return Record(json.loads(head), layout, [payload])


def test_flipped_bits_without_checksums_would_be_noticed(folder_with_both, tmp_path, monkeypatch):
    random.seed(SEED)
    monkeypatch.setattr(record_file, "read_record", unchecked)
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
        with pytest.raises(JournalError, match="is missing"):
            DurableShard(str(folder), wait_s=0)


def test_a_lost_log_is_an_error(tmp_path):
    for _ in range(3):
        journal, _ = open_journal(tmp_path)
        journal.append(numbers(1)[0])
        journal.close()
    logs = sorted(tmp_path.glob("log-*"))
    logs[1].unlink()
    with pytest.raises(JournalError, match="record 2 is missing, 3 comes next"):
        open_journal(tmp_path)


def test_a_removed_lock_does_not_turn_back_the_order_of_logs(tmp_path):
    for _ in range(5):
        open_journal(tmp_path)[0].close()
    (tmp_path / "lock").unlink()
    journal, _ = open_journal(tmp_path)
    journal.append(numbers(1)[0])
    journal.close()
    journal, found = open_journal(tmp_path)
    journal.close()
    assert len(found) == 1


# ---------------------------------------------------------------- who may write


def take_over(folder):
    """Do what another process does where the lock could not keep it out."""
    (folder / "lock").rename(folder.parent / "aside")
    shutil.copy(folder.parent / "aside", folder / "lock")
    journal, found = open_journal(folder)
    # In place, where the first holder looks.
    (folder.parent / "aside").write_bytes((folder / "lock").read_bytes())
    (folder.parent / "aside").unlink()
    return journal, found


@pytest.fixture
def two(tmp_path):
    first, _ = open_journal(tmp_path)
    first.append(numbers(1)[0])
    second, found = take_over(tmp_path)
    assert len(found) == 1
    yield first, second
    first.close()
    second.close()


def test_whoever_was_taken_for_dead_writes_nothing_more(two, tmp_path):
    first, second = two
    size = os.stat(next(tmp_path.glob("log-*1.tkv"))).st_size
    with pytest.raises(JournalError, match="another process has opened this store since"):
        first.append(numbers(1)[0])
    with pytest.raises(JournalError):
        first.undo()
    second.append(numbers(1)[0])
    assert os.stat(next(tmp_path.glob("log-*1.tkv"))).st_size == size


def test_a_snapshot_of_whoever_was_taken_for_dead_does_not_count(two, tmp_path):
    first, _ = two
    assert not first.snapshot([Record({"verb": "end"})])
    assert not list(tmp_path.glob("snapshot-*"))


def test_a_takeover_during_a_write_is_not_acknowledged(tmp_path, monkeypatch):
    journal, _ = open_journal(tmp_path)
    real = os.pwritev

    def write_and_lose(*arguments):
        done = real(*arguments)
        (tmp_path / "lock").write_bytes(b"%016x          1\n" % 9)
        return done

    monkeypatch.setattr(os, "pwritev", write_and_lose)
    with pytest.raises(JournalError, match="another process"):
        journal.append(numbers(1)[0])
    monkeypatch.undo()
    journal.close()
    # The other may have read it: it stays.
    (log,) = tmp_path.glob("log-*")
    assert lsns(log) == ([1], False)


def test_what_an_old_holder_writes_later_is_not_read(tmp_path):
    log = write_log(tmp_path, numbers(2))
    late = log.read_bytes()
    os.truncate(log, len(late) // 2)
    journal, found = open_journal(tmp_path)
    assert len(found) == 1
    journal.append(numbers(3)[2])
    journal.close()
    log.write_bytes(late)
    journal, found = open_journal(tmp_path)
    journal.close()
    assert [head["i"] for (head, _, _), _ in found] == [0, 2]


def test_a_log_is_read_up_to_where_its_writer_is(tmp_path):
    writer, _ = open_journal(tmp_path)
    records = numbers(300)
    reader = record_file.Reader(Folder(tmp_path), next(tmp_path.glob("log-*")).name)
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
        Journal(str(tmp_path), **{"durability": "process", **options})


def test_the_state_is_seldom_asked_for_its_size(tmp_path):
    journal, _ = open_journal(tmp_path)
    journal.nbytes = 1 << 20
    assert not journal.is_due(lambda: pytest.fail("asked"))
    journal.nbytes = 1 << 27
    assert not journal.is_due(lambda: 1 << 27)
    assert not journal.is_due(lambda: pytest.fail("asked"))
    journal.nbytes = 1 << 30
    assert journal.is_due(lambda: 1 << 27)
    journal.close()


def test_an_append_does_not_copy_its_payload(tmp_path, monkeypatch):
    journal, _ = open_journal(tmp_path)
    tensor = torch.ones(1000)
    written = []
    real = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda fd, buffers, at: (written.extend(buffers), real(fd, buffers, at))[1])
    journal.append(pack({"verb": "push"}, [Item("w", "sum", tensor)]))
    journal.close()
    addresses = [torch.frombuffer(buffer, dtype=torch.uint8).data_ptr() for buffer in written if len(buffer) == 4000]
    assert addresses == [tensor.data_ptr()]


def test_a_head_that_could_not_be_read_again_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr("tensorkv.storage.record._MOST_WORDS", 1000)
    journal, _ = open_journal(tmp_path)
    with pytest.raises(JournalError, match="could not be read again"):
        journal.append(Record({"verb": "note", "data": "x" * 1000}))
    assert not journal.snapshot([Record({"verb": "end", "data": "x" * 1000})])
    journal.append(Record({"verb": "note"}))
    journal.close()
    journal, found = open_journal(tmp_path)
    journal.close()
    assert len(found) == 1


def test_a_snapshot_that_fails_is_not_taken_for_one_that_was_under_way(tmp_path, monkeypatch):
    journal, _ = open_journal(tmp_path)
    go_on, sync = threading.Event(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (go_on.wait(20), sync(descriptor)))
    journal.snapshot_behind([Record({"verb": "end"})])
    threading.Timer(0.2, go_on.set).start()
    refused = []

    def refuse(*_):
        refused.append(journal.counts["snapshots"])
        raise OSError("the disk is full")

    monkeypatch.setattr(journal, "_write_snapshot", refuse)
    assert not journal.snapshot([Record({"verb": "end"})])
    # The one before was made meanwhile.
    assert refused == [1]
    journal.close()


def test_many_openings_are_worth_a_snapshot(tmp_path):
    for _ in range(40):
        shard = DurableShard(str(tmp_path), wait_s=0)
        if "w" not in shard:
            value = torch.zeros(2)
            shard.init(["w"], [value], [KeySpec(value.shape, value.dtype, NUMPY, False)])
        shard.push(Batch("push", ["w"], [[torch.ones(2)]]))
        shard.close()
        assert len(list(tmp_path.glob("log-*"))) <= 20
