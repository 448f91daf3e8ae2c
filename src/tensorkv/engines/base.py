"""The interface between a store and the engine that holds its values, with defaults for what is optional."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeVar

import torch

from tensorkv.arrays.arguments import Key
from tensorkv.arrays.regions import Region
from tensorkv.arrays.rows import Rows
from tensorkv.arrays.spec import KeySpec
from tensorkv.compression import Codec
from tensorkv.errors import ArgumentError, CheckpointError, KeyExistsError, WaitTimeoutError, quote
from tensorkv.releases.changes import Changes
from tensorkv.runtime import shield
from tensorkv.runtime.modes import outside_modes
from tensorkv.shard.entry import Batch, KeyInfo, Part
from tensorkv.shard.norm import PushResult
from tensorkv.shard.optimizers import OptimizerSpec
from tensorkv.shard.rules import Updater
from tensorkv.storage import checkpoint
from tensorkv.storage.manifest import Contents, Kind

from .call import Call, check_priority

T = TypeVar("T")
Outs = Sequence[Sequence[torch.Tensor]]
# How often a wait looks whether it is over.
POLL_S = 0.001


class Reader(ABC):
    """Values that can be read: an engine, or a snapshot of one.

    Methods may be called from several threads, and raise the errors of ``tensorkv.errors`` before they change anything.
    """

    # ------------------------------------------------------------ to be implemented

    @abstractmethod
    def spec(self, verb: str, key: Key) -> KeySpec:
        """Return what an array for a key must be like.

        Raises:
            KeyNotFoundError: a key that was not initialised; the message begins with the verb.
        """

    @abstractmethod
    def keys(self) -> list[Key]:
        """Return every key, in the order of init."""

    @abstractmethod
    def pull_into(self, keys: Sequence[Key], outs: Outs) -> None:
        """Copy each key's value into its tensors, which have its shape; their strides and dtypes may differ."""

    # ------------------------------------------------------------ with a default

    def pull(self, call: Call) -> None:
        """Check a call and copy values into its outs; on an error no out has changed."""
        if self.try_compiled(call):
            return
        with outside_modes():
            call.check()
            self.transfer(call.fill, self.spec, self.pull_into, self.pull_regions, self.together)

    def together(self) -> AbstractContextManager[Any]:
        """Return a block of reads between which no other thread changes a value, where an engine can do that."""
        return nullcontext()

    def protect(self, work: Callable[..., T], *args: Any) -> T:
        """Run ``work`` to its end; what a signal handler raises meanwhile is raised then (``runtime.shield``)."""
        return shield.run(work, *args)

    def transfer(self, work: Callable[..., T], *args: Any) -> T:
        """Run a push or pull to its end, as ``protect`` does; an engine that holds no locks may do it faster."""
        return self.protect(work, *args)

    def pull_regions(self, keys: Sequence[Key], regions: Sequence[Region], outs: Outs) -> None:
        """Copy a part of each key's value into its tensors, which have the part's shape; a key may come repeatedly."""
        specs = {key: self.spec("pull", key) for key in keys}
        whole = {key: torch.empty(spec.shape, dtype=spec.dtype, device="cpu") for key, spec in specs.items()}
        self.pull_into(list(whole), [[value] for value in whole.values()])
        for key, region, own in zip(keys, regions, outs, strict=True):
            for out in own:
                out.copy_(region.of(whole[key]))

    def pull_rows(self, keys: Sequence[Key], ids: Sequence[torch.Tensor]) -> list[Rows]:
        """Return copies of the rows of each key; ids are unique and sorted."""
        raise self.lacks("row_sparse_pull")

    def close(self) -> None:
        """Finish what is pending and let go of everything; called once."""

    def abandon(self) -> None:
        """Let go, some time soon, of what outlives this process: the store was dropped without ``close``."""

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    def lacks(self, verb: str) -> ArgumentError:
        """Return the error of a verb that this kind of store does not have."""
        return ArgumentError(f"{verb}: this type of store cannot do it; is_capable() tells what it can")

    # ------------------------------------------------------------ the compiled path

    def try_compiled(self, call: Call) -> bool:
        """Make a call in compiled code if all of its arrays are plain.

        Plain arrays are of NumPy or torch, on the CPU, contiguous, and of their key's dtype and shape.

        Returns:
            True if the call was made; False if nothing was done, and the call has to be parsed.
        """
        return False


