"""The exception tree is as its picture says, and messages read well."""

import builtins
import re
from difflib import get_close_matches

import pytest

import tensorkv
from tensorkv import errors

PICTURE = re.findall(r"[├└]── (\w+)\s+\((\w+)\)", errors.__doc__)


@pytest.mark.parametrize(("name", "builtin"), PICTURE)
def test_the_picture_of_the_tree(name, builtin):
    error = getattr(errors, name)
    assert error.__bases__ == (errors.TensorKVError, getattr(builtins, builtin))
    assert getattr(tensorkv, name) is error


def test_every_error_is_in_the_picture():
    made = {name for name, thing in vars(errors).items() if isinstance(thing, type) and issubclass(thing, Exception)}
    assert made - {"TensorKVError", "SparseOutWarning"} == {name for name, _ in PICTURE}


def test_a_key_errors_message_is_not_quoted():
    assert str(errors.KeyNotFoundError('push("w"): no such key')) == 'push("w"): no such key'


def test_suggestion():
    assert errors.suggestion("wieght", ["weight", "bias"]) == ' (did you mean "weight"?)'
    assert errors.suggestion(12, [123, 7]) == " (did you mean 123?)"
    assert errors.suggestion("x", ["weight"]) == ""


def test_a_suggestion_costs_little_however_many_choices_there_are(monkeypatch):
    """Servers look for it while others wait."""
    compared = []

    def count(word, choices, n):
        compared.append(len(choices))
        return get_close_matches(word, choices, n=n)

    monkeypatch.setattr(errors, "get_close_matches", count)
    names = [f"layers.{number}.weight" for number in range(20_000)]
    assert errors.suggestion("layers.7.wieght", names) == ' (did you mean "layers.7.weight"?)'
    assert errors.suggestion("something else", names) == ""
    assert max(compared) <= 500
