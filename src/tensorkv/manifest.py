"""The manifest of a checkpoint: a shard's entries as plain data and named tensors, and back.

Nothing that is read back is trusted: each name, shape, dtype and number is checked before it is used.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from . import arrays
from .arguments import check_key
from .entry import Entry, KeySpec
from .errors import CheckpointError, TensorKVError, quote
from .optim import OptimizerSpec, State
from .rules import Assign, CallUpdater, Rule, StepOptimizer
from .table import Table

Kind = Literal["store", "optimizer-states"]
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Contents:
    """What a checkpoint holds; ``rule`` is None where an updater was in force, which cannot be saved."""

    kind: Kind
    entries: list[Entry]
    rule: Rule | None


# ---------------------------------------------------------------- out


def describe(kind: Kind, entries: Sequence[Entry], rule: Rule) -> tuple[dict[str, Any], Tensors]:
    """Return the manifest's body, as JSON can hold it, and the tensors that it names."""
    tensors: Tensors = {}
    keys = [_describe_entry(kind, entry, tensors) for entry in entries]
    update = "updater" if isinstance(rule, CallUpdater) else "assign"
    optimizer = None
    if isinstance(rule, StepOptimizer):
        update, optimizer = "optimizer", rule.optimizer.spec.to_json()
    return {"kind": kind, "update": update, "optimizer": optimizer, "keys": keys}, tensors


def _describe_entry(kind: Kind, entry: Entry, tensors: Tensors) -> dict[str, Any]:
    key, value = entry.key, entry.value
    columns: dict[str, float] = {}
    if isinstance(value, Table):
        columns = {name: value.fill(name) for name in value.columns}
        tensors[f"ids/{key}"] = value.ids
        for name in columns:
            tensors[f"column/{name}/{key}"] = _real(value.read(value.ids, name))
        if kind == "store":
            tensors[f"value/{key}"] = _real(value.read(value.ids))
    elif kind == "store":
        tensors[f"value/{key}"] = _real(value)
    for name, tensor in entry.state.items():
        tensors[f"state/{name}/{key}"] = _real(tensor)
    return {
        "key": key,
        "kind": "rows" if isinstance(value, Table) else "dense",
        "shape": list(entry.spec.shape),
        "dtype": arrays.dtype_name(value.dtype),
        "version": entry.version,
        "library": entry.spec.origin.library,
        "device": str(entry.spec.origin.device) if entry.spec.origin.library == "torch" else None,
        "state": sorted(entry.state),
        "columns": columns,
    }


def _real(tensor: torch.Tensor) -> torch.Tensor:
    # safetensors has no complex128: complex numbers are written as pairs of real ones.
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


# ---------------------------------------------------------------- back


def restore(body: Any, tensors: Tensors) -> Contents:
    """Check a manifest's body against its tensors and return what they hold.

    Raises:
        CheckpointError: anything that ``describe`` would not have written.
    """
    try:
        kind = _one_of(body, "kind", ("store", "optimizer-states"))
        update = _one_of(body, "update", ("assign", "updater", "optimizer"))
        rule: Rule | None = Assign() if update == "assign" else None
        if update == "optimizer":
            rule = StepOptimizer(OptimizerSpec.from_json(body.get("optimizer")))
        left = dict(tensors)
        entries = [_restore_entry(kind, described, left, rule) for described in _field(body, "keys", list)]
        _check(not left, f"tensors that no key has: {', '.join(list(left)[:3])}")
        _check(len({entry.key for entry in entries}) == len(entries), "a key stands there twice")
        _check(len({type(entry.key) for entry in entries}) <= 1, "keys of two types")
        return Contents(kind, entries, rule)
    except CheckpointError:
        raise
    except TensorKVError as error:
        raise CheckpointError(str(error)) from None


