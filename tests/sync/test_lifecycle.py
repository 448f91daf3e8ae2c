"""Workers in step from ``create`` to the end of their processes: neighbours, late starts, forks, exits."""

import os
import re
import shutil
import signal
from contextlib import ExitStack

import pytest
from torch.distributed import TCPStore

from tests.support.hosts import CAN_MAKE, pid_namespaces
from tests.support.workers import Team, run

PROGRAMS = "tests.sync.life_programs"


@pytest.fixture
def signals():
    """What workers need to tell each other how far they are, without a store of ours."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield {"SIGNALS": str(store.port)}
    del store


# ---------------------------------------------------------------- create


@pytest.mark.skipif(not CAN_MAKE or shutil.which("nsenter") is None, reason="PID namespaces take root and nsenter")
@pytest.mark.parametrize("sees_namespaces", [True, False])
def test_jobs_that_sit_crosswise_in_pid_namespaces_do_not_meet(sees_namespaces):
    """Two jobs on one network and one host name, where a process ID names a worker of the other job."""
    with pid_namespaces(2) as (here, there), ExitStack() as stack:
        teams = []
        for job, (first, second) in enumerate([(here, there), (there, here)], start=1):
            # The next process of the namespace gets this number, and has it before another one comes.
            chosen = ["sh", "-c", 'echo 4999 > /proc/sys/kernel/ns_last_pid; "$@"; exit $?', "-"]
            hosts = [([*first[0], *chosen], *first[1:]), second]
            teams.append(stack.enter_context(Team(2, PROGRAMS, "crosswise", job, sees_namespaces, hosts=hosts)))
        assert [team.wait() for team in teams] == [[0, 0], [0, 0]], [
            team.text(rank) for team in teams for rank in range(2)
        ]
        texts = [[team.text(rank) for rank in range(2)] for team in teams]
    # The fault fired: where rank 1 looks for its rank 0, it finds the other job's.
    assert len({re.search(r"pid (\d+)", text)[1] for text, _ in texts}) == 1
    for job in texts:
        assert all("sums of its own" in text for text in job)
        assert ("they use Gloo instead" in job[0]) != sees_namespaces


def test_a_worker_that_is_late_in_create_is_not_lost():
    texts = run(2, PROGRAMS, "late")
    assert all("met" in text for text in texts)
    assert int(re.search(r"late at (\d+) steps", texts[1])[1]) > 20


@pytest.mark.parametrize("is_referred_to", [True, False])
def test_a_store_starts_after_a_process_group_is_over(is_referred_to, signals):
    for text in run(2, PROGRAMS, "after_groups", is_referred_to, env=signals):
        assert "met each time" in text


def test_a_store_that_could_not_be_created_is_created_at_the_next_try(signals):
    texts = run(2, PROGRAMS, "again", env=signals)
    assert "fault fired" in texts[0]
    assert all("met" in text for text in texts)


def test_a_create_that_fails_late_leaves_no_memory_open():
    first, second = run(2, PROGRAMS, "fails_late")
    assert "rank 1 of 2 did not join" in first
    assert "planted" in second
    for text in (first, second):
        assert "left open: []" in text


# ---------------------------------------------------------------- children


@pytest.mark.parametrize(
    ("engine", "workers"), [("local", 1), ("device", 1), ("dist_sync", 2), ("links", 2), ("dist_async", 1)]
)
def test_children_leave_the_store_of_their_parent_alone(engine, workers, tmp_path, signals):
    for text in run(workers, PROGRAMS, "children", engine, tmp_path, env=signals):
        assert "goes on" in text


def test_a_child_that_outlives_its_parent_keeps_no_worker_waiting():
    with Team(2, PROGRAMS, "outlived") as team:
        try:
            assert team.wait() == [0, -signal.SIGKILL]
            assert "rank 1 died or ended early" in team.text(0)
        finally:
            os.kill(int(re.search(r"child (\d+)", team.text(1))[1]), signal.SIGKILL)


# ---------------------------------------------------------------- exits


@pytest.mark.parametrize(
    ("first_push", "shared_memory"), [("before", True), ("after", True), ("after", False), ("never", True)]
)
def test_exit_handlers_may_push_and_pull(first_push, shared_memory):
    for text in run(2, PROGRAMS, "at_exit", first_push, shared_memory):
        assert "closed in the exit handler" in text, text
        assert "Traceback" not in text, text
