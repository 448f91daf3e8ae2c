from typing import Any

def digest(values: Any, itemsize: int, first: int, /) -> int: ...
def find(
    old: Any, new: Any, itemsize: int, first: int, indices: Any, values: Any, index_size: int, /
) -> tuple[int, int, int] | None: ...
def exchange(held: Any, itemsize: int, indices: Any, index_size: int, values: Any, /) -> int: ...
def digest_many(addresses: Any, numels: Any, itemsizes: Any, firsts: Any, digests: Any, /) -> None: ...
def find_many(
    old: Any,
    new: Any,
    numels: Any,
    itemsizes: Any,
    firsts: Any,
    counts: Any,
    gone: Any,
    come: Any,
    indices: Any,
    values: Any,
    /,
) -> tuple[int, int]: ...
def exchange_many(
    addresses: Any,
    numels: Any,
    itemsizes: Any,
    counts: Any,
    index_places: Any,
    value_places: Any,
    indices: Any,
    values: Any,
    gone: Any,
    /,
) -> None: ...
