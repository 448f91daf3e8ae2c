"""A Ray cluster with a token, over hosts that are namespaces."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.common.hosts import Host, HostsError

_RAY = [sys.executable, "-m", "ray.scripts.scripts", "start"]
_PORT = 6379
_OBJECT_STORE_NBYTES = 1 << 28
_START_S = 120.0


class RayCluster:
    """A node of Ray on each host, the first one the head; for a ``with`` statement, which also ends the hosts.

    Args:
        hosts: of ``benchmarks.common.hosts``.
        object_store_nbytes: of each node.

    Raises:
        HostsError: a node does not start.
    """

    def __init__(self, hosts: Sequence[Host], object_store_nbytes: int = _OBJECT_STORE_NBYTES) -> None:
        self._hosts, self._nodes, self._object_store_nbytes = (
            hosts,
            list[subprocess.Popen[bytes]](),
            object_store_nbytes,
        )
        # Sockets of Ray need a short path.
        self._folder = Path(tempfile.mkdtemp(prefix="tkv", dir="/tmp"))
        token = self._folder / "auth_token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        self.environment = {
            "RAY_ADDRESS": f"{hosts[0].address}:{_PORT}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_TMPDIR": str(self._folder),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        """What a process on one of the hosts needs to join."""

    def __enter__(self) -> Self:
        try:
            for host in self._hosts:
                self.join(host)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        for node in self._nodes:
            node.kill()
            node.wait()
        for host in self._hosts:
            host.crash()
        shutil.rmtree(self._folder, ignore_errors=True)

    def join(self, host: Host) -> None:
        """Start a node on a host, and wait until it has joined."""
        is_head = host is self._hosts[0]
        role = ["--head", "--port", str(_PORT), "--include-dashboard", "false"]
        own = role if is_head else ["--address", self.environment["RAY_ADDRESS"]]
        common = ["--node-ip-address", host.address, "--num-cpus", "1", "--block"]
        common += ["--object-store-memory", str(self._object_store_nbytes)]
        log = self._folder / f"node{len(self._nodes)}"
        with open(log, "w") as out:
            node = subprocess.Popen(
                [*host.start, *_RAY, *own, *common], env=os.environ | self.environment, stdout=out, stderr=out
            )
        self._nodes.append(node)
        until = time.monotonic() + _START_S
        while "Ray runtime started" not in log.read_text():
            if node.poll() is not None or time.monotonic() > until:
                raise HostsError(f"Ray does not start on {host.name}: {log.read_text()[-2000:]}")
            time.sleep(0.05)
