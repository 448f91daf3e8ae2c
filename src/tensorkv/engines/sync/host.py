"""HostGroup: the workers of one host agree on calls, wait for each other, and notice who is lost.

In a segment that all of them map, each worker has words (see ``_shared.c``) and a ring of entries. Before a
call moves data, each enters a fingerprint of it; who finds another one at the same number of calls raises.
The first to see a fault writes a note and stops every wait of the others.
"""

from __future__ import annotations

import json
import re
import struct
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from itertools import zip_longest
from time import monotonic
from typing import Any

from tensorkv import errors
from tensorkv.errors import RankDeadError, TensorKVError, WorkerMismatchError
from tensorkv.runtime import shield
from tensorkv.shard.pool import default_threads
from tensorkv.transport.segment import LINE, Segment

from .group import ProcessGroup, lost

try:
    from tensorkv.runtime import _shared
except ImportError:
    _shared = None  # type: ignore[assignment]

# Entries that a worker can be ahead of the others.
ENTRIES = 32
_ENTRY_NBYTES = 4096
_NOTE_NBYTES = 8192
_HEAD = struct.Struct("8sI")
# What an entry has room for, in bytes; ``describe`` gives one for each character.
ENTRY_TEXT = _ENTRY_NBYTES - _HEAD.size
# Words of a worker.
_ENTERED, _AGREED, _TOLD, _ARRIVED, _WAITS_FOR = range(5)
_WORDS = 5
# Long enough to meet a worker that is on its way, short enough to leave the core to it if it is not.
_SPIN_S = 50e-6
# How often a wait looks whether the other one lives.
_LOOK_S = 0.05

LEFT = b"left...."
REFUSED = b"refused."


def fingerprint(text: str) -> bytes:
    """Return 8 bytes that differ where texts differ."""
    return blake2b(text.encode("utf-8", "backslashreplace"), digest_size=8).digest()


class NoMemoryToShareError(MemoryError):
    """Missing shared memory, which every worker of the host knows of."""


