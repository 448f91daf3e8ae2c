"""KVStore: the public methods. A ``Call`` (``engines/call.py``) parses the arguments of a push or a pull."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, Self, TypeVar, overload

import torch

from tensorkv import compiled, compression, engines
from tensorkv.arrays import blocks, interop, trees
from tensorkv.arrays.arguments import (
    Key,
    absolute_path,
    check_flag,
    check_key,
    check_timeout,
    is_key,
    keys_of,
    plain_number,
    single_values,
)
from tensorkv.arrays.keytable import KeyTable, select
from tensorkv.arrays.outputs import GivenOuts, NewOuts, describe_like
from tensorkv.arrays.regions import Region
from tensorkv.arrays.rows import Rows, take_ids, unchecked_rows
from tensorkv.arrays.slices import TensorSlice, empty_whole, local_part
from tensorkv.arrays.spec import KeySpec
from tensorkv.engines.base import ReleaseReader
from tensorkv.engines.call import Call, check_priority, nbytes, take
from tensorkv.engines.regions import RegionReader
from tensorkv.releases.changes import Changes
from tensorkv.runtime import caller, collector, forks
from tensorkv.runtime.modes import outside_modes, runs_outside_modes
from tensorkv.runtime.stats import Metrics, clock
from tensorkv.shard import optimizers
from tensorkv.shard.entry import Entry, KeyInfo, Part
from tensorkv.shard.fused import AVERAGE
from tensorkv.shard.norm import PushResult
from tensorkv.shard.releases import check_keep, check_name
from tensorkv.shard.rules import Assign, Updater, check_ids, check_outs, check_push
from tensorkv.shard.table import Table
from tensorkv.storage.manifest import Contents

from .errors import (
    ArgumentError,
    ArrayTypeError,
    ForkedStoreError,
    KeyNotFoundError,
    KeyTypeError,
    OptimizerError,
    SnapshotError,
    SparseOutWarning,
    StoreClosedError,
    TensorKVError,
    UpdaterError,
    ValueMismatchError,
    naming,
    no_attribute,
    quote,
    show,
)

P = ParamSpec("P")
R = TypeVar("R")
CAPABILITIES = ("checkpoint", "compression", "optimizer", "releases", "rows", "snapshot", "updater")
# How long a pull waits for a version, and a reader for a release, in seconds.
WAIT_S = 60.0
# How long a release stays after it was last read, in seconds.
LEASE_S = 60.0
# Names that users of MXNet's KVStore, or of other key-value stores, may try, and what to use instead.
_FOREIGN_NAMES = {
    "_barrier": "use barrier()",
    "_send_command_to_servers": "servers run no commands of workers",
    "_set_updater": "use set_updater(updater)",
    "get_num_dead_node": "use dead_workers(), a list of ranks",
    "get": "use pull(key)",
    "items": "use keys() and pull(keys)",
    "values": "use keys() and pull(keys)",
    "handle": "there is no native handle; close() ends the store",
    "num_dead_node": "use dead_workers(), a list of ranks",
    "put": "use init(key, value) for a new key, then push(key, value)",
    "set": "use init(key, value) for a new key, then push(key, value)",
    "set_optimizer_states": "use load_optimizer_states(path)",
}


@runs_outside_modes
def create(type: str = "local", **options: Any) -> KVStore:
    """Create an empty store, open one that is kept in a folder, or connect to parameter servers.

    Args:
        type: ``"local"``: one process, sums on the CPU. ``"device"``: one process, sums on the device of the arrays.
            ``"dist_sync"``: processes on one or several hosts, in lock step. ``"dist_async"``: parameter servers in a
            Ray cluster, which are started if no servers of this name run. ``tensorkv.engines.names()`` lists all
            types, with their aliases.
        **options: of the type. All take ``nonfinite``: ``"pass"`` (default), ``"raise"`` or ``"skip"`` updates
            whose sum has NaN or Inf, or ``"skip_step"``, which skips the whole push; and ``reduce``: ``"sum"``
            (default) or ``"mean"`` of the parts of a push.
            ``local``, ``device``: ``threads``; ``local`` also ``path``, ``durability`` and ``log_nbytes``, for a
            store that is kept in a folder.
            ``dist_sync``: ``timeout_s``, ``shared_memory``.
            ``dist_async``: ``num_servers``, ``num_workers``, ``placement``, ``mode``, ``staleness``, ``path``,
            ``durability``, ``spare``, ``keep``, ``heartbeat_timeout_s``, ``pull_dtype``, ``reader``, ``name``,
            ``address``, ``timeout_s``, ``insecure``.

    Raises:
        EngineNotFoundError: the type is unknown.
        ArgumentError: the type has no such option, or its value is out of range.
        StorageError: a folder that cannot be opened.
        RankDeadError, ServerDeadError: other workers, or servers, that did not come in time.

    >>> create("local")
    KVStore('local', 0 keys)
    """
    compiled.warn_once()
    return KVStore(engines.build(type, options), type)


def _collective(method: Callable[P, R]) -> Callable[P, R]:
    """Make a method of a store a call that all workers make together, outside of torch's modes."""

    @wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        store: Any = args[0]
        with store._engine.collective(method.__name__.lstrip("_")), outside_modes():
            return method(*args, **kwargs)

    return call


class _TrainerOptimizer(Protocol):
    """The optimizer of a Trainer, which may have hyperparameters that are not in the store yet."""

    def flush(self) -> None: ...

    def replace_pending(self, words: Collection[str] | None, keys: Collection[Key] | None) -> None: ...


