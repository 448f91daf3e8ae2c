"""Messages of clients: what is decoded is what was encoded, and what is malformed is named."""

import json
from dataclasses import MISSING, fields

import pytest

import tensorkv
from tensorkv.engines.ps import messages
from tensorkv.engines.ps.messages import VERBS, decode, encode
from tensorkv.engines.ps.server.server import Server

SENDER = {"owner": "p", "client": "p.0", "seq": 7}
REQUIRED = {"body": {"format": 1}, "metadata": {}, "numbers": {"lr": 0.1}, "keys": ["w", 3], "name": "sgd", "key": "w"}
REQUIRED |= {"kinds": [], "indices": [], "orders": [], "number": 3, "wanted": {"p.0": [7, [0, 1]]}, "snapshot": "s"}
REQUIRED |= {"token": "t", "worker": 1, "release": "r", "since": "q", "lease_s": 60.0, "releases": ["r"]}
REQUIRED |= {"generation": "g"}


def message_of(verb):
    kind = VERBS[verb]
    has_default = [each.name for each in fields(kind) if each.default is not MISSING]
    return kind(**{each.name: REQUIRED[each.name] for each in fields(kind) if each.name not in has_default})


@pytest.mark.parametrize("verb", VERBS)
def test_what_is_decoded_is_what_was_encoded(verb):
    message = message_of(verb)
    head = json.loads(json.dumps(encode(message, {**SENDER, "rank": 1, "servers": [0, 2]})))
    request = decode(head, b"layout", b"payload")
    assert (request.verb, request.message, request.layout, request.payload) == (verb, message, b"layout", b"payload")
    assert (request.sender.client, request.sender.seq, request.sender.rank) == ("p.0", 7, 1)
    assert request.sender.servers == [0, 2]


@pytest.mark.parametrize("verb", VERBS)
def test_a_server_answers_each_verb(verb):
    assert callable(getattr(Server, f"_{verb}", None))


@pytest.mark.parametrize("verb", VERBS)
def test_missing_and_unknown_fields_are_named(verb):
    head = encode(message_of(verb), SENDER)
    for name in set(head) - {"verb"}:
        with pytest.raises(tensorkv.ArgumentError, match=f"{verb}: the field '{name}' is missing"):
            decode({other: each for other, each in head.items() if other != name})
    with pytest.raises(tensorkv.ArgumentError, match=f"{verb}: unknown field 'colour'"):
        decode({**head, "colour": "red"})


@pytest.mark.parametrize(
    ("verb", "name", "value", "said"),
    [
        ("push", "pulls", 1, "'pulls' is int, expected bool"),
        ("push", "checksum", True, "'checksum' is bool, expected int or NoneType"),
        ("pull", "snapshot", 3, "'snapshot' is int, expected str or NoneType"),
        ("barrier", "number", 2.0, "'number' is float, expected int"),
        ("delete", "keys", "w", "'keys' is str, expected list"),
        ("stats", "seq", None, "'seq' is NoneType, expected int"),
        ("stats", "rank", "0", "'rank' is str, expected int or NoneType"),
    ],
)
def test_fields_of_another_type_are_named(verb, name, value, said):
    with pytest.raises(tensorkv.ArgumentError, match=said):
        decode({**encode(message_of(verb), SENDER), name: value})


@pytest.mark.parametrize("verb", [None, 3, "fly", ["push"]])
def test_unknown_verbs_are_named(verb):
    with pytest.raises(tensorkv.ArgumentError, match="unknown request"):
        decode({**SENDER, "verb": verb})


def test_the_poll_timeout_may_be_a_whole_number():
    assert decode({**SENDER, "verb": "stats", "poll_timeout_s": 0}).sender.poll_timeout_s == 0
    assert isinstance(decode({**SENDER, "verb": "stats"}).message, messages.Stats)
