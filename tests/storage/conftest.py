"""Fixtures for tests of what is read from files."""

import os
import resource
from pathlib import Path

import pytest


@pytest.fixture
def little_memory():
    """Let the process grow by less than what contents claim that no store has written."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGESIZE") + 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
