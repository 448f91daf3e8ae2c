"""One request to one server, sent again until it is answered, and applied once however often it was sent.

Ray's own retries are off: they would run a request again whose reply was lost. Here each request has an id, and a
server answers a request that it has applied without applying it again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from ray.exceptions import ActorDiedError, GetTimeoutError, ObjectLostError, RayActorError, RayError

from tensorkv import errors
from tensorkv.arrays.packing import bytes_of
from tensorkv.engines.ps.ray.actor import INLINE_NBYTES, why
from tensorkv.engines.ps.ray.handle import ServerHandle, get
from tensorkv.engines.ps.server.wait import POLL_TIMEOUT_S
from tensorkv.engines.transport import channel, network
from tensorkv.engines.transport.channel import Buffers, Connection
from tensorkv.engines.transport.rendezvous import host_id
from tensorkv.engines.transport.segment import can_share
from tensorkv.engines.transport.shared_values import OpenValues, ValuesInPlace
from tensorkv.errors import PushOutcomeUnknownError, ServerDeadError, TensorKVError, WaitTimeoutError

from ..messages import CALLS, join, split

# How long to wait for a reply before the request is sent again.
_RESEND_S = 10.0
# A request is not sent again when less than this is left.
_SHORTEST_S = 0.1
# How long a connection to another host may take, and how often it may fail though Ray reaches the server.
_CONNECT_S = 2.0
_MOST_FAILURES = 2
# How long to wait before a server that is being restarted is asked again.
_RESTART_PAUSE_S = 0.01


class ServerReply(NamedTuple):
    """A server's reply; the payload is to be read before the connection's next request."""

    head: dict[str, Any]
    payload: torch.Tensor


# Other outcomes of sending a request; after each of them it is sent again.


@dataclass(frozen=True, slots=True)
class _NoReply:
    """The server may have applied the request, or may never have received it."""

    how: str


@dataclass(frozen=True, slots=True)
class _StillWaiting:
    """The server has received the request, and waits for others to answer it."""

    reason: str
    has_applied: bool


class _NotServed:
    """The server cannot open the client's memory; the request goes through Ray instead."""


class _IsSpare:
    """Another actor serves."""


_Retry = _NoReply | _StillWaiting | _NotServed | _IsSpare


@dataclass(slots=True)
class _Call:
    """The request that a connection is sending.

    Args:
        head, layout: of the request.
        deadline: after which it is not sent again.
        timeout_s: from the first attempt to the deadline.
        attempt_deadline: after which the last attempt is given up.
        ref: of Ray's reply to the last attempt (None: it went over the connection).
        attempts: how often it was sent.
        failure: why the first attempt could not be sent.
        is_pending: whether the last attempt has no outcome yet.
        is_uncertain: whether an attempt had no reply.
        waits_for: the reason that the server gave last for not answering; None if an attempt since had no reply, and
            the request may have been applied.
        has_applied: whether the server has said that it has applied the request, though it waits.
    """

    head: dict[str, Any]
    layout: bytes
    deadline: float
    timeout_s: float
    attempt_deadline: float = 0.0
    ref: Any = None
    attempts: int = 0
    failure: _Retry | TensorKVError | None = None
    is_pending: bool = False
    is_uncertain: bool = False
    waits_for: str | None = None
    has_applied: bool = False

    @property
    def is_overdue(self) -> bool:
        return time.monotonic() >= self.deadline


