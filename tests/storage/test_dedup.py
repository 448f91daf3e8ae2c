"""The dedup table: each request counts once."""

import pytest

from tensorkv.errors import StorageError
from tensorkv.storage.dedup import AppliedRequests


def test_a_request_counts_once():
    applied = AppliedRequests()
    assert not applied.has_applied("a", 3)
    applied.add([("a", 3)])
    assert applied.has_applied("a", 3)
    assert applied.has_applied("a", 2)
    assert not applied.has_applied("b", 1)
    assert applied.last == {"a": 3}


def test_a_request_that_arrives_late_does_not_undo_a_later_one():
    applied = AppliedRequests()
    applied.add([("a", 3, {"fan": [0, 1]})])
    applied.add([("a", 2, {"fan": [1, 2]})])
    assert (applied.last, applied.fans) == ({"a": 3}, {"a": (3, [0, 1])})


def test_several_count_together():
    applied = AppliedRequests()
    applied.add([("a", 1), ("b", 2)])
    assert applied.last == {"a": 1, "b": 2}


def test_a_snapshot_restores_the_table():
    applied, other = AppliedRequests(), AppliedRequests()
    applied.add([("a", 3, {"fan": [0, 1]}), ("b", 1)])
    other.add([("c", 9)])
    other.restore(applied.last, applied.describe())
    assert (other.last, other.describe()) == (applied.last, applied.describe())


@pytest.mark.parametrize("request_id", [[None, 1], ["a", "1"], ["a", True], ["a", 1, 2]])
def test_malformed_request_ids_are_refused(request_id):
    with pytest.raises(StorageError, match="malformed request id"):
        AppliedRequests().replay([request_id], ())
