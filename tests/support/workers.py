"""Teams of worker processes, as ``torchrun`` would start them, each with a time limit."""

import os
import signal
import socket
import subprocess
import sys
import tempfile


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Team:
    """Some workers on this machine, on loopback.

    Args:
        count: how many.
        command: what each runs; a program of ``dist_programs`` if it is a name.
        args: more arguments.
        env: more variables; ``{rank}`` in them is the worker's.
        hosts: for each worker, a host of ``hosts.two_hosts`` or ``hosts.pid_namespaces``.
    """

    def __init__(self, count, command, *args, env=None, hosts=None):
        if isinstance(command, str):
            command = [sys.executable, "-m", "tests.sync.dist_programs", command]
        self.port = free_port()
        self.outputs = [tempfile.TemporaryFile("w+") for _ in range(count)]  # noqa: SIM115 - closed by __exit__
        self.processes = []
        for rank in range(count):
            variables = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self.port),
                "OMP_NUM_THREADS": "1",
                **{name: text.replace("{rank}", str(rank)) for name, text in (env or {}).items()},
            }
            start = []
            if hosts is not None:
                start, _, interface = hosts[rank]
                variables |= {"MASTER_ADDR": hosts[0][1], **({"GLOO_SOCKET_IFNAME": interface} if interface else {})}
            self.processes.append(
                subprocess.Popen(
                    [*start, *command, *map(str, args)],
                    env=variables,
                    stdout=self.outputs[rank],
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                )
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait()
        for output in self.outputs:
            output.close()

    def text(self, rank):
        """What a worker has printed so far."""
        self.outputs[rank].seek(0)
        return self.outputs[rank].read()

    def wait(self, timeout_s=90):
        """Wait for every worker; return exit statuses."""
        return [process.wait(timeout=timeout_s) for process in self.processes]


def run(count, command, *args, timeout_s=90, env=None, hosts=None):
    """Run a program on some workers, fail if one fails, and return what each has printed."""
    with Team(count, command, *args, env=env, hosts=hosts) as team:
        try:
            codes = team.wait(timeout_s)
        except subprocess.TimeoutExpired:
            codes = ["too slow"]
        texts = [team.text(rank) for rank in range(count)]
    assert codes == [0] * count, "\n".join(f"--- rank {rank}:\n{text[-6000:]}" for rank, text in enumerate(texts))
    return texts