class KVStore:
    """A key-value store of tensors: ``push`` sums arrays and updates values, ``pull`` copies values out.

    Create one with ``tensorkv.create``. Keys are str or int, one type per store. Arrays may be NumPy, PyTorch,
    JAX, CuPy or any that have ``__dlpack__``; the store never shares memory with its callers. Every method may be
    called from several threads. As a context manager a store closes itself.

    >>> import numpy as np
    >>> with create("local") as kv:
    ...     kv.init("w", np.zeros(3, np.float32))
    ...     kv.push("w", [np.ones(3, np.float32), np.full(3, 2, np.float32)])
    ...     kv.pull("w")
    array([3., 3., 3.], dtype=float32)
    """

    _warned_sparse_out = False

    def __init__(self, engine: Any = None, type: Any = None) -> None:
        if not isinstance(engine, engines.Reader) or not isinstance(type, str):
            raise ArgumentError(
                f"KVStore: got {show(engine)} and {show(type)}; create stores with tensorkv.create(type, **options), "
                'such as tensorkv.create("local")'
            )
        self._closed = False
        self._forks = forks.count
        # For a snapshot it is only a Reader, which is enough for the methods that Snapshot calls.
        self._engine: engines.Engine = engine  # type: ignore[assignment]
        self._type = type
        self._metrics = Metrics()
        self._pushes, self._pulls, self._pushpulls = map(self._metrics.of, ("push", "pull", "pushpull"))
        # In the order of their creation, which is the same on all workers.
        self._trainers: weakref.WeakKeyDictionary[_TrainerOptimizer, None] = weakref.WeakKeyDictionary()
        forks.pin_in_children(self)

    if not TYPE_CHECKING:  # so that type checkers report unknown names

        def __getattr__(self, name: str) -> Any:
            raise no_attribute(self, name, _FOREIGN_NAMES)

    # ------------------------------------------------------------ init, push, pull

    @_collective
    def init(self, key: Any, value: Any = None) -> None:
        """Create keys, with copies of their initial values.

        Args:
            key: a key, a list of keys, or a mapping of key to value.
            value: an array or ``Rows`` (a sparse table); for a list of keys, a list of these.

        Raises:
            KeyExistsError: a key exists, or is given twice.
            KeyTypeError: a key is invalid, or not of the type of the store's keys.
            ArrayTypeError: the store cannot hold such a value.

        >>> import numpy as np
        >>> kv = create()
        >>> kv.init([5, 7], [np.ones(2), np.zeros((2, 3))])
        >>> kv.keys()
        [5, 7]
        """
        start = self._begin("init")
        keys, values = single_values("init", key, value)
        with collector.paused():
            taken, specs = _take_values("init", keys, values)
        self._engine.protect(self._engine.init, keys, taken, specs)
        self._metrics.add("init", start, keys, [value.nbytes for value in taken])

    def push(self, key: Any, value: Any = None, priority: int = 0) -> None:
        """Sum the parts of each key, in the order given, and update the key's value with the sum.

        The update is assignment, or the update rule of ``set_updater`` or ``set_optimizer``. The whole call is
        checked before any key changes. float16 and bfloat16 are summed in float32 and rounded once;
        integers wrap around on overflow; bools are combined by "or".

        Args:
            key: a key, a list of keys (the parts of a repeated key are summed), or a mapping of key to value.
            value: an array, ``Rows``, or a list of parts; for a list of keys, a list of these.
            priority: queued pushes of higher priority go first (``dist_sync``); ``local`` does not queue.

        Raises:
            KeyNotFoundError: a key was not initialised.
            ValueMismatchError: a part's shape or dtype does not fit the key.
            ArrayTypeError, ArgumentError, KeyTypeError: an argument is invalid.
            NonFiniteError, OptimizerError, UpdaterError: the update rule refused the sum.
            StorageError: a store that is kept in a folder could not write; nothing has changed.
            RankDeadError, WorkerMismatchError, WorkerError: of ``dist_sync``, also for a push before this one.
            ServerDeadError, PushOutcomeUnknownError, WaitTimeoutError: of ``dist_async``; after the last two the push
                may have been applied; ``applied`` of a ``WaitTimeoutError`` tells.

        >>> import numpy as np
        >>> kv = create()
        >>> kv.init("w", np.zeros(2))
        >>> kv.push("w", [np.ones(2), np.ones(2)])
        >>> kv.pull("w")
        array([2., 2.])
        """
        self._check_open("push")
        call = Call(self._pushes, "push", key, value, None, priority)
        self._engine.push(call)
        call.end()

    def pull(
        self,
        key: Any,
        out: Any = None,
        priority: int = 0,
        ignore_sparse: bool = True,
        *,
        like: Any = None,
        region: Any = None,
        min_version: int | None = None,
        timeout_s: float | None = None,
    ) -> Any:
        """Copy values out of the store.

        Args:
            key: a key, a list of keys, or a mapping of key to out.
            out: an array to fill, or a list of arrays (on several devices); for a list of keys, a list of these.
                Strides and devices may differ; the value is cast to the dtype of ``out`` if that is of the same
                kind or holds every value exactly.
            priority: as for ``push``.
            ignore_sparse: skip a sparse ``out`` with one warning instead of raising.
            like: without ``out``, an array of the library and device to return.
            region: the part of the value that is copied: a slice, or a tuple of slices for the first axes, as in a
                NumPy index, but without steps; for a list of keys, a list of these. No more than that leaves a server,
                and an ``out`` has the shape of the part (None: the whole value).
            min_version: wait until every key has had this many updates (``info(key).version``) by any worker.
            timeout_s: how long to wait for ``min_version``, in seconds (default 60).

        Returns:
            None with ``out``. Otherwise a new array (a list for a list of keys) of the library, dtype and
            device that the key was initialised with.

        Raises:
            KeyNotFoundError: a key was not initialised.
            ValueMismatchError: the shape or dtype of an out does not fit, or ``region`` does not lie in the value.
            ArrayTypeError: an out cannot be written (read-only, JAX); nothing has been written.
            ArgumentError: two outs overlap in memory, ``region`` has a step, or the arguments do not fit together.
            WaitTimeoutError: the version was not reached in time; nothing has been written.

        >>> import numpy as np
        >>> kv = create()
        >>> kv.init("w", np.array([1.5, 2.5], np.float32))
        >>> a, b = np.zeros(2), np.zeros(2, np.float16)
        >>> kv.pull("w", out=[a, b])
        >>> a, b
        (array([1.5, 2.5]), array([1.5, 2.5], dtype=float16))
        >>> kv.pull("w", region=slice(1, 2))
        array([2.5], dtype=float32)
        """
        self._check_open("pull")
        if min_version is not None:
            self._wait_for(key, min_version, timeout_s)
        elif timeout_s is not None:
            raise ArgumentError("pull: timeout_s is how long to wait for min_version; give that as well")
        call = Call(self._pulls, "pull", key, None, out, priority, like, ignore_sparse)
        if region is None:
            self._engine.pull(call)
        else:
            RegionReader(self._engine, _regions(key, region)).pull(call)
        if call.skipped is not None:
            self._warn_once(call.skipped)
        return call.end()

    def _wait_for(self, key: Any, min_version: int, timeout_s: float | None) -> None:
        wanted = plain_number(min_version)
        if type(wanted) is not int:
            raise ArgumentError(f"pull: min_version is {show(min_version)}; expected an int")
        with naming("pull"):
            seconds = WAIT_S if timeout_s is None else check_timeout(timeout_s)
        keys = keys_of("pull", list(key) if isinstance(key, Mapping) else key)
        self._engine.wait_for(keys, wanted, seconds)

    def pushpull(self, key: Any, value: Any = None, out: Any = None, priority: int = 0) -> Any:
        """Push, then pull the same keys, in one trip.

        Args:
            key, value, priority: as for ``push``.
            out: as for ``pull``; may be the pushed arrays themselves. With a mapping as key, a mapping. A key whose out
                is an empty list, as a sparse table's has to be, is not pulled.

        Returns:
            As ``pull``; without ``out`` and with a mapping as key, a dict of new arrays.

        Raises:
            TensorKVError: as ``push`` and ``pull``; no out has been written.

        >>> import numpy as np
        >>> kv = create()
        >>> kv.init("w", np.zeros(2))
        >>> kv.pushpull("w", [np.ones(2), np.ones(2)])
        array([2., 2.])
        """
        self._check_open("pushpull")
        call = Call(self._pushpulls, "pushpull", key, value, out, priority)
        self._engine.pushpull(call)
        return call.end()

    @_collective
    def broadcast(self, key: Any, value: Any = None, out: Any = None, priority: int = 0) -> Any:
        """Create keys, then pull them: ``init`` and ``pull`` in one call.

        Args:
            key, value: as for ``init``.
            out: as for ``pull``.
            priority: as for ``push``.

        Returns:
            As ``pushpull``.

        Raises:
            TensorKVError: as ``init`` and ``pull``; nothing has changed.

        >>> import numpy as np
        >>> create().broadcast("w", np.ones(2))
        array([1., 1.])
        """
        start = self._begin("broadcast")
        check_priority("broadcast", priority)
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
            outs.fill(self._engine.pull_into, self._engine.pull_regions, self._engine.together)

        self._engine.protect(init_and_fill)
        self._metrics.add("broadcast", start, keys, list(map(nbytes, outs.tensors)))
        return outs.result(key)

    @_collective
    def pull_ema(self, key: Any, out: Any = None, *, like: Any = None, row_ids: Any = None) -> Any:
        """Copy the moving averages of values out of the store, which ``set_optimizer(..., ema=0.999)`` keeps.

        Args:
            key, out, like: as for ``pull``. A key that was not updated since averages are kept has its value.
            row_ids: for one key, the rows to return, as for ``row_sparse_pull``; a sparse table needs them.

        Returns:
            As ``pull``; with ``row_ids`` ``Rows``.

        Raises:
            OptimizerError: the store has no optimizer that keeps averages.
            TensorKVError: as ``pull``; nothing has been written.

        Limits: with several workers or servers, all values and their optimizer state are gathered, so call it seldom,
        such as once an epoch. The workers of ``dist_sync`` call it together.

        >>> import numpy as np
        >>> kv = create()
        >>> kv.init("w", np.zeros(1))
        >>> kv.set_optimizer("sgd", lr=1.0, ema=0.5)
        >>> for _ in range(2):
        ...     kv.push("w", -np.ones(1))
        >>> kv.pull("w"), kv.pull_ema("w")
        (array([2.]), array([1.25]))
        """
        start = self._begin("pull_ema")
        spec = self._engine.optimizer
        if spec is None or spec.ema is None:
            raise OptimizerError("pull_ema: the store keeps no averages; call set_optimizer(..., ema=0.999) first")
        if row_ids is not None:
            return self._pull_average_rows(start, check_key("pull_ema", key), row_ids)
        call = Call(self._metrics.of("pull_ema"), "pull_ema", key, None, out, 0, like)
        call.check()
        self._engine.protect(self._fill_with_averages, call)
        return call.end()

    def _fill_with_averages(self, call: Call) -> None:
        held: KeyTable[Entry] = KeyTable()
        with ExitStack() as reading:

            def copy(keys: list[Key], outs: list[list[torch.Tensor]]) -> None:
                # Workers whose outs are whole, and others whose outs are parts, make the same calls.
                contents = reading.enter_context(self._averages(keys))
                held.update({entry.key: entry for entry in contents.entries})
                copy_parts(keys, None, outs)

            def copy_parts(keys: list[Key], regions: Sequence[Region] | None, outs: list[list[torch.Tensor]]) -> None:
                entries = [held.find("pull_ema", key) for key in keys]
                check_outs("pull_ema", entries, outs, regions)
                for place, (entry, tensors) in enumerate(zip(entries, outs, strict=True)):
                    average = entry.state.get(AVERAGE, entry.tensor)
                    for tensor in tensors:
                        tensor.copy_(average if regions is None else regions[place].of(average))

            call.fill(self._engine.spec, copy, copy_parts, nullcontext)

    def _averages(self, keys: Sequence[Key]) -> AbstractContextManager[Contents]:
        """Return a block in which nothing changes what the store holds, once all workers ask for the same keys."""
        self._engine.agree("pull_ema", list(map(str, keys)))
        return self._engine.contents()

    def _pull_average_rows(self, start: float, key: Key, row_ids: Any) -> Rows:
        spec = self._engine.protect(self._engine.spec, "pull_ema", key)
        ids = _take_ids("pull_ema", key, spec, row_ids)

        def read() -> torch.Tensor:
            with self._averages([key]) as contents:
                held = KeyTable({entry.key: entry for entry in contents.entries})
                entry: Entry = held.find("pull_ema", key)
                check_ids("pull_ema", [entry], [ids])
                if isinstance(entry.value, Table):
                    return entry.value.read(ids, AVERAGE if AVERAGE in entry.value.columns else "")
                average = entry.state.get(AVERAGE)
                return entry.read_rows(ids) if average is None else average[ids].to(spec.dtype)

        rows = _give_rows("pull_ema", key, Rows(ids, self._engine.protect(read), spec.shape[0]), spec.origin)
        self._metrics.add("pull_ema", start, [key], [rows.values.nbytes])
        return rows

    # ------------------------------------------------------------ trees

    def init_tree(self, tree: Any, *, prefix: str = "", rename: trees.Rename | None = None, dtype: Any = None) -> None:
        """Create a key for each array of a tree.

        A tree is an array, or dicts, lists, tuples and NamedTuples of trees; where JAX was imported, any pytree. The
        key of an array is the path to it, joined with dots. None is a tree without arrays. A ``torch.nn.Module`` is a
        tree, also inside of others, of the parameters and buffers of its ``state_dict``; tied ones have one key, with
        the first of their names.

        Args:
            tree: of arrays of any library, or ``Rows``.
            prefix: put before each key, with a dot in between: several trees can share a store.
            rename: other names for arrays: a mapping from path to name, in which others are left as they are, or a
                function that is called with each path.
            dtype: of the keys of floating-point arrays, such as ``"bfloat16"`` or ``torch.float16``: values are rounded
                to it, now and when they are pushed in another one (None: the dtype of each array). Integers, bools,
                float8, complex numbers and tables stay as they are. With ``"float8_e4m3fn"`` each array of at least two
                axes has two keys, as ``quantize_blocks`` makes them, and the others stay as they are.

        Raises:
            ArgumentError: two arrays of one name; a bare array without a prefix; a tree that contains itself; an
                invalid ``rename``, or a ``dtype`` that is not floating-point.
            TensorKVError: as ``init``; the messages name the path.

        >>> import numpy as np
        >>> kv = create()
        >>> kv.init_tree({"layers": [{"w": np.zeros(2)}, {"w": np.ones(1)}]}, prefix="net")
        >>> kv.keys()
        ['net.layers.0.w', 'net.layers.1.w']
        """
        flat = self._flatten("init_tree", partial(trees.flatten_as, dtype), tree, prefix, rename)
        self.init(flat.names, flat.leaves)

    def _flatten(self, verb: str, flatten: Callable[..., R], *tree: Any) -> R:
        """Begin a verb for trees: return the names and arrays of a tree, or of several that are parts."""
        self._check_open(verb)
        # Workers in lock step do not wait for one whose tree is refused.
        with self._engine.collective(verb), outside_modes():
            return flatten(verb, *tree)

    def push_tree(self, *parts: Any, prefix: str = "", rename: trees.Rename | None = None, priority: int = 0) -> None:
        """Push every array of a tree, as one ``push``; create the keys that are new.

        A key that does not exist is created, of zeros, where a sum replaces the value: with neither an optimizer nor an
        updater. Otherwise it is an error, since a first gradient is not a value.

        Args:
            *parts: trees of equal structure, such as each device's gradients: the arrays at one path are the parts of
                one key, summed in the order given. The trees may have fewer arrays than the store has keys.
            prefix, rename: as for ``init_tree``.
            priority: as for ``push``.

        Raises:
            ArgumentError: trees of different structure, or as for ``init_tree``.
            KeyNotFoundError: a key does not exist, and the store has an optimizer or an updater.
            TensorKVError: as ``push``; the messages name the path.

        >>> import numpy as np
        >>> kv = create()
        >>> kv.init_tree({"b": np.zeros(1)})
        >>> kv.push_tree({"w": np.ones(2), "b": None}, {"w": np.ones(2), "b": None})
        >>> kv.pull_tree()
        {'b': array([0.]), 'w': array([2., 2.])}
        """
        flat, values = self._flatten("push_tree", trees.flatten_parts, parts, prefix, rename)
        self._push_tree("push_tree", self.push, flat, values, priority)

    def pull_tree(
        self,
        like: Any = None,
        *,
        into: Any = None,
        prefix: str = "",
        rename: trees.Rename | None = None,
        strict: bool = True,
    ) -> Any:
        """Pull every array of a tree, as one ``pull``.

        Args:
            like: a tree of the structure to return. Its arrays have the shapes of the keys, choose library, device and
                dtype, and may be ``jax.ShapeDtypeStruct``.
            into: a tree of arrays to fill instead, such as a model or its ``state_dict()``.
            prefix, rename: as for ``init_tree``; ``rename`` goes with ``like`` or ``into``.
            strict: whether an array of ``into`` that has no key is an error, or left as it is.

        Returns:
            None with ``into``. A tree of new arrays with ``like``. Otherwise nested dicts of all keys that begin with
            the prefix, as each key was initialised, without sparse tables (see ``row_sparse_pull``).

        Raises:
            KeyNotFoundError: the store has no key of that path, or none that begins with the prefix.
            ValueMismatchError: an array of another shape than its key, or of a dtype that a ``pull`` does not cast to.
            ArgumentError: as for ``init_tree``; ``like`` and ``into``; keys that do not make nested dicts.
            TensorKVError: as ``pull``; nothing has been written.

        >>> import numpy as np, torch
        >>> kv = create()
        >>> kv.init_tree({"layers": [np.zeros(2), np.ones(1)]})
        >>> kv.pull_tree({"layers": [torch.empty(2), torch.empty(1)]})
        {'layers': [tensor([0., 0.]), tensor([1.])]}
        >>> kv.pull_tree()
        {'layers': {'0': array([0., 0.]), '1': array([1.])}}
        """
        self._check_open("pull_tree")
        if into is not None:
            if like is not None:
                raise ArgumentError("pull_tree: got like= and into=; like= is the structure of a new tree")
            flat = trees.flatten("pull_tree", into, prefix, rename)
            wanted = dict(zip(flat.names, flat.leaves, strict=True))
            if not check_flag("pull_tree: strict", strict):
                held = set(self.keys())
                wanted = {name: array for name, array in wanted.items() if name in held}
            self._pull_into(list(wanted), list(wanted.values()))
            return None
        if like is not None:
            flat = trees.flatten("pull_tree", like, prefix, rename)
            return flat.rebuild(self._pull_like(flat.names, flat.leaves))
        if rename is not None or strict is not True:
            raise ArgumentError("pull_tree: rename and strict are for the arrays of like= or into=; give one of these")
        base = trees.check_prefix("pull_tree", prefix)
        keys = self.keys()
        names = [key for key in keys if isinstance(key, str) and trees.is_below(key, base)]
        if not names and (base or keys):
            what = f"begins with {quote(base)}" if base else "is a str"
            raise KeyNotFoundError(
                f"pull_tree: no key {what}; the store has {show(keys[:3])}{', ...' * (len(keys) > 3)}"
            )
        dense = self._engine.protect(lambda: [key for key in names if not self._engine.spec("pull", key).is_table])
        return trees.nest("pull_tree", dict(zip(dense, self.pull(dense), strict=True)), base)

    @runs_outside_modes
    def _pull_like(self, keys: list[str], arrays: list[Any]) -> list[Any]:
        """Return the value of each key as an array of the shape, dtype, library and device of another array."""
        wanted = [describe_like("pull_tree", key, array) for key, array in zip(keys, arrays, strict=True)]
        held = self._engine.protect(lambda: [self._engine.spec("pull", key) for key in keys])
        if all(
            shape == spec.shape and dtype is spec.dtype and (origin is wanted[0][2] or origin == wanted[0][2])
            for (shape, dtype, origin), spec in zip(wanted, held, strict=True)
        ):
            same: list[Any] = self.pull(keys, like=arrays[0] if arrays else None)
            return same
        specs = [KeySpec(torch.Size(shape), dtype, origin, is_table=False) for shape, dtype, origin in wanted]
        outs = [spec.new() for spec in specs]
        self._pull_into(keys, outs)
        return interop.give_each(outs, [spec.origin for spec in specs])

    @runs_outside_modes
    def _pull_into(self, names: list[str], outs: list[Any]) -> None:
        """Fill arrays with values; only if that fails, look for values in blocks of float8, and restore them."""
        try:
            self.pull(names, out=outs)
        except ValueMismatchError:
            wide = {
                name: spec
                for name, spec, out in zip(names, self._specs_in_blocks(names), outs, strict=True)
                if spec is not None and interop.shape_and_dtype(local_part(out)[0])[1] is not blocks.DTYPE
            }
            if not wide:
                raise
            given = dict(zip(names, outs, strict=True))
            restored = GivenOuts("pull_tree", list(wide), [given[name] for name in wide])
            restored.check([replace(spec, dtype=torch.float32) for spec in wide.values()])
            pairs = {name: blocks.empty_pair(spec.shape) for name, spec in wide.items()}
            for name, (values, scale_inv) in pairs.items():
                own = given.get(name + blocks.SUFFIX)
                given[name], given[name + blocks.SUFFIX] = values, scale_inv if own is None else [scale_inv, own]
            self.pull(list(given), out=list(given.values()))

            def copy(keys: list[Key], tensors: list[list[torch.Tensor]]) -> None:
                for key, own in zip(keys, tensors, strict=True):
                    for tensor in own:
                        tensor.copy_(blocks.restore(*pairs[str(key)], torch.float32))

            def copy_parts(keys: list[Key], regions: list[Region], tensors: list[list[torch.Tensor]]) -> None:
                for key, region, (tensor,) in zip(keys, regions, tensors, strict=True):
                    tensor.copy_(region.of(blocks.restore(*pairs[str(key)], torch.float32)))

            with torch.no_grad():
                restored.fill(copy, copy_parts)

    def _specs_in_blocks(self, names: list[str]) -> list[KeySpec | None]:
        """Return how each of some keys is held in blocks of float8; None: it is not, or does not exist."""
        held = set(self.keys())

        def look(name: str) -> KeySpec | None:
            if name not in held or name + blocks.SUFFIX not in held:
                return None
            spec, scales = (self._engine.spec("pull", key) for key in (name, name + blocks.SUFFIX))
            is_pair = spec.dtype is blocks.DTYPE and len(spec.shape) > 1 and not spec.is_table
            return spec if is_pair and scales.shape == blocks.scales_shape(spec.shape) else None

        return self._engine.protect(lambda: list(map(look, names)))

    def pushpull_tree(
        self, *parts: Any, prefix: str = "", rename: trees.Rename | None = None, priority: int = 0
    ) -> Any:
        """Push every array of a tree, then pull the same keys, as one ``pushpull``; create keys as ``push_tree``.

        Args:
            *parts, prefix, rename, priority: as for ``push_tree``.

        Returns:
            A tree of the structure of ``parts[0]`` with the new values, as each key was initialised: with an optimizer
            in the store the new parameters, without one the sum.

        Raises:
            TensorKVError: as ``push_tree``.

        >>> import numpy as np
        >>> kv = create()
        >>> kv.init_tree({"w": np.ones(2)})
        >>> kv.set_optimizer("sgd", lr=0.5)
        >>> kv.pushpull_tree({"w": np.ones(2)})
        {'w': array([0.5, 0.5])}
        """
        flat, values = self._flatten("pushpull_tree", trees.flatten_parts, parts, prefix, rename)
        return flat.rebuild(self._push_tree("pushpull_tree", self.pushpull, flat, values, priority))

    def _push_tree(self, verb: str, push: Callable[..., R], flat: trees.Flat, values: list[Any], priority: int) -> R:
        """Push the arrays of a tree; only if that fails, look for values in blocks, and for keys that do not exist."""
        try:
            return push(flat.names, values, priority=priority)
        except (KeyNotFoundError, ValueMismatchError) as error:
            # Workers in lock step do not wait for one whose arrays are refused.
            with self._engine.collective(verb):
                rounded, values = self._in_blocks(verb, flat, values)
            if isinstance(error, KeyNotFoundError):
                self._init_missing(verb, rounded, values, error)
            elif rounded is flat:
                raise
        return push(rounded.names, values, priority=priority)

    @runs_outside_modes
    def _in_blocks(self, verb: str, flat: trees.Flat, values: list[Any]) -> tuple[trees.Flat, list[Any]]:
        """Return the arrays of a push, those in two for which the store has values in blocks of float8."""
        names: list[str] = []
        leaves: list[Any] = []
        given: list[Any] = []
        columns = zip(flat.names, flat.leaves, self._specs_in_blocks(flat.names), values, strict=True)
        for name, leaf, spec, value in columns:
            parts = value if isinstance(value, list) else [value]
            names.append(name)
            is_array = not any(isinstance(part, Rows | TensorSlice) for part in parts)
            if spec is None or not is_array or all(interop.shape_and_dtype(part)[1] is blocks.DTYPE for part in parts):
                leaves.append(leaf)
                given.append(value)
                continue
            sums_workers = self._engine.num_workers > 1 and self._engine.joins_workers != "alone"
            if verb == "pushpull_tree" or sums_workers:
                why = (
                    "with push_tree, then pull them" if verb == "pushpull_tree" else "where workers do not push in step"
                )
                raise ArgumentError(
                    f"{verb}({quote(name)}): the store holds it in blocks of float8; push such values {why}"
                )
            pair = blocks.quantize_sum(f"{verb}({quote(name)})", parts, averages=self._engine.averages)
            leaves += pair
            given += pair
            names.append(name + blocks.SUFFIX)
        trees.check_names(verb, names)
        return (flat if names == flat.names else replace(flat, names=names, leaves=leaves)), given

    @_collective
    def _init_missing(self, verb: str, flat: trees.Flat, values: list[Any], error: KeyNotFoundError) -> None:
        """Create the keys that a push of a tree lacks, of zeros, once the whole push is known to fit."""
        start = self._begin(verb)
        if not self._engine.assigns:
            raise KeyNotFoundError(
                f"{error}; {verb} creates keys where a sum replaces the value, and this store has an update rule, for "
                "which a first gradient is not a value: call init_tree first"
            ) from None
        batch = Call(self._pushes, verb, flat.names, values, None, 0).batch
        held = set(self._engine.keys())
        new = {name: leaf for name, leaf in zip(flat.names, flat.leaves, strict=True) if name not in held}
        wholes = [empty_whole(leaf) for leaf in new.values()]
        taken, specs = _take_values(verb, list(new), wholes)
        specs = [
            spec if whole is leaf else spec.of(interop.origin(local_part(leaf)[0]).for_parts())
            for spec, whole, leaf in zip(specs, wholes, new.values(), strict=True)
        ]
        made: dict[Key, KeySpec] = dict(zip(new, specs, strict=True))
        wanted = [made.get(key) or self._engine.spec(verb, key) for key in batch.keys]
        entries = [Entry(key, spec, parts[0]) for key, spec, parts in zip(batch.keys, wanted, batch.parts, strict=True)]
        check_push(batch, entries, Assign(), self._engine.averages)
        # Not the first parts: the push may be left out, as one of NaN or Inf is if the store was asked for that.
        blank = [_blank(part) for part in taken]
        self._engine.protect(self._engine.init_missing, list(new), blank, specs)
        self._metrics.add("init", start, list(new), [part.nbytes for part in blank])

    def broadcast_tree(self, tree: Any, *, prefix: str = "", rename: trees.Rename | None = None) -> Any:
        """Create a key for each array of a tree, then pull them: ``init_tree`` and ``pull_tree`` in one call.

        Args:
            tree, prefix, rename: as for ``init_tree``.

        Returns:
            A tree of new arrays; with several workers they have rank 0's values.

        Raises:
            TensorKVError: as ``init_tree``; nothing has changed.

        >>> import numpy as np
        >>> create().broadcast_tree([np.ones(2), {"b": np.zeros(1)}])
        [array([1., 1.]), {'b': array([0.])}]
        """
        flat = self._flatten("broadcast_tree", trees.flatten, tree, prefix, rename)
        return flat.rebuild(self.broadcast(flat.names, flat.leaves))

    # ------------------------------------------------------------ rows, snapshots

    @runs_outside_modes
    def row_sparse_pull(self, key: Any, out: Any = None, priority: int = 0, row_ids: Any = None) -> Any:
        """Copy some rows out of the store.

        Args:
            key: a key of a sparse table or of a dense value, or a list of keys.
            out: ``Rows`` whose ids and values are replaced; for a list of keys, a list of these.
            priority: as for ``push``.
            row_ids: integers in an array of any shape or a list, in any order, repeats allowed; for a list of keys, a
                list of these.

        Returns:
            None with ``out``. Otherwise ``Rows`` with unique, sorted ids (a list for a list of keys), of the
            library that the key was initialised with. Rows that were never pushed are as the table's ``init`` says,
            zero by default.

        Raises:
            KeyNotFoundError, ArrayTypeError: as for ``pull``.
            ValueMismatchError: an id is out of range, or the value is 0-d.

        >>> import numpy as np, tensorkv
        >>> kv = create()
        >>> kv.init("t", tensorkv.Rows(np.array([7]), np.ones((1, 2)), num_rows=2_000_000_000))
        >>> rows = kv.row_sparse_pull("t", row_ids=[9, 7, 7])
        >>> rows.ids.tolist(), rows.values.tolist()
        ([7, 9], [[1.0, 1.0], [0.0, 0.0]])
        """
        start = self._begin("row_sparse_pull")
        check_priority("row_sparse_pull", priority)
        listed = keys_of("row_sparse_pull", key)
        single = is_key(key)
        if row_ids is None and out is not None and not _holds_rows(out):
            raise ArgumentError(
                f"row_sparse_pull: row_ids= is missing, and the second argument, out, is {show(out)}; "
                "give ids by name: row_ids=[0, 2]"
            )
        wanted = _matching("row_sparse_pull", "row_ids", listed, [row_ids] if single else row_ids)
        outs = None if out is None else _matching("row_sparse_pull", "out", listed, [out] if single else out)
        specs = self._engine.transfer(lambda: [self._engine.spec("row_sparse_pull", each) for each in listed])
        ids = [
            _take_ids("row_sparse_pull", each, spec, own) for each, spec, own in zip(listed, specs, wanted, strict=True)
        ]
        for each, target in zip(listed, outs or (), strict=False):
            if not isinstance(target, Rows):
                raise ArrayTypeError(f"row_sparse_pull({quote(each)}): out is {show(target)}; expected Rows")
        found = self._engine.transfer(self._engine.pull_rows, listed, ids)
        pulled = [
            _give_rows("row_sparse_pull", each, rows, spec.origin)
            for each, rows, spec in zip(listed, found, specs, strict=True)
        ]
        self._metrics.add("row_sparse_pull", start, listed, [rows.values.nbytes for rows in pulled])
        if outs is None:
            return pulled[0] if single else pulled
        for target, rows in zip(outs, pulled, strict=True):
            target.ids, target.values, target.num_rows = rows.ids, rows.values, rows.num_rows
        return None

    @runs_outside_modes
    def snapshot(self) -> Snapshot:
        """Take a consistent snapshot of all values: each update is in it as a whole or not at all, on every server.

        Returns:
            A ``Snapshot`` with ``pull``, ``pull_tree``, ``row_sparse_pull``, ``keys`` and ``versions``; close it after
            use.

        Raises:
            ArgumentError: this type of store has no snapshots (``is_capable("snapshot")``).
            SnapshotError: the store holds as many snapshots as it keeps.

        >>> import numpy as np
        >>> kv = create()
        >>> kv.init("w", np.zeros(2))
        >>> with kv.snapshot() as snapshot:
        ...     kv.push("w", np.ones(2))
        ...     snapshot.pull("w"), snapshot.versions["w"]
        (array([0., 0.]), 0)
        """
        self._begin("snapshot")
        if "snapshot" not in self._engine.capabilities:
            raise ArgumentError(f"snapshot: a store of type {quote(self._type)} has no snapshots; use save()")
        reader, versions = self._engine.protect(self._engine.snapshot)
        return Snapshot(KVStore(reader, self._type), versions, self)

    # ------------------------------------------------------------ releases

    def publish(self, name: str, keys: Any = None, *, keep: int | None = None) -> None:
        """Publish the present values as a release, an immutable version with a name.

        Nothing is copied until a value changes. Each update is in a release as a whole or not at all, on every server.

        Args:
            name: of the release, a str of at most 255 characters. Each name is used once, also after its release is
                dropped; the last 10,000 names are remembered.
            keys: to publish: a key, a pattern, a function or a list, as for ``set_hyperparameters`` (None: all keys).
            keep: how many of the newest releases stay, this one included; older ones are dropped once nobody reads
                them (None: all stay).

        Raises:
            ReleaseExistsError: there was a release of this name.
            KeyNotFoundError: a key does not exist, or a pattern or function chooses none.
            ArgumentError: an invalid name or ``keep``; this type of store has no releases
                (``is_capable("releases")``).

        >>> import numpy as np
        >>> kv = create()
        >>> kv.init("w", np.zeros(2))
        >>> kv.publish("step-1", keep=2)
        >>> kv.push("w", np.ones(2))
        >>> with kv.open_release("step-1") as release:
        ...     release.pull("w")
        array([0., 0.])
        """
        self._begin_release("publish", name)
        keep = check_keep(f"publish({quote(name)})", keep)
        chosen = None if keys is None else select("publish", keys, self.keys)
        self._engine.protect(self._engine.publish, name, chosen, keep)

    def releases(self) -> list[ReleaseInfo]:
        """Return the releases that are held, from the oldest to the newest.

        Raises:
            ArgumentError: this type of store has no releases.

        >>> kv = create()
        >>> kv.publish("empty")
        >>> kv.releases()
        [ReleaseInfo(name='empty', number=1)]
        """
        self._begin_release("releases")
        return [ReleaseInfo(*each) for each in self._engine.protect(self._engine.releases)]

    def unpublish(self, name: str) -> None:
        """Drop a release, once nobody reads it.

        Raises:
            ReleaseNotFoundError: it was dropped, or never published.
            ArgumentError: this type of store has no releases.
        """
        self._begin_release("unpublish", name)
        self._engine.protect(self._engine.unpublish, name)

    def open_release(self, name: str, *, lease_s: float = LEASE_S) -> Release:
        """Open a release for reading; close it after use.

        Args:
            name: of the release.
            lease_s: how long the release stays after it was last read, in seconds, though others drop it.

        Returns:
            A ``Release`` with ``pull``, ``pull_tree``, ``row_sparse_pull``, ``changes`` and ``digest``.

        Raises:
            ReleaseNotFoundError: it was dropped, or never published.
            ArgumentError: this type of store has no releases, or an invalid ``lease_s``.
        """
        self._begin_release("open_release", name)
        lease_s = check_timeout(lease_s, "open_release: lease_s")
        return self._opened(self._engine.protect(self._engine.open_release, name, lease_s))

    def wait_release(
        self, after: str | Release | None = None, *, timeout_s: float = WAIT_S, lease_s: float = LEASE_S
    ) -> Release:
        """Wait until there is a release that is newer than another one, and open the newest.

        A reader that falls behind gets the newest release, not those between.

        Args:
            after: a release or its name, which may have been dropped since; None or ``""``: any release will do.
            timeout_s: how long to wait, in seconds.
            lease_s: as for ``open_release``.

        Returns:
            As ``open_release``.

        Raises:
            WaitTimeoutError: no newer release was published in time.
            ReleaseNotFoundError: there never was a release ``after``.
            ArgumentError: this type of store has no releases, or an invalid time.

        >>> kv = create()
        >>> kv.publish("step-1")
        >>> kv.publish("step-2")
        >>> kv.wait_release(after="step-1").name
        'step-2'
        """
        name = after.name if isinstance(after, Release) else after or None
        self._begin_release("wait_release", *([] if name is None else [name]))
        timeout_s = check_timeout(timeout_s, "wait_release: timeout_s")
        lease_s = check_timeout(lease_s, "wait_release: lease_s")
        return self._opened(self._engine.wait_release(name, timeout_s, lease_s))

    def _begin_release(self, verb: str, *names: Any) -> None:
        """Check that this store has releases, and names of them."""
        self._begin(verb)
        if "releases" not in self._engine.capabilities:
            raise ArgumentError(f"{verb}: a store of type {quote(self._type)} has no releases")
        for name in names:
            check_name(verb, name)

    def _opened(self, reader: ReleaseReader) -> Release:
        return Release(KVStore(reader, self._type), reader, self)

    # ------------------------------------------------------------ the update rule

    @_collective
    def set_updater(self, updater: Updater | None) -> None:
        """Update values with a function of the sum and the value.

        Args:
            updater: ``updater(key, received, stored)``, which changes ``stored`` in place; ``received`` is the sum.
                Both are arrays of the key's library (NumPy for JAX, whose arrays are immutable); for a push of Rows
                they are Rows with equal ids, and the function changes ``stored.values``. None restores assignment.

        Raises:
            ArgumentError: not callable; or the type is ``dist_async``, since a function cannot be sent without
                pickle.

        If the updater raises, its key keeps its value, and the exception reaches the caller of the push. It runs
        while the store is locked: calling the store from it raises UpdaterError.

        >>> import tensorkv, numpy as np
        >>> def update(key, received, stored):
        ...     stored += received * 2
        >>> kv = tensorkv.create()
        >>> kv.init(3, np.ones(2))
        >>> kv.set_updater(update)
        >>> kv.pushpull(3, np.ones(2))
        array([3., 3.])
        """
        self._begin("set_updater")
        if updater is not None and not callable(updater):
            raise ArgumentError(f"set_updater: got {show(updater)}; expected a function updater(key, received, stored)")
        self._engine.protect(self._engine.set_updater, updater)

    @_collective
    def set_optimizer(self, optimizer: Any, *unnamed: Any, **hyperparameters: Any) -> None:
        """Update values with an optimizer, which takes the sum of a push as the gradient.

        Args:
            optimizer: the name or class of an optimizer of torch.optim, such as ``"sgd"``, ``"adamw"``
                or ``torch.optim.SGD``. LBFGS and SparseAdam are not supported: they need more than a gradient.
            *unnamed: not allowed; give hyperparameters by name.
            **hyperparameters: by their torch.optim names; also ``rescale_grad`` (factor on the
                sum, default 1), ``clip_gradient`` (bound on the absolute value of each element after
                rescaling, default None), ``max_grad_norm`` (bound on the 2-norm of the gradients of all keys of a
                push after rescaling, default None) and ``ema`` (the share that a step keeps of a moving average of
                each value, such as 0.999, default None: no averages; see ``pull_ema``).

        Raises:
            OptimizerError: the optimizer or a hyperparameter is unknown, or a hyperparameter is out of range.
            ArgumentError: a hyperparameter was given without its name.

        A push steps its own keys only. Setting the same optimizer again keeps its state and replaces its
        hyperparameters. Rows step lazily: rows that are not in a push change neither value nor momentum.

        >>> import tensorkv, numpy as np
        >>> kv = tensorkv.create()
        >>> kv.init("w", np.ones(2))
        >>> kv.set_optimizer("sgd", lr=0.5)
        >>> kv.pushpull("w", np.ones(2))
        array([0.5, 0.5])
        """
        self._begin("set_optimizer")
        _refuse_unnamed("set_optimizer", unnamed)
        with naming("set_optimizer"):
            spec = optimizers.spec(optimizer, hyperparameters)
        self._engine.protect(self._engine.set_optimizer, spec)
        self._replace_pending()

    @_collective
    def set_hyperparameters(self, keys: Any = None, *unnamed: Any, **hyperparameters: Any) -> None:
        """Change hyperparameters of the optimizer and keep its state.

        Args:
            keys: a key, a pattern such as ``"*.bias"`` (as of ``fnmatch``), a function that is called with each
                key and returns whether it is chosen, or a list of these; an existing key of exactly the pattern's name
                is that key. None changes all keys, and replaces what was set for single keys.
            *unnamed: not allowed; give hyperparameters by name.
            **hyperparameters: such as ``lr=0.01``; ``rescale_grad``, ``clip_gradient``, ``max_grad_norm`` and ``ema``
                hold for all keys only.

        Raises:
            OptimizerError: the store has no optimizer, or a hyperparameter is unknown or out of range.
            KeyNotFoundError: a key was not initialised, or a pattern or function chooses none.

        >>> import tensorkv
        >>> kv = tensorkv.create()
        >>> kv.set_optimizer("sgd", lr=0.5)
        >>> kv.set_hyperparameters(lr=0.25)
        >>> kv.optimizer["lr"]
        0.25
        """
        self._begin("set_hyperparameters")
        _refuse_unnamed("set_hyperparameters", unnamed)
        listed = None if keys is None else select("set_hyperparameters", keys, self._engine.keys)
        with naming("set_hyperparameters"):
            self._engine.protect(self._engine.set_hyperparameters, hyperparameters, listed)
        self._replace_pending(hyperparameters, listed)

    @_collective
    def set_gradient_compression(self, compression_params: Any, *unnamed: Any, simulate: bool = False) -> None:
        """Send gradients in fewer bytes; what is not sent is kept, and added to the next gradient of the key.

        Args:
            compression_params: a dict with ``"type"``, one of ``tensorkv.compression.names()``, and the parameters of
                that codec; None, or the type ``"none"``: gradients are sent as they are.
                ``{"type": "2bit", "threshold": 0.5}``: plus or minus the threshold, or nothing.
                ``{"type": "1bit", "threshold": 0.0}``: plus or minus one.
                ``{"type": "fp16"}``, ``{"type": "bf16"}``, ``{"type": "int8"}``: each element in fewer bits.
                ``{"type": "topk", "ratio": 0.01}``: the largest elements.
                ``{"type": "powersgd", "rank": 2}``: matrices as products of thin ones.
            *unnamed: not allowed.
            simulate: on a store that sends nothing (``local``, ``device``, ``dist_sync`` alone or on one host),
                compress each part of a push as if a worker had sent it. It changes nothing where something is sent.

        Raises:
            ArgumentError: the type or a parameter is unknown or out of range, or the store sends nothing.
            OptimizerError, UpdaterError: the update rule refused the residuals of earlier gradients.

        From now on a push takes dense gradients of float32, float16 and bfloat16 for dense keys; Rows for tables,
        values of ``init``, and pulls are not compressed. A gradient with NaN or Inf is a ``NonFiniteError``. Where
        the setting changes and there is an update rule, residuals are pushed first, without compression.

        >>> import numpy as np
        >>> kv = create()
        >>> kv.init("w", np.zeros(3, np.float32))
        >>> kv.set_gradient_compression({"type": "2bit", "threshold": 0.5}, simulate=True)
        >>> gradient = np.array([0.75, -0.25, 0.25], np.float32)
        >>> kv.pushpull("w", gradient)
        array([0.5, 0. , 0. ], dtype=float32)
        >>> kv.pushpull("w", gradient)
        array([ 0.5, -0.5,  0.5], dtype=float32)
        """
        self._begin("set_gradient_compression")
        _refuse_unnamed("set_gradient_compression", unnamed)
        check_flag("simulate", simulate)
        with naming("set_gradient_compression"):
            codec = compression.parse(compression_params)
        self._engine.protect(partial(self._engine.set_gradient_compression, codec, simulate=simulate))

    @property
    def last_push(self) -> PushResult:
        """What the store has found out about its last push or pushpull: ``found_inf`` and ``grad_norm``.

        ``found_inf`` tells whether a sum had NaN or Inf; it is None where sums are not looked at (``nonfinite="pass"``
        without ``max_grad_norm``). ``grad_norm`` is the 2-norm of the gradients of all keys before they were clipped;
        None without ``max_grad_norm``. After a push that ``nonfinite="raise"`` has refused both are None. Where several
        threads push, the last push is that of any of them.

        >>> import numpy as np
        >>> kv = create(nonfinite="skip_step")
        >>> kv.init("w", np.zeros(2))
        >>> kv.set_optimizer("sgd", lr=1.0, max_grad_norm=2.5)
        >>> kv.push("w", np.array([3.0, 4.0]))
        >>> kv.last_push
        PushResult(found_inf=False, grad_norm=5.0)
        >>> kv.push("w", np.array([3.0, np.inf]))
        >>> kv.last_push.found_inf, kv.info("w").version
        (True, 1)
        """
        self._begin("last_push")
        return self._engine.last_push

    @property
    def optimizer(self) -> dict[str, Any] | None:
        """The optimizer's name and hyperparameters as a dict, None without an optimizer."""
        self._begin("optimizer")
        spec = self._engine.optimizer
        if spec is None:
            return None
        return {"name": spec.name, **spec.to_numbers()}

    # ------------------------------------------------------------ checkpoints

    @_collective
    def save(self, path: str | os.PathLike[str], *, releases: bool = False) -> None:
        """Write values, rows, versions, the optimizer and its state to a checkpoint.

        Args:
            path: a directory that is new, empty or holds a checkpoint, which is replaced. A crash at any moment
                leaves the old checkpoint or the new one.
            releases: write the releases that ``releases()`` lists, too, and the names that were used. A value that
                several of them share, or that has not changed since, is written once.

        Raises:
            CheckpointError: the directory holds something else, or cannot be written.
            ArgumentError: ``releases`` of a type of store that has none (``is_capable("releases")``).

        An updater is a function and is not saved; set it again after ``load``.

        >>> import tempfile, numpy as np
        >>> kv, other = create(), create()
        >>> kv.init("w", np.zeros(2))
        >>> kv.publish("step-1")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     kv.save(folder, releases=True)
        ...     other.load(folder)
        True
        >>> other.releases()
        [ReleaseInfo(name='step-1', number=1)]
        """
        self._begin("save")
        folder = absolute_path("save", path)
        if check_flag("save: releases", releases):
            self._begin_release("save(releases=True)")
        self._flush()
        self._engine.protect(partial(self._engine.save, folder, "store", releases=releases))

    @_collective
    def load(self, path: str | os.PathLike[str], *, missing_ok: bool = False) -> bool:
        """Replace every key and the update rule by those of a checkpoint, and the releases if it has any saved.

        The optimizer gets the hyperparameters that were saved, ``lr`` and ``rescale_grad`` among them; change them
        afterwards with ``set_hyperparameters``. Releases that were saved replace those of the store, of which none can
        be read any more; names that were used here stay used. A checkpoint without releases leaves them as they are. A
        checkpoint of a store with an updater, which is a function and not saved, leaves the present update rule in
        force.

        Args:
            path: a directory that ``save`` wrote.
            missing_ok: do nothing if no checkpoint was saved yet: the directory does not exist, or holds only what a
                crash in the first save has left. A damaged checkpoint still raises. On servers, rank 0 looks; in
                ``dist_sync`` every worker does, and they have to find the same.

        Returns:
            Whether a checkpoint was loaded.

        Raises:
            CheckpointError: not a checkpoint, or a damaged one, or one with releases in a type of store that has none;
                or one that only some workers find; the store has not changed.

        >>> import tempfile, tensorkv, numpy as np
        >>> kv = tensorkv.create()
        >>> kv.init("w", np.ones(2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     kv.save(folder)
        ...     other = tensorkv.create()
        ...     other.load(folder)
        True
        >>> other.pull("w")
        array([1., 1.])
        >>> other.load("checkpoint-of-an-earlier-run", missing_ok=True)
        False
        """
        self._begin("load")
        folder = absolute_path("load", path)
        may_miss = check_flag("missing_ok", missing_ok)
        if not self._engine.protect(partial(self._engine.load, folder, "store", missing_ok=may_miss)):
            return False
        self._replace_pending()
        return True

    @_collective
    def save_optimizer_states(self, path: str | os.PathLike[str]) -> None:
        """Write the optimizer and its state, without the values.

        Raises:
            OptimizerError: the store has no optimizer.
            CheckpointError: as for ``save``.
        """
        self._begin("save_optimizer_states")
        if self._engine.optimizer is None:
            raise OptimizerError("save_optimizer_states: the store has no optimizer; call set_optimizer first")
        self._flush()
        self._engine.protect(self._engine.save, absolute_path("save_optimizer_states", path), "optimizer-states")

    @_collective
    def load_optimizer_states(self, path: str | os.PathLike[str]) -> None:
        """Set the optimizer, its hyperparameters and its state to what ``save_optimizer_states`` wrote.

        Raises:
            CheckpointError: not such a checkpoint, a damaged one, or keys and shapes that differ from the store's;
                the store has not changed.
        """
        self._begin("load_optimizer_states")
        self._engine.protect(self._engine.load, absolute_path("load_optimizer_states", path), "optimizer-states")
        self._replace_pending()

    # ------------------------------------------------------------ for Trainer

    def _attach(self, trainer: _TrainerOptimizer) -> None:
        """Have the methods of a Trainer's optimizer called, as long as it lives."""
        self._trainers[trainer] = None

    def _flush(self) -> None:
        for trainer in list(self._trainers):
            trainer.flush()

    def _replace_pending(self, words: Collection[str] | None = None, keys: Collection[Key] | None = None) -> None:
        """Have hyperparameters that were set here replace those that Trainers have not put in force yet."""
        for trainer in list(self._trainers):
            trainer.replace_pending(words, keys)

    @_collective
    def _start_optimizer(self, spec: optimizers.OptimizerSpec) -> bool:
        """Set an optimizer where there is none; return whether there was none."""
        self._begin("set_optimizer")
        return self._engine.protect(self._engine.start_optimizer, spec)

    @_collective
    def _change_optimizer(self, spec: optimizers.OptimizerSpec) -> None:
        """Replace all hyperparameters, those of single keys as well."""
        self._begin("set_optimizer")
        self._engine.protect(self._engine.change_optimizer, spec)

    @_collective
    def _agree(self, verb: str, what: Any) -> None:
        """Raise WorkerMismatchError if workers in lock step do something else, or the same with other arguments."""
        self._begin(verb)
        self._engine.protect(self._engine.agree, verb, what)

    @_collective
    def _gather(self, verb: str, mine: bytes) -> list[bytes]:
        """Return what each worker in lock step gives, by rank; of other stores what this one gives."""
        self._begin(verb)
        return self._engine.protect(self._engine.gather, verb, mine)

    @_collective
    def _state_dict(self, read: Callable[[Contents], R]) -> R:
        """Return what a function reads from the contents of the store, while nothing changes them."""
        self._begin("state_dict")

        def call() -> R:
            with self._engine.contents() as contents:
                return read(contents)

        return self._engine.protect(call)

    @_collective
    def _load_state_dict(self, contents: Contents) -> None:
        """Take over what contents hold."""
        self._begin("load_state_dict")
        self._engine.protect(self._engine.restore, contents)
        self._replace_pending()

    # ------------------------------------------------------------ looking

    @property
    def type(self) -> str:
        """The type name that ``create`` was given."""
        return self._type

    @property
    def rank(self) -> int:
        """This worker's number, from 0."""
        return self._engine.rank

    @property
    def num_workers(self) -> int:
        """How many workers push to this store."""
        return self._engine.num_workers

    def keys(self) -> list[Key]:
        """Return every key, in the order of init."""
        self._begin("keys")
        return self._engine.keys()

    def __contains__(self, key: object) -> bool:
        self._begin("in")
        with suppress(KeyTypeError):
            return check_key("in", key) in self._engine
        return False

    def __len__(self) -> int:
        return len(self.keys())

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[Key]:
        return iter(self.keys())

    @overload
    def info(self, key: Key) -> KeyInfo: ...

    @overload
    def info(self, key: Any) -> list[KeyInfo]: ...

    def info(self, key: Any) -> KeyInfo | list[KeyInfo]:
        """Describe a key, or a list of keys in one round trip: shape, dtype, device, version, nbytes, kind.

        Args:
            key: a key, or a list of keys.

        Returns:
            A KeyInfo (a list of them for a list of keys).

        Raises:
            KeyNotFoundError: a key was not initialised.

        >>> import tensorkv, numpy as np
        >>> kv = tensorkv.create()
        >>> kv.init("w", np.ones((2, 3), np.float32))
        >>> kv.info("w")
        KeyInfo(shape=(2, 3), dtype='float32', device='cpu', version=0, nbytes=24, kind='dense')
        """
        self._begin("info")
        found = self._engine.info(keys_of("info", key))
        return found[0] if is_key(key) else found

    @_collective
    def delete(self, key: Any) -> None:
        """Delete a key or a list of keys, with their optimizer state; all or none.

        Raises:
            KeyNotFoundError: a key was not initialised.
        """
        self._begin("delete")
        keys = list(dict.fromkeys(keys_of("delete", key)))
        self._engine.protect(self._engine.delete, keys)
        self._metrics.forget(keys)

    def is_capable(self, name: str) -> bool:
        """Return whether this type of store has a capability.

        Args:
            name: ``"optimizer"``, ``"updater"``, ``"rows"``, ``"checkpoint"``, ``"compression"``, ``"snapshot"`` or
                ``"releases"``.

        Raises:
            ArgumentError: the capability is unknown.

        >>> import tensorkv
        >>> tensorkv.create().is_capable("optimizer")
        True
        """
        self._begin("is_capable")
        if not isinstance(name, str) or name not in CAPABILITIES:
            raise ArgumentError(f"is_capable: {show(name)} is unknown; the capabilities are {', '.join(CAPABILITIES)}")
        return name in self._engine.capabilities

    def stats(self) -> dict[str, Any]:
        """Return calls, bytes and seconds of each verb, calls and bytes of each key, and the engine's own counters.

        ``"compiled"`` lists which of the compiled parts this installation has.

        >>> import tensorkv, numpy as np
        >>> kv = tensorkv.create()
        >>> kv.init("w", np.ones(3, np.float32))
        >>> kv.push("w", np.ones(3, np.float32))
        >>> kv.stats()["keys"]["w"]["push"]
        {'calls': 1, 'nbytes': 12}
        """
        self._begin("stats")
        return {"compiled": dict(compiled.parts()), **self._metrics.read(), **self._engine.stats()}

    @runs_outside_modes
    def barrier(self) -> None:
        """Wait until every worker has called ``barrier``; with one worker, return at once.

        Raises:
            WaitTimeoutError: of ``dist_async``: other workers have not called it within ``timeout_s``.
            RankDeadError, WorkerMismatchError: of ``dist_sync``, as for ``push``.
        """
        self._begin("barrier")
        self._engine.protect(self._engine.barrier)

    @runs_outside_modes
    def leave(self) -> None:
        """Take part in the other workers' pushes until every worker has left: the join of uneven inputs.

        With unequal numbers of batches, a worker that has none left calls this. The others go on: a push sums the
        parts of the workers that still push. Until every worker has left, the others may only push and pull; then the
        call returns, and all may push again. With one worker it returns at once.

        Raises:
            WaitTimeoutError: of ``dist_async``: other workers have not left within ``timeout_s``.
            RankDeadError, WorkerMismatchError: of ``dist_sync``, as for ``push``.

        >>> import tensorkv
        >>> tensorkv.create().leave()
        """
        self._begin("leave")
        self._engine.protect(self._engine.leave)

    def dead_workers(self) -> list[int]:
        """Return the ranks of workers whose heartbeat has stopped (``dist_async``); other types have none.

        >>> import tensorkv
        >>> tensorkv.create().dead_workers()
        []
        """
        self._begin("dead_workers")
        return list(self._engine.dead_workers())

    # ------------------------------------------------------------ the end

    @runs_outside_modes
    def close(self) -> None:
        """Finish pending pushes and release the values; closing twice has no effect.

        Workers of ``dist_sync`` close together. The last client of ``dist_async`` shuts the servers down; the process
        that started Ray waits for the other clients first, for at most ``timeout_s``.
        """
        if not self._closed:
            self._check_fork("close")
            self._engine.protect(self._close)

    def _close(self) -> None:
        if self._closed:
            return
        try:
            self._engine.close()
        except UpdaterError:
            raise
        except BaseException:
            self._closed = True
            raise
        self._closed = True

    def __del__(self) -> None:
        # The store was dropped without close: the engine releases later what is not memory of this process.
        engine = self.__dict__.get("_engine")
        if engine is not None and not self._closed and self._forks == forks.count:
            engine.abandon()

    def __enter__(self) -> Self:
        self._begin("with")
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        # An error of close must not hide the error that ends the block.
        with nullcontext() if kind is None else suppress(TensorKVError):
            self.close()

    def __repr__(self) -> str:
        if self._closed:
            return f"KVStore({self._type!r}, closed)"
        if self._forks != forks.count:
            return f"KVStore({self._type!r}, of the parent process)"
        spec = self._engine.optimizer
        count = len(self._engine.keys())
        what = f"{count} key{'' if count == 1 else 's'}"
        if self._type.startswith("dist"):
            # Shows a worker that was meant to be one of several, and is alone.
            is_worker = self.rank < self.num_workers
            what = f"{f'rank {self.rank} of {self.num_workers}' if is_worker else 'a reader'}, {what}"
        return f"KVStore({self._type!r}, {what}{'' if spec is None else ', optimizer=' + repr(spec.name)})"

    def __reduce__(self) -> Any:
        raise TypeError("a KVStore cannot be pickled or copied; create one in each process, or save() and load()")

    # ------------------------------------------------------------ inside

    def _begin(self, verb: str) -> float:
        """Raise if the store cannot be used; return the time, for ``stats``."""
        start = clock()
        self._check_open(verb)
        return start

    def _check_open(self, verb: str) -> None:
        if self._closed:
            raise StoreClosedError(f"{verb}: this store was closed; create another")
        if self._forks != forks.count:
            self._check_fork(verb)

    def _check_fork(self, verb: str) -> None:
        if self._forks != forks.count:
            raise ForkedStoreError(f"{verb}: this store belongs to the parent process; create one in the child")

    def _warn_once(self, warning: SparseOutWarning) -> None:
        if not self._warned_sparse_out:
            self._warned_sparse_out = True
            caller.warn(warning)


