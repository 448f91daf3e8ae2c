"""The releases of a shard: who holds them, and until when."""

import numpy as np
import pytest

import tensorkv
from tensorkv import SnapshotError
from tensorkv.shard.shard import ShardSnapshot


def test_readers_go_on_with_the_same_attempt_at_a_release_only():
    """The values of another attempt may be others."""
    with tensorkv.create() as kv:
        kv.init("w", np.zeros(3, np.float32))
        shard = kv._engine._shard
        releases = shard.releases
        second, first = (ShardSnapshot(shard, shard.freeze()) for _ in range(2))
        releases.add("a", 1, second, "owner", "second attempt")
        before = releases.before_replace()
        releases.clear()
        releases.add("a", 1, first, "owner", "first attempt")
        releases.take_readers(before)
        assert releases.lasting()[0].snapshot is first
        first.refuse_closed()
        with pytest.raises(SnapshotError, match="dropped"):
            second.refuse_closed()
