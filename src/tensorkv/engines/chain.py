"""Chain: how hosts exchange what their workers own. Sums go from the first host to the last, values come back.

A worker is linked to the worker with the same place on the host before and on the host after. Each host adds its
parts to what the one before has sent, so that the sum over all ranks is made in their order. The last host
updates the values and sends them back. Each link carries every element once in each direction.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import TensorKVError
from .group import Group
from .meeting import REFUSED, Meeting, fingerprint, mismatch, shorten

_HEAD = struct.Struct("q8si")
_HEAD_NBYTES = 1024
# Messages that may be on their way to a neighbour.
DEPTH = 8


class Chain:
    """One worker's links to the hosts before and after its own.

    Args:
        group: of all workers.
        meeting: of this worker's host.
    """

    def __init__(self, group: Group, meeting: Meeting) -> None:
        self._group, self._meeting = group, meeting
        self.owners = min(map(len, group.hosts))
        me, host = meeting.me, group.host
        linked = me < self.owners
        self.before = group.hosts[host - 1][me] if linked and host > 0 else None
        self.after = group.hosts[host + 1][me] if linked and host + 1 < len(group.hosts) else None
        self.is_last = host == len(group.hosts) - 1
        self.hosts_after = len(group.hosts) - 1 - host
        self.sent_nbytes = 0
        self._sending: list[tuple[Any, int, torch.Tensor]] = []
        self._refused: set[int] = set()

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
            raise self._meeting.stop(error) from error

    def flush(self, doing: str) -> None:
        """Wait until everything that was sent has left."""
        while self._sending:
            self._finish_oldest(doing)

    def _finish_oldest(self, doing: str) -> None:
        work, rank, _ = self._sending.pop(0)
        self.finish(work, rank, doing)

    # ------------------------------------------------------------ agreement

    def greet(self, number: int, text: str) -> None:
        """Compare a call with the host before, and tell the host after.

        Raises:
            WorkerMismatchError: the host before has made another call.
        """
        if self.before is None and self.after is None:
            return
        theirs, mark = -1, fingerprint(text)
        while self.before is not None and theirs != number:
            theirs, other, said = self._hear(text)
            if other == REFUSED and theirs in self._refused:
                # Both have refused that call, and it was none.
                continue
            if (theirs, other) != (number, mark):
                own = "refused a call" if theirs in self._refused else text
                ranks = {shorten(said): [self.before], shorten(own): [self._group.rank]}
                raise self._meeting.stop(mismatch(number, ranks))
        self._say(number, mark, text)

    def refuse(self, number: int, text: str) -> None:
        """Tell the host after that this worker's call was refused; all that was pushed before has gone."""
        self._refused.add(number)
        self._say(number, REFUSED, text)

    def _say(self, number: int, mark: bytes, text: str) -> None:
        if self.after is None:
            return
        data = text.encode("utf-8", "backslashreplace")[: _HEAD_NBYTES - _HEAD.size]
        head = torch.zeros(_HEAD_NBYTES, dtype=torch.uint8)
        _HEAD.pack_into(head.numpy().data, 0, number, mark, len(data))
        head[_HEAD.size : _HEAD.size + len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self.send(head, self.after, text)

    def _hear(self, doing: str) -> tuple[int, bytes, str]:
        head = torch.empty(_HEAD_NBYTES, dtype=torch.uint8)
        self.finish(self.receive(head, self.before), self.before, doing)
        number, mark, length = _HEAD.unpack_from(head.numpy().data)
        return number, mark, bytes(head[_HEAD.size : _HEAD.size + length].numpy()).decode(errors="replace")

    def agree(self, number: int, text: str) -> None:
        """Return when every host has made the same call."""
        if self._meeting.me != 0 or len(self._group.hosts) == 1:
            return
        self.greet(number, text)
        answer = torch.zeros(1, dtype=torch.uint8)
        if self.after is not None:
            self.finish(self.receive(answer, self.after), self.after, text)
        if self.before is not None:
            self.send(answer, self.before, text)
        self.flush(text)

    def spread(self, tensors: Sequence[torch.Tensor], doing: str) -> None:
        """Copy contiguous tensors of the first host's first worker to the first workers of the others."""
        if self._meeting.me != 0:
            return
        for tensor in tensors:
            flat = tensor.view(-1).view(torch.uint8)
            if self.before is not None and flat.numel():
                self.finish(self.receive(flat, self.before), self.before, doing)
            if self.after is not None and flat.numel():
                self.send(flat, self.after, doing)
        self.flush(doing)
