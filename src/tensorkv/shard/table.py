"""Table: a tensor of which only the rows that were ever written are held; the others are as its rule says, or zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from tensorkv.arrays import interop
from tensorkv.arrays.arguments import Key
from tensorkv.arrays.rowinit import RowInit
from tensorkv.arrays.rows import Rows
from tensorkv.compiled import _tables

from .fused import AVERAGE, average_of, number_in
from .index import new_index


class Table:
    """Rows by id, with room for tables of billions of rows of which few are ever seen.

    Rows never move but when the table grows, which costs O(1) copies for each row. ``columns`` holds, beside the
    values, the optimizer's state of each row under its name; a column grows with the table.

    Args:
        num_rows, row_shape, dtype: of the whole tensor.
        device: of the rows; ids are on the CPU.
        init: what rows hold that were never written (None: zeros).
        key: of the table, on which random first values depend.

    >>> table = Table(num_rows=10**9, row_shape=torch.Size([2]), dtype=torch.float32)
    >>> table.write(torch.tensor([7]), torch.ones(1, 2))
    >>> table.read(torch.tensor([6, 7])).tolist(), len(table)
    ([[0.0, 0.0], [1.0, 1.0]], 1)
    """

    def __init__(
        self,
        num_rows: int,
        row_shape: torch.Size,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        init: RowInit | None = None,
        key: Key = "",
    ) -> None:
        self.num_rows = num_rows
        self.row_shape = row_shape
        self.dtype = dtype
        self.device = torch.device(device)
        self.init, self._key = init, key
        self._index = new_index()
        self._columns: dict[str, torch.Tensor] = {}
        self._fills: dict[str, float] = {}
        self.add_column("", dtype, 0)

    @classmethod
    def of(cls, rows: Rows, device: torch.device | str, key: Key = "") -> Table:
        """Return a table that holds these rows (merged), and starts the others by their rule."""
        values = rows.values
        table = cls(rows.num_rows, values.shape[1:], values.dtype, device, init=rows.init, key=key)
        table.write(rows.ids, values.to(device))
        return table

    def empty(self) -> Table:
        """Return a table of the same kind that holds no rows."""
        return Table(self.num_rows, self.row_shape, self.dtype, self.device, init=self.init, key=self._key)

    def copy(self) -> Table:
        """Return a copy of the values, without the optimizer's state."""
        return Table.of(self.to_rows(), self.device, self._key)

    def __len__(self) -> int:
        return len(self._index)

    @property
    def ids(self) -> torch.Tensor:
        """The ids held, sorted, int64, shape ``(n,)``; for reading only."""
        return self._index.ids()

    @property
    def columns(self) -> list[str]:
        """Names of the optimizer's state columns."""
        return [name for name in self._columns if name]

    @property
    def nbytes(self) -> int:
        """Bytes of the values held, without ids and state."""
        return len(self) * self.row_shape.numel() * self.dtype.itemsize

    def add_column(self, name: str, dtype: torch.dtype, fill: float) -> None:
        """Hold one more row per id, ``fill`` everywhere (see ``fill_with``); do nothing if the name exists.

        The average of a row begins as the row.
        """
        if name in self._columns:
            return
        room = len(self._columns[""]) if self._columns else 0
        if name == AVERAGE:
            column = self._columns[""].clone()
        else:
            column = fill_with(torch.empty((room, *self.row_shape), dtype=dtype, device=self.device), fill)
        self._columns[name] = column
        self._fills[name] = fill

    def drop_columns(self, only: str | None = None) -> None:
        """Forget the optimizer's state, or the column of one name."""
        for name in self.columns:
            if only in (None, name):
                del self._columns[name], self._fills[name]

    def read(self, ids: torch.Tensor, column: str = "", out: torch.Tensor | None = None) -> torch.Tensor:
        """Return copies of rows, shape ``(n, *row_shape)``, in the order of ``ids``; absent ones as they start.

        Args:
            ids: of the rows.
            column: of the optimizer's state; ``""`` for the values.
            out: contiguous memory for the rows on the table's device (None: new memory).
        """
        source, own = self._columns[column], ids.cpu()
        places, missing = self._index.find(own)
        rows = source.new_empty((len(own), *self.row_shape)) if out is None else out
        if missing < len(own):
            _gather(source, places, rows)
        if missing:
            absent = places < 0
            interop.signed(rows)[absent.to(self.device)] = interop.signed(self._first(own[absent], column))
        return rows

    def write(self, ids: torch.Tensor, rows: torch.Tensor, column: str = "") -> None:
        """Replace rows; ids are unique, and those not held yet are added."""
        places = self._hold(ids.cpu(), starts=column != "").to(self.device)
        target = self._columns[column]
        interop.signed(target).index_copy_(0, places, interop.signed(rows.to(target.device, target.dtype)))

    def addresses(self, ids: torch.Tensor) -> dict[str, bytes]:
        """Return where the rows of each column are in the CPU's memory until the table grows, as columns of addresses.

        Rows that are not held yet are added.
        """
        places = self._hold(ids, starts=True).numpy().view(np.uint64)
        return {name: address_rows(column, places) for name, column in self._columns.items()}

    def fill(self, column: str) -> float:
        """Return what a column of state holds for a row that was never written."""
        return self._fills[column]

    def take_columns(self, other: Table) -> None:
        """Copy another table's state columns, for the rows that it holds."""
        for name in other.columns:
            self.add_column(name, other._columns[name].dtype, other._fills[name])
            self.write(other.ids, other.read(other.ids, name), name)

    def to(self, device: torch.device) -> Table:
        """Bring every row and its state to a device; ids stay on the CPU."""
        self.device = device
        self._columns = {name: column.to(device) for name, column in self._columns.items()}
        return self

    def to_rows(self) -> Rows:
        """Return a copy of every row held, and the rule of the others."""
        return Rows(self.ids.clone(), self.read(self.ids), self.num_rows, init=self.init)

    def _first(self, ids: torch.Tensor, column: str) -> torch.Tensor:
        """Return what rows hold that were never written."""
        if self.init is not None and column in ("", AVERAGE):
            return self.init.rows(self._key, ids, self.row_shape, self.dtype).to(self.device)
        source = self._columns[column]
        return fill_with(source.new_empty((len(ids), *self.row_shape)), self._fills[column])

    def _hold(self, ids: torch.Tensor, *, starts: bool) -> torch.Tensor:
        """Return the places of rows; those not held yet are added (``starts``: with their first values)."""
        places, missing = self._index.find(ids)
        if missing:
            absent, count = places < 0, len(self)
            new = ids[absent]
            self._grow(count + missing)
            if starts and self.init is not None:
                first = self._first(new, "")
                for name in {"", AVERAGE} & self._columns.keys():
                    self._columns[name][count : count + missing] = first
            self._index.add(new)
            places[absent] = torch.arange(count, count + missing, device="cpu")
        return places

    def _grow(self, needed: int) -> None:
        room = len(self._columns[""])
        if needed <= room:
            return
        larger = min(max(needed, room + room // 2), self.num_rows)
        for name, column in self._columns.items():
            grown = column.new_empty((larger, *self.row_shape))
            interop.signed(grown)[:room] = interop.signed(column)
            fill_with(grown[room:], self._fills[name])
            self._columns[name] = grown


def _gather(source: torch.Tensor, places: torch.Tensor, out: torch.Tensor) -> None:
    """Copy rows; where a place is negative, anything."""
    if _tables is None or not source.is_cpu:
        at = places.clamp(min=0).to(source.device)
        torch.index_select(interop.signed(source), 0, at, out=interop.signed(out))
    else:
        _tables.gather(source.data_ptr(), out[:1].nbytes, places.data_ptr(), len(places), out.data_ptr())


def address_rows(tensor: torch.Tensor, places: np.ndarray[Any, np.dtype[np.uint64]]) -> bytes:
    """Return the addresses of some rows of a contiguous CPU tensor."""
    row_nbytes = tensor[:1].nbytes
    return (places * np.uint64(row_nbytes) + np.uint64(tensor.data_ptr())).tobytes()


class Columns:
    """The rows of a value and of its state, the same for a dense tensor and for a Table."""

    def __init__(self, value: torch.Tensor | Table, state: dict[str, torch.Tensor]) -> None:
        self._value = value
        self._state = state

    def names(self) -> list[str]:
        """Names of the states that have a row for each of the value's."""
        if isinstance(self._value, Table):
            return self._value.columns
        return list(self._held())

    def addresses(self, ids: torch.Tensor, states: Mapping[str, float]) -> dict[str, bytes]:
        """Return where rows of the value (``""``) and of its states are in the CPU's memory, as columns of addresses.

        Args:
            ids: of the rows, int64 on the CPU.
            states: that there are to be, and what a new one holds everywhere.
        """
        value = self._value
        if isinstance(value, Table):
            for name, fill in states.items():
                value.add_column(name, value.dtype, fill)
            return value.addresses(ids)
        for name, fill in states.items():
            if name not in self._state:
                self._state[name] = fill_with(torch.empty_like(value), fill)
        places = ids.numpy().view(np.uint64)
        return {name: address_rows(each, places) for name, each in {"": value, **self._held()}.items()}

    def add_average(self) -> None:
        """Have an average for each row, which begins as the row."""
        if isinstance(self._value, Table):
            self._value.add_column(AVERAGE, self._value.dtype, 0.0)
        elif AVERAGE not in self._state:
            self._state[AVERAGE] = average_of(self._value)

    def _held(self) -> dict[str, torch.Tensor]:
        shape = self._value.shape  # type: ignore[union-attr]
        return {name: tensor for name, tensor in self._state.items() if tensor.shape == shape}

    def read_value(self, ids: torch.Tensor) -> torch.Tensor:
        """Return copies of the value's rows."""
        return self._value.read(ids) if isinstance(self._value, Table) else self._value[ids]

    def write_value(self, ids: torch.Tensor, rows: torch.Tensor) -> None:
        """Replace rows of the value."""
        if isinstance(self._value, Table):
            self._value.write(ids, rows)
        else:
            self._value[ids] = rows

    def read(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        """Return copies of a state's rows."""
        return self._value.read(ids, name) if isinstance(self._value, Table) else self._state[name][ids]

    def write(self, name: str, ids: torch.Tensor, rows: torch.Tensor, fill: float) -> None:
        """Replace rows of a state, which begins as ``fill`` everywhere if it is new."""
        if isinstance(self._value, Table):
            self._value.add_column(name, rows.dtype, fill)
            self._value.write(ids, rows, name)
        else:
            if name not in self._state:
                self._state[name] = fill_with(torch.empty_like(self._value), fill)
            self._state[name][ids] = rows


def fill_with(tensor: torch.Tensor, number: float) -> torch.Tensor:
    """Set every element, of complex ones both parts: so do torch's optimizers begin their state."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    real.fill_(number_in(real.dtype, number))
    return tensor
