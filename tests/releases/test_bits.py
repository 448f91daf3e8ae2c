"""Changes between random releases of a store lead to the new bits, whatever these are."""

import numpy as np
import torch

import tensorkv
from tests.releases.test_elements import DTYPES, changed, random_bits
from tests.support.amount import amount

RELEASES = amount(30, 750)


def bits(tensor):
    return tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def test_random_releases_of_every_dtype():
    rng = np.random.default_rng(7)
    values = {
        f"{dtype}, {numel}": random_bits(rng, numel, dtype)
        for dtype in DTYPES
        for numel in (1, int(rng.integers(5000)))
    }
    kinds, pairs = set(), 0
    with tensorkv.create() as kv:
        kv.init(values)
        kv.publish("0")
        mine, base = {name: value.clone() for name, value in values.items()}, None
        for number in range(1, RELEASES):
            for name, value in values.items():
                values[name], _ = changed(rng, value, rng.choice([0, 0.01, 0.3, 0.49, 0.6, 1]))
            kv.push(values)
            kv.publish(str(number), keep=2)
            with kv.open_release(str(number)) as release:
                changes = release.changes(since=str(number - 1))
                tensorkv.apply_changes(mine, changes, base=base if number % 2 else None)
                base = changes.digest
                assert base == release.digest
            for name, value in values.items():
                assert bits(mine[name]) == bits(value), name
            kinds |= {change.kind for change in changes}
            pairs += len(changes)
    assert kinds == {"same", "elements", "dense"}
    assert pairs == len(values) * (RELEASES - 1)
