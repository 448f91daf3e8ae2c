from collections.abc import Sequence
from typing import Any

def run_columns(
    dtype: int,
    outs: list[bytes],
    parts: list[bytes],
    counts: bytes,
    past_cache: int,
    start: int,
    stop: int,
    step: tuple[bytes, float, bool, list[bytes]] | None = None,
    /,
) -> None: ...
def addresses(arrays: Sequence[Any], type: type, format: str, shapes: list[Any], writable: bool, /) -> bytes | None: ...
def use(ndarray: Any, tensor: Any, parameter: Any, api: Any, is_neg: Any, increment_version: Any, /) -> None: ...
def look(
    entries: dict[Any, Any], keys: Any, values: Any, outs: Any, step: Any, own_steps: Any, /
) -> Batch | list[Cell] | None: ...

class Cell:
    __slots__ = ("is_new", "state", "value", "version")
    value: Any
    state: dict[str, Any]
    version: int
    is_new: bool

class Batch:
    numel: int
    nbytes: int
    def commit(self, lock: Any, shard: Any, rule: Any, /) -> bool: ...
    def begin(self, past_cache: bool, /) -> bool: ...
    def run(self, start: int, stop: int, /) -> None: ...
    def finish(self) -> None: ...
    def moved(self) -> Any: ...
