"""What a launcher has set, and what a worker makes of it."""

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

import tensorkv
from tensorkv.engines.transport.rendezvous import agree_on_start, launched
from tests.support.until import LIMIT_S

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1)),
        ({"WORLD_SIZE": "1"}, (0, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1)),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2", "OMPI_COMM_WORLD_SIZE": "2"}, (1, 2)),
    ],
)
def test_a_worker_knows_its_rank_and_how_many_there_are(variables, expected, environment):
    for name, text in variables.items():
        environment.setenv(name, text)
    assert launched() == expected


# With each of them, workers would train alone, or wait for a worker that does not exist.
INVALID = [
    ({"RANK": "0"}, "RANK is 0 and WORLD_SIZE is not set"),
    ({"WORLD_SIZE": "2"}, "RANK is not set and WORLD_SIZE is 2"),
    ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 and WORLD_SIZE is 2"),
    ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is -1"),
    ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is one"),
    ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE is two"),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE is 2.*torchrun"),
    ({"PMI_SIZE": "4"}, "PMI_SIZE is 4.*torchrun"),
]


@pytest.mark.parametrize("engine", ["dist_sync", "dist_async"])
@pytest.mark.parametrize(("variables", "message"), INVALID)
def test_a_launcher_that_is_not_understood_is_an_error(variables, message, engine, environment):
    if engine == "dist_async":
        pytest.importorskip("ray")
    for name, text in variables.items():
        environment.setenv(name, text)
    with pytest.raises(tensorkv.ArgumentError, match=f"create: .*{message}"):
        tensorkv.create(engine, timeout_s=1)


@pytest.mark.parametrize("variables", [{"RANK": "1"}, {"OMPI_COMM_WORLD_SIZE": "2"}], ids=repr)
def test_servers_that_are_told_the_number_of_workers_do_not_ask_a_launcher(variables, environment):
    pytest.importorskip("ray")
    for name, text in variables.items():
        environment.setenv(name, text)
    with tensorkv.create("dist_async", num_workers=1) as kv:
        assert (kv.rank, kv.num_workers) == (0, 1)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "MASTER_ADDR is not set and MASTER_PORT is not set"),
        ({"MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT is not set"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "http"}, "MASTER_PORT is http"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "65536"}, "MASTER_PORT is 65536"),
    ],
)
def test_a_worker_that_cannot_find_the_others_says_what_to_set(variables, message, environment):
    for name, text in {"RANK": "0", "WORLD_SIZE": "2", **variables}.items():
        environment.setenv(name, text)
    with pytest.raises(tensorkv.ArgumentError, match=f"create: .*{message}.*torchrun"):
        tensorkv.create("dist_sync", timeout_s=1)


def test_a_worker_names_the_one_that_is_missing():
    """Rank 0 is there, and waits for rank 2, as do ranks 1 and 3."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("start", "announced")
    store.set(f"announced/hello/{store.add('announced/turns', 1)}", json.dumps([3, "token"]))
    with pytest.raises(tensorkv.RankDeadError, match=r"^rank 2 of 4 did not join within 1 s; check"):
        agree_on_start(store, 1, 4, 1)


def test_a_worker_says_that_rank_0_has_ended():
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = TCPStore("127.0.0.1", server.port, is_master=False)
    server.set("start", "announced")
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(agree_on_start, client, 1, 3, LIMIT_S)
        server.wait(["announced/hello/1"], timedelta(seconds=LIMIT_S))
        del server
        with pytest.raises(tensorkv.RankDeadError, match="rank 0 died or ended early, before all 3 workers had joined"):
            waiting.result(LIMIT_S)


def test_a_store_shows_that_a_worker_is_alone():
    with tensorkv.create("dist_sync") as kv:
        assert repr(kv) == "KVStore('dist_sync', rank 0 of 1, 0 keys)"
