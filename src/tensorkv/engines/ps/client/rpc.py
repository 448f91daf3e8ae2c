"""One request to one server, sent again until it is answered, and applied once however often it was sent.

Ray's own retries are off: they would run a request again whose reply was lost. Here each request has an id, and a
server answers a request that it has applied without applying it again.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from ray.exceptions import ActorDiedError, GetTimeoutError, ObjectLostError, RayActorError, RayError

from tensorkv import errors
from tensorkv.engines.ps.ray.actor import INLINE_NBYTES, why
from tensorkv.engines.ps.server.wait import POLL_TIMEOUT_S
from tensorkv.errors import PushOutcomeUnknownError, ServerDeadError, TensorKVError, WaitTimeoutError
from tensorkv.runtime import shield
from tensorkv.transport.channel import SharedMemoryChannel
from tensorkv.transport.shared_cache import SharedCacheReader

from ..messages import bytes_of, join, split

# How long to wait for a reply before the request is sent again.
_RESEND_S = 10.0
# How often a wait checks whether its caller was interrupted.
_CHECK_S = 0.1
# How long to wait before a server that is being restarted is asked again.
_RESTART_PAUSE_S = 0.01
# Verbs that are called often enough to go through the doorbell, and the bytes that their heads take.
_DOORBELL_VERBS = frozenset({"push", "pull", "pull_rows"})
_HEAD_NBYTES = 1024


class ServerReply(NamedTuple):
    """A server's reply; the payload is to be read before the connection's next request."""

    head: dict[str, Any]
    payload: torch.Tensor
    cached: list[Any] | None = None


# Other outcomes of sending a request; after each of them it is sent again.


@dataclass(frozen=True, slots=True)
class _NoReply:
    """The server may have applied the request, or may never have received it."""

    how: str


@dataclass(frozen=True, slots=True)
class _StillWaiting:
    """The server has received the request, and waits for others to answer it."""

    reason: str


class _NoChannel:
    """The server cannot open the channel: it runs on another host."""


class _NoCache:
    """The copy that the server has named cannot be opened."""


class _NoDoorbell:
    """The reply does not fit through the doorbell."""


_Retry = _NoReply | _StillWaiting | _NoChannel | _NoCache | _NoDoorbell


@dataclass(slots=True)
class _Call:
    """The request that a connection is sending.

    Args:
        head, layout: of the request.
        deadline: after which it is not sent again.
        timeout_s: from the first attempt to the deadline.
        uses_doorbell: whether its next attempt goes through the doorbell.
        ref: of Ray's reply to the last attempt (None: it went through the doorbell).
        attempts: how often it was sent.
        is_pending: whether the last attempt has no outcome yet.
        is_uncertain: whether an attempt had no reply.
        waits_for: the reason that the server gave last for not answering.
    """

    head: dict[str, Any]
    layout: bytes
    deadline: float
    timeout_s: float
    uses_doorbell: bool
    ref: Any = None
    attempts: int = 0
    is_pending: bool = False
    is_uncertain: bool = False
    waits_for: str | None = None

    @property
    def is_overdue(self) -> bool:
        return time.monotonic() >= self.deadline


class ServerConnection:
    """The connection of one session to one server; it has one request at a time.

    Args:
        actor: the server's handle.
        index: of the server, for messages.
        shares_memory: whether the server may be on this host.
        timeout_s: how long to try.
    """

    def __init__(self, actor: Any, index: int, *, shares_memory: bool, timeout_s: float) -> None:
        self._actor, self._index = actor, index
        self._timeout_s = timeout_s
        self._shares_memory = shares_memory
        self._channel = SharedMemoryChannel()
        self._cache = SharedCacheReader()
        # The payload of the present request, and whether it lies in the channel.
        self._payload = _no_bytes()
        self._in_channel = False
        self._call: _Call
        self.resent = 0
        """How many requests were sent again."""
        self.shm_requests = 0
        """How many requests went through the doorbell."""

    def allocate(self, verb: str, payload_nbytes: int, reply_nbytes: int, layout_nbytes: int) -> torch.Tensor:
        """Return memory for the next request's payload."""
        is_worth_it = verb in _DOORBELL_VERBS or max(payload_nbytes, reply_nbytes) > INLINE_NBYTES
        self._in_channel = self._shares_memory and is_worth_it
        if self._in_channel:
            try:
                self._payload = self._channel.allocate(payload_nbytes, reply_nbytes, layout_nbytes + _HEAD_NBYTES)
                return self._payload
            except OSError:
                self._in_channel = self._shares_memory = False
                self._channel.close()
        if len(self._payload) != payload_nbytes:
            self._payload = torch.empty(payload_nbytes, dtype=torch.uint8, device="cpu")
        return self._payload

    def start(self, head: dict[str, Any], layout: bytes, *, timeout_s: float | None = None) -> None:
        """Send a request whose payload is in the memory that ``allocate`` returned."""
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + timeout_s
        self._call = _Call(head, layout, deadline, timeout_s, head["verb"] in _DOORBELL_VERBS)
        self._send(self._call)

    def finish(self) -> ServerReply:
        """Wait for the reply.

        Raises:
            TensorKVError: the server's refusal of the request.
            WaitTimeoutError: the server waits for other workers; the message names them.
            PushOutcomeUnknownError: no reply came in time.
            ServerDeadError: the server has ended for good.
        """
        call = self._call
        try:
            while not isinstance(outcome := self._receive(call), ServerReply):
                self._prepare_retry(call, outcome)
                self._send(call)
            return outcome
        except BaseException:
            if call.is_pending or call.is_uncertain or call.waits_for is not None:
                # The server may still use this memory, or hold the push until other workers push.
                self._channel.close()
                self._payload = _no_bytes()
            raise

    def is_intact(self, reply: ServerReply) -> bool:
        """Return whether the payload that was read has not been written over in the meantime."""
        return reply.cached is None or self._cache.is_intact(reply.cached)

    def close(self) -> None:
        """Release shared memory."""
        self._channel.close()
        self._channel, self._cache = SharedMemoryChannel(), SharedCacheReader()
        self._payload = _no_bytes()

    # ------------------------------------------------------------ one attempt

    def _send(self, call: _Call) -> None:
        call.attempts += 1
        if not ray.is_initialized():
            # Without this check Ray would start a cluster of its own.
            raise ServerDeadError(f"server {self._index}: Ray has been shut down in this process")
        head = call.head
        left = call.deadline - time.monotonic()
        if left < 2 * POLL_TIMEOUT_S:
            # The reply that says what the server waits for has to arrive before the deadline.
            head = {**head, "poll_timeout_s": max(0.0, left / 2)}
        call.is_pending, call.ref = True, None
        if self._in_channel and call.uses_doorbell and self._channel.notify(join(head, call.layout)):
            self.shm_requests += 1
            return
        if self._in_channel:
            call.ref = self._actor.serve.remote(join({**head, "channel": self._channel.describe()}, call.layout))
        elif len(self._payload) <= INLINE_NBYTES:
            call.ref = self._actor.serve.remote(join(head, call.layout, self._payload.numpy().data))
        else:
            call.ref = self._actor.serve.remote(join(head, call.layout), self._payload.numpy())

    def _receive(self, call: _Call) -> ServerReply | _Retry:
        """Wait for the outcome of the last attempt."""
        timeout_s = max(0.001, min(call.deadline - time.monotonic(), _RESEND_S))
        try:
            received = self._channel.wait(timeout_s) if call.ref is None else _get(call.ref, timeout_s)
        except (GetTimeoutError, TimeoutError):
            call.is_pending = False
            return _NoReply("has not answered")
        except ActorDiedError as error:
            raise ServerDeadError(
                f"server {self._index} has ended for good: {why(error)}; what was not saved is lost"
            ) from error
        except (RayActorError, ObjectLostError, ConnectionError):
            time.sleep(_RESTART_PAUSE_S)
            call.is_pending = False
            return _NoReply("was not reachable")
        except RayError as error:
            raise ServerDeadError(f"server {self._index}: {why(error)}") from error
        call.is_pending = False
        return self._decode(received)

    def _decode(self, received: Any) -> ServerReply | _Retry:
        """Return the outcome that a server's message tells.

        Raises:
            TensorKVError: the server's refusal of the request.
        """
        if received == b"":
            return _NoDoorbell()
        message, beside = (received, None) if isinstance(received, bytes) else received
        head, _, inline = split(message)
        match head:
            case {"no_channel": _}:
                return _NoChannel()
            case {"error": error}:
                raise errors.decode(error)
            case {"wait_for": reason}:
                return _StillWaiting(reason)
            case {"cached": place}:
                try:
                    return ServerReply(head, self._cache.find(place), place)
                except OSError:
                    return _NoCache()
            case {"in_channel": nbytes}:
                return ServerReply(head, self._channel.reply[:nbytes])
        return ServerReply(head, bytes_of(inline if beside is None else np.asarray(beside)))

    # ------------------------------------------------------------ after a failed attempt

    def _prepare_retry(self, call: _Call, outcome: _Retry) -> None:
        """Change what has to change before the request is sent again; raise if its time is over."""
        match outcome:
            case _NoReply(how):
                self.resent += 1
                call.is_uncertain = True
                if call.is_overdue:
                    raise self._timeout(call, how)
                self._replace_channel()
            case _StillWaiting(reason):
                call.waits_for = reason
                if call.is_overdue:
                    raise self._timeout(call, "")
            case _NoChannel():
                self._leave_channel(self._channel.payload)
                self._channel.close()
            case _NoCache():
                call.head = {name: each for name, each in call.head.items() if name != "cached_nbytes"}
            case _NoDoorbell():
                call.uses_doorbell = False

    def _replace_channel(self) -> None:
        """Move the payload to memory that no earlier attempt uses."""
        if not self._in_channel:
            return
        payload = self._channel.payload
        try:
            self._channel.replace()
            self._payload = self._channel.payload
        except OSError:
            self._leave_channel(payload)

    def _leave_channel(self, payload: torch.Tensor) -> None:
        """Send payloads with the messages from now on."""
        self._payload, self._in_channel, self._shares_memory = payload.clone(), False, False

    def _timeout(self, call: _Call, how: str) -> TensorKVError:
        """Return the error of a call that is overdue."""
        verb, seconds = call.head["verb"], f"{call.timeout_s:g} s"
        if call.waits_for is not None:
            return WaitTimeoutError(f"{verb} timed out after {seconds} waiting for {call.waits_for}")
        return PushOutcomeUnknownError(
            f"{verb}: server {self._index} {how} for {seconds} (attempts: {call.attempts}): the request was applied "
            "once, or not at all; look at the key's version, or load a checkpoint"
        )


def _get(ref: Any, timeout_s: float) -> Any:
    """Wait for Ray's reply, checking now and then whether the caller was interrupted."""
    deadline = time.monotonic() + timeout_s
    while (left := deadline - time.monotonic()) > _CHECK_S:
        with suppress(GetTimeoutError):
            return ray.get(ref, timeout=_CHECK_S)
        shield.check()
    return ray.get(ref, timeout=max(0.001, left))


def _no_bytes() -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device="cpu")
