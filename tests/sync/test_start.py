"""Workers that are started again find each other, whatever launchers have counted and earlier starts have left."""

import re

import pytest
from torch.distributed import TCPStore

from tests.support.hosts import CAN_MAKE, two_hosts
from tests.support.workers import free_port, run

PROGRAMS = "tests.sync.start_programs"


@pytest.mark.parametrize("workers", [2, 3])
def test_restart_counts_may_differ(workers):
    for text in run(workers, PROGRAMS, "other_counts"):
        assert "met" in text


@pytest.mark.skipif(not CAN_MAKE, reason="network namespaces take root and iproute2")
def test_torchrun_on_two_nodes_of_which_one_fails():
    """One launcher counts a restart, the other one does not, and their workers meet all the same."""
    with two_hosts() as hosts:
        text = "".join(run(2, PROGRAMS, "node", *(address for _, address, _ in hosts), hosts=hosts))
    assert "fault fired" in text
    assert sorted(re.findall(r"rank \d met the others at count (\d)", text)) == ["0", "1"], text


@pytest.mark.parametrize("first", [0, 1])
def test_what_an_earlier_start_has_announced_is_not_believed(first):
    """In a launcher's store, which outlives the workers: rank 0 comes before the others, or after one of them."""
    store = TCPStore("127.0.0.1", free_port(), is_master=True, wait_for_workers=False)
    env = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": str(store.port)}
    run(3, PROGRAMS, "other_counts", env=env)
    before = store.get("tensorkv/start").decode()
    assert store.add(f"tensorkv/{before}/turns", 0) == 2
    for text in run(3, PROGRAMS, "stale", before, first, env=env):
        assert "met" in text
    assert store.get("tensorkv/start").decode() != before
    # The fault fired: ranks that came before rank 0 have joined a start that is over.
    assert (store.add(f"tensorkv/{before}/turns", 0) > 2) == (first != 0)


def test_a_forked_child_does_not_speak_on_the_connection_of_its_parent():
    [text] = run(1, PROGRAMS, "a_child_is_another_worker", env={"WORLD_SIZE": "2"})
    assert "met" in text
