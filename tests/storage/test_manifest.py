"""Checkpoints made to do harm: their digests fit, and still nothing in them is trusted."""

import json
import os
import pickle
import struct

import numpy as np
import pytest
import safetensors.torch
import torch

import tensorkv
from tensorkv import CheckpointError, Rows
from tensorkv.storage import checkpoint, manifest
from tests.support.checkpoints import (
    F32,
    body_of,
    refused,
    sign,
    sign_data,
    sign_tensors,
    snapshot,
    store,
    table,
    tensors_of,
    train,
)


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of ``store()``: "w" is dense, "t" a table, Adam has state of both."""
    with store() as kv:
        kv.save(tmp_path)
    return tmp_path


@pytest.fixture
def victim():
    with store("sgd", lr=0.5, momentum=0.9) as kv:
        yield kv


def test_signing_again_changes_nothing(folder, victim):
    sign_tensors(folder, tensors_of(folder))
    victim.load(folder)
    with store() as kv:
        assert snapshot(victim) == snapshot(kv)
        train(kv)
        train(victim)
        assert snapshot(victim) == snapshot(kv)


# ---------------------------------------------------------------- the manifest as a file


def _text(**parts):
    return json.dumps({"format": "tensorkv-checkpoint", "version": 1, "sha256": "", "body": {"files": []}, **parts})


TEXTS = {
    "nothing": "",
    "null": "null",
    "list": "[]",
    "number": "1",
    "string": '"tensorkv-checkpoint"',
    "no format": _text(format=None),
    "no body": _text(body=None),
    "files is no list": _text(body={"files": {}}),
    "no digest": _text(sha256=None),
    "deep": "[" * 100_000,
    "deep and closed": '{"format": "tensorkv-checkpoint", "a": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "nearly too deep": '{"format": "tensorkv-checkpoint", "version": 1, "body": {"files": ['
    + "[" * 900
    + "]" * 900
    + "]}}",
    "long number": '{"format": ' + "9" * 100_000 + "}",
    "trailing": _text() + "{}",
    "byte order mark": "\ufeff" + _text(),
    "NUL": "\0" * 100,
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_that_are_no_manifest(folder, victim, name):
    (folder / "manifest.json").write_text(TEXTS[name])
    with refused(victim, str(folder)):
        victim.load(folder)


@pytest.mark.parametrize("raw", [b"\xff\xfe{\x00}\x00", b"\x80", '{"a": 1}'.encode("utf-32")], ids=["16", "8", "32"])
def test_other_encodings(folder, victim, raw):
    (folder / "manifest.json").write_bytes(raw)
    with refused(victim, str(folder)):
        victim.load(folder)


@pytest.mark.parametrize("version", [0, 2, 1.0, True, "1", None, 10**40])
def test_other_versions(folder, victim, version):
    sign(folder, body_of(folder), version=version)
    with refused(victim, str(folder), "format version"):
        victim.load(folder)


def test_a_name_twice(folder, victim):
    text = (folder / "manifest.json").read_text()
    assert text.count('"kind": "store"') == 1
    for place in ('"kind": "store"', '"lr": 0.25', '"version": 1, "sha256"'):
        assert place in text
        name = place.partition(":")[0]
        (folder / "manifest.json").write_text(text.replace(place, f"{name}: 7, {place}"))
        with refused(victim, str(folder), "damaged"):
            victim.load(folder)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none(folder, victim, number):
    body = body_of(folder)
    body["optimizer"]["numbers"]["lr"] = "HERE"
    sign(folder, body)
    file = folder / "manifest.json"
    file.write_text(file.read_text().replace('"HERE"', number))
    with refused(victim, str(folder)):
        victim.load(folder)
    body["optimizer"]["numbers"]["lr"] = float(number)
    sign(folder, body)
    with refused(victim, str(folder), "not JSON"):
        victim.load(folder)


# ---------------------------------------------------------------- data files


def _file_body(folder, **changes):
    body = body_of(folder)
    body["files"][0].update(changes)
    sign(folder, body)
    return body["files"][0]


NAMES = [
    *(
        "../secret",
        "/etc/passwd",
        ".",
        "",
        "manifest.json",
        "data-0123456789abcdef-00000.safetensors/../x",
        None,
        3,
        [],
    ),
    *(
        "data-0123456789abcdef-00000.safetensors\n",
        "DATA-0123456789abcdef-00000.safetensors",
        "data-\u0661.safetensors",
    ),
]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_names_of_data_files(folder, victim, name):
    _file_body(folder, name=name)
    with refused(victim, str(folder), "invalid data file"):
        victim.load(folder)


def test_a_data_file_elsewhere_is_not_read(folder, victim, tmp_path_factory):
    (real,) = folder.glob("data-*")
    outside = tmp_path_factory.mktemp("outside") / real.name
    real.rename(outside)
    for name in (str(outside), os.path.relpath(outside, folder)):
        _file_body(folder, name=name)
        with refused(victim, "invalid data file"):
            victim.load(folder)
    _file_body(folder, name=real.name)
    for link in (os.symlink, lambda *_: real.mkdir(), lambda *_: os.mkfifo(real)):
        link(outside, real)
        with refused(victim, str(folder)):
            victim.load(folder)
        real.rmdir() if real.is_dir() and not real.is_symlink() else real.unlink()


def test_a_manifest_that_is_no_file(folder, victim):
    file = folder / "manifest.json"
    elsewhere = file.rename(folder / "elsewhere")
    for make in (
        os.mkfifo,
        os.mkdir,
        lambda path: os.symlink(elsewhere, path),
        lambda path: os.symlink("/dev/zero", path),
    ):
        make(file)
        with refused(victim, str(folder)):
            victim.load(folder)
        with refused(victim, str(folder)):
            victim.save(folder)
        file.rmdir() if file.is_dir() else file.unlink()
    assert elsewhere.exists()


@pytest.mark.parametrize("nbytes", [2**62, 10**30, -1, 0, 1, True, None, 1e9, "100"])
def test_sizes_of_data_files(folder, victim, nbytes):
    _file_body(folder, nbytes=nbytes)
    with refused(victim, str(folder)):
        victim.load(folder)


@pytest.mark.parametrize("digest", ["", "0" * 64, None, 0, []])
def test_digests_of_data_files(folder, victim, digest):
    _file_body(folder, sha256=digest)
    with refused(victim, str(folder), "sha256"):
        victim.load(folder)


@pytest.mark.parametrize("files", [[], [None], [[]], ["data"], [{}]], ids=str)
def test_lists_of_data_files(folder, victim, files):
    sign(folder, {**body_of(folder), "files": files})
    with refused(victim, str(folder)):
        victim.load(folder)


def test_a_data_file_twice(folder, victim):
    body = body_of(folder)
    sign(folder, {**body, "files": body["files"] * 2})
    with refused(victim, str(folder), "duplicate tensor"):
        victim.load(folder)


class Marker:
    """Makes a directory when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_is_not_opened(folder, victim, tmp_path_factory):
    marker = tmp_path_factory.mktemp("marker") / "ran"
    bomb = pickle.dumps(Marker(marker))
    pickle.loads(bomb)
    assert marker.is_dir(), "the pickle would have run"
    marker.rmdir()
    sign_data(folder, bomb)
    with refused(victim, str(folder), "not safetensors"):
        victim.load(folder)
    torch.save({"value/w": Marker(marker)}, folder / "torch")
    sign_data(folder, (folder / "torch").read_bytes())
    with refused(victim, str(folder), "not safetensors"):
        victim.load(folder)
    (folder / "manifest.json").write_bytes(bomb)
    with refused(victim, str(folder), "not JSON"):
        victim.load(folder)
    assert not marker.exists()


