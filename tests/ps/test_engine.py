"""Parameter servers on Ray: the contract with one and two servers, and everything that only servers have."""

import itertools

import numpy as np
import pytest

import tensorkv
from tensorkv.testing import BaseContract
from tests.trainer import optimizer_programs as programs

ray = pytest.importorskip("ray")

names = (f"store{number}" for number in itertools.count())


pytestmark = pytest.mark.usefixtures("ray_store")


class ServersContract(BaseContract):
    TYPE = "dist_async"
    # The keeper of the servers is rank 0.
    PLACE = (1, 1)

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def servers(cls, tmp_path_factory):
        """Servers that all tests of the class use one after another, and a checkpoint of nothing for in between."""
        cls.name = next(names)
        cls.empty = tmp_path_factory.mktemp("empty")
        with tensorkv.create("dist_async", name=cls.name, **cls.OPTIONS) as keeper:
            keeper.save(cls.empty)
            cls.keeper = keeper
            yield

    def create(self, **options):
        if options or self.keeper.stats()["clients"] > 1:
            return super().create(name=next(names), **options)
        self.keeper.load(self.empty)
        return super().create(name=self.name)


# Many other tests are of one server, too: faults, random programs, recipes and the pages of the documentation.
@pytest.mark.release
class TestOneServer(ServersContract):
    pass


class TestTwoServers(ServersContract):
    OPTIONS = {"num_servers": 2}


@pytest.mark.parametrize("num_servers", [1, 2])
def test_torch_s_schedulers_and_scaler_over_servers(num_servers):
    options = {"num_servers": num_servers}
    programs.schedule(("dist_async", {"name": next(names), **options}), "OneCycleLR", True, replicas=2)
    programs.schedule(("dist_async", {"name": next(names), **options}), "CyclicLR of betas", False, overlap=True)
    assert programs.scaler(("dist_async", {"name": next(names), **options}), True, False, 1) == 2
    programs.thaw(("dist_async", {"name": next(names), **options}), True, False)


def test_many_rows_come_with_the_reply_to_one_message():
    ids = np.arange(1000)
    with tensorkv.create("dist_async", name=next(names)) as kv:
        kv.init(["a", "b"], [tensorkv.Rows(ids, np.full((1000, n), n, np.float32), 5000) for n in (3, 64)])
        for _ in range(4):
            a, b = kv.row_sparse_pull(["a", "b"], row_ids=[ids[:7], ids[::2]])
            assert np.array_equal(a.values, np.full((7, 3), 3))
            assert np.array_equal(b.values, np.full((500, 64), 64))
        told = kv.stats()
        assert told["server_verbs"]["pull_rows"]["calls"] == 4
        assert told["socket_requests"] >= 4
