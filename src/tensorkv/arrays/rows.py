"""Rows: a selection of a tensor's rows, the sparse form of a push and of a pull."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, InitVar, dataclass
from typing import Any

import numpy as np
import torch

from tensorkv.compiled import _tables
from tensorkv.errors import ArgumentError, ArrayTypeError, ValueMismatchError, naming, show

from . import interop
from .arguments import check_int
from .rowinit import RowInit


@dataclass(slots=True, eq=False)
class Rows:
    """Some rows of a tensor with ``num_rows`` rows; the others are zero (in a push: not touched).

    Args:
        ids: which rows, shape ``(n,)``, integers in ``[0, num_rows)``, any order, repeats allowed; an array or a list.
        values: the rows, shape ``(n, ...)``, any dtype that a store holds.
        num_rows: rows of the whole tensor.
        init: for ``KVStore.init``, what the other rows hold until they are pushed: ``"normal"`` or ``"uniform"``
            (floating-point numbers that depend on the seed, the key, the row's id and the column alone), or a number.
            None: zeros.
        mean, std: of the normal distribution (0 and 1 by default).
        a, b: bounds of the uniform distribution (0 and 1 by default).
        seed: of both distributions, an int in ``[0, 2**64)`` (0 by default).

    Raises:
        ArrayTypeError: ids are not integers, or values are not an array.
        ValueMismatchError: ids and values differ in length, or an id is out of range.
        ArgumentError: ``num_rows``, ``init`` or a number that belongs to it is invalid.

    >>> import numpy as np
    >>> rows = Rows(np.array([4, 1, 4]), np.array([[1.0], [2.0], [3.0]]), num_rows=6)
    >>> rows.shape
    (6, 1)
    >>> merged = rows.merged()
    >>> merged.ids.tolist(), merged.values.tolist()
    ([1, 4], [[2.0], [4.0]])
    """

    ids: Any
    values: Any
    num_rows: int
    _: KW_ONLY
    init: Any = None
    mean: InitVar[float | None] = None
    std: InitVar[float | None] = None
    a: InitVar[float | None] = None
    b: InitVar[float | None] = None
    seed: InitVar[int | None] = None

    def __post_init__(
        self, mean: float | None, std: float | None, a: float | None, b: float | None, seed: int | None
    ) -> None:
        with naming("Rows"):
            numbers = {"mean": mean, "std": std, "a": a, "b": b}
            if self.init is not None and not isinstance(self.init, RowInit):
                self.init = RowInit.of(self.init, numbers, seed)
            elif seed is not None or any(number is not None for number in numbers.values()):
                raise ArgumentError('got parameters of a distribution without init; give init="normal" or "uniform"')
            if isinstance(self.ids, list | tuple | range):
                self.ids = _listed_ids("ids", self.ids)
            self.num_rows = check_int("num_rows", self.num_rows, 0)
            take_rows(self)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor: ``(num_rows, ...)``."""
        return (self.num_rows, *self.values.shape[1:])

    @property
    def dtype(self) -> str:
        """Name of the values' dtype, such as ``"float32"``."""
        return interop.dtype_name(interop.take(self.values).dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows held, without the ids."""
        return int(self.values.nbytes)

    def merged(self) -> Rows:
        """Return torch Rows with unique, sorted ids; values of equal ids are summed in the order given."""
        return merge([take_rows(self)])

    def to(self, device: torch.device | str) -> Rows:
        """Return torch Rows on a device."""
        taken = take_rows(self)
        try:
            target = torch.device(device)
        except (RuntimeError, TypeError):
            raise ArgumentError(
                f'Rows.to: device is {show(device)}; expected a torch.device, or a str such as "cpu"'
            ) from None
        return unchecked_rows(taken.ids.to(target), taken.values.to(target), self.num_rows, taken.init)

    def to_dense(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the whole tensor, shape ``(num_rows, ...)``, rows that are not here being zero.

        Args:
            dtype: of the result and of the sums of repeated ids (default: the values').

        >>> Rows(torch.tensor([2]), torch.ones(1, 2), num_rows=3).to_dense().tolist()
        [[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]]
        """
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise ArgumentError(f"Rows.to_dense: dtype is {show(dtype)}; expected a torch.dtype, or None")
        rows = merge([take_rows(self)], dtype)
        dense = torch.zeros(self.shape, dtype=rows.values.dtype, device=rows.values.device)
        interop.signed(dense)[rows.ids] = interop.signed(rows.values)
        return dense

    def __repr__(self) -> str:
        return f"Rows({len(self.ids)} of {self.num_rows} rows, shape {self.shape}, {self.dtype})"


def is_rows(thing: Any) -> bool:
    """Return whether this is ``Rows`` or a torch sparse COO tensor."""
    return isinstance(thing, Rows) or (isinstance(thing, torch.Tensor) and thing.layout is torch.sparse_coo)


def take_rows(thing: Any) -> Rows:
    """Return Rows of torch tensors that share memory with ``Rows`` of any library or a sparse COO tensor.

    Raises:
        ArrayTypeError, ValueMismatchError: as for Rows.
    """
    if not isinstance(thing, Rows):
        return _take_coo(thing)
    ids, values = _take_part(thing.ids, "ids"), _take_part(thing.values, "values")
    num_rows = check_int("num_rows", thing.num_rows, 0)
    if interop.family(ids.dtype) != "int" or ids.dtype is torch.uint64:
        raise ArrayTypeError(f"ids have dtype {interop.dtype_name(ids.dtype)}; expected integers, such as int64")
    if ids.ndim != 1 or values.ndim < 1 or len(ids) != len(values):
        raise ValueMismatchError(
            f"ids have shape {tuple(ids.shape)} and values {tuple(values.shape)}; "
            "expected (n,) and (n, ...) with the same n"
        )
    _check_range(ids, num_rows)
    if thing.init is not None:
        thing.init.check_dtype(values.dtype)
    if ids is thing.ids and values is thing.values and num_rows is thing.num_rows and ids.dtype is torch.int64:
        return thing
    return unchecked_rows(ids.long(), values, num_rows, thing.init)


def _take_part(array: Any, name: str) -> torch.Tensor:
    try:
        return interop.clean(interop.take(array))
    except ArrayTypeError as error:
        raise ArrayTypeError(f"{name} {error}") from None


def _take_coo(tensor: torch.Tensor) -> Rows:
    if tensor.sparse_dim() != 1:
        raise ArrayTypeError(
            f"is a sparse COO tensor with {tensor.sparse_dim()} sparse dimensions; expected one (whole rows)"
        )
    ids, values = tensor.detach()._indices()[0], interop.clean(interop.take(tensor.detach()._values()))
    _check_range(ids, tensor.shape[0])
    return unchecked_rows(ids, values, tensor.shape[0])


def unchecked_rows(ids: Any, values: Any, num_rows: int, init: RowInit | None = None) -> Rows:
    """Return Rows of ids and values that are known to fit each other and the rows, without a look at them."""
    rows = object.__new__(Rows)
    rows.ids, rows.values, rows.num_rows, rows.init = ids, values, num_rows, init
    return rows


def _check_range(ids: torch.Tensor, num_rows: int) -> None:
    if len(ids):
        low, high, _ = _scan(ids)
        _check_bounds(low, high, num_rows)


def _check_bounds(low: int, high: int, num_rows: int) -> None:
    if low < 0 or high >= num_rows:
        raise ValueMismatchError(
            f"row id {low if low < 0 else high} is out of range; there are rows 0 to {num_rows - 1}"
        )


def _scan(ids: torch.Tensor) -> tuple[int, int, bool]:
    """Return the least id, the largest, and whether they are unique and sorted; there is at least one."""
    if _tables is not None and ids.is_cpu and ids.dtype is torch.int64 and ids.is_contiguous():
        return _tables.scan(ids.data_ptr(), len(ids))
    # torch compares no unsigned integers.
    ids = ids.long()
    low, high = torch.aminmax(ids)
    return int(low), int(high), bool((ids[1:] > ids[:-1]).all())


def merge(parts: list[Rows], dtype: torch.dtype | None = None, *, may_share: bool = False, divisor: int = 1) -> Rows:
    """Sum torch Rows: unique, sorted ids; values of one id are added in the order given and then divided.

    Args:
        parts: at least one, all of one row shape.
        dtype: of the result (default: the first part's). float16 and bfloat16 are added in float32
            and rounded once.
        may_share: return the values of the only part themselves if its ids are unique, sorted and on the same device.
        divisor: of the sums, before they are rounded.

    Raises:
        ValueMismatchError: ids that another thread has changed since they were checked, and that name no rows.
    """
    first = parts[0].values
    dtype = first.dtype if dtype is None else dtype
    is_sum = len(parts) == 1 and divisor == 1 and first.dtype is dtype and parts[0].ids.device == first.device
    # The ids are always copies: rows are written where they say.
    if may_share and is_sum and first.is_contiguous() and _rises(own := parts[0].ids.clone()):
        return _checked(unchecked_rows(own, first, parts[0].num_rows, parts[0].init))
    wide = interop.accumulator(dtype)
    ids = torch.cat([part.ids.to(first.device) for part in parts])
    values = torch.cat([interop.signed(part.values.to(first.device, wide)) for part in parts])
    unique, places = torch.unique(ids, return_inverse=True)
    order = torch.arange(len(ids), device=ids.device)
    first = torch.empty_like(unique).scatter_reduce_(0, places, order, "amin", include_self=False)
    merged = values[first]
    if len(unique) < len(ids):
        again = first[places] != order
        if merged.is_cpu:
            merged.index_add_(0, places[again], values[again])
        else:
            add_by_turns(merged, places[again], values[again])
    merged = merged.view(wide)
    if divisor != 1:
        interop.divide(merged, divisor)
    return _checked(unchecked_rows(unique, merged.to(dtype), parts[0].num_rows, parts[0].init))


def _checked(rows: Rows) -> Rows:
    """Return rows with sorted ids, which are in range."""
    if len(rows.ids) and rows.ids.is_cpu:
        _check_bounds(int(rows.ids[0]), int(rows.ids[-1]), rows.num_rows)
    return rows


def _rises(ids: torch.Tensor) -> bool:
    """Return whether ids are unique and sorted."""
    return not len(ids) or _scan(ids)[2]


def add_by_turns(merged: torch.Tensor, places: torch.Tensor, values: torch.Tensor) -> None:
    """Add each value at its place, those of one place in the order given: first ones first, then second ones.

    On the CPU this is what ``index_add_`` does; on CUDA that adds in no fixed order.
    """
    order = torch.argsort(places, stable=True)
    _, counts = torch.unique_consecutive(places[order], return_counts=True)
    firsts = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    turns = torch.arange(len(order), device=places.device) - firsts
    for turn in range(int(counts.max())):
        picked = order[turns == turn]
        merged[places[picked]] += values[picked]


def take_ids(row_ids: Any, num_rows: int) -> torch.Tensor:
    """Return unique, sorted int64 row ids from an integer array of any shape, or a list of ints, nested or not.

    Raises:
        ArrayTypeError: not integers.
        ValueMismatchError: an id outside ``[0, num_rows)``.
    """
    if row_ids is None:
        raise ArrayTypeError("row_ids= is missing; give the ids of the rows to pull")
    if isinstance(row_ids, list | tuple | range):
        row_ids = _listed_ids("row_ids", row_ids)
    ids = _take_part(row_ids, "row_ids")
    if interop.family(ids.dtype) != "int" or ids.dtype is torch.uint64:
        raise ArrayTypeError(f"row_ids have dtype {interop.dtype_name(ids.dtype)}; expected integers")
    # A copy, since another thread may change the caller's.
    listed = ids.to("cpu", torch.int64, copy=True).reshape(-1)
    if not len(listed):
        return listed
    low, high, rises = _scan(listed)
    _check_bounds(low, high, num_rows)
    return listed if rises else torch.unique(listed)


def _listed_ids(name: str, ids: Sequence[Any]) -> np.ndarray[Any, Any]:
    """Return a list of ints, or of lists of ints of one length, as an array.

    Raises:
        ArrayTypeError: something else.
        ValueMismatchError: an int that no row can have.
    """
    # Of objects, since NumPy would take True for 1 and "1" for a character.
    flat = np.asarray(ids, object).ravel().tolist()
    if any(isinstance(each, bool) or not isinstance(each, int | np.integer) for each in flat):
        raise ArrayTypeError(f"{name} is {show(ids)}; expected integers, in an array or a list")
    try:
        return np.array(ids, np.int64)
    except OverflowError:
        raise ValueMismatchError(f"{name} is {show(ids)}; a row id is out of range of int64") from None
