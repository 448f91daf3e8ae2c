"""Each private part of Ray that tensorkv uses: it is there, and does what it is used for."""

import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("ray")
from tensorkv.engines.ps.ray import _compat
from tests.support.until import until


def test_ray_reads_its_environment_and_its_token_again(monkeypatch):
    before = _compat.authentication_mode()
    for mode, number in (("token", 1), ("disabled", 0)):
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
        _compat.read_environment()
        assert _compat.authentication_mode() == number
    monkeypatch.undo()
    _compat.read_environment()
    _compat.read_token()
    assert _compat.authentication_mode() == before


def test_a_node_on_loopback_is_started_again_and_found_and_left_to_the_parent():
    """In a process of its own, since Ray starts once in each."""
    code = """
import atexit
import ray
from tensorkv.engines.ps.ray import _compat
start_raylet, raylets = _compat.services.start_raylet, []
def start(*args, **options):
    raylets.append(start_raylet(*args, **options))
    if len(raylets) == 1:
        # As one that has waited 15 seconds for the other processes of its node.
        raylets[0].process.kill()
    return raylets[-1]
_compat.services.start_raylet = start
_compat.init_on_loopback(address="local", include_dashboard=False, num_cpus=1, object_store_memory=100 << 20)
assert [raylet.process.poll() for raylet in raylets] == [-9, None]
address = ray.get_runtime_context().gcs_address
assert address.startswith(_compat.LOOPBACK + ":"), address
assert address in _compat.cluster_addresses()
assert _compat.ray_constants.ENABLE_RAY_CLUSTER
processes = _compat.worker._global_node.all_processes
held, unregistered = dict(processes), []
atexit.unregister = unregistered.append
_compat.leave_to_parent()
assert held and not processes
assert unregistered == [ray.shutdown]
processes.update(held)
_compat.shutdown()
assert address not in _compat.cluster_addresses()
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_the_resources_for_which_an_actor_waits(ray_store):
    import ray

    made = ray.remote(type("Made", (), {"__init__": lambda self: time.sleep(100)}))
    waiting, starting = made.options(num_cpus=0, resources={"nowhere": 2}).remote(), made.options(num_cpus=0).remote()
    try:
        until(lambda: _compat.awaited_resources(waiting) == {"nowhere": 2.0})
        assert _compat.awaited_resources(starting) is None
    finally:
        ray.kill(waiting)
        ray.kill(starting)
    assert _compat.awaited_resources(ray_store._engine._servers[0].actor) is None


def test_a_node_may_take_long_to_start(monkeypatch):
    """Ray itself waits for half a minute."""
    looks = []

    def get_node(address, node):
        looks.append(node)
        if len(looks) < 3:
            raise RuntimeError("it is not there yet")
        return {"node": node}

    def init(**options):
        assert _compat.services.get_node("address", 7) == {"node": 7}

    monkeypatch.setattr(_compat.services, "get_node", get_node)
    monkeypatch.setattr(_compat.ray, "init", init)
    _compat.init_on_loopback()
    assert len(looks) == 3
    assert _compat.services.get_node is get_node
    monkeypatch.setattr(_compat, "_START_S", 0.0)
    looks.clear()
    with pytest.raises(RuntimeError, match="not there yet"):
        _compat.init_on_loopback()


def test_a_raylet_that_ends_each_time_is_an_error(monkeypatch):
    killed = []

    class Node:
        def __init__(self):
            self.all_processes = {"raylet": [SimpleNamespace(process=SimpleNamespace(poll=lambda: -6))]}
            self.start_ray_processes()
            _compat.services.get_node("address", 7)

        def start_ray_processes(self):
            pass

        def get_logs_dir_path(self):
            return "/logs"

        def kill_all_processes(self, **options):
            killed.append(self)

    def get_node(address, node):
        raise RuntimeError("it is not there yet")

    monkeypatch.setattr(_compat.services, "get_node", get_node)
    monkeypatch.setattr(_compat.ray_node, "Node", Node)
    monkeypatch.setattr(_compat.ray, "init", lambda **options: _compat.ray_node.Node())
    with pytest.raises(Exception, match=r"a raylet ended with status -6; see /logs/raylet\.err"):
        _compat.init_on_loopback()
    assert len(killed) == len(set(killed)) == _compat._STARTS
    assert _compat.ray_node.Node is Node


def test_a_shutdown_waits_for_rays_processes(monkeypatch):
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    node = SimpleNamespace(all_processes={"raylet": [SimpleNamespace(process=process)]})
    monkeypatch.setattr(_compat.worker, "_global_node", node)
    monkeypatch.setattr(_compat.ray, "shutdown", process.stdin.close)
    _compat.shutdown()
    assert process.returncode == 0
