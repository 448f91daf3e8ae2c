"""What answers for a server whose folder is not there; in test_faults.py with real servers."""

from unittest import mock

import pytest

from tensorkv.engines.ps.server import awaited
from tensorkv.engines.ps.server.awaited import AwaitedServer, why_not_the_folder
from tensorkv.storage.folder import Folder
from tensorkv.storage.lock import FolderLock


def test_requests_wait_and_those_that_must_not_are_refused(monkeypatch):
    monkeypatch.setattr(awaited, "_PAUSE_S", 0)
    server = AwaitedServer("server 1: lost", 30)
    for owner in ("a", "b", "a"):
        assert server.serve({"verb": "pull", "owner": owner}).head == {"wait_for": "server 1: lost"}
    assert server.owners() == ["a", "b"]
    assert not server.is_broken
    assert server.serve({"verb": "stats", "owner": "c"}).head == {"error": ["ServerDeadError", "server 1: lost"]}
    assert "error" in server.serve({"verb": "disconnect", "owner": "a"}).head
    assert server.owners() == ["b"]
    assert server.is_broken
    server.mark_dead("b")
    assert server.owners() == []


def test_clients_without_heartbeats_wait_no_longer(monkeypatch):
    monkeypatch.setattr(awaited, "_PAUSE_S", 0)
    now = [100.0]
    monkeypatch.setattr(awaited.time, "monotonic", lambda: now[0])
    server = AwaitedServer("lost", 30)
    server.serve({"verb": "heartbeat", "owner": "a"})
    now[0] += 31
    assert server.owners() == []


def test_a_request_is_held_no_longer_when_the_folder_is_there():
    server = AwaitedServer("lost", 30)
    server._is_over = mock.Mock(wraps=server._is_over)
    server.end()
    assert server.serve({"verb": "pull", "owner": "a"}).head == {"wait_for": "lost"}
    # Once it is set, no wait for it takes time.
    assert server._is_over.mock_calls == [mock.call.set(), mock.call.wait(0.5)]


def test_a_client_whose_time_is_nearly_over_is_answered_before_that():
    server = AwaitedServer("lost", 30)
    server._is_over = mock.Mock(wraps=server._is_over)
    assert server.serve({"verb": "pull", "owner": "a", "poll_timeout_s": 0.01}).head == {"wait_for": "lost"}
    server._is_over.wait.assert_called_once_with(0.01)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (None, "is not there"),
        ([], "is empty"),
        (["notes"], "is that of another store"),
        (["lock"], "is that of another store"),
        ("file", "cannot be read (Not a directory)"),
    ],
)
def test_folders_of_others(content, what, tmp_path):
    folder = tmp_path / "server-1"
    if content == "file":
        folder.touch()
    elif content is not None:
        folder.mkdir()
        for name in content:
            FolderLock(Folder(folder), 0, stamp="theirs").close() if name == "lock" else (folder / name).touch()
    said = why_not_the_folder(str(folder), "mine", 1, "db1")
    assert f"its folder {folder} {what}; its values are in the folder that it had on host db1. It serves" in said
    assert "that it had. It serves" in why_not_the_folder(str(folder), "mine", 1, "")


def test_the_own_folder_is_opened(tmp_path):
    FolderLock(Folder(tmp_path), 0, stamp="mine").close()
    assert why_not_the_folder(str(tmp_path), "mine", 1, "db1") is None
