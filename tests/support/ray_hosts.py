"""A Ray cluster with a token over the hosts of ``tests.support.hosts.machines``, and programs that run there."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tensorkv.engines.ps.ray import safety
from tests.support.until import LIMIT_S, until

RAY = [sys.executable, "-m", "ray.scripts.scripts", "start"]


class RayHosts:
    """Nodes on hosts, the first one the head; a context manager.

    Args:
        machines: the hosts.
    """

    def __init__(self, machines):
        self._machines, self._nodes, self._programs = machines, [], []
        # Sockets of Ray need a short path.
        self._folder = Path(tempfile.mkdtemp(prefix="tkv", dir="/tmp"))
        safety._make_token(self._folder / ".ray" / "auth_token")
        ours = {"HOME": str(self._folder), "RAY_AUTH_MODE": "token", "RAY_ADDRESS": f"{machines[0].address}:6379"}
        self._env = {**os.environ, **ours, "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": str(self._folder)}

    def __enter__(self):
        try:
            for machine in self._machines:
                self.join(machine)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for process in [*self._programs, *self._nodes]:
            process.kill()
            process.wait()
        for machine in self._machines:
            machine.crash()
        shutil.rmtree(self._folder, ignore_errors=True)

    def join(self, machine):
        """Start a node on a host."""
        address = self._env["RAY_ADDRESS"]
        is_head = address.startswith(f"{machine.address}:")
        own = ["--head", "--port", "6379", "--include-dashboard", "false"] if is_head else ["--address", address]
        common = ["--node-ip-address", machine.address, "--num-cpus", "1", "--object-store-memory", str(1 << 28)]
        log = self._folder / f"node{len(self._nodes)}"
        with open(log, "w") as out:
            node = subprocess.Popen(
                [*machine.start, *RAY, *own, *common, "--block"], env=self._env, stdout=out, stderr=out
            )
        self._nodes.append(node)
        until(lambda: "Ray runtime started" in log.read_text() or node.poll() is not None)
        assert node.poll() is None, log.read_text()

    def run(self, machine, program, *args):
        """Start ``program(*args)`` of ``tests.ps.host_programs`` on a host."""
        process = Program([*machine.start, sys.executable, "-m", "tests.ps.host_programs", program], args, self._env)
        self._programs.append(process.process)
        return process


class Program:
    """A program that says one line of JSON after another."""

    def __init__(self, command, args, env):
        self.process = subprocess.Popen(
            [*command, json.dumps(args)], env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def say(self):
        """Return what it says next."""
        line = self.process.stdout.readline()
        assert line, f"it has ended with status {self.process.wait(LIMIT_S)}"
        return json.loads(line)

    def end(self):
        """Return the rest of what it says, when it has ended well."""
        text, _ = self.process.communicate(timeout=LIMIT_S)
        assert self.process.returncode == 0, text
        return [json.loads(line) for line in text.splitlines()]
