"""Checkpoints: a directory of safetensors files and a JSON manifest with their sizes and sha256.

A save writes new data files under names of their own, then replaces ``manifest.json`` by a rename, which
is the moment when the new checkpoint counts; only then are the old data files removed. A load checks
digests first, then everything that they cover. docs/checkpoint-format.md has the format.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from tensorkv.errors import CheckpointError
from tensorkv.shard.changes import RequestIds
from tensorkv.shard.shard import Shard

from . import manifest
from .folder import sync
from .manifest import Contents, Kind, Tensors

FORMAT = "tensorkv-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
_DATA_NAME = re.compile(r"data-[0-9a-f]{16}-[0-9]{5}\.safetensors")
_OWN_NAME = re.compile(rf"manifest-[0-9a-f]{{16}}\.tmp|{_DATA_NAME.pattern}")
# Serialising holds a file's tensors in memory twice, so files are kept to about this size.
FILE_BYTES = 1 << 30
# safetensors takes no more than 100 MB of names and shapes in a file.
HEAD_BYTES = 90_000_000
_MANIFEST_BYTES = 1 << 28


def restore(
    shard: Shard, contents: Contents, *, notes: Mapping[str, Any] | None = None, requests: RequestIds = ()
) -> None:
    """Put contents into a shard, and the notes of a store.

    Raises:
        CheckpointError: they do not fit; the shard is as it was.
    """
    with shard.frozen() as (held, _):
        manifest.check_fits(contents, {entry.key: entry for entry in held})
        put(shard, contents, notes=notes, requests=requests)


def put(shard: Shard, contents: Contents, *, notes: Mapping[str, Any] | None = None, requests: RequestIds = ()) -> None:
    """Put contents that fit into a shard, and the notes of a store."""
    match contents.kind:
        case "store":
            shard.restore(contents.entries, contents.rule, contents.releases, notes, requests=requests)
        case "keys":
            new = {entry.key: entry for entry in contents.entries}
            with shard.frozen() as (held, _):
                shard.restore([new.get(entry.key, entry) for entry in held], contents.rule, requests=requests)
        case "optimizer-states":
            shard.restore_states(contents.entries, contents.rule, requests=requests)


# ---------------------------------------------------------------- files


def write(path: str, contents: Contents) -> None:
    """Write a checkpoint's files so that a crash at any moment leaves the old checkpoint or the new.

    Raises:
        CheckpointError: the path holds something else, or cannot be written.
    """
    token = secrets.token_hex(8)
    body, tensors = manifest.describe(contents.kind, contents.entries, contents.rule, contents.owed, contents.releases)
    with writing(path, token):
        publish(path, token, {**body, "files": write_files(path, token, 0, tensors)})


@contextmanager
def writing(path: str, token: str) -> Iterator[None]:
    """Open a folder for a checkpoint whose files have this token in their names; on an error, remove them."""
    folder = Path(path)
    with _explaining(path):
        _open_folder(folder)
        with _locked(folder, exclusive=True):
            try:
                yield
            except BaseException:
                _discard(folder, token)
                raise


def write_files(path: str, token: str, first: int, tensors: Tensors) -> list[dict[str, Any]]:
    """Write data files, numbered from ``first`` on, and return what the manifest says of them."""
    with _explaining(path):
        return [
            _write_data(Path(path) / f"data-{token}-{number:05}.safetensors", group)
            for number, group in enumerate(_groups(tensors), start=first)
        ]


def publish(path: str, token: str, body: dict[str, Any]) -> None:
    """Replace the manifest by one whose data files are written, and remove the files of the old one."""
    folder = Path(path)
    with _explaining(path):
        temporary = folder / f"manifest-{token}.tmp"
        _write_manifest(temporary, body)
        sync(folder)
        for file in body["files"]:
            # A manifest is put in force only beside the files that it names: the path may lead elsewhere by now.
            if not (folder / file["name"]).is_file():
                raise CheckpointError(
                    f"{path}: {file['name']}, which this save has written, is missing: the directory was renamed or "
                    "replaced meanwhile; nothing has changed in the present one; save again"
                )
        os.replace(temporary, folder / MANIFEST)
        sync(folder)
        # What cannot be removed now, the next save removes: this one is written.
        with suppress(OSError):
            _remove(folder, lambda name: token not in name)


@contextmanager
def _explaining(path: str) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot write the checkpoint: {error}") from error


def read(path: str, kind: Kind | None = None) -> Contents:
    """Read and check a checkpoint.

    Args:
        path: of its directory.
        kind: that it must have (None: any).

    Raises:
        CheckpointError: missing, foreign, damaged, of a newer version, of another kind, or not what ``write`` writes.
    """
    folder = Path(path)
    try:
        with _locked(folder, exclusive=False):
            signed = _read_signed(path)
            body = signed["body"]
            tensors: Tensors = {}
            for described in body["files"]:
                read_here = _read_data(folder, described)
                if not tensors.keys().isdisjoint(read_here):
                    raise CheckpointError(f"{path}: duplicate tensor in two data files")
                tensors.update(read_here)
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no checkpoint here (no such directory)") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot read the checkpoint: {error}") from error
    with naming(path):
        contents = manifest.restore(body, tensors)
    if contents.kind != (kind or contents.kind):
        raise CheckpointError(
            f"{path}: holds {contents.kind}, expected {kind}; load it with the counterpart of the save that wrote it"
        )
    return replace(contents, digest=signed["sha256"])


def is_missing(path: str) -> bool:
    """Return whether nothing was saved here yet; a crash in the first save may have left files without a manifest."""
    try:
        names = os.listdir(path)
    except FileNotFoundError:
        return True
    except OSError:
        # Reading it raises an error that says what is wrong.
        return False
    return all(_OWN_NAME.fullmatch(name) for name in names)


def read_manifest(path: str) -> dict[str, Any]:
    """Return the body of a checkpoint's manifest after checking its digest, without reading tensors."""
    body: dict[str, Any] = _read_signed(path)["body"]
    return body


