"""Files of changes: what is read is what was written, and anything else is an error."""

import contextlib
import hashlib
import json
import os
import random
from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy
import torch

import tensorkv
from tensorkv import Rows
from tensorkv.arrays.interop import NUMPY
from tensorkv.arrays.spec import KeySpec
from tensorkv.releases.changes import Changes, KeyChange, release_digest


@pytest.fixture
def changes():
    with tensorkv.create() as kv:
        kv.init(
            {
                "some": np.arange(100, dtype=np.float32),
                "all": torch.zeros(4, dtype=torch.bfloat16),
                "none": np.zeros((2, 3)),
                "gone": np.ones(2),
                "table": Rows([1], np.ones((1, 2), np.float32), 9),
            }
        )
        kv.publish("a")
        some = np.arange(100, dtype=np.float32)
        some[[3, 77]] = np.nan, -0.0
        kv.push({"some": some, "all": torch.ones(4, dtype=torch.bfloat16)})
        kv.push("table", Rows([5], np.full((1, 2), 3, np.float32), 9))
        kv.delete("gone")
        kv.init("new", np.full(3, 9, np.uint8))
        kv.publish("b")
        with kv.open_release("b") as release:
            yield release.changes(since="a")


def test_a_file_has_everything(changes, tmp_path):
    path = tmp_path / "b.safetensors"
    tensorkv.save_changes(path, changes)
    for _ in range(2):
        loaded = tensorkv.load_changes(path)
        assert (loaded.base, loaded.name, loaded.base_digest, loaded.digest) == (
            "a",
            "b",
            changes.base_digest,
            changes.digest,
        )
        for mine, theirs in zip(changes, loaded, strict=True):
            assert (mine.key, mine.kind, mine.shape, mine.dtype) == (
                theirs.key,
                theirs.kind,
                theirs.shape,
                theirs.dtype,
            )
            for left, right in ((mine.indices, theirs.indices), (mine.values, theirs.values)):
                assert type(left) is type(right)
                if left is not None:
                    assert bytes(memoryview(torch.as_tensor(left).view(torch.uint8).numpy())) == bytes(
                        memoryview(torch.as_tensor(right).view(torch.uint8).numpy())
                    )
        # Written again, over itself.
        tensorkv.save_changes(path, loaded)
    assert os.listdir(tmp_path) == ["b.safetensors"]


def test_any_changed_byte_is_an_error(changes, tmp_path):
    path = tmp_path / "b.safetensors"
    tensorkv.save_changes(path, changes)
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    chance = random.Random(1)

    def load_damaged(place):
        broken = bytearray(data)
        broken[place] ^= 1 << chance.randrange(8)
        path.write_bytes(broken)
        return tensorkv.load_changes(path)

    for place in range(begin, len(data)):
        with pytest.raises(tensorkv.CheckpointError, match="cannot be read"):
            load_damaged(place)
    for place in chance.sample(range(begin), 250):
        with contextlib.suppress(tensorkv.CheckpointError):
            # A name of a release or a library may be another one now.
            assert contents_of(load_damaged(place)) == contents_of(changes)
    for cut in (0, 7, 100, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(tensorkv.CheckpointError, match="cannot be read"):
            tensorkv.load_changes(path)


def contents_of(changes):
    """Return what changes have of each key, with the bytes of its indices and values."""

    def raw(part):
        return None if part is None else part.tobytes()

    return [(each.key, each.kind, each.shape, each.dtype, raw(each.places), raw(each.content)) for each in changes]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda told: told.update(format=2), "version 2 of the format"),
        (lambda told: told["keys"][0].update(kind="odd"), "not described as a change is"),
        (lambda told: told["keys"][0].update(kind="same"), "a change of the kind same with other parts"),
        (lambda told: told["keys"][0].update(dtype="float64"), "bytes of values, expected"),
        (lambda told: told["keys"][0].update(dtype="nn"), "is not described as a change"),
        (lambda told: told["keys"][0].update(after=1), "digests of its keys"),
        (lambda told: told["keys"].pop(), "unexpected tensor|digests of its keys"),
        (lambda told: told.pop("keys"), "cannot be read: .keys"),
    ],
)
def test_a_file_that_describes_something_else_is_refused(changes, tmp_path, change, said):
    path = tmp_path / "b.safetensors"
    tensorkv.save_changes(path, changes)
    rewrite(path, change)
    with pytest.raises(tensorkv.CheckpointError, match=said):
        tensorkv.load_changes(path)


