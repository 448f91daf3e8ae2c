def first_rows(
    is_normal: bool,
    x: float,
    y: float,
    key: int,
    ids: int,
    count: int,
    out: int,
    columns: int,
    is_double: bool,
    /,
) -> None: ...
def find(slots: int, num_slots: int, held: int, ids: int, count: int, places: int, /) -> int: ...
def add(slots: int, num_slots: int, held: int, ids: int, count: int, first: int, /) -> None: ...
def gather(source: int, row_nbytes: int, places: int, count: int, out: int, /) -> None: ...
