"""Rings of a client in shared memory, and who answers them: another process, as a server is."""

import os
import signal
import subprocess
import sys
import threading
import time
from unittest.mock import Mock

import pytest

from tensorkv.transport import bell
from tensorkv.transport.mailbox import Mailbox, OpenMailboxes
from tensorkv.transport.segment import can_share

pytestmark = pytest.mark.skipif(not can_share(), reason="this platform has no shared memory of this kind")

SERVER = """
import json, sys, threading
from tensorkv.transport.mailbox import OpenMailboxes

def answer(message, payload, room):
    if message == b"raise":
        raise RuntimeError("planted")
    if message == b"sleep":
        threading.Event().wait()
    if message == b"long":
        return b"x" * 5000
    room.copy_(payload[: len(room)]).add_(1)
    return b"told " + message

boxes = OpenMailboxes(answer)
for line in sys.stdin:
    word, *rest = json.loads(line)
    if word == "find":
        boxes.find(*rest)
    elif word == "forget":
        boxes.close_all_but([])
    elif word == "count":
        found = [thread for thread in threading.enumerate() if thread.name == "tensorkv-bell"]
        print(len(found), flush=True)
        continue
    print("done", flush=True)
"""


class Server:
    """A process that attends mailboxes; a context manager."""

    def __enter__(self):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        self.process = subprocess.Popen([sys.executable, "-c", SERVER], **pipes)
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    def tell(self, *words):
        import json

        self.process.stdin.write(json.dumps(words) + "\n")
        return self.process.stdout.readline().strip()


@pytest.fixture
def server():
    with Server() as process:
        yield process


@pytest.fixture
def box():
    mailbox = Mailbox()
    yield mailbox
    mailbox.give_up()


def attended(server, box, nbytes=64):
    """Return a mailbox that a server has opened, filled with ones."""
    box.take_room(nbytes, nbytes, 100).fill_(1)
    assert not box.ring(b"nobody is there yet")
    assert server.tell("find", "a.0", box.describe()) == "done"
    return box


def test_rings_are_answered_in_place(server, box):
    attended(server, box)
    for turn in range(200):
        box.payload.fill_(turn)
        assert box.ring(b"%d" % turn)
        assert box.hear(10) == b"told %d" % turn
        assert set(box.reply.tolist()) == {turn + 1}


def test_other_sizes_in_the_same_mailbox(server, box):
    attended(server, box, 10_000)
    for nbytes in (1, 9_000, 0, 63):
        box.take_room(nbytes, nbytes, 10).fill_(5)
        assert box.ring(b"size")
        assert box.hear(10) == b"told size"
        assert box.reply.tolist() == [6] * nbytes


@pytest.mark.parametrize("message", [b"raise", b"long"])
def test_what_cannot_be_answered_here_is_left_to_ray(server, box, message):
    attended(server, box)
    assert box.ring(message)
    assert box.hear(10) == b""
    assert box.ring(b"again")
    assert box.hear(10) == b"told again"


def test_a_message_without_room_is_not_rung(server, box):
    attended(server, box)
    assert not box.ring(b"x" * 101)


def test_a_killed_server_is_noticed(server, box):
    attended(server, box)
    assert box.ring(b"sleep")
    server.process.kill()
    start = time.monotonic()
    with pytest.raises(ConnectionError):
        box.hear(60)
    assert time.monotonic() - start < 30


def test_a_server_that_has_begun_again_answers_no_ring_of_the_one_before(server, box):
    attended(server, box)
    for _ in range(5):
        assert box.ring(b"one")
        assert box.hear(10) == b"told one"
    server.process.kill()
    server.process.wait()
    with Server() as second:
        assert second.tell("count") == "0"
        box.take_room(0, 0, 100)
        # Where the reply to the last ring would be written again.
        place = box._segment.memory[bell.HEAD_NBYTES + 128 : box._segment.nbytes]
        place[:] = b"x" * len(place)
        assert second.tell("find", "a.0", box.describe()) == "done"
        time.sleep(0.2)
        assert set(bytes(place)) == {ord("x")}
        assert box.ring(b"nobody")
        with pytest.raises(ConnectionError):
            box.hear(60)
        box.move()
        assert second.tell("find", "a.0", box.describe()) == "done"
        assert box.ring(b"two")
        assert box.hear(10) == b"told two"


