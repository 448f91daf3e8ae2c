"""The order of collective calls: every worker enters the same ones, agrees with the others, and runs them in turn.

``CollectiveOrder`` enters calls and agrees on them, over the workers of a host and then along the chain of hosts.
``PushQueue`` holds pushes whose caller has gone on, and its progress thread runs them in an order that all agree on.
"""

from __future__ import annotations

import atexit
import threading
from _thread import get_ident
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import NamedTuple, NoReturn, TypeVar

import torch

from tensorkv.errors import RankDeadError, TensorKVError, WorkerError, WorkerMismatchError, message_of
from tensorkv.runtime import forks, shield
from tensorkv.runtime.shield import Steps
from tensorkv.shard.shard import Shard, kept

from .allreduce import AllReduce
from .chain import HEADER_TEXT, Chain
from .group import RankDiedError
from .host import LEFT, REFUSED, Collective, HostGroup, NoMemoryToShareError, Signature
from .schedule import StagingBuffer

T = TypeVar("T")

# How many long texts of calls are remembered.
_MAX_TEXTS = 1024
# How long the end of a process or a store waits for the progress thread.
_EXIT_S = 5.0


class CallLock:
    """Held during a call. The thread that makes the call may take it again; another thread may take the call over."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._depth = 0

    def take(self, *, waits: bool = True) -> bool:
        """Take the lock; return whether it was free, if this does not wait for another thread."""
        if self._owner != get_ident():
            if not self._lock.acquire(blocking=waits):
                return False
            self._owner = get_ident()
        self._depth += 1
        return True

    def leave_thread(self) -> None:
        """Let another thread make the call, which takes it over."""
        self._owner = None

    def take_over(self) -> None:
        """Make the call in this thread from now on."""
        self._owner = get_ident()

    def release(self) -> None:
        """Let another call begin."""
        self._depth -= 1
        if not self._depth:
            self._owner = None
            self._lock.release()

    def __enter__(self) -> None:
        self.take()

    def __exit__(self, *_: object) -> None:
        self.release()


class CollectiveOrder:
    """The collective calls of one worker.

    Args:
        host: of this worker.
        chain: to other hosts.
        shard: whose updater must not call the store.
    """

    def __init__(self, host: HostGroup, chain: Chain, shard: Shard) -> None:
        self._host, self._chain, self._shard = host, chain, shard
        self.lock = CallLock()
        # Calls by their digests, where an entry or a header may have no room for the whole.
        self._signatures: dict[bytes, Signature] = {}

    def check(self) -> None:
        """Raise if an updater is running, or the error that has ended this store."""
        self._shard.refuse_reentry()
        self._host.check()

    @contextmanager
    def entered(self, text: str) -> Iterator[Collective]:
        """Enter a call; what goes wrong inside the block ends the store for every worker."""
        with self.lock, kept(), torch.no_grad():
            self.check()
            with self.unbroken(text):
                yield self._host.enter(Signature(text))

    def steps(self, call: Steps[T]) -> Steps[T]:
        """Make a call's steps while no other call is made, in whatever thread each of them is."""
        if not self.lock.take(waits=False):
            yield
            self.lock.take()
        try:
            while True:
                try:
                    next(call)
                except StopIteration as end:
                    result: T = end.value
                    return result
                self.lock.leave_thread()
                yield
                self.lock.take_over()
        finally:
            self.lock.release()

    def remember(self, call: Collective) -> None:
        """Keep the text of a push, for a time when this worker has left and other workers push the same keys."""
        if len(call.signature.entry) > HEADER_TEXT:
            self._signatures[call.digest] = self._signatures.pop(call.digest, call.signature)
            if len(self._signatures) > _MAX_TEXTS:
                del self._signatures[next(iter(self._signatures))]

    # ------------------------------------------------------------ agreement

    def agree(self, calls: Sequence[Collective], choice: Collective | None = None) -> Collective:
        """Do as ``agreement``, at once."""
        return shield.finish(self.agreement(calls, choice))

    def agreement(self, calls: Sequence[Collective], choice: Collective | None = None) -> Steps[Collective]:
        """Return which call comes next, once all workers have agreed on it and on who takes part.

        The workers of each host compare what they have entered, in the order in which they entered it. The first host
        chooses, and each host tells the next one.

        Args:
            calls: that this worker has entered and not run, oldest first.
            choice: of the first host (None: the oldest call).

        Raises:
            WorkerMismatchError: other workers make other calls.
        """
        host, chain = self._host, self._chain
        call = calls[0]
        yield from host.agreement(call)
        if call.digest == REFUSED:
            # The only worker of this host that had not left has refused its call.
            chain.refuse(call)
            return call
        header = chain.recv_header(calls) if chain.has_neighbours else None
        if header is not None:
            choice = next(each for each in calls if each.number == header.number)
        if choice is not None and choice is not call:
            call = choice
            for each in calls:
                host.agree(each)
                if each is call:
                    break
        if chain.has_neighbours:
            chain.forward(call, header)
        return call

    def join(self) -> Collective:
        """Enter the next call of the others, without one of this worker's, and return it; LEFT if no worker has one."""
        call = self.agree([self._host.enter(Signature("leave", LEFT))])
        if not call.members:
            # Only some workers are connected with other hosts, and know what these call.
            digest, _, text = self._host.broadcast_text(f"{call.digest.hex()} {call.text}").partition(" ")
            call.become(bytes.fromhex(digest), text)
        call.signature = self._signatures.get(call.digest, call.signature)
        return call

    def agree_on_all(self, call: Collective) -> None:
        """Return when every worker has agreed on a call; all must take part."""
        self.agree([call])
        members = call.members or []
        left = [rank for worker, rank in enumerate(self._host.ranks) if worker not in members]
        if self._chain.prev is not None and not call.sum_comes:
            left.append(self._chain.prev)
        if left:
            raise WorkerMismatchError(
                f"{call.text[:200]}: rank {left[0]} has left; until all ranks have left, the others may only push and "
                "pull"
            )
        self.wait_for_all()

    def wait_for_all(self) -> None:
        """Return when every worker has agreed on the present call, those that have left too."""
        self._chain.ack()
        self._host.barrier()

    # ------------------------------------------------------------ faults

    @contextmanager
    def ending_store(self, said: Signature | str) -> Iterator[None]:
        """End the store for every worker on a mismatch, a dead rank or a failed worker; name the call.

        Args:
            said: by the call, or its text.
        """
        try:
            yield
        except TensorKVError as error:
            self._raise_first(error, said if isinstance(said, str) else said.text)

    @contextmanager
    def unbroken(self, said: Signature | str) -> Iterator[None]:
        """Do as ``ending_store``, and also end the store if this worker breaks off inside the call.

        Args:
            said: by the call, or its text.
        """
        try:
            yield
        except BaseException as error:
            self.break_off(error, said if isinstance(said, str) else said.text)

    def break_off(self, error: BaseException, text: str) -> NoReturn:
        """Raise what a call has raised, after it has ended the store, or what has ended the store before."""
        if isinstance(error, TensorKVError):
            self._raise_first(error, text)
        # The workers of a host all know of missing memory, and go on; those of other hosts do not.
        if not isinstance(error, NoMemoryToShareError) or len(self._host.group.hosts) > 1:
            how = f"{type(error).__name__}: {message_of(error)}"
            self._host.abort(WorkerError(f"{text[:200]}: rank {self._host.group.rank} broke off: {how}"))
        if isinstance(error, NoMemoryToShareError):
            raise NoMemoryToShareError(f"{text[:200]}: {error}") from error
        raise error

    def _raise_first(self, error: TensorKVError, text: str) -> NoReturn:
        """Raise the error of the worker that ended the store first, or this one if the store goes on after it."""
        first = error
        if isinstance(error, RankDiedError):
            first = self._host.abort(RankDeadError(f"{text[:200]}: {error}"))
        elif isinstance(error, RankDeadError | WorkerError | WorkerMismatchError):
            first = self._host.abort(error)
        if first is error:
            raise error
        raise first from error

    def refuse(self, text: str) -> None:
        """Tell the others that this worker did not make its call; all earlier pushes of this worker have been run.

        Args:
            text: what was wrong.
        """
        with self.ending_store(text):
            call = self._host.enter(Signature(text, REFUSED))
            self._host.pass_over(call)
            self._chain.refuse(call)


