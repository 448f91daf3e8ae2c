"""`tensorkv top` and the observer behind it: they see a running store, and the store does not see them."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("rich")
import tensorkv
from tensorkv.cli import main, top

ray = pytest.importorskip("ray")
from tensorkv.engines.ps.ray import actor, cluster  # noqa: E402
from tensorkv.engines.ps.ray import observer as ray_observer  # noqa: E402
from tests.support.until import until  # noqa: E402


@pytest.fixture(scope="module")
def store(ray_store, tmp_path_factory):
    """A store on two servers with a folder, which other tests push to."""
    name = f"top-{os.getpid()}"
    with tensorkv.create(
        "dist_async", name=name, num_servers=2, num_workers=2, path=tmp_path_factory.mktemp("servers")
    ) as kv:
        kv.init({"w": np.zeros((2, 3), np.float32), "big": np.zeros(500_000, np.float32)})
        kv.init("table", tensorkv.Rows(np.array([1, 2]), np.ones((2, 4), np.float32), 1000))
        kv.name, kv.address = name, ray.get_runtime_context().gcs_address
        yield kv


def look_on(look):
    """Look until there is nothing any more."""
    until(lambda: not look())


def test_an_observer_sees_what_the_store_tells(store):
    observer = ray_observer.observe(store.name)
    store.pushpull("w", np.ones((2, 3), np.float32))
    seen, told = observer.stats(), store.stats()
    for word in ("num_keys", "nbytes", "clients", "most_ahead", "dead_workers"):
        assert seen[word] == told[word]
    assert seen["num_keys"] == 3  # though "big" and the table are on both servers
    assert seen["server_verbs"]["pushpull"]["calls"] >= 1
    assert observer.settings["num_servers"] == 2
    assert [each["pid"] for each in seen["servers"]] == [each["pid"] for each in told["servers"]]


def test_an_observer_is_neither_a_client_nor_a_worker(store):
    before = store.stats()
    observer = ray_observer.observe(store.name)
    for _ in range(3):
        seen = observer.stats()
    after = store.stats()
    for one, two in zip(before["servers"], after["servers"], strict=True):
        for word in ("clients", "live", "connected", "dead", "rounds"):
            assert one[word] == two[word]
    assert seen["clients"] == 1


def test_servers_end_with_their_last_client_while_an_observer_reads_them(store):
    name = f"short-{os.getpid()}"
    kv = tensorkv.create("dist_async", name=name)
    observer = ray_observer.observe(name)
    observer.stats()
    kv.close()
    with pytest.raises(tensorkv.TensorKVError, match=f'the store "{name}" has ended'):
        look_on(observer.stats)
    store.stats()


def test_a_server_that_is_killed_is_down_and_then_up_again(store):
    observer = ray_observer.observe(store.name, timeout_s=1)
    pid = store.stats()["servers"][1]["pid"]
    os.kill(pid, 9)

    def is_up():
        server = observer.stats()["servers"][1]
        return server is not None and server["pid"] != pid

    until(is_up)
    store.push("table", tensorkv.Rows(np.array([1]), np.ones((1, 4), np.float32), 1000))


def test_a_store_that_is_not_there_is_named_with_those_that_are(store):
    with pytest.raises(tensorkv.TensorKVError, match=f'no store "nope" on this machine; there are .*"{store.name}"'):
        ray_observer.observe("nope")


def test_addresses_where_no_cluster_is_are_refused_at_once():
    with pytest.raises(OSError, match="refused"):
        cluster._wait_to_listen("127.0.0.2:1", 0)


# ---------------------------------------------------------------- the command


def run_top(*options):
    command = [sys.executable, "-m", "tensorkv", "top", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})


def test_once_as_json_is_for_scripts(store):
    # Without an address, it looks for the store in the clusters of this machine.
    ended = run_top("--name", store.name, "--once", "--json", "--every", "0.2")
    assert (ended.returncode, ended.stderr) == (0, "")
    found = json.loads(ended.stdout)
    assert found["store"]["name"] == store.name
    assert [each["state"] for each in found["servers"]] == ["up", "up"]
    assert [(each["rank"], each["state"]) for each in found["workers"]] == [(0, "alive"), (1, "expected")]
    assert (found["clients"], found["num_keys"]) == (1, 3)
    assert found["log_nbytes"] > 0


def test_once_draws_tables(store):
    ended = run_top("--name", store.name, "--address", store.address, "--once", "--every", "0.2")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert f"store {store.name}: async" in ended.stdout
    assert "keys: 3, " in ended.stdout
    for word in ("staleness: ", "pushes/s", "log", "alive", "expected"):
        assert word in ended.stdout
    assert store.stats()["clients"] == 1


def test_an_unknown_store_is_one_line(store, capsys):
    assert main.main(["top", "--name", "nope", "--once"]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith('tensorkv: error: no store "nope" on this machine; ')
    assert shown.err.count("\n") == 1


def test_it_ends_with_the_store(store, capsys):
    name = f"ending-{os.getpid()}"
    kv = tensorkv.create("dist_async", name=name)
    reports = top._reports(ray_observer.observe(name), 0.05)
    next(reports)
    kv.close()
    with pytest.raises(tensorkv.TensorKVError, match="has ended"):
        look_on(lambda: next(reports))


# ---------------------------------------------------------------- what a report says

SETTINGS = {"name": "a\x1b[31m", "mode": "async", "staleness": 2, "path": None, "durability": "memory"}


def look(pushes, pid=7, **more):
    verbs = {"push": {"calls": pushes, "nbytes": 100 * pushes, "seconds": 1.0}, "pushpull": {"calls": 1, "nbytes": 10}}
    server = {"verbs": verbs, "pid": pid, "keys": 2, "nbytes": 64, "waits": 3, "connected": [0, 1], "live": [0, 1, 3]}
    server |= {"host": "db\x1b[31m", "dead": [2], "rounds": [[0, 9], [1, 7], [2, 1], [3, 0], [4, 5]], **more}
    plain = {"num_keys": 2, "nbytes": 64, "clients": 2, "ahead": 2, "most_ahead": 3, "waits": 3, "waited_s": 0.5}
    sent = {"sent_nbytes": 1024, "sent_raw_nbytes": 2048, "received_nbytes": 4096, "received_raw_nbytes": 65536}
    return {**plain, "snapshots": 1, "server_compression": sent, "servers": [server, None]}


def test_rates_are_over_the_seconds_between_two_looks():
    found = top.report(SETTINGS, look(10), look(30), 4.0)
    one, two = found["servers"]
    assert (one["pushes_per_s"], one["pulls_per_s"], one["nbytes_per_s"]) == (5.0, 0.0, 500.0)
    assert (two["state"], two["pushes_per_s"], two["log_nbytes"]) == ("down", None, None)
    assert (found["pushes_per_s"], found["log_nbytes"]) == (5.0, None)


def test_a_server_that_has_begun_again_counts_from_zero():
    assert top.report(SETTINGS, look(1000), look(8, pid=8), 1.0)["pushes_per_s"] == 9.0


def test_workers_are_alive_dead_expected_or_gone():
    workers = top.report(SETTINGS, look(1), look(2), 1.0)["workers"]
    assert [each["state"] for each in workers] == ["alive", "alive", "dead", "expected", "left"]
    assert [each["behind"] for each in workers] == [0, 2, 8, 9, 4]


def test_drawing_sends_no_control_characters(capsys):
    from rich.console import Console

    Console(width=100).print(top.draw(top.report(SETTINGS, look(1), look(2, wal={"log_nbytes": 2048}), 1.0)))
    out = capsys.readouterr().out
    assert "\x1b" not in out
    for word in ("staleness 2", "db", "2.0 KiB", "down", "dead", "staleness: 2 rounds now, 3 at most"):
        assert word in out
    assert "compressed gradients: 4.0 KiB for 64.0 KiB\ncompressed pulls: 1.0 KiB for 2.0 KiB" in out


# ---------------------------------------------------------------- Ray's metrics


class Watched(actor.ServerActor):
    """A server that also says what it has told Ray."""

    def exported(self):
        metrics = self._metrics
        named = {each.info["name"]: each.info["default_tags"] for each in metrics._gauges.values()}
        named |= {each.info["name"]: each.info["default_tags"] for each in metrics._counters.values()}
        return metrics.exported, named


def test_servers_tell_rays_metrics(store, monkeypatch):
    monkeypatch.setattr(cluster, "ServerActor", Watched)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    name = f"metrics-{os.getpid()}"
    try:
        with tensorkv.create("dist_async", name=name) as kv:
            kv.init("w", np.zeros(4, np.float32))
            kv.push("w", np.ones(4, np.float32))
            kv.pushpull("w", np.ones(4, np.float32))
            server = ray.get_actor(f"{name}/0", namespace=cluster.NAMESPACE)
            until(lambda: ray.get(server.exported.remote())[0].get("pushes") == 2)
            told, named = ray.get(server.exported.remote())
    finally:
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert (told["pushes"], told["pulls"], told["keys"], told["nbytes"]) == (2, 1, 1, 16)
    assert (told["workers"], told["clients"], told["moved_nbytes"] > 0) == (1, 1, True)
    assert set(named) == {f"tensorkv_{word}" for word in told}
    assert all(tags == {"store": name, "server": "0"} for tags in named.values())
