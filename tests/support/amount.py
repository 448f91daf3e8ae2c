"""How much a run of the tests does: ``make test`` meets each behaviour and fault, ``make test-all`` repeats them.

Tests with the mark ``release`` show that other tests find planted faults, or are of the benchmarks; only
``make test-all`` runs them.
"""

import os

ALL = os.environ.get("TENSORKV_TESTS") == "all"


def amount(few: int, many: int) -> int:
    """Return how often a test repeats itself, or with how many examples: ``many`` in a run of everything."""
    return many if ALL else few