def _safetensors(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _one(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"value/w": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


HEADERS = {
    "nothing": b"",
    "length": struct.pack("<Q", 2**63),
    "length 100 MB": struct.pack("<Q", 100_000_000) + b"{}",
    "no object": _safetensors(b"[]"),
    "not JSON": _safetensors(b"{"),
    "not UTF-8": _safetensors(b'{"\xff": 1}'),
    "deep": _safetensors(b"[" * 100_000),
    "beyond the end": _safetensors(_one(offsets=(0, 4)), b""),
    "negative": _safetensors(_one(offsets=(-4, 0)), b"1234"),
    "backwards": _safetensors(_one(offsets=(4, 0)), b"1234"),
    "hole": _safetensors(_one(offsets=(4, 8)), b"12345678"),
    "rest": _safetensors(_one(), b"12345678"),
    "shape": _safetensors(_one(shape=(2,)), b"1234"),
    "huge shape": _safetensors(_one(shape=(2**62, 4)), b"1234"),
    "overflowing shape": _safetensors(_one(shape=(2**32, 2**32)), b""),
    "negative shape": _safetensors(_one(shape=(-1,)), b"1234"),
    "dtype": _safetensors(_one(dtype="O"), b"1234"),
    "float8": _safetensors(_one(dtype="F8_E4M3", shape=(4,)), b"1234"),
    "float4": _safetensors(_one(dtype="F4", shape=(8,)), b"1234"),
    "overlap": _safetensors({**_one(), "x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
    "metadata": _safetensors({"__metadata__": {"a": 1}, **_one()}, b"1234"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_lie(folder, victim, name):
    sign_data(folder, HEADERS[name])
    with refused(victim, str(folder)):
        victim.load(folder)


# ---------------------------------------------------------------- what the manifest says


def _set(*path_and_value):
    *path, last, value = path_and_value

    def change(body):
        for step in path:
            body = body[step]
        if value is ABSENT:
            del body[last]
        else:
            body[last] = value

    return change


ABSENT = object()
W, T = ("keys", 0), ("keys", 1)
NUMBERS = ("optimizer", "numbers")


def _bad(*path, values):
    return [(f"{'.'.join(map(str, path))} = {value!r}"[:70], _set(*path, value)) for value in values]


DEEP_LIST = [[[[[[]]]]]]
CHANGES = [
    *_bad("kind", values=["optimizer-states", "", "model", None, 1, ABSENT]),
    *_bad("update", values=["assign", "updater", "eval", None, True, [], ABSENT]),
    *_bad("keys", values=[None, {}, "w", [None], [[]], [1], ABSENT]),
    *_bad(*W, "key", values=[True, None, 1.5, "", [], {}, "x", "t", 3, ABSENT]),
    *_bad(*W, "kind", values=["rows", "sparse", None, 0, ABSENT]),
    *_bad(*T, "kind", values=["dense", "initialized-rows"]),
    *_bad(*W, "init", values=[{"name": "constant", "val": 1.0}]),
    *_bad(*T, "init", values=[{"name": "constant", "val": 1.0}, {"name": "normal"}, None, "normal"]),
    *_bad(*W, "version", values=[-1, 2**63, 10**30, True, None, 1.5, "1", [], ABSENT]),
    *_bad(*W, "shape", values=[[4], [2, 2, 1], [2], [], [-2, -2], [2, -2], [2.0, 2], [True, 2], ["2", 2], [None]]),
    *_bad(*W, "shape", values=[[2**63], [2**62, 2], [2**40] * 5, [10**30], None, "22", {}, 4, DEEP_LIST, ABSENT]),
    *_bad(*T, "shape", values=[[], [10], [10, 4], [10, 3, 1], [7, 3], [0, 3], [2**63, 3], [10, 2**62], [-10, 3]]),
    *_bad(
        *W, "dtype", values=["object", "float8", "float8_e4m3fn", "complex32", "qint8", "float64", "int32", "Tensor"]
    ),
    *_bad(*W, "dtype", values=["__class__", "__dict__", "__all__", "float", "torch.float32", "", None, 1, [], ABSENT]),
    *_bad(*T, "dtype", values=["float16", "int32", "complex64", "object"]),
    *_bad(*W, "library", values=["os", "pickle", "", None, 1, ABSENT]),
    *_bad(*W, "device", values=[0, [], True]),
    *_bad(
        *W,
        "state",
        values=[None, {}, ["step"], ["step", "exp_avg"], [1, 2, 3], ["../step"], ["step"] * 3, [""], ABSENT],
    ),
    *_bad(*W, "state", values=[["exp_avg", "exp_avg_sq", "step", "x"], [["step"]], "step"]),
    *_bad(*W, "columns", values=[{"exp_avg": 0.0}, [], None, ABSENT]),
    *_bad(*T, "state", values=[[], ["step", "exp_avg"], ["exp_avg"]]),
    *_bad(*T, "columns", values=[{}, None, [], ["exp_avg", "exp_avg_sq"], {"exp_avg": 0.0}, ABSENT]),
    *_bad(*T, "columns", values=[{"": 0.0, "exp_avg": 0.0, "exp_avg_sq": 0.0}, {"exp_avg": 0.0, "step": 0.0}]),
    *_bad(*T, "columns", "exp_avg", values=["0", None, True, 1e300, -1e300, 10**400, [], "NaN", ABSENT]),
    *_bad("optimizer", values=[None, [], "adam", {}, 1]),
    *_bad("optimizer", "name", values=["LBFGS", "SparseAdam", "os.system", "__import__", "torch.optim.SGD", "", None]),
    *_bad("optimizer", "name", values=["sgd", "adamw ", 1, [], {}, True, "x" * 100_000, ABSENT]),
    *_bad(
        *NUMBERS, values=[None, [], "lr", 1, ABSENT, {"__class__": 1}, {"params": []}, {"foreach": True}, {"lr": {}}]
    ),
    *_bad(*NUMBERS, "lr", values=[-1, "0.1", None, True, [], [0.1], {}, 10**400]),
    *_bad(
        *NUMBERS, "betas", values=[[0.9], [0.9, 0.9, 0.9], 0.9, ["0.9", 0.9], [2, 0.9], [0.9, -1], None, [[], []], []]
    ),
    *_bad(*NUMBERS, "eps", values=[-1, "x", None, [1e-8]]),
    *_bad(*NUMBERS, "amsgrad", values=["yes", 1, None, []]),
    *_bad(*NUMBERS, "maximize", values=["", 0.5]),
    *_bad(*NUMBERS, "unknown", values=[1]),
    *_bad(*NUMBERS, "fused", values=[True]),
    *_bad("optimizer", "rescale_grad", values=["1", None, True, 10**400, [], ABSENT]),
    *_bad("optimizer", "clip_gradient", values=[0, -1, "1", True, 10**400, []]),
    *_bad("optimizer", "overrides", values=[None, {}, 1, [1], [[]], [["w"]], [["w", {}, 1]], [["w", []]], ABSENT]),
    *_bad("optimizer", "overrides", values=[[["x", {"lr": 1}]], [[1, {}]], [[True, {}]], [[None, {}]], [[["w"], {}]]]),
    *_bad("optimizer", "overrides", values=[[["w", {"lr": -1}]], [["w", {"lr": "1"}]], [["w", {"params": 1}]]]),
    *_bad("optimizer", "overrides", values=[[["w", {"betas": [0.9]}]], [["w", {"x": 1}]], [["w", {"lr": 10**400}]]]),
]


def test_the_changes_have_names_of_their_own():
    assert len({name for name, _ in CHANGES}) == len(CHANGES)
    assert len(CHANGES) > 200


def test_every_change_is_refused(folder, victim):
    whole = json.dumps(body_of(folder))
    before = snapshot(victim)
    wrong = []
    for name, change in CHANGES:
        body = json.loads(whole)
        change(body)
        sign(folder, body)
        try:
            victim.load(folder)
        except CheckpointError as error:
            if not str(error).startswith(str(folder)) or len(str(error)) < len(str(folder)) + 10:
                wrong.append((name, f"says {error}"))
        except Exception as error:
            wrong.append((name, repr(error)))
        else:
            wrong.append((name, "was loaded"))
            break
        if snapshot(victim) != before:
            wrong.append((name, "changed the store"))
            break
    assert not wrong


def test_keys_of_two_types(tmp_path, victim):
    with tensorkv.create() as kv:
        kv.init(["1", "2"], [np.zeros(2), np.zeros(2)])
        kv.save(tmp_path)
    for value in (2, True, 2.0):
        body = body_of(tmp_path)
        body["keys"][1]["key"] = value
        sign(tmp_path, body)
        with refused(victim, str(tmp_path)):
            victim.load(tmp_path)


def test_state_without_an_optimizer(folder, victim):
    body = body_of(folder)
    for update in ("assign", "updater"):
        sign(
            folder,
            {
                **body,
                "update": update,
                "optimizer": None,
            },
        )
        with refused(victim, str(folder), "without an optimizer"):
            victim.load(folder)


def test_optimizer_states_without_an_optimizer(tmp_path, victim):
    with tensorkv.create() as kv:
        kv.init("w", np.zeros((2, 2), F32))
        kv.set_optimizer("adam")
        kv.save_optimizer_states(tmp_path)
    body = body_of(tmp_path)
    sign(tmp_path, {**body, "update": "assign", "optimizer": None})
    with refused(victim, str(tmp_path), "without an optimizer"):
        victim.load_optimizer_states(tmp_path)


# ---------------------------------------------------------------- tensors


def _i64(*numbers):
    return torch.tensor(numbers, dtype=torch.int64)


TENSORS = {
    "missing value": {"value/w": None},
    "missing state": {"state/exp_avg/w": None},
    "missing column": {"column/exp_avg/t": None},
    "missing ids": {"ids/t": None},
    "extra": {"value/x": torch.zeros(2)},
    "extra state": {"state/other/w": torch.zeros(2, 2)},
    "value shape": {"value/w": torch.zeros(4)},
    "value dtype": {"value/w": torch.zeros(2, 2, dtype=torch.float64)},
    "value pairs": {"value/w": torch.zeros(2, 2, 2)},
    "ids unsorted": {"ids/t": _i64(7, 2, 3)},
    "ids twice": {"ids/t": _i64(2, 2, 7)},
    "ids negative": {"ids/t": _i64(-1, 2, 7)},
    "ids beyond": {"ids/t": _i64(2, 3, 10)},
    "ids huge": {"ids/t": _i64(2, 3, 2**63 - 1)},
    "ids int32": {"ids/t": torch.tensor([2, 3, 7], dtype=torch.int32)},
    "ids float": {"ids/t": torch.tensor([2.0, 3, 7])},
    "ids bool": {"ids/t": torch.tensor([True, True, True])},
    "ids 2-d": {"ids/t": _i64(2, 3, 7).reshape(1, 3)},
    "ids 0-d": {"ids/t": _i64(2).reshape(())},
    "ids few": {"ids/t": _i64(2, 3)},
    "ids many": {"ids/t": _i64(2, 3, 7, 8)},
    "ids none": {"ids/t": _i64()},
    "rows shape": {"value/t": torch.zeros(3, 2)},
    "rows few": {"value/t": torch.zeros(2, 3)},
    "rows dtype": {"value/t": torch.zeros(3, 3, dtype=torch.int32)},
    "column shape": {"column/exp_avg/t": torch.zeros(3)},
    "column dtype": {"column/exp_avg/t": torch.zeros(3, 3, dtype=torch.float16)},
    "state shape": {"state/exp_avg/w": torch.zeros(1, 2)},
    "state 0-d": {"state/exp_avg/w": torch.zeros(())},
    "state dtype": {"state/exp_avg/w": torch.zeros(2, 2, dtype=torch.float64)},
    "state empty": {"state/exp_avg_sq/w": torch.zeros(0)},
    "step shape": {"state/step/w": torch.zeros(1)},
    "step of a value's shape": {"state/step/w": torch.zeros(2, 2)},
    "step dtype": {"state/step/w": _i64(1).reshape(())},
    "step -1": {"state/step/w": torch.tensor(-1.0)},
    "step NaN": {"state/step/w": torch.tensor(float("nan"))},
    "step infinite": {"state/step/w": torch.tensor(float("inf"))},
    "step of a table": {"state/step/t": torch.zeros(3, 3)},
    "step of a table, two": {"state/step/t": torch.zeros(2)},
    "step of a table -1": {"state/step/t": torch.tensor(-1.0)},
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_do_not_fit(folder, victim, name):
    tensors = tensors_of(folder)
    for key, tensor in TENSORS[name].items():
        tensors.pop(key, None)
        if tensor is not None:
            tensors[key] = tensor
    sign_tensors(folder, tensors)
    with refused(victim, str(folder)):
        victim.load(folder)


def test_a_column_as_state_and_state_as_a_column(folder, victim):
    body, tensors = body_of(folder), tensors_of(folder)
    tensors["state/exp_avg/t"] = torch.zeros(2)
    del tensors["column/exp_avg/t"]
    body["keys"][1].update(state=["exp_avg", "step"], columns={"exp_avg_sq": 0.0})
    sign(folder, body)
    sign_tensors(folder, tensors)
    with refused(victim, str(folder)):
        victim.load(folder)
    body, tensors = body_of(folder), tensors_of(folder)
    tensors.update({"column/exp_avg/t": torch.zeros(3, 3), "column/step/t": torch.zeros(3, 3)})
    del tensors["state/exp_avg/t"], tensors["state/step/t"]
    body["keys"][1].update(state=[], columns={"exp_avg": 0.0, "exp_avg_sq": 0.0, "step": 0.0})
    sign(folder, body)
    sign_tensors(folder, tensors)
    with refused(victim, str(folder), "step"):
        victim.load(folder)


@pytest.mark.parametrize(
    ("optimizer", "name", "number"),
    [("adamax", "step", -1.0), ("nadam", "mu_product", 1.01), ("radam", "step", -3.0), ("adafactor", "step", -1.0)],
)
def test_counters_that_would_divide_by_zero(tmp_path, victim, optimizer, name, number):
    with tensorkv.create() as kv:
        kv.init("w", np.ones((2, 2), F32))
        kv.set_optimizer(optimizer)
        kv.push("w", np.ones((2, 2), F32))
        kv.save(tmp_path)
    tensors = tensors_of(tmp_path)
    tensors[f"state/{name}/w"] = torch.tensor(number)
    sign_tensors(tmp_path, tensors)
    with refused(victim, str(tmp_path), name):
        victim.load(tmp_path)


def test_bytes_that_are_no_bool(tmp_path, victim):
    with tensorkv.create() as kv:
        kv.init("flags", np.array([True, False]))
        kv.save(tmp_path)
    (file,) = tmp_path.glob("data-*")
    sign_data(tmp_path, file.read_bytes()[:-2] + b"\x02\x00")
    with refused(victim, str(tmp_path), "bool bytes other than 0 and 1"):
        victim.load(tmp_path)


def test_half_complex_pairs(tmp_path, victim):
    with tensorkv.create() as kv:
        kv.init("z", np.array([1j, 2j], np.complex64))
        kv.save(tmp_path)
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int32):
        sign_tensors(tmp_path, {"value/z": torch.zeros(2, 2, dtype=dtype)})
        with refused(victim, str(tmp_path), "complex64"):
            victim.load(tmp_path)


# ---------------------------------------------------------------- memory


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("optimizer", ["adam", "sgd", "adafactor", "muon"])
def test_claims_without_data_allocate_nothing(tmp_path, victim, optimizer):
    with tensorkv.create() as kv:
        kv.init({"w": np.ones((2, 2), F32), "t": table()})
        kv.set_optimizer(optimizer)
        kv.push("w", np.ones((2, 2), F32))
        kv.save(tmp_path / "all")
        kv.save_optimizer_states(tmp_path / "states")
    for name, load in (("all", victim.load), ("states", victim.load_optimizer_states)):
        for index, shape in ((0, [2**20, 2**20]), (1, [10, 2**40])):
            body = body_of(tmp_path / name)
            kept = body["keys"][index]["shape"]
            body["keys"][index]["shape"] = shape
            sign(tmp_path / name, body)
            with refused(victim, str(tmp_path)):
                load(tmp_path / name)
            body["keys"][index]["shape"] = kept
            sign(tmp_path / name, body)


@pytest.mark.usefixtures("little_memory")
def test_a_table_of_many_rows_costs_only_what_it_holds(tmp_path):
    with tensorkv.create() as kv, tensorkv.create() as other:
        kv.init("t", Rows(np.array([2**61]), np.ones((1, 8), F32), 2**62))
        kv.set_optimizer("adam")
        kv.push("t", Rows(np.array([5]), np.ones((1, 8), F32), 2**62))
        kv.save(tmp_path)
        other.load(tmp_path)
        assert snapshot(other) == snapshot(kv)


# ---------------------------------------------------------------- the manifest alone


def test_describe_and_restore_are_inverse():
    with store("sgd", lr=0.5, momentum=0.9) as kv, kv._engine._shard.frozen() as (entries, rule):
        body, tensors = manifest.describe("store", entries, rule)
        contents = manifest.restore(json.loads(json.dumps(body)), dict(tensors))
        manifest.check_states(contents)
        assert contents.kind == "store"
        assert manifest.describe("store", contents.entries, contents.rule)[0] == body
        assert [entry.key for entry in contents.entries] == ["w", "t"]


def test_restore_leaves_its_arguments_alone():
    with store() as kv, kv._engine._shard.frozen() as (entries, rule):
        body, tensors = manifest.describe("store", entries, rule)
        names, text = list(tensors), json.dumps(body)
        manifest.restore(body, tensors)
        assert (list(tensors), json.dumps(body)) == (names, text)


def test_names_of_tensors_differ_where_keys_do():
    keys = ["\ud800", "\\ud800", "\\\\ud800", "\\", "\\\\", "ud800"]
    names = {manifest.tensor_name("value", key) for key in keys}
    assert len(names) == len(keys)
    for name in names:
        assert list(safetensors.torch.load(safetensors.torch.save({name: torch.zeros(1)}))) == [name]


def test_a_manifest_is_read_without_its_data(folder):
    for file in folder.glob("data-*"):
        file.unlink()
    assert checkpoint.read_manifest(str(folder))["kind"] == "store"
    with pytest.raises(CheckpointError, match="missing"):
        checkpoint.read(str(folder))
