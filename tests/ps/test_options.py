"""Options of a store on parameter servers: what is out of range is refused before any Ray is started."""

import ast
import re
import socket
import threading
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

import tensorkv

pytest.importorskip("ray")
from ray.exceptions import ActorAlreadyExistsError, OutOfMemoryError, RayError

from tensorkv.engines.ps import connect as ps_connect
from tensorkv.engines.ps.options import PSOptions
from tensorkv.engines.ps.ray import actor as ray_actor
from tensorkv.engines.ps.ray import cluster as ray_cluster
from tensorkv.engines.ps.ray.actor import why
from tensorkv.engines.ps.server.awaited import new_stamp
from tensorkv.engines.ps.server.server import Server
from tensorkv.storage.folder import Folder
from tensorkv.storage.lock import FolderLock


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_servers": 0}, "num_servers is 0"),
        ({"num_workers": True}, "num_workers is True"),
        ({"keep": 1.5}, "keep is 1.5"),
        ({"mode": "later"}, "mode is 'later'"),
        ({"nonfinite": "ignore"}, "nonfinite is 'ignore'"),
        ({"staleness": -1}, "staleness is -1"),
        ({"staleness": 2, "mode": "sync"}, "staleness is 2"),
        ({"nonfinite": "skip", "mode": "sync", "num_servers": 2}, "needs num_servers=1"),
        ({"durability": "disk"}, "needs path="),
        ({"durability": "memory", "path": "store"}, "durability is 'memory'"),
        ({"heartbeat_timeout_s": 1}, "heartbeat_timeout_s is 1"),
        ({"heartbeat_timeout_s": float("inf")}, "heartbeat_timeout_s is inf"),
        ({"heartbeat_timeout_s": 10**400}, "heartbeat_timeout_s is 1000"),
        ({"heartbeat_timeout_s": "5"}, "heartbeat_timeout_s is '5'"),
        ({"path": b"store"}, "path is b'store'"),
        ({"path": 5}, "path is 5"),
        ({"path": ""}, "path is ''"),
        ({"path": "a\0b"}, "path is"),
        ({"name": "a/b"}, "without a slash"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"reader": 1}, "reader is 1"),
        ({"address": "localhost"}, "address is 'localhost'"),
        ({"address": "ray://localhost:10001"}, "address is 'ray://localhost:10001'"),
        ({"address": 6379}, "address is 6379"),
    ],
)
def test_options_out_of_range(options, said, tmp_path, monkeypatch):
    import ray

    monkeypatch.chdir(tmp_path)
    with pytest.raises(tensorkv.ArgumentError, match=said):
        tensorkv.create("dist_async", **options)
    assert not ray.is_initialized()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OutOfMemoryError("Task was killed\n" + "top process: 1 GB\n" * 40), "memory monitor has killed its process"),
        (RayError("actor died\n  Task was killed due to the node running low on memory.\n1 GB\n"), "short of memory"),
        (RayError("in its task\n  File 'x', line 1\ntensorkv.errors.StorageError: s: is damaged\n"), "s: is damaged"),
        (RayError("The actor died unexpectedly.\n\tclass_name: ServerActor\n"), "The actor died unexpectedly."),
        (RayError(""), ""),
    ],
)
def test_what_ray_says_in_forty_lines_is_one(error, said):
    found = why(error)
    assert said in found
    assert "\n" not in found


def test_where_no_cluster_answers_it_is_an_error_within_the_timeout():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        # Ray itself would try until this test's time is over.
        with pytest.raises(tensorkv.ServerDeadError, match=f"no Ray cluster answers at {address}"):
            tensorkv.create("dist_async", address=address, timeout_s=0.5)


def test_a_cluster_that_starts_is_waited_for():
    with socket.socket() as late:
        late.bind(("127.0.0.1", 0))
        address = "{}:{}".format(*late.getsockname())
        with pytest.raises(ConnectionRefusedError):
            ray_cluster._wait_to_listen(address, 0)
        listening = threading.Timer(0.3, late.listen)
        listening.start()
        ray_cluster._wait_to_listen(address, 60)
        listening.join()


