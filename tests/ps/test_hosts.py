"""Servers and workers on several hosts, and hosts and cables that fail."""

import random
import time

import numpy as np
import pytest

pytest.importorskip("ray")
import tensorkv
from benchmarks.common import hosts as namespaces
from tests.ps.host_programs import SHAPE, gradients
from tests.support.away import FAULTS, HostsInUse
from tests.support.hosts import CAN_MAKE
from tests.support.ray_hosts import RayHosts

pytestmark = pytest.mark.skipif(not CAN_MAKE, reason="needs root and ip")
F32 = np.float32
ROUNDS = 4


@pytest.fixture
def hosts():
    with namespaces.hosts(2) as made, RayHosts(made) as cluster:
        yield cluster, made


@pytest.fixture
def impatient(monkeypatch):
    """Have Ray look twice a second, and not every three seconds, whether a host is there; it may answer as late."""
    monkeypatch.setenv("RAY_health_check_period_ms", "500")


def trained(workers):
    """What one store makes of the pushes of ``train``, as bytes."""
    with tensorkv.create("local") as kv:
        kv.init({"large": np.zeros(SHAPE, F32), "small": np.zeros(7, F32)})
        kv.set_optimizer("adamw", lr=0.1)
        rngs = [np.random.default_rng(rank) for rank in range(workers)]
        for _ in range(ROUNDS):
            parts = [gradients(rng) for rng in rngs]
            found = kv.pushpull({key: [part[key] for part in parts] for key in parts[0]})
        return {key: value.tobytes().hex() for key, value in found.items()}


@pytest.mark.parametrize(
    "servers", [pytest.param(1, marks=pytest.mark.release), 2, pytest.param(4, marks=pytest.mark.release)]
)
def test_servers_and_workers_on_two_hosts_make_what_one_store_makes(hosts, servers):
    cluster, made = hosts
    options = {"num_servers": servers, "num_workers": 2, "mode": "sync"}
    for program in [cluster.run(machine, "train", options, ROUNDS) for machine in made]:
        (said,) = program.end()
        assert said == {"hosts": [made[index % 2].name for index in range(servers)], **trained(2)}


def test_a_host_with_a_local_folder_dies_and_comes_back(impatient, hosts, tmp_path):
    """The push that was on its way waits for the host, is applied once, and nothing acknowledged is lost."""
    cluster, made = hosts
    path = tmp_path / "path"
    path.mkdir()
    for machine in made:
        (tmp_path / machine.name).mkdir()
        machine.mount(tmp_path / machine.name, path)
    worker = cluster.run(made[0], "count", {"num_servers": 2, "path": str(path / "store")})
    assert [worker.say(), worker.say()] == [["host1", "host2"], "pushing"]
    made[1].crash()
    made[1].boot()
    cluster.join(made[1])
    (said,) = worker.end()
    assert said.pop("hosts") == ["host1", "host2"]
    assert said["least"] == said["most"] == said["pushed"]


@pytest.mark.release
def test_servers_of_a_dead_host_move_with_a_folder_that_all_hosts_see(hosts, tmp_path):
    cluster, made = hosts
    worker = cluster.run(made[0], "count", {"num_servers": 2, "path": str(tmp_path / "store")})
    assert [worker.say(), worker.say()] == [["host1", "host2"], "pushing"]
    made[1].crash()
    (said,) = worker.end()
    assert said.pop("hosts") == ["host1", "host1"]
    assert said["least"] == said["most"] == said["pushed"]


@pytest.mark.release
@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_is_lost_or_made_twice_whatever_a_call_does_when_a_host_is_away(fault):
    """Pushes, inits, snapshots and saves, during which a host is away ten times."""
    with HostsInUse(random.Random(7)) as used:
        for _ in range(10):
            used.disturb(fault)
        said = used.end()
    assert said["pushed"] > 10, said
    assert said["saved"] > 5, said
    assert said["resent"] > 0 or fault == "hang", said


@pytest.mark.release
@pytest.mark.parametrize("spare", [True, False], ids=["with spares", "alone"])
def test_a_host_that_hangs_and_wakes_up_serves_no_more(hosts, spare, tmp_path):
    """Ray starts its server elsewhere, where it waits for the lock that the stopped process has."""
    cluster, made = hosts
    options = {"path": str(tmp_path / "store"), "num_servers": 2, "spare": spare}
    worker = cluster.run(made[0], "count", options)
    assert [worker.say(), worker.say()] == [["host1", "host2"], "pushing"]
    made[1].pause()
    # Ray has taken it for dead by then.
    time.sleep(110)
    made[1].resume()
    (said,) = worker.end()
    assert said.pop("hosts") == ["host1", "host1"]
    assert said["least"] == said["most"] == said["pushed"]


@pytest.mark.release
def test_a_dead_host_without_a_folder_is_an_error_that_names_it(hosts):
    cluster, made = hosts
    worker = cluster.run(made[0], "lose", {"num_servers": 2})
    assert worker.say() == "pushing"
    made[1].crash()
    (said,) = worker.end()
    assert "server 1 (on host host2) has ended for good" in said
    assert "load a checkpoint" in said


@pytest.mark.release
@pytest.mark.parametrize("down_s", [12, 25])
def test_a_cable_that_is_out_for_a_while_costs_a_wait(hosts, down_s):
    cluster, made = hosts
    worker = cluster.run(made[0], "count", {"placement": {"server-0": {"node": "host2"}}})
    assert [worker.say(), worker.say()] == [["host2"], "pushing"]
    made[1].unplug()
    time.sleep(down_s)
    made[1].plug()
    (said,) = worker.end()
    assert said.pop("hosts") == ["host2"]
    assert said["least"] == said["most"] == said["pushed"]


@pytest.mark.release
def test_two_clusters_with_stores_of_one_name_do_not_meet(tmp_path):
    """Each has its own servers; one that is given the folder of the other does not start."""
    with namespaces.hosts(2) as made, RayHosts(made[:1]) as first, RayHosts(made[1:]) as second:
        for program in [first.run(made[0], "train", {}, ROUNDS), second.run(made[1], "train", {}, ROUNDS)]:
            (said,) = program.end()
            assert said.pop("hosts") in (["host1"], ["host2"])
            assert said == trained(1)
        options = {"path": str(tmp_path / "store")}
        worker = first.run(made[0], "count", options)
        assert [worker.say(), worker.say()] == [["host1"], "pushing"]
        ((kind, text),) = second.run(made[1], "refuse", options).end()
        assert kind == "StorageError"
        assert "another store has this folder open (process" in text
