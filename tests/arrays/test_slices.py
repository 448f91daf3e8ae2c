"""Pulls into DTensors, on meshes of processes."""

import pytest

from tests.support.workers import run


@pytest.mark.parametrize("mesh", [(3,), (2, 2)], ids=str)
def test_dtensors_have_what_the_value_has(mesh):
    count = {1: 5 * 3 + 2, 2: 5 * 9 + 4}[len(mesh)]
    workers = 1
    for size in mesh:
        workers *= size
    for text in run(workers, "tests.arrays.mesh_programs", *mesh):
        assert f"{count} DTensors" in text
