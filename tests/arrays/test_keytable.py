"""KeyTable: what its messages name, also while another thread changes it."""

import pytest

from tensorkv.arrays.keytable import KeyTable
from tensorkv.errors import KeyNotFoundError


def test_a_message_while_another_thread_adds_keys():
    class Key(str):
        """Adds another key whenever it is looked at, as a thread may that runs meanwhile."""

        def __str__(self):
            table[Key(f"new{len(table)}")] = 1
            return str.__str__(self)

    table = KeyTable({Key("weight"): 1, Key("bias"): 2})
    with pytest.raises(
        KeyNotFoundError, match=r'pull\("weigth"\): no such key \(did you mean "weight"\?\); the store has'
    ):
        table.find("pull", Key("weigth"))
    assert len(table) > 2
