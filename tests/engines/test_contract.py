"""The contract can be passed by every engine that the documentation allows."""

import re
from pathlib import Path

from tests.support.processes import call

# What depends on what an engine can do; the local engine runs the other tests.
CHOSEN = "Slice or slice or incomplete or introspection or float8 or mean or snapshot"


def test_engines_that_do_less_pass():
    module = Path(__file__).with_name("contract_of_others.py")
    status, text = call("pytest", "-q", "-rps", "-p", "no:cacheprovider", module, "-k", CHOSEN)
    assert status == 0, text
    passed = set(re.findall(r"^PASSED .*::(Test\w+::\w+)", text, re.MULTILINE))
    assert passed >= {
        f"{name}::{test}"
        for name in ("TestLesser", "TestSeveral")
        for test in ("test_introspection", "test_a_tree_in_blocks_of_float8", "test_a_mean_is_the_sum_divided_once")
    }
    assert "TestSeveral::test_incomplete_values_cannot_be_read" in passed
    assert "TestLesser::test_incomplete_values_cannot_be_read" not in passed
    assert "this type of store takes no slices" in text
