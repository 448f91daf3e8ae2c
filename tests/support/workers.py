"""Teams of worker processes, as ``torchrun`` would start them."""

import socket
import subprocess

from tests.support.processes import Program
from tests.support.until import LIMIT_S


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Team:
    """Some workers on this machine, on loopback.

    Args:
        count: how many.
        what: what each runs: a function, or the name of a module.
        args: the arguments of the function or module.
        env: more variables; ``{rank}`` in them is the worker's.
        hosts: for each worker, a host of ``hosts.two_hosts`` or ``hosts.pid_namespaces``.
    """

    def __init__(self, count, what, *args, env=None, hosts=None):
        self.port = free_port()
        self.programs = []
        for rank in range(count):
            variables = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self.port),
                "OMP_NUM_THREADS": "1",
                **{name: text.replace("{rank}", str(rank)) for name, text in (env or {}).items()},
            }
            start = ()
            if hosts is not None:
                start, _, interface = hosts[rank]
                variables |= {"MASTER_ADDR": hosts[0][1], **({"GLOO_SOCKET_IFNAME": interface} if interface else {})}
            self.programs.append(Program(what, *args, env=variables, number=rank, host=start))
        self.processes = [program.process for program in self.programs]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for program in self.programs:
            program.close()

    def text(self, rank):
        """What a worker has printed so far."""
        return self.programs[rank].text()

    def printed(self):
        """What each worker has printed so far, at most its end."""
        return "\n".join(f"--- rank {rank}:\n{each.text()[-6000:]}" for rank, each in enumerate(self.programs))

    def wait(self):
        """Wait for every worker; return exit statuses.

        Raises:
            AssertionError: one does not end within the limit; with what all have printed.
        """
        try:
            return [process.wait(LIMIT_S) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end after {LIMIT_S} s\n{self.printed()}") from None


def run(count, what, *args, env=None, hosts=None):
    """Run a function or module on some workers, to the end of all.

    Returns:
        for each rank, what the function has returned, or what the module has printed.

    Raises:
        AssertionError: a worker has not ended with status 0; with what all have printed.
        Exception: what a function has raised on the lowest rank on which one has, with its rank and traceback.
    """
    with Team(count, what, *args, env=env, hosts=hosts) as team:
        codes, printed = team.wait(), team.printed()
        if isinstance(what, str):
            assert codes == [0] * count, printed
            return [team.text(rank) for rank in range(count)]
        results = []
        for rank, program in enumerate(team.programs):
            try:
                results.append(program.result())
            except Exception as error:
                error.add_note(f"on rank {rank} of {count}; all have printed:\n{printed}")
                raise
        assert codes == [0] * count, printed
    return results
