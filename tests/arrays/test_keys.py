"""Keys are non-empty str, or int."""

import numpy as np
import pytest

from tensorkv.arrays.keys import check_key, is_key
from tensorkv.errors import KeyTypeError


@pytest.mark.parametrize(
    ("given", "plain"), [("w", "w"), (np.str_("w"), "w"), (3, 3), (np.uint8(3), 3), (-1, -1)], ids=repr
)
def test_keys_become_plain(given, plain):
    assert check_key("push", given) == plain
    assert type(check_key("push", given)) is type(plain)
    assert is_key(given)


@pytest.mark.parametrize("given", ["", True, np.False_, None, 1.0, b"w", ["w"], ("w",)], ids=repr)
def test_others_are_refused(given):
    with pytest.raises(KeyTypeError, match="push"):
        check_key("push", given)
