"""Run code outside of torch's inference and dispatch modes.

A tensor that is made in inference mode cannot be changed later, and one that is made under ``FakeTensorMode`` has no
memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

from ._compat import num_dispatch_modes, without_dispatch_modes

P = ParamSpec("P")
R = TypeVar("R")


def outside_modes() -> AbstractContextManager[None]:
    """Return a block outside of torch's inference and dispatch modes."""
    if torch.is_inference_mode_enabled() or num_dispatch_modes():
        return _outside_modes()
    return nullcontext()


@contextmanager
def _outside_modes() -> Iterator[None]:
    with torch.inference_mode(False), without_dispatch_modes():
        yield


def runs_outside_modes(method: Callable[P, R]) -> Callable[P, R]:
    """Have a function run in a block of ``outside_modes``."""

    @wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with outside_modes():
            return method(*args, **kwargs)

    return call