class HostGroup:
    """The workers of one host.

    Args:
        group: of all workers.
        memory: the segment of ``control_nbytes`` that those of this host share; None for one alone.
    """

    def __init__(self, group: ProcessGroup, memory: Segment | None) -> None:
        self.group = group
        self.ranks = group.hosts[group.host_index]
        self.local_rank = self.ranks.index(group.rank)
        self.size = len(self.ranks)
        self.calls = 0
        self._memory: Any = memory
        self._others = [index for index in range(self.size) if index != self.local_rank]
        # Where workers outnumber cores, one that spins keeps another from working.
        self._spin_s = _SPIN_S if self.size <= default_threads() else 0.0
        self._arrivals = 0
        self._told = 0
        self._segments: list[Segment] = []
        self._agreed: dict[int, list[int]] = {}
        self.error: TensorKVError | None = None
        if memory is not None:
            group.dead_on_host = lambda: [self.ranks[each] for each in self._others if not memory.is_alive(each)]

    @staticmethod
    def control_nbytes(size: int) -> int:
        """Return the size of the segment in which so many workers meet."""
        return LINE + size * (_WORDS * LINE + ENTRIES * _ENTRY_NBYTES) + _NOTE_NBYTES

    # ------------------------------------------------------------ where things lie

    def _word(self, worker: int, which: int) -> int:
        address: int = self._memory.address
        return address + LINE * (1 + worker * _WORDS + which)

    def _column(self, which: int) -> bytes:
        return array("Q", [self._word(index, which) for index in range(self.size)]).tobytes()

    def _entry(self, worker: int, number: int) -> int:
        return LINE * (1 + self.size * _WORDS) + (worker * ENTRIES + number % ENTRIES) * _ENTRY_NBYTES

    @property
    def _note(self) -> int:
        return LINE * (1 + self.size * _WORDS) + self.size * ENTRIES * _ENTRY_NBYTES

    # ------------------------------------------------------------ words

    def store(self, address: int, count: int) -> None:
        """Store a word that others may wait for."""
        if self.size > 1:
            _shared.store(address, count)

    def is_there(self, addresses: bytes, least: int) -> bool:
        """Tell whether words have a count, without waiting."""
        return self.size == 1 or _shared.wait(addresses, least, self._stop, 0.0, 0.0) == len(addresses) // 8

    def wait(self, addresses: bytes, least: int, doing: str, workers: Sequence[int] | None = None) -> None:
        """Wait until a word of each worker has a count.

        Args:
            addresses: a column with the word of each worker.
            least: the count.
            doing: the call, for messages.
            workers: whose words these are (None: of the first ones, or of all).

        Raises:
            RankDeadError: the one awaited died, or did not come in time; or another error of a call that
                another worker made.
        """
        if self.size == 1:
            return
        stop, count = self._stop, len(addresses) // 8
        done = _shared.wait(addresses, least, stop, _LOOK_S, self._spin_s)
        if done == count:
            return
        deadline = monotonic() + self.group.timeout_s
        while done < count:
            awaited = self._suspect(done if workers is None else workers[done])
            self.check()
            shield.check()
            _shared.store(self._word(self.local_rank, _WAITS_FOR), awaited + 1)
            if not self._memory.is_alive(awaited):
                self._lost(awaited, "died or ended early", doing)
            if monotonic() > deadline:
                self._lost(self._last_awaited(awaited), f"did not respond within {self.group.timeout_s:g} s", doing)
            done = _shared.wait(addresses, least, stop, _LOOK_S, 0.0)
        _shared.store(self._word(self.local_rank, _WAITS_FOR), 0)

    def _suspect(self, awaited: int) -> int:
        """Return who is to be looked at; where this worker's own thread is behind, whom that one waits for."""
        if awaited != self.local_rank:
            return awaited
        return min(self._others, key=lambda worker: _shared.load(self._word(worker, _ENTERED)))

    @property
    def _stop(self) -> int:
        address: int = self._memory.address
        return address

    def _last_awaited(self, worker: int) -> int:
        """Follow who waits for whom to the one who waits for nobody."""
        for _ in range(self.size):
            ahead = _shared.load(self._word(worker, _WAITS_FOR))
            if not ahead or ahead - 1 == self.local_rank:
                break
            worker = ahead - 1
        return worker

    def _lost(self, worker: int, how: str, doing: str) -> None:
        raise self.stop(RankDeadError(lost(doing, self.ranks[worker], how)))

    # ------------------------------------------------------------ faults

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
            error = getattr(errors, kind)(message)
            self.group.publish_error(error)
            self.error = error
        if self.error is not None:
            raise type(self.error)(str(self.error))

    def stop(self, error: TensorKVError) -> TensorKVError:
        """End the store for every worker; return the error to raise, which is the first one's."""
        if self.error is not None:
            return self.error
        if self.size > 1:
            if _shared.load(self._stop):
                try:
                    self.check()
                except TensorKVError as first:
                    return first
            note = json.dumps([type(error).__name__, str(error)[:600]]).encode()
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

    def enter(self, mark: bytes, text: str) -> int:
        """Enter this worker's next call and return its number.

        Args:
            mark: what the entries of all workers must have in common.
            text: what it stands for, as far as there is room.
        """
        number = self.calls
        if self._memory is not None:
            if number >= ENTRIES:
                # Another one may still have to read what is written over.
                self.wait(self._column(_AGREED), number - ENTRIES + 1, text)
            data = text.encode("utf-8", "backslashreplace")[:ENTRY_TEXT]
            at = self._entry(self.local_rank, number)
            self._memory.memory[at : at + _HEAD.size + len(data)] = _HEAD.pack(mark, len(data)) + data
            _shared.store(self._word(self.local_rank, _ENTERED), number + 1)
        self.calls += 1
        return number

    def agree(self, number: int, doing: str) -> list[int]:
        """Wait until every worker has entered a call; return who takes part.

        Raises:
            WorkerMismatchError: they have not entered the same call.
        """
        if self._memory is None:
            return [0]
        if number in self._agreed:
            return self._agreed.pop(number)
        self.wait(self._column(_ENTERED), number + 1, doing)
        marks = [self.read(worker, number)[0] for worker in range(self.size)]
        present = [worker for worker, mark in enumerate(marks) if mark != LEFT]
        if len({marks[worker] for worker in present}) > 1:
            raise self.stop(self._mismatch(number, present, doing))
        _shared.store(self._word(self.local_rank, _AGREED), number + 1)
        return present

    def agree_early(self, number: int, doing: str) -> None:
        """Agree on a call whose ``agree`` comes later: entries are read once, and may be written over then."""
        if self._memory is not None:
            self._agreed[number] = self.agree(number, doing)

    def has_been_entered(self, number: int) -> bool:
        """Tell whether every worker has entered a call."""
        return self._memory is None or self.is_there(self._column(_ENTERED), number + 1)

    def pass_over(self, number: int) -> None:
        """Let others write over an entry that this worker need not compare."""
        if self._memory is not None:
            _shared.store(self._word(self.local_rank, _AGREED), number + 1)

    def read(self, worker: int, number: int) -> tuple[bytes, str]:
        """Return the mark and the text that a worker has entered."""
        at, memory = self._entry(worker, number), self._memory.memory
        mark, length = _HEAD.unpack_from(memory, at)
        return mark, bytes(memory[at + _HEAD.size : at + _HEAD.size + length]).decode(errors="replace")

    def _mismatch(self, number: int, present: Sequence[int], doing: str) -> WorkerMismatchError:
        marks = {worker: self.read(worker, number) for worker in present}
        whole = {}
        if fingerprint(doing) == self.read(self.local_rank, number)[0] and len(doing) > ENTRY_TEXT:
            # An entry had no room for it; whoever made another call finds out as well, and looks for it here.
            self.group.put_text(f"call/{number}/{self.group.rank}", doing)
            whole[self.local_rank] = doing
        said: dict[str, list[int]] = {}
        for worker, (_, text) in marks.items():
            rank = self.ranks[worker]
            if len(text) == ENTRY_TEXT and worker != self.local_rank:
                whole[worker] = self.group.try_get_text(f"call/{number}/{rank}") or text
            said.setdefault(whole.get(worker, text), []).append(rank)
        return mismatch(number, said)

    # ------------------------------------------------------------ together

    def barrier(self, doing: str) -> None:
        """Wait for every worker of this host."""
        self._arrivals += 1
        if self.size > 1:
            _shared.store(self._word(self.local_rank, _ARRIVED), self._arrivals)
            self.wait(self._column(_ARRIVED), self._arrivals, doing)

    def share(self, nbytes: int, words: int, doing: str) -> Segment:
        """Return new memory that all workers of this host see; all of them call this.

        Args:
            nbytes: of the whole.
            words: how many words it begins with.
            doing: the call, for messages.

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
            segment = self._pass_on(segment, nbytes, doing)
        if segment is None:
            raise NoMemoryToShareError(f"{doing}: no {nbytes:,} bytes of memory to share")
        if words:
            segment.set_words(words)
            self._segments.append(segment)
        return segment

    def _pass_on(self, segment: Segment | None, nbytes: int, doing: str) -> Segment | None:
        name = self.broadcast_text("" if segment is None else segment.name, doing)
        if self.local_rank != 0:
            segment = Segment(nbytes, name) if name else None
        # All have opened it now.
        self.barrier(doing)
        if segment is not None:
            segment.close_file()
        return segment

    def broadcast_text(self, text: str, doing: str) -> str:
        """Return the text of this host's first worker; all of them call this."""
        if self.size == 1:
            return text
        self._told += 1
        memory, at, word = self._memory, self._note + _NOTE_NBYTES // 2, self._word(0, _TOLD)
        if self.local_rank == 0:
            data = text.encode()
            memory.memory[at : at + 4 + len(data)] = struct.pack("I", len(data)) + data
            _shared.store(word, self._told)
        else:
            self.wait(word.to_bytes(8, sys.byteorder), self._told, doing)
            (length,) = struct.unpack_from("I", memory.memory, at)
            text = bytes(memory.memory[at + 4 : at + 4 + length]).decode()
        # The text may be written over once all have read it.
        self.barrier(doing)
        return text

    def forget(self, segment: Segment) -> None:
        """Drop a segment that nobody waits in any more."""
        self._segments.remove(segment)

    def close(self) -> None:
        """Let go of the memory; others see that this worker is gone."""
        self._segments.clear()
        if self._memory is not None:
            self._memory.close_file()


