"""ProcessGroup: the workers of a store, which of them share a host, and Gloo connections between them."""

from __future__ import annotations

import atexit
import json
import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from time import monotonic, sleep
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from tensorkv import errors
from tensorkv.engines.transport.rendezvous import (
    agree_on_start,
    connect,
    get,
    host_id,
    launched,
    network_id,
    store_keeper,
)
from tensorkv.engines.transport.segment import Segment, can_share, why_not_shared
from tensorkv.errors import RankDeadError, TensorKVError, WorkerMismatchError
from tensorkv.runtime import _compat, caller, forks

log = logging.getLogger("tensorkv")

# How long to wait for the worker that noticed a fault to publish what it was.
_ERROR_WAIT_S = 1.0
# How long the rendezvous store may take to answer, on a machine that may be busy.
_STORE_S = 5.0
# How long the process that runs it stays for live workers to read why a store ended.
_READ_S = 10.0
# How much later than its connections a process may end.
_EXIT_S = 1.0
_POLL_S = 0.02
# Workers that share memory at most: compiled code sums so many parts at once. Further ones are like another host.
_MAX_SHARING = 250


class RankDiedError(RankDeadError):
    """A dead rank, before ``CollectiveOrder`` has put the call that waited for it in front of the message."""


def rank_died(rank: int, how: str) -> RankDiedError:
    """Return the error for a rank, and what was noticed of it, such as ``"died or ended early"``."""
    return RankDiedError(f"rank {rank} {how}; restart all workers from a checkpoint")


