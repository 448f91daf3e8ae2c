"""StoreControl: what a store offers beside its verbs. Update rules, checkpoints, introspection, the end."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import wraps
from tempfile import TemporaryDirectory
from typing import Any, ParamSpec, Self, TypeVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

from tensorkv import engines
from tensorkv.arrays.arguments import Key, check_flag, check_key, folder_path, is_key, keys_of
from tensorkv.runtime import compiled, forks, shield
from tensorkv.runtime.stats import Metrics, clock
from tensorkv.shard import optimizers
from tensorkv.shard.entry import KeyInfo
from tensorkv.shard.rules import Updater
from tensorkv.storage import checkpoint

from .errors import (
    ArgumentError,
    CheckpointError,
    ForkedStoreError,
    OptimizerError,
    StoreClosedError,
    TensorKVError,
    UpdaterError,
    naming,
    show,
)

# The calls that all workers of a store in step make together.
IN_STEP = (
    "init",
    "push",
    "pushpull",
    "broadcast",
    "set_updater",
    "set_optimizer",
    "set_hyperparameters",
    "delete",
    "save",
    "load",
    "save_optimizer_states",
    "load_optimizer_states",
)
P = ParamSpec("P")
R = TypeVar("R")
CAPABILITIES = ("checkpoint", "optimizer", "rows", "snapshot", "updater")


def _telling(engine: Any, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """Have an engine tell the other workers of a call that was refused before it began."""

    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        engine.begin()
        try:
            return method(*args, **kwargs)
        except (StoreClosedError, ForkedStoreError):
            raise
        except Exception as error:
            engine.refuse(name, error)
            raise

    return call


def outside_modes() -> AbstractContextManager[None]:
    """Return a block outside of torch's inference and dispatch modes.

    What a store makes in inference mode it could not change later, and what it makes under ``FakeTensorMode`` has no
    memory.
    """
    # Enabled modes are in a stack of each thread, for which torch has no public function.
    if torch.is_inference_mode_enabled() or torch._C._len_torch_dispatch_stack():
        return _outside_modes()
    return nullcontext()


@contextmanager
def _outside_modes() -> Iterator[None]:
    with torch.inference_mode(False), _disable_current_modes():
        yield


def runs_outside_modes(method: Callable[P, R]) -> Callable[P, R]:
    """Have a function run in a block of ``outside_modes``."""

    @wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with outside_modes():
            return method(*args, **kwargs)

    return call


class StoreControl:
    """The part of ``KVStore`` that moves no arrays."""

    def __init__(self, engine: engines.Engine, type: str) -> None:
        self._closed = False
        self._forks = forks.count
        self._engine = engine
        self._one = getattr(engine, "one", None)
        self._many = getattr(engine, "many", None)
        self._type = type
        self._metrics = Metrics()
        forks.keep(self)
        if hasattr(engine, "refuse"):
            for name in IN_STEP:
                setattr(self, name, _telling(engine, name, getattr(self, name)))

    # ------------------------------------------------------------ the update rule

    @runs_outside_modes
    def set_updater(self, updater: Updater | None) -> None:
        """Update values with a function instead of by assignment.

        Args:
            updater: ``updater(key, received, stored)`` changes ``stored`` in place. Both arrays are of
                the key's library (NumPy for JAX, whose arrays cannot be changed); for a push of Rows
                they are Rows with equal ids, and ``stored.values`` is what to change. None restores
                assignment.

        Raises:
            ArgumentError: not callable.

        An updater that raises leaves its key as it was, and the exception reaches the caller of the
        push. One that calls the store raises UpdaterError. It runs while the store is locked.
        ``dist_async`` takes no function, which cannot travel as data: ArgumentError.

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
        shield.run(self._engine.set_updater, updater)

    @runs_outside_modes
    def set_optimizer(self, optimizer: Any, *unnamed: Any, **numbers: Any) -> None:
        """Update values by an optimizer, the sum of a push being the gradient.

        Args:
            optimizer: the name or class of an optimizer of torch.optim, such as ``"sgd"``, ``"adamw"``
                or ``torch.optim.SGD``. Not LBFGS and SparseAdam, which need more than a gradient.
            *unnamed: nothing; hyperparameters are given by name.
            **numbers: hyperparameters by their torch.optim names; also ``rescale_grad`` (factor on the
                sum, default 1) and ``clip_gradient`` (bound on each element's absolute value after
                rescaling, default None).

        Raises:
            OptimizerError: unknown name or number, or a number out of range.
            ArgumentError: a hyperparameter without its name.

        Only the keys of a push step. A second call with the same optimizer keeps its state and
        replaces its numbers. Rows step lazily: rows that a push does not name do not move, and neither
        does their momentum.

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
            spec = optimizers.spec(optimizer, numbers)
        shield.run(self._engine.set_optimizer, spec)

    @runs_outside_modes
    def set_hyperparameters(self, keys: Any = None, *unnamed: Any, **numbers: Any) -> None:
        """Change numbers of the optimizer while it runs, keeping its state.

        Args:
            keys: a key or a list of keys; None changes all, single keys' own numbers included.
            *unnamed: nothing; hyperparameters are given by name.
            **numbers: such as ``lr=0.01``; ``rescale_grad`` and ``clip_gradient`` are for all keys only.

        Raises:
            OptimizerError: no optimizer, unknown number, or a number out of range.
            KeyNotFoundError: a key that was not initialised.

        >>> import tensorkv
        >>> kv = tensorkv.create()
        >>> kv.set_optimizer("sgd", lr=0.5)
        >>> kv.set_hyperparameters(lr=0.25)
        >>> kv.optimizer["lr"]
        0.25
        """
        self._begin("set_hyperparameters")
        _refuse_unnamed("set_hyperparameters", unnamed)
        listed = None if keys is None else keys_of("set_hyperparameters", keys)
        with naming("set_hyperparameters"):
            shield.run(self._engine.set_hyperparameters, numbers, listed)

    @property
    def optimizer(self) -> dict[str, Any] | None:
        """The optimizer's name and numbers as a dict, None without one."""
        self._check_fork("optimizer")
        spec = self._engine.optimizer
        if spec is None:
            return None
        return {"name": spec.name, **spec.to_numbers()}

    # ------------------------------------------------------------ checkpoints

    @runs_outside_modes
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write values, rows, versions, the optimizer and its state to a checkpoint.

        Args:
            path: a directory, new or an older checkpoint. A crash at any moment leaves the old
                checkpoint or the new one.

        Raises:
            CheckpointError: the path holds something else, or cannot be written.

        An updater is a function and is not saved; set it again after ``load``.
        """
        self._begin("save")
        shield.run(self._engine.save, folder_path("save", path), "store")

    @runs_outside_modes
    def load(self, path: str | os.PathLike[str], *, missing_ok: bool = False) -> bool:
        """Become what was saved: every key is replaced, and the update rule too.

        Only where an updater was in force at the save, which is a function and not saved, does the
        present rule stay. The optimizer's numbers are those that were saved, ``lr`` and ``rescale_grad``
        among them: change them afterwards with ``set_hyperparameters``.

        Args:
            path: a directory that ``save`` wrote.
            missing_ok: do nothing if no checkpoint was saved there yet: there is no directory, or it holds nothing but
                what a crash in the first save has left. A damaged checkpoint is an error all the same. With several
                workers, what rank 0 sees counts.

        Returns:
            Whether a checkpoint was loaded.

        Raises:
            CheckpointError: not a checkpoint, or a damaged one; the store is as it was.

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
        folder = folder_path("load", path)
        if check_flag("missing_ok", missing_ok):
            seen = "missing" if checkpoint.is_missing(folder) else "there"
            # All do what rank 0 does, whatever they see.
            if shield.run(self._engine.broadcast_text, seen) == "missing":
                return False
        shield.run(self._engine.load, folder, "store")
        return True

    @runs_outside_modes
    def save_optimizer_states(self, path: str | os.PathLike[str]) -> None:
        """Write the optimizer and its state, without the values.

        Raises:
            OptimizerError: the store has no optimizer.
            CheckpointError: as for ``save``.
        """
        self._begin("save_optimizer_states")
        if self._engine.optimizer is None:
            raise OptimizerError("save_optimizer_states: the store has no optimizer; call set_optimizer first")
        shield.run(self._engine.save, folder_path("save_optimizer_states", path), "optimizer-states")

    @runs_outside_modes
    def load_optimizer_states(self, path: str | os.PathLike[str]) -> None:
        """Set the optimizer, its numbers and its state to what ``save_optimizer_states`` wrote.

        Raises:
            CheckpointError: not such a file, a damaged one, or keys and shapes that are not the store's;
                the store is as it was.
        """
        self._begin("load_optimizer_states")
        shield.run(self._engine.load, folder_path("load_optimizer_states", path), "optimizer-states")

    @contextmanager
    def _scratch_folder(self) -> Iterator[str]:
        """Give a temporary directory that every worker sees, gone afterwards; all workers call this together.

        >>> import os, tensorkv
        >>> with tensorkv.create()._scratch_folder() as folder:
        ...     os.path.isdir(folder)
        True
        """
        with TemporaryDirectory() as mine:
            yield shield.run(self._engine.broadcast_text, mine)
            shield.run(self._engine.barrier)

    def _once(self, do: Callable[[], Any]) -> None:
        """Have rank 0 do something to files while the others wait; all workers call this together, a reader alone.

        Raises:
            CheckpointError: on every worker, if rank 0 could not do it.

        >>> import tensorkv
        >>> tensorkv.create()._once(lambda: print("done"))
        done
        """
        problem = None
        if self._engine.rank == 0 or self._engine.rank >= self._engine.num_workers:
            try:
                do()
            except CheckpointError as error:
                problem = str(error)
        told = json.loads(shield.run(self._engine.broadcast_text, json.dumps(problem)))
        if told is not None:
            raise CheckpointError(told)

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
        return type(key) is not bool and is_key(key) and key in self._engine

    def __len__(self) -> int:
        return len(self.keys())

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[Key]:
        return iter(self.keys())

    def info(self, key: Key) -> KeyInfo:
        """Describe a key: shape, dtype, device, version, nbytes, kind.

        Raises:
            KeyNotFoundError: a key that was not initialised.

        >>> import tensorkv, numpy as np
        >>> kv = tensorkv.create()
        >>> kv.init("w", np.ones((2, 3), np.float32))
        >>> kv.info("w")
        KeyInfo(shape=(2, 3), dtype='float32', device='cpu', version=0, nbytes=24, kind='dense')
        """
        self._begin("info")
        return self._engine.info(check_key("info", key))

    @runs_outside_modes
    def delete(self, key: Any) -> None:
        """Forget a key or a list of keys, and their optimizer state; all or none.

        Raises:
            KeyNotFoundError: a key that was not initialised.
        """
        self._begin("delete")
        keys = list(dict.fromkeys(keys_of("delete", key)))
        shield.run(self._engine.delete, keys)
        self._metrics.forget(keys)

    def is_capable(self, name: str) -> bool:
        """Tell whether this type of store can do something.

        Args:
            name: ``"optimizer"``, ``"updater"``, ``"rows"``, ``"checkpoint"`` or ``"snapshot"``.

        Raises:
            ArgumentError: no such capability.

        >>> import tensorkv
        >>> tensorkv.create().is_capable("optimizer")
        True
        """
        self._begin("is_capable")
        if not isinstance(name, str) or name not in CAPABILITIES:
            raise ArgumentError(f"is_capable: {show(name)} is unknown; the capabilities are {', '.join(CAPABILITIES)}")
        return name in self._engine.capabilities

    def stats(self) -> dict[str, Any]:
        """Return counts, bytes and seconds per verb, counts and bytes per key, and the engine's own.

        ``"compiled"`` tells which of the compiled parts this installation has.

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
        """Wait until every worker has come here; with one worker, at once."""
        self._begin("barrier")
        shield.run(self._engine.barrier)

    @runs_outside_modes
    def leave(self) -> None:
        """Push no more until every worker has left; with one worker, at once.

        For workers with unequal numbers of batches: who has none left calls this, the others go on, and a push
        sums the parts of those who still push. It returns when every worker has left; then all may push again.
        Until then, others may push and pull and nothing else.

        Raises:
            RankDeadError, WorkerMismatchError: as for ``push``.

        >>> import tensorkv
        >>> tensorkv.create().leave()
        """
        self._begin("leave")
        shield.run(self._engine.leave)

    def dead_workers(self) -> list[int]:
        """Return the ranks of workers that were here and have been silent for too long; without servers, none.

        >>> import tensorkv
        >>> tensorkv.create().dead_workers()
        []
        """
        self._begin("dead_workers")
        ask = getattr(self._engine, "dead_workers", None)
        return [] if ask is None else list(ask())

    # ------------------------------------------------------------ the end

    @runs_outside_modes
    def close(self) -> None:
        """Finish pending pushes and let go of the values; once is enough, twice does no harm.

        Workers of ``dist_sync`` close together. The last client of ``dist_async`` ends the servers, and the process
        that has started Ray waits for the others first, for at most ``timeout_s``.
        """
        if not self._closed:
            self._check_fork("close")
            shield.run(self._close)

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
        # A store that was dropped: what is more than memory of this process goes in its own time.
        engine = self.__dict__.get("_engine")
        abandon = getattr(engine, "abandon", None)
        if abandon is not None and not self._closed and self._forks == forks.count:
            abandon()

    def __enter__(self) -> Self:
        self._begin("with")
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        # What other workers say of the end must not hide why this one ends.
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
        return f"KVStore({self._type!r}, {what}{'' if spec is None else ', optimizer=' + repr(spec.name)})"

    def __reduce__(self) -> Any:
        raise TypeError("a KVStore cannot be pickled or copied; create one in each process, or save() and load()")

    # ------------------------------------------------------------ inside

    def _begin(self, verb: str, priority: int = 0) -> float:
        start = clock()
        if self._closed:
            raise StoreClosedError(f"{verb}: this store was closed; create another")
        if self._forks != forks.count:
            self._check_fork(verb)
        if type(priority) is not int:
            raise ArgumentError(f"{verb}: priority is {show(priority)}; expected an int")
        return start

    def _check_fork(self, verb: str) -> None:
        if self._forks != forks.count:
            raise ForkedStoreError(f"{verb}: this store belongs to the parent process; create one in the child")


def _refuse_unnamed(verb: str, unnamed: tuple[Any, ...]) -> None:
    if unnamed:
        raise ArgumentError(
            f"{verb}: got {show(unnamed[0])} without a name; expected hyperparameters by name, such as lr=0.1"
        )