def mismatch(number: int, said: dict[str, list[int]]) -> WorkerMismatchError:
    """Return the error that names who said what, and where it differs first."""
    first = _first_difference(said)
    # Other workers are told the beginning of the message.
    most = 100 if first else 300
    parts = [
        f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}: {shorten(text, most)}"
        for text, ranks in said.items()
    ]
    return WorkerMismatchError(
        f"the workers' calls differ at call {number}{first}: {'; '.join(parts)}. "
        "Every worker must make the same calls with the same keys in the same order"
    )


def _first_difference(said: Mapping[str, Sequence[int]]) -> str:
    """Return where two calls of one verb differ first, and what each has there; nothing if that says no more."""
    if len(said) == 1:
        return f" after the first {len(next(iter(said)))} characters"
    (left, left_ranks), (right, right_ranks), *_ = said.items()
    (verb, _, mine), (other_verb, _, theirs) = left.partition(" "), right.partition(" ")
    if verb != other_verb or not mine.startswith("{") or not theirs.startswith("{"):
        return ""
    try:
        calls = json.loads(mine), json.loads(theirs)
        if any("rows" in call for call in calls):
            for call in calls:
                call.setdefault("rows", [False] * len(call["keys"]))
        where, *values = _walk("", *calls)
        # What stands there for each key is told with the key.
        place = re.match(r"(?:values|rows)\[(\d+)\]", where)
        where += f" of {json.dumps(calls[0]['keys'][int(place[1])])}" if place else ""
        found = ["nothing" if value is None else shorten(json.dumps(value), 80) for value in values]
    except ValueError:
        # The ends of long texts are missing.
        pairs = enumerate(zip_longest(left, right))
        at = next(at for at, (one, other) in pairs if one != other)
        where, found = f"character {at}", [text[max(0, at - 40) : at + 40] for text in (left, right)]
    return f", first at {where} (rank {left_ranks[0]}: {found[0]}, rank {right_ranks[0]}: {found[1]})"


