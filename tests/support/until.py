"""Waiting for what other threads and processes do."""

import time

LIMIT_S = 600
"""How long a test waits before it takes something for hung: for long, since the machine may be busy.

It is shorter than pytest's own limit, so that a test can still show what its processes have printed.
"""


def until(condition):
    """Wait until a condition holds.

    Raises:
        AssertionError: it does not hold within the limit.
    """
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, f"timed out after {LIMIT_S} s"
        time.sleep(0.01)
