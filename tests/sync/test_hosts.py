"""Workers in lock step on hosts with networks, process ids, names and shared memory of their own."""

import time
from contextlib import ExitStack

import pytest

from benchmarks.common.hosts import hosts
from tests.support.amount import amount
from tests.support.hosts import CAN_MAKE
from tests.support.processes import Program
from tests.support.until import until
from tests.support.workers import Team, run

pytestmark = pytest.mark.skipif(not CAN_MAKE, reason="needs root and ip")
PROGRAMS = "tests.sync.dist_programs"
NETWORKS = {
    "IPv4": {},
    "IPv6": {"prefix": "fd00:213::"},
    "small packets": {"mtu": 576},
}


def placed(made, per_host):
    """The hosts of workers, as ``Team`` takes them."""
    return [
        (machine.start, machine.address, "eth0")
        for machine, count in zip(made, per_host, strict=True)
        for _ in range(count)
    ]


@pytest.mark.parametrize(
    ("network", "per_host"),
    [
        ("IPv4", (2, 1, 1)),
        pytest.param("IPv4", (1, 3), marks=pytest.mark.release),
        pytest.param("IPv6", (1, 1), marks=pytest.mark.release),
        pytest.param("small packets", (1, 2), marks=pytest.mark.release),
    ],
    ids=str,
)
def test_hosts_give_the_bits_of_the_local_store(network, per_host):
    with hosts(len(per_host), **NETWORKS[network]) as made:
        for text in run(sum(per_host), PROGRAMS, "programs", amount(3, 15), 6000, True, hosts=placed(made, per_host)):
            assert "same bits" in text


@pytest.mark.release
def test_hosts_find_each_other_by_name(tmp_path):
    """No interface is named: Gloo takes the one that the host's name leads to."""
    with hosts(2) as made:
        names = tmp_path / "hosts"
        names.write_text("".join(f"{each.address} {each.name}\n" for each in made) + "127.0.0.1 localhost\n")
        for machine in made:
            machine.mount(names, "/etc/hosts")
        named = [(machine.start, machine.name, None) for machine in made]
        for text in run(2, PROGRAMS, "programs", 3, 6000, True, hosts=named):
            assert "same bits" in text


@pytest.mark.parametrize("down_s", [5, pytest.param(15, marks=pytest.mark.release)])
def test_a_cable_that_is_out_for_a_while_costs_a_wait(down_s):
    with hosts(2) as made, Team(2, PROGRAMS, "patient", hosts=placed(made, (1, 1))) as team:
        until(lambda: "turn 20" in team.text(1))
        made[1].unplug()
        time.sleep(down_s)
        made[1].plug()
        assert team.wait() == [0, 0], team.printed()
        for rank in range(2):
            assert "went on after a wait" in team.text(rank)


@pytest.mark.release
def test_torchrun_goes_on_with_the_hosts_that_are_left(tmp_path):
    """Of three hosts one dies; the two others begin again at the last checkpoint, which three have written."""
    with hosts(3) as made, ExitStack() as stack:
        launchers = []
        for machine in made:
            env = {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
            arguments = ("elastic", machine.address, made[0].address, tmp_path)
            launcher = Program("tests.sync.start_programs", *arguments, env=env, host=machine.start)
            launchers.append(stack.enter_context(launcher))
        until(lambda: all("at step 12" in each.text() for each in launchers))
        made[2].crash()
        assert [launcher.wait() for launcher in launchers[:2]] == [0, 0], launchers[0].text()
        for launcher in launchers[:2]:
            text = launcher.text()
            assert "of 3 begins at step 0" in text
            assert "of 2 begins at step 10" in text
            assert "ended with 2: [40.0, 40.0, 40.0] [90.0, 90.0, 90.0]" in text
