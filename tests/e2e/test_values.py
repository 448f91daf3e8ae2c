"""Every engine agrees with the local store bit for bit, before and after a checkpoint is loaded."""

import pytest

import tensorkv
from tensorkv.engines import partition
from tensorkv.shard.optimizers import CLASSES
from tests.support import value_programs
from tests.support.workers import run


def seeds(turn):
    """One program for each optimizer, others at each turn."""
    return range(turn * len(CLASSES), (turn + 1) * len(CLASSES))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(partition, "_WHOLE", value_programs.DIVIDED)


def test_a_store_in_a_folder(tmp_path):
    for seed in seeds(0):
        folder = tmp_path / str(seed)
        stores = []

        def open_store(before=None, folder=folder, stores=stores):
            if before is not None:
                before.close()
            stores.append(tensorkv.create("local", path=folder / "store"))
            return stores[-1]

        value_programs.train(seed, open_store(), folder, reopen=open_store)
        stores[-1].close()
        assert len(stores) == 2
    with tensorkv.create("local", path=tmp_path / "store") as kv:
        value_programs.train_on_nothing(kv, tmp_path / "nothing")


@pytest.mark.parametrize(("turn", "num_servers", "near"), [(1, 1, True), (2, 3, False)])
def test_servers(turn, num_servers, near, tmp_path):
    pytest.importorskip("ray")
    from tests.support.fake_servers import Cluster

    for seed in seeds(turn):
        with Cluster(num_servers, near=near) as cluster:
            value_programs.train(seed, cluster.store(), tmp_path / str(seed))
    with Cluster(num_servers, near=near) as cluster:
        value_programs.train_on_nothing(cluster.store(), tmp_path / "nothing")


@pytest.mark.parametrize(("turn", "workers", "shared_memory"), [(3, 3, True), (4, 2, False)])
def test_workers_in_step(turn, workers, shared_memory, tmp_path):
    for text in run(
        workers,
        "tests.sync.dist_programs",
        "values",
        *seeds(turn)[:: len(CLASSES) - 1],
        tmp_path,
        shared_memory,
    ):
        assert "same values" in text
