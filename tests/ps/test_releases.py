"""Releases on servers that are killed, that restart, and whose publishers die: no reader sees two versions at once."""

import itertools
import os
import signal
import threading
import time
from unittest import mock

import numpy as np
import pytest

import tensorkv
from tensorkv.engines.ps import messages
from tensorkv.engines.ps.client.releases import ReleaseClient
from tensorkv.engines.ps.client.session import Session
from tests.support.amount import amount
from tests.support.fake_servers import Cluster
from tests.support.until import LIMIT_S, until

F32 = np.float32
# The requests of a publisher.
PUBLISHING = (messages.Prepare, messages.Commit, messages.ShowRelease, messages.KeepReleases, messages.Abort)
# On several servers, and large enough to be read through shared memory.
SHAPES = {"large": (600, 100), "small": (3,), "other": (40, 5)}


def values(number):
    return {key: np.full(shape, number, F32) for key, shape in SHAPES.items()}


def number_in(pulled):
    """The number that all arrays are full of."""
    found = {float(number) for array in pulled for number in np.unique(array)}
    assert len(found) == 1, f"versions {found} together"
    return found.pop()


class Readers:
    """Threads that read each newest release whole and by changes, until the block ends; a context manager."""

    def __init__(self, stores):
        self.errors, self.seen, self._stop = [], [], threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(kv,)) for kv in stores]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join()
        assert not self.errors, self.errors

    def _run(self, kv):
        mine, base, last = None, None, None
        try:
            while not self._stop.is_set():
                try:
                    release = kv.wait_release(after=last, timeout_s=1)
                except tensorkv.WaitTimeoutError:
                    continue
                with release:
                    number = float(release.name.partition("-")[2])
                    pulled = release.pull(list(SHAPES))
                    assert number_in(pulled) == number
                    if mine is None:
                        mine, base = dict(zip(SHAPES, pulled, strict=True)), release.digest
                    else:
                        changes = release.changes(since=last)
                        mine = tensorkv.apply_changes(mine, changes, base=base)
                        assert number_in(mine.values()) == number
                        base = changes.digest
                        assert base == release.digest
                    last = release.name
                    self.seen.append(number)
        except Exception as error:
            self.errors.append(error)


def publish_all(kv, numbers):
    for number in numbers:
        kv.push(values(number))
        kv.publish(f"step-{number}", keep=2)


@pytest.mark.parametrize("num_servers", [1, 3])
def test_readers_see_whole_releases_while_others_are_published(num_servers):
    with Cluster(num_servers) as cluster:
        kv, *stores = [cluster.store() for _ in range(4)]
        kv.init(values(0))
        with Readers(stores) as readers:
            publish_all(kv, range(1, amount(60, 600)))
            until(lambda: readers.errors or readers.seen.count(amount(60, 600) - 1) == 3)
        assert len(readers.seen) > 10
        assert [each.name for each in kv.releases()] == [f"step-{amount(60, 600) - 2}", f"step-{amount(60, 600) - 1}"]
        # Nothing is left of those that were dropped.
        assert [len(server._state.shard.releases.lasting()) for server in cluster.servers] == [2] * num_servers


def test_a_test_of_mixed_releases_would_see_one():
    """Publishing without the first phase, which holds pushes on all servers, gives releases with halves of pushes."""

    def publish_one_by_one(self, name, keys, keep):
        for server in self.servers:
            time.sleep(0.001)
            self._ask([server], messages.Publish(release=name, keys=keys, keep=keep))

    with Cluster(3) as cluster, mock.patch.object(ReleaseClient, "publish", publish_one_by_one):
        kv, other = cluster.store(), cluster.store()
        kv.init(values(0))
        stop = threading.Event()

        def push():
            for number in itertools.count(1):
                other.push(values(number))
                if stop.is_set():
                    return

        thread = threading.Thread(target=push)
        thread.start()
        try:
            torn = 0
            for number in range(1000):
                kv.publish(f"step-{number}", keep=1)
                with kv.open_release(f"step-{number}") as release:
                    pulled = release.pull(list(SHAPES))
                torn += len({float(each.flat[0]) for each in pulled}) > 1
                if torn:
                    break
        finally:
            stop.set()
            thread.join()
    assert torn


def test_pushes_of_others_are_in_a_release_whole_or_not_at_all():
    with Cluster(3) as cluster:
        kv, other = cluster.store(), cluster.store()
        kv.init(values(0))
        stop = threading.Event()

        def push():
            for number in itertools.count(1):
                other.push(values(number))
                if stop.is_set():
                    return

        thread = threading.Thread(target=push)
        thread.start()
        try:
            for number in range(amount(100, 2000)):
                kv.publish(f"step-{number}", keep=1)
                with kv.open_release(f"step-{number}") as release:
                    number_in(release.pull(list(SHAPES)))
        finally:
            stop.set()
            thread.join()