def test_a_client_that_connects_after_the_last_has_closed_starts_new_servers(monkeypatch):
    found = [(["ending"], PSOptions()), (["ending"], PSOptions()), None]

    def client(servers, *rest, **more):
        if servers == ["ending"]:
            raise ps_connect.StoreEndingError("its servers are ending")
        return servers

    monkeypatch.setattr(ps_connect, "PSEngine", client)
    cluster = mock.Mock(enter=lambda *_, **__: False, find_servers=lambda *_: found.pop(0))
    cluster.make_servers.return_value = (["new"], PSOptions())
    cluster.places.return_value = [["host", 1, 1, "node", "", "name", [None, None]]]
    monkeypatch.setattr(ps_connect, "cluster", cluster)
    assert ps_connect.connect({"timeout_s": 20.0}) == ["new"]
    assert not found
    cluster.leave.assert_not_called()
    # They stay, for whatever reason.
    found += [(["ending"], PSOptions())] * 100
    with pytest.raises(tensorkv.ServerDeadError, match="ending"):
        ps_connect.connect({"timeout_s": 0.2})
    cluster.leave.assert_called_once()


@pytest.mark.parametrize("is_used", [False, True])
@pytest.mark.parametrize("is_found", [False, True])
def test_a_client_that_cannot_connect_ends_the_servers_that_it_has_started(is_found, is_used, monkeypatch):
    """Not those of others, nor those that another client uses already."""
    servers = [SimpleNamespace(actor="first")], PSOptions()
    cluster = mock.Mock(find_servers=lambda *_: servers if is_found else None, make_servers=lambda *_: servers)
    cluster.places.side_effect = KeyboardInterrupt
    cluster.end_if_unused.return_value = not is_used
    monkeypatch.setattr(ps_connect, "cluster", cluster)
    with pytest.raises(KeyboardInterrupt):
        ps_connect.connect({})
    assert cluster.stop_servers.called is not (is_found or is_used)


@pytest.mark.parametrize(("is_ending", "after_s"), [(True, 10), (False, 120)])
def test_servers_without_clients_end_by_themselves(is_ending, after_s, monkeypatch):
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: now.append(now.pop() + seconds))
    monkeypatch.setattr(ray_actor, "time", clock)
    monkeypatch.setattr(ray_actor, "ray", mock.Mock())
    actor = object.__new__(ray_actor.ServerActor)
    actor._twin = ""
    actor._server, actor._metrics = (
        mock.Mock(is_ending=is_ending, is_broken=False, is_superseded=False, owners=lambda: now[0] < 50),
        mock.Mock(),
    )
    actor._watch()
    ray_actor.ray.kill.assert_called_once()
    assert 50 + after_s - 2 < now[0] < 50 + after_s + 2


@pytest.mark.parametrize("kind", ["stopped", "stopped, with a folder", "broken"])
def test_servers_end_by_themselves_that_were_stopped_or_cannot_go_on(kind, monkeypatch, tmp_path):
    """Whoever stops a server kills it then, unless it is killed itself."""
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: now.append(now.pop() + seconds))
    monkeypatch.setattr(ray_actor, "time", clock)
    monkeypatch.setattr(ray_actor, "ray", mock.Mock())
    path = str(tmp_path) if "folder" in kind else None
    actor = object.__new__(ray_actor.ServerActor)
    actor._twin, actor._metrics = "", mock.Mock()
    actor._server = Server(PSOptions(path=path), now=lambda: now[0])
    if kind == "broken":
        monkeypatch.setattr(
            actor._server._state.shard, "frozen", mock.Mock(side_effect=tensorkv.StorageError("broken"))
        )
    else:
        actor.stop()
        told = actor._server.serve({"verb": "stats", "owner": None, "client": "a.0", "rank": None, "seq": 1}).head
        assert told["error"][0] == "StoreClosedError"
    actor._watch()
    ray_actor.ray.kill.assert_called_once()
    assert 118 < now[0] < 122


