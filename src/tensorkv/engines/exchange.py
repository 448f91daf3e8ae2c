"""Exchange: one call's way through the stage. Lay out, sum and update, settle, copy out, chunk by chunk.

Every worker lays its parts out in the stage, updates the pieces that it owns from everyone's parts, and copies
everyone's pieces to its outs. While it copies one chunk, the others' next ones are being made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .. import native, reduce
from ..entry import Entry
from ..errors import quote
from ..pool import Pool
from ..rules import Assign, Rule, Step, WholeStep
from .chain import DEPTH, Chain
from .finite import Guard
from .meeting import Meeting
from .route import Arrays, Leg, Route, Stage, copy_out, lay_out
from .segment import aligned

# One call runs in one thread: its workers share the cores.
_POOL = Pool(1)


class Exchange:
    """One call on one route.

    Args:
        meeting: of this worker's host.
        chain: to other hosts.
        route: of the call's keys.
        stage: where parts are laid out.
        number: of the call.
        doing: the call, for messages.
        entries: what this worker updates of each key.
        rule: how.
        guard: against NaN and Inf; None: they pass.
    """

    def __init__(
        self,
        meeting: Meeting,
        chain: Chain,
        route: Route,
        stage: Stage,
        number: int,
        doing: str,
        entries: Sequence[Entry],
        rule: Rule,
        guard: Guard | None = None,
    ) -> None:
        self._meeting, self._chain, self.stage, self._doing = meeting, chain, stage, doing
        self.route, self.number = route, number
        self._entries, self._rule, self._guard = entries, rule, guard
        self.refusal: Exception | None = None
        self._legs = route.legs(stage)
        self.count = len(self._legs)
        # How often each chunk's slot will have been used after this call.
        self._uses: list[int] = []
        for chunk in range(self.count):
            slot = chunk % stage.slots
            stage.uses[slot] += 1
            self._uses.append(stage.uses[slot])
        self._owners = 8 * chain.owners
        self._is_owner = meeting.me < chain.owners
        self._updates = self._is_owner and chain.is_last
        self._at_end = guard is not None or any(map(rule.sees_whole, entries))
        self._assigns = isinstance(rule, Assign) and guard is None
        self._steps: dict[int, Step] = {}
        self._coming: dict[int, tuple[list[torch.Tensor], object]] = {}
        self._returning: dict[int, tuple[list[torch.Tensor], object]] = {}
        self.failed: list[tuple[int, Exception]] = []

    # ------------------------------------------------------------ whole calls

    def run(self, parts: Arrays | None, outs: Arrays | None, who: Callable[[], list[int]], past_cache: bool) -> None:
        """Do everything, the stages overlapping.

        Args:
            parts: this worker's; None if it only serves the others.
            outs: plain arrays that may be written as soon as values are there.
            who: tells, when the first parts are laid out, which workers of this host take part.
            past_cache: write outs past the processor's cache.
        """
        count, present = self.count, list[int]()
        at_sum = 1 if count > 1 else 0
        at_settle = at_sum
        if self._at_end:
            at_settle += count
        elif not self._chain.is_last:
            at_settle += DEPTH - 2
        at_copy = at_settle + at_sum
        for turn in range(max(1, count + at_copy)):
            if turn < count and parts is not None:
                self.lay_out(turn, parts)
            if turn == 0:
                present = who()
                if not count:
                    self._finish()
            if 0 <= turn - at_sum < count:
                self.sum(turn - at_sum, present)
            if 0 <= turn - at_settle < count:
                self.settle(turn - at_settle)
            if outs is not None and 0 <= turn - at_copy < count:
                self.copy_out(turn - at_copy, outs, past_cache)
        self._chain.flush(self._doing)

    def serve(self, present: list[int]) -> None:
        """Do what the other workers wait for, the parts having been laid out."""
        if not self.count:
            self._finish()
        for chunk in range(self.count):
            self.sum(chunk, present)
            if not self._at_end and self._chain.is_last:
                self.settle(chunk)
        if self._at_end or not self._chain.is_last:
            for chunk in range(self.count):
                self.settle(chunk)
        self._chain.flush(self._doing)

    def is_laid_out(self) -> bool:
        """Tell whether every worker of the host has laid its parts out."""
        return all(
            self._meeting.is_there(self.stage.filled[chunk % self.stage.slots], self._uses[chunk])
            for chunk in range(self.count)
        )

    def wait_for_values(self) -> None:
        """Wait until every owner has made its values."""
        for chunk in range(self.count):
            self._wait(self.stage.ready, chunk)

    # ------------------------------------------------------------ one chunk

    def _wait(self, columns: list[bytes], chunk: int) -> None:
        self._meeting.wait(columns[chunk % self.stage.slots][: self._owners], self._uses[chunk], self._doing)

    def lay_out(self, chunk: int, parts: Arrays) -> None:
        """Put this worker's parts into the stage, once its slot has been read."""
        slot, use = chunk % self.stage.slots, self._uses[chunk]
        self._meeting.wait(self.stage.read[slot][: self._owners], use - 1, self._doing)
        for leg in self._legs[chunk]:
            lay_out(leg, self._meeting.me, parts)
        self._meeting.store(self.stage.mine(slot)[0], use)

    def sum(self, chunk: int, present: list[int]) -> None:
        """Update the pieces that this worker owns, or send their sums on."""
        slot, use = chunk % self.stage.slots, self._uses[chunk]
        if self._is_owner:
            column = self.stage.filled[slot]
            if len(present) < self._meeting.size:
                column = b"".join(column[8 * worker : 8 * worker + 8] for worker in present)
            self._meeting.wait(column, use, self._doing, present)
            legs = [leg for leg in self._legs[chunk] if leg.own.stop > leg.own.start]
            before = self._receive(chunk, legs)
            sums = None if self._chain.is_last else _rooms([(leg, leg.wide) for leg in legs])
            for index, leg in enumerate(legs):
                self._sum_leg(leg, present, before[index] if before else None, sums[index] if sums else None)
            self._meeting.store(self.stage.mine(slot)[1], use)
            if sums is not None:
                self._send_on(chunk, legs, sums)
        if chunk == self.count - 1:
            self._finish()

    def settle(self, chunk: int) -> None:
        """Have the values of this worker's pieces in place, here and on the host before."""
        if not self._is_owner:
            return
        legs = [leg for leg in self._legs[chunk] if leg.own.stop > leg.own.start]
        rooms: list[torch.Tensor] = []
        if not self._chain.is_last and legs:
            rooms, work = self._returning.pop(chunk)
            self._chain.finish(work, self._chain.after, self._doing)
            for leg, room in zip(legs, rooms, strict=True):
                _copy(leg.values[leg.own], _pieces(leg, room))
        if self._chain.before is not None and legs:
            if self._chain.is_last:
                rooms = _rooms([(leg, leg.dtype) for leg in legs])
                for leg, room in zip(legs, rooms, strict=True):
                    _copy(_pieces(leg, room), leg.values[leg.own])
            self._chain.send(_whole(rooms), self._chain.before, self._doing)
        self._meeting.store(self.stage.mine(chunk % self.stage.slots)[2], self._uses[chunk])

    def copy_out(self, chunk: int, outs: Arrays, past_cache: bool) -> None:
        """Copy everyone's pieces to this worker's outs."""
        self._wait(self.stage.ready, chunk)
        for leg in self._legs[chunk]:
            copy_out(leg, outs, past_cache)

    # ------------------------------------------------------------ inside

    def _sum_leg(self, leg: Leg, present: list[int], before: torch.Tensor | None, sums: torch.Tensor | None) -> None:
        own = leg.own
        if native.can_sum(leg.dtype) and (sums is not None or self._assigns):
            columns = leg.own_columns([leg.room_columns[worker] for worker in present])
            if before is not None:
                columns.insert(0, native.column_beside(before, leg.counts[own]))
            out = leg.own_columns([leg.value_column])[0]
            leg.sums([out if sums is None else native.column_beside(sums, leg.counts[own])], columns, own)
            return
        earlier = None if before is None else _pieces(leg, before)
        targets = None if sums is None else _pieces(leg, sums)
        for index, at in enumerate(range(own.start, own.stop)):
            parts = [leg.rooms[worker][at] for worker in present]
            if earlier is not None:
                parts.insert(0, earlier[index])
            piece = leg.pieces[at]
            if targets is not None:
                reduce.sum_piece(targets[index], parts, at_once=False)
            else:
                start, _ = self.route.held[piece.key].span(self._meeting.me)
                self._step(piece.key).apply(piece.start - start, piece.stop - start, parts)

    def _step(self, key: int) -> Step:
        if key not in self._steps:
            entry = self._entries[key]
            step = self._rule.step(entry, _POOL) if self._guard is None else WholeStep(self._rule, entry, _POOL)
            self._steps[key] = step
        return self._steps[key]

    def _finish(self) -> None:
        """Count the update of every key, once, on every worker."""
        if not self._steps and not self._at_end:
            for entry in self._entries:
                entry.version += 1
            return
        left_out = set() if self._guard is None else self._sift(self._guard)
        for key, (entry, held) in enumerate(zip(self._entries, self.route.held, strict=True)):
            if key in left_out:
                continue
            version = entry.version
            # No piece has come of a value without elements, and its updater is called all the same.
            if self._at_end and self._updates and self._meeting.me == 0 and not held.value.numel():
                self._step(key)
            step = self._steps.pop(key, None)
            try:
                if step is not None:
                    step.finish()
                entry.version = version + 1
            except Exception as error:
                self.failed.append((key, error))

    def _sift(self, guard: Guard) -> set[int]:
        """Agree with all workers on which keys are left out."""
        bad = {key: step.count_nonfinite() for key, step in self._steps.items() if isinstance(step, WholeStep)}
        verb = self._doing.partition(" ")[0]
        names = [f"{verb}({quote(entry.key)})" for entry in self._entries]
        left_out, self.refusal = guard.decide(bad, names, self._doing)
        return left_out

    def _receive(self, chunk: int, legs: list[Leg]) -> list[torch.Tensor] | None:
        """Return what the hosts before have summed of this worker's pieces, asking for the next chunk already."""
        if self._chain.before is None:
            return None
        for each in range(chunk, min(chunk + 2, self.count)):
            mine = [leg for leg in self._legs[each] if leg.own.stop > leg.own.start]
            if each not in self._coming and mine:
                rooms = _rooms([(leg, leg.wide) for leg in mine])
                self._coming[each] = rooms, self._chain.receive(_whole(rooms), self._chain.before)
        if not legs:
            return None
        rooms, work = self._coming.pop(chunk)
        self._chain.finish(work, self._chain.before, self._doing)
        return rooms

    def _send_on(self, chunk: int, legs: list[Leg], sums: list[torch.Tensor]) -> None:
        if not legs:
            return
        after = self._chain.after
        self._chain.send(_whole(sums), after, self._doing)
        rooms = _rooms([(leg, leg.dtype) for leg in legs])
        self._returning[chunk] = rooms, self._chain.receive(_whole(rooms), after)


def _rooms(wanted: list[tuple[Leg, torch.dtype]]) -> list[torch.Tensor]:
    """Return flat tensors for the own pieces of legs, side by side in one message."""
    counts = [sum(leg.counts[leg.own]) for leg, _ in wanted]
    sizes = [aligned(count * dtype.itemsize) for count, (_, dtype) in zip(counts, wanted, strict=True)]
    message = torch.empty(sum(sizes), dtype=torch.uint8)
    places = torch.split(message, sizes)
    return [
        place[: count * dtype.itemsize].view(dtype)
        for place, count, (_, dtype) in zip(places, counts, wanted, strict=True)
    ]


def _whole(rooms: list[torch.Tensor]) -> torch.Tensor:
    """Return the message that rooms are parts of."""
    storage = rooms[0].untyped_storage()
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def _pieces(leg: Leg, room: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.split(room, leg.counts[leg.own]))


def _copy(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    if targets:
        torch._foreach_copy_(list(targets), list(sources))
