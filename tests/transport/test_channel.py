"""Shared-memory channels: a client here, and a server in another process."""

import os
import signal
import subprocess
import sys
import threading
import time
from unittest.mock import Mock

import pytest

from tensorkv.transport import channel
from tensorkv.transport.channel import ChannelServer, SharedMemoryChannel
from tensorkv.transport.segment import can_share

pytestmark = pytest.mark.skipif(not can_share(), reason="this platform has no shared memory of this kind")

SERVER = """
import json, sys, threading
from tensorkv.transport.channel import ChannelServer

def answer(message, payload, room):
    if message == b"raise":
        raise RuntimeError("planted")
    if message == b"sleep":
        threading.Event().wait()
    if message == b"long":
        return b"x" * 5000
    room.copy_(payload[: len(room)]).add_(1)
    return b"told " + message

channels = ChannelServer(answer)
for line in sys.stdin:
    word, *rest = json.loads(line)
    if word == "find":
        channels.find(*rest)
    elif word == "forget":
        channels.close_all_but([])
    elif word == "count":
        found = [thread for thread in threading.enumerate() if thread.name == "tensorkv-doorbell"]
        print(len(found), flush=True)
        continue
    print("done", flush=True)
"""


class Server:
    """A process that serves channels; a context manager."""

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
def client():
    channel = SharedMemoryChannel()
    yield channel
    channel.close()


def served(server, client, nbytes=64):
    """Return a channel that a server has opened, filled with ones."""
    client.allocate(nbytes, nbytes, 100).fill_(1)
    assert not client.notify(b"nobody is there yet")
    assert server.tell("find", "a.0", client.describe()) == "done"
    return client


def test_requests_are_answered_in_place(server, client):
    served(server, client)
    for turn in range(200):
        client.payload.fill_(turn)
        assert client.notify(b"%d" % turn)
        assert client.wait(10) == b"told %d" % turn
        assert set(client.reply.tolist()) == {turn + 1}


def test_other_sizes_in_the_same_channel(server, client):
    served(server, client, 10_000)
    for nbytes in (1, 9_000, 0, 63):
        client.allocate(nbytes, nbytes, 10).fill_(5)
        assert client.notify(b"size")
        assert client.wait(10) == b"told size"
        assert client.reply.tolist() == [6] * nbytes


@pytest.mark.parametrize("message", [b"raise", b"long"])
def test_what_cannot_be_answered_here_is_left_to_ray(server, client, message):
    served(server, client)
    assert client.notify(message)
    assert client.wait(10) == b""
    assert client.notify(b"again")
    assert client.wait(10) == b"told again"


def test_a_message_without_room_is_not_sent(server, client):
    served(server, client)
    assert not client.notify(b"x" * 101)


def test_a_killed_server_is_noticed(server, client):
    served(server, client)
    assert client.notify(b"sleep")
    server.process.kill()
    start = time.monotonic()
    with pytest.raises(ConnectionError):
        client.wait(60)
    assert time.monotonic() - start < 30


def test_a_restarted_server_answers_no_request_to_the_one_before(server, client):
    served(server, client)
    for _ in range(5):
        assert client.notify(b"one")
        assert client.wait(10) == b"told one"
    server.process.kill()
    server.process.wait()
    with Server() as second:
        assert second.tell("count") == "0"
        client.allocate(0, 0, 100)
        # Where the reply to the last request would be written again.
        place = client._segment.memory[channel.HEADER_NBYTES + 128 : client._segment.nbytes]
        place[:] = b"x" * len(place)
        assert second.tell("find", "a.0", client.describe()) == "done"
        time.sleep(0.2)
        assert set(bytes(place)) == {ord("x")}
        assert client.notify(b"nobody")
        with pytest.raises(ConnectionError):
            client.wait(60)
        client.replace()
        assert second.tell("find", "a.0", client.describe()) == "done"
        assert client.notify(b"two")
        assert client.wait(10) == b"told two"