class ServerConnection:
    """The connection of one session to one server; it has one request at a time.

    Args:
        server: to which.
        index: of the server, for messages.
        host: of the server when the store was opened, for messages.
        address: where the server listens, on this host or for others (None: every request goes through Ray).
        timeout_s: how long to try.
    """

    def __init__(
        self, server: ServerHandle, index: int, *, host: str, address: Sequence[Any] | None, timeout_s: float
    ) -> None:
        self._server, self._index, self._name = server, index, f"server {index} (on host {host})"
        self._timeout_s = timeout_s
        self._address = address
        self._connection: Connection | None = None
        self._buffers = _buffers_for(address)
        self._reply_nbytes = 0
        self._failures = 0
        self._open = OpenValues()
        # The payload of the present request, and whether it lies in the buffers.
        self._payload = _no_bytes()
        self._in_buffers = False
        self._call: _Call
        self.resent = 0
        """How many requests were sent again."""
        self.socket_requests = 0
        """How many requests went over the connection instead of through Ray."""

    def allocate(self, payload_nbytes: int, reply_nbytes: int) -> torch.Tensor:
        """Return memory for the next request's payload."""
        self._in_buffers = self._address is not None and max(payload_nbytes, reply_nbytes) > INLINE_NBYTES
        self._reply_nbytes = reply_nbytes
        if self._in_buffers:
            try:
                self._payload = self._buffers.allocate(payload_nbytes, reply_nbytes)
                return self._payload
            except OSError:
                self._use_ray()
        if len(self._payload) != payload_nbytes:
            self._payload = torch.empty(payload_nbytes, dtype=torch.uint8, device="cpu")
        return self._payload

    def start(self, head: dict[str, Any], layout: bytes, *, timeout_s: float | None = None) -> None:
        """Send a request whose payload is in the memory that ``allocate`` returned."""
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        call = self._call = _Call(head, layout, time.monotonic() + timeout_s, timeout_s)
        try:
            call.failure = self._try(call, self._send)
        except TensorKVError as error:
            call.failure = error

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
            if isinstance(call.failure, TensorKVError):
                raise call.failure
            outcome = call.failure or self._try(call, self._receive)
            while not isinstance(outcome, ServerReply):
                self._prepare_retry(call, outcome)
                outcome = self._try(call, self._send) or self._try(call, self._receive)
            return outcome
        except BaseException:
            if call.is_pending or call.is_uncertain or call.waits_for is not None:
                # The server may still use this memory, or hold the push until other workers push.
                self._disconnect()
                self._buffers.close()
                self._payload = _no_bytes()
            raise

    def values_in_place(self, reply: ServerReply) -> ValuesInPlace:
        """Return the values of a reply that says where they are.

        Raises:
            OSError: they cannot be read from here.
        """
        segments = reply.head["in_place"]
        if segments is None:
            raise OSError("the server has no memory that it can share")
        return self._open.find(segments, reply.payload.numpy().view(np.int64).reshape(2, -1))

    def close(self) -> None:
        """Release the connection and shared memory."""
        self._disconnect()
        self._buffers.close()
        self._open, self._payload = OpenValues(), _no_bytes()

    # ------------------------------------------------------------ one attempt

    def _try(self, call: _Call, step: Callable[[_Call], Any]) -> Any:
        """Make a step of an attempt; return its result, or why the request has to be sent again."""
        try:
            return step(call)
        except (GetTimeoutError, TimeoutError):
            how = "has not answered"
        except ActorDiedError as error:
            raise ServerDeadError(
                f"{self._name} has ended for good: {why(error)}; its values are lost. Close the store everywhere, "
                "create it again, and load a checkpoint"
            ) from error
        except (RayActorError, ObjectLostError, OSError):
            time.sleep(_RESTART_PAUSE_S)
            how = "was not reachable"
        except RayError as error:
            raise ServerDeadError(f"{self._name}: {why(error)}") from error
        call.is_pending = False
        return _NoReply(how)

    def _send(self, call: _Call) -> None:
        call.attempts += 1
        if not ray.is_initialized():
            # Without this check Ray would start a cluster of its own.
            raise ServerDeadError(f"{self._name}: Ray has been shut down in this process")
        head, now = call.head, time.monotonic()
        left = call.deadline - now
        call.attempt_deadline = now + max(0.001, min(left, _RESEND_S))
        if left < 2 * POLL_TIMEOUT_S:
            # The reply that says what the server waits for has to arrive before the deadline.
            head = {**head, "poll_timeout_s": max(0.0, left / 2)}
        call.is_pending, call.ref = True, None
        connection = self._connect(call)
        if connection is not None:
            if self._in_buffers:
                message = join({**head, "buffers": self._buffers.describe()}, call.layout)
            else:
                message = join(head, call.layout, self._payload.numpy().data)
            connection.send(message, call.attempt_deadline)
            if self._in_buffers:
                # A large payload may take longer than an attempt, as long as it moves.
                self._buffers.send(connection, call.deadline)
                call.attempt_deadline = min(call.deadline, time.monotonic() + _RESEND_S)
            self.socket_requests += 1
        elif len(self._payload) <= INLINE_NBYTES:
            call.ref = self._server.actor.serve.remote(join(head, call.layout, self._payload.numpy().data))
        else:
            call.ref = self._server.actor.serve.remote(join(head, call.layout), self._payload.numpy())

    def _connect(self, call: _Call) -> Connection | None:
        """Return the connection, a new one if need be; None: the request goes through Ray."""
        while self._connection is None and self._address is not None:
            far = is_far(self._address)
            until = min(call.attempt_deadline, time.monotonic() + _CONNECT_S) if far else call.attempt_deadline
            try:
                self._connection = (network if far else channel).connect(self._address, until)
                self._failures = 0
            except OSError as error:
                if not far and isinstance(error, TimeoutError | BlockingIOError):
                    # It is there, and slow: too many connections wait for it.
                    raise
                # Ray knows where a server listens that has been restarted, and may get through where this does not.
                address = address_for_here(self._server.place(call.attempt_deadline - time.monotonic()))
                self._failures += 1
                if address != self._address:
                    self._move(address)
                elif not far or self._failures > _MOST_FAILURES:
                    # Something is between that lets Ray through, and not this.
                    self._address = None
                else:
                    time.sleep(_RESTART_PAUSE_S)
        return self._connection

    def _move(self, address: Sequence[Any] | None) -> None:
        """Continue with a server that listens elsewhere now, perhaps on another host."""
        if address is not None and is_far(address) != is_far(self._address):
            self._buffers.close()
            self._buffers = _buffers_for(address)
            if self._in_buffers:
                payload = self._payload
                self._payload = self._buffers.allocate(len(payload), self._reply_nbytes).copy_(payload)
        self._address = address

    def _receive(self, call: _Call) -> ServerReply | _Retry:
        """Wait for the outcome of the last attempt."""
        if self._connection is None or call.ref is not None:
            received = get(call.ref, call.attempt_deadline - time.monotonic())
        else:
            received = self._connection.receive(call.attempt_deadline)
        call.is_pending = False
        return self._decode(received, call)

    def _decode(self, received: Any, call: _Call) -> ServerReply | _Retry:
        """Return the outcome that a server's message tells.

        Raises:
            TensorKVError: the server's refusal of the request.
        """
        if received == b"":
            return _NotServed()
        message, beside = (received, None) if isinstance(received, bytes | bytearray) else received
        head, _, inline = split(message)
        match head:
            case {"error": error}:
                raise errors.decode(error)
            case {"wait_for": reason}:
                return _StillWaiting(reason, bool(head.get("applied")))
            case {"spare": True}:
                return _IsSpare()
            case {"in_buffers": nbytes}:
                if self._connection is None:
                    raise ConnectionResetError("the connection was given up")
                # What is left of a payload is in the way of the next reply.
                call.is_pending = True
                payload = self._buffers.receive(self._connection, nbytes, call.deadline)
                call.is_pending = False
                return ServerReply(head, payload)
        return ServerReply(head, bytes_of(inline if beside is None else np.asarray(beside)))

    # ------------------------------------------------------------ after a failed attempt

    def _prepare_retry(self, call: _Call, outcome: _Retry) -> None:
        """Change what has to change before the request is sent again; raise if its time is over."""
        match outcome:
            case _NoReply(how):
                self.resent += 1
                call.is_uncertain = True
                if not call.has_applied:
                    call.waits_for = None
                if call.is_overdue:
                    raise self._timeout(call, how)
                self._replace_buffers()
                if self._address is None and self._server.has_spare:
                    self._try(call, self._find_serving)
            case _IsSpare():
                self._try(call, self._find_serving)
                if call.is_overdue:
                    raise self._timeout(call, "was not there")
            case _StillWaiting(reason, has_applied):
                call.waits_for, call.has_applied = reason, call.has_applied or has_applied
                # The reply to a shorter attempt might come too late, and what the server has said be lost.
                if call.is_overdue or call.deadline - time.monotonic() < _SHORTEST_S:
                    raise self._timeout(call, "")
            case _NotServed():
                self._use_ray()

    def _find_serving(self, call: _Call) -> None:
        """Continue with the actor that serves, wherever it is."""
        self._disconnect()
        place = self._server.place(max(0.001, min(_RESEND_S, call.deadline - time.monotonic())))
        if self._address is not None:
            self._move(address_for_here(place))

    def _replace_buffers(self) -> None:
        """Use a connection and memory that no earlier attempt uses."""
        self._disconnect()
        if self._in_buffers:
            try:
                self._payload = self._buffers.replace(self._payload)
            except OSError:
                self._use_ray()

    def _use_ray(self) -> None:
        """Send every request through Ray from now on, as to a server of another host."""
        self._disconnect()
        self._buffers.close()
        self._address, self._in_buffers = None, False

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _timeout(self, call: _Call, how: str) -> TensorKVError:
        """Return the error of a call that is overdue."""
        sent, seconds = call.head["verb"], f"{call.timeout_s:g} s"
        verb = CALLS.get(sent, sent)
        if call.waits_for is not None:
            then = "; this push has been applied" if call.has_applied else ""
            error = WaitTimeoutError(f"{verb} timed out after {seconds} waiting for {call.waits_for}{then}")
            error.applied = call.has_applied
            return error
        return PushOutcomeUnknownError(
            f"{verb}: {self._name} {how} for {seconds} (attempts: {call.attempts}): the request was applied "
            "once, or not at all; look at the key's version, or load a checkpoint"
        )


def address_for_here(place: Sequence[Any]) -> Sequence[Any] | None:
    """Return where a server listens for this process, of what its actor says of its place (None: nowhere)."""
    host, *_, (near, far) = place
    address: Sequence[Any] | None = near if can_share() and host == host_id() and near is not None else far
    return address


def _buffers_for(address: Sequence[Any] | None) -> Buffers:
    return network.StreamBuffers() if is_far(address) else channel.SharedBuffers()


def is_far(address: Sequence[Any] | None) -> bool:
    """Return whether an address is one for clients of other hosts: with a host, a port and a key."""
    return address is not None and len(address) == 3


def _no_bytes() -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device="cpu")
