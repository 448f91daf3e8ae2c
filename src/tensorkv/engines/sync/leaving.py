"""Leaving: a worker without batches takes part in what the others push, until all have left.

It enters every call as LEFT and learns what the others call: from the workers of its host, or, where none of them
pushes any more, from other hosts.
"""

from __future__ import annotations

import json
from typing import NamedTuple

import torch

from tensorkv.errors import WorkerError, WorkerMismatchError
from tensorkv.shard.shard import kept

from .chain import Chain, Presence
from .host import LEFT, REFUSED, Meeting
from .order import Calls
from .pushes import Pushes


class _Call(NamedTuple):
    number: int
    mark: bytes
    text: str
    presence: Presence


class Leaving:
    """One worker's ``leave``.

    Args:
        meeting: of its host.
        chain: to other hosts.
        calls: of this worker.
        pushes: that the others make.
    """

    def __init__(self, meeting: Meeting, chain: Chain, calls: Calls, pushes: Pushes) -> None:
        self._meeting, self._chain, self._calls, self._pushes = meeting, chain, calls, pushes

    def leave(self) -> None:
        """Serve the others until every worker has left."""
        with self._calls.lock, kept(), torch.no_grad(), self._calls.unbroken("leave"):
            self._calls.check()
            self._pushes.drain()
            while (call := self._next()).mark != LEFT:
                # A call that was refused is none.
                if call.mark != REFUSED:
                    self._serve(call)

    def _next(self) -> _Call:
        """Return what the others call next; LEFT: nobody is left to call anything."""
        number = self._meeting.enter(LEFT, "leave")
        here = [worker for worker in self._meeting.agree(number, "leave") if worker != self._meeting.me]
        mark, text = self._meeting.read(here[0], number) if here else (LEFT, "leave")
        if mark == REFUSED:
            self._chain.refuse(number, text)
            return _Call(number, mark, text, Presence(here, False))
        called = self._chain.greet(number, mark, text)
        if not here:
            # Not every worker is linked with another host.
            told, _, text = self._meeting.tell(f"{called.mark.hex()} {called.text}", "leave").partition(" ")
            mark = bytes.fromhex(told)
        return _Call(number, mark, self._pushes.text_of(mark, text), Presence(here, called.parts_come))

    def _serve(self, call: _Call) -> Exception | None:
        verb, _, rest = call.text.partition(" ")
        if verb not in ("push", "pushpull"):
            rank = self._meeting.ranks[self._meeting.me]
            raise self._meeting.stop(
                WorkerMismatchError(f"rank {rank} has left; the others may push and pull only, not {call.text[:200]}")
            )
        try:
            called = json.loads(rest)
        except ValueError:
            raise self._meeting.stop(
                WorkerError(
                    "leave: the others push a list of keys that they have not pushed before, and it is too long"
                )
            ) from None
        keys, kinds = called["keys"], called.get("rows")
        if kinds is None:
            return self._pushes.serve(call.number, call.text, verb, keys, call.presence)
        return self._pushes.serve_rows(call.text, verb, keys, kinds, lambda: self._serve(self._next()))
