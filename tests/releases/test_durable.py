"""Releases of a store in a folder: they are there again after a crash, with their names, numbers and bits."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import tensorkv
from tensorkv import Rows
from tensorkv.releases.finder import ChangeFinder
from tests.support.until import LIMIT_S


def value(number):
    return np.full((40, 5), number, np.float32)


@pytest.mark.parametrize("log_nbytes", [None, 4000], ids=["log", "snapshots"])
def test_releases_are_there_after_a_crash(tmp_path, log_nbytes):
    path, copy = tmp_path / "store", tmp_path / "copy"
    kv = tensorkv.create(path=path, log_nbytes=log_nbytes)
    kv.init({"w": value(0), "same": value(7), "gone": value(8), "table": Rows([0], np.ones((1, 2), np.float32), 9)})
    digests = {}
    for number in range(1, 9):
        kv.push("w", value(number))
        kv.push("table", Rows([number], np.full((1, 2), number, np.float32), 9))
        kv.publish(f"step-{number}", keep=3)
        with kv.open_release(f"step-{number}") as release:
            digests[number] = release.digest
        if number == 7:
            kv.delete("gone")
    kv.unpublish("step-6")
    assert kv.stats()["wal"]["snapshots"] > 0 if log_nbytes else True
    # A thread may still replace files. Without close, as a crash leaves it.
    kv._engine._shard.log._wal.wait_for_snapshot()
    copy.mkdir()
    for file in path.iterdir():
        if file.name != "lock":
            (copy / file.name).write_bytes(file.read_bytes())
    kv.close()
    for _ in range(2):
        with tensorkv.create(path=copy, log_nbytes=log_nbytes) as again:
            assert [(each.name, each.number) for each in again.releases()] == [("step-7", 7), ("step-8", 8)]
            for number in (7, 8):
                with again.open_release(f"step-{number}") as release:
                    assert release.digest == digests[number]
                    assert (release.pull("w") == value(number)).all()
                    assert (release.pull("same") == 7).all()
                    assert ("gone" in release.keys()) == (number == 7)
                    rows = release.row_sparse_pull("table", row_ids=range(9))
                    assert np.flatnonzero(rows.values.any(axis=1)).tolist() == list(range(number + 1))
            with again.open_release("step-8") as release:
                kinds = {each.key: each.kind for each in release.changes(since="step-7")}
                assert kinds == {"w": "dense", "same": "same", "table": "rows", "gone": "deleted"}
                assert release.changes(since="step-3").base is None
            for name in ("step-1", "step-6", "step-8"):
                with pytest.raises(tensorkv.ReleaseExistsError):
                    again.publish(name)
    with tensorkv.create(path=copy) as again:
        again.push("w", value(9))
        again.publish("step-9", keep=2)
        with again.open_release("step-8") as release:
            assert (release.pull("w") == 8).all()
        assert [each.number for each in again.releases()] == [8, 9]
    kv.close()


def test_a_release_that_is_held_is_never_forgotten():
    with tensorkv.create() as kv:
        kv.publish("pinned")
        releases = kv._engine._shard.releases
        for number in range(11_000):
            releases.numbers[f"old-{number}"] = number
        kv.publish("new")
        assert len(releases.numbers) <= 10_002
        with kv.open_release("pinned") as release:
            assert release.name == "pinned"


@pytest.mark.parametrize("when", ["from the log", "from a snapshot"])
def test_loaded_releases_are_of_another_generation_also_after_a_restart(tmp_path, when):
    pytest.importorskip("ray")
    from tests.support.fake_servers import Cluster

    options = {"path": str(tmp_path / "store"), "durability": "process"}
    with Cluster(1, **options) as cluster:
        kv = cluster.store()
        kv.init("w", value(1))
        kv.publish("one")
        kv.save(tmp_path / "saved", releases=True)
        kv.load(tmp_path / "saved")
        shard = cluster.servers[0]._state.shard
        generation = shard.releases.generation
        assert generation
        if when == "from a snapshot":
            shard.log.snapshot(shard)
    with Cluster(1, **options) as cluster:
        assert cluster.servers[0]._state.shard.releases.generation == generation


def test_a_load_that_replaces_a_release_while_it_is_compared_is_noticed(monkeypatch):
    """What was dropped has no keys, of which nothing has changed."""
    real, dropped = ChangeFinder._compare, []

    def compare(self, new, old):
        # As the load of another thread.
        new.close()
        dropped.append(new)
        return real(self, new, old)

    monkeypatch.setattr(ChangeFinder, "_compare", compare)
    with tensorkv.create() as kv:
        kv.init("w", value(0))
        kv.publish("a")
        kv.publish("b", keep=1)
        release = kv.open_release("b")
        with pytest.raises(tensorkv.SnapshotError, match="dropped"):
            # All values, since the older one is gone.
            release.changes(since="a")
        assert dropped


def test_changes_within_an_updater_are_refused():
    with tensorkv.create() as kv:
        kv.init("w", value(0))
        kv.publish("a")
        release = kv.open_release("a")
        raised = []

        def update(key, received, stored):
            for call in (lambda: release.digest, lambda: release.changes(since="a")):
                with pytest.raises(tensorkv.UpdaterError):
                    call()
                raised.append(key)

        kv.set_updater(update)
        kv.push("w", value(1))
        assert raised == ["w", "w"]


def test_changes_while_another_thread_is_in_an_updater_wait_for_it():
    is_updating, is_done = threading.Event(), threading.Event()

    def update(key, received, stored):
        is_updating.set()
        assert is_done.wait(LIMIT_S)

    with tensorkv.create() as kv, ThreadPoolExecutor() as pool:
        kv.init("w", value(0))
        kv.publish("a")
        kv.publish("b")
        release = kv.open_release("b")
        digest = release.digest
        kv.set_updater(update)
        pushed = pool.submit(kv.push, "w", value(1))
        assert is_updating.wait(LIMIT_S)
        calls = [pool.submit(lambda: release.digest), pool.submit(lambda: release.changes(since="a").digest)]
        try:
            for call in calls:
                with pytest.raises(TimeoutError):
                    call.result(0.1)
        finally:
            is_done.set()
        pushed.result()
        assert [call.result() for call in calls] == [digest, digest]