class Snapshot:
    """A read-only, consistent snapshot of all values of a store.

    ``KVStore.snapshot`` takes one. As a context manager a snapshot closes itself.
    """

    _CLOSED = "this snapshot was closed; take another"

    def __init__(self, store: KVStore, versions: Mapping[Key, int], owner: KVStore) -> None:
        self._store = store
        # Keeps the store that the snapshot reads from alive.
        self._owner = owner
        self.versions = dict(versions)
        """The number of updates that each key had had."""

    def keys(self) -> list[Key]:
        """Return every key, in the order of init."""
        return list(self.versions)

    def pull(self, key: Any, out: Any = None, *, like: Any = None, region: Any = None) -> Any:
        """Copy values, or parts of them, as ``KVStore.pull`` does.

        Raises:
            SnapshotError: the snapshot was dropped.
            TensorKVError: as ``KVStore.pull``.
        """
        return self._opened("pull").pull(key, out, like=like, region=region)

    def pull_tree(
        self,
        like: Any = None,
        *,
        into: Any = None,
        prefix: str = "",
        rename: trees.Rename | None = None,
        strict: bool = True,
    ) -> Any:
        """Copy the arrays of a tree, as ``KVStore.pull_tree`` does.

        Raises:
            SnapshotError: the snapshot was dropped.
            TensorKVError: as ``KVStore.pull_tree``.
        """
        return self._opened("pull_tree").pull_tree(like, into=into, prefix=prefix, rename=rename, strict=strict)

    def row_sparse_pull(self, key: Any, out: Any = None, *, row_ids: Any = None) -> Any:
        """Copy rows, as ``KVStore.row_sparse_pull`` does.

        Raises:
            SnapshotError: the snapshot was dropped.
            TensorKVError: as ``KVStore.row_sparse_pull``.
        """
        return self._opened("row_sparse_pull").row_sparse_pull(key, out, row_ids=row_ids)

    def _opened(self, verb: str) -> KVStore:
        if self._store._closed:
            raise SnapshotError(f"{verb}: {self._CLOSED}")
        return self._store

    def close(self) -> None:
        """Drop the snapshot."""
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Snapshot({len(self.versions)} keys)"


