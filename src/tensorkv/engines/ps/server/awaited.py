"""What answers for a server that was restarted where its folder is not, until the folder is there again.

Ray restarts a server of a lost host on another one. There the path may lead to no folder, to an empty one, or to what
another store has left: a server that began with that would serve values that nobody has acknowledged.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

from tensorkv import errors
from tensorkv.errors import ServerDeadError, StorageError
from tensorkv.storage.lock import read_stamp

from ..messages import Reply

# How long a request is held before it is to be sent again.
_PAUSE_S = 0.5


class AwaitedServer:
    """Has every request sent again, so that it is answered when the folder is there, and knows which clients wait.

    Args:
        why: what clients wait for.
        timeout_s: after how many seconds without a heartbeat a client waits no longer.
    """

    is_ending = is_superseded = False

    def __init__(self, why: str, timeout_s: float) -> None:
        self._why, self._timeout_s = why, timeout_s
        self._seen: dict[str, float] = {}
        self._is_over = threading.Event()
        self.is_broken = False
        """Whether a client has given the store up, so that nobody but the others needs this server."""

    def serve(self, head: Mapping[str, Any], *_: Any, **__: Any) -> Reply:
        """Return that a request has to be sent again, after a moment; refuse those that are not to wait."""
        owner, verb = str(head.get("owner")), head.get("verb")
        if verb in ("disconnect", "stats"):
            if verb == "disconnect":
                self._seen.pop(owner, None)
                self.is_broken = True
            return Reply({"error": errors.encode(ServerDeadError(self._why))})
        self._seen[owner] = time.monotonic()
        poll_timeout_s = head.get("poll_timeout_s")
        self._is_over.wait(min(_PAUSE_S, poll_timeout_s) if isinstance(poll_timeout_s, float) else _PAUSE_S)
        return Reply({"wait_for": self._why})

    def end(self) -> None:
        """Hold requests no longer: the folder is there."""
        self._is_over.set()

    def owners(self) -> list[str]:
        """Return the clients that wait."""
        since = time.monotonic() - self._timeout_s
        return [owner for owner, at in list(self._seen.items()) if at > since]

    def mark_dead(self, owner: str) -> None:
        """Count a client as one that waits no longer, since its process has ended."""
        self._seen.pop(owner, None)

    def close(self) -> None:
        """Do nothing: no folder is open."""


class SpareServer:
    """Answers while another actor has the folder open and serves: clients are to look for that one."""

    is_ending = is_broken = is_superseded = False

    def serve(self, head: Mapping[str, Any], *_: Any, **__: Any) -> Reply:
        """Return that another actor serves."""
        return Reply({"spare": True})

    def owners(self) -> list[str]:
        """Return no clients."""
        return []

    def mark_dead(self, owner: str) -> None:
        """Do nothing: it has no clients."""

    def close(self) -> None:
        """Do nothing: no folder is open."""


def why_not_the_folder(folder: str, stamp: str, index: int, home: str) -> str | None:
    """Return why a server that is restarted must not open a folder; None: it is the one that it had.

    Args:
        folder: of the server.
        stamp: that the folder got when the store was created.
        index: of the server, for the text.
        home: the host on which it was started, "" if that is not known.
    """
    if read_stamp(folder) == stamp:
        return None
    try:
        what = "is that of another store" if os.listdir(folder) else "is empty"
    except FileNotFoundError:
        what = "is not there"
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
    here, there = socket.gethostname(), f" on host {home}" if home else ""
    return (
        f"server {index}: it was restarted on host {here}, where its folder {folder} {what}; its values are in the "
        f"folder that it had{there}. It serves as soon as that folder is here (its host is back, or it is mounted). To "
        "begin with what is here, close the store everywhere and create it again"
    )


def new_stamp(num_servers: int) -> str:
    """Return a stamp for the folder of one of so many servers, which no other has."""
    return f"{secrets.token_hex(16)}-{num_servers}"


def check_num_servers(folder: str, num_servers: int) -> None:
    """Raise StorageError if a folder is that of one of another number of servers, by its stamp."""
    written = (read_stamp(folder) or "").partition("-")[2]
    if written and written != str(num_servers):
        raise StorageError(
            f"{folder}: the store was written by {written} servers, and num_servers is {num_servers}; use as many, or "
            "save() with them and load() with others"
        )
