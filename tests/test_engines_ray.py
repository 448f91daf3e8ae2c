"""Parameter servers on Ray: the contract with one and two servers, and everything that only servers have."""

import itertools

import pytest
from contract import BaseContract

import tensorkv

ray = pytest.importorskip("ray")

names = (f"store{number}" for number in itertools.count())


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """One Ray for all tests: to start one takes seconds."""
    keeper = tensorkv.create("dist_async", name="keeper")
    yield
    keeper.close()


class TestOneServer(BaseContract):
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


class TestTwoServers(TestOneServer):
    OPTIONS = {"num_servers": 2}
