"""On which nodes servers run: what is asked for, what there is, and what Ray makes of it."""

import itertools
import json
import socket
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("ray")
import tensorkv
from tensorkv.engines.ps.options import PSOptions
from tensorkv.engines.ps.ray import cluster, placement
from tensorkv.engines.ps.ray.placement import Node
from tests.support.processes import call
from tests.support.until import LIMIT_S

A, B, C = ("aa" * 28, "bb" * 28, "cc" * 28)
# How long a create waits for a resource that is never free: long enough for another server to start.
WAIT_S = 15
HEAD = Node(A, "head", "10.0.0.1", {"CPU": 2, "memory": 1e9}, True)
ONE = Node(B, "one", "10.0.0.2", {"CPU": 2, "memory": 4e9, "fast": 1}, False)
TWO = Node(C, "two", "10.0.0.3", {"CPU": 2, "memory": 4e9}, False)


def of_servers(wanted, count, nodes=(), *, looks=None, shares=None, **options):
    """Places in a cluster that is not there; without ``shares`` there is no folder to look for."""
    parsed = PSOptions.parse({"num_servers": count, "placement": wanted, "path": shares and "/store", **options})
    look = (lambda: nodes) if looks is None else (lambda: next(looks))
    return placement.of_servers(parsed, look, lambda path, nodes, timeout_s: shares == "all")


def pins(found):
    """What holds each server where it is."""
    return [list(place.options.get("resources", {})) for place in found]


def nodes_of(found):
    return [place.options["scheduling_strategy"].node_id for place in found]


def test_servers_take_turns_at_the_nodes():
    found = of_servers("spread", 5, [HEAD, ONE, TWO])
    assert nodes_of(found) == [A, B, C, A, B]
    assert all(place.options["scheduling_strategy"].soft for place in found)
    assert pins(found) == [[]] * 5


@pytest.mark.parametrize("wanted", ["spread", "pack"])
def test_a_server_stays_where_its_folder_is_unless_all_nodes_have_it(wanted):
    found = of_servers(wanted, 2, [HEAD, ONE], shares="all")
    assert pins(found) == [[], []]
    found = of_servers(wanted, 2, [HEAD, ONE], shares="none")
    addresses = ["10.0.0.1", "10.0.0.2" if wanted == "spread" else "10.0.0.1"]
    assert pins(found) == [[f"node:{address}"] for address in addresses]


def test_servers_are_packed_on_one_node():
    assert nodes_of(of_servers("pack", 3, [HEAD, ONE])) == [A] * 3


def test_no_server_is_where_no_work_is_wanted_unless_there_is_no_other_node():
    head = HEAD._replace(resources={"memory": 1e9})
    assert nodes_of(of_servers("spread", 3, [head, ONE, TWO])) == [B, C, B]
    assert nodes_of(of_servers("pack", 2, [head, ONE])) == [B, B]
    assert nodes_of(of_servers("spread", 2, [head])) == [A, A]


@pytest.mark.parametrize("name", [B, "one", "10.0.0.2"])
def test_a_server_stays_on_the_node_that_it_asks_for(name):
    wanted = {"server-1": {"node": name}, "server-2": {"resources": {"fast": 0.5, "CPU": 1, "memory": 2e9}}}
    first, second, third = of_servers(wanted, 3, [HEAD, ONE, TWO])
    assert nodes_of([first, second]) == [A, B]
    assert pins([first, second]) == [[], ["node:10.0.0.2"]]
    assert [first.host, second.host] == ["head", "one"]
    assert third == ({"resources": {"fast": 0.5}, "num_cpus": 1, "memory": 2e9}, "")


def test_nodes_that_are_late_are_waited_for(monkeypatch):
    monkeypatch.setattr(placement, "_POLL_S", 0)
    looks = itertools.chain([[HEAD]] * 5, itertools.repeat([HEAD, ONE]))
    assert nodes_of(of_servers({"server-0": {"node": "one"}}, 1, looks=looks)) == [B]


@pytest.mark.parametrize(
    "wanted", [{"node": "ten"}, {"resources": {"fast": 2}}, {"resources": {"slow": 1}}, {"resources": {"memory": 1e12}}]
)
def test_what_is_not_there_is_an_error_that_lists_the_nodes(wanted, monkeypatch):
    now = itertools.count()
    # A clock that goes on at each look, and no sleep.
    monkeypatch.setattr(placement, "time", SimpleNamespace(monotonic=lambda: next(now), sleep=lambda _: None))
    with pytest.raises(tensorkv.ArgumentError) as caught:
        of_servers({"server-0": wanted}, 1, [HEAD, ONE], timeout_s=3)
    said = str(caught.value)
    assert f"placement wants {wanted} for server-0, and no node is or has that" in said
    assert "head (10.0.0.1; CPU 2, memory 1e+09); one (10.0.0.2; CPU 2, fast 1, memory 4e+09)" in said


def weights(memory, on, wanted="spread"):
    options = PSOptions.parse({"num_servers": len(on), "placement": wanted})
    nodes = [Node(each, each, each, {"memory": nbytes}, False) for each, nbytes in memory.items()]
    return placement.weights(options, on, lambda: nodes)