@dataclass(frozen=True, slots=True)
class ReleaseInfo:
    """What ``KVStore.releases`` tells of a release.

    Args:
        name: of the release.
        number: greater than those of all earlier releases of the store.
    """

    name: str
    number: int


class Release(Snapshot):
    """A release that is read: one version of all its keys, whatever is pushed meanwhile.

    ``KVStore.open_release`` and ``KVStore.wait_release`` return them. As a context manager a release closes itself.
    """

    _CLOSED = "this release was closed; open it again"

    def __init__(self, store: KVStore, reader: ReleaseReader, owner: KVStore) -> None:
        super().__init__(store, reader.versions, owner)
        self._reader = reader
        self.name = reader.name
        """The name under which it was published."""
        self.number = reader.number
        """Greater than those of all earlier releases of the store."""

    @property
    @runs_outside_modes
    def digest(self) -> str:
        """A digest of all keys with their dtypes, shapes and bits, 32 hexadecimal digits.

        Of tables, how rows start counts as well. Equal values have equal digests on every type of store. It is
        computed when it is first asked for.

        Raises:
            ReleaseNotFoundError: the release was dropped.
            SnapshotError: this reader was closed.
        """
        self._opened("digest")._begin("digest")
        return self._reader.protect(self._reader.digest)

    @runs_outside_modes
    def changes(self, since: str | Release) -> Changes:
        """Return what has changed since another release, bit by bit; ``apply_changes`` applies it.

        The store finds the changes between two releases once, for all readers.

        Args:
            since: a release or its name.

        Returns:
            Changes, one for each key. If the store does not hold ``since`` any more, all values.

        Raises:
            ReleaseNotFoundError: there never was a release ``since``, or this one was dropped.
            SnapshotError: this reader was closed.
            ArgumentError: ``since`` is newer than this release.
        """
        self._opened("changes")._begin("changes")
        name = since.name if isinstance(since, Release) else since
        if not isinstance(name, str):
            raise ArgumentError(f"changes: since is {show(name)}; expected a release or its name")
        return self._reader.protect(self._reader.changes, name).prepare()

    def __repr__(self) -> str:
        return f"Release({self.name!r}, number {self.number}, {len(self.versions)} keys)"


