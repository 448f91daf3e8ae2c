from collections.abc import Sequence
from typing import Any

def sum_columns(
    outs: list[bytes],
    parts: list[bytes],
    counts: bytes,
    itemsize: int,
    past_cache: int,
    start: int,
    stop: int,
    /,
) -> None: ...
def addresses(arrays: Sequence[Any], type: type, format: str, shapes: list[Any], writable: bool, /) -> bytes | None: ...
def exchange(
    lock: Any,
    rule: Any,
    shard: Any,
    entry: Any,
    tensor: Any,
    address: int,
    nbytes: int,
    source: Any,
    target: Any,
    /,
) -> bool: ...