@pytest.mark.parametrize("lost", range(5))
def test_a_publisher_that_dies_in_the_middle(lost):
    """After any of its requests: the release is there whole, or not at all, and later ones are as ever."""
    with Cluster(3) as cluster:
        kv, reader = cluster.store(), cluster.store()
        kv.init(values(1))
        kv.publish("step-1")
        dying = cluster.store()
        dying.push(values(2))
        sent, real = [], Session.send

        def send(self, requests, **more):
            if isinstance(requests[0].message, PUBLISHING):
                if len(sent) == lost:
                    raise tensorkv.WorkerError("this process has ended")
                sent.append(requests)
            return real(self, requests, **more)

        with (
            mock.patch.object(Session, "send", send),
            pytest.raises(tensorkv.WorkerError, match="has ended"),
        ):
            dying.publish("step-2")
        assert len(sent) == lost
        cluster.silence(dying)
        for server in cluster.servers:
            # As ten seconds later.
            server._snapshot_barrier._until = 0.0
        names = [each.name for each in reader.releases()]
        assert names in (["step-1"], ["step-1", "step-2"])
        for name in names:
            with reader.open_release(name) as release:
                assert number_in(release.pull(list(SHAPES))) == float(name[-1])
        for server in cluster.servers:
            # As with the next heartbeat of others.
            server._drop_snapshots_of_dead_clients()
        kv.push(values(3))
        kv.publish("step-3", keep=1)
        with reader.open_release("step-3") as release:
            assert number_in(release.pull(list(SHAPES))) == 3
            assert release.changes(since="step-1").base is None
        assert [[held.name for held in server._state.shard.releases.lasting()] for server in cluster.servers] == [
            ["step-3"]
        ] * 3


def test_two_that_publish_at_the_same_time():
    with Cluster(2) as cluster:
        stores = [cluster.store() for _ in range(3)]
        stores[0].init(values(0))

        def publish(number, errors):
            for turn in range(amount(15, 150)):
                try:
                    stores[number].publish(f"step-{turn}" if number else f"own-{turn}", keep=2)
                except tensorkv.ReleaseExistsError:
                    errors.append(turn)

        errors = []
        threads = [threading.Thread(target=publish, args=(number, errors)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # Of two with one name one has published it.
        assert sorted(errors) == list(range(amount(15, 150)))
        assert len(stores[0].releases()) == 2
        for each in stores[0].releases():
            with stores[0].open_release(each.name) as release:
                assert number_in(release.pull(list(SHAPES))) == 0


def test_a_lease_ends_and_reading_makes_it_longer():
    with Cluster(2) as cluster:
        kv, reader = cluster.store(), cluster.store()
        kv.init(values(1))
        kv.publish("step-1")
        release = reader.open_release("step-1", lease_s=LIMIT_S)
        short = reader.open_release("step-1", lease_s=0.001)
        for number in (2, 3):
            kv.push(values(number))
            kv.publish(f"step-{number}", keep=1)
        # One reader holds it for longer, so the other may read it as well.
        assert number_in(release.pull(list(SHAPES))) == number_in(short.pull(list(SHAPES))) == 1
        release.close()
        time.sleep(0.01)
        with pytest.raises(tensorkv.ReleaseNotFoundError, match="was dropped"):
            short.pull("large")
        with pytest.raises(tensorkv.ReleaseNotFoundError, match='the release "step-1" was dropped'):
            reader.open_release("step-1")
        assert [each.name for each in reader.releases()] == ["step-3"]


@pytest.fixture(scope="module")
def kills():
    pytest.importorskip("ray")
    from tests.ps import test_faults

    return test_faults


@pytest.mark.parametrize("num_servers", [1, 2])
def test_servers_that_are_killed_while_releases_are_published_and_read(kills, num_servers, tmp_path):
    with kills.create(num_servers=num_servers, path=tmp_path / "store") as kv:
        kv.init(values(0))
        stores = [tensorkv.create("dist_async", name=kills.name_of(kv)) for _ in range(2)]
        last = 0
        with Readers(stores) as readers, kills.Killer(kv, amount(1, 5)) as killer:
            while not killer.is_done:
                last += 1
                kv.push(values(last))
                kv.publish(f"step-{last}", keep=2)
            for _ in range(3):
                last += 1
                kv.push(values(last))
                kv.publish(f"step-{last}", keep=2)
            until(lambda: readers.errors or readers.seen.count(last) == 2)
        assert len(killer.killed) == num_servers * amount(1, 5)
        assert [each.number for each in kv.releases()] == [last - 1, last]
        for store in stores:
            store.close()


def test_releases_are_there_after_all_processes_have_ended(kills, tmp_path):
    digests = []
    for turn in range(2):
        with kills.create(num_servers=2, path=tmp_path / "store") as kv:
            if turn == 0:
                kv.init(values(0))
                publish_all(kv, range(1, 5))
                kv.delete("other")
                kv.push({"large": values(5)["large"], "small": values(5)["small"]})
                kv.publish("step-5", keep=3)
            assert [each.name for each in kv.releases()] == ["step-3", "step-4", "step-5"]
            with kv.open_release("step-4") as release:
                assert number_in(release.pull(list(SHAPES))) == 4
                digests.append(release.digest)
            with kv.open_release("step-5") as release:
                kinds = {each.key: each.kind for each in release.changes(since="step-4")}
                assert kinds == {"large": "dense", "small": "dense", "other": "deleted"}
            with pytest.raises(tensorkv.ReleaseExistsError):
                kv.publish("step-2")
            for pid in [kills.pid_of(kv, server) for server in (0, 1)]:
                os.kill(pid, signal.SIGKILL)
            with kv.open_release("step-3") as release:
                assert number_in(release.pull(list(SHAPES))) == 3
    assert digests[0] == digests[1]
