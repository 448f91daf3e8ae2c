"""A server as its clients see it: an actor, or the spare one that has taken its place.

A killed actor answers again after the seconds in which Ray starts a process and imports torch. A spare one has done
that, and waits: whichever of the two has the folder open serves, and the other one is the spare from then on. It takes
over when a client that does not reach the server asks for it, and only if nobody holds the folder's lock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from tensorkv.runtime import shield

# How often a wait for Ray checks whether its caller was interrupted.
_CHECK_S = 0.1
# How long to wait before actors of which neither serves are asked again.
_PAUSE_S = 0.01
_STOP_S = 5.0


class ServerHandle:
    """One server of a store; for several threads.

    Args:
        actor: the server's.
        find_spare: given the stamp of the server's folder, returns the actor of its spare, None if that is not there.
    """

    def __init__(self, actor: Any, find_spare: Callable[[str], Any] | None = None) -> None:
        self._actors, self._find_spare = [actor], find_spare
        self._stamp: str | None = None
        self.actor = actor
        """The one that serves, as far as is known."""

    @property
    def has_spare(self) -> bool:
        """Whether another actor may serve instead."""
        return self._find_spare is not None

    def place(self, timeout_s: float) -> list[Any]:
        """Return the place of the actor that serves, and continue with it.

        Args:
            timeout_s: how long to wait for one.

        Raises:
            RayError: of the server, if its spare fails, too, or is not there.
            GetTimeoutError: neither serves in time.
        """
        deadline = time.monotonic() + timeout_s
        asked: dict[int, Any] = {}
        failed: dict[int, RayError] = {}
        while True:
            actors = self._both()
            asked |= {number: actor.place.remote() for number, actor in enumerate(actors) if number not in asked}
            left = deadline - time.monotonic()
            done, _ = ray.wait(list(asked.values()), timeout=max(0.001, min(_CHECK_S, left)))
            shield.check()
            for number in [number for number, ref in asked.items() if ref in done]:
                try:
                    place: list[Any] = ray.get(asked.pop(number))
                except RayError as error:
                    failed[number] = error
                    continue
                failed.pop(number, None)
                self._stamp = place[4]
                if place[-1] is not None:
                    self.actor = actors[number]
                    return place
            if len(failed) == len(actors):
                raise failed[0]
            if left <= 0:
                raise GetTimeoutError(f"no server answers after {timeout_s:g} s")
            if done:
                time.sleep(_PAUSE_S)

    def stop(self) -> None:
        """End the server and its spare, so that Ray restarts neither."""
        for other in self._both():
            # The spare first, which would take over otherwise.
            if other is not self.actor:
                ray.kill(other)
        with suppress(RayError):
            ray.get(self.actor.stop.remote(), timeout=_STOP_S)
        ray.kill(self.actor)

    def _both(self) -> Sequence[Any]:
        if len(self._actors) == 1 and self._find_spare is not None and self._stamp is not None:
            spare = self._find_spare(self._stamp)
            if spare is not None:
                self._actors = [*self._actors, spare]
        return self._actors


def get(ref: Any, timeout_s: float) -> Any:
    """Wait for Ray's reply, checking now and then whether the caller was interrupted."""
    deadline = time.monotonic() + timeout_s
    if timeout_s > _CHECK_S:
        with suppress(GetTimeoutError):
            return ray.get(ref, timeout=_CHECK_S)
        # A get that is too early begins again with fetching a large reply from another host; a wait goes on.
        while not ray.wait([ref], timeout=_CHECK_S)[0]:
            shield.check()
            if time.monotonic() >= deadline:
                break
    return ray.get(ref, timeout=max(0.001, deadline - time.monotonic()))
