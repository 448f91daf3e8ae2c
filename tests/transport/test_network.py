"""Connections between hosts: who is let in, and what travels."""

import json
import socket
import threading
import time
from contextlib import suppress

import pytest
import torch

from tensorkv.engines.transport import network
from tensorkv.engines.transport.network import NetworkServer, StreamBuffers, connect
from tests.support.until import LIMIT_S, until


def soon():
    return time.monotonic() + LIMIT_S


def add_one(message, buffers):
    """Answer a payload with each byte plus one."""
    payload, room = buffers.find(json.loads(message))
    room[: len(payload)] = payload + 1
    buffers.reply_nbytes = len(payload)
    return b"done"


@pytest.fixture(params=["127.0.0.1", "::1"])
def server(request):
    try:
        made = NetworkServer(request.param, add_one)
    except OSError:
        pytest.skip("no IPv6 here") if request.param == "::1" else pytest.fail("no server")
    yield made
    made.close()


def exchange(connection, buffers, nbytes, value):
    buffers.allocate(nbytes, nbytes).fill_(value)
    connection.send(json.dumps(buffers.describe()).encode())
    buffers.send(connection, soon())
    assert connection.receive(soon()) == b"done"
    assert (buffers.receive(connection, nbytes, soon()) == value + 1).all()


def test_payloads_travel_behind_their_messages(server):
    """Of no bytes, of more than any buffer of the kernel, of fewer than before."""
    connection, buffers = connect(server.address, soon()), StreamBuffers()
    for turn, nbytes in enumerate([10, 0, 30_000_000, 1, 65_536, 30_000_001]):
        exchange(connection, buffers, nbytes, turn)
    connection.close()


def test_several_clients_at_once(server):
    def work(value):
        connection, buffers = connect(server.address, soon()), StreamBuffers()
        for _ in range(20):
            exchange(connection, buffers, 100_000, value)
        connection.close()
        done.append(value)

    done = []
    threads = [threading.Thread(target=work, args=[value]) for value in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == list(range(5))


def test_who_does_not_know_the_key_is_not_answered(server):
    host, port, key = server.address
    with pytest.raises(ConnectionError):
        connect([host, port, key[::-1]], soon())
    connect(server.address, soon()).close()


def test_a_server_that_does_not_know_the_key_gets_no_request():
    with socket.create_server(("127.0.0.1", 0)) as impostor:

        def pretend():
            accepted, _ = impostor.accept()
            other = network.Connection(accepted)
            other.send(bytes(32))
            other.receive(soon())
            other.send(bytes(64))

        threading.Thread(target=pretend).start()
        with pytest.raises(PermissionError, match="is not the server"):
            connect(["127.0.0.1", impostor.getsockname()[1], "ab" * 32], soon())


def test_the_key_is_not_sent(server):
    """What travels at the beginning differs each time, and has no part of the key."""
    seen = []
    with socket.create_server(("127.0.0.1", 0)) as between:

        def forward():
            for _ in range(2):
                accepted, _ = between.accept()
                family = socket.AF_INET6 if ":" in server.address[0] else socket.AF_INET
                with accepted, socket.socket(family) as onward:
                    onward.connect(tuple(server.address[:2]))
                    for source, target, nbytes in ((onward, accepted, 40), (accepted, onward, 104)):
                        seen.append(source.recv(nbytes, socket.MSG_WAITALL))
                        target.sendall(seen[-1])
                    seen.append(onward.recv(72, socket.MSG_WAITALL))
                    accepted.sendall(seen[-1])

        thread = threading.Thread(target=forward)
        thread.start()
        for _ in range(2):
            connect(["127.0.0.1", between.getsockname()[1], server.address[2]], soon()).close()
        thread.join()
    assert len(seen) == len(set(seen)) == 6
    assert not any(server.address[2][:16].encode() in each for each in seen)


@pytest.mark.parametrize(
    "said", [b"", b"\xff" * 8, b"\x00" * 8, (1 << 40).to_bytes(8, "little") + b"x", b"GET / HTTP/1.1\r\n\r\n"]
)
def test_strangers_cost_nothing(server, said, monkeypatch):
    """What is no greeting ends the connection, and so does silence; memory is not taken on their word."""
    monkeypatch.setattr(network, "_GREETING_S", 0.2)
    family = socket.AF_INET6 if ":" in server.address[0] else socket.AF_INET
    with socket.socket(family) as stranger:
        stranger.connect(tuple(server.address[:2]))
        stranger.sendall(said)
        with suppress(ConnectionResetError):
            while stranger.recv(4096):
                pass
    connect(server.address, soon()).close()


def test_few_strangers_are_heard_at_a_time(server, monkeypatch):
    family = socket.AF_INET6 if ":" in server.address[0] else socket.AF_INET
    waiting = []
    for _ in range(network._MOST_STRANGERS):
        waiting.append(socket.socket(family))
        waiting[-1].connect(tuple(server.address[:2]))
        # The challenge: it is being heard.
        assert len(waiting[-1].recv(40, socket.MSG_WAITALL)) == 40
    with pytest.raises(ConnectionError):
        connect(server.address, soon())
    for each in waiting:
        each.close()

    def is_open():
        try:
            connect(server.address, soon()).close()
        except OSError:
            return False
        return True

    until(is_open)


def test_a_payload_that_stops_in_the_middle_ends_the_connection(server, monkeypatch):
    """On the server's side; and on the client's, when the server's reply stops."""
    monkeypatch.setattr(network, "PATIENCE_S", 0.2)
    connection, buffers = connect(server.address, soon()), StreamBuffers()
    buffers.allocate(1000, 1000)
    connection.send(json.dumps(buffers.describe()).encode())
    connection.send_bytes(memoryview(bytes(500)))
    with pytest.raises(ConnectionError):
        connection.receive(soon())
    other = connect(server.address, soon())
    with pytest.raises(TimeoutError):
        buffers.receive(other, 10, soon())


def test_nobody_listens_any_more(server):
    server.close()
    until(lambda: not any(thread.name == "tensorkv-accept" for thread in threading.enumerate()))
    with pytest.raises(ConnectionError):
        connect(server.address, soon())


def test_a_payload_of_fewer_than_no_bytes_ends_the_connection(server):
    connection = connect(server.address, soon())
    connection.send(b"[-1, 5]")
    with pytest.raises(ConnectionError):
        connection.receive(soon())
    assert torch.equal(StreamBuffers().replace(torch.ones(3)), torch.ones(3))
