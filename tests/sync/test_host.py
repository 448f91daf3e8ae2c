"""What a worker says of a call, so that others can compare it with theirs: the same with and without compiled code."""

import random

import pytest
import torch

from tensorkv.arrays.spec import KeySpec
from tensorkv.engines.sync.host import ENTRY_TEXT, Signature, describe
from tensorkv.engines.sync.schedule import PartitionedEntry
from tensorkv.shard import native

KEYS = {
    "one": ["w"],
    "numbers": [0, -7, 3, 10**17, 2**63 - 1, 2**63, -(2**64)],
    "plain": ["a", "layer.0.weight", "~ !#[]"],
    "with signs": ['"', "\\", "a\nb", "\x7f", "\0"],
    "of other languages": ["ключ", "鍵", "é", "\ud800"],
    "many": [f"model.layer.{index}.weight" for index in range(3000)],
    "of one length": [f"{index:0{ENTRY_TEXT // 4}}" for index in range(5)],
}


def entry(key):
    value = torch.zeros(2)
    return PartitionedEntry(key, KeySpec(value.shape, value.dtype, "torch", is_table=False), value, [0, 2, 2], 0)


def signatures(verb, keys):
    values = {key: entry(key) for key in keys}
    batch = native.look(values, keys, None, None, None, None)
    assert batch is not None
    return Signature.of_keys(verb, keys, values, batch), Signature.of_keys(verb, keys, values, None)


@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS)
@pytest.mark.parametrize("verb", ["push", "pushpull"])
def test_a_signature_is_the_same_with_and_without_compiled_code(verb, keys):
    compiled, other = signatures(verb, keys)
    said = describe(verb, keys=keys)
    assert compiled.entry == other.entry
    assert compiled.entry.endswith(said.encode()[:ENTRY_TEXT])
    assert compiled.digest == other.digest == compiled.entry[:8]
    assert compiled.text == other.text == said
    assert compiled.verb == other.verb == verb


def test_signatures_of_other_calls_differ():
    calls = [(verb, tuple(keys)) for verb in ("push", "pushpull") for keys in KEYS.values()]
    calls += [(verb, ("3", "x")[:count]) for verb in ("push", "pushpull") for count in (1, 2)]
    calls += [("push", (3,)), ("push", ("a",)), ("push", ("a", "b")), ("push", ("ab",)), ("push", ("b", "a"))]
    shuffled, rng = list(KEYS["many"]), random.Random(0)
    for _ in range(20):
        rng.shuffle(shuffled)
        calls.append(("push", tuple(shuffled)))
    assert len({signatures(verb, keys)[0].digest for verb, keys in calls}) == len(calls)
