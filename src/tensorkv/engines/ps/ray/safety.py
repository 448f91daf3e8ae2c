"""Check the addresses on which Ray listens, and who can read its token."""

from __future__ import annotations

import ipaddress
import os
import secrets
import stat
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tensorkv.errors import ArgumentError

from . import _compat

_LISTEN = "0A"
_TABLES = ("/proc/net/tcp", "/proc/net/tcp6")


class Listener(NamedTuple):
    """A TCP socket that accepts connections.

    Args:
        address: of the interface; unspecified (0.0.0.0 or ::) for all interfaces.
        port: the number of its port.
    """

    address: ipaddress.IPv4Address | ipaddress.IPv6Address
    port: int

    @property
    def is_local(self) -> bool:
        """Whether only processes of this host can connect."""
        mapped = getattr(self.address, "ipv4_mapped", None)
        return (mapped or self.address).is_loopback


def listeners() -> list[Listener]:
    """Return every TCP socket of this host, or of this container's network, that accepts connections.

    Raises:
        OSError: the kernel does not list them.

    >>> import socket
    >>> with socket.create_server(("127.0.0.1", 0)) as server:
    ...     [each.is_local for each in listeners() if each.port == server.getsockname()[1]]
    [True]
    """
    found = []
    for table in _TABLES:
        if table.endswith("6") and not os.path.exists(table):
            # A kernel without IPv6.
            continue
        for line in Path(table).read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            if state == _LISTEN:
                digits, _, port = local.partition(":")
                # The kernel prints each 32-bit word of the address as a number in the byte order of the host.
                words = [int(digits[at : at + 8], 16) for at in range(0, len(digits), 8)]
                packed = b"".join(word.to_bytes(4, sys.byteorder) for word in words)
                found.append(Listener(ipaddress.ip_address(packed), int(port, 16)))
    return found


def is_local(port: int) -> bool:
    """Return whether a port accepts connections, and only from this host."""
    try:
        here = [each for each in listeners() if each.port == port]
    except OSError:
        return False
    return bool(here) and all(each.is_local for each in here)


def open_addresses(gcs_address: str, nodes: Sequence[dict[str, Any]]) -> list[str]:
    """Return the addresses of a Ray cluster that other hosts can connect to; none if it is on loopback alone.

    Args:
        gcs_address: of the cluster's head.
        nodes: of the cluster, as ``ray.nodes()`` returns them.
    """
    ports = [gcs_address.rpartition(":")[::2]]
    for node in nodes:
        if node["Alive"]:
            ports += [(node["NodeManagerAddress"], node[word]) for word in ("NodeManagerPort", "ObjectManagerPort")]
    return [f"{host}:{port}" for host, port in ports if not (_is_loopback(host) and is_local(int(port)))]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


@contextmanager
def quiet_forks() -> Iterator[None]:
    """Hide what Python and JAX say of a fork in a process with threads: Ray's child runs another program at once."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called", category=RuntimeWarning)
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
        yield


def ensure_token() -> None:
    """Make the token that Ray asks for, if there is none, in a file that only this user can read.

    Raises:
        ArgumentError: the file cannot be written.
    """
    if os.environ.get("RAY_AUTH_TOKEN"):
        return
    path = _token_path()
    if not path.exists():
        _make_token(path)
        _compat.read_token()


def check_token() -> None:
    """Refuse a token that other users of this host can read.

    Raises:
        ArgumentError: they can.
    """
    path = _token_path()
    if os.environ.get("RAY_AUTH_TOKEN") or not path.exists():
        return
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o066 and all(parent.stat().st_mode & 0o011 for parent in path.resolve().parents):
        raise ArgumentError(
            f"create: other users of this machine can read or replace Ray's token in {path} (mode {mode:04o}), which "
            f"lets them run code as you; chmod 600 {path}, or delete the file if another user may have read it: a "
            "new token is made then"
        )


def _token_path() -> Path:
    """Return where Ray looks for the token."""
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return Path(named).expanduser() if named else Path.home() / ".ray" / "auth_token"


def _make_token(path: Path) -> None:
    # Ray would make the file with the mode that the umask leaves, which is 0644 for most users.
    new = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with open(descriptor, "w") as file:
                file.write(secrets.token_hex(32))
            # Whole or not at all, and never in place of one that another process has just made.
            os.link(new, path)
        finally:
            os.unlink(new)
    except FileExistsError:
        return
    except OSError as error:
        raise ArgumentError(
            f"create: Ray asks for a token, and its file cannot be written: {error}; set HOME to a folder of yours, or "
            "RAY_AUTH_TOKEN to a secret of your own"
        ) from error
