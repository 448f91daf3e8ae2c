"""ProcessGroup: the workers of a dist store. Who they are, which of them share a host, and links between hosts."""

from __future__ import annotations

import atexit
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from time import monotonic, sleep
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from tensorkv import errors
from tensorkv.errors import RankDeadError, TensorKVError, WorkerMismatchError
from tensorkv.runtime import forks
from tensorkv.transport.rendezvous import agree_on_start, connect, get, host_id, network_id
from tensorkv.transport.segment import can_share, why_not_shared

log = logging.getLogger("tensorkv")

# How long to wait for the one who has noticed a fault to say what it was.
_NEWS_S = 1.0
# How much later than its links a process may end.
_ENDING_S = 0.2
# How often a worker looks again.
_LOOK_S = 0.02


class ProcessGroup:
    """The processes that ``torchrun`` started, or those of a process group that is there already.

    Args:
        timeout_s: how long another worker may take.
        shared_memory: let workers of one host meet in shared memory.
        options: what must be equal for every worker.

    Raises:
        RankDeadError: not all workers joined in time.
    """

    def __init__(self, timeout_s: float, shared_memory: bool, options: dict[str, Any] | None = None) -> None:
        self.timeout_s = timeout_s
        self.rank, self.size = 0, 1
        self._store: Any = None
        self._links: Any = None
        self._tags: dict[int, int] = {}
        self._error: TensorKVError | None = None
        forks.keep(self)
        self.dead_on_host: Callable[[], list[int]] = list
        """Returns the ranks of this host whose process has ended."""
        store = self._join()
        if store is None:
            log.info("tensorkv: no process group and no RANK and WORLD_SIZE: one worker")
            self.hosts, self.host_index = [[0]], 0
            return
        self._store = PrefixStore("tensorkv", store)
        self._store = PrefixStore(agree_on_start(self._store, self.rank, self.size, self.timeout_s), self._store)
        self.hosts = self._find_hosts(shared_memory, {"shared_memory": shared_memory, **(options or {})})
        self.host_index = next(index for index, ranks in enumerate(self.hosts) if self.rank in ranks)
        if len(self.hosts) > 1:
            # All workers take part in connecting, also those that will send nothing.
            self._links = self._connect()

    def _join(self) -> Any:
        if dist.is_available() and dist.is_initialized():
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            return dist.distributed_c10d._get_default_store() if self.size > 1 else None
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
            return None
        try:
            met = connect(timedelta(seconds=self.timeout_s))
        except (KeyError, OSError, ValueError, dist.DistError) as error:
            raise RankDeadError(f"create: the rendezvous at MASTER_ADDR and MASTER_PORT failed: {error}") from error
        store, self.rank, self.size = met
        return store

    def _find_hosts(self, shared_memory: bool, options: dict[str, Any]) -> list[list[int]]:
        """Return runs of neighbouring ranks that can share memory; every worker comes to the same result."""
        mine = [network_id(), host_id() if shared_memory and can_share() else None, options]
        self._store.set(f"host/{self.rank}", json.dumps(mine))
        told = [json.loads(self._get(f"host/{rank}", rank)) for rank in range(self.size)]
        for rank, (_, _, theirs) in enumerate(told):
            if theirs != told[0][2]:
                raise WorkerMismatchError(
                    f"create: the options of rank 0 are {told[0][2]}, those of rank {rank} {theirs}"
                )
        self.on_one_network = all(each[0] == told[0][0] for each in told)
        names = [each[1] for each in told]
        hosts: list[list[int]] = []
        for rank, name in enumerate(names):
            if hosts and name is not None and names[rank - 1] == name:
                hosts[-1].append(rank)
            else:
                hosts.append([rank])
        if self.rank == 0 and shared_memory and not can_share():
            log.warning("tensorkv: no shared memory, workers of one host use Gloo, slower: %s", why_not_shared())
        return hosts

    def split_hosts(self) -> None:
        """Let every worker stand for itself, since shared memory does not work between them."""
        self.hosts, self.host_index = [[rank] for rank in range(self.size)], self.rank
        self._links = self._links or self._connect()

    def agree(self, name: str, holds: bool) -> bool:
        """Tell whether something holds for every worker."""
        self._store.set(f"{name}/{self.rank}", b"1" if holds else b"0")
        return all(self._get(f"{name}/{rank}", rank) == b"1" for rank in range(self.size))

    def put_text(self, key: str, text: str) -> None:
        """Leave a text for others to ``ask`` for."""
        self._store.set(key, text)

    def get_text(self, key: str, rank: int) -> str:
        """Return what a rank has told under a key."""
        return self._get(key, rank).decode()

    def try_get_text(self, key: str) -> str | None:
        """Return what is told under a key; None if it does not come soon."""
        store = self._store

        def ask() -> Any:
            store.wait([key], timedelta(seconds=_NEWS_S))
            return store.get(key)

        answer = _within(2 * _NEWS_S, ask)
        return answer.decode() if isinstance(answer, bytes) else None

    def _get(self, key: str, rank: int) -> bytes:
        return get(self._store, key, rank, self.size, self.timeout_s)

    # ------------------------------------------------------------ faults

    def publish_error(self, error: TensorKVError) -> None:
        """Tell workers on other hosts why this one ends, then cut the links on which they wait."""
        if self._store is None or self._error is not None:
            return
        self._error = error
        note = json.dumps([type(error).__name__, str(error), self.rank])
        store = self._store
        if _keeper(self.rank):
            atexit.register(_wait_for_readers, store, self.size, forks.count)

        def tell() -> None:
            store.compare_set("error", "", note)
            store.add("heard", 1)

        # A store that is gone has taken its worker with it, and the others see that.
        _within(_NEWS_S, tell)
        self.disconnect()

    def published_error(self, otherwise: str) -> TensorKVError:
        """Return the error that another worker has published, or a RankDeadError with this text."""
        store = self._store

        def ask() -> Any:
            store.wait(["error"], timedelta(seconds=_NEWS_S))
            return store.get("error")

        answer = _within(2 * _NEWS_S, ask)
        if isinstance(answer, dist.DistNetworkError):
            # The store is gone, and with it the process that keeps it.
            keeper = "rank 0" if _keeper(0) else "the launcher"
            return RankDeadError(f"{keeper} died or ended early; restart all workers from a checkpoint")
        if not isinstance(answer, bytes):
            return RankDeadError(otherwise)
        kind, message, _ = json.loads(answer)
        made: TensorKVError = getattr(errors, kind)(message)
        return made

    # ------------------------------------------------------------ links

    @property
    def links(self) -> Any:
        """A Gloo group of the store's own, so that nobody else's messages come in between."""
        if self._links is None:
            self._links = self._connect()
        return self._links

    @forks.keep_sockets()
    def _connect(self) -> Any:
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timedelta(seconds=self.timeout_s)
        name = os.environ.get("GLOO_SOCKET_IFNAME")
        if name:
            device = dist.ProcessGroupGloo.create_device(interface=name.partition(",")[0])
        elif self.on_one_network:
            device = dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")
        else:
            device = dist.ProcessGroupGloo.create_default_device()
        options._devices = [device]
        try:
            return dist.ProcessGroupGloo(PrefixStore("links", self._store), self.rank, self.size, options)
        except RuntimeError as error:
            raise self.published_error(f"the workers cannot be linked through Gloo: {error}") from error

    def send(self, tensor: torch.Tensor, rank: int) -> Any:
        """Begin to send a contiguous CPU tensor; return what can be waited for."""
        return self._start("send", tensor, rank)

    def receive(self, tensor: torch.Tensor, rank: int) -> Any:
        """Begin to receive into a contiguous CPU tensor; return what can be waited for."""
        return self._start("recv", tensor, rank)

    def _start(self, what: str, tensor: torch.Tensor, rank: int) -> Any:
        try:
            return getattr(self.links, what)([tensor], rank, 0)
        except RuntimeError as error:
            raise self.published_error(f"rank {rank} was lost: {error}") from error

    def finish(self, work: Any, rank: int, doing: str) -> None:
        """Wait for a message from or to a rank."""
        try:
            work.wait()
        except RuntimeError as error:
            text = str(error)
            how = f"did not respond within {self.timeout_s:g} s" if "imed out" in text else "died or ended early"
            raise self.published_error(lost(doing, rank, how)) from error

    def all_gather(self, tensor: torch.Tensor, doing: str) -> list[torch.Tensor]:
        """Return every rank's tensor, flat; they may differ in length, not in dtype."""
        flat = tensor.reshape(-1).contiguous()
        lengths = [torch.zeros(1, dtype=torch.int64, device="cpu") for _ in range(self.size)]
        self._collect(lengths, torch.tensor([flat.numel()], dtype=torch.int64, device="cpu"), doing)
        longest = max(int(length) for length in lengths)
        padded = torch.zeros(longest, dtype=flat.dtype, device="cpu")
        padded[: flat.numel()] = flat
        found = [torch.empty_like(padded) for _ in range(self.size)]
        if longest:
            self._collect(found, padded, doing)
        return [each[: int(length)] for each, length in zip(found, lengths, strict=True)]

    def all_gather_json(self, mine: Any, doing: str) -> list[Any]:
        """Return what every rank gives, as JSON can hold it."""
        data = torch.frombuffer(bytearray(json.dumps(mine).encode()), dtype=torch.uint8)
        return [json.loads(bytes(each.numpy())) for each in self.all_gather(data, doing)]

    def _collect(self, into: list[torch.Tensor], tensor: torch.Tensor, doing: str) -> None:
        try:
            self.links.allgather([into], [tensor]).wait()
        except RuntimeError as error:
            dead = self._look_for_dead()
            if dead:
                raise RankDeadError(lost(doing, dead[0], "died or ended early")) from error
            raise self.published_error(f"{doing}: a rank died or ended early: {error}") from error

    def _look_for_dead(self) -> list[int]:
        """Return the ranks of this host that are dead; links end a little before their process does."""
        deadline = time.monotonic() + _ENDING_S
        while len(self.hosts[self.host_index]) > 1:
            dead = self.dead_on_host()
            if dead or time.monotonic() > deadline:
                return dead
            time.sleep(_LOOK_S)
        return []

    def disconnect(self) -> None:
        """Close the connections to other workers."""
        links, self._links = self._links, None
        if links is not None:
            links.abort()

    def close(self) -> None:
        """Let go of everything; the process group that was there before stays."""
        self._links = None
        self._store = None


def _keeper(rank: int) -> bool:
    """Tell whether the rendezvous store ends with the process of a rank."""
    return rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _wait_for_readers(store: Any, size: int, forked: int) -> None:
    """Let the other workers read why this one ends before the rendezvous store ends with it."""
    if forks.count != forked:
        # The connection is the parent's.
        return
    # One host may hear of it from another, which takes the time of each.
    deadline = monotonic() + 2 * _NEWS_S
    with suppress(dist.DistError):
        while store.add("heard", 0) < size and monotonic() < deadline:
            sleep(_LOOK_S)


def lost(doing: str, rank: int, how: str) -> str:
    """Return what a message says of a rank that was lost in a call."""
    return f"{doing}: rank {rank} {how}; restart all workers from a checkpoint"


def _within(seconds: float, do: Callable[[], Any]) -> Any:
    """Return what a function of the store returns or raises; None if it takes longer, as behind a broken wire."""
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