def test_a_stopped_server_is_not_taken_for_a_dead_one(server, box):
    attended(server, box)
    os.kill(server.process.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, server.process.pid, os.WSTOPPED | os.WNOWAIT)
    assert box.ring(b"now")
    with pytest.raises(TimeoutError):
        box.hear(0.2)
    os.kill(server.process.pid, signal.SIGCONT)
    assert box.hear(10) == b"told now"


def test_a_mailbox_that_moved_is_attended_by_nobody(server, box):
    attended(server, box)
    box.move()
    assert set(box.payload.tolist()) == {1}
    assert not box.ring(b"hello")
    assert server.tell("find", "a.0", box.describe()) == "done"
    assert box.ring(b"hello")
    assert box.hear(10) == b"told hello"


def count_falls_to(server, expected):
    deadline = time.monotonic() + 20
    while int(server.tell("count")) != expected:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("how", ["give up", "forget"])
def test_threads_and_files_end_with_their_mailbox(server, box, how):
    def files():
        return len(os.listdir(f"/proc/{server.process.pid}/fd"))

    assert server.tell("count") == "0"  # it has begun, and imports nothing any more
    before = files()
    attended(server, box)
    assert (int(server.tell("count")), files()) == (1, before + 1)
    if how == "give up":
        box.give_up()
    else:
        server.tell("forget")
    count_falls_to(server, 0)
    assert files() == before


def test_a_server_lets_go_of_memory_that_was_given_up(server):
    def mapped():
        with open(f"/proc/{server.process.pid}/maps") as lines:
            return sum("memfd:tensorkv" in line for line in lines)

    for number in range(5):
        # What a client does with a lane whose call was interrupted: its number is not used again.
        lane = Mailbox()
        lane.take_room(64, 64, 100)
        assert server.tell("find", f"a.{number}", lane.describe()) == "done"
        assert lane.ring(b"one")
        assert lane.hear(10) == b"told one"
        lane.give_up()
    count_falls_to(server, 0)
    deadline = time.monotonic() + 20
    while mapped():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class NoSegment:
    """What a server takes for a mailbox."""

    nbytes = 0

    def close_file(self):
        pass


def test_mailboxes_come_while_others_are_closed():
    boxes, interval = OpenMailboxes(), sys.getswitchinterval()

    def enter():
        for number in range(30_000):
            boxes._enter(f"a.{number}", NoSegment())

    thread = threading.Thread(target=enter)
    sys.setswitchinterval(1e-6)
    try:
        thread.start()
        while thread.is_alive():
            boxes.close_all_but(["a"])
    finally:
        thread.join()
        sys.setswitchinterval(interval)
    boxes.close_all_but([])
    assert not boxes._open


def test_a_sheet_that_points_elsewhere_is_not_followed(server, box):
    attended(server, box)
    for sheet in [
        bell.Sheet(0, 10, 0, 10, 0, 10),
        bell.Sheet(bell.HEAD_NBYTES, 1 << 40, bell.HEAD_NBYTES, 0, bell.HEAD_NBYTES, 0),
        bell.Sheet(bell.HEAD_NBYTES, 4, 1 << 63, 1 << 63, bell.HEAD_NBYTES, 0),
    ]:
        bell._PLACES.pack_into(box._segment.memory, bell._SHEET, *sheet)
        box._bell._asked += 1
        bell._shared.store(box._segment.address + bell._ASKED, box._bell._asked)
        assert box.hear(10) == b""
    assert box.ring(b"fine")
    assert box.hear(10) == b"told fine"


def test_a_server_without_threads_attends_nothing(box, monkeypatch):
    box.take_room(10, 10, 100)
    monkeypatch.setattr(threading.Thread, "start", Mock(side_effect=RuntimeError("can't start new thread")))
    payload, room = OpenMailboxes(lambda *_: b"").find("a.0", box.describe())
    assert (len(payload), len(room)) == (10, 10)
    assert not box.ring(b"hello")


def test_a_server_without_an_answer_attends_nothing(box):
    box.take_room(10, 10, 100)
    OpenMailboxes().find("a.0", box.describe())
    assert not box.ring(b"hello")
