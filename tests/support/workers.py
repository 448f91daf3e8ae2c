"""Teams of worker processes, as ``torchrun`` would start them, each with a time limit."""

import socket
import subprocess

from tests.support.processes import Program


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

    def wait(self, timeout_s=90):
        """Wait for every worker; return exit statuses."""
        return [process.wait(timeout=timeout_s) for process in self.processes]


def run(count, what, *args, timeout_s=90, env=None, hosts=None):
    """Run a function or module on some workers, to the end of all.

    Returns:
        for each rank, what the function has returned, or what the module has printed.

    Raises:
        AssertionError: if a worker has not ended with status 0, with what all have printed.
        Exception: what a function has raised on the lowest rank on which one has, with its rank and traceback.
    """
    with Team(count, what, *args, env=env, hosts=hosts) as team:
        try:
            codes = team.wait(timeout_s)
        except subprocess.TimeoutExpired:
            codes = ["too slow"]
        printed = "\n".join(f"--- rank {rank}:\n{team.text(rank)[-6000:]}" for rank in range(count))
        if isinstance(what, str):
            assert codes == [0] * count, printed
            return [team.text(rank) for rank in range(count)]
        if codes == ["too slow"]:
            raise AssertionError(f"no end after {timeout_s} s\n{printed}")
        results = []
        for rank, program in enumerate(team.programs):
            try:
                results.append(program.result())
            except Exception as error:
                error.add_note(f"on rank {rank} of {count}; all have printed:\n{printed}")
                raise
        assert codes == [0] * count, printed
    return results
