"""The manifest of a checkpoint: a shard's entries as plain data and named tensors, and back.

Nothing that is read back is trusted: each name, shape, dtype and number is checked before it is used.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType, NoneType
from typing import Any, Literal, get_args

import torch

from tensorkv.arrays import interop
from tensorkv.arrays.arguments import Key, check_key
from tensorkv.arrays.rowinit import RowInit
from tensorkv.arrays.spec import KeySpec
from tensorkv.compression import Owed, Source
from tensorkv.errors import CheckpointError, OptimizerError, TensorKVError, quote
from tensorkv.shard.entry import Entry, FrozenEntry
from tensorkv.shard.optimizers import OptimizerSpec, State
from tensorkv.shard.releases import SavedRelease, SavedReleases, check_name
from tensorkv.shard.rules import Assign, CallUpdater, Rule, StepOptimizer
from tensorkv.shard.table import Table

Kind = Literal["store", "optimizer-states", "keys"]
Tensors = dict[str, torch.Tensor]

_DTYPES = {interop.dtype_name(dtype): dtype for dtype in interop.DTYPES}
# How the names of tensors begin that only releases have; the place of the copy and a slash follow.
_RELEASE = "release/"
# What is left out of a release if it is this, as in every checkpoint.
_RELEASE_DEFAULTS = {"owner": "", "attempt": "", "is_visible": True}
# States that torch computes divisors from, and what they can be at most.
_COUNTERS = {"step": torch.finfo(torch.float32).max, "mu_product": 1.0}


@dataclass(frozen=True, slots=True)
class Contents:
    """What a store holds, or a checkpoint of it.

    Args:
        kind: what a store takes from here: everything (``"store"``), the optimizer and the state of all keys
            (``"optimizer-states"``), or the optimizer and these keys, beside those that it has (``"keys"``, which no
            checkpoint is).
        entries: of the keys.
        rule: None where an updater was in force, which cannot be saved.
        owed: what was not sent of compressed gradients, by key and worker.
        releases: of the store (None: they were not saved).
        digest: of the manifest of the checkpoint that they were read from.
    """

    kind: Kind
    entries: list[Entry]
    rule: Rule | None
    owed: Mapping[Source, Owed] = field(default_factory=dict)
    releases: SavedReleases | None = None
    digest: str | None = None


# ---------------------------------------------------------------- out


def describe(
    kind: Kind,
    entries: Sequence[Entry],
    rule: Rule | None,
    owed: Mapping[Source, Owed] = MappingProxyType({}),
    releases: SavedReleases | None = None,
) -> tuple[dict[str, Any], Tensors]:
    """Return the manifest's body, as JSON can hold it, and the tensors that it names."""
    tensors: Tensors = {}
    keys = [_describe_entry(kind, entry, tensors) for entry in entries]
    update = "updater" if rule is None or isinstance(rule, CallUpdater) else "assign"
    optimizer = None
    if isinstance(rule, StepOptimizer):
        update, optimizer = "optimizer", rule.optimizer.spec.to_json()
    body = {"kind": kind, "update": update, "optimizer": optimizer, "keys": keys}
    if owed:
        body["owed"] = [_describe_owed(source, each, tensors) for source, each in owed.items()]
    if releases is not None:
        body["releases"] = _describe_releases(releases, tensors)
    return body, tensors


def _describe_releases(releases: SavedReleases, tensors: Tensors) -> dict[str, Any]:
    """Describe releases: values that are not the present ones once, and where each release has its values."""
    places: dict[int, int] = {}
    copies: list[Any] = []
    held = []
    for release in releases.held:
        keys: list[list[Any]] = []
        for entry in release.entries:
            if not isinstance(entry, FrozenEntry):
                keys.append([entry.key, None])
                continue
            place = places.setdefault(id(entry), len(copies))
            if place == len(copies):
                own: Tensors = {}
                copy = _describe_entry("store", entry, own)
                tensors |= {f"{_RELEASE}{place}/{name}": tensor for name, tensor in own.items()}
                copies.append(copy if entry.note is None else {**copy, "note": entry.note})
            keys.append([entry.key, place])
        told = {name: getattr(release, name) for name in _RELEASE_DEFAULTS}
        more = {name: value for name, value in told.items() if value != _RELEASE_DEFAULTS[name]}
        held.append({"name": release.name, "number": release.number, "keys": keys, **more})
    found = {"numbers": dict(releases.numbers), "copies": copies, "held": held}
    return {**found, "generation": releases.generation} if releases.generation else found


