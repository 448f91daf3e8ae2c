"""Channels: a client here, and a server in another process."""

import gc
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path
from queue import SimpleQueue
from unittest.mock import Mock

import pytest

from tensorkv.engines.transport import channel
from tensorkv.engines.transport.channel import Connection, OpenSharedBuffers, SharedBuffers, SocketServer, connect
from tensorkv.engines.transport.segment import can_share
from tensorkv.runtime import shield
from tests.support.descriptors import open_files
from tests.support.processes import Program, run
from tests.support.until import LIMIT_S, until

pytestmark = pytest.mark.skipif(not can_share(), reason="this platform has no shared memory of this kind")


def serve(control):
    """Listen, tell the address to a socket that a test listens at, and answer the words that come from there."""

    def answer(message, buffers):
        if message == b"close":
            raise ConnectionResetError
        if message == b"sleep":
            threading.Event().wait()
        if message == b"long":
            return b"x" * 5_000_000
        if message.startswith(b"["):
            payload, room = buffers.find(json.loads(message))
            room.copy_(payload[: len(room)]).add_(1)
        return b"told " + message

    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(control)
        words = connection.makefile("rw", buffering=1)
        listener = SocketServer(answer)
        print(json.dumps(listener.address), file=words)
        for word in words:
            if word == "close\n":
                listener.close()
            print(sum(thread.name.startswith("tensorkv-") for thread in threading.enumerate()), file=words)


class Server:
    """A process that listens; a context manager."""

    def __enter__(self):
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind("")  # to a free abstract address
            listening.listen()
            listening.settimeout(LIMIT_S)
            self._program = Program(serve, listening.getsockname())
            self.process = self._program.process
            with listening.accept()[0] as connection:
                self._words = connection.makefile("rw", buffering=1)
        self.address = json.loads(self._words.readline())
        return self

    def __exit__(self, *_):
        self._program.close()
        self._words.close()

    def count(self, word="count"):
        """How many threads serve, the one that accepts connections included."""
        print(word, file=self._words)
        return int(self._words.readline())

    def open_files(self):
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


@pytest.fixture
def server():
    with Server() as process:
        yield process


@pytest.fixture
def client(server):
    connection = connect(server.address, soon())
    yield connection
    connection.close()


def soon(seconds=LIMIT_S):
    return time.monotonic() + seconds


def ask(client, message, seconds=LIMIT_S):
    client.send(message, soon(seconds))
    return client.receive(soon(seconds))


# ---------------------------------------------------------------- messages


@pytest.mark.parametrize("nbytes", [0, 1, 100, (64 << 10) - 8, 64 << 10, 3_000_000])
def test_messages_of_each_size_arrive_whole(client, nbytes):
    message = os.urandom(nbytes).replace(b"[", b"(")
    for _ in range(3):
        assert ask(client, message) == b"told " + message


def test_a_long_reply_arrives_whole(client):
    assert ask(client, b"long") == b"x" * 5_000_000


def test_a_reply_that_comes_in_pieces_arrives_whole():
    mine, theirs = socket.socketpair(socket.AF_UNIX)
    connection = Connection(mine)

    def send():
        for byte in channel._LENGTH.pack(3) + b"abc":
            time.sleep(0.02)
            theirs.send(bytes([byte]))

    thread = threading.Thread(target=send)
    thread.start()
    assert connection.receive(soon()) == b"abc"
    thread.join()
    theirs.close()
    with pytest.raises(ConnectionError):
        connection.receive(soon())
    connection.close()


def test_a_closed_connection_is_noticed(client):
    client.send(b"close", soon())
    with pytest.raises(ConnectionError):
        client.receive(soon())
    with pytest.raises(ConnectionError):
        ask(client, b"again")


def test_a_killed_server_is_noticed(server, client):
    client.send(b"sleep", soon())
    server.process.kill()
    with pytest.raises(ConnectionError):
        client.receive(soon())
    server.process.wait()
    with pytest.raises(ConnectionRefusedError):
        connect(server.address, soon())


