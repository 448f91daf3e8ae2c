"""Which of the pushes that wait comes next: the one with the highest priority that every host has laid out."""

import pytest

from tests.support.hosts import CAN_MAKE, two_hosts
from tests.support.workers import run

PROGRAMS = "tests.sync.priority_programs"
needs_hosts = pytest.mark.skipif(not CAN_MAKE, reason="network namespaces take root and iproute2")
PROGRAM_AND_ORDER = [("waiting", "order a c d b"), ("awaited", "order a b c")]


@pytest.mark.parametrize(("program", "order"), PROGRAM_AND_ORDER)
@pytest.mark.parametrize("workers", [2, 3])
def test_over_gloo(workers, program, order, tmp_path):
    for text in run(workers, PROGRAMS, program, tmp_path, False):
        assert order in text


@needs_hosts
@pytest.mark.parametrize(("program", "order"), PROGRAM_AND_ORDER)
@pytest.mark.parametrize("per_host", [1, 2])
def test_over_hosts(per_host, program, order, tmp_path):
    with two_hosts() as hosts:
        placed = [host for host in hosts for _ in range(per_host)]
        for text in run(len(placed), PROGRAMS, program, tmp_path, True, hosts=placed):
            assert order in text