def _describe_owed(source: Source, owed: Owed, tensors: Tensors) -> dict[str, Any]:
    key, worker = source
    tensors[tensor_name(f"residual/{worker}", key)] = torch.from_numpy(owed.residual)
    for name, array in owed.memory.items():
        tensors[tensor_name(f"memory/{worker}/{name}", key)] = torch.from_numpy(array)
    return {"key": key, "worker": worker, "memory": sorted(owed.memory)}


def _describe_entry(kind: Kind, entry: Entry, tensors: Tensors) -> dict[str, Any]:
    key, value = entry.key, entry.value
    columns: dict[str, float] = {}
    if isinstance(value, Table):
        columns = {name: value.fill(name) for name in value.columns}
        tensors[tensor_name("ids", key)] = value.ids
        for name in columns:
            tensors[tensor_name(f"column/{name}", key)] = _real(value.read(value.ids, name))
        if kind != "optimizer-states":
            tensors[tensor_name("value", key)] = _real(value.read(value.ids))
    elif kind != "optimizer-states":
        tensors[tensor_name("value", key)] = _real(value)
    for name, tensor in entry.state.items():
        tensors[tensor_name(f"state/{name}", key)] = _real(tensor)
    return {
        "key": key,
        "kind": "dense" if not entry.spec.is_table else "rows" if entry.spec.init is None else "initialized-rows",
        "shape": list(entry.spec.shape),
        "dtype": interop.dtype_name(value.dtype),
        "version": entry.version,
        "library": entry.spec.origin.library,
        "device": str(entry.spec.origin.device) if entry.spec.origin.library == "torch" else None,
        "state": sorted(entry.state),
        "columns": columns,
        **describe_init(entry.spec),
    }


def describe_init(spec: KeySpec) -> dict[str, Any]:
    """Return how the rows of a table start, as ``restore_spec`` reads it; nothing if they start as zeros."""
    return {} if spec.init is None else {"init": spec.init.to_json()}


def tensor_name(what: str, key: Key) -> str:
    """Return the name of a tensor of a key: what it is, a slash and the key."""
    # safetensors names are UTF-8, which has no half of a surrogate pair; a key may.
    return f"{what}/" + str(key).replace("\\", "\\\\").encode("utf-8", "backslashreplace").decode()


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
        kind = _one_of(body, "kind", get_args(Kind))
        update = _one_of(body, "update", ("assign", "updater", "optimizer"))
        _check(update == "optimizer" or kind == "store", "optimizer states without an optimizer")
        rule: Rule | None = Assign() if update == "assign" else None
        if update == "optimizer":
            rule = restore_rule(body.get("optimizer"))
        left = dict(tensors)
        entries = [_restore_entry(kind, described, left) for described in _field(body, "keys", list)]
        by_key = {entry.key: entry for entry in entries}
        owed = dict(_restore_owed(described, by_key, left) for described in _optional_list(body, "owed"))
        releases = _restore_releases(body["releases"], by_key, left) if "releases" in body else None
        _check(releases is None or kind == "store", f"{kind} with releases")
        _check(not left, f"tensors that no key has: {', '.join(list(left)[:3])}")
        keys = {entry.key for entry in entries}
        _check(len(keys) == len(entries), "duplicate key")
        _check(len({type(key) for key in keys}) <= 1, "keys of two types")
        if isinstance(rule, StepOptimizer) and kind != "keys":
            others = [key for key in rule.optimizer.spec.overrides if isinstance(key, bool) or key not in keys]
            _check(not others, f"the optimizer has hyperparameters for {others[:3]}, which are not among the keys")
        return Contents(kind, entries, rule, owed, releases)
    except CheckpointError:
        raise
    except TensorKVError as error:
        raise CheckpointError(str(error)) from None


def check_fits(contents: Contents, held: Mapping[Key, Entry]) -> None:
    """Raise CheckpointError if a store that holds these entries cannot take over the contents."""
    # First: optimizer states alone come without values to prove their shapes.
    for saved in contents.entries if contents.kind != "store" else ():
        mine = held.get(saved.key)
        if mine is None:
            raise CheckpointError(f"has state of {quote(saved.key)}, which is not in the store")
        if replace(mine.spec, origin=saved.spec.origin, init=saved.spec.init) != saved.spec:
            raise CheckpointError(f"{quote(saved.key)} was {saved.info()}, in the store it is {mine.info()}")
    check_states(contents)


