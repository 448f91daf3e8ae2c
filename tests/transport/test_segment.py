"""Memory that processes share: words, locks that tell who lives, and nothing that is left."""

import gc
import os
import struct
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch

from tensorkv.compiled import _shared
from tensorkv.engines.transport.segment import LINE, Segment, can_share
from tests.support.amount import amount
from tests.support.descriptors import open_files
from tests.support.until import LIMIT_S, until


def word(segment, number):
    return segment.address + LINE * number


def column(*addresses):
    return struct.pack(f"{len(addresses)}Q", *addresses)


ANSWER = """
import struct, sys
from tensorkv.compiled import _shared
from tensorkv.engines.transport.segment import LINE, Segment
theirs, turns, spin_s = Segment(4096, sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
print("ready", flush=True)
for turn in range(1, turns + 1):
    column = struct.pack("Q", theirs.address)
    assert _shared.wait(column, turn, theirs.address + 9 * LINE, 600.0, spin_s) == 1
    assert struct.unpack_from("Q", theirs.memory, 2048)[0] == turn
    struct.pack_into("Q", theirs.memory, 3072, 3 * turn)
    _shared.store(theirs.address + LINE, turn)
"""
LIVE = """
import os, sys
from tensorkv.engines.transport.segment import Segment
theirs = Segment(4096, sys.argv[1])
theirs.mark_alive(1)
if not os.fork():
    # Holds every descriptor of its parent, and lives longer.
    sys.stdin.read()
    os._exit(0)
print("ready", flush=True)
sys.stdin.read()
"""


def start(program, *words):
    return subprocess.Popen([sys.executable, "-c", program, *map(str, words)], stdin=-1, stdout=-1, text=True)


@pytest.mark.parametrize("spin_s", [0.0, 50e-6])
def test_what_was_written_before_a_store_is_seen_after_the_wait(spin_s):
    """Two processes take turns, and each reads what the other has written."""
    assert can_share()
    mine = Segment(4096)
    stop, turns = word(mine, 9), amount(5_000, 20_000)
    with start(ANSWER, mine.name, turns, spin_s) as other:
        assert other.stdout.readline() == "ready\n"
        for turn in range(1, turns + 1):
            struct.pack_into("Q", mine.memory, 2048, turn)
            _shared.store(word(mine, 0), turn)
            assert _shared.wait(column(word(mine, 1)), turn, stop, LIMIT_S, spin_s) == 1
            assert struct.unpack_from("Q", mine.memory, 3072)[0] == 3 * turn
        assert other.wait() == 0
    mine.close_file()


def test_a_wait_ends_with_time_and_with_the_stop_word():
    segment = Segment(4096, private=True)
    assert _shared.wait(column(word(segment, 0), word(segment, 1)), 1, word(segment, 9), 0.2, 0.0) == 0
    _shared.store(word(segment, 0), 5)
    assert _shared.wait(column(word(segment, 0), word(segment, 1)), 5, word(segment, 9), 0.0, 0.0) == 1
    _shared.store(word(segment, 9), 1)
    # Were it the time that ended this wait, it would outlast the test.
    assert _shared.wait(column(word(segment, 1)), 1, word(segment, 9), 600.0, 0.0) == 0


def test_who_lives_is_seen_by_others_and_not_inherited():
    mine = Segment(4096)
    mine.mark_alive(0)
    with start(LIVE, mine.name) as other:
        assert other.stdout.readline() == "ready\n"
        assert mine.is_alive(1)
        assert not mine.is_alive(2)
        other.kill()
        until(lambda: not mine.is_alive(1))
    mine.close_file()


def test_memory_that_is_not_there_is_missed_at_once():
    with pytest.raises(OSError, match="no 1,152,921,504,606,846,976 bytes of memory"):
        Segment(1 << 60)


@pytest.mark.parametrize("step", ["posix_fallocate", "from_file"])
def test_memory_that_cannot_be_had_leaves_no_file_open(step, monkeypatch):
    kept = Segment(4096)
    gc.collect()
    before = open_files("/memfd:tensorkv")
    assert before
    with monkeypatch.context() as patch:
        if step == "from_file":
            patch.setattr(torch.UntypedStorage, step, Mock(side_effect=RuntimeError("Too many open files")))
            with pytest.raises(OSError, match="Too many open files"):
                Segment(4096, kept.name)
        else:
            patch.setattr(os, step, Mock(side_effect=OSError("No space left on device")))
        with pytest.raises(OSError, match=r"Too many|No space"):
            Segment(4096)
    assert open_files("/memfd:tensorkv") == before
    kept.close_file()


def test_a_name_means_one_segment_alone():
    """The same process ID, descriptor and size may be another segment's; nothing of it is read or written."""
    first = Segment(4096)
    number = first.descriptor
    first.close_file()
    second = Segment(4096)
    assert (second.descriptor, second.nbytes) == (number, first.nbytes)
    assert second.name.partition("#")[0] == first.name.partition("#")[0]
    opened = Segment(4096, second.name)
    with pytest.raises(OSError, match="not the segment"):
        Segment(4096, first.name)
    path = second.name.partition("#")[0]
    for name in (path, f"{path}#", f"/dev/null#{second.name.partition('#')[2]}"):
        with pytest.raises(OSError, match="not the segment"):
            Segment(4096, name)
    second.close_file()
    opened.close_file()


def test_another_size_is_not_the_segment_that_was_shared():
    segment = Segment(4096)
    with pytest.raises(OSError, match="not the segment"):
        Segment(8192, segment.name)
    segment.close_file()


UNMAPPED = """
import os, resource
from tensorkv.engines.transport.segment import Segment

def held():
    # torch keeps a descriptor of what it could not map, but not the memory.
    paths = [f"/proc/self/fd/{each}" for each in os.listdir("/proc/self/fd")]
    return sum(os.stat(path).st_blocks for path in paths if "memfd:tensorkv" in os.path.realpath(path))

with open("/proc/self/statm") as numbers:
    used = int(numbers.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (50 << 20), resource.RLIM_INFINITY))
for _ in range(2):
    try:
        Segment(200 << 20)
        print("mapped")
    except (OSError, RuntimeError):
        print("refused, blocks held:", held())
"""


def test_memory_that_cannot_be_mapped_is_given_back():
    with start(UNMAPPED) as process:
        assert process.communicate()[0].splitlines() == ["refused, blocks held: 0"] * 2