def test_a_folder_that_cannot_be_opened_for_any_reason_is_looked_for_again(monkeypatch):
    actor = object.__new__(ray_actor.ServerActor)
    actor._server = awaited = ray_actor.AwaitedServer("lost", 30)
    monkeypatch.setattr(actor, "_open", mock.Mock(side_effect=MemoryError), raising=False)
    actor._look_for_folder(awaited)
    assert actor._server is awaited


def test_a_spare_ends_when_its_server_has_ended_for_good(monkeypatch):
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: now.append(now.pop() + seconds))
    monkeypatch.setattr(ray_actor, "time", clock)
    monkeypatch.setattr(ray_actor, "ray", mock.Mock())
    monkeypatch.setattr(ray_actor, "find_actor", lambda name: name if now[0] < 500 else None)
    actor = object.__new__(ray_actor.ServerActor)
    actor._twin, actor._server = "store/0", ray_actor.SpareServer()
    actor._watch()
    ray_actor.ray.kill.assert_called_once()
    assert 600 < now[0] < 622


def folders_of(path, num_servers):
    """Folders that servers have left."""
    for index in range(num_servers):
        (path / f"server-{index}").mkdir()
        FolderLock(Folder(path / f"server-{index}"), 0, stamp=new_stamp(num_servers)).close()


def nodes(monkeypatch, count):
    monkeypatch.setattr(ray_cluster.placement, "live_nodes", lambda: [None] * count)


@pytest.mark.parametrize("num_servers", [1, 2, 4])
def test_folders_of_another_number_of_servers_are_not_opened(num_servers, monkeypatch, tmp_path):
    """Wherever they are: also if the process that creates the store has none of them, or one."""
    folders_of(tmp_path, 3)
    options = PSOptions(path=str(tmp_path), num_servers=num_servers)
    said = f"was written by 3 servers, and num_servers is {num_servers}; use as many"
    nodes(monkeypatch, 2)
    with pytest.raises(tensorkv.StorageError, match=said):
        ray_cluster._check_folders(options)
    actor = object.__new__(ray_actor.ServerActor)
    actor._options, actor._index, actor._stamp, actor._home, actor._is_spare = options, 0, "", "", False
    with pytest.raises(tensorkv.StorageError, match=said):
        actor._open(comes_back=False)


def test_folders_of_a_store_may_be_on_other_hosts(monkeypatch, tmp_path):
    folders_of(tmp_path, 2)
    (tmp_path / "server-1").rename(tmp_path / "away")
    options = PSOptions(path=str(tmp_path), num_servers=2)
    nodes(monkeypatch, 2)
    ray_cluster._check_folders(options)
    # With one host there is no other place.
    nodes(monkeypatch, 1)
    with pytest.raises(tensorkv.StorageError, match=r"server-1: is not there, and .*server-0 is; bring it back"):
        ray_cluster._check_folders(options)
    (tmp_path / "away").rename(tmp_path / "server-1")
    ray_cluster._check_folders(options)
    ray_cluster._check_folders(PSOptions(path=str(tmp_path / "new"), num_servers=2))


def test_a_server_whose_name_was_taken_by_a_create_that_has_failed_is_made(monkeypatch):
    """The other client has ended its server by the time at which this one looks for it."""
    taken = mock.Mock(side_effect=[ActorAlreadyExistsError("taken"), "made"])
    monkeypatch.setattr(ray_cluster, "find_actor", lambda name: None)
    monkeypatch.setattr(
        ray_cluster.ray, "remote", lambda kind: SimpleNamespace(options=lambda **_: mock.Mock(remote=taken))
    )
    place = SimpleNamespace(options={}, host="")
    assert ray_cluster._make(PSOptions(), 0, place, "stamp") == ("made", True)
    assert taken.call_count == 2


def test_the_documented_options_are_those_that_there_are():
    page = (Path(__file__).parents[2] / "docs" / "servers.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", page.partition("## Options")[2].partition("## ")[0], re.MULTILINE)
    options = PSOptions()
    assert [name for name, _ in rows] == [each.name for each in fields(options)]
    for name, default in rows:
        if default.startswith("`") and default.endswith("`") and default.count("`") == 2 and name != "address":
            assert ast.literal_eval(default.strip("`")) == getattr(options, name), name