def check_states(contents: Contents) -> None:
    """Raise CheckpointError if the optimizer could not continue from the states; makes tensors of the keys' shapes."""
    for entry in contents.entries:
        value, state = entry.value, entry.state
        if isinstance(value, Table):
            _check(
                all(tensor.ndim == 0 for tensor in state.values()),
                f"{quote(entry.key)}: expected state with a row for each id",
            )
            # Columns are to a row what the state is to a dense key.
            columns, value = value.columns, torch.empty(2, dtype=value.dtype, device="cpu")
            state = {**state, **dict.fromkeys(columns, value)}
        if not state:
            continue
        if not isinstance(contents.rule, StepOptimizer):
            raise CheckpointError(f"{quote(entry.key)}: optimizer state without an optimizer")
        try:
            contents.rule.optimizer.check(entry.key, value, by_rows=entry.spec.is_table)
            contents.rule.optimizer.check_state(entry.key, value, state)
        except OptimizerError as error:
            raise CheckpointError(str(error)) from None
        for name, limit in _COUNTERS.items():
            if name in state:
                number = float(state[name])
                if not 0 <= number <= limit:
                    raise CheckpointError(
                        f"{quote(entry.key)}: {quote(name)} is {number}; expected a number from 0 to {limit}"
                    )


def restore_rule(described: Any) -> StepOptimizer:
    """Check an optimizer's description and return its rule.

    Raises:
        CheckpointError: names or numbers that no optimizer takes.
    """
    try:
        rule = StepOptimizer(OptimizerSpec.from_json(described))
        # Numbers that do not fit together show in a step: a first one and one that goes on.
        for key in ("", *rule.optimizer.spec.overrides):
            shape = (2, 1) if rule.optimizer.spec.name == "muon" else (2,)
            # In the dtype in which set_optimizer has tried them.
            value, state = torch.zeros(shape, dtype=torch.float64, device="cpu"), State()
            for _ in range(2):
                rule.optimizer.step([key], [value], [torch.zeros_like(value)], [state])
    except Exception as error:  # torch raises what the numbers lead to
        raise CheckpointError(f"the optimizer: {error}") from None
    return rule


def _restore_entry(kind: str, described: Any, tensors: Tensors) -> Entry:
    key = check_key("load", _field(described, "key", (str, int)))
    of_key = _one_of(described, "kind", ("dense", "rows", "initialized-rows"))
    is_table = of_key != "dense"
    spec = restore_spec(key, described, is_table=is_table)
    _check(
        (spec.init is not None) is (of_key == "initialized-rows"),
        f"{quote(key)}: the kind {of_key} does not match init",
    )
    dtype, shape = spec.dtype, spec.shape
    version = _field(described, "version", int)
    if not 0 <= version < 1 << 63:
        raise CheckpointError(f"{quote(key)}: version {version} is out of range")
    state: State = {}
    for name in _field(described, "state", list):
        if not isinstance(name, str) or not name.isidentifier():
            raise CheckpointError(f"{quote(key)}: invalid name of a state {name!r}")
        state[name] = _pop(tensors, tensor_name(f"state/{name}", key), dtype, shape)
    value: torch.Tensor | Table
    if is_table:
        value = _restore_table(kind, key, described, spec, tensors)
    else:
        if _field(described, "columns", dict):
            raise CheckpointError(f"{quote(key)}: a dense key with columns")
        value = torch.empty(shape, dtype=dtype, device="meta")
        if kind != "optimizer-states":
            value = _pop_exactly(tensors, tensor_name("value", key), dtype, shape)
    return Entry(key, spec, value, version, state)


def _restore_owed(described: Any, entries: Mapping[Key, Entry], tensors: Tensors) -> tuple[Source, Owed]:
    key = check_key("load", _field(described, "key", (str, int)))
    worker = _field(described, "worker", int)
    _check(key in entries and not entries[key].spec.is_table, f"{quote(key)}: a gradient of no dense key is owed")
    _check(0 <= worker < 1 << 31, f"{quote(key)}: worker {worker} is out of range")
    residual = _pop_exactly(tensors, tensor_name(f"residual/{worker}", key), torch.float32, entries[key].spec.shape)
    _check(bool(residual.isfinite().all()), f"{quote(key)}: what is owed has NaN or Inf")
    memory = {}
    for name in _field(described, "memory", list):
        _check(isinstance(name, str) and name.isidentifier(), f"{quote(key)}: invalid name of a memory {name!r}")
        array = tensors.pop(tensor_name(f"memory/{worker}/{name}", key), None)
        if array is None or array.dtype is not torch.float32:
            raise CheckpointError(f"{quote(key)}: the memory {quote(name)} is missing, or not float32")
        memory[name] = array.numpy()
    return (key, worker), Owed(residual.numpy(), memory)


