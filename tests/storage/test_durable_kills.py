"""A durable shard whose process is killed, thousands of times: each acknowledged push counts once."""

import contextlib
import json
import os
import tempfile

import pytest

from tests.storage.seams import SEAMS
from tests.support.amount import ALL, amount
from tests.support.processes import Program

PROGRAM = "tests.storage.kills"
SEED = int(os.environ.get("TENSORKV_TEST_SEED", "20"))
WRONG = 3
ADAM_KILLS = amount(10, 100)


@pytest.fixture
def folder():
    """A folder in memory: what a killed process has written is as safe there, and it is faster."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as path:
        yield path


def start(folder, number, kills, durability, how, optimizer="sgd", *plant):
    # Nothing may start threads: the program forks.
    alone = {"OMP_NUM_THREADS": "1"}
    return Program(PROGRAM, folder, SEED + number, kills, durability, how, optimizer, *plant, env=alone, number=number)


def finish(programs):
    """Wait for programs; return for each its exit status, what it found and what it has printed."""
    ended = []
    with contextlib.ExitStack() as stack:
        for program in programs:
            stack.enter_context(program)
        for program in programs:
            status, text = program.wait(), program.text()
            ended.append((status, None if status else json.loads(text), text))
    return ended


@pytest.mark.parametrize("durability", ["process", "disk"])
def test_acknowledged_pushes_count_once_whenever_the_process_is_killed(folder, durability):
    print("seed", SEED)
    number = 10 if durability == "disk" else 0
    kills = {"time": amount(40, 800), "calls": amount(60, 850), "seams": amount(120, 900)}
    programs = [start(folder, number + i, kills[how], durability, how) for i, how in enumerate(kills)]
    deaths = []
    for (status, found, complaint), least in zip(finish(programs), kills.values(), strict=True):
        assert status == 0, complaint
        print(found)
        assert found["kills"] >= least
        assert found["in the middle"] > least // 10, "too few kills came between two pushes"
        assert found["resent, known"] > least // 20, "too few pushes were logged and not acknowledged"
        deaths.append(found["deaths"])
    _, calls, seams = deaths
    died = {death.split()[0] for death in calls}
    # Few kills do not meet a rename or a removal among the calls; the seams have these.
    assert died >= {"pwritev", "fsync", "open", *(["replace", "unlink"] if ALL else [])}
    assert ("fdatasync" in died) == (durability == "disk")
    expected = set(SEAMS) - ({"sync of the log"} if durability == "process" else set())
    assert {seam for seam, count in seams.items() if count >= amount(1, 15)} == expected


def test_adam_goes_on_to_the_bit(folder):
    programs = [start(folder, 30 + i, ADAM_KILLS, "process", how, "adam") for i, how in enumerate(["time", "calls"])]
    for status, found, complaint in finish(programs):
        assert status == 0, complaint
        assert found["kills"] >= ADAM_KILLS


@pytest.mark.release
@pytest.mark.parametrize(
    "plants",
    [
        ["no dedup", "acknowledged before it is logged"],
        ["requests outside the snapshot", "old log removed first"],
    ],
)
def test_faults_are_noticed(folder, plants):
    programs = [start(folder, 40 + i, 1000, "process", "calls", "sgd", plant) for i, plant in enumerate(plants)]
    for status, _, complaint in finish(programs):
        assert status == WRONG, "a planted fault went unnoticed"
        assert any(word in complaint for word in ("are acknowledged", "StorageError", "overlaps at"))
