"""Waiting for versions: a pull of what somebody else is going to push."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from tensorkv.arrays.arguments import Key, check_timeout

from .engines import Engine
from .errors import ArgumentError, WaitTimeoutError, naming, quote, show

# How long a pull waits for a version, and how often it looks where an engine has no better way.
WAIT_S = 60.0
_LOOK_S = 0.001


def wait_for(engine: Engine, keys: Sequence[Key], min_version: int, timeout_s: float | None) -> None:
    """Return when every key has had so many updates.

    Args:
        engine: of the store; one that has a ``wait_for`` of its own waits without looking again and again.
        keys: to wait for.
        min_version: how many updates.
        timeout_s: how long to wait (None: ``WAIT_S``).

    Raises:
        ArgumentError: numbers that are none.
        KeyNotFoundError: a key that was not initialised.
        WaitTimeoutError: the version did not come in time.
    """
    if type(min_version) is not int:
        raise ArgumentError(f"pull: min_version is {show(min_version)}; expected an int")
    with naming("pull"):
        seconds = WAIT_S if timeout_s is None else check_timeout(timeout_s)
    wait: Any = getattr(engine, "wait_for", None)
    if wait is not None:
        wait(keys, min_version, seconds)
        return
    deadline = time.monotonic() + seconds
    for key in keys:
        while (version := engine.info(key).version) < min_version:
            if time.monotonic() >= deadline:
                raise WaitTimeoutError(
                    f"pull({quote(key)}): version {min_version} has not come within {seconds:g} s; it is {version}"
                )
            time.sleep(_LOOK_S)
