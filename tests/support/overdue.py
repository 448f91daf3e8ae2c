"""Timeouts of parameter servers that fire in tests without a wait for them, whatever the machine is busy with."""

from contextlib import contextmanager
from unittest import mock

from tensorkv.engines.ps.client import rpc
from tensorkv.engines.ps.server.wait import Condition


@contextmanager
def overdue(attempt_s=10.0):
    """Have requests of this process give up after their first attempt, as if their timeout had passed.

    A server of this process says soon that it still waits, as to a client whose time is nearly over.

    Args:
        attempt_s: how long an attempt waits for a server that does not answer.
    """
    is_overdue, set_poll_timeout = property(lambda call: True), Condition.set_poll_timeout
    with (
        mock.patch.object(rpc._Call, "is_overdue", is_overdue),
        mock.patch.object(rpc, "_RESEND_S", attempt_s),
        mock.patch.object(Condition, "set_poll_timeout", lambda condition, seconds: set_poll_timeout(condition, 0.1)),
    ):
        yield
