"""Programs that run on the hosts of a Ray cluster."""

import json
import os
import subprocess
import sys
import tempfile

from benchmarks.common.ray_hosts import RayCluster
from tests.support.until import LIMIT_S


class RayHosts(RayCluster):
    """A cluster that also ends the programs that were started on its hosts; arguments are those of ``RayCluster``."""

    def __init__(self, hosts):
        super().__init__(hosts)
        self._programs = []

    def __exit__(self, *_):
        for program in self._programs:
            program.close()
        super().__exit__(*_)

    def run(self, host, program, *args):
        """Start ``program(*args)`` of ``tests.ps.host_programs`` on a host."""
        command = [*host.start, sys.executable, "-m", "tests.ps.host_programs", program]
        self._programs.append(Program(command, args, os.environ | self.environment))
        return self._programs[-1]


class Program:
    """A program that says one line of JSON after another."""

    def __init__(self, command, args, env):
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the program
        self.process = subprocess.Popen(
            [*command, json.dumps(args)], env=env, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )

    def say(self):
        """Return what it says next."""
        line = self.process.stdout.readline()
        assert line, f"it has ended with status {self.process.wait(LIMIT_S)}: {self._last_errors()}"
        return json.loads(line)

    def has_ended(self):
        """Tell whether it runs no more."""
        return self.process.poll() is not None

    def end(self):
        """Return the rest of what it says, when it has ended well."""
        text, _ = self.process.communicate(timeout=LIMIT_S)
        assert self.process.returncode == 0, f"{text}\n{self._last_errors()}"
        return [json.loads(line) for line in text.splitlines()]

    def close(self):
        """Forget what it has said; if it runs, it ends with its host."""
        self.process.kill()
        # What starts a program on a host is not the program, which may hold the other end of the pipe.
        self.process.stdout.close()
        self.process.wait(LIMIT_S)
        self._errors.close()

    def _last_errors(self):
        self._errors.seek(0)
        return self._errors.read()[-4000:]