def _restore_releases(described: Any, present: Mapping[Key, Entry], tensors: Tensors) -> SavedReleases:
    found: dict[str, Tensors] = {}
    for tensor in [name for name in tensors if name.startswith(_RELEASE)]:
        number_of_copy, _, own_name = tensor.removeprefix(_RELEASE).partition("/")
        found.setdefault(number_of_copy, {})[own_name] = tensors.pop(tensor)
    copies = []
    for place, each in enumerate(_field(described, "copies", list)):
        own = found.pop(str(place), {})
        copies.append(FrozenEntry(_restore_entry("store", each, own)))
        copies[-1].note = each.get("note")
        _check(not own, f"tensors that no release has: {', '.join(list(own)[:3])}")
    numbers = _field(described, "numbers", dict)
    for name, number in numbers.items():
        check_name("load", name)
        _check(type(number) is int and 0 < number < 1 << 63, f"the release {quote(name)} has the number {number!r}")
    held = []
    for each in _field(described, "held", list):
        name, number = check_name("load", _field(each, "name", str)), _field(each, "number", int)
        told = {**_RELEASE_DEFAULTS, **each}
        owner, attempt, is_visible = (
            _field(told, "owner", str),
            _field(told, "attempt", str),
            told["is_visible"] is True,
        )
        # A name counts as used when readers have seen the release.
        is_known = numbers.get(name) == number or not is_visible
        _check(is_known, f"the release {quote(name)} is not among the names that were used")
        entries = _restore_release(name, each, present, copies)
        held.append(SavedRelease(name, number, entries, owner, attempt, is_visible))
    in_order, shown = [each.number for each in held], [each.number for each in held if each.is_visible]
    is_sorted = in_order == sorted(in_order) and len(set(shown)) == len(shown)
    _check(is_sorted, "releases that are not in the order of their numbers")
    _check(not found, f"tensors that no release has: {', '.join(list(found)[:3])}")
    used = {id(entry) for each in held for entry in each.entries}
    _check(all(id(copy) in used for copy in copies), "a value that no release has")
    generation = _field(described, "generation", str) if "generation" in described else ""
    return SavedReleases(numbers, held, generation)


def _restore_release(
    name: str, described: Any, present: Mapping[Key, Entry], copies: Sequence[FrozenEntry]
) -> list[Entry]:
    entries: list[Entry] = []
    for pair in _field(described, "keys", list):
        _check(isinstance(pair, list) and len(pair) == 2, f"the release {quote(name)}: malformed key")
        key, place = check_key("load", pair[0]), pair[1]
        if place is None:
            found: Entry | None = present.get(key)
        else:
            found = copies[place] if type(place) is int and 0 <= place < len(copies) else None
        if found is None or found.key != key:
            raise CheckpointError(f"the release {quote(name)}: the value of {quote(key)} is missing")
        entries.append(found)
    keys = {entry.key for entry in entries}
    _check(len(keys) == len(entries), f"the release {quote(name)}: duplicate key")
    _check(len({type(key) for key in keys}) <= 1, f"the release {quote(name)}: keys of two types")
    return entries


def restore_spec(key: Key, described: Any, *, is_table: bool) -> KeySpec:
    """Check and return the shape, dtype, library and device of a key.

    Raises:
        CheckpointError: they are malformed.
    """
    name = _field(described, "dtype", str)
    dtype = _DTYPES.get(name)
    if dtype is None:
        raise CheckpointError(f"{quote(key)}: dtype {name!r} is unknown")
    init = None
    if "init" in described:
        init = RowInit.from_json(described["init"])
        init.check_dtype(dtype)
        _check(is_table, f"{quote(key)}: a dense key with init")
    return KeySpec(_shape(key, described, dtype, is_table), dtype, origin_of(described), is_table, init)