def _refuse_unnamed(verb: str, unnamed: tuple[Any, ...]) -> None:
    if unnamed:
        raise ArgumentError(
            f"{verb}: got {show(unnamed[0])} without a name; expected hyperparameters by name, such as lr=0.1"
        )


def _take_values(verb: str, keys: Sequence[Key], values: Sequence[Any]) -> tuple[list[Part], list[KeySpec]]:
    taken = [take(verb, key, None, value) for key, value in zip(keys, values, strict=True)]
    specs = []
    # Equal ones stand once: Python's garbage collector looks through each, and to make and hash one takes long.
    known: dict[KeySpec, KeySpec] = {}
    dense: dict[tuple[torch.Size, torch.dtype, int], KeySpec] = {}
    for part, value in zip(taken, values, strict=True):
        if isinstance(part, Rows):
            library = value.values if isinstance(value, Rows) else value
            spec = KeySpec(torch.Size(part.shape), part.values.dtype, interop.origin(library), True, part.init)
        else:
            origin = interop.origin(value)
            # What is found here keeps its origin, whose id is no other's.
            found = dense.get(kind := (part.shape, part.dtype, id(origin)))
            if found is not None:
                specs.append(found)
                continue
            spec = dense[kind] = KeySpec(part.shape, part.dtype, origin, False)
        specs.append(known.setdefault(spec, spec))
    return taken, specs


