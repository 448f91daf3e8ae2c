"""Put something before a stage of the calls that workers make together, wherever the stage is made."""

from collections.abc import Callable

from tensorkv.engines.sync import allreduce, host

# Which phases of a call that the compiled part makes do the same.
PHASES = {
    "stage_in": ["stage_in"],
    "reduce": ["reduce"],
    "return_values": ["reduce", "update"],
    "wait_for_values": ["fill_outs"],
    "copy_out": ["fill_outs"],
}


class Stepwise:
    """A call of the compiled part, made phase by phase."""

    def __init__(self, reduce, phases: list[str], before: Callable[[], None]) -> None:
        self._reduce, self._phases, self._before = reduce, phases, before

    def __getattr__(self, name):
        return getattr(self._reduce, name)

    def advance(self):
        while self._reduce.phase != "done":
            if self._reduce.phase in self._phases:
                self._before()
            found = self._reduce.step()
            if found is not None:
                return found
        return None


def plant(stage: str, before: Callable[[], None]) -> Callable[[], None]:
    """Call a function before each time that a stage is made, in stores that are created from now on.

    Args:
        stage: of ``AllReduce``.
        before: the function.

    Returns:
        what takes it away again, also from stores that are there.
    """
    in_python, shared = getattr(allreduce.AllReduce, stage), host.HostGroup.shared_reduce
    planted = [before]

    def call_before():
        for each in planted:
            each()

    def stage_after(self, *args, **kwargs):
        call_before()
        return in_python(self, *args, **kwargs)

    def take_away():
        planted.clear()
        setattr(allreduce.AllReduce, stage, in_python)
        host.HostGroup.shared_reduce = shared

    setattr(allreduce.AllReduce, stage, stage_after)
    if stage in PHASES:
        host.HostGroup.shared_reduce = lambda *args: Stepwise(shared(*args), PHASES[stage], call_before)
    return take_away
