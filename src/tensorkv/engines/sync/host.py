"""HostGroup: the workers of one host compare calls, wait for each other, and notice who is dead.

In a segment that all of them map, each worker has words (see ``_shared.c``) and a ring of entries. Before a call
moves data, each worker enters a fingerprint of it, and compares it with what the others have entered under the same
number. The first worker that notices a fault writes a note and ends every wait of the others.
"""

from __future__ import annotations

import json
import struct
import sys
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from time import monotonic
from typing import Any

from tensorkv import errors
from tensorkv.arrays.arguments import Key
from tensorkv.compiled import _shared
from tensorkv.engines.transport.segment import LINE, Segment
from tensorkv.errors import TensorKVError, WorkerMismatchError
from tensorkv.runtime import shield
from tensorkv.runtime.shield import Steps
from tensorkv.shard import native

from . import desync
from .group import ProcessGroup, rank_died

# Entries that a worker can be ahead of the others.
ENTRIES = 32
_ENTRY_NBYTES = 4096
# From one worker's entry to the next one's.
_STEP = ENTRIES * _ENTRY_NBYTES
_NOTE_NBYTES = 8192
_DIGEST_NBYTES = 8
_HEAD = struct.Struct("8sI")
# Bytes of text that an entry has room for; ``describe`` makes texts of one byte for each character.
ENTRY_TEXT = _ENTRY_NBYTES - _HEAD.size
# Words of a worker.
_ENTERED, _AGREED, _BROADCAST, _ARRIVED, _WAITS_FOR, _EXCHANGED = range(6)
_WORDS = 6
# What a worker gives in an exchange, and its length before.
_EXCHANGE_NBYTES = 1024
_LENGTH = struct.Struct("I")
# Long enough for a worker that is about to arrive, short enough to leave the core to one that is not.
_SPIN_S = 50e-6
# A wait that takes longer is made where signal handlers can interrupt it.
_SOON_S = 2e-3
# How often a wait looks whether the awaited worker lives.
_POLL_S = 0.05

# What a worker enters that takes part without a call of its own, and one whose call was refused.
LEFT = b"left...."
REFUSED = b"refused."


def describe(verb: str, **what: Any) -> str:
    """Return a call as text that has all that must be equal for every worker.

    >>> describe("push", keys=["a", "b"])
    'push {"keys": ["a", "b"]}'
    """
    return f"{verb} {json.dumps(what, default=str)}" if what else verb


class Signature:
    """What all workers must have in common of a call, as it is compared.

    Args:
        text: as ``describe`` returns it.
        digest: LEFT or REFUSED (None: 8 bytes that differ where texts differ).
    """

    __slots__ = ("_text", "digest", "entry", "verb")

    def __init__(self, text: str, digest: bytes | None = None) -> None:
        data = text.encode("utf-8", "backslashreplace")
        self.verb = text.partition(" ")[0]
        self._text: str | Callable[[], str] = text
        self.digest = _digest(data) if digest is None else digest
        data = data[:ENTRY_TEXT]
        self.entry = _HEAD.pack(self.digest, len(data)) + data
        """What a worker enters of it: as much of the text as there is room for."""

    @classmethod
    def of_keys(
        cls, verb: str, keys: Sequence[Key], values: Mapping[Key, Any], batch: native.Batch | None
    ) -> Signature:
        """Return the signature of a push of dense parts, whose text is made when it is asked for.

        Args:
            verb, keys: of the call.
            values: with the digest of each key.
            batch: of these keys; None where the compiled part has none.
        """
        seed, text = _seed(verb), None
        self = cls.__new__(cls)
        self.verb, self._text = verb, lambda: describe(verb, keys=list(keys))
        if batch is None:
            number = seed
            for key in keys:
                number = (number ^ values[key].digest) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
                number ^= number >> 32
        else:
            number, text = batch.describe(seed, f'{verb} {{"keys": [', ENTRY_TEXT)
        if text is None:
            text = self.text.encode()[:ENTRY_TEXT]
        self.digest = number.to_bytes(_DIGEST_NBYTES, "little")
        self.entry = _HEAD.pack(self.digest, len(text)) + text
        return self

    @property
    def text(self) -> str:
        """The verb, and what must be equal for every worker."""
        if not isinstance(self._text, str):
            self._text = self._text()
        return self._text


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=_DIGEST_NBYTES).digest()


