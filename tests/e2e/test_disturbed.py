"""Random programs under disturbances give what an undisturbed `local` store gives, on every engine."""

import json
import os
import subprocess
import sys

import pytest

from tests.support import workers
from tests.support.amount import amount
from tests.support.processes import call

PROGRAM = "tests.e2e.disturbed"
# The same programs at each run; ``make soak`` has others each time.
SEED = int(os.environ.get("TENSORKV_TEST_SEED", "1"))


def run(engine, first, count, *options, tmp_path, **environment):
    environment["DISTURBED_FOLDER"] = str(tmp_path)
    status, text = call(PROGRAM, engine, first, count, *options, env=environment)
    assert status == 0, text[-3000:]
    return json.loads(text.strip().splitlines()[-1])


@pytest.mark.parametrize(
    ("engine", "count", "options", "expected"),
    [
        ("local", 20, [], {"fork", "threads", "handler", "raised", "meta", "inference", "chdir"}),
        ("device", 12, [], {"raised"}),
        ("local", 14, ["path=kept"], {"reopen", "raised", "chdir"}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_one_process(engine, count, options, expected, tmp_path):
    check(run(engine, SEED * 1000, count, *options, tmp_path=tmp_path), count, expected)


@pytest.mark.parametrize(
    ("count", "options", "expected"),
    [
        (amount(2, 3), ["num_servers=1", "mode=sync"], set()),
        (amount(1, 4), ["num_servers=2", "path=kept"], {"kill"}),
    ],
    ids=["memory", "folder"],
)
def test_servers(count, options, expected, ray_address, tmp_path):
    counts = run("dist_async", SEED * 1000, count, *options, tmp_path=tmp_path, **ray_address)
    check(counts, count, expected)


def check(counts, count, expected):
    """Check that there were as many programs as wanted, and the disturbances that they are for."""
    assert counts["programs"] == count
    assert expected <= counts.keys(), "a disturbance never came"
    assert len(counts.keys() - {"programs", "steps", "undisturbed"}) >= 3, "too few kinds of disturbance"


@pytest.mark.parametrize(("size", "count"), [(2, amount(3, 5)), (3, amount(1, 2))])
def test_workers_in_step(size, count, tmp_path):
    texts = workers.run(
        size,
        PROGRAM,
        "dist_sync",
        SEED * 1000 + 500,
        count,
        env={"DISTURBED_FOLDER": str(tmp_path)},
    )
    for text in texts:
        check(json.loads(text.strip().splitlines()[-1]), count, set())


@pytest.mark.release
@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("sum", "the store holds something else than local"),
        ("untyped", "raised ZeroDivisionError"),
        ("hang", "Thread"),
    ],
)
def test_planted_faults_are_found(fault, found, tmp_path):
    code = f"""
import threading
import torch
from tests.e2e import disturbed
from tensorkv.shard.shard import Shard

push, pushes = Shard.push, [0]

def faulty(self, batch):
    push(self, batch)
    pushes[0] += 1
    if pushes[0] == 5 and {fault!r} == "sum":
        next(iter(self._entries.values())).value.view(torch.int32)[0] += 1
    if pushes[0] == 5 and {fault!r} == "untyped":
        1 / 0
    if pushes[0] == 5 and {fault!r} == "hang":
        threading.Event().wait()

Shard.push = faulty
disturbed.HANG_S = 20
disturbed.main("local", 0, 20)
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", code]
    shown = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert shown.returncode in (1, 3)
    assert found in shown.stderr
