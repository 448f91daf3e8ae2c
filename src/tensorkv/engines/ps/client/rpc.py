"""Link: one request to one server, sent until it is answered, applied once however often it was sent.

Ray's own retries are off: it would run a request again whose reply was lost. Here each request has a number, and a
server answers one that it has applied without applying it again.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from ray.exceptions import ActorDiedError, GetTimeoutError, ObjectLostError, RayActorError, RayError

from tensorkv import errors
from tensorkv.engines.ps.ray.actor import INLINE_NBYTES, why
from tensorkv.engines.ps.server.state import bytes_of
from tensorkv.engines.ps.server.wait import PATIENCE_S
from tensorkv.errors import PushOutcomeUnknownError, ServerLostError, TensorKVError, WaitTimeoutError
from tensorkv.runtime import shield
from tensorkv.transport.mailbox import Mailbox
from tensorkv.transport.shared_cache import CopyReader
from tensorkv.transport.wire import join, split

# How long to wait for an answer before the request is sent again.
_RESEND_S = 10.0
# How often a wait looks whether its caller was interrupted.
_LOOK_S = 0.1
# How long to wait before a server is asked again that is being restarted.
_PAUSE_S = 0.01
# What is asked often enough to be asked without Ray, and what its head takes, in bytes.
_RINGS = frozenset({"push", "pull", "pull_rows"})
_HEAD_NBYTES = 1024


class Answer(NamedTuple):
    """A server's answer; the payload is to be read before the link's next request."""

    head: dict[str, Any]
    payload: torch.Tensor
    copy: list[Any] | None = None


class Link:
    """The way from one client to one server.

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
        self._box = Mailbox()
        self._copies = CopyReader()
        self._room = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._head: dict[str, Any] = {}
        self._layout = b""
        self._ref: Any = None
        self._is_asked = self._has_rung = self._rings = self._boxed = False
        self._deadline = 0.0
        self._sent = 0
        self._unsure = False
        self._waits: str | None = None
        self.resent = self.rung = 0

    def room(self, verb: str, payload_nbytes: int, reply_nbytes: int, layout_nbytes: int) -> torch.Tensor:
        """Return memory for the next request's payload."""
        self._boxed = self._shares_memory and (verb in _RINGS or max(payload_nbytes, reply_nbytes) > INLINE_NBYTES)
        if self._boxed:
            try:
                self._room = self._box.take_room(payload_nbytes, reply_nbytes, layout_nbytes + _HEAD_NBYTES)
                return self._room
            except OSError:
                self._boxed = self._shares_memory = False
                self._box.give_up()
        if len(self._room) != payload_nbytes:
            self._room = torch.empty(payload_nbytes, dtype=torch.uint8, device="cpu")
        return self._room

    def begin(self, head: dict[str, Any], layout: bytes, *, timeout_s: float | None = None) -> None:
        """Send a request whose payload is in ``room``."""
        self._head, self._layout = head, layout
        self._deadline = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        self._sent, self._unsure, self._waits, self._rings = 0, False, None, head["verb"] in _RINGS
        self._send()

    def finish(self) -> Answer:
        """Wait for the answer.

        Raises:
            TensorKVError: what the server has refused the request with.
            WaitTimeoutError: others have not come in time; the message names them.
            PushOutcomeUnknownError: no answer came in time.
            ServerLostError: the server is gone for good.
        """
        try:
            while True:
                answer = self._receive()
                if answer is not None:
                    return answer
                self._send()
        except BaseException:
            if self._unsure or self._is_asked or self._waits is not None:
                # The server may still be reading or writing there, or keep a push for when the others come.
                self._box.give_up()
                self._room = torch.empty(0, dtype=torch.uint8, device="cpu")
            raise

    def is_whole(self, answer: Answer) -> bool:
        """Tell whether the payload, which was read, has not been written over meanwhile."""
        return answer.copy is None or self._copies.is_whole(answer.copy)

    def close(self) -> None:
        """Let go of shared memory."""
        self._box.give_up()
        self._box, self._copies = Mailbox(), CopyReader()
        self._room = torch.empty(0, dtype=torch.uint8, device="cpu")

    # ------------------------------------------------------------ inside

    def _send(self) -> None:
        self._sent += 1
        if not ray.is_initialized():
            # Else Ray would start another cluster, all by itself.
            raise ServerLostError(f"server {self._index}: Ray has been shut down in this process")
        head, box = self._head, self._box.describe() if self._boxed else None
        left = self._deadline - time.monotonic()
        if left < 2 * PATIENCE_S:
            # An answer that names who is waited for has to come in time.
            head = {**head, "patience_s": max(0.0, left / 2)}
        self._is_asked = True
        self._has_rung = self._boxed and self._rings and self._box.ring(join(head, self._layout))
        if self._has_rung:
            self.rung += 1
            return
        if box is not None:
            self._ref = self._actor.serve.remote(join({**head, "box": box}, self._layout))
        elif len(self._room) <= INLINE_NBYTES:
            self._ref = self._actor.serve.remote(join(head, self._layout, self._room.numpy().data))
        else:
            self._ref = self._actor.serve.remote(join(head, self._layout), self._room.numpy())

    def _receive(self) -> Answer | None:
        """Return the answer; None if the request is to be sent again."""
        timeout_s = max(0.001, min(self._deadline - time.monotonic(), _RESEND_S))
        try:
            found = self._box.hear(timeout_s) if self._has_rung else self._get(timeout_s)
            self._is_asked = False
        except (GetTimeoutError, TimeoutError):
            self._again("has not answered")
            return None
        except ActorDiedError as error:
            raise ServerLostError(
                f"server {self._index} has ended for good: {why(error)}; what was not saved is lost"
            ) from error
        except (RayActorError, ObjectLostError, ConnectionError):
            time.sleep(_PAUSE_S)
            self._again("is not there")
            return None
        except RayError as error:
            raise ServerLostError(f"server {self._index}: {why(error)}") from error
        if found == b"":
            self._rings = False
            return None
        return self._open(found)

    def _get(self, timeout_s: float) -> Any:
        """Wait for Ray's answer, looking now and then whether the caller still wants it."""
        deadline = time.monotonic() + timeout_s
        while (left := deadline - time.monotonic()) > _LOOK_S:
            with suppress(GetTimeoutError):
                return ray.get(self._ref, timeout=_LOOK_S)
            shield.check()
        return ray.get(self._ref, timeout=max(0.001, left))

    def _again(self, how: str) -> None:
        self._is_asked = False
        self.resent += 1
        self._unsure = True
        if time.monotonic() >= self._deadline:
            if self._waits is not None:
                raise self._in_vain()
            seconds = f"{self._timeout_s:g} s"
            raise PushOutcomeUnknownError(
                f"{self._head['verb']}: server {self._index} {how} for {seconds}, though asked {self._sent} times: the "
                "request was applied once, or not at all; look at the key's version, or load a checkpoint"
            )
        if self._boxed:
            self._move()

    def _move(self) -> None:
        payload = self._box.payload
        try:
            self._box.move()
            self._room = self._box.payload
        except OSError:
            # No memory to share: the payload travels with the message.
            self._room, self._boxed, self._shares_memory = payload.clone(), False, False

    def _in_vain(self) -> WaitTimeoutError:
        return WaitTimeoutError(f"{self._head['verb']}: waited in vain for {self._waits}")

    def _open(self, found: Any) -> Answer | None:
        message, beside = (found, None) if isinstance(found, bytes) else found
        head, _, inline = split(message)
        if "unboxed" in head:
            # Not of this host after all: from now on the payload travels with the message.
            self._room, self._boxed, self._shares_memory = self._box.payload.clone(), False, False
            self._box.give_up()
            return None
        if "error" in head:
            name, text = head["error"]
            kind = getattr(errors, name, None)
            known = isinstance(kind, type) and issubclass(kind, TensorKVError)
            raise (kind if known else TensorKVError)(text)  # type: ignore[misc]
        if "wait_for" in head:
            self._waits = head["wait_for"]
            if time.monotonic() >= self._deadline:
                raise self._in_vain()
            return None
        if "copy" in head:
            try:
                return Answer(head, self._copies.find(head["copy"]), head["copy"])
            except OSError:
                self._head = {word: each for word, each in self._head.items() if word != "shares"}
                return None
        if "boxed" in head:
            return Answer(head, self._box.reply[: head["boxed"]])
        return Answer(head, bytes_of(inline if beside is None else np.asarray(beside)))
