"""Looking at stores bit by bit, and rewriting checkpoints with digests that fit."""

import hashlib
import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import tensorkv
from tensorkv import Rows
from tensorkv.shard.table import Table

F32 = np.float32


def bits(tensor):
    raw = tensor.detach().contiguous().reshape(-1)
    return str(tensor.dtype), tuple(tensor.shape), raw.view(torch.uint8).numpy().tobytes() if len(raw) else b""


def snapshot(kv):
    """Return everything that a local store holds, as plain data to compare."""
    shown = []
    with kv._engine._shard.frozen() as (entries, rule):
        for entry in entries:
            value = entry.value
            held = {"": value}
            columns = {}
            if isinstance(value, Table):
                held = {"ids": value.ids, **{name: value.read(value.ids, name) for name in ["", *value.columns]}}
                columns = {name: value.fill(name) for name in value.columns}
            tensors = {name: bits(tensor) for name, tensor in held.items()}
            state = {name: bits(tensor) for name, tensor in entry.state.items()}
            spec = (tuple(entry.spec.shape), entry.spec.dtype, entry.spec.origin.library, entry.spec.is_table)
            shown.append((type(entry.key), entry.key, entry.version, spec, tensors, columns, state))
        optimizer = getattr(rule, "optimizer", None)
        return shown, type(rule), None if optimizer is None else optimizer.spec.to_json()


def table(ids=(2, 7), num_rows=10, width=3, dtype=F32):
    return Rows(np.array(ids, np.int64), np.arange(len(ids) * width).reshape(-1, width).astype(dtype), num_rows)


def store(optimizer="adam", **numbers):
    """Return a store with a dense key and a table, both with optimizer state."""
    kv = tensorkv.create()
    kv.init("w", np.arange(4, dtype=F32).reshape(2, 2))
    kv.init("t", table())
    kv.set_optimizer(optimizer, **numbers)
    kv.set_hyperparameters("w", lr=0.25)
    train(kv)
    return kv


def train(kv):
    kv.push("w", np.full((2, 2), 0.5, F32))
    kv.push("t", table(ids=(2, 3)))


@contextmanager
def refused(kv, *words):
    """Expect a CheckpointError with these words, and a store that stays as it was."""
    before = snapshot(kv)
    with pytest.raises(tensorkv.CheckpointError) as caught:
        yield
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert snapshot(kv) == before


def body_of(folder):
    return json.loads((Path(folder) / "manifest.json").read_text())["body"]


def sign(folder, body, **head):
    """Write a manifest whose digest fits."""
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    digest = hashlib.sha256(canonical).hexdigest()
    outer = {"format": "tensorkv-checkpoint", "version": 1, "sha256": digest, "body": body, **head}
    (Path(folder) / "manifest.json").write_text(json.dumps(outer))


def sign_data(folder, data, index=0):
    """Replace a data file, and let the manifest say so."""
    body = body_of(folder)
    file = body["files"][index]
    (Path(folder) / file["name"]).write_bytes(data)
    file.update(nbytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    sign(folder, body)


def tensors_of(folder):
    loaded = {}
    for file in body_of(folder)["files"]:
        loaded.update(safetensors.torch.load_file(Path(folder) / file["name"]))
    return loaded


def sign_tensors(folder, tensors):
    sign_data(folder, safetensors.torch.save(tensors))
