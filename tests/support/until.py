"""Waiting for what other threads and processes do."""

import time


def until(condition, timeout_s=60):
    """Wait until a condition holds.

    Raises:
        AssertionError: it does not hold after the timeout, which is long enough for a busy machine.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"timed out after {timeout_s} s"
        time.sleep(0.01)
