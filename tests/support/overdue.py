"""Timeouts of parameter servers that fire in tests without a wait for them, whatever the machine is busy with."""

from contextlib import contextmanager
from unittest import mock

from tensorkv.engines.ps.client import rpc


@contextmanager
def overdue(attempt_s=10.0):
    """Have requests of this process give up after their first attempt, as if their timeout had passed.

    Args:
        attempt_s: how long an attempt waits for a server that does not answer.
    """
    is_overdue = property(lambda call: True)
    with mock.patch.object(rpc._Call, "is_overdue", is_overdue), mock.patch.object(rpc, "_RESEND_S", attempt_s):
        yield
