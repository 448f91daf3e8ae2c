"""The contract, run by engines that may do less than the local one, as those of others.

Not collected by itself: ``test_contract`` starts it, since it skips tests that CI does not know to be skipped.
"""

from tensorkv import engines
from tensorkv.engines.local import LocalEngine
from tensorkv.testing import Contract


class LesserEngine(LocalEngine):
    """No slices, no snapshots, no releases."""

    capabilities = LocalEngine.capabilities - {"snapshot", "releases"}

    def __init__(self, *, nonfinite="pass", reduce="sum"):
        super().__init__(False, nonfinite=nonfinite, reduce=reduce)

    def push_parts(self, batch, priority):
        batch.refuse_slices("are not taken by this engine")
        super().push_parts(batch, priority)

    def pushpull_into(self, batch, outs, priority):
        batch.refuse_slices("are not taken by this engine")
        super().pushpull_into(batch, outs, priority)


class SeveralEngine(LocalEngine):
    """Two workers that push by themselves; slices, but no snapshots and no releases."""

    capabilities = LocalEngine.capabilities - {"snapshot", "releases"}
    num_workers = 2
    joins_workers = "alone"

    def __init__(self, *, nonfinite="pass", reduce="sum"):
        super().__init__(False, nonfinite=nonfinite, reduce=reduce)


def setup_module():
    # Not at import: the tests of the documentation take every type for one of the project.
    engines.register("undistributed", LesserEngine)
    engines.register("several", SeveralEngine)


class TestLesser(Contract):
    TYPE = "undistributed"
    TAKES_SLICES = False


class TestSeveral(Contract):
    TYPE = "several"
    PLACE = (0, 2)