def _walk(where: str, left: Any, right: Any) -> tuple[str, Any, Any]:
    """Return the innermost place where two values differ first, and what each has there."""
    inner: Iterable[tuple[str, Any, Any]] = ()
    if isinstance(left, dict) and isinstance(right, dict):
        names = dict.fromkeys([*left, *right])
        inner = ((f"{where}.{name}" if where else name, left.get(name), right.get(name)) for name in names)
    elif isinstance(left, list) and isinstance(right, list):
        inner = ((f"{where}[{at}]", *pair) for at, pair in enumerate(zip_longest(left, right)))
    for place, one, other in inner:
        if one != other:
            return _walk(place, one, other)
    return where, left, right


def shorten(text: str, most: int = 300) -> str:
    """Return a text for a message, without its middle if it is long."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def meet(group: ProcessGroup) -> HostGroup:
    """Return the host of this worker's host; without shared memory every worker is a host of its own."""
    ranks = group.hosts[group.host_index]
    memory: Segment | None = None
    opened = True
    if len(ranks) > 1:
        memory = _open_control(group, ranks)
        opened = memory is not None
    if group.size > 1 and any(len(each) > 1 for each in group.hosts) and not group.agree("opened", opened):
        if group.rank == 0:
            import warnings

            warnings.warn(
                "shared memory does not work between the workers; they meet through Gloo, which is slower", stacklevel=5
            )
        group.split_hosts()
        memory = None
    return HostGroup(group, memory)


def _open_control(group: ProcessGroup, ranks: Sequence[int]) -> Segment | None:
    nbytes = HostGroup.control_nbytes(len(ranks))
    name = f"control/{ranks[0]}"
    try:
        if group.rank == ranks[0]:
            segment = Segment(nbytes)
            group.put_text(name, segment.name)
        else:
            segment = Segment(nbytes, group.get_text(name, ranks[0]))
    except OSError:
        if group.rank == ranks[0]:
            group.put_text(name, "")
        return None
    segment.set_words(1 + len(ranks) * _WORDS)
    # Before the others can count on it: they look for this worker's lock once all have said that they are here.
    segment.mark_alive(ranks.index(group.rank))
    return segment


def describe(verb: str, **what: Any) -> str:
    """Return a call as text that tells all that must be equal for every worker.

    >>> describe("push", keys=["a", "b"])
    'push {"keys": ["a", "b"]}'
    """
    return f"{verb} {json.dumps(what, default=str)}" if what else verb
