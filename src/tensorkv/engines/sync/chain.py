"""Chain: an all-reduce over hosts. Sums go from the first host to the last, values come back.

A worker is connected to the worker with the same local rank on the host before and on the host after. Each host adds
its parts to the sum from the host before, so that the sum over all ranks is made in their order. The last host updates
the values and sends them back. Each connection carries every element once in each direction.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Sequence
from copy import copy
from typing import Any, NamedTuple

import torch

from tensorkv.arrays.packing import flat_bytes

from .desync import mismatch
from .group import ProcessGroup
from .host import LEFT, REFUSED, Collective, HostGroup

_HEAD = struct.Struct("q8si")
_HEADER_NBYTES = 1024
# Bytes of text that a header has room for; ``describe`` makes texts of one byte for each character.
HEADER_TEXT = _HEADER_NBYTES - _HEAD.size
# Messages that may be on their way to a neighbour.
_DEPTH = 8


class Header(NamedTuple):
    """What a host sends ahead of a call.

    Args:
        number: of the call.
        digest: its fingerprint; LEFT: no worker of the sending host or of those before it takes part.
        text: the call, as far as there is room.
    """

    number: int
    digest: bytes
    text: str


class Chain:
    """One worker's connections to the hosts before and after its own.

    Args:
        group: of all workers.
        host: of this worker.
    """

    def __init__(self, group: ProcessGroup, host: HostGroup) -> None:
        self._group = group
        hosts, index, local_rank = group.hosts, group.host_index, host.local_rank
        self._local_rank = local_rank
        # As many workers of each host update values as the smallest host has.
        self.owners = min(map(len, hosts))
        self.is_owner = local_rank < self.owners
        # Whose parts this worker updates; if it updates none, of the empty parts after those of all owners.
        self.owner = local_rank if self.is_owner else self.owners
        self.prev = hosts[index - 1][local_rank] if self.is_owner and index > 0 else None
        self.next = hosts[index + 1][local_rank] if self.is_owner and index + 1 < len(hosts) else None
        self.is_last = index == len(hosts) - 1
        self.hosts_after = len(hosts) - 1 - index
        self.has_neighbours = self.prev is not None or self.next is not None
        # Up to which call the hosts after have staged their parts, as far as is known here.
        self.staged_after = sys.maxsize if self.next is None else -1
        self.sent_nbytes = 0
        self._sending: list[tuple[Any, int, torch.Tensor]] = []
        # Why calls of this worker were refused, by their numbers, until the host before says the same.
        self._refused: dict[int, str] = {}

    def alone(self) -> Chain:
        """Return a chain of this host alone, with the same owners."""
        found = copy(self)
        found.prev = found.next = None
        found.is_last, found.has_neighbours, found.hosts_after = True, False, 0
        found._sending = []
        return found

    # ------------------------------------------------------------ messages

    def isend(self, tensor: torch.Tensor, rank: Any) -> None:
        """Begin to send; the tensor is the chain's until ``flush``, or until some more messages were sent."""
        while len(self._sending) >= _DEPTH + 2 * self.hosts_after:
            self._wait_for_oldest()
        self._sending.append((self._group.isend(tensor, rank), rank, tensor))
        self.sent_nbytes += tensor.nbytes

    def irecv(self, tensor: torch.Tensor, rank: Any) -> Any:
        """Begin to receive; return what ``wait`` takes."""
        return self._group.irecv(tensor, rank)

    def wait(self, work: Any, rank: Any) -> None:
        """Wait for a message that ``irecv`` has asked for."""
        self._group.wait(work, rank)

    def recv(self, tensor: torch.Tensor, rank: Any) -> torch.Tensor:
        """Receive into a tensor, and return it."""
        self.wait(self.irecv(tensor, rank), rank)
        return tensor

    def flush(self) -> None:
        """Wait until everything has been sent."""
        while self._sending:
            self._wait_for_oldest()

    def _wait_for_oldest(self) -> None:
        work, rank, _ = self._sending.pop(0)
        self.wait(work, rank)

    # ------------------------------------------------------------ agreement

    def recv_header(self, calls: Sequence[Collective]) -> Header | None:
        """Return which of some calls the host before makes next; None on the first host.

        Args:
            calls: that this worker has entered, the oldest first.

        Raises:
            WorkerMismatchError: it makes another call.
        """
        if self.prev is None:
            return None
        entered = {call.number: call for call in calls}
        while True:
            theirs = self._recv_header(self.prev)
            if theirs.number in self._refused and theirs.digest in (REFUSED, LEFT):
                # Refused there and here, and so it was no call.
                text = self._refused.pop(theirs.number)
                if theirs.digest == LEFT:
                    self._send_header(self.prev, Header(theirs.number, REFUSED, text))
                continue
            mine = entered.get(theirs.number)
            if mine is None or (mine.digest != LEFT and theirs.digest not in (mine.digest, LEFT)):
                text = self._refused.get(theirs.number, (mine or calls[0]).text)
                said = {theirs.text: [self.prev]}
                said.setdefault(text[:HEADER_TEXT], []).append(self._group.rank)
                raise mismatch(theirs.number, said)
            return theirs

    def forward(self, call: Collective, header: Header | None) -> None:
        """Tell the hosts after this one which call comes next.

        Where no worker takes part up to here, the call becomes what the hosts after answer: theirs, or LEFT.

        Args:
            call: on which this host has agreed.
            header: what ``recv_header`` returned.
        """
        call.sum_comes = header is not None and header.digest != LEFT
        said = header if call.digest == LEFT and header is not None else Header(call.number, call.digest, call.text)
        self._send_header(self.next, said)
        if said.digest == LEFT and self.next is not None:
            said = self._recv_header(self.next)
        if header is not None and header.digest == LEFT:
            self._send_header(self.prev, said)
        if call.digest == LEFT:
            call.become(said.digest, said.text)

    def refuse(self, call: Collective) -> None:
        """Tell the host after that a call was refused; all earlier pushes have been sent."""
        if self.prev is not None:
            self._refused[call.number] = call.text
        self._send_header(self.next, Header(call.number, REFUSED, call.text))

    def _send_header(self, rank: int | None, header: Header) -> None:
        if rank is None:
            return
        data = header.text.encode("utf-8", "backslashreplace")[:HEADER_TEXT]
        packed = torch.zeros(_HEADER_NBYTES, dtype=torch.uint8, device="cpu")
        _HEAD.pack_into(packed.numpy().data, 0, header.number, header.digest, len(data))
        packed[_HEAD.size : _HEAD.size + len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self.isend(packed, rank)

    def _recv_header(self, rank: int) -> Header:
        packed = self.recv(torch.empty(_HEADER_NBYTES, dtype=torch.uint8, device="cpu"), rank)
        number, digest, length = _HEAD.unpack_from(packed.numpy().data)
        text = bytes(packed[_HEAD.size : _HEAD.size + length].numpy()).decode(errors="replace")
        return Header(number, digest, text)

    def ack(self) -> None:
        """Return when every host has made the same call."""
        token = torch.zeros(1, dtype=torch.uint8, device="cpu")
        if self.next is not None:
            self.recv(token, self.next)
        if self.prev is not None:
            self.isend(token, self.prev)
        self.flush()

    def report_progress(self, staged: int) -> None:
        """Tell the host before up to which call parts are staged, here and on the hosts after."""
        if self.next is not None:
            theirs = self.recv(torch.empty(1, dtype=torch.int64, device="cpu"), self.next)
            staged = self.staged_after = min(staged, int(theirs))
        if self.prev is not None:
            self.isend(torch.tensor([staged], dtype=torch.int64, device="cpu"), self.prev)
        self.flush()

    def broadcast(self, tensors: Sequence[torch.Tensor], *, from_last: bool = False) -> None:
        """Copy contiguous tensors of the first (or last) host's first worker to the first workers of the others."""
        if self._local_rank != 0:
            return
        source, target = (self.next, self.prev) if from_last else (self.prev, self.next)
        for tensor in tensors:
            flat = flat_bytes(tensor)
            if source is not None and flat.numel():
                self.recv(flat, source)
            if target is not None and flat.numel():
                self.isend(flat, target)
        self.flush()