def rewrite(path, change):
    """Change what a file says of its data, which stay as they are."""
    with safetensors.safe_open(path, "np") as file:
        told = json.loads(file.metadata()["tensorkv"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    change(told)
    safetensors.numpy.save_file(tensors, path, {"tensorkv": json.dumps(told)})


@pytest.mark.parametrize(
    ("field", "lie"),
    [
        ("after", float("inf")),
        ("after", None),
        ("gone", -1),
        ("gone", 1.0),
        ("before", 1 << 64),
        ("before", "1"),
        ("shape", [1 << 63]),
        ("shape", [1 << 40, 1 << 40]),
        ("shape", [1.5]),
        ("shape", 7),
        ("table", 3),
        ("table", "yes"),
    ],
)
def test_numbers_that_lie_are_refused(changes, tmp_path, field, lie):
    path = tmp_path / "b.safetensors"
    for place in range(len(changes)):
        tensorkv.save_changes(path, changes)
        rewrite(path, lambda told, place=place: told["keys"][place].update({field: lie}))
        with pytest.raises(tensorkv.CheckpointError, match="cannot be read"):
            tensorkv.load_changes(path)


@pytest.mark.parametrize("others", ["elements", "deleted"])
def test_a_key_that_is_described_twice_is_refused(tmp_path, others):
    """Only one of the two was compared with the array, and the other says how long it is."""
    path = tmp_path / "b.safetensors"
    spec, other = (KeySpec(torch.Size([size]), torch.float32, NUMPY, False) for size in (4, 1_000_000))
    place, value = np.zeros(4, np.uint8), np.ones(1, np.float32).view(np.uint8)
    real = KeyChange("w", "elements", spec, place, value, 1, 2, 3)
    if others == "elements":
        more = [KeyChange("w", "elements", other, np.array([999_999], np.int32).view(np.uint8), value, 1, 2, 3)]
    else:
        more = [KeyChange("w", "deleted", other, before=1)]
    tensorkv.save_changes(path, Changes("a", "b", [*more, real]))
    with pytest.raises(tensorkv.CheckpointError, match="duplicate key 'w'"):
        tensorkv.load_changes(path)


def test_a_key_with_another_shape_is_described_twice(tmp_path):
    """It is deleted, and then a new one."""
    path = tmp_path / "b.safetensors"
    with tensorkv.create() as kv:
        kv.init("w", np.zeros(4, np.float32))
        kv.publish("a")
        kv.delete("w")
        kv.init("w", np.ones(5, np.float32))
        kv.publish("b")
        with kv.open_release("b") as release:
            tensorkv.save_changes(path, release.changes(since="a"))
    loaded = tensorkv.load_changes(path)
    assert [(each.key, each.kind, each.shape) for each in loaded] == [("w", "dense", (5,)), ("w", "deleted", (4,))]


def test_a_change_of_a_value_that_the_older_release_does_not_have_is_refused(changes, tmp_path):
    """It would not be in the digest with which readers compare the release that they hold."""
    path = tmp_path / "b.safetensors"
    of_older = [each for each in changes if each.kind != "dense"]
    assert {each.kind for each in of_older} == {"elements", "same", "rows", "deleted"}
    for each in of_older:
        tensorkv.save_changes(path, Changes("a", "b", [replace(each, before=None)]))
        with pytest.raises(tensorkv.CheckpointError, match=f"'{each.key}': a change of the kind {each.kind} without"):
            tensorkv.load_changes(path)


@pytest.mark.parametrize("places", [[3, 100], [3, -1], [77, 3], [3, 3]])
def test_indices_that_a_store_does_not_give_are_refused(changes, tmp_path, places):
    path = tmp_path / "b.safetensors"
    changes[0].places = np.array(places, np.int32).view(np.uint8)
    tensorkv.save_changes(path, changes)
    with pytest.raises(tensorkv.CheckpointError, match="indices that do not increase, or are outside of the value"):
        tensorkv.load_changes(path)


def test_what_cannot_be_read_or_written(changes, tmp_path):
    with pytest.raises(tensorkv.CheckpointError, match="cannot be read"):
        tensorkv.load_changes(tmp_path / "missing")
    with pytest.raises(tensorkv.CheckpointError, match="cannot be written"):
        tensorkv.save_changes(tmp_path / "missing" / "b.safetensors", changes)
    with pytest.raises(tensorkv.ArgumentError, match="got None"):
        tensorkv.save_changes(tmp_path / "b", None)
    for path in (5, None, b"b", ["b"], "", "a\0b"):
        with pytest.raises(tensorkv.ArgumentError, match=r"save_changes: path is .*the path of a file, a str or"):
            tensorkv.save_changes(path, changes)
        with pytest.raises(tensorkv.ArgumentError, match=r"load_changes: path is .*the path of a file, a str or"):
            tensorkv.load_changes(path)
    safetensors.numpy.save_file({"w": np.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(tensorkv.CheckpointError, match="cannot be read"):
        tensorkv.load_changes(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("key", "name"),
    [("w", "'w'"), (3, "3"), ("ä", r"'\xe4'"), ("\U0001fae8", r"'\U0001fae8'"), ("\ud800", r"'\ud800'")],
)
def test_the_digest_of_a_release_has_its_keys_in_ascii(key, name):
    """Which other characters repr escapes depends on the version of Unicode that Python has."""
    spec = KeySpec(torch.Size([2]), torch.float32, NUMPY, False)
    line = f"{name} torch.float32 (2,) 7".encode("ascii")
    assert release_digest([(key, spec, 7)]) == hashlib.blake2b(line, digest_size=16).hexdigest()