class _Push(NamedTuple):
    allreduce: AllReduce
    priority: int

    @property
    def call(self) -> Collective:
        return self.allreduce.call


class PushQueue:
    """Pushes whose parts are staged, and a progress thread that does the rest of them.

    The one with the highest priority comes first among those whose parts every worker has staged; where none is
    complete, the oldest is waited for. Over hosts the worker of the first host chooses for those that it is connected
    with, among the pushes that all of them have staged, since a worker may wait for an older push before it makes the
    next.

    Args:
        order: of this worker's collective calls.
        host: of this worker.
        chain: to other hosts.
    """

    def __init__(self, order: CollectiveOrder, host: HostGroup, chain: Chain) -> None:
        self._order, self._host, self._chain = order, host, chain
        self._pushes: list[_Push] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_closing = False
        self._forks = forks.count

    def add(self, allreduce: AllReduce, priority: int) -> None:
        """Take over a push whose parts are staged."""
        with self._changed:
            self._pushes.append(_Push(allreduce, priority))
            if self._thread is None and not self._is_closing:
                self._start()
            self._changed.notify_all()
            is_served = self._thread is not None and self._thread.is_alive()
        if not is_served:
            # The interpreter is at its end.
            self._run_next(list(self._pushes))

    def _start(self) -> None:
        thread = threading.Thread(target=self._work, name="tensorkv-dist", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            # From Python 3.12 on there are no new threads in an exit handler.
            return
        self._thread = thread
        forks.pin_in_children(self)
        atexit.register(self._leave_process)

    def done(self, what: AllReduce | StagingBuffer | None = None) -> Steps[None]:
        """Do as ``wait_for``, and yield before a wait."""
        # Only this thread adds pushes now.
        if self._pushes and any(what in (None, push.allreduce, push.allreduce.staging) for push in list(self._pushes)):
            yield
            self.wait_for(what)
        self._host.check()

    def wait_for(self, what: AllReduce | StagingBuffer | None = None) -> None:
        """Wait until this worker has run a push, every push in a staging buffer, or (None) every push."""
        with self._changed:
            while any(what in (None, push.allreduce, push.allreduce.staging) for push in self._pushes):
                self._host.check()
                shield.check()
                self._changed.wait(0.1)
        self._host.check()

    def _leave_process(self) -> None:
        if self._forks != forks.count:
            # The thread, the pushes and the connections are the parent's.
            return
        # A process that ends while the thread waits inside of Gloo would be aborted.
        with self._changed:
            is_done = self._changed.wait_for(lambda: not self._pushes, _EXIT_S)
        if not is_done:
            self._host.group.disconnect()
        # Exit handlers that were registered earlier run later, and may still push.
        self.close()

    def close(self) -> None:
        """End the thread once it has done what it has begun."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(_EXIT_S)
            atexit.unregister(self._leave_process)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._pushes and not self._is_closing:
                    self._changed.wait()
                if self._is_closing:
                    return
                pushes = list(self._pushes)
            self._run_next(pushes)
            # Else they would hold their staging buffer until the next push.
            del pushes

    def _run_next(self, pushes: list[_Push]) -> None:
        """Run the push that comes next; an error ends the store, and with it all other pushes."""
        push: _Push | None = None
        try:
            with self._order.unbroken(pushes[0].call.signature):
                push = self._agree(pushes)
            with self._order.unbroken(push.call.signature):
                shield.finish(push.allreduce.run())
                if self._chain.has_neighbours:
                    self._chain.report_progress(self._last_staged())
                for _, problem in push.allreduce.update.failed:
                    raise problem
        except TensorKVError as error:
            self._host.abort(error)
            push = None
        except BaseException:
            # ``unbroken`` has ended the store.
            push = None
        with self._changed:
            if push is None:
                self._pushes.clear()
            else:
                self._pushes.remove(push)
            self._changed.notify_all()

    def _agree(self, pushes: list[_Push]) -> _Push:
        choice = self._choose(pushes).call if self._chain.prev is None else None
        call = self._order.agree([push.call for push in pushes], choice)
        return next(push for push in pushes if push.call is call)

    def _choose(self, pushes: list[_Push]) -> _Push:
        staged = [push for push in takewhile(self._is_staged, pushes) if push.call.number <= self._chain.staged_after]
        return max(staged, key=lambda push: push.priority, default=pushes[0])

    def _is_staged(self, push: _Push) -> bool:
        """Tell whether all workers of this host have staged their parts; asked in the order of the calls."""
        if push.call.members is None and not self._host.all_entered(push.call):
            return False
        self._host.agree(push.call)
        return push.allreduce.is_staged()

    def _last_staged(self) -> int:
        """Return the number of the last push up to which all workers of this host have staged their parts."""
        with self._changed:
            pushes = list(self._pushes)
        return max((push.call.number for push in takewhile(self._is_staged, pushes)), default=-1)