def _restore_table(kind: str, key: Key, described: Any, spec: KeySpec, tensors: Tensors) -> Table:
    shape, dtype = spec.shape, spec.dtype
    ids = _pop(tensors, tensor_name("ids", key), torch.int64, shape)
    _check(ids.dtype is torch.int64 and ids.ndim == 1, f"{quote(key)}: ids are not one-dimensional int64")
    rises = bool((ids[1:] > ids[:-1]).all()) and (not len(ids) or (int(ids[0]) >= 0 and int(ids[-1]) < shape[0]))
    _check(rises, f"{quote(key)}: ids are not unique, sorted and in range")
    rows_shape = torch.Size((len(ids), *shape[1:]))
    table = Table(shape[0], shape[1:], dtype, init=spec.init, key=key)
    if kind != "optimizer-states":
        table.write(ids, _pop_exactly(tensors, tensor_name("value", key), dtype, rows_shape))
    for name, fill in _field(described, "columns", dict).items():
        fits = type(fill) in (int, float) and dtype.is_floating_point | dtype.is_complex
        _check(
            fits and abs(fill) <= torch.finfo(dtype).max,
            f"{quote(key)}: the column {quote(name)} has the invalid default {fill!r}",
        )
        _check(name.isidentifier(), f"{quote(key)}: invalid name of a column {name!r}")
        table.add_column(name, dtype, fill)
        table.write(ids, _pop_exactly(tensors, tensor_name(f"column/{name}", key), dtype, rows_shape), name)
    return table


def origin_of(described: Any) -> interop.Origin:
    """Return the library and device of later pulls; torch on the CPU where the saved ones are missing."""
    library = _one_of(described, "library", ("numpy", "torch", "jax", "cupy", "array-api"))
    name = _field(described, "device", (str, NoneType)) or ""
    if library == "numpy":
        return interop.NUMPY
    if library == "jax" and importlib.util.find_spec("jax") is not None:
        return interop.Origin("jax")
    # Where the library or the device is missing, pulls give torch tensors on the CPU.
    device = torch.device("cpu")
    if library == "torch" and name.startswith("cuda") and torch.cuda.is_available():
        index = name.partition(":")[2]
        if index.isdigit() and int(index) < torch.cuda.device_count():
            device = torch.device("cuda", int(index))
    return interop.Origin("torch", device)


def _shape(key: Key, described: Any, dtype: torch.dtype, is_table: bool) -> torch.Size:
    shape = _field(described, "shape", list)
    fits = all(type(size) is int and 0 <= size < 1 << 63 for size in shape) and len(shape) >= is_table
    # Of a table, only a row must fit into memory.
    nbytes = dtype.itemsize * math.prod(size or 1 for size in shape[is_table:]) if fits else 0
    if not fits or nbytes >= 1 << 63:
        raise CheckpointError(f"{quote(key)}: invalid shape {shape}")
    return torch.Size(shape)


def _pop(tensors: Tensors, name: str, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    tensor = tensors.pop(name, None)
    if tensor is None:
        raise CheckpointError(f"the tensor {quote(name)} is missing")
    if dtype.is_complex and tensor.dtype is dtype.to_real() and tensor.shape == (*shape, 2):
        # torch views pairs as complex numbers only where they begin at an even place.
        return torch.view_as_complex(tensor.clone() if tensor.storage_offset() % 2 else tensor)
    return tensor


def _pop_exactly(tensors: Tensors, name: str, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    tensor = _pop(tensors, name, dtype, shape)
    if tensor.shape != shape or tensor.dtype is not dtype:
        raise CheckpointError(
            f"the tensor {quote(name)} is {interop.dtype_name(tensor.dtype)} {tuple(tensor.shape)}, "
            f"the manifest says {interop.dtype_name(dtype)} {tuple(shape)}"
        )
    if dtype is torch.bool and not bool((tensor.view(torch.uint8) <= 1).all()):
        raise CheckpointError(f"{quote(name)}: bool bytes other than 0 and 1")
    return tensor


def _field(data: Any, name: str, kind: Any) -> Any:
    if not isinstance(data, dict) or name not in data:
        raise CheckpointError(f"the field {quote(name)} is missing")
    value = data[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise CheckpointError(f"the field {quote(name)} is {value!r:.40}, of the wrong type")
    return value


def _optional_list(data: Any, name: str) -> list[Any]:
    found: list[Any] = _field(data, name, list) if name in data else []
    return found


def _one_of(data: Any, name: str, choices: tuple[str, ...]) -> Any:
    choice = _field(data, name, str)
    if choice not in choices:
        raise CheckpointError(f"{name} is {choice!r}; expected one of {', '.join(choices)}")
    return choice


def _check(holds: bool, problem: str) -> None:
    if not holds:
        raise CheckpointError(problem)
