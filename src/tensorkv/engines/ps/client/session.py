"""Lane: one client as servers know it, which sends one request at a time, to several servers at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from tensorkv.errors import StoreClosedError

from .rpc import Answer, Link

Fill = Callable[[torch.Tensor], Any]


class Letter(NamedTuple):
    """What is sent to one server.

    Args:
        server: which.
        words: of the head.
        layout: of the payload; for a pull, the keys.
        nbytes: of the payload.
        fill: lays it out in the memory it is given.
        reply_nbytes: of the values that come back.
    """

    server: int
    words: dict[str, Any]
    layout: bytes = b"[]"
    nbytes: int = 0
    fill: Fill | None = None
    reply_nbytes: int = 0


class Lane:
    """A client of its own number.

    Args:
        owner: the process, as servers know it.
        number: of the lane.
        links: to every server.
        rank: of the worker (None: it is none).
    """

    def __init__(self, owner: str, number: int, links: Sequence[Link], rank: int | None) -> None:
        self._head = {"owner": owner, "client": f"{owner}.{number}", "rank": rank}
        self._links = links
        self._seq = 0
        self.is_clear = True
        """Whether every request has been answered."""

    def send(
        self, verb: str, letters: Sequence[Letter], *, timeout_s: float | None = None, again: bool = False
    ) -> list[Answer]:
        """Send a letter to each of some servers and return what they answer, in order.

        Args:
            verb: of the request.
            letters: at most one for each server.
            timeout_s: how long to wait for answers (None: as long as each link does).
            again: whether this is the last request once more, for servers that have not applied it.

        Raises:
            As ``Link.finish``, after every server has answered.
        """
        answers = []
        for outcome in self.outcomes(verb, letters, timeout_s=timeout_s, again=again):
            if isinstance(outcome, Exception):
                raise outcome
            answers.append(outcome)
        return answers

    def outcomes(
        self, verb: str, letters: Sequence[Letter], *, timeout_s: float | None = None, again: bool = False
    ) -> list[Answer | Exception]:
        """Send a letter to each of some servers and return what each answers, or how it failed, in order."""
        self._seq += not again
        fan = [letter.server for letter in letters]
        self.is_clear = False
        for letter in letters:
            link = self._links[letter.server]
            room = link.room(verb, letter.nbytes, letter.reply_nbytes, len(letter.layout))
            if letter.fill is not None:
                letter.fill(room)
            all_servers = {"fan": fan} if len(fan) > 1 else {}
            head = {"verb": verb, **self._head, "seq": self._seq, **all_servers, **letter.words}
            link.begin(head, letter.layout, timeout_s=timeout_s)
        found: list[Answer | Exception] = []
        for letter in letters:
            try:
                found.append(self._links[letter.server].finish())
            except Exception as error:
                found.append(error)
        self.is_clear = True
        return found

    def is_whole(self, server: int, answer: Answer) -> bool:
        """Tell whether an answer's payload, which was read, was not written over meanwhile."""
        return self._links[server].is_whole(answer)

    @property
    def resent(self) -> int:
        """How many requests were sent again."""
        return sum(link.resent for link in self._links)

    @property
    def rung(self) -> int:
        """How many requests were sent without Ray."""
        return sum(link.rung for link in self._links)

    def close(self) -> None:
        """Let go of shared memory."""
        for link in self._links:
            link.close()


class Lanes:
    """As many lanes as threads that call at the same time.

    Args:
        make: a lane of a number.
    """

    def __init__(self, make: Callable[[int], Lane]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._closed = False
        self._free: list[Lane] = []
        self._all: list[Lane] = []

    @contextmanager
    def take(self) -> Iterator[Lane]:
        """Give a lane that nobody uses.

        Raises:
            StoreClosedError: there are no more.
        """
        with self._lock:
            if self._closed:
                raise StoreClosedError("this store was closed; create another")
            if not self._free:
                # Numbers are not used twice: a server remembers what it has had from each.
                self._free.append(self._make(len(self._all)))
                self._all.append(self._free[-1])
            lane = self._free.pop()
        try:
            yield lane
        finally:
            with self._lock:
                # One that was interrupted may have a request under way.
                if lane.is_clear and not self._closed:
                    self._free.append(lane)
                else:
                    lane.close()

    @property
    def resent(self) -> int:
        """How many requests were sent again."""
        return sum(lane.resent for lane in self._all)

    @property
    def rung(self) -> int:
        """How many requests were sent without Ray."""
        return sum(lane.rung for lane in self._all)

    def clear(self) -> None:
        """Let go of the lanes that nobody uses; the next one is a new client."""
        with self._lock:
            for lane in self._free:
                lane.close()
            self._free.clear()

    def close(self) -> None:
        """Give no more lanes; those in use go when they are brought back."""
        with self._lock:
            self._closed = True
        self.clear()