class ProcessGroup:
    """The processes that ``torchrun`` started, or those of a process group that exists already.

    Args:
        timeout_s: how long another worker may take.
        shared_memory: let the workers of one host share memory.
        options: what must be equal for every worker.

    Raises:
        RankDeadError: not all workers joined in time.
        WorkerMismatchError: workers have different options.
    """

    def __init__(self, timeout_s: float, shared_memory: bool, options: dict[str, Any] | None = None) -> None:
        self.timeout_s = timeout_s
        self.rank, self.size = 0, 1
        self._store: Any = None
        self._gloo: Any = None
        self._error: TensorKVError | None = None
        # Where each worker of this host holds a lock while it lives; None for one alone.
        self._control: Segment | None = None
        forks.pin_in_children(self)
        store = self._join()
        if store is None:
            log.info("tensorkv: no process group and no RANK and WORLD_SIZE: one worker")
            self.hosts, self.host_index, self.num_cores = [[0]], 0, 1
            return
        self._store = PrefixStore("tensorkv", store)
        self._store = PrefixStore(agree_on_start(self._store, self.rank, self.size, self.timeout_s), self._store)
        self.hosts = self._find_hosts(shared_memory, {"shared_memory": shared_memory, **(options or {})})
        self.host_index = next(index for index, ranks in enumerate(self.hosts) if self.rank in ranks)
        if len(self.hosts) > 1:
            # All workers take part in connecting, also those that will send nothing.
            self._gloo = self._connect()

    @property
    def host_ranks(self) -> list[int]:
        """The ranks of this worker's host."""
        return self.hosts[self.host_index]

    def _join(self) -> Any:
        """Find rank and size; return the rendezvous store, None for a worker alone."""
        if dist.is_available() and dist.is_initialized():
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            return _compat.default_rendezvous_store() if self.size > 1 else None
        if launched()[1] == 1:
            return None
        try:
            store, self.rank, self.size = connect(timedelta(seconds=self.timeout_s))
        except (OSError, dist.DistError) as error:
            raise RankDeadError(f"create: the rendezvous at MASTER_ADDR and MASTER_PORT failed: {error}") from error
        return store

    def _find_hosts(self, shared_memory: bool, options: dict[str, Any]) -> list[list[int]]:
        """Return runs of neighbouring ranks that can share memory; every worker gets the same result."""
        mine = [network_id(), host_id() if shared_memory and can_share() else None, options, _cores()]
        self._store.set(f"host/{self.rank}", json.dumps(mine))
        found = [json.loads(self._get(f"host/{rank}", rank)) for rank in range(self.size)]
        for rank, (_, _, theirs, _) in enumerate(found):
            if theirs != found[0][2]:
                raise WorkerMismatchError(
                    f"create: the options of rank 0 are {found[0][2]}, those of rank {rank} {theirs}"
                )
        self.on_one_network = all(each[0] == found[0][0] for each in found)
        names = [each[1] for each in found]
        hosts: list[list[int]] = []
        for rank, name in enumerate(names):
            if hosts and name is not None and names[rank - 1] == name and len(hosts[-1]) < _MAX_SHARING:
                hosts[-1].append(rank)
            else:
                hosts.append([rank])
        neighbours = next(ranks for ranks in hosts if self.rank in ranks)
        # Each may be bound to a core of its own.
        self.num_cores = len({core for rank in neighbours for core in found[rank][3]})
        if self.rank == 0 and shared_memory and not can_share():
            log.warning("tensorkv: no shared memory, workers of one host use Gloo, slower: %s", why_not_shared())
        return hosts

    def open_control(self, nbytes_of: Callable[[int], int]) -> Segment | None:
        """Return zeroed memory that the workers of this host share, in which each of them holds a liveness lock.

        Where shared memory does not work between workers, each becomes a host of its own.

        Args:
            nbytes_of: returns the size of the memory for a number of workers.

        Returns:
            None for one worker alone on its host.
        """
        try:
            opened = len(self.host_ranks) == 1 or self._open_control(nbytes_of(len(self.host_ranks)))
            works = all(len(each) == 1 for each in self.hosts) or self._all_agree("opened", opened)
        except BaseException:
            self._close_control()
            raise
        if not works:
            self._close_control()
            if self.rank == 0:
                caller.warn("shared memory does not work between the workers; they use Gloo instead, which is slower")
            self.hosts, self.host_index = [[rank] for rank in range(self.size)], self.rank
            self._gloo = self._gloo or self._connect()
        return self._control

    def _open_control(self, nbytes: int) -> bool:
        """Open the memory that the workers of this host share; return whether that works."""
        first = self.host_ranks[0]
        name = f"control/{first}"
        try:
            if self.rank == first:
                self._control = Segment(nbytes)
                self.put_text(name, self._control.name)
            else:
                self._control = Segment(nbytes, self._get(name, first).decode())
        except OSError:
            if self.rank == first:
                self.put_text(name, "")
            return False
        # Before the others count on it: they look for this lock once all have agreed that they opened the memory.
        self._control.mark_alive(self.host_ranks.index(self.rank))
        return True

    def _close_control(self) -> None:
        if self._control is not None:
            self._control.close_file()
            self._control = None

    def _all_agree(self, name: str, holds: bool) -> bool:
        """Tell whether something holds for every worker."""
        self._store.set(f"{name}/{self.rank}", b"1" if holds else b"0")
        return all(self._get(f"{name}/{rank}", rank) == b"1" for rank in range(self.size))

    # ------------------------------------------------------------ the rendezvous store

    def put_text(self, key: str, text: str) -> None:
        """Put a text into the rendezvous store."""
        self._store.set(key, text)

    def try_get_text(self, key: str) -> str | None:
        """Return a text from the rendezvous store; None if it is not put there within a second."""
        answer = self._ask_store(key)
        return answer.decode() if isinstance(answer, bytes) else None

    def _ask_store(self, key: str) -> Any:
        store = self._store

        def ask() -> Any:
            store.wait([key], timedelta(seconds=_ERROR_WAIT_S))
            return store.get(key)

        return _within(_ERROR_WAIT_S + _STORE_S, ask)

    def _get(self, key: str, rank: int) -> bytes:
        return get(self._store, key, rank, self.size, self.timeout_s)

    # ------------------------------------------------------------ faults

    def publish_error(self, error: TensorKVError) -> None:
        """Tell workers on other hosts why this one ends the store, then end the connections on which they wait."""
        if self._store is None or self._error is not None:
            return
        self._error = error
        note = json.dumps([*errors.encode(error), self.rank])
        store = self._store
        if self.rank == 0 and store_keeper() == "rank 0":
            # One that is dead reads nothing.
            seconds = 2 * _ERROR_WAIT_S if isinstance(error, RankDeadError) else _READ_S
            atexit.register(self._wait_for_readers, store, seconds, forks.count)

        def publish() -> None:
            store.compare_set("error", "", note)
            store.set(f"read/{self.rank}", b"")

        # A rendezvous store that is gone took its worker with it, and the others notice that.
        _within(_STORE_S, publish)
        self.disconnect()

    def _wait_for_readers(self, store: Any, seconds: float, forked: int) -> None:
        """Let the other workers read why this one ends before the rendezvous store ends with it."""
        if forks.count != forked:
            # The connection is the parent's.
            return
        here = set(self.host_ranks)
        deadline = monotonic() + seconds
        with suppress(dist.DistError):
            for rank in range(self.size):
                while not store.check([f"read/{rank}"]) and monotonic() < deadline:
                    if rank in here and not self.is_alive(rank):
                        break
                    sleep(_POLL_S)

    def published_error(self, otherwise: RankDeadError) -> TensorKVError:
        """Return the error that another worker has published, or else this one."""
        answer = self._ask_store("error")
        if isinstance(answer, dist.DistNetworkError):
            # The rendezvous store is gone, and with it the process that runs it.
            return RankDeadError(f"{store_keeper()} died or ended early; restart all workers from a checkpoint")
        if not isinstance(answer, bytes):
            return otherwise
        *encoded, _ = json.loads(answer)
        return errors.decode(encoded)

    def is_alive(self, rank: int) -> bool:
        """Tell whether the process of another rank of this host lives."""
        return self._control is None or self._control.is_alive(self.host_ranks.index(rank))

    def _find_dead(self) -> int | None:
        """Return a rank of this host that is dead; connections end a little before their process does."""
        deadline = monotonic() + _EXIT_S
        others = [rank for rank in self.host_ranks if rank != self.rank]
        while others:
            dead = [rank for rank in others if not self.is_alive(rank)]
            if dead or monotonic() > deadline:
                return dead[0] if dead else None
            sleep(_POLL_S)
        return None

    # ------------------------------------------------------------ messages

    @property
    def gloo(self) -> Any:
        """A Gloo process group of the store's own, so that no other messages come in between."""
        if self._gloo is None:
            self._gloo = self._connect()
        return self._gloo

    @forks.closing_in_children()
    def _connect(self) -> Any:
        name = os.environ.get("GLOO_SOCKET_IFNAME")
        if name:
            device = dist.ProcessGroupGloo.create_device(interface=name.partition(",")[0])
        elif self.on_one_network:
            device = dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")
        else:
            device = dist.ProcessGroupGloo.create_default_device()
        try:
            store = PrefixStore("links", self._store)
            return _compat.gloo_group(store, self.rank, self.size, device, self.timeout_s)
        except RuntimeError as error:
            raise self.published_error(
                RankDeadError(f"the workers cannot be connected through Gloo: {error}")
            ) from error

    def isend(self, tensor: torch.Tensor, rank: int) -> Any:
        """Begin to send a contiguous CPU tensor; return what ``wait`` takes."""
        return self._start("send", tensor, rank)

    def irecv(self, tensor: torch.Tensor, rank: int) -> Any:
        """Begin to receive into a contiguous CPU tensor; return what ``wait`` takes."""
        return self._start("recv", tensor, rank)

    def _start(self, what: str, tensor: torch.Tensor, rank: int) -> Any:
        try:
            return getattr(self.gloo, what)([tensor], rank, 0)
        except RuntimeError as error:
            raise self.published_error(rank_died(rank, f"is dead: {error}")) from error

    def wait(self, work: Any, rank: int) -> None:
        """Wait for a message from or to a rank."""
        try:
            work.wait()
        except RuntimeError as error:
            is_late = "imed out" in str(error)
            how = f"did not respond within {self.timeout_s:g} s" if is_late else "died or ended early"
            raise self.published_error(rank_died(rank, how)) from error

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return every rank's tensor, flat; they may differ in length, not in dtype."""
        flat = tensor.reshape(-1).contiguous()
        lengths = [torch.zeros(1, dtype=torch.int64, device="cpu") for _ in range(self.size)]
        self._all_gather_equal(lengths, torch.tensor([flat.numel()], dtype=torch.int64, device="cpu"))
        longest = max(int(length) for length in lengths)
        padded = torch.zeros(longest, dtype=flat.dtype, device="cpu")
        padded[: flat.numel()] = flat
        found = [torch.empty_like(padded) for _ in range(self.size)]
        if longest:
            self._all_gather_equal(found, padded)
        return [each[: int(length)] for each, length in zip(found, lengths, strict=True)]

    def all_gather_json(self, mine: Any) -> list[Any]:
        """Return what every rank gives, as JSON can hold it."""
        data = torch.frombuffer(bytearray(json.dumps(mine).encode()), dtype=torch.uint8)
        return [json.loads(bytes(each.numpy())) for each in self.all_gather(data)]

    def _all_gather_equal(self, into: list[torch.Tensor], tensor: torch.Tensor) -> None:
        self.begin_all_gather(into, tensor)()

    def begin_all_gather(self, into: list[torch.Tensor], tensor: torch.Tensor) -> Callable[[], None]:
        """Begin to fill flat tensors with every rank's, all of one length; return a function that waits for it."""
        try:
            return partial(self._end_all_gather, self.gloo.allgather([into], [tensor]))
        except RuntimeError as error:
            raise self._explained(error) from error

    def _end_all_gather(self, work: Any) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise self._explained(error) from error

    def _explained(self, error: RuntimeError) -> TensorKVError:
        dead = self._find_dead()
        if dead is not None:
            return rank_died(dead, "died or ended early")
        return self.published_error(RankDiedError(f"a rank died or ended early: {error}"))

    def disconnect(self) -> None:
        """Close the connections to other workers."""
        gloo, self._gloo = self._gloo, None
        if gloo is not None:
            gloo.abort()

    def close(self) -> None:
        """Let go of everything; a process group that existed before stays."""
        self._gloo = None
        self._store = None
        # Its file is closed: it no longer tells who is alive.
        self._control = None


def _cores() -> list[int]:
    """Return the cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def _within(seconds: float, do: Callable[[], Any]) -> Any:
    """Return what a function of the store returns or raises; None if it takes longer, as on a broken network."""
    answers: list[Any] = []

    def ask() -> None:
        try:
            answers.append(do())
        except dist.DistError as error:
            answers.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    return answers[0] if answers else None
