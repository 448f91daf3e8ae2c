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
