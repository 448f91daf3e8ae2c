"""ServerActor: a Server as Ray runs it, and the memory that it shares with clients of its host."""

from __future__ import annotations

import gc
import json
import logging
import os
import threading
import time
from dataclasses import asdict
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import OutOfMemoryError

from tensorkv.engines.ps.server.membership import FORGOTTEN_S
from tensorkv.engines.ps.server.server import Server
from tensorkv.transport.mailbox import OpenMailboxes
from tensorkv.transport.rendezvous import host_id
from tensorkv.transport.shared_cache import Copies
from tensorkv.transport.wire import Reply, Request, Settings, join, split

from .metrics import ServerMetrics

# Up to here a payload travels inside of its message, and Ray puts it into no object store.
INLINE_NBYTES = 64 << 10

_WATCH_S = 1.0
_ENDING_S = 10.0

_logger = logging.getLogger(__name__)


class ServerActor:
    """One parameter server.

    Args:
        settings: of a ``Server``, as JSON: nothing that a restart would have to fetch from somewhere.
    """

    _is_broken = False

    def __init__(self, settings: str) -> None:
        context = ray.get_runtime_context()
        self._server = Server(Settings(**json.loads(settings)), comes_back=context.was_current_actor_reconstructed)
        self._mailboxes = OpenMailboxes(self._answer_ring)
        self._copies = Copies()
        self._copying = threading.Lock()
        name = context.get_actor_name() or ""
        self._metrics = ServerMetrics(name.rpartition("/")[0], self._server.settings.index)
        # What the libraries have made stays; Python is not to look for garbage in it again and again.
        gc.collect()
        gc.freeze()
        threading.Thread(target=self._keep_watch, daemon=True).start()

    def serve(self, message: bytes, payload: Any = None) -> Any:
        """Answer a message, whose payload is in it, beside it, or in the client's mailbox."""
        head, layout, inline = split(message)
        out = None
        box = head.get("box")
        if payload is None:
            payload = inline
        if box is not None:
            try:
                sent, out = self._mailboxes.find(str(head["client"]), box)
            except (OSError, TypeError, ValueError) as error:
                return join({"unboxed": str(error)})
            payload = sent.numpy() if len(sent) else payload
        if head.get("broken"):
            self._is_broken = True
        if head["verb"] in ("beat", "bye"):
            self._mailboxes.close_all_but(self._server.owners())
        return self._answer(Request(head, layout, payload), out)

    def _answer_ring(self, message: bytes, payload: torch.Tensor, room: torch.Tensor) -> bytes:
        """Answer what lies in a mailbox; without bytes if that takes Ray."""
        head, layout, _ = split(message)
        answer = self._answer(Request(head, layout, payload.numpy()), room)
        return answer if isinstance(answer, bytes) else b""

    def _answer(self, request: Request, out: torch.Tensor | None) -> Any:
        if request.head.get("shares"):
            shared = self._share(request)
            if shared is not None:
                return join(shared)
        return _answer(self._server.serve(request, out), out)

    def place(self) -> list[Any]:
        """Return what tells where this server is: its host, process, and whether it trusts strangers."""
        from ray._raylet import get_authentication_mode  # type: ignore[attr-defined]

        return [host_id(), os.getpid(), int(get_authentication_mode()), ray.get_runtime_context().get_node_id()]

    def settings(self) -> dict[str, Any]:
        """Return what this server was told when it began."""
        return asdict(self._server.settings)

    def stop(self) -> None:
        """Let go of the folder, before the process is killed."""
        self._server.close()

    def _keep_watch(self) -> None:
        """Tell Ray's metrics how things are; end when all clients are long gone, since nobody else would do it.

        If another server of the store is lost, there is nothing to stay for once they are gone.
        """
        alone_since = time.monotonic()
        # The last client ends the servers, if it is not killed before.
        while time.monotonic() - alone_since < (_ENDING_S if self._server.is_ending else FORGOTTEN_S):
            time.sleep(_WATCH_S)
            self._metrics.tell(self._server.stats())
            if self._server.owners():
                alone_since = time.monotonic()
            elif self._is_broken:
                break
        self._server.close()
        # Ray starts an actor again whose process ends in any other way.
        ray.kill(ray.get_runtime_context().current_actor)

    def _share(self, request: Request) -> dict[str, Any] | None:
        """Return where a copy of the values is that all clients of this host read, or a refusal."""
        waiting = Request({**request.head, "verb": "await"}, request.layout)
        reply = self._server.serve(waiting)
        if reply.head:
            return reply.head
        nbytes = int(request.head["shares"])
        with self._copying:
            signature = self._server.signature(request)
            if signature is None:
                return None
            place = self._copies.find(request.layout, signature)
            if place is None:
                replies: list[Reply] = []
                try:
                    place = self._copies.make(
                        request.layout,
                        signature,
                        nbytes,
                        lambda room: replies.append(self._server.serve(request, room)),
                    )
                except OSError as error:
                    _logger.warning("no memory for a copy that readers share: %s", error)
                    return None
                payload = replies[0].payload
                if replies[0].head or payload is None or len(payload) != nbytes:
                    # There is no such copy: the client is to see for itself.
                    self._copies.forget(request.layout)
                    return None
        return {"copy": place}


def _answer(reply: Reply, out: torch.Tensor | None) -> Any:
    payload = reply.payload
    if payload is None or not len(payload):
        return join(reply.head)
    if out is not None and payload.data_ptr() == out.data_ptr():
        return join({**reply.head, "boxed": len(payload)})
    if len(payload) <= INLINE_NBYTES:
        return join(reply.head, payload=payload.numpy().data)
    return [join(reply.head), np.asarray(payload.numpy())]


def why(error: BaseException) -> str:
    """Return in one line what an error of Ray says, which has forty in its messages."""
    text = str(error)
    if "running low on memory" in text or isinstance(error, OutOfMemoryError):
        return (
            "Ray's memory monitor has killed its process, since the machine was short of memory; give it fewer or "
            "smaller values, more hosts, or more memory"
        )
    # Of a traceback, the line of the error itself; the others say where it was.
    lines = [line.strip() for line in text.splitlines() if "Error: " in line]
    return lines[-1].partition("Error: ")[2] if lines else text.strip().partition("\n")[0]
