"""How much a run of the tests does: ``make test`` meets each behaviour and fault, ``make test-all`` repeats them.

Tests with the mark ``release`` show that other tests find planted faults, or are of the benchmarks; only
``make test-all`` runs them.
"""

import itertools
import os
from typing import TypeVar

T = TypeVar("T")
ALL = os.environ.get("TENSORKV_TESTS") == "all"


def amount(few: T, many: T) -> T:
    """Return how often a test repeats itself, or with how many examples: ``many`` in a run of everything."""
    return many if ALL else few


def each_pair(*parameters: list) -> list[tuple]:
    """Return combinations of values, one of each parameter: all of them in a run of everything.

    Else some in which each value of a parameter meets each value of every other one.
    """
    everything = list(itertools.product(*parameters))
    if ALL:
        return everything

    def pairs(combination: tuple) -> set:
        return set(itertools.combinations(enumerate(map(repr, combination)), 2))

    missing, chosen = set().union(*map(pairs, everything)), []
    while missing:
        chosen.append(max(everything, key=lambda each: len(pairs(each) & missing)))
        missing -= pairs(chosen[-1])
    return chosen
