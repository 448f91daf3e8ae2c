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
from .host import LEFT, REFUSED, HostGroup
from .order import CollectiveOrder
from .pushes import Pushes


class _Call(NamedTuple):
    number: int
    mark: bytes
    text: str
    presence: Presence


class Leaving:
    """One worker's ``leave``.

    Args:
        host: of its host.
        chain: to other hosts.
        order: of this worker's collective calls.
        pushes: that the others make.
    """

    def __init__(self, host: HostGroup, chain: Chain, order: CollectiveOrder, pushes: Pushes) -> None:
        self._host, self._chain, self._order, self._pushes = host, chain, order, pushes

    def leave(self) -> None:
        """Serve the others until every worker has left."""
        with self._order.lock, kept(), torch.no_grad(), self._order.unbroken("leave"):
            self._order.check()
            self._pushes.drain()
            while (call := self._next()).mark != LEFT:
                # A call that was refused is none.
                if call.mark != REFUSED:
                    self._serve(call)

    def _next(self) -> _Call:
        """Return what the others call next; LEFT: nobody is left to call anything."""
        number = self._host.enter(LEFT, "leave")
        here = [worker for worker in self._host.agree(number, "leave") if worker != self._host.local_rank]
        mark, text = self._host.read(here[0], number) if here else (LEFT, "leave")
        if mark == REFUSED:
            self._chain.refuse(number, text)
            return _Call(number, mark, text, Presence(here, False))
        called = self._chain.greet(number, mark, text)
        if not here:
            # Not every worker is linked with another host.
            told, _, text = self._host.broadcast_text(f"{called.mark.hex()} {called.text}", "leave").partition(" ")
            mark = bytes.fromhex(told)
        return _Call(number, mark, self._pushes.text_of(mark, text), Presence(here, called.parts_come))

    def _serve(self, call: _Call) -> Exception | None:
        verb, _, rest = call.text.partition(" ")
        if verb not in ("push", "pushpull"):
            rank = self._host.ranks[self._host.local_rank]
            raise self._host.stop(
                WorkerMismatchError(f"rank {rank} has left; the others may push and pull only, not {call.text[:200]}")
            )
        try:
            called = json.loads(rest)
        except ValueError:
            raise self._host.stop(
                WorkerError(
                    "leave: the others push a list of keys that they have not pushed before, and it is too long"
                )
            ) from None
        keys, kinds = called["keys"], called.get("rows")
        if kinds is None:
            return self._pushes.serve(call.number, call.text, verb, keys, call.presence)
        return self._pushes.serve_rows(call.text, verb, keys, kinds, lambda: self._serve(self._next()))