class ReleaseReader(Reader):
    """A release that is read.

    Args:
        name, number: of the release.
        versions: how many updates each key had had.
    """

    def __init__(self, name: str, number: int, versions: Mapping[Key, int]) -> None:
        self.name, self.number = name, number
        self.versions: Mapping[Key, int] = versions

    @abstractmethod
    def digest(self) -> str:
        """Return the digest of all keys, which is computed once."""

    @abstractmethod
    def changes(self, since: str) -> Changes:
        """Return what has changed since another release; all values if that is not held any more.

        Raises:
            ReleaseNotFoundError: there never was a release of that name.
            ArgumentError: it is newer than this one.
        """


class Engine(Reader):
    """What decides where values are and how pushes are summed.

    ``KVStore.push``, ``pull`` and ``pushpull`` come in by the methods of these names; a class that overrides one sees
    every such call, except pulls of regions, which come in by ``pull_regions``. Their defaults parse the call and hand
    it to ``push_parts``, ``pull_into`` and ``pushpull_into`` by ``transfer``.
    Tensors and Rows share the caller's memory: an engine reads them before its method returns, and keeps none.
    """

    capabilities: frozenset[str] = frozenset()
    """What it can do, of ``"checkpoint"``, ``"compression"`` of what it sends, ``"optimizer"``, ``"releases"``,
    ``"rows"``, ``"snapshot"`` and ``"updater"``."""

    # ------------------------------------------------------------ to be implemented

    @abstractmethod
    def init(self, keys: Sequence[Key], values: Sequence[Part], specs: Sequence[KeySpec]) -> None:
        """Hold copies of new values; all keys or none."""

    @abstractmethod
    def push_parts(self, batch: Batch, priority: int) -> None:
        """Sum the parts of each key, in their order, and update its value; the whole batch is checked first."""

    @abstractmethod
    def info(self, keys: Sequence[Key]) -> list[KeyInfo]:
        """Describe keys, in their order."""

    # ------------------------------------------------------------ with a default

    def push(self, call: Call) -> None:
        """Check a call and apply its push; on an error nothing has changed."""
        if self.try_compiled(call) or (call.view_jax() and self.try_compiled(call)):
            return
        with self.collective("push"), outside_modes():
            self.transfer(self.push_parts, call.batch, check_priority(call.verb, call.priority))

    def pushpull(self, call: Call) -> None:
        """Check a call, apply its push and copy the new values into its outs, in one trip."""
        if self.try_compiled(call) or (call.view_jax() and self.try_compiled(call)):
            return
        with self.collective("pushpull"), outside_modes():
            call.check()
            copy = partial(self._push_and_copy_out, call)
            self.transfer(call.fill, self.spec, copy, self.pull_regions, self.together)

    def _push_and_copy_out(self, call: Call, keys: Sequence[Key], outs: Outs) -> None:
        self.pushpull_into(call.batch, outs, check_priority(call.verb, call.priority))

    def pushpull_into(self, batch: Batch, outs: Outs, priority: int) -> None:
        """Push, then copy the values of the batch's keys into tensors."""
        self.push_parts(batch, priority)
        self.pull_into(batch.keys, outs)

    def collective(self, verb: str) -> AbstractContextManager[None]:
        """Return a block in which a call that all workers make together is checked and made.

        An engine whose workers are in lock step tells the others of a call that raises before it has begun.
        """
        return nullcontext()

    @property
    def rank(self) -> int:
        """This worker's number, from 0."""
        return 0

    @property
    def num_workers(self) -> int:
        """How many workers push."""
        return 1

    def init_missing(self, keys: Sequence[Key], values: Sequence[Part], specs: Sequence[KeySpec]) -> None:
        """Hold copies of new values of those keys that do not exist, though others create some at the same time."""
        while new := [each for each in zip(keys, values, specs, strict=True) if each[0] not in self]:
            with suppress(KeyExistsError):
                self.init(*map(list, zip(*new, strict=True)))
                return

    def delete(self, keys: Sequence[Key]) -> None:
        """Forget keys; all or none."""
        raise self.lacks("delete")

    @property
    def assigns(self) -> bool:
        """Whether a sum replaces the value: there is neither an optimizer nor an updater."""
        return self.optimizer is None

    @property
    def averages(self) -> bool:
        """Whether a push takes the mean of the parts of a key, not their sum."""
        return False

    @property
    def optimizer(self) -> OptimizerSpec | None:
        """The optimizer in force, None without one."""
        return None

    @property
    def last_push(self) -> PushResult:
        """What was found out about the last push."""
        return PushResult()

    @property
    def skips_steps(self) -> bool:
        """Whether a push changes nothing if the sum of any of its keys has NaN or Inf: ``nonfinite="skip_step"``."""
        return False

    @property
    def has_optimizer(self) -> bool:
        """Whether this process knows of an optimizer in force, without asking others."""
        return self.optimizer is not None

    def set_updater(self, updater: Updater | None) -> None:
        """Apply a function to each sum; None restores assignment."""
        raise self.lacks("set_updater")

    def set_optimizer(self, spec: OptimizerSpec) -> None:
        """Step an optimizer with each sum as the gradient."""
        raise self.lacks("set_optimizer")

    def start_optimizer(self, spec: OptimizerSpec) -> bool:
        """Set an optimizer where there is none, for a Trainer; return whether it needs no change after that."""
        if self.optimizer is not None:
            return False
        self.set_optimizer(spec)
        return True

    def change_optimizer(self, spec: OptimizerSpec) -> None:
        """Replace all numbers of the optimizer, for a Trainer on a worker that ``decides``."""
        self.set_optimizer(spec)

    def set_hyperparameters(self, numbers: dict[str, Any], keys: Sequence[Key] | None) -> None:
        """Change numbers of the optimizer, for all keys or some."""
        raise self.lacks("set_hyperparameters")

    def set_gradient_compression(self, codec: Codec | None, *, simulate: bool) -> None:
        """Compress gradients that are pushed from now on; what earlier ones still owe is pushed first.

        Args:
            codec: None: they are not compressed.
            simulate: compress where nothing is sent, too.
        """
        raise self.lacks("set_gradient_compression")

    def stats(self) -> Mapping[str, Any]:
        """Return counters of the engine's own, which are merged into ``KVStore.stats()``."""
        return {}

    def contents(self, *, releases: bool = False) -> AbstractContextManager[Contents]:
        """Return a context manager that gives everything that the store holds; nothing changes in its block.

        Args:
            releases: give the releases, too; only if ``"releases"`` is among the capabilities.
        """
        raise self.lacks("save")

    def restore(self, contents: Contents) -> None:
        """Take over what contents hold; on an error nothing has changed. With several workers, rank 0's count."""
        raise self.lacks("load")

    def save(self, path: str, kind: Kind, *, releases: bool = False) -> None:
        """Write a checkpoint, with the releases if that is asked for."""
        with self.contents(releases=releases) as contents:
            checkpoint.write(path, replace(contents, kind=kind))

    def load(self, path: str, kind: Kind, *, missing_ok: bool = False) -> bool:
        """Read a checkpoint, and return whether there is one; on an error nothing has changed.

        Args:
            path: of its directory.
            kind: that it must have.
            missing_ok: do nothing if none was saved there yet.
        """
        if "checkpoint" not in self.capabilities:
            raise self.lacks("load")
        if missing_ok and checkpoint.is_missing(path):
            return False
        contents = checkpoint.read(path, kind)
        with checkpoint.naming(path):
            if "releases" not in self.capabilities:
                refuse_releases(contents)
            self.restore(contents)
        return True

    def snapshot(self) -> tuple[Reader, Mapping[Key, int]]:
        """Return all values as they are now, and how many updates each key has had."""
        raise self.lacks("snapshot")

    def publish(self, name: str, keys: Sequence[Key] | None, keep: int | None) -> None:
        """Hold the present values of some keys, or of all, as a release.

        Args:
            name: of the release.
            keys: of the values (None: all).
            keep: how many of the newest releases stay (None: all).

        Raises:
            ReleaseExistsError: there was a release of this name.
        """
        raise self.lacks("publish")

    def unpublish(self, name: str) -> None:
        """Drop a release, once nobody reads it.

        Raises:
            ReleaseNotFoundError: it was dropped, or never published.
        """
        raise self.lacks("unpublish")

    def releases(self) -> list[tuple[str, int]]:
        """Return names and numbers of the releases, from the oldest to the newest."""
        raise self.lacks("releases")

    def open_release(self, name: str, lease_s: float) -> ReleaseReader:
        """Return a release, which stays until the reader is closed or has not read for ``lease_s`` seconds.

        Raises:
            ReleaseNotFoundError: it was dropped, or never published.
        """
        raise self.lacks("open_release")

    def wait_release(self, after: str | None, timeout_s: float, lease_s: float) -> ReleaseReader:
        """Wait for a release that is newer than another one (None: any), and return the newest.

        Raises:
            ReleaseNotFoundError: there never was a release ``after``.
            WaitTimeoutError: none has come in time.
        """
        raise self.lacks("wait_release")

    def wait_for(self, keys: Sequence[Key], min_version: int, timeout_s: float) -> None:
        """Return when every key has had so many updates.

        Raises:
            KeyNotFoundError: a key that was not initialised.
            WaitTimeoutError: the version did not come in time.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            for key in keys:
                # Its errors begin with the verb of the call.
                self.spec("pull", key)
            versions = {key: info.version for key, info in zip(keys, self.info(keys), strict=True)}
            keys = [key for key, version in versions.items() if version < min_version]
            if not keys:
                return
            if time.monotonic() >= deadline:
                what = f"version {min_version} has not come within {timeout_s:g} s; it is {versions[keys[0]]}"
                raise WaitTimeoutError(f"pull({quote(keys[0])}): {what}")
            time.sleep(POLL_S)

    def barrier(self) -> None:
        """Wait until every worker is here."""

    @property
    def joins_workers(self) -> Literal["sum", "mean", "alone"]:
        """What an update takes of the pushes of several workers: their sum, their mean, or each push by itself."""
        return "sum"

    @property
    def decides(self) -> bool:
        """Whether a Trainer on this worker sets numbers of the optimizer that all workers share."""
        return True

    def agree(self, verb: str, what: Any) -> None:
        """Raise WorkerMismatchError if workers in lock step do something else; ``what`` is plain data."""

    def gather(self, verb: str, mine: bytes) -> list[bytes]:
        """Return what each of the workers in lock step gives, by rank."""
        return [mine]

    def leave(self) -> None:
        """Serve the others until every worker has left."""

    def dead_workers(self) -> list[int]:
        """Return the ranks of workers that were here and are dead."""
        return []


def refuse_releases(contents: Contents) -> None:
    """Raise CheckpointError if contents have releases, for a kind of store that cannot have any."""
    if contents.releases is not None:
        raise CheckpointError(
            "has releases, which this type of store does not have; load it in one that has them "
            '(is_capable("releases")), and save it from there without releases'
        )


# A lease is renewed by the first read after this part of it.
RENEW_AFTER = 0.25


def held_s(lease_s: float) -> float:
    """Return for how long to hold a release, so that it is there for a whole lease after each read."""
    return lease_s * (1 + RENEW_AFTER)


def no_release(after: str | None, timeout_s: float) -> WaitTimeoutError:
    """Return the error of a wait for a release that has not come."""
    what = "no release has come" if after is None else f"no release after {quote(after)} has come"
    return WaitTimeoutError(f"wait_release: {what} within {timeout_s:g} s")
