"""CollectiveOrder: what every worker enters in the same order, and what happens when one does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import RLock

import torch

from tensorkv.errors import RankDeadError, TensorKVError, WorkerError, WorkerMismatchError
from tensorkv.shard.shard import Shard, kept

from .chain import Chain, Presence
from .host import REFUSED, HostGroup, NoMemoryToShareError, fingerprint


class CollectiveOrder:
    """The calls of one worker.

    Args:
        host: of its host.
        chain: to other hosts.
        shard: whose updater must not call the store.
        rank: of this worker, for messages.
    """

    def __init__(self, host: HostGroup, chain: Chain, shard: Shard, rank: int) -> None:
        self._host, self._chain, self._shard, self._rank = host, chain, shard, rank
        self.lock = RLock()
        self._entered = False

    @contextmanager
    def entered(self, text: str) -> Iterator[int]:
        """Enter a call and give its number; what goes wrong inside it ends the store for every worker."""
        with self.lock, kept(), torch.no_grad():
            self.check()
            number = self._host.enter(fingerprint(text), text)
            self._entered = True
            with self.unbroken(text):
                yield number

    @contextmanager
    def unbroken(self, text: str) -> Iterator[None]:
        """End the store for every worker if this one breaks off inside a call."""
        try:
            yield
        except (RankDeadError, WorkerError, WorkerMismatchError) as error:
            # A link that is broken already raises where nobody waits, and so where nobody has ended the store.
            first = self._host.stop(error)
            if first is error:
                raise
            raise first from error
        except TensorKVError:
            raise
        except BaseException as error:
            # What the workers of a host know together, those of other hosts do not.
            if not isinstance(error, NoMemoryToShareError) or len(self._host.group.hosts) > 1:
                how = f"{type(error).__name__}: {error}"
                self._host.stop(WorkerError(f"{text[:200]}: rank {self._rank} broke off: {how}"))
            raise

    def check(self) -> None:
        """Raise if an updater is running, or what has ended this store."""
        self._shard.refuse_reentry()
        self._host.check()

    def together(self, number: int, text: str) -> None:
        """Return when every worker has entered this call; they must all take part."""
        here, parts_come = self.who(number, text)()
        gone = [rank for worker, rank in enumerate(self._host.ranks) if worker not in here]
        if self._chain.before is not None and not parts_come:
            gone.append(self._chain.before)
        if gone:
            raise self._host.stop(
                WorkerMismatchError(f"{text}: rank {gone[0]} has left; until all have, others may push and pull only")
            )
        self.all_agree(text)

    def all_agree(self, text: str) -> None:
        """Return when every worker has agreed on this call, those who have left too."""
        self._chain.answer(text)
        self._host.barrier(text)

    def who(self, number: int, text: str) -> Callable[[], Presence]:
        """Return a function that agrees on a push with the others, and tells which of them take part."""

        def ask() -> Presence:
            here = self._host.agree(number, text)
            linked = self._chain.linked
            return Presence(here, linked and self._chain.greet(number, fingerprint(text), text).parts_come)

        return ask

    # ------------------------------------------------------------ calls that do not come to be

    def begin(self) -> None:
        """Begin another call, which has not been entered yet."""
        # What an updater calls is inside another call.
        if not self._shard.rule.running:
            self._entered = False

    def refuse(self, verb: str, error: Exception, drain: Callable[[], None]) -> None:
        """Tell the others that this worker did not make its call, since what it was given does not fit.

        Args:
            verb: of the call.
            error: what was wrong.
            drain: waits for this worker's earlier pushes, since calls are compared in order.
        """
        if self._entered or self._shard.rule.running or self._host.error is not None:
            return
        with self.lock, suppress(TensorKVError):
            drain()
            text = f"{verb} refused: {error}"
            number = self._host.enter(REFUSED, text)
            self._host.pass_over(number)
            self._chain.refuse(number, text)