def _read_signed(path: str) -> dict[str, Any]:
    """Return a checkpoint's manifest with its digest, which is checked."""
    file = Path(path) / MANIFEST
    try:
        text = _read_bytes(file, limit=_MANIFEST_BYTES)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no checkpoint here (no {MANIFEST})") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from error
    try:
        outer = json.loads(text)
        # Also finds repeated names, NaN, and numbers written in another way.
        exact = _encode(outer) == text
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not JSON: {error}") from None
    if not isinstance(outer, dict) or outer.get("format") != FORMAT:
        raise CheckpointError(f"{file}: not a {FORMAT}")
    if type(outer.get("version")) is not int or outer["version"] != VERSION:
        found = outer.get("version")
        raise CheckpointError(f"{file}: format version {found!r}, this tensorkv reads {VERSION}; use a newer one")
    body = outer.get("body")
    if not isinstance(body, dict) or not isinstance(body.get("files"), list):
        raise CheckpointError(f"{file}: expected a list of files")
    if not exact or outer.get("sha256") != _digest(_canonical(body)):
        raise CheckpointError(f"{file}: damaged: its sha256 does not fit its contents")
    return outer


def _open_folder(folder: Path) -> None:
    missing = [each for each in folder.parents if not each.exists()]
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: is a file; a checkpoint is a directory") from None
        names = os.listdir(folder)
        if MANIFEST in names:
            # Another program's manifest must not be replaced; a damaged one of ours may.
            if f'"{FORMAT}"'.encode() not in _read_bytes(folder / MANIFEST, limit=_MANIFEST_BYTES)[:200]:
                raise CheckpointError(
                    f"{folder}: its {MANIFEST} is not a {FORMAT}'s; give a new or empty directory"
                ) from None
        elif any(not _OWN_NAME.fullmatch(name) for name in names):
            raise CheckpointError(
                f"{folder}: holds other files and no checkpoint; give a new or empty directory"
            ) from None
    for each in (folder, *missing):
        sync(each.parent)


