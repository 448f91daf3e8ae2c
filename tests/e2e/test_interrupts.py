"""Whatever a signal handler raises or calls, at any moment, a call has happened as a whole or not at all."""

import os
import signal
import tempfile

import pytest

from tests.support import workers
from tests.support.amount import amount
from tests.support.processes import call

PROGRAMS = "tests.e2e.interrupt_programs"
RANDOM = amount(90, 300)

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")


@pytest.fixture
def memory(tmp_path):
    """A folder that no disk makes slow, where there is one."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield folder


def run(*arguments, folder):
    return call(PROGRAMS, *arguments, env={"TMPDIR": str(folder)})


@pytest.mark.parametrize(
    ("arguments", "least"),
    [
        (["lines", "local", "assign"], 200),
        (["lines", "local", "updater"], 1000),
        (["lines", "durable", "sgd"], 700),
        (["lines", "device", "adam"], 300),
        (["control", "local"], 300),
        (["control", "durable"], 400),
        (["calls", "local"], 150),
        (["calls", "durable"], 500),
        (["random", "local", RANDOM, "sgd"], RANDOM),
        (["random", "local", RANDOM, "assign"], RANDOM),
        (["random", "durable", RANDOM // 3, "sgd"], RANDOM // 3),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, list) else "",
)
def test_a_call_is_whole(arguments, least, tmp_path, memory):
    # What comes at a line does not depend on the disk; much of what comes at random moments hits a wait for it.
    status, text = run(*arguments, folder=tmp_path if arguments[0] == "random" else memory)
    assert status == 0, text[-2000:]
    assert int(text.splitlines()[-1]) >= least, "too few exceptions or calls came to say anything"


def test_workers_in_step(tmp_path):
    env = {"INTERRUPTED": str(tmp_path / "interrupted")}
    for text in workers.run(2, PROGRAMS, "step", "dist_sync", 150, env=env):
        assert int(text.splitlines()[-1]) >= 20, "too few exceptions came to say anything"


def test_a_handler_may_pull_while_workers_are_told_of_a_refused_call():
    for text in workers.run(2, PROGRAMS, "pulls", "dist_sync"):
        assert int(text.splitlines()[-1]) >= 100, "too few pulls came to say anything"


@pytest.mark.release
@pytest.mark.parametrize("arguments", [["lines", "local", "sgd"], ["random", "local", "2000", "sgd"]], ids="-".join)
def test_a_call_that_is_not_shielded_would_be_seen(arguments, tmp_path):
    status, text = run(*arguments, "planted", folder=tmp_path)
    assert status == 1
    assert "AssertionError" in text


def test_sigint_is_what_raises_keyboard_interrupt_here():
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
