"""Blocks outside of torch's inference and dispatch modes.

A tensor that is made in inference mode cannot be changed later, and one that is made under ``FakeTensorMode`` has no
memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

P = ParamSpec("P")
R = TypeVar("R")


def outside_modes() -> AbstractContextManager[None]:
    """Return a block outside of torch's inference and dispatch modes."""
    # Enabled modes are in a stack of each thread, for which torch has no public function.
    if torch.is_inference_mode_enabled() or torch._C._len_torch_dispatch_stack():
        return _outside_modes()
    return nullcontext()


@contextmanager
def _outside_modes() -> Iterator[None]:
    with torch.inference_mode(False), _disable_current_modes():
        yield


def runs_outside_modes(method: Callable[P, R]) -> Callable[P, R]:
    """Have a function run in a block of ``outside_modes``."""

    @wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with outside_modes():
            return method(*args, **kwargs)

    return call
