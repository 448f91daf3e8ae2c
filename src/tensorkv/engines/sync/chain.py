"""Chain: how hosts exchange what their workers own. Sums go from the first host to the last, values come back.

A worker is linked to the worker with the same place on the host before and on the host after. Each host adds its
parts to what the one before has sent, so that the sum over all ranks is made in their order. The last host
updates the values and sends them back. Each link carries every element once in each direction.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from tensorkv.errors import TensorKVError

from .group import ProcessGroup
from .host import LEFT, REFUSED, HostGroup, mismatch

_HEAD = struct.Struct("q8si")
_HEAD_NBYTES = 1024
# What a head has room for, in bytes; ``describe`` gives one for each character.
HEAD_TEXT = _HEAD_NBYTES - _HEAD.size
# Messages that may be on their way to a neighbour.
DEPTH = 8


class Head(NamedTuple):
    """What goes ahead of a call from host to host.

    Args:
        number: of the call.
        mark: its fingerprint; LEFT: nobody takes part on the host that says so, nor on those before it.
        text: the call, as far as there is room.
    """

    number: int
    mark: bytes
    text: str


class Called(NamedTuple):
    """What all hosts call.

    Args:
        mark: its fingerprint; LEFT: every worker has left.
        text: the call, as far as there is room in a head.
        parts_come: whether the host before sends a sum.
    """

    mark: bytes
    text: str
    parts_come: bool


class Presence(NamedTuple):
    """Who takes part in a push, as far as a worker has to know.

    Args:
        here: workers of its host.
        parts_come: whether the host before sends a sum of parts.
    """

    here: list[int]
    parts_come: bool


class Chain:
    """One worker's links to the hosts before and after its own.

    Args:
        group: of all workers.
        host: of this worker's host.
    """

    def __init__(self, group: ProcessGroup, host: HostGroup) -> None:
        self._group, self._host = group, host
        self.owners = min(map(len, group.hosts))
        me, index = host.local_rank, group.host_index
        linked = me < self.owners
        self.before = group.hosts[index - 1][me] if linked and index > 0 else None
        self.after = group.hosts[index + 1][me] if linked and index + 1 < len(group.hosts) else None
        self.is_last = index == len(group.hosts) - 1
        self.hosts_after = len(group.hosts) - 1 - index
        self.linked = self.before is not None or self.after is not None
        # Up to which call the hosts after have laid their parts out, as far as is known here.
        self.reach = sys.maxsize if self.after is None else -1
        self.sent_nbytes = 0
        self._sending: list[tuple[Any, int, torch.Tensor]] = []
        # Why calls of this worker were refused, by their numbers.
        self._refused: dict[int, str] = {}

    # ------------------------------------------------------------ messages

    def send(self, tensor: torch.Tensor, rank: Any, doing: str) -> None:
        """Begin to send; the tensor is the chain's until ``flush``, or until some more messages were sent."""
        while len(self._sending) >= DEPTH + 2 * self.hosts_after:
            self._finish_oldest(doing)
        self._sending.append((self._group.send(tensor, rank), rank, tensor))
        self.sent_nbytes += tensor.nbytes

    def receive(self, tensor: torch.Tensor, rank: Any) -> Any:
        """Begin to receive; ``finish`` waits."""
        return self._group.receive(tensor, rank)

    def finish(self, work: Any, rank: Any, doing: str) -> None:
        """Wait for what ``receive`` began."""
        try:
            self._group.finish(work, rank, doing)
        except TensorKVError as error:
            raise self._host.stop(error) from error

    def flush(self, doing: str) -> None:
        """Wait until everything that was sent has left."""
        while self._sending:
            self._finish_oldest(doing)

    def _finish_oldest(self, doing: str) -> None:
        work, rank, _ = self._sending.pop(0)
        self.finish(work, rank, doing)

    # ------------------------------------------------------------ agreement

    def greet(self, number: int, mark: bytes, text: str) -> Called:
        """Compare a call with the hosts before and after; return what is called.

        Args:
            number: of the call.
            mark: its fingerprint, or LEFT where nobody of this host takes part.
            text: what the mark stands for.

        Raises:
            WorkerMismatchError: a host has made another call.
        """
        _, before = self.hear({number: (mark, text)})
        return self.go_on(number, mark, text, before)

    def hear(self, calls: Mapping[int, tuple[bytes, str]]) -> tuple[int, Head | None]:
        """Return which of some calls the host before makes next, and what it says.

        Args:
            calls: mark and text of each call that this worker has entered, by number, the oldest first.
        """
        number = next(iter(calls))
        if self.before is None:
            return number, None
        while True:
            theirs = self._read(self.before, calls[number][1])
            if theirs.number in self._refused and theirs.mark in (REFUSED, LEFT):
                # Refused there and here, and so it was no call.
                if theirs.mark == LEFT:
                    self._say(self.before, Head(theirs.number, REFUSED, self._refused[theirs.number]))
                continue
            mark, text = calls.get(theirs.number, calls[number])
            if theirs.number not in calls or (mark != LEFT and theirs.mark not in (mark, LEFT)):
                own = self._refused.get(theirs.number, text)
                said = {theirs.text: [self.before]}
                said.setdefault(own[:HEAD_TEXT], []).append(self._group.rank)
                raise self._host.stop(mismatch(theirs.number, said))
            return theirs.number, theirs

    def go_on(self, number: int, mark: bytes, text: str, before: Head | None) -> Called:
        """Tell the hosts after this one what ``hear`` has heard; return what is called.

        Where nobody takes part up to here, the hosts after say what they call.
        """
        parts_come = before is not None and before.mark != LEFT
        head = before if mark == LEFT and before is not None else Head(number, mark, text)
        self._say(self.after, head)
        if head.mark == LEFT and self.after is not None:
            head = self._read(self.after, text)
        if before is not None and before.mark == LEFT:
            self._say(self.before, head)
        return Called(head.mark, head.text, parts_come)

    def refuse(self, number: int, text: str) -> None:
        """Tell the host after that this worker's call was refused; all that was pushed before has gone."""
        self._refused[number] = text
        self._say(self.after, Head(number, REFUSED, text))

    def _say(self, rank: int | None, said: Head) -> None:
        if rank is None:
            return
        data = said.text.encode("utf-8", "backslashreplace")[:HEAD_TEXT]
        head = torch.zeros(_HEAD_NBYTES, dtype=torch.uint8, device="cpu")
        _HEAD.pack_into(head.numpy().data, 0, said.number, said.mark, len(data))
        head[_HEAD.size : _HEAD.size + len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self.send(head, rank, said.text)

    def _read(self, rank: int, doing: str) -> Head:
        head = torch.empty(_HEAD_NBYTES, dtype=torch.uint8, device="cpu")
        self.finish(self.receive(head, rank), rank, doing)
        number, mark, length = _HEAD.unpack_from(head.numpy().data)
        return Head(number, mark, bytes(head[_HEAD.size : _HEAD.size + length].numpy()).decode(errors="replace"))

    def answer(self, text: str) -> None:
        """Return when every host has made the same call."""
        answer = torch.zeros(1, dtype=torch.uint8, device="cpu")
        if self.after is not None:
            self.finish(self.receive(answer, self.after), self.after, text)
        if self.before is not None:
            self.send(answer, self.before, text)
        self.flush(text)

    def report(self, reach: int, doing: str) -> None:
        """Tell the host before up to which call parts are laid out, here and on the hosts after."""
        if self.after is not None:
            theirs = torch.empty(1, dtype=torch.int64, device="cpu")
            self.finish(self.receive(theirs, self.after), self.after, doing)
            reach = self.reach = min(reach, int(theirs))
        if self.before is not None:
            self.send(torch.tensor([reach], dtype=torch.int64, device="cpu"), self.before, doing)
        self.flush(doing)

    def spread(self, tensors: Sequence[torch.Tensor], doing: str) -> None:
        """Copy contiguous tensors of the first host's first worker to the first workers of the others."""
        if self._host.local_rank != 0:
            return
        for tensor in tensors:
            flat = tensor.view(-1).view(torch.uint8)
            if self.before is not None and flat.numel():
                self.finish(self.receive(flat, self.before), self.before, doing)
            if self.after is not None and flat.numel():
                self.send(flat, self.after, doing)
        self.flush(doing)