def test_a_stopped_server_is_not_taken_for_a_dead_one(server, client):
    served(server, client)
    os.kill(server.process.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, server.process.pid, os.WSTOPPED | os.WNOWAIT)
    assert client.notify(b"now")
    with pytest.raises(TimeoutError):
        client.wait(0.2)
    os.kill(server.process.pid, signal.SIGCONT)
    assert client.wait(10) == b"told now"


def test_a_channel_with_new_memory_is_not_served_yet(server, client):
    served(server, client)
    client.replace()
    assert set(client.payload.tolist()) == {1}
    assert not client.notify(b"hello")
    assert server.tell("find", "a.0", client.describe()) == "done"
    assert client.notify(b"hello")
    assert client.wait(10) == b"told hello"


def count_falls_to(server, expected):
    deadline = time.monotonic() + 20
    while int(server.tell("count")) != expected:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("how", ["close", "forget"])
def test_threads_and_files_end_with_their_channel(server, client, how):
    def files():
        return len(os.listdir(f"/proc/{server.process.pid}/fd"))

    assert server.tell("count") == "0"  # it has begun, and imports nothing any more
    before = files()
    served(server, client)
    assert (int(server.tell("count")), files()) == (1, before + 1)
    if how == "close":
        client.close()
    else:
        server.tell("forget")
    count_falls_to(server, 0)
    assert files() == before


def test_a_server_lets_go_of_memory_that_was_closed(server):
    def mapped():
        with open(f"/proc/{server.process.pid}/maps") as lines:
            return sum("memfd:tensorkv" in line for line in lines)

    for number in range(5):
        # What a client does with a session whose call was interrupted: its number is not used again.
        session = SharedMemoryChannel()
        session.allocate(64, 64, 100)
        assert server.tell("find", f"a.{number}", session.describe()) == "done"
        assert session.notify(b"one")
        assert session.wait(10) == b"told one"
        session.close()
    count_falls_to(server, 0)
    deadline = time.monotonic() + 20
    while mapped():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class NoSegment:
    """What a server takes for a channel."""

    nbytes = 0

    def close_file(self):
        pass


def test_channels_come_while_others_are_closed():
    channels, interval = ChannelServer(), sys.getswitchinterval()

    def enter():
        for number in range(30_000):
            channels._accept(f"a.{number}", NoSegment())

    thread = threading.Thread(target=enter)
    sys.setswitchinterval(1e-6)
    try:
        thread.start()
        while thread.is_alive():
            channels.close_all_but(["a"])
    finally:
        thread.join()
        sys.setswitchinterval(interval)
    channels.close_all_but([])
    assert not channels._open


def test_a_layout_that_points_elsewhere_is_not_followed(server, client):
    served(server, client)
    for layout in [
        channel.BufferLayout(0, 10, 0, 10, 0, 10),
        channel.BufferLayout(channel.HEADER_NBYTES, 1 << 40, channel.HEADER_NBYTES, 0, channel.HEADER_NBYTES, 0),
        channel.BufferLayout(channel.HEADER_NBYTES, 4, 1 << 63, 1 << 63, channel.HEADER_NBYTES, 0),
    ]:
        channel._LAYOUT_FORMAT.pack_into(client._segment.memory, channel._LAYOUT, *layout)
        client._doorbell._requested += 1
        channel._shared.store(client._segment.address + channel._REQUESTED, client._doorbell._requested)
        assert client.wait(10) == b""
    assert client.notify(b"fine")
    assert client.wait(10) == b"told fine"


def test_a_server_without_threads_serves_no_doorbell(client, monkeypatch):
    client.allocate(10, 10, 100)
    monkeypatch.setattr(threading.Thread, "start", Mock(side_effect=RuntimeError("can't start new thread")))
    payload, room = ChannelServer(lambda *_: b"").find("a.0", client.describe())
    assert (len(payload), len(room)) == (10, 10)
    assert not client.notify(b"hello")


def test_a_server_without_a_handler_serves_no_doorbell(client):
    client.allocate(10, 10, 100)
    ChannelServer().find("a.0", client.describe())
    assert not client.notify(b"hello")
