"""Table: a tensor of which only the rows that were ever written are held; the others read as zero."""

from __future__ import annotations

import torch

from tensorkv.arrays import interop
from tensorkv.arrays.rows import Rows


class Table:
    """Rows by id, with room for tables of billions of rows of which few are ever seen.

    Ids are kept sorted beside the place of their row, so a look-up is a binary search:
    O(q log n) for q of n rows. Rows themselves never move; adding m new ones costs O(n) copies of
    8-byte ids and O(m) of rows. ``columns`` holds, beside the values, the optimizer's state of each
    row under its name; a column grows with the table.

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
    ) -> None:
        self.num_rows = num_rows
        self.row_shape = row_shape
        self.dtype = dtype
        self.device = torch.device(device)
        self._ids = torch.empty(0, dtype=torch.int64, device="cpu")
        self._places = torch.empty(0, dtype=torch.int64, device="cpu")
        self._columns: dict[str, torch.Tensor] = {}
        self._fills: dict[str, float] = {}
        self.add_column("", dtype, 0)

    @classmethod
    def of(cls, rows: Rows, device: torch.device | str) -> Table:
        """Return a table that holds these rows (merged)."""
        table = cls(rows.num_rows, rows.values.shape[1:], rows.values.dtype, device)
        table.write(rows.ids, rows.values.to(device))
        return table

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def ids(self) -> torch.Tensor:
        """The ids held, sorted, int64, shape ``(n,)``; for reading only."""
        return self._ids

    @property
    def columns(self) -> list[str]:
        """Names of the optimizer's state columns."""
        return [name for name in self._columns if name]

    @property
    def nbytes(self) -> int:
        """Bytes of the values held, without ids and state."""
        return len(self) * self.row_shape.numel() * self.dtype.itemsize

    def add_column(self, name: str, dtype: torch.dtype, fill: float) -> None:
        """Hold one more row per id, ``fill`` everywhere (see ``fill_with``); do nothing if the name exists."""
        if name in self._columns:
            return
        room = len(self._columns[""]) if self._columns else 0
        column = torch.empty((room, *self.row_shape), dtype=dtype, device=self.device)
        self._columns[name] = fill_with(column, fill)
        self._fills[name] = fill

    def drop_columns(self) -> None:
        """Forget the optimizer's state."""
        for name in self.columns:
            del self._columns[name], self._fills[name]

    def read(self, ids: torch.Tensor, column: str = "") -> torch.Tensor:
        """Return copies of rows, shape ``(n, *row_shape)``, in the order of ``ids``; absent ones hold the fill."""
        source = self._columns[column]
        rows = fill_with(source.new_empty((len(ids), *self.row_shape)), self._fills[column])
        held, places = self._find(ids)
        interop.signed(rows)[held] = interop.signed(source)[places]
        return rows

    def write(self, ids: torch.Tensor, rows: torch.Tensor, column: str = "") -> None:
        """Replace rows; ids are unique, and those not held yet are added."""
        self._insert(ids)
        _, places = self._find(ids)
        target = self._columns[column]
        interop.signed(target)[places] = interop.signed(rows.to(target.dtype))

    def fill(self, column: str) -> float:
        """Return what a column holds for a row that was never written."""
        return self._fills[column]

    def take_columns(self, other: Table) -> None:
        """Copy another table's state columns, for the rows that it holds."""
        for name in other.columns:
            self.add_column(name, other._columns[name].dtype, other._fills[name])
            self.write(other._ids, other.read(other._ids, name), name)

    def to(self, device: torch.device) -> Table:
        """Bring every row and its state to a device; ids stay on the CPU."""
        self.device = device
        self._columns = {name: column.to(device) for name, column in self._columns.items()}
        return self

    def to_rows(self) -> Rows:
        """Return a copy of every row held."""
        return Rows(self._ids.clone(), self.read(self._ids), self.num_rows)

    def _find(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ids = ids.cpu()
        if not len(self._ids):
            return torch.zeros(len(ids), dtype=torch.bool, device=self.device), self._places.to(self.device)
        spots = torch.searchsorted(self._ids, ids).clamp_(max=len(self._ids) - 1)
        held = self._ids[spots] == ids
        return held.to(self.device), self._places[spots[held]].to(self.device)

    def _insert(self, ids: torch.Tensor) -> None:
        held, _ = self._find(ids)
        new = ids.cpu()[~held.cpu()]
        if not len(new):
            return
        count = len(self)
        self._grow(count + len(new))
        joined = torch.cat([self._ids, new])
        places = torch.cat([self._places, torch.arange(count, count + len(new), device="cpu")])
        self._ids, order = torch.sort(joined)
        self._places = places[order]

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


class Columns:
    """The rows of a value and of its state, the same for a dense tensor and for a Table."""

    def __init__(self, value: torch.Tensor | Table, state: dict[str, torch.Tensor]) -> None:
        self._value = value
        self._state = state

    def names(self) -> list[str]:
        """Names of the states that have a row for each of the value's."""
        if isinstance(self._value, Table):
            return self._value.columns
        return [name for name, tensor in self._state.items() if tensor.shape == self._value.shape]

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
    (torch.view_as_real(tensor) if tensor.is_complex() else interop.signed(tensor)).fill_(number)
    return tensor
