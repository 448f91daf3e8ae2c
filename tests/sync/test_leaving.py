"""Unequal numbers of batches: those who have left serve the others, on one host and over several."""

import re

import pytest

from tests.support.amount import ALL, amount
from tests.support.hosts import CAN_MAKE, two_hosts
from tests.support.workers import run
from tests.sync.leave_programs import RULES

PROGRAMS = "tests.sync.leave_programs"
needs_hosts = pytest.mark.skipif(not CAN_MAKE, reason="network namespaces take root and iproute2")


def run_over(per_host, *args):
    """Run a program over two hosts."""
    with two_hosts() as hosts:
        placed = [hosts[0]] * per_host[0] + [hosts[1]] * per_host[1]
        return run(sum(per_host), PROGRAMS, *args, hosts=placed)


def check_uneven(texts, rules):
    for text in texts:
        assert [line for line in text.splitlines() if line.startswith("same bits")] == [f"same bits {r}" for r in rules]


@needs_hosts
@pytest.mark.parametrize(
    ("per_host", "order", "rules"),
    [
        ((1, 1), "1,0", RULES),
        ((2, 2), "3,2,1,0", amount(("adam", "skip_step"), RULES)),
        ((1, 3), "0,2,1,3", amount(("updater", "clip"), RULES)),
        *(
            (per_host, order, RULES)
            for per_host, order in [((1, 1), "0,1"), ((2, 2), "0,1,2,3"), ((2, 2), "0,2,3,1"), ((1, 3), "1,3,2,0")]
            if ALL
        ),
    ],
    ids=str,
)
def test_sums_over_those_present_have_the_local_bits(per_host, order, rules):
    check_uneven(run_over(per_host, "uneven", order, True, *rules), rules)


@pytest.mark.parametrize(
    ("workers", "order", "shared_memory", "rules"),
    [
        (3, "0,1,2", True, RULES),
        (2, "1,0", False, amount(("adam", "skip", "clip"), RULES)),
        (3, "2,1,0", False, amount(("assign", "mean"), RULES)),
        *([(3, "0,1,2", False, RULES), (3, "1,0,2", False, RULES)] if ALL else []),
    ],
)
def test_on_one_host_too(workers, order, shared_memory, rules):
    check_uneven(run(workers, PROGRAMS, "uneven", order, shared_memory, *rules), rules)


@pytest.mark.parametrize("shared_memory", [True, False])
@pytest.mark.parametrize("pusher", [0, 1, 2])
def test_long_names_and_refused_calls(pusher, shared_memory):
    texts = run(3, PROGRAMS, "refused", pusher, shared_memory)
    assert [text.count("refused") for text in texts] == [2 * (rank == pusher) for rank in range(3)]
    assert all("left" in text for text in texts)


@needs_hosts
@pytest.mark.parametrize("pusher", [0, 3])
def test_long_names_and_refused_calls_over_hosts(pusher):
    texts = run_over((1, 3), "refused", pusher, True)
    assert texts[pusher].count("refused") == 2
    assert all("left" in text for text in texts)


@needs_hosts
@pytest.mark.parametrize("pusher", [0, 3])
def test_a_long_list_that_was_never_pushed_is_an_error(pusher):
    for text in run_over((1, 3), "not_seen_before", pusher):
        assert "WorkerError | leave: the other workers push a new list of keys that is too long to be sent" in text


@needs_hosts
@pytest.mark.parametrize("verb", ["barrier", "init"])
@pytest.mark.parametrize("caller", [0, 3])
def test_others_may_only_push_and_pull(caller, verb):
    for text in run_over((1, 3), "left_and", verb, caller):
        assert "WorkerMismatchError" in text
        assert "has left" in text


@pytest.mark.parametrize("shared_memory", [True, False])
@pytest.mark.parametrize("verb", ["push slices", "push many slices"])
def test_others_may_not_push_slices(verb, shared_memory):
    for text in run(3, PROGRAMS, "left_and", verb, 1, shared_memory):
        assert re.search(r"WorkerMismatchError \| .*rank \d has left", text), text


@needs_hosts
@pytest.mark.parametrize("caller", [0, 2])
def test_a_mismatch_while_others_have_left(caller):
    for text in run_over((1, 3), "others", caller):
        assert "WorkerMismatchError | the workers' calls differ" in text
        assert f"rank {caller}: push" in text
        assert f"rank {caller + 1}: push" in text