def test_a_server_with_more_memory_holds_more():
    memory = {"small": 2e9, "large": 8e9, "like large": 7e9}
    assert weights(memory, ["small", "large", "large"]) == [50, 100, 100]
    assert weights(memory, ["large", "like large"]) == [1, 1]
    assert weights(memory, ["small", "small"]) == [1, 1]
    assert weights(memory, ["small", "gone"]) == [1, 1]
    assert weights(memory, ["large"]) == [1]
    asked = {"server-0": {"resources": {"memory": 3e9}}}
    assert weights(memory, ["large", "small"], asked) == [100, 67]


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("everywhere", "placement is 'everywhere'; expected 'spread', 'pack', or a mapping"),
        (3, "placement is 3"),
        (np.zeros(2), "placement is"),
        ({"server-2": {"node": "a"}}, "placement names 'server-2'; the servers are server-0, server-1"),
        ({0: {"node": "a"}}, "placement names 0"),
        ({"server-0": "a"}, "placement of server-0 is 'a'; expected"),
        ({"server-0": {}}, "placement of server-0 is {}"),
        ({"server-0": {"node": ""}}, "placement of server-0"),
        ({"server-0": {"node": "a", "resources": {"b": 1}}}, "placement of server-0"),
        ({"server-0": {"resources": {}}}, "placement of server-0"),
        ({"server-0": {"resources": {"b": -1}}}, "placement of server-0"),
        ({"server-0": {"resources": {"b": True}}}, "placement of server-0"),
        ({"server-0": {"resources": {1: 1}}}, "placement of server-0"),
    ],
)
def test_placements_that_make_no_sense(wanted, said):
    with pytest.raises(tensorkv.ArgumentError, match=said):
        PSOptions.parse({"num_servers": 2, "placement": wanted})


def test_any_mapping_will_do():
    inner = MappingProxyType({"resources": MappingProxyType({"fast": 1})})
    parsed = PSOptions.parse({"placement": MappingProxyType({"server-0": inner})})
    assert json.dumps(parsed.of_store()["placement"]) == '{"server-0": {"resources": {"fast": 1}}}'


# What follows runs in a process of its own, since a process is part of one cluster.


def place_on_two_nodes():
    """Start nodes on this machine; tell where the servers of several stores run."""
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    made.add_node(num_cpus=1, resources={"fast": 1})
    common = {"address": made.address, "insecure": True, "timeout_s": LIMIT_S}
    told = {}
    try:
        ray.init(address=made.address)
        ids = [node.id for node in placement.live_nodes()]
        chosen = {"server-0": {"resources": {"fast": 0.5}}, "server-1": {"node": ids[0]}}
        for name, wanted in {"spread": "spread", "chosen": chosen}.items():
            with tensorkv.create("dist_async", name=name, num_servers=2, placement=wanted, **common) as kv:
                kv.init("w", np.ones(3))
                places = [server.place(LIMIT_S)[3] for server in kv._engine._servers]
                told[name] = [ids.index(place) for place in places]
                told["hosts"] = [server["host"] for server in kv.stats()["servers"]]
        try:
            late = {"server-0": {"node": "nowhere"}}
            tensorkv.create("dist_async", name="late", placement=late, **{**common, "timeout_s": 1})
        except tensorkv.ArgumentError as error:
            told["error"] = str(error)
        told |= wait_for_resources(ray, common)
    finally:
        ray.shutdown()
        made.shutdown()
    print(json.dumps(told))


def wait_for_resources(ray, common):
    """Create stores of which a server waits for what another process has; tell what is raised."""
    told = {}
    holder = ray.remote(num_cpus=0, resources={"fast": 1})(type("Holder", (), {"here": lambda self: True})).remote()
    ray.get(holder.here.remote())
    busy = {**common, "name": "busy", "num_servers": 2}
    place = {"server-1": {"resources": {"fast": 1}}}
    try:
        tensorkv.create("dist_async", placement=place, **{**busy, "timeout_s": WAIT_S})
    except tensorkv.ServerDeadError as error:
        told["waits"] = str(error)
    # Neither server is left, so the name is free.
    with tensorkv.create("dist_async", **busy) as kv:
        told["placed again"] = kv.num_workers
    # A process that was killed cannot end what it has started.
    left, _ = cluster._make(PSOptions(name="left"), 0, placement.Place({"resources": {"fast": 1}}), "")
    try:
        tensorkv.create("dist_async", **{**common, "name": "left", "timeout_s": 3})
    except tensorkv.ServerDeadError as error:
        told["found"] = str(error)
    ray.kill(left)
    return told


def test_servers_of_a_cluster_of_two_nodes():
    status, text = call("tests.ps.test_placement")
    assert status == 0, text
    told = json.loads(text.splitlines()[-1])
    assert told["spread"] == [0, 1]
    assert told["chosen"] == [1, 0]
    assert told["hosts"] == [socket.gethostname()] * 2
    assert told["error"].count("CPU 1") == 2
    assert "nowhere" in told["error"]
    for error in (told["waits"], told["found"]):
        assert "waits for resources that no node has free (fast 1" in error
    assert told["placed again"] == 1


if __name__ == "__main__":
    place_on_two_nodes()