def _blank(part: Part) -> Part:
    """Return zeros of the shape of a part, or no rows."""
    if isinstance(part, Rows):
        return unchecked_rows(part.ids[:0], part.values[:0], part.num_rows)
    return torch.zeros_like(part, memory_format=torch.contiguous_format)


def _take_ids(verb: str, key: Key, spec: KeySpec, row_ids: Any) -> torch.Tensor:
    if not spec.shape:
        raise ValueMismatchError(f"{verb}({quote(key)}): the value is 0-d and has no rows; use pull")
    try:
        return take_ids(row_ids, spec.shape[0])
    except TensorKVError as error:
        raise type(error)(f"{verb}({quote(key)}): {error}") from None


def _give_rows(verb: str, key: Key, rows: Rows, origin: interop.Origin) -> Rows:
    try:
        ids, values = interop.give_ids(rows.ids, rows.num_rows, origin), interop.give(rows.values, origin.for_parts())
    except ArrayTypeError as error:
        raise ArrayTypeError(f"{verb}({quote(key)}): an array of rows {error}") from None
    return unchecked_rows(ids, values, rows.num_rows)


def _regions(key: Any, region: Any) -> dict[Key, Any]:
    """Return the part that is wanted of each key."""
    listed = keys_of("pull", list(key) if isinstance(key, Mapping) else key)
    wanted: dict[Key, Any] = {}
    for each, own in zip(listed, [region] if is_key(key) else _matching("pull", "region", listed, region), strict=True):
        first = wanted.setdefault(each, own)
        if first is not own and not (isinstance(own, slice | tuple) and first == own):
            raise ArgumentError(f"pull({quote(each)}): two regions of one key; pull them one after the other")
    return wanted


def _holds_rows(out: Any) -> bool:
    return isinstance(out, Rows) or (isinstance(out, list | tuple) and any(isinstance(each, Rows) for each in out))


def _matching(verb: str, what: str, keys: Sequence[Key], values: Any) -> list[Any]:
    if not isinstance(values, list | tuple) or len(values) != len(keys):
        raise ArgumentError(
            f"{verb}: got {len(keys)} keys and {show(values)} as {what}; expected a list of {len(keys)}, "
            "one for each key"
        )
    return list(values)