def test_a_restarted_server_is_not_reached_at_the_address_of_the_one_before(server):
    server.process.kill()
    server.process.wait()
    with Server() as second:
        with pytest.raises(ConnectionRefusedError):
            connect(server.address, soon())
        # Not with the key of the one before either.
        with pytest.raises(ConnectionError):
            connect([second.address[0], server.address[1]], soon())
        client = connect(second.address, soon())
        assert ask(client, b"two") == b"told two"
        client.close()


@pytest.mark.parametrize("message", [b"short", b"x" * 3_000_000])
def test_a_stopped_server_is_not_taken_for_a_dead_one_and_holds_no_caller(server, client, message):
    """A message longer than the kernel's buffer cannot be sent as a whole."""
    os.kill(server.process.pid, signal.SIGSTOP)
    until(lambda: "State:\tT" in Path(f"/proc/{server.process.pid}/status").read_text())
    with pytest.raises(TimeoutError):
        ask(client, message, 0.2)
    with pytest.raises(TimeoutError):
        connect(server.address, soon(0.2))
    os.kill(server.process.pid, signal.SIGCONT)
    again = connect(server.address, soon())
    assert ask(again, b"now") == b"told now"
    again.close()


@pytest.mark.parametrize("message", [b"sleep", b"x" * 3_000_000])
def test_a_wait_ends_when_its_caller_is_interrupted(server, client, message):
    os.kill(server.process.pid, signal.SIGSTOP)

    def interrupt(*_):
        raise InterruptedError

    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    with pytest.raises(InterruptedError):
        shield.run(ask, client, message)
    os.kill(server.process.pid, signal.SIGCONT)


# ---------------------------------------------------------------- who is answered


def test_only_a_process_that_has_the_key_is_answered(server):
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(f"\0{server.address[0]}")
        connection = Connection(stranger)
        connection.send(b"0" * 32)
        with pytest.raises(ConnectionError):
            connection.receive()
    with pytest.raises(ConnectionError):
        connect([server.address[0], "0" * 32], soon())


def connect_as_nobody(address, looks):
    if not looks:
        channel.os.geteuid = lambda: 0
    os.setgid(65534), os.setuid(65534)
    connect(address, soon())


@pytest.mark.skipif(os.geteuid() != 0, reason="takes another user's name, which only root may")
def test_another_user_is_refused_though_it_has_the_key(server):
    with pytest.raises(PermissionError):
        run(connect_as_nobody, server.address, True)
    # The server has not begun to serve it either.
    assert server.count() == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="takes another user's name, which only root may")
def test_a_server_refuses_another_user(server):
    """Also a client that does not look who listens."""
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        run(connect_as_nobody, server.address, False)


def test_a_server_that_gets_no_thread_for_a_connection_closes_it(monkeypatch):
    server = SocketServer(lambda message, buffers: message)
    start = threading.Thread.start

    def fail(self):
        if self.name == "tensorkv-serve":
            raise RuntimeError("can't start new thread")
        start(self)

    with monkeypatch.context() as patches:
        patches.setattr(threading.Thread, "start", fail)
        with pytest.raises(ConnectionError):
            connect(server.address, soon())
    client = connect(server.address, soon())
    assert ask(client, b"x") == b"x"
    client.close()
    server.close()


def test_a_server_that_gets_no_descriptor_goes_on_afterwards(monkeypatch):
    accept, failures = socket.socket.accept, [OSError(24, "Too many open files")] * 2
    monkeypatch.setattr(channel, "_ACCEPT_PAUSE_S", 0.01)
    monkeypatch.setattr(
        socket.socket, "accept", lambda self: (_ for _ in ()).throw(failures.pop()) if failures else accept(self)
    )
    server = SocketServer(lambda message, buffers: message)
    client = connect(server.address, soon())
    assert ask(client, b"x") == b"x"
    assert not failures
    client.close()
    server.close()


# ---------------------------------------------------------------- clients that end


