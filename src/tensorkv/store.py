"""KVStore: the verbs. A push and a pull can be read here from the caller's arguments to the engine."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from inspect import isfunction, unwrap
from operator import add
from typing import TYPE_CHECKING, Any

import torch

from tensorkv import engines
from tensorkv.arrays import interop
from tensorkv.arrays.arguments import Key, is_key, keys_of, pairs, single_values
from tensorkv.arrays.outputs import GivenOuts, NewOuts, count_writes
from tensorkv.arrays.rows import Rows, is_rows, take_ids, take_rows
from tensorkv.arrays.spec import KeySpec
from tensorkv.runtime import compiled, shield
from tensorkv.shard.entry import Batch, Part
from tensorkv.shard.plan import MANY

from .control import StoreControl, outside_modes, runs_outside_modes
from .errors import (
    ArgumentError,
    ArrayTypeError,
    SparseOutWarning,
    TensorKVError,
    ValueMismatchError,
    quote,
    show,
)
from .snapshot import Snapshot
from .versions import wait_for

# What MXNet's KVStore has and this one has not, or has under another name.
_MXNET_NAMES = {
    "_barrier": "use barrier()",
    "_send_command_to_servers": "servers run no commands of workers",
    "_set_updater": "use set_updater(updater)",
    "get_num_dead_node": "use dead_workers(), a list of ranks",
    "handle": "there is no native handle; close() ends the store",
    "num_dead_node": "use dead_workers(), a list of ranks",
    "set_gradient_compression": "gradients are not compressed yet; push float16 or bfloat16 arrays to halve them",
    "set_optimizer_states": "use load_optimizer_states(path)",
}


@runs_outside_modes
def create(type: str = "local", **options: Any) -> KVStore:
    """Return a store: a new and empty one, what a folder holds, or servers that are there.

    Args:
        type: ``"local"``: one process, sums on the CPU. ``"device"``: sums on the device where arrays are.
            ``"dist_sync"``: processes and hosts in step. ``"dist_async"``: parameter servers, those of its name in
            the Ray cluster if there are any. See ``tensorkv.engines.names()`` for all, aliases included.
        **options: of the type. All take ``nonfinite``: ``"pass"`` (default), ``"raise"`` or ``"skip"`` updates
            whose sum has NaN or Inf.
            ``local``, ``device``: ``threads``; ``local`` also ``path``, ``durability`` and ``log_nbytes``, for a
            store in a folder.
            ``dist_sync``: ``timeout_s``, ``shared_memory``.
            ``dist_async``: ``num_servers``, ``num_workers``, ``mode``, ``staleness``, ``path``, ``durability``,
            ``keep``, ``lost_after_s``, ``name``, ``address``, ``timeout_s``, ``insecure``.

    Raises:
        EngineNotFoundError: no such type.
        ArgumentError: an option that the type does not have, or out of range.
        JournalError: a folder that cannot be opened.
        RankDeadError, ServerLostError: other workers, or servers, that did not come in time.

    >>> create("local")
    KVStore('local', 0 keys)
    """
    compiled.warn_once()
    return KVStore(engines.build(type, options), type)


class KVStore(StoreControl):
    """A key-value store of tensors: write by summing (``push``), read by copying (``pull``).

    Made by ``tensorkv.create``. Keys are str or int, one type per store. Arrays may be NumPy, PyTorch,
    JAX, CuPy or any with ``__dlpack__``; the store never shares memory with its callers. Every method
    may be called from several threads. A store is also a context manager that closes itself.

    >>> import numpy as np
    >>> with create("local") as kv:
    ...     kv.init("w", np.zeros(3, np.float32))
    ...     kv.push("w", [np.ones(3, np.float32), np.full(3, 2, np.float32)])
    ...     kv.pull("w")
    array([3., 3., 3.], dtype=float32)
    """

    _warned_sparse_out = False

    def __init__(self, engine: Any = None, type: Any = None) -> None:
        if not hasattr(engine, "pull_rows") or not isinstance(type, str):
            raise ArgumentError(
                f"KVStore: got {show(engine)} and {show(type)}; stores are made by tensorkv.create(type, **options), "
                'such as tensorkv.create("local")'
            )
        super().__init__(engine, type)

    if not TYPE_CHECKING:  # type checkers are to find names that are not there

        def __getattr__(self, name: str) -> Any:
            hint = f"; {_MXNET_NAMES[name]}" if name in _MXNET_NAMES else ""
            raise AttributeError(f"'KVStore' object has no attribute {name!r}{hint}", name=name, obj=self)

    # ------------------------------------------------------------ init, push, pull

    @runs_outside_modes
    def init(self, key: Any, value: Any = None) -> None:
        """Put new keys into the store, with copies of their first values.

        Args:
            key: a key, a list of keys, or a mapping of key to value.
            value: an array or ``Rows`` (a sparse table), or a list of as many as keys.

        Raises:
            KeyExistsError: a key is there already, or given twice.
            KeyTypeError: not a key, or not of the store's key type.
            ArrayTypeError: not an array that a store can hold.

        >>> import numpy as np
        >>> kv = create()
        >>> kv.init([5, 7], [np.ones(2), np.zeros((2, 3))])
        >>> kv.keys()
        [5, 7]
        """
        start = self._begin("init")
        keys, values = single_values("init", key, value)
        taken, specs = _take_values("init", keys, values)
        shield.run(self._engine.init, keys, taken, specs)
        self._metrics.add("init", start, keys, _nbytes([[value] for value in taken]))

    def push(self, key: Any, value: Any = None, priority: int = 0) -> None:
        """Sum the parts of each key, in the order given, and update the key's value with the sum.

        The update is assignment, or what ``set_updater`` or ``set_optimizer`` said. The whole call is
        checked before any key changes. float16 and bfloat16 are summed in float32 and rounded once;
        integers wrap around on overflow; bool adds by "or".

        Args:
            key: a key, a list of keys (a repeated key's parts are summed), or a mapping.
            value: an array or ``Rows`` or a list of parts, or a list of those, one for each key.
            priority: higher goes first where an engine queues pushes; ``local`` does not.

        Raises:
            KeyNotFoundError: a key that was not initialised.
            ValueMismatchError: a part's shape or dtype does not fit.
            ArrayTypeError, ArgumentError, KeyTypeError, NonFiniteError, OptimizerError, UpdaterError.
            JournalError: a store in a folder could not write; nothing has changed.
            RankDeadError, WorkerMismatchError, WorkerError: of ``dist_sync``, also for a push before this one.
            ServerLostError, PushOutcomeUnknownError, WaitTimeoutError: of ``dist_async``; the last two may come of a
            push that was applied, as their messages say.

        >>> import numpy as np
        >>> kv = create()
        >>> kv.init("w", np.zeros(2))
        >>> kv.push("w", [np.ones(2), np.ones(2)])
        >>> kv.pull("w")
        array([2., 2.])
        """
        start = self._begin("push", priority)
        if self._short("push", start, key, value, None, priority):
            return
        with outside_modes():
            batch = _batch("push", key, value)
            shield.run(self._engine.push, batch, priority)
            self._metrics.add("push", start, batch.keys, _nbytes(batch.parts))

    def pull(
        self,
        key: Any,
        out: Any = None,
        priority: int = 0,
        ignore_sparse: bool = True,
        *,
        like: Any = None,
        min_version: int | None = None,
        timeout_s: float | None = None,
    ) -> Any:
        """Copy values out of the store.

        Args:
            key: a key, a list of keys, or a mapping of key to out.
            out: an array to fill, a list of arrays (several devices), or a list of those, one for each
                key. Any strides, any device; the value is cast to its dtype if that is of the same
                family or holds every value exactly.
            priority: as for ``push``.
            ignore_sparse: skip a sparse ``out`` with one warning rather than raise.
            like: without ``out``, an array whose library and device the result has.
            min_version: wait until every key has had so many updates (``info(key).version``), by whomever.
            timeout_s: how long to wait for them, in seconds (default 60).

        Returns:
            None with ``out``. Else a new array (a list for a list of keys) of the library, dtype and
            device that the key was initialised with.

        Raises:
            KeyNotFoundError: a key that was not initialised.
            ValueMismatchError: an out's shape or dtype does not fit.
            ArrayTypeError: an out that cannot be written (read-only, JAX). Nothing has been written.
            ArgumentError: two outs overlap in memory, or forms that do not fit.
            WaitTimeoutError: the version did not come in time; nothing has been written.

        >>> import numpy as np
        >>> kv = create()
        >>> kv.init("w", np.array([1.5, 2.5], np.float32))
        >>> a, b = np.zeros(2), np.zeros(2, np.float16)
        >>> kv.pull("w", out=[a, b])
        >>> a, b
        (array([1.5, 2.5]), array([1.5, 2.5], dtype=float16))
        """
        start = self._begin("pull", priority)
        if min_version is not None:
            listed = keys_of("pull", list(key) if isinstance(key, Mapping) else key)
            wait_for(self._engine, listed, min_version, timeout_s)
        elif timeout_s is not None:
            raise ArgumentError("pull: timeout_s is how long to wait for min_version; give that as well")
        if out is not None and like is None and self._short("pull", start, key, None, out, priority):
            return None
        with outside_modes():
            if out is None and not isinstance(key, Mapping):
                given, keys = None, keys_of("pull", key)
            elif like is not None:
                raise ArgumentError("pull: got out= and like=; like= chooses what a pull without out returns")
            else:
                given = GivenOuts("pull", key, out, skip_sparse=ignore_sparse)
                keys = given.keys

            def fill() -> NewOuts | GivenOuts:
                specs = self._specs("pull", keys)
                outs = NewOuts("pull", keys, specs, like) if given is None else given
                outs.check(specs)
                self._engine.pull(outs.keys, outs.tensors, priority)
                outs.finish()
                return outs

            outs = shield.run(fill)
            if given is not None:
                self._warn_once(given.skipped)
            self._metrics.add("pull", start, outs.keys, _nbytes(outs.tensors))
            return outs.result(key)

    def pushpull(self, key: Any, value: Any = None, out: Any = None, priority: int = 0) -> Any:
        """Push, then pull the same keys, in one trip.

        Args:
            key, value, priority: as for ``push``.
            out: as for ``pull``; may be the pushed arrays themselves. With a mapping as key, a mapping.

        Returns:
            As ``pull``; without ``out`` and with a mapping as key, a dict of new arrays.

        Raises:
            As ``push`` and ``pull``; no out has been written then.

        >>> import numpy as np
        >>> kv = create()
        >>> kv.init("w", np.zeros(2))
        >>> kv.pushpull("w", [np.ones(2), np.ones(2)])
        array([2., 2.])
        """
        start = self._begin("pushpull", priority)
        if out is not None and self._short("pushpull", start, key, value, out, priority):
            return None
        with outside_modes():
            batch = _batch("pushpull", key, value)
            listed = list(key) if isinstance(key, Mapping) else key
            given = None if out is None else GivenOuts("pushpull", listed, out)
            listed = keys_of("pushpull", listed)

            def push_and_fill() -> NewOuts | GivenOuts:
                specs = self._specs("pushpull", batch.keys)
                by_key = dict(zip(batch.keys, specs, strict=True))
                outs = NewOuts("pushpull", listed, [by_key[each] for each in listed]) if given is None else given
                outs.check(specs)
                self._engine.pushpull(batch, outs.tensors, priority)
                outs.finish()
                return outs

            outs = shield.run(push_and_fill)
            nbytes = map(add, _nbytes(batch.parts), _nbytes(outs.tensors))
            self._metrics.add("pushpull", start, batch.keys, list(nbytes))
            return outs.result(key)

    @runs_outside_modes
    def broadcast(self, key: Any, value: Any = None, out: Any = None, priority: int = 0) -> Any:
        """Put new keys into the store, then pull them: init and pull in one call.

        Args:
            key, value: as for ``init``.
            out: as for ``pull``.
            priority: as for ``push``.

        Returns:
            As ``pushpull``.

        Raises:
            As ``init`` and ``pull``; nothing has changed then.

        >>> import numpy as np
        >>> create().broadcast("w", np.ones(2))
        array([1., 1.])
        """
        start = self._begin("broadcast", priority)
        keys, values = single_values("broadcast", key, value)
        taken, specs = _take_values("broadcast", keys, values)
        outs: NewOuts | GivenOuts
        if out is None:
            outs = NewOuts("broadcast", keys, specs)
        else:
            outs = GivenOuts("broadcast", list(key) if isinstance(key, Mapping) else key, out)
        outs.check(specs)

        def init_and_fill() -> None:
            self._engine.init(keys, taken, specs)
            self._engine.pull(outs.keys, outs.tensors, priority)
            outs.finish()

        shield.run(init_and_fill)
        self._metrics.add("broadcast", start, keys, _nbytes(outs.tensors))
        return outs.result(key)

    @runs_outside_modes
    def row_sparse_pull(self, key: Any, out: Any = None, priority: int = 0, row_ids: Any = None) -> Any:
        """Copy some rows out of the store.

        Args:
            key: a key of a sparse table or of a dense value, or a list of keys.
            out: ``Rows`` whose ids and values are to be replaced, or a list of as many as keys.
            priority: as for ``push``.
            row_ids: integers in an array of any shape or a list, any order, repeats allowed; for a list of keys, a
                list of as many of these.

        Returns:
            None with ``out``. Else ``Rows`` with unique, sorted ids (a list for a list of keys), in the
            library that the key was initialised with. Rows that a table has never seen are zero.

        Raises:
            KeyNotFoundError, ArrayTypeError: as for ``pull``.
            ValueMismatchError: an id out of range, or a value without rows.

        >>> import numpy as np, tensorkv
        >>> kv = create()
        >>> kv.init("t", tensorkv.Rows(np.array([7]), np.ones((1, 2)), num_rows=2_000_000_000))
        >>> rows = kv.row_sparse_pull("t", row_ids=[9, 7, 7])
        >>> rows.ids.tolist(), rows.values.tolist()
        ([7, 9], [[1.0, 1.0], [0.0, 0.0]])
        """
        start = self._begin("row_sparse_pull", priority)
        listed = keys_of("row_sparse_pull", key)
        single = is_key(key)
        if row_ids is None and out is not None and not _holds_rows(out):
            raise ArgumentError(
                f"row_sparse_pull: row_ids= is missing, and the second argument, out, is {show(out)}; "
                "give ids by name: row_ids=[0, 2]"
            )
        wanted = _matching("row_sparse_pull", "row_ids", listed, [row_ids] if single else row_ids)
        outs = None if out is None else _matching("row_sparse_pull", "out", listed, [out] if single else out)
        specs = shield.run(self._specs, "row_sparse_pull", listed)
        ids = [_take_ids(each, spec, own) for each, spec, own in zip(listed, specs, wanted, strict=True)]
        for each, target in zip(listed, outs or (), strict=False):
            if not isinstance(target, Rows):
                raise ArrayTypeError(f"row_sparse_pull({quote(each)}): out is {show(target)}; expected Rows")
        found = shield.run(self._engine.pull_rows, listed, ids)
        pulled = [_give_rows(rows, spec.origin) for rows, spec in zip(found, specs, strict=True)]
        self._metrics.add("row_sparse_pull", start, listed, [rows.values.nbytes for rows in pulled])
        if outs is None:
            return pulled[0] if single else pulled
        for target, rows in zip(outs, pulled, strict=True):
            target.ids, target.values, target.num_rows = rows.ids, rows.values, rows.num_rows
        return None

    @runs_outside_modes
    def snapshot(self) -> Snapshot:
        """Hold all values as they are now, for reading: no update is half in it, on whatever server its keys are.

        Returns:
            A ``Snapshot`` with ``pull``, ``row_sparse_pull``, ``keys`` and ``versions``; close it when you are done.

        Raises:
            ArgumentError: this type of store takes none (``is_capable("snapshot")``).
            SnapshotError: as many are held as the store keeps.

        >>> import numpy as np
        >>> kv = create()
        >>> kv.init("w", np.zeros(2))
        >>> with kv.snapshot() as moment:
        ...     kv.push("w", np.ones(2))
        ...     moment.pull("w"), moment.versions["w"]
        (array([0., 0.]), 0)
        """
        self._begin("snapshot")
        if "snapshot" not in self._engine.capabilities:
            raise ArgumentError(f"snapshot: a store of type {quote(self._type)} takes none; use save()")
        moment: Any = shield.run(self._engine.snapshot)  # type: ignore[attr-defined]
        return Snapshot(KVStore(moment, self._type), moment.versions, self)

    # ------------------------------------------------------------ inside

    def _short(self, verb: str, start: float, key: Any, value: Any, out: Any, priority: int) -> bool:
        """Let the engine do a common call in a short way; False: nothing was done."""
        if value is None and verb != "pull":
            return False
        if type(key) is list:
            if self._many is None or len(key) < MANY:
                return False
            with outside_modes():
                moved = shield.run(self._many, key, value, out, priority)
            if moved is not None:
                if out is not None:
                    count_writes(out)
                self._metrics.add(verb, start, key, moved)
            return moved is not None
        nbytes = self._one(key, value, out) if self._one is not None else None
        if nbytes is not None:
            self._metrics.add_one(verb, start, key, nbytes)
        return nbytes is not None

    def _specs(self, verb: str, keys: Sequence[Key]) -> list[KeySpec]:
        return [self._engine.spec(verb, key) for key in keys]

    def _warn_once(self, warning: SparseOutWarning | None) -> None:
        if warning is not None and not self._warned_sparse_out:
            self._warned_sparse_out = True
            warnings.warn(warning, stacklevel=3)


# In its own messages of a wrong call Python names the class of a method by these.
for _name, _method in vars(StoreControl).items():
    if isfunction(_method):
        _method.__qualname__ = unwrap(_method).__qualname__ = f"KVStore.{_name}"


def _batch(verb: str, key: Any, value: Any) -> Batch:
    keys, groups = pairs(verb, "value", key, value)
    parts = [
        [_take(verb, each, index, array) for index, array in enumerate(group)]
        for each, group in zip(keys, groups, strict=True)
    ]
    return Batch(verb, keys, parts)


def _take(verb: str, key: Key, index: int | None, array: Any) -> Part:
    try:
        return take_rows(array) if is_rows(array) else interop.take(array)
    except TensorKVError as error:
        part = "the value" if index is None else f"part {index}"
        raise type(error)(f"{verb}({quote(key)}): {part} {error}") from None


def _take_values(verb: str, keys: Sequence[Key], values: Sequence[Any]) -> tuple[list[Part], list[KeySpec]]:
    taken = [_take(verb, key, None, value) for key, value in zip(keys, values, strict=True)]
    specs = []
    for part, value in zip(taken, values, strict=True):
        if isinstance(part, Rows):
            library = value.values if isinstance(value, Rows) else value
            specs.append(KeySpec(torch.Size(part.shape), part.values.dtype, interop.origin(library), True))
        else:
            specs.append(KeySpec(part.shape, part.dtype, interop.origin(value), False))
    return taken, specs


def _take_ids(key: Key, spec: KeySpec, row_ids: Any) -> torch.Tensor:
    if not spec.shape:
        raise ValueMismatchError(f"row_sparse_pull({quote(key)}): the value is 0-d and has no rows; use pull")
    try:
        return take_ids(row_ids, spec.shape[0])
    except TensorKVError as error:
        raise type(error)(f"row_sparse_pull({quote(key)}): {error}") from None


def _give_rows(rows: Rows, origin: interop.Origin) -> Rows:
    # JAX has int64 only on demand, and seldom needs it for ids.
    ids = rows.ids.int() if origin.library == "jax" and rows.num_rows <= 1 << 31 else rows.ids
    return Rows(interop.give(ids, origin), interop.give(rows.values, origin), rows.num_rows)


def _holds_rows(out: Any) -> bool:
    return isinstance(out, Rows) or (isinstance(out, list | tuple) and any(isinstance(each, Rows) for each in out))


def _matching(verb: str, what: str, keys: Sequence[Key], values: Any) -> list[Any]:
    if not isinstance(values, list | tuple) or len(values) != len(keys):
        raise ArgumentError(
            f"{verb}: got {len(keys)} keys and {show(values)} as {what}; expected a list of {len(keys)}, "
            "one for each key"
        )
    return list(values)


def _nbytes(groups: Sequence[Sequence[Part]]) -> list[int]:
    return [group[0].nbytes if len(group) == 1 else sum([part.nbytes for part in group]) for group in groups]