def _groups(tensors: Tensors) -> Iterator[Tensors]:
    group: Tensors = {}
    room, head_room = FILE_BYTES, HEAD_BYTES
    for name, tensor in tensors.items():
        # JSON may escape a byte as six; dtype, shape and place come with the name.
        head = 6 * len(name.encode()) + 256
        if group and (tensor.nbytes > room or head > head_room):
            yield group
            group, room, head_room = {}, FILE_BYTES, HEAD_BYTES
        group[name] = tensor
        room, head_room = room - tensor.nbytes, head_room - head
    if group:
        yield group


def _write_data(file: Path, group: Tensors) -> dict[str, Any]:
    data = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in group.items()})
    _write_synced(file, data)
    return {"name": file.name, "nbytes": len(data), "sha256": _digest(data)}


def _write_manifest(file: Path, body: dict[str, Any]) -> None:
    data = _encode({"format": FORMAT, "version": VERSION, "sha256": _digest(_canonical(body)), "body": body})
    if len(data) > _MANIFEST_BYTES:
        raise CheckpointError(
            f"{file.parent}: a manifest of {len(data)} bytes, of which at most {_MANIFEST_BYTES} can be read again; "
            "save fewer keys or releases"
        )
    _write_synced(file, data)


def _encode(head: Any) -> bytes:
    # With an indent, Python would do this without its encoder in C.
    return json.dumps(head, allow_nan=False).encode()


def _canonical(body: dict[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _write_synced(file: Path, data: bytes) -> None:
    with open(file, "xb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())


def _remove(folder: Path, wanted: Callable[[str], bool]) -> None:
    for name in os.listdir(folder):
        if _OWN_NAME.fullmatch(name) and wanted(name):
            (folder / name).unlink(missing_ok=True)


def _discard(folder: Path, token: str) -> None:
    """Remove the files of a save that failed, unless its manifest took its place before that."""
    with suppress(OSError, CheckpointError):
        try:
            in_force = token.encode() in _read_bytes(folder / MANIFEST, limit=_MANIFEST_BYTES)
        except FileNotFoundError:
            in_force = False
        if not in_force:
            _remove(folder, lambda name: token in name)


def _read_data(folder: Path, described: Any) -> Tensors:
    name, nbytes = (described.get("name"), described.get("nbytes")) if isinstance(described, dict) else (None, None)
    if not isinstance(name, str) or not _DATA_NAME.fullmatch(name) or type(nbytes) is not int:
        raise CheckpointError(f"{folder}: invalid data file {name!r} in the manifest")
    file = folder / name
    try:
        data = _read_bytes(file, limit=nbytes)
    except FileNotFoundError:
        raise CheckpointError(f"{file}: missing") from None
    if len(data) != nbytes:
        raise CheckpointError(f"{file}: truncated: {len(data)} bytes of {nbytes}")
    if _digest(data) != described.get("sha256"):
        raise CheckpointError(f"{file}: damaged: its sha256 is not the manifest's")
    try:
        # It makes tensors without elements on the caller's default device.
        with torch.device("cpu"):
            return safetensors.torch.load(data)
    except Exception as error:  # safetensors raises what its parser meets
        raise CheckpointError(f"{file}: not safetensors: {error}") from None


def _read_bytes(file: Path, limit: int) -> bytes:
    # Neither follow a link out of the folder nor wait on a pipe.
    descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{file}: not a regular file")
        if status.st_size > limit:
            raise CheckpointError(f"{file}: {status.st_size} bytes, expected at most {limit}")
        with open(descriptor, "rb", closefd=False) as handle:
            return handle.read(status.st_size)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(folder: Path, *, exclusive: bool) -> Iterator[None]:
    """Keep two saves, or a save and a load, of one folder apart where the file system has locks."""
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Put the path before the messages of errors that contents raise."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
