from typing import Any, Literal

from tensorkv.arrays.spec import KeySpec

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
def use(
    ndarray: Any,
    tensor: Any,
    parameter: Any,
    api: Any,
    is_neg: Any,
    increment_version: Any,
    viewed: set[type],
    samples: list[Any],
    tensors: list[Any],
    negated: list[Any],
    /,
) -> None: ...
def look(
    entries: dict[Any, Any], keys: Any, values: Any, outs: Any, step: Any, own_steps: Any, flat: bool = False, /
) -> Batch | None: ...
def place_states(
    cells: list[Any], names: tuple[str, ...], columns: tuple[Any, ...], steps: Any, make: Any, /
) -> None: ...

class Cell:
    __slots__ = ("borders", "digest", "frozen", "incomplete", "is_new", "spec", "state", "value", "version", "whole")
    is_blank: bool
    value: Any
    digest: int
    whole: Any
    borders: Any
    frozen: Any
    incomplete: Any
    state: dict[str, Any]
    spec: KeySpec
    version: int
    is_new: bool

class Batch:
    past_cache: bool
    numel: int
    nbytes: int
    unready: list[Any] | None
    keys: tuple[Any, ...]
    cells: list[Any]
    part_counts: bytes
    scale: float
    squares: tuple[bytes, float]
    sums: Any
    def begin(self, past_cache: bool, entries: Any = ..., step: Any = ..., /) -> bool: ...
    def run(self, start: int, stop: int, /) -> None: ...
    def finish(self, is_update: bool = ..., /) -> None: ...
    def sum_pieces(
        self, pieces: bytes, targets: list[bytes], wide: bool = False, start: int = 0, stop: int = ..., /
    ) -> None: ...
    def copy_pieces(
        self, pieces: bytes, sources: list[bytes], columns_as: int = 0, start: int = 0, stop: int = ..., /
    ) -> None: ...
    def update_pieces(
        self, pieces: bytes, parts: list[bytes], wide: bool = False, divisors: bytes | None = None, /
    ) -> None: ...
    def add_squares(self, rescale: float, start: int, stop: int, /) -> None: ...
    def average(self) -> bool: ...
    def part_column(self, pieces: bytes, /) -> bytes | None: ...
    def describe(self, seed: int, begin: str, most: int, /) -> tuple[int, bytes | None]: ...
    def packed(self) -> tuple[bytes, bytes, int]: ...
    def take_sums(self, flat: Any, /) -> None: ...

class SharedReduce:
    phase: Literal["stage_in", "agree", "reduce", "decide", "update", "fill_outs", "done"]
    squares: tuple[bytes, float]
    def __init__(
        self,
        rank: int,
        size: int,
        room: int,
        spin_s: float,
        soon_s: float,
        stop: int,
        entered: bytes,
        agreed: int,
        entries: int,
        entry_step: int,
        slots: int,
        row: int,
        counts_at: int,
        words: int,
        data: int,
        uses: int,
        /,
    ) -> None: ...
    def begin(self, batch: Batch, number: int, entry: int, rescale: float | None = None, /) -> None: ...
    def advance(self) -> tuple[bytes, int, list[int] | None] | bool | None: ...
    def step(self) -> tuple[bytes, int, list[int] | None] | bool | None: ...
    def agree(self, members: list[int], /) -> None: ...
    def count_nonfinite(self) -> dict[int, int]: ...
    def leave_out(self, which: bytes, /) -> None: ...
    def decide(self, scale: float, /) -> None: ...
    def refuse(self) -> None: ...

class Record:
    calls: int
    nbytes: int
    seconds: float
    def add(self, seconds: float, keys: list[Any], nbytes: list[int], /) -> None: ...
    def forget(self, keys: list[Any], /) -> None: ...
    def of_keys(self) -> dict[Any, Record]: ...

class ShardFields:
    _entries: Any
    _steps: Any
    _lock: Any
    _looks: bool
    averages: bool
    _decides: bool
    log: Any

class Call:
    verb: str
    key: Any
    value: Any
    out: Any
    priority: Any
    like: Any
    ignore_sparse: bool
    values: Any
    def __init__(
        self,
        record: Record | None,
        verb: str,
        key: Any,
        value: Any,
        out: Any,
        priority: Any,
        like: Any = None,
        ignore_sparse: bool = False,
        flat: bool = False,
        /,
    ) -> None: ...
    def look(self, entries: dict[Any, Any], shard: ShardFields | None = None, /) -> Batch | None: ...
    def run(self, shard: ShardFields, /) -> Batch | Literal[True] | None: ...
    def end(self) -> Any: ...