@pytest.mark.parametrize("end", ["closes", "is killed"])
def test_a_server_is_told_when_the_process_of_a_client_has_ended(end, monkeypatch):
    looked, told = SimpleQueue(), SimpleQueue()
    has_ended = channel._has_ended

    def look(process):
        found = has_ended(process)
        looked.put(found)
        return found

    def answer(message, buffers):
        buffers.owner = message.decode()
        return b""

    # A client that only closes its connection keeps running, so the server must not wait long for its exit.
    monkeypatch.setattr(channel, "_EXIT_S", 0.1 if end == "closes" else LIMIT_S)
    monkeypatch.setattr(channel, "_has_ended", look)
    server = SocketServer(answer, told.put)
    ours, theirs = socket.socketpair()
    client = os.fork()
    if not client:
        ours.close()
        connection = connect(server.address, soon())
        ask(connection, b"a client")
        if end == "closes":
            connection.close()
        theirs.send(b"ready")
        theirs.recv(1)
        os._exit(0)
    theirs.close()
    assert ours.recv(5) == b"ready"
    if end == "is killed":
        # It stays a zombie until this process waits for it.
        os.kill(client, signal.SIGKILL)
        assert told.get(timeout=LIMIT_S) == "a client"
    assert looked.get(timeout=LIMIT_S) is (end == "is killed")
    ours.close()
    os.waitpid(client, 0)
    assert told.empty()
    server.close()


# ---------------------------------------------------------------- threads, files and memory


def test_threads_and_files_end_with_their_connection(server):
    assert server.count() == 1
    before = server.open_files()
    clients = [connect(server.address, soon()) for _ in range(3)]
    assert (server.count(), server.open_files()) == (4, before + 3)
    for client in clients:
        client.close()
    until(lambda: (server.count(), server.open_files()) == (1, before))
    server.count("close")
    until(lambda: server.count() == 0)
    with pytest.raises(ConnectionRefusedError):
        connect(server.address, soon())


def test_a_forked_child_holds_no_connection(server):
    client = connect(server.address, soon())
    hold, let_go = os.pipe()
    child = os.fork()
    if not child:
        os.close(let_go)
        os.read(hold, 1)
        os._exit(0)
    assert server.count() == 2
    client.close()
    # While the child held a copy, the server would go on to wait.
    until(lambda: server.count() == 1)
    os.close(let_go)
    os.close(hold)
    assert os.waitpid(child, 0)[1] == 0


def test_requests_are_answered_in_place(client):
    buffers = SharedBuffers()
    for turn, nbytes in enumerate([64, 64, 10_000, 1, 9_000, 0, 63]):
        buffers.allocate(nbytes, nbytes).fill_(turn)
        ask(client, json.dumps(buffers.describe()).encode())
        assert buffers.receive(client, nbytes, soon()).tolist() == [turn + 1] * nbytes
    buffers.close()


def test_a_server_lets_go_of_memory_that_was_closed(server):
    def mapped():
        with open(f"/proc/{server.process.pid}/maps") as lines:
            return sum("memfd:tensorkv" in line for line in lines)

    for _ in range(5):
        client, buffers = connect(server.address, soon()), SharedBuffers()
        buffers.allocate(64, 64)
        ask(client, json.dumps(buffers.describe()).encode())
        assert mapped() == 1
        client.close()
        buffers.close()
        until(lambda: not mapped())


def test_buffers_keep_one_file_open_at_most():
    gc.collect()
    before = len(open_files("/memfd:tensorkv"))
    mine, theirs = SharedBuffers(), OpenSharedBuffers()
    for nbytes in (10, 1000, 100_000):
        payload = mine.allocate(nbytes, nbytes)
        theirs.find(mine.describe())
        mine.replace(payload)
        assert len(open_files("/memfd:tensorkv")) == before + 1
    mine.close()
    assert len(open_files("/memfd:tensorkv")) == before


def test_what_a_server_cannot_open_is_an_error(monkeypatch):
    buffers = SharedBuffers()
    buffers.allocate(10, 10)
    monkeypatch.setattr(channel, "Segment", Mock(side_effect=OSError("no memory")))
    with pytest.raises(OSError, match="no memory"):
        OpenSharedBuffers().find(buffers.describe())
    buffers.close()