def number_of(name: Key) -> int:
    """Return a 64-bit number that differs where names differ."""
    return int.from_bytes(_digest(json.dumps(name).encode()), "little")


_seed = cache(number_of)


class NoMemoryToShareError(MemoryError):
    """Missing shared memory, which every worker of the host knows of."""


@dataclass(eq=False, slots=True)
class Collective:
    """A collective call that this worker has entered.

    Args:
        number: how many calls this worker has entered before.
        digest: the fingerprint of the text; or LEFT, REFUSED.
        signature: with the verb, and what must be equal for every worker.
        members: the workers of this host that take part; None until they have agreed.
        sum_comes: whether the host before this one sends a sum of parts.
    """

    number: int
    digest: bytes
    signature: Signature
    members: list[int] | None = None
    sum_comes: bool = False

    @property
    def text(self) -> str:
        """The verb, and what must be equal for every worker."""
        return self.signature.text

    def become(self, digest: bytes, text: str) -> None:
        """Take part in a call of other workers."""
        self.digest, self.signature = digest, Signature(text, digest)


class HostGroup:
    """The workers of one host.

    Args:
        group: of all workers.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._memory: Any = group.open_control(_control_nbytes)
        self.group = group
        self.ranks = group.host_ranks
        self.local_rank = self.ranks.index(group.rank)
        self.size = len(self.ranks)
        self.error: TensorKVError | None = None
        self.num_entered = 0
        # Calls before this number can be entered: the entries that they write over have been read.
        self._num_free = ENTRIES
        self._others = [index for index in range(self.size) if index != self.local_rank]
        # Where workers outnumber cores, one that spins keeps another from working.
        self._spin_s = _SPIN_S if self.size <= group.num_cores else 0.0
        self._num_arrivals = 0
        self._num_broadcasts = self._num_exchanges = 0
        self._segments: list[Segment] = []
        if self._memory is not None:
            self._memory.set_words(1 + self.size * _WORDS)
            self._stop: int = self._memory.address
            self._own_entered, self._own_agreed = (self._word(self.local_rank, which) for which in (_ENTERED, _AGREED))
            self._entered, self._agreed = self._column(_ENTERED), self._column(_AGREED)

    # ------------------------------------------------------------ layout of the control memory

    def _word(self, worker: int, which: int) -> int:
        address: int = self._memory.address
        return address + LINE * (1 + worker * _WORDS + which)

    def _column(self, which: int) -> bytes:
        return array("Q", [self._word(index, which) for index in range(self.size)]).tobytes()

    def shared_reduce(self, room: int, places: tuple[int, int, int, int, int, int]) -> native.SharedReduce:
        """Return what makes plain calls in memory that the workers share, which is at these places.

        Args:
            room: the bytes of a bucket.
            places: as ``StagingBuffer.places`` returns them.
        """
        entries = self._memory.address + self._entry(0, 0)
        words = self._stop, self._entered, self._own_agreed, entries, _STEP
        return native.SharedReduce(self.local_rank, self.size, room, self._spin_s, _SOON_S, *words, *places)

    def entry_offset(self, number: int) -> int:
        """Return how far behind that of call 0 the entry of a call is."""
        return number % ENTRIES * _ENTRY_NBYTES

    def _entry(self, worker: int, number: int) -> int:
        return LINE * (1 + self.size * _WORDS) + (worker * ENTRIES + number % ENTRIES) * _ENTRY_NBYTES

    @property
    def _note(self) -> int:
        return LINE * (1 + self.size * _WORDS) + self.size * ENTRIES * _ENTRY_NBYTES

    def _exchanged(self, worker: int, number: int) -> int:
        # A worker that writes for an exchange has read all of the one before, which the others may still read.
        place = worker + number % 2 * self.size
        return self._note + _NOTE_NBYTES + place * _EXCHANGE_NBYTES

    # ------------------------------------------------------------ words

    def store(self, address: int, count: int) -> None:
        """Store a word that others may wait for."""
        if self.size > 1:
            _shared.store(address, count)

    def is_reached(self, addresses: bytes, least: int) -> bool:
        """Tell whether words have a count, without waiting."""
        return self.size == 1 or _shared.wait(addresses, least, self._stop, 0.0, 0.0) == len(addresses) // 8

    def reach(self, addresses: bytes, least: int, workers: Sequence[int] | None = None) -> Steps[None]:
        """Do as ``wait``, and yield before a wait that may be long."""
        if self.size > 1 and _shared.wait(addresses, least, self._stop, _SOON_S, self._spin_s) * 8 < len(addresses):
            yield
            self.wait(addresses, least, workers)

    def wait(self, addresses: bytes, least: int, workers: Sequence[int] | None = None) -> None:
        """Wait until a word of each worker has a count.

        Args:
            addresses: a column with the word of each worker.
            least: the count.
            workers: whose words these are (None: of the first ones, or of all).

        Raises:
            RankDiedError: the awaited worker died, or did not respond in time.
            TensorKVError: another worker has ended the store.
        """
        if self.size == 1:
            return
        stop, count = self._stop, len(addresses) // 8
        done = _shared.wait(addresses, least, stop, _POLL_S, self._spin_s)
        if done == count:
            return
        deadline = monotonic() + self.group.timeout_s
        while done < count:
            awaited = self._suspect(done if workers is None else workers[done])
            self.check()
            shield.check()
            _shared.store(self._word(self.local_rank, _WAITS_FOR), awaited + 1)
            if not self._memory.is_alive(awaited):
                raise rank_died(self.ranks[awaited], "died or ended early")
            if monotonic() > deadline:
                late = self.ranks[self._last_awaited(awaited)]
                raise rank_died(late, f"did not respond within {self.group.timeout_s:g} s")
            done = _shared.wait(addresses, least, stop, _POLL_S, 0.0)
        _shared.store(self._word(self.local_rank, _WAITS_FOR), 0)

    def _suspect(self, awaited: int) -> int:
        """Return the worker to look at: not this one, whose own thread is late, but the one that this thread awaits."""
        if awaited != self.local_rank:
            return awaited
        return min(self._others, key=lambda worker: _shared.load(self._word(worker, _ENTERED)))

    def _last_awaited(self, worker: int) -> int:
        """Follow which worker waits for which, to the one that waits for none."""
        for _ in range(self.size):
            ahead = _shared.load(self._word(worker, _WAITS_FOR))
            if not ahead or ahead - 1 == self.local_rank:
                break
            worker = ahead - 1
        return worker

    # ------------------------------------------------------------ the end of the store

    def check(self) -> None:
        """Raise the error that has ended this store, if there was one."""
        if self.error is None and self.size > 1 and _shared.load(self._stop):
            at = self._note
            (length,) = struct.unpack_from("I", self._memory.memory, at)
            try:
                kind, message = json.loads(bytes(self._memory.memory[at + 4 : at + 4 + length]))
            except ValueError:
                # Two workers have written at the same time.
                kind, message = "RankDeadError", "several workers have ended this store at the same time"
            error = errors.decode([kind, message])
            self.group.publish_error(error)
            self.error = error
        if self.error is not None:
            raise type(self.error)(str(self.error))

    def abort(self, error: TensorKVError) -> TensorKVError:
        """End the store for every worker; return the error to raise, which is the first worker's."""
        if self.error is not None:
            return self.error
        if self.size > 1:
            if _shared.load(self._stop):
                try:
                    self.check()
                except TensorKVError as first:
                    return first
            name, text = errors.encode(error)
            note = json.dumps([name, text[:600]]).encode()
            at, memory = self._note, self._memory
            memory.memory[at : at + 4 + len(note)] = struct.pack("I", len(note)) + note
            _shared.store(self._stop, 1)
            self._wake_everyone()
        # Before this worker's other threads go on and use the rendezvous store for something else.
        self.group.publish_error(error)
        self.error = error
        return error

    def _wake_everyone(self) -> None:
        for segment in (self._memory, *self._segments):
            for address in segment.words if segment is not None else ():
                _shared.wake(address)

    # ------------------------------------------------------------ calls

    def enter(self, signature: Signature) -> Collective:
        """Enter this worker's next call."""
        number = self.num_entered
        if self._memory is not None:
            if not self.can_enter():
                # Another worker may still have to read the entry that is written over.
                self.wait(self._agreed, number - ENTRIES + 1)
            at, entry = self._entry(self.local_rank, number), signature.entry
            self._memory.memory[at : at + len(entry)] = entry
            _shared.store(self._own_entered, number + 1)
        self.num_entered += 1
        return Collective(number, signature.digest, signature)

    def can_enter(self) -> bool:
        """Tell whether the next call can be entered without a wait."""
        number = self.num_entered
        if self._memory is None or number < self._num_free:
            return True
        # Most often there is room for some more calls, and the next ones need not look.
        for agreed in (number - ENTRIES // 2, number - ENTRIES + 1):
            if self.is_reached(self._agreed, agreed):
                self._num_free = agreed + ENTRIES
                return True
        return False

    def agree(self, call: Collective) -> None:
        """Wait until every worker has entered a call, and note which of them take part.

        A worker that has left learns the call of those that take part.

        Raises:
            WorkerMismatchError: they have not entered the same call.
        """
        shield.finish(self.agreement(call))

    def agreement(self, call: Collective) -> Steps[None]:
        """Do as ``agree``, and yield before a wait that may be long."""
        if call.members is not None:
            return
        if self._memory is None:
            call.members = [] if call.digest == LEFT else [self.local_rank]
            return
        number = call.number
        yield from self.reach(self._entered, number + 1)
        memory, first = self._memory.memory, self._entry(0, number)
        digests = [bytes(memory[at : at + _DIGEST_NBYTES]) for at in range(first, first + self.size * _STEP, _STEP)]
        members = [worker for worker, digest in enumerate(digests) if digest != LEFT]
        if len({digests[worker] for worker in members}) > 1:
            raise self._mismatch(call, members)
        if call.digest == LEFT and members:
            call.become(digests[members[0]], self._read_text(members[0], number))
        self.pass_over(call)
        call.members = members

    def all_entered(self, call: Collective) -> bool:
        """Tell whether every worker has entered a call."""
        return self._memory is None or self.is_reached(self._entered, call.number + 1)

    def pass_over(self, call: Collective) -> None:
        """Let others write over an entry that this worker need not read any more."""
        if self._memory is not None:
            _shared.store(self._own_agreed, call.number + 1)

    def _read_text(self, worker: int, number: int) -> str:
        """Return the text that a worker has entered."""
        at, memory = self._entry(worker, number), self._memory.memory
        _, length = _HEAD.unpack_from(memory, at)
        return bytes(memory[at + _HEAD.size : at + _HEAD.size + length]).decode(errors="replace")

    def _mismatch(self, call: Collective, members: Sequence[int]) -> WorkerMismatchError:
        if len(call.text) > ENTRY_TEXT:
            # An entry had no room for it; workers that made another call notice that as well, and look for it here.
            self.group.put_text(f"call/{call.number}/{self.group.rank}", call.text)
        calls: dict[str, list[int]] = {}
        for worker in members:
            rank = self.ranks[worker]
            text = self._read_text(worker, call.number)
            if worker == self.local_rank:
                text = call.text
            elif len(text) == ENTRY_TEXT:
                text = self.group.try_get_text(f"call/{call.number}/{rank}") or text
            calls.setdefault(text, []).append(rank)
        return desync.mismatch(call.number, calls)

    # ------------------------------------------------------------ collectives of the host

    def barrier(self) -> None:
        """Wait for every worker of this host."""
        self._num_arrivals += 1
        if self.size > 1:
            _shared.store(self._word(self.local_rank, _ARRIVED), self._num_arrivals)
            self.wait(self._column(_ARRIVED), self._num_arrivals)

    def allocate(self, nbytes: int, words: int = 0) -> Segment:
        """Return new memory that all workers of this host share; all of them call this.

        Args:
            nbytes: of the whole.
            words: how many words it begins with.

        Raises:
            NoMemoryToShareError: on every worker, when there is not so much.
        """
        segment: Segment | None = None
        if self.local_rank == 0:
            try:
                segment = Segment(nbytes, private=self.size == 1)
            except (OSError, RuntimeError):
                segment = None
        if self.size > 1:
            segment = self._open_on_all(segment, nbytes)
        if segment is None:
            raise NoMemoryToShareError(f"no {nbytes:,} bytes of shared memory")
        if words:
            segment.set_words(words)
            self._segments.append(segment)
        return segment

    def _open_on_all(self, segment: Segment | None, nbytes: int) -> Segment | None:
        name = self.broadcast_text("" if segment is None else segment.name)
        if self.local_rank != 0:
            segment = Segment(nbytes, name) if name else None
        # All have opened it now.
        self.barrier()
        if segment is not None:
            segment.close_file()
        return segment

    def broadcast_text(self, text: str) -> str:
        """Return the text of this host's first worker; all of them call this."""
        if self.size == 1:
            return text
        self._num_broadcasts += 1
        memory, at, word = self._memory, self._note + _NOTE_NBYTES // 2, self._word(0, _BROADCAST)
        if self.local_rank == 0:
            data = text.encode()
            memory.memory[at : at + 4 + len(data)] = struct.pack("I", len(data)) + data
            _shared.store(word, self._num_broadcasts)
        else:
            self.wait(word.to_bytes(8, sys.byteorder), self._num_broadcasts)
            (length,) = struct.unpack_from("I", memory.memory, at)
            text = bytes(memory.memory[at + 4 : at + 4 + length]).decode()
        # The text may be written over once all have read it.
        self.barrier()
        return text

    def exchange(self, data: bytes) -> Steps[list[bytes]]:
        """Return what each worker of this host gives, of at most 1020 bytes; all of them call this."""
        if self.size == 1:
            return [data]
        self._num_exchanges += 1
        number, memory = self._num_exchanges, self._memory.memory
        at = self._exchanged(self.local_rank, number)
        memory[at : at + _LENGTH.size + len(data)] = _LENGTH.pack(len(data)) + data
        _shared.store(self._word(self.local_rank, _EXCHANGED), number)
        yield from self.reach(self._column(_EXCHANGED), number)
        found = []
        for worker in range(self.size):
            at = self._exchanged(worker, number)
            (length,) = _LENGTH.unpack_from(memory, at)
            found.append(bytes(memory[at + _LENGTH.size : at + _LENGTH.size + length]))
        return found

    def release(self, segment: Segment) -> None:
        """Drop a segment with words in which no worker waits any more."""
        self._segments.remove(segment)

    def close(self) -> None:
        """Let go of the memory; others see that this worker has ended."""
        self._segments.clear()
        if self._memory is not None:
            self._memory.close_file()


def _control_nbytes(size: int) -> int:
    """Return the size of the segment in which so many workers compare calls."""
    return LINE + size * (_WORDS * LINE + ENTRIES * _ENTRY_NBYTES + 2 * _EXCHANGE_NBYTES) + _NOTE_NBYTES
