from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

def defer(work: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R: ...
def after_fork() -> None: ...