def _restore_entry(kind: str, described: Any, tensors: Tensors, rule: Rule | None) -> Entry:
    key = check_key("load", _field(described, "key", (str, int)))
    shape = _shape(described)
    dtype = arrays.dtype_named(_field(described, "dtype", str))
    if dtype is None:
        raise CheckpointError(f"{quote(key)}: dtype {described['dtype']!r} is unknown")
    version = _field(described, "version", int)
    _check(version >= 0, f"{quote(key)}: version {version}")
    state: State = {}
    for name in _field(described, "state", list):
        _check(isinstance(name, str) and name.isidentifier(), f"{quote(key)}: state {name!r}")
        state[name] = _typed(_pop(tensors, f"state/{name}/{key}"), dtype, shape)
    value: torch.Tensor | Table
    if _one_of(described, "kind", ("dense", "rows")) == "rows":
        value = _restore_table(kind, key, described, shape, dtype, tensors)
    else:
        _check(not described.get("columns"), f"{quote(key)}: a dense key with columns")
        value = torch.empty(shape, dtype=dtype, device="meta")
        if kind == "store":
            value = _typed(_pop(tensors, f"value/{key}"), dtype, shape)
            _check(
                value.shape == shape and value.dtype is dtype,
                f"{quote(key)}: the tensor is {arrays.dtype_name(value.dtype)} {tuple(value.shape)}, "
                f"the manifest says {arrays.dtype_name(dtype)} {tuple(shape)}",
            )
    if isinstance(rule, StepOptimizer):
        rule.optimizer.check(key, value, by_rows=False)
        rule.optimizer.check_state(key, value, state)
    else:
        columns = value.columns if isinstance(value, Table) else []
        _check(not state and not columns, f"{quote(key)}: optimizer state without an optimizer")
    is_table = isinstance(value, Table)
    return Entry(key, KeySpec(shape, dtype, _origin(described), is_table), value, version, state)


def _restore_table(
    kind: str, key: str | int, described: Any, shape: torch.Size, dtype: torch.dtype, tensors: Tensors
) -> Table:
    _check(len(shape) >= 1, f"{quote(key)}: rows of a 0-d tensor")
    ids = _pop(tensors, f"ids/{key}")
    _check(ids.dtype is torch.int64 and ids.ndim == 1, f"{quote(key)}: ids are no list of int64")
    rises = bool((ids[1:] > ids[:-1]).all()) and (not len(ids) or (int(ids[0]) >= 0 and int(ids[-1]) < shape[0]))
    _check(rises, f"{quote(key)}: ids are not unique, sorted and in range")
    rows_shape = torch.Size((len(ids), *shape[1:]))
    table = Table(shape[0], shape[1:], dtype)
    filled = {"": 0.0, **_field(described, "columns", dict)}
    for name, fill in filled.items():
        if name:
            _check(name.isidentifier() and type(fill) in (int, float) and math.isfinite(fill), f"column {name!r}")
            table.add_column(name, dtype, fill)
        if name or kind == "store":
            rows = _typed(_pop(tensors, f"column/{name}/{key}" if name else f"value/{key}"), dtype, rows_shape)
        else:
            rows = torch.zeros(rows_shape, dtype=dtype)
        _check(
            rows.shape == rows_shape and rows.dtype is dtype,
            f"{quote(key)}: rows are not {tuple(rows_shape)}",
        )
        table.write(ids, rows, name)
    return table


def _origin(described: Any) -> arrays.Origin:
    library = _one_of(described, "library", ("numpy", "torch", "jax", "cupy", "array-api"))
    if library == "numpy":
        return arrays.NUMPY
    if library == "jax" and importlib.util.find_spec("jax") is not None:
        return arrays.Origin("jax")
    # Where the library or the device is missing, pulls give torch tensors on the CPU.
    device = torch.device("cpu")
    name = described.get("device")
    if library == "torch" and isinstance(name, str) and name.startswith("cuda") and torch.cuda.is_available():
        index = name.partition(":")[2]
        if index.isdigit() and int(index) < torch.cuda.device_count():
            device = torch.device("cuda", int(index))
    return arrays.Origin("torch", device)


def _typed(tensor: torch.Tensor, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    if dtype.is_complex and tensor.is_floating_point() and tensor.shape == (*shape, 2):
        return torch.view_as_complex(tensor)
    return tensor


def _shape(described: Any) -> torch.Size:
    shape = _field(described, "shape", list)
    _check(all(type(size) is int and 0 <= size < 1 << 62 for size in shape), f"shape {shape}")
    return torch.Size(shape)


def _pop(tensors: Tensors, name: str) -> torch.Tensor:
    _check(name in tensors, f"the tensor {quote(name)} is missing")
    return tensors.pop(name)


def _field(data: Any, name: str, kind: Any) -> Any:
    _check(isinstance(data, dict) and name in data, f"the field {quote(name)} is missing")
    _check(isinstance(data[name], kind) and not isinstance(data[name], bool), f"the field {quote(name)} is wrong")
    return data[name]


def _one_of(data: Any, name: str, choices: tuple[str, ...]) -> Any:
    choice = _field(data, name, str)
    _check(choice in choices, f"{name} is {choice!r}; expected one of {', '.join(choices)}")
    return choice


def _check(holds: bool, problem: str) -> None:
    if not holds:
        raise CheckpointError(problem)
