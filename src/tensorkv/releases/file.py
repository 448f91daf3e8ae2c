"""Changes between two releases as a safetensors file, for readers without a store.

The metadata has the key ``tensorkv``, a JSON object: ``format`` (1), ``base`` and ``name``, ``base_digest`` and
``digest`` of the releases, ``blake2b`` of all data, and ``keys``: of each its name, kind, shape, dtype, library,
whether it is a table and how its rows start (``init``), its digests ``before`` (null: the older release does not have
the key), ``after`` and ``gone``, and whether it has indices and values. Those of the n-th key are the tensors
``indices/n`` and ``values/n``, of bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import torch

from tensorkv.arrays import interop
from tensorkv.arrays.arguments import Key, absolute_path, check_key
from tensorkv.arrays.rowinit import RowInit
from tensorkv.arrays.spec import KeySpec
from tensorkv.errors import ArgumentError, CheckpointError, TensorKVError, show
from tensorkv.runtime.modes import runs_outside_modes

from .changes import KINDS, Changes, KeyChange
from .elements import Bytes

_FORMAT = 1


def save_changes(path: str | os.PathLike[str], changes: Changes) -> None:
    """Write changes to a file, atomically replacing an existing one.

    A process that is killed meanwhile may leave ``.NAME-….tmp`` beside the file, which can be deleted.

    Args:
        path: of a safetensors file.
        changes: of ``Release.changes``.

    Raises:
        ArgumentError: not changes, or not a path.
        CheckpointError: the file cannot be written.

    >>> import numpy as np, tempfile, tensorkv
    >>> kv = tensorkv.create()
    >>> kv.init("w", np.zeros(4, np.float32))
    >>> kv.publish("step-1")
    >>> kv.push("w", np.array([0, 0, 5, 0], np.float32))
    >>> kv.publish("step-2")
    >>> with tempfile.TemporaryDirectory() as folder, kv.open_release("step-2") as release:
    ...     tensorkv.save_changes(f"{folder}/step-2.safetensors", release.changes(since="step-1"))
    ...     loaded = tensorkv.load_changes(f"{folder}/step-2.safetensors")
    >>> tensorkv.apply_changes({"w": np.zeros(4, np.float32)}, loaded)
    {'w': array([0., 0., 5., 0.], dtype=float32)}
    """
    if not isinstance(changes, Changes):
        raise ArgumentError(f"save_changes: got {show(changes)}; expected what Release.changes returns")
    target = Path(absolute_path("save_changes", path, "file"))
    tensors: dict[str, Bytes] = {}
    keys = []
    for number, each in enumerate(changes):
        for name, part in (("indices", each.places), ("values", each.content)):
            if part is not None:
                tensors[f"{name}/{number}"] = np.ascontiguousarray(part)
        keys.append(_describe(each))
    told = {
        "format": _FORMAT,
        "base": changes.base,
        "name": changes.name,
        "base_digest": changes.base_digest,
        "digest": changes.digest,
        "blake2b": _checksum(tensors),
        "keys": keys,
    }
    try:
        temporary = target.with_name(f".{target.name}-{secrets.token_hex(4)}.tmp")
        data = safetensors.numpy.save(tensors, {"tensorkv": json.dumps(told)})
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
    except (OSError, safetensors.SafetensorError, ValueError) as error:
        raise CheckpointError(f"save_changes: {target} cannot be written: {error}") from error


@runs_outside_modes
def load_changes(path: str | os.PathLike[str]) -> Changes:
    """Read changes from a file that ``save_changes`` has written; nothing in it is trusted.

    Args:
        path: of the file.

    Returns:
        The changes. Arrays of JAX and CuPy come back as arrays of NumPy and torch, which need no device.

    Raises:
        ArgumentError: not a path.
        CheckpointError: the file cannot be read, is damaged, or does not contain changes.
    """
    source = absolute_path("load_changes", path, "file")
    try:
        with safetensors.safe_open(source, "np") as file:
            told = json.loads((file.metadata() or {})["tensorkv"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        if told["format"] != _FORMAT:
            raise ValueError(f"version {told['format']} of the format, this package reads {_FORMAT}")
        if told["blake2b"] != _checksum(tensors):
            raise ValueError("its data do not have the checksum that was written")
        found = [_restore(each, number, tensors) for number, each in enumerate(told["keys"])]
        if tensors:
            raise ValueError(f"unexpected tensor {next(iter(tensors))}")
        base = None if told["base"] is None else str(told["base"])
        if base is None and any(each.kind != "dense" for each in found):
            raise ValueError("changes without a base that are not whole values")
        # A key that is new with another shape or dtype is also there as deleted.
        _refuse_duplicates([each.key for each in found if each.kind != "deleted"])
        _refuse_duplicates([each.key for each in found if each.before is not None])
        changes = Changes(base, str(told["name"]), found)
        if (changes.base_digest, changes.digest) != (told["base_digest"], told["digest"]):
            raise ValueError("the digests of its keys are not those of its releases")
    except (
        OSError,
        TensorKVError,
        safetensors.SafetensorError,
        LookupError,
        TypeError,
        ValueError,
        RecursionError,
    ) as error:
        raise CheckpointError(f"load_changes: {source} cannot be read: {error}") from error
    return changes


def _describe(change: KeyChange) -> dict[str, Any]:
    return {
        "key": change.key,
        "kind": change.kind,
        "shape": list(change.shape),
        "dtype": change.dtype,
        "library": change.spec.origin.library,
        "table": change.spec.is_table,
        **({} if change.spec.init is None else {"init": change.spec.init.to_json()}),
        "before": change.before,
        "after": change.after,
        "gone": change.gone,
        "has": [change.places is not None, change.content is not None],
    }


def _restore(told: Any, number: int, tensors: dict[str, Any]) -> KeyChange:
    """Check and return a change; its tensors are taken out of ``tensors``."""
    key, sizes, is_table = check_key("load_changes", told["key"]), told["shape"], told["table"]
    dtype: Any = getattr(torch, told["dtype"], None)
    is_known = told["kind"] in KINDS and dtype in interop.DTYPES and type(is_table) is bool
    # Of a table, only a row has to fit into memory.
    if not is_known or not all(map(_is_number, sizes)) or math.prod(size or 1 for size in sizes[is_table:]) >= 1 << 58:
        raise ValueError(f"{key!r} is not described as a change is")
    digests = [told["before"], told["after"], told["gone"]]
    if not all(map(_is_number, digests[told["before"] is None :])):
        raise ValueError(f"{key!r} has the digests {digests!r:.100}")
    origin = interop.NUMPY if told["library"] in ("numpy", "jax") else interop.Origin("torch")
    init = RowInit.from_json(told["init"]) if is_table and "init" in told else None
    change = KeyChange(key, told["kind"], KeySpec(torch.Size(sizes), dtype, origin, is_table, init))
    change.before, change.after, change.gone = digests
    has_places, has_content = told["has"]
    change.places = _take(tensors, f"indices/{number}") if has_places else None
    change.content = _take(tensors, f"values/{number}") if has_content else None
    change.check()
    return change


def _refuse_duplicates(keys: Sequence[Key]) -> None:
    seen: set[Key] = set()
    for key in keys:
        if key in seen:
            raise ValueError(f"duplicate key {key!r}")
        seen.add(key)


def _is_number(number: Any) -> bool:
    return type(number) is int and 0 <= number < 1 << 64


def _take(tensors: dict[str, Any], name: str) -> Bytes:
    found: Bytes = tensors.pop(name)
    if found.dtype != np.uint8 or found.ndim != 1:
        raise ValueError(f"{name} is not bytes")
    return found


def _checksum(tensors: dict[str, Any]) -> str:
    """Return a checksum of all tensors, by name."""
    digest = hashlib.blake2b(digest_size=16)
    names: Sequence[str] = sorted(tensors)
    for name in names:
        digest.update(f"{name}:{tensors[name].nbytes};".encode())
        digest.update(np.ascontiguousarray(tensors[name]).data)
    return digest.hexdigest()
