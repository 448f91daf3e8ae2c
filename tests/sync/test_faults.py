"""Faults that not every worker sees at the same time: no value that is half updated is served, and nothing aborts."""

import re
import signal

import pytest

from tests.support.amount import amount
from tests.support.workers import Team, run

PROGRAMS = "tests.sync.fault_programs"


@pytest.mark.parametrize("repeat", range(amount(1, 2)))
def test_no_half_summed_value_is_served(repeat):
    with Team(2, PROGRAMS, "half_summed") as team:
        assert team.wait() == [-signal.SIGKILL, 0], team.text(1)
        text = team.text(1)
    assert "pushpull raised RankDeadError" in text
    assert "the out has [2.0]" in text
    assert "afterwards a pull raised RankDeadError" in text, text


def test_a_call_that_fails_writes_no_out():
    """Whoever breaks off, and wherever."""
    found = [re.search(r"fired (\d+) failed (\d+)", text) for text in run(3, PROGRAMS, "outs_stay", 20)]
    fired, failed = (sum(int(each[group]) for each in found) for group in (1, 2))
    assert fired >= 10
    # On every worker, but for those that were done before another broke off.
    assert failed >= 2 * fired


@pytest.mark.parametrize("shared_memory", [True, False])
def test_who_dies_while_all_tell_all_ends_the_store(shared_memory):
    with Team(2, PROGRAMS, "gathering", shared_memory) as team:
        assert team.wait() == [0, -signal.SIGKILL], team.text(0)
        text = team.text(0)
    assert "push raised RankDeadError" in text
    if shared_memory:
        assert "rank 1 died or ended early" in text
    assert "pull raised RankDeadError" in text, text


def test_who_dies_before_a_long_call_is_named_on_every_worker():
    with Team(3, PROGRAMS, "long_call") as team:
        assert team.wait() == [0, 0, -signal.SIGKILL], team.text(0)
        texts = [team.text(rank) for rank in range(2)]
    for text in texts:
        assert re.search(r"pushpull raised RankDeadError \| pushpull .*: rank 2 died or ended early", text), text


def test_a_host_without_memory_ends_the_store_everywhere():
    first, *others = run(3, PROGRAMS, "no_memory", False)
    assert "init raised MemoryError" in first
    assert "pushpull raised WorkerError" in first
    for text in others:
        assert "raised WorkerError" in text
        assert "rank 0 broke off: NoMemoryToShareError" in text


def test_on_one_host_without_memory_the_store_goes_on():
    for text in run(2, PROGRAMS, "no_memory", True):
        assert re.search(r'init raised MemoryError \| init \{"keys": \["b"\].*: no 448 bytes of shared memory', text)
        assert "pushpull gave [2.0, 2.0, 2.0]" in text


def test_a_worker_that_has_left_goes_on_where_there_was_no_memory():
    texts = run(2, PROGRAMS, "leave_without_memory")
    assert "first push raised MemoryError" in texts[0]
    assert "second push gave None" in texts[0]
    for text in texts:
        assert "leave gave None" in text
        assert "pull gave [2.0]" in text


def test_a_load_without_memory_changes_nothing(tmp_path):
    for text in run(2, PROGRAMS, "load_without_memory", tmp_path / "saved"):
        assert "load raised MemoryError" in text
        assert "optimizer sgd" in text
        assert "pull gave [-1.0, -1.0, -1.0]" in text


def test_a_worker_without_memory_of_its_own_is_named_at_once(tmp_path):
    first, second = run(2, PROGRAMS, "read_without_memory", tmp_path / "saved")
    assert "load raised MemoryError | planted" in first
    assert "load raised WorkerError" in second
    for text in (first, second):
        assert "afterwards a push raised WorkerError" in text
        assert "rank 0 broke off: MemoryError: planted" in text


def test_a_pull_of_a_key_that_was_re_created_is_refused():
    for text in run(2, PROGRAMS, "re_created"):
        assert 'pull raised ValueMismatchError | pull("a"): the key was re-created' in text
        assert "unchanged" in text
        assert "again gave [1.0, 1.0, 1.0, 1.0]" in text
