"""Programs that run on the hosts of a Ray cluster."""

import json
import os
import subprocess
import sys

from benchmarks.common.ray_hosts import RayCluster
from tests.support.until import LIMIT_S


class RayHosts(RayCluster):
    """A cluster that also ends the programs that were started on its hosts; arguments are those of ``RayCluster``."""

    def __init__(self, hosts):
        super().__init__(hosts)
        self._programs = []

    def __exit__(self, *_):
        for process in self._programs:
            process.kill()
            process.wait()
        super().__exit__(*_)

    def run(self, host, program, *args):
        """Start ``program(*args)`` of ``tests.ps.host_programs`` on a host."""
        command = [*host.start, sys.executable, "-m", "tests.ps.host_programs", program]
        process = Program(command, args, os.environ | self.environment)
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
