"""Bell: how a client asks a server of its host without Ray, through the mailbox that both have mapped.

A mailbox begins with three words (see ``_shared.c``) and a sheet that says where things lie. The client
writes a request, stores the first word and waits for the second; a thread of the server waits for the first, answers
and stores the second. Ray is asked before the first ring and whenever nobody answers a ring, so that it alone decides
which server is there.
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from tensorkv.runtime import shield
from tensorkv.shard.pool import default_threads

from .segment import LINE, Segment, aligned

try:
    from tensorkv.runtime import _shared
except ImportError:
    _shared = None  # type: ignore[assignment]

_ASKED, _ANSWERED, _ENDED, _SHEET, _ANSWER = (line * LINE for line in range(5))
# Where the answer begins, how long it is. What is longer is asked for again, through Ray.
_ANSWER_NBYTES = 4096
HEAD_NBYTES = _ANSWER + _ANSWER_NBYTES
"""What a mailbox begins with; requests and payloads lie behind."""

_SIZE = struct.Struct("Q")
# How often a wait looks whether the other one lives.
_LOOK_S = 0.05
_IDLE_S = 1.0
# Long enough for a small request, where there are cores for both.
_SPIN_S = 50e-6 if default_threads() > 2 else 0.0
# The byte of a mailbox that its server holds a lock on.
_SERVER = 0


class Sheet(NamedTuple):
    """Where a request and the room for its reply lie in a mailbox, in bytes."""

    message_at: int
    message_nbytes: int
    payload_at: int
    payload_nbytes: int
    reply_at: int
    reply_nbytes: int


_PLACES = struct.Struct("6Q")
Answer = Callable[[bytes, torch.Tensor, torch.Tensor], bytes]


class Bell:
    """The client's side.

    Args:
        segment: the mailbox.
    """

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._asked = 1
        self._answered = _SIZE.pack(segment.address + _ANSWERED)

    @property
    def is_attended(self) -> bool:
        """Whether a server's thread waits for rings."""
        return _shared is not None and _shared.load(self._segment.address + _ANSWERED) > 0

    def ring(self, message: bytes, sheet: Sheet) -> None:
        """Ask what lies in the mailbox."""
        memory, at = self._segment.memory, sheet.message_at
        memory[at : at + len(message)] = message
        _PLACES.pack_into(memory, _SHEET, *sheet)
        self._asked += 1
        _shared.store(self._segment.address + _ASKED, self._asked)

    def hear(self, timeout_s: float) -> bytes:
        """Wait for the answer; one without bytes is to be asked for through Ray.

        Raises:
            TimeoutError: none came in time.
            ConnectionError: the server's process has ended.
        """
        deadline, ended, left = time.monotonic() + timeout_s, self._segment.address + _ENDED, timeout_s
        while not _shared.wait(self._answered, self._asked, ended, min(_LOOK_S, left), _SPIN_S):
            shield.check()
            if not self._segment.is_alive(_SERVER):
                raise ConnectionError
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
        (nbytes,) = _SIZE.unpack_from(self._segment.memory, _ANSWER)
        return bytes(self._segment.memory[_ANSWER + _SIZE.size : _ANSWER + _SIZE.size + nbytes])

    def end(self) -> None:
        """Let the server's thread end."""
        if _shared is not None:
            _shared.store(self._segment.address + _ENDED, 1)
            _shared.wake(self._segment.address + _ASKED)


class Attendant:
    """The server's side: a thread that answers the rings of one mailbox.

    Args:
        segment: the mailbox.
        answer: given message, payload and room for a reply.
        is_wanted: asked now and then whether to go on.
        forget: called at the end.

    Raises:
        RuntimeError: the system gives no thread; the mailbox is attended by nobody.
    """

    def __init__(
        self, segment: Segment, answer: Answer, is_wanted: Callable[[], bool], forget: Callable[[], None]
    ) -> None:
        self._segment, self._answer, self._is_wanted, self._forget = segment, answer, is_wanted, forget
        # The kernel takes this lock away when the process ends, which the client sees.
        segment.mark_alive(_SERVER)
        threading.Thread(target=self._attend, name="tensorkv-bell", daemon=True).start()
        # The client rings from now on.
        _shared.store(segment.address + _ANSWERED, 1)

    def _attend(self) -> None:
        segment, answered = self._segment, 1
        asked, ended = _SIZE.pack(segment.address + _ASKED), segment.address + _ENDED
        while not _shared.load(ended):
            if _shared.wait(asked, answered + 1, ended, _IDLE_S, 0.0):
                answered += 1
                self._write(self._reply())
                _shared.store(segment.address + _ANSWERED, answered)
            elif not self._is_wanted():
                break
        segment.close_file()
        self._forget()

    def _reply(self) -> bytes:
        sheet = Sheet._make(_PLACES.unpack_from(self._segment.memory, _SHEET))
        pieces = (sheet[0:2], sheet[2:4], sheet[4:6])
        if any(at < HEAD_NBYTES or at + nbytes > self._segment.nbytes for at, nbytes in pieces):
            return b""
        message, payload, room = (self._segment.tensor(at, (nbytes,), torch.uint8) for at, nbytes in pieces)
        try:
            return self._answer(bytes(message.numpy().data), payload, room)
        except Exception:
            # Ray tells the client of it when it asks again.
            return b""

    def _write(self, reply: bytes) -> None:
        if _SIZE.size + len(reply) > _ANSWER_NBYTES:
            reply = b""
        _SIZE.pack_into(self._segment.memory, _ANSWER, len(reply))
        self._segment.memory[_ANSWER + _SIZE.size : _ANSWER + _SIZE.size + len(reply)] = reply


def was_attended(segment: Segment) -> bool:
    """Tell whether a server has answered rings in a mailbox; another would answer the last ones again."""
    return _shared.load(segment.address + _ANSWERED) > 0


def layout(message_nbytes: int, payload_nbytes: int, reply_nbytes: int) -> tuple[Sheet, int]:
    """Return where things of these sizes lie in a mailbox, and how long it has to be."""
    payload_at = HEAD_NBYTES + aligned(message_nbytes)
    reply_at = payload_at + aligned(payload_nbytes)
    sheet = Sheet(HEAD_NBYTES, message_nbytes, payload_at, payload_nbytes, reply_at, reply_nbytes)
    return sheet, reply_at + aligned(reply_nbytes)
