"""AllReduce: one call's way through the stage. Lay out, sum and update, settle, chunk by chunk; then copy out.

Every worker lays its parts out in the stage and updates the pieces that it owns from everyone's parts. Outs are
written when every value is there: a call that fails, because another worker dies for example, leaves them as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tensorkv.errors import quote
from tensorkv.shard import native, reduce
from tensorkv.shard.entry import Entry
from tensorkv.shard.pool import Pool
from tensorkv.shard.rules import Assign, Rule, Step, WholeStep

from .chain import Chain, Presence
from .host import HostGroup
from .message import PackedBuffer, pieces
from .nonfinite import Guard
from .schedule import Arrays, BucketSegment, Schedule, StagingBuffer, copy_out, pack

# One call runs in one thread: its workers share the cores.
_POOL = Pool(1)


class AllReduce:
    """One call on one route.

    Args:
        host: of this worker's host.
        chain: to other hosts.
        route: of the call's keys.
        stage: where parts are laid out.
        number: of the call.
        doing: the call, for messages.
        entries: what this worker updates of each key.
        rule: how.
        guard: against NaN and Inf; None: they pass.
        first: the slot of the first chunk.
    """

    def __init__(
        self,
        host: HostGroup,
        chain: Chain,
        route: Schedule,
        stage: StagingBuffer,
        number: int,
        doing: str,
        entries: Sequence[Entry],
        rule: Rule,
        guard: Guard | None = None,
        first: int = 0,
    ) -> None:
        self._host, self._chain, self.stage, self.doing = host, chain, stage, doing
        self.route, self.number = route, number
        self._entries, self._rule, self._guard = entries, rule, guard
        self.refusal: Exception | None = None
        self._legs = route.legs(stage, first)
        self.count = len(self._legs)
        self._slots = [(first + chunk) % stage.slots for chunk in range(self.count)]
        # How often each chunk's slot will have been used after this call.
        self._uses: list[int] = []
        for slot in self._slots:
            stage.uses[slot] += 1
            self._uses.append(stage.uses[slot])
        self._owners = 8 * chain.owners
        self._is_owner = host.local_rank < chain.owners
        self._updates = self._is_owner and chain.is_last
        self._at_end = guard is not None or any(map(rule.sees_whole, entries))
        self._assigns = isinstance(rule, Assign) and guard is None
        self._steps: dict[int, Step] = {}
        self._direct: Arrays | None = None
        self._coming: dict[int, tuple[PackedBuffer, object]] = {}
        self._returning: dict[int, tuple[PackedBuffer, object]] = {}
        self.failed: list[tuple[int, Exception]] = []

    # ------------------------------------------------------------ whole calls

    def run(self, parts: Arrays | None, who: Callable[[], Presence]) -> None:
        """Make the values, the stages overlapping.

        Args:
            parts: this worker's; None if it only serves the others.
            who: tells, when the first parts are laid out, who takes part.
        """
        count, presence = self.count, Presence([], False)
        if parts is not None and parts.bases is not None and len(parts.bases) == 1:
            # Only what others sum is laid out; this worker reads its own pieces where they are.
            self._direct = parts
        at_sum, at_settle = self._turns()
        for turn in range(max(1, count + at_settle)):
            if turn < count and parts is not None:
                self.pack(turn, parts)
            if turn == 0:
                presence = who()
                if not count:
                    self._finish()
            if 0 <= turn - at_sum < count:
                self.sum(turn - at_sum, presence)
            if 0 <= turn - at_settle < count:
                self.settle(turn - at_settle)
        self._chain.flush(self.doing)

    def _turns(self) -> tuple[int, int]:
        """Return by how many turns each stage comes after a chunk was laid out."""
        at_sum = 1 if self.count > 1 else 0
        # A chunk goes to the last host and back while the next ones follow it.
        on_the_way = 4 * self._chain.hosts_after
        waits = self.count if self._at_end else on_the_way
        return at_sum, at_sum + waits

    def serve(self, presence: Presence) -> None:
        """Do what the other workers wait for, the parts having been laid out."""
        if not self.count:
            self._finish()
        for chunk in range(self.count):
            self.sum(chunk, presence)
            if not self._at_end and self._chain.is_last:
                self.settle(chunk)
        if self._at_end or not self._chain.is_last:
            for chunk in range(self.count):
                self.settle(chunk)
        self._chain.flush(self.doing)

    def is_staged(self, here: list[int]) -> bool:
        """Tell whether these workers of the host have staged their parts."""
        return all(self._host.is_there(self._filled(chunk, here), self._uses[chunk]) for chunk in range(self.count))

    def wait_for_values(self) -> None:
        """Wait until every owner has made its values."""
        for chunk in range(self.count):
            ready = self.stage.ready[self._slots[chunk]]
            self._host.wait(ready[: self._owners], self._uses[chunk], self.doing)

    def copy_out(self, outs: Arrays, past_cache: bool) -> None:
        """Copy the values, which are all there, to plain outs, if wanted past the processor's cache."""
        for legs in self._legs:
            for leg in legs:
                copy_out(leg, outs, past_cache)

    # ------------------------------------------------------------ one chunk

    def pack(self, chunk: int, parts: Arrays) -> None:
        """Put this worker's parts into the stage, once its slot has been read."""
        slot, use = self._slots[chunk], self._uses[chunk]
        self._host.wait(self.stage.read[slot][: self._owners], use - 1, self.doing)
        for leg in self._legs[chunk]:
            cuts = leg.whole if self._direct is None else leg.others
            pack(leg, self._host.local_rank, parts, cuts)
        self._host.store(self.stage.own_filled[slot], use)

    def sum(self, chunk: int, presence: Presence) -> None:
        """Update the pieces that this worker owns, or send their sums on."""
        slot, use = self._slots[chunk], self._uses[chunk]
        if self._is_owner:
            self._host.wait(self._filled(chunk, presence.here), use, self.doing, presence.here)
            legs = self._own_legs(chunk)
            # Who has left may read values at any time.
            in_place = len(presence.here) == self._host.size
            before = self._receive(chunk, legs, in_place) if presence.parts_come else None
            sums = self._sum_legs(legs, presence.here, before)
            self._host.store(self.stage.own_read[slot], use)
            if legs and not self._chain.is_last:
                self._send_on(chunk, legs, sums)
        if chunk == self.count - 1:
            self._finish()

    def settle(self, chunk: int) -> None:
        """Have the values of this worker's pieces in place, here and on the host before."""
        if not self._is_owner:
            return
        legs = self._own_legs(chunk)
        message: PackedBuffer | None = None
        if not self._chain.is_last and legs:
            message, work = self._returning.pop(chunk)
            self._chain.finish(work, self._chain.after, self.doing)
            message.unpack(legs)
        if self._chain.before is not None and legs:
            if message is None:
                message = PackedBuffer.of_values(legs)
                message.pack(legs)
            self._chain.send(message.whole, self._chain.before, self.doing)
        self._host.store(self.stage.own_ready[self._slots[chunk]], self._uses[chunk])

    # ------------------------------------------------------------ inside

    def _own_legs(self, chunk: int) -> list[BucketSegment]:
        """Return the legs of a chunk that have pieces of this worker's."""
        return [leg for leg in self._legs[chunk] if leg.own.stop > leg.own.start]

    def _filled(self, chunk: int, here: list[int]) -> bytes:
        """Return the words of a chunk that some workers of this host store when they have laid their parts out."""
        column = self.stage.filled[self._slots[chunk]]
        if len(here) == self._host.size:
            return column
        return b"".join(column[8 * worker : 8 * worker + 8] for worker in here)

    def _sum_legs(self, legs: list[BucketSegment], here: list[int], before: PackedBuffer | None) -> PackedBuffer | None:
        """Update values, or return the sums for the host after; None where there are no parts up to here."""
        sums: PackedBuffer | None = None
        if not self._chain.is_last:
            if not here or not legs:
                return before
            if before is None and here == [self._host.local_rank] and self._direct is not None:
                sums = PackedBuffer.of_parts(legs, self._direct)
            if sums is not None:
                return sums
            sums = PackedBuffer.new([(leg, leg.wide) for leg in legs])
        for index, leg in enumerate(legs):
            earlier = None if before is None else before.rooms[index]
            self._sum_leg(leg, here, earlier, None if sums is None else sums.rooms[index])
        return sums

    def _sum_leg(
        self, leg: BucketSegment, present: list[int], before: torch.Tensor | None, sums: torch.Tensor | None
    ) -> None:
        own = leg.own
        if native.can_sum(leg.dtype) and (sums is not None or self._assigns):
            columns = leg.own_columns([self._column(leg, worker) for worker in present])
            if before is not None:
                columns.insert(0, native.column_beside(before, leg.counts[own]))
            out = leg.own_columns([leg.value_column])[0]
            leg.sums([out if sums is None else native.column_beside(sums, leg.counts[own])], columns, own)
            return
        earlier = None if before is None else pieces(leg, before)
        targets = None if sums is None else pieces(leg, sums)
        if self._direct is not None:
            # A rule that sees pieces as tensors finds them in the stage.
            pack(leg, self._host.local_rank, self._direct, [own])
        for index, at in enumerate(range(own.start, own.stop)):
            parts = [leg.rooms(worker)[at] for worker in present]
            if earlier is not None:
                parts.insert(0, earlier[index])
            piece = leg.pieces[at]
            if targets is not None:
                reduce.sum_piece(targets[index], parts)
            else:
                start, _ = self.route.held[piece.key].span(self._host.local_rank)
                self._step(piece.key).apply(piece.start - start, piece.stop - start, parts)

    def _column(self, leg: BucketSegment, worker: int) -> bytes:
        """Return where a worker's parts of a leg can be read."""
        if self._direct is None or worker != self._host.local_rank:
            return leg.room_columns[worker]
        return self._direct.columns(leg)[0]

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
            if self._at_end and self._updates and self._host.local_rank == 0 and not held.value.numel():
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
        verb = self.doing.partition(" ")[0]
        names = [f"{verb}({quote(entry.key)})" for entry in self._entries]
        left_out, self.refusal = guard.decide(bad, names, self.doing)
        return left_out

    def _message(self, legs: list[BucketSegment], in_place: bool) -> PackedBuffer:
        """Return memory for the sums of the hosts before: where they are only added to, that of the values."""
        if in_place and self._assigns and self._chain.is_last and all(native.can_sum(leg.dtype) for leg in legs):
            return PackedBuffer.of_values(legs)
        return PackedBuffer.new([(leg, leg.wide) for leg in legs])

    def _receive(self, chunk: int, legs: list[BucketSegment], in_place: bool) -> PackedBuffer | None:
        """Return what the hosts before have summed of this worker's pieces, asking for the next chunk already."""
        for each in range(chunk, min(chunk + 2, self.count)):
            mine = self._own_legs(each)
            if each not in self._coming and mine:
                message = self._message(mine, in_place)
                self._coming[each] = message, self._chain.receive(message.whole, self._chain.before)
        if not legs:
            return None
        message, work = self._coming.pop(chunk)
        self._chain.finish(work, self._chain.before, self.doing)
        return message

    def _send_on(self, chunk: int, legs: list[BucketSegment], sums: PackedBuffer | None) -> None:
        after = self._chain.after
        if sums is not None:
            self._chain.send(sums.whole, after, self.doing)
        message = PackedBuffer.of_values(legs)
        self._returning[chunk] = message, self._chain.receive(message.whole, after)
