"""Parameter servers on Ray: the contract with one and two servers, and everything that only servers have."""

import numpy as np
import pytest

import tensorkv
from tensorkv.testing import BaseContract
from tests.support.workers import run
from tests.trainer import optimizer_programs as programs

pytest.importorskip("ray")


class ServersContract(BaseContract):
    TYPE = "dist_async"

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def servers(cls, server_pool):
        cls.pool = server_pool

    def create(self, **options):
        return self.pool.create(**{**self.OPTIONS, **options})


# Many other tests are of one server, too: faults, random programs, recipes and the pages of the documentation.
@pytest.mark.release
class TestOneServer(ServersContract):
    pass


class TestTwoServers(ServersContract):
    OPTIONS = {"num_servers": 2}


class TestModeSync(ServersContract):
    OPTIONS = {"mode": "sync"}
    SLICES_TOGETHER = True


@pytest.mark.parametrize("num_servers", [1, 2])
def test_torch_s_schedulers_and_scaler_over_servers(num_servers, server_pool):
    def store():
        return "dist_async", {"name": server_pool.name(num_servers=num_servers)}

    programs.schedule(store(), "OneCycleLR", True, replicas=2)
    programs.schedule(store(), "CyclicLR of betas", False, overlap=True)
    assert programs.scaler(store(), True, False, 1) == 2
    programs.thaw(store(), True, False)


def test_the_processes_of_a_mesh_push_dtensors(ray_address):
    for text in run(2, "tests.arrays.mesh_programs", 2, "mesh", env=ray_address):
        assert "18 DTensors pushed" in text


def test_many_rows_come_with_the_reply_to_one_message(server_pool):
    ids = np.arange(1000)
    with server_pool.create() as kv:
        before = kv.stats()["server_verbs"].get("pull_rows", {"calls": 0})["calls"]
        kv.init(["a", "b"], [tensorkv.Rows(ids, np.full((1000, n), n, np.float32), 5000) for n in (3, 64)])
        for _ in range(4):
            a, b = kv.row_sparse_pull(["a", "b"], row_ids=[ids[:7], ids[::2]])
            assert np.array_equal(a.values, np.full((7, 3), 3))
            assert np.array_equal(b.values, np.full((500, 64), 64))
        told = kv.stats()
        assert told["server_verbs"]["pull_rows"]["calls"] == before + 4
        assert told["socket_requests"] >= 4
