"""Describe a checkpoint or the folder of a store, for ``tensorkv inspect``.

A checkpoint is described by its manifest and the headers of its data files, a store by its snapshot and log.
"""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tensorkv.errors import CheckpointError, StorageError
from tensorkv.storage import checkpoint
from tensorkv.storage.folder import Folder
from tensorkv.storage.manifest import tensor_name
from tensorkv.storage.record import Record
from tensorkv.storage.wal import SEGMENT_NAME, SNAPSHOT_NAME, LogReader

# The head of a safetensors file is a length in 8 bytes and JSON; the format allows no more than this.
_HEAD_BYTES = 100_000_000

_KINDS = {
    "store": "checkpoint of a store: values, versions, update rule",
    "optimizer-states": "checkpoint of optimizer states, without values",
    "folder": "a store in its folder",
}
COLUMNS = ("key", "kind", "shape", "dtype", "version", "rows", "size", "state size")
# How many keys with the same overrides a line names.
_NAMED = 4
_RIGHT = frozenset({"version", "rows", "size", "state size"})


def describe(path: str, *, verify: bool = False) -> dict[str, Any]:
    """Return the contents of a checkpoint, or of the folder of a store, as plain data for JSON.

    Args:
        path: a directory that ``KVStore.save`` or ``save_optimizer_states`` wrote, or a store's ``path``.
        verify: read all data and check it against its digests. Otherwise only the manifest's digest is checked,
            and the sizes of single keys are None if a data file is missing or damaged.

    Raises:
        CheckpointError: missing, foreign or damaged.
        StorageError: the same of a store's folder.
    """
    folder = Path(path)
    if folder.is_dir() and not (folder / checkpoint.MANIFEST).exists():
        if any(SNAPSHOT_NAME.fullmatch(each.name) or SEGMENT_NAME.fullmatch(each.name) for each in folder.iterdir()):
            return _describe_store(path)
        inside = sorted(each.name for each in folder.iterdir() if _can_be_inspected(each))
        if inside:
            raise CheckpointError(
                f"{path}: no checkpoint and no store here, but in {', '.join(inside)}; inspect {folder / inside[0]}"
            )
    if verify:
        checkpoint.read(path)
    body = checkpoint.read_manifest(path)
    try:
        if body["kind"] not in ("store", "optimizer-states"):
            raise ValueError(f"kind {body['kind']!r}")
        tensors = _tensors(Path(path), body["files"])
        return {
            "path": path,
            "kind": body["kind"],
            "update": body["update"],
            "optimizer": body["optimizer"],
            "nbytes": sum(file["nbytes"] for file in body["files"]),
            "verified": verify,
            "releases": [each["name"] for each in body.get("releases", {"held": []})["held"]],
            "keys": [_describe_key(body["kind"], each, tensors) for each in body["keys"]],
            "files": [{name: file[name] for name in ("name", "nbytes", "sha256")} for file in body["files"]],
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: the manifest is not what a save writes: {error!r}") from None


def _describe_key(kind: str, described: dict[str, Any], tensors: dict[str, Any] | None) -> dict[str, Any]:
    key, is_rows = described["key"], described["kind"] != "dense"
    state = [tensor_name(f"state/{name}", key) for name in described["state"]]
    state += [tensor_name(f"column/{name}", key) for name in described["columns"]]
    value = [tensor_name("value", key)] if kind == "store" else []
    ids = tensor_name("ids", key)
    value += [ids] if is_rows else []
    found = {name: tensors[name] for name in [*state, *value] if name in tensors} if tensors else {}
    known = len(found) == len(state) + len(value) and (not is_rows or len(found[ids]["shape"]) == 1)
    sizes = {name: head["data_offsets"][1] - head["data_offsets"][0] for name, head in found.items()}
    return {
        **{name: described[name] for name in ("key", "kind", "shape", "dtype", "version", "library", "device")},
        "rows": found[ids]["shape"][0] if is_rows and known else None,
        "nbytes": sum(sizes[name] for name in value) if known else None,
        "state": sorted([*described["state"], *described["columns"]]),
        "state_nbytes": sum(sizes[name] for name in state) if known else None,
    }


def _tensors(folder: Path, files: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return shape and offsets of every tensor by name; None if a file is missing or damaged."""
    heads: dict[str, Any] = {}
    try:
        for file in files:
            if Path(file["name"]).name != file["name"]:
                return None
            heads |= _read_head(folder / file["name"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, struct.error):
        return None
    return heads


def _read_head(file: Path) -> dict[str, Any]:
    # Neither follow a link out of the folder nor wait on a pipe.
    descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb") as handle:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError(f"{file}: not a regular file")
        (length,) = struct.unpack("<Q", handle.read(8))
        if length > _HEAD_BYTES:
            raise ValueError(f"{file}: not safetensors")
        head: dict[str, Any] = json.loads(handle.read(length))
    head.pop("__metadata__", None)
    for entry in head.values():
        begin, end = entry["data_offsets"]
        if not all(isinstance(each, int) for each in (begin, end, *entry["shape"])) or not 0 <= begin <= end:
            raise ValueError(f"{file}: {entry}")
    return head


# ---------------------------------------------------------------- a store in its folder


def _can_be_inspected(folder: Path) -> bool:
    return folder.is_dir() and any(
        each.name == checkpoint.MANIFEST or SNAPSHOT_NAME.fullmatch(each.name) or SEGMENT_NAME.fullmatch(each.name)
        for each in folder.iterdir()
    )


def _describe_store(path: str) -> dict[str, Any]:
    """Read snapshot and log, changing nothing, also while a store has the folder open."""
    folder = Folder(path)
    try:
        while True:
            log = LogReader(folder)
            try:
                contents = _read_contents(path, log)
                sizes = {name: (Path(path) / name).stat().st_size for name in log.names}
                break
            except (OSError, StorageError):
                # A store that has the folder open may have replaced these files meanwhile.
                if set(log.names) <= set(folder.names()):
                    raise
    finally:
        folder.close()
    return {
        "path": path,
        "kind": "folder",
        "update": contents.update,
        "optimizer": contents.optimizer,
        "nbytes": sum(sizes.values()),
        "verified": True,
        "changes": contents.changes,
        "releases": [name for name, is_visible in contents.releases.items() if is_visible],
        "keys": list(contents.keys.values()),
        "files": [{"name": name, "nbytes": nbytes, "sha256": None} for name, nbytes in sizes.items()],
    }


def _read_contents(path: str, log: LogReader) -> _Contents:
    contents = _Contents()
    try:
        for record, is_snapshot in log.records():
            (contents.take_snapshot if is_snapshot else contents.take_change)(record)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{path}: a record is not one that a store writes: {error!r}") from error
    return contents


class _Contents:
    """The contents of a store's folder, put together from its records, without the values of tensors."""

    def __init__(self) -> None:
        self.keys: dict[Any, dict[str, Any]] = {}
        self.update: str = "assign"
        self.optimizer: dict[str, Any] | None = None
        self.changes = 0
        self.releases: dict[str, bool] = {}
        """Names, from the oldest to the newest, and whether readers see them."""
        self._tensors: dict[str, Any] = {}

    def take_snapshot(self, record: Record) -> None:
        self._read(record)
        if record.head["verb"] == "end":
            body = record.head["body"]
            self.update, self.optimizer = body["update"], body["optimizer"]
            self._add(body)
            known = body.get("releases", {"held": []})
            self.releases = {each["name"]: each.get("is_visible", True) for each in known["held"]}

    def take_change(self, record: Record) -> None:
        head = record.head
        match head["verb"]:
            case "push" | "push_scaled" | "put":
                self._count_updates(record, head["verb"])
            case "slices":
                self._count_updates(record, head["push"]["verb"])
            case "init":
                self._read(record)
                self._add(head["body"])
            case "delete":
                for key in head["keys"]:
                    del self.keys[key]
            case "rule":
                self.update, self.optimizer = head["update"], head.get("optimizer")
            case "publish" | "show_release" | "unpublish":
                self._take_release(head)
            case _:
                return
        self.changes += head["verb"] != "show_release"

    def _count_updates(self, record: Record, verb: str) -> None:
        # Slices update nothing until they are all there.
        for key in dict.fromkeys(item.key for item in record.items() if item.role not in ("bounds", "slices")):
            described = self.keys[key]
            described["version"] += 1
            if described["kind"] != "dense":
                described["rows"] = described["nbytes"] = None
            if verb != "put" and self.optimizer is not None:
                # The step may have created state, or rows of it, which is in no record.
                described["state"] = described["state"] or None
                described["state_nbytes"] = None

    def _take_release(self, head: dict[str, Any]) -> None:
        if head["verb"] == "unpublish":
            for name in head["names"]:
                self.releases.pop(name, None)
            return
        if head["verb"] == "publish":
            # After the others.
            self.releases.pop(head["name"], None)
            self.releases[head["name"]] = False
        if head["name"] in self.releases and head.get("is_visible", True):
            self.releases[head["name"]] = True
            visible = [name for name, is_visible in self.releases.items() if is_visible]
            for name in visible[: -head["keep"]] if head["keep"] is not None else ():
                del self.releases[name]

    def _read(self, record: Record) -> None:
        for item in record.items():
            tensor = item.tensor
            self._tensors[str(item.key)] = {"shape": list(tensor.shape), "data_offsets": [0, tensor.nbytes]}

    def _add(self, body: dict[str, Any]) -> None:
        for each in body["keys"]:
            self.keys[each["key"]] = _describe_key("store", each, self._tensors)
        self._tensors = {}


# ---------------------------------------------------------------- text


def summary(report: dict[str, Any]) -> list[str]:
    """Return the lines above the table of keys."""
    count, files = len(report["keys"]), len(report["files"])
    checked = "every digest checked" if report["verified"] else "only the manifest checked; --verify reads everything"
    what = _KINDS[report["kind"]]
    if "changes" in report:
        changes = report["changes"]
        what += f", with {changes} change{'' if changes == 1 else 's'} in its log"
    update, *own = _update(report)
    lines = [
        f"{printable(report['path'])}: {what}",
        f"keys:   {count}",
        f"update: {update}",
        *(f"        {line}" for line in own),
        *([f"releases: {_listed([printable(name) for name in report['releases']])}"] if report.get("releases") else []),
        f"size:   {size(report['nbytes'])} in {files} data file{'' if files == 1 else 's'} ({checked})",
    ]
    return lines + [f"file:   {printable(file['name'])}  {size(file['nbytes'])}" for file in report["files"]]


def _update(report: dict[str, Any]) -> list[str]:
    """Return the update rule, and then a line for each group of keys with the same overrides."""
    optimizer = report["optimizer"]
    if report["update"] == "updater":
        return ["an updater function, which is not saved; set it again"]
    if optimizer is None:
        return ["assign"]
    try:
        numbers = {key: optimizer[key] for key in ("rescale_grad", "clip_gradient")}
        text = f"optimizer {optimizer['name']}({_numbers(optimizer['numbers'] | numbers)})"
        groups: dict[str, list[str]] = {}
        for key, changed in optimizer["overrides"]:
            groups.setdefault(_numbers(changed), []).append(_show_key(key))
        own = [f"{own_numbers}: {_listed(keys)}" for own_numbers, keys in groups.items()]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{report['path']}: the optimizer is not what a save writes: {error!r}") from None
    return [printable(line) for line in [text, *own]]


def _listed(keys: list[str]) -> str:
    """Show the first of many keys.

    >>> _listed(['"a"', '"b"']), _listed(list("abcdefg"))
    ('"a", "b"', 'a, b, c and 4 more')
    """
    return ", ".join(keys) if len(keys) <= _NAMED else f"{', '.join(keys[:3])} and {len(keys) - 3} more"


def _numbers(numbers: dict[str, Any]) -> str:
    return ", ".join(f"{name}={number!r}" for name, number in numbers.items())


def table(report: dict[str, Any]) -> list[list[str]]:
    """Return the table's cells, a list for each key in the order of ``COLUMNS``."""
    return [
        [
            _show_key(key["key"]),
            printable(str(key["kind"])),
            printable("(" + ", ".join(map(str, key["shape"])) + ("," if len(key["shape"]) == 1 else "") + ")"),
            printable(str(key["dtype"])),
            printable(str(key["version"])),
            "" if key["kind"] == "dense" else "?" if key["rows"] is None else str(key["rows"]),
            size(key["nbytes"]),
            "" if key["state"] == [] else size(key["state_nbytes"]),
        ]
        for key in report["keys"]
    ]


def plain(rows: list[list[str]]) -> list[str]:
    """Return the table as aligned lines without colours or frames."""
    lines = [list(COLUMNS), *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        [
            cell.rjust(width) if name in _RIGHT else cell.ljust(width)
            for name, cell, width in zip(COLUMNS, line, widths, strict=True)
        ]
        for line in lines
    ]
    return ["  ".join(line).rstrip() for line in aligned]


def rich_table(rows: list[list[str]]) -> Any:
    """Return the table for a terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.SIMPLE_HEAD)
    for name in COLUMNS:
        drawn.add_column(name, justify="right" if name in _RIGHT else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*map(Text, row))  # Text, since a key may look like markup
    return drawn


def size(nbytes: int | None) -> str:
    """Show a number of bytes with a binary unit; ``?`` for None.

    >>> size(24), size(1536), size(3 << 30)
    ('24 B', '1.5 KiB', '3.0 GiB')
    """
    if nbytes is None:
        return "?"
    if nbytes < 1024:
        return f"{nbytes} B"
    number = float(nbytes)
    for unit in ("KiB", "MiB", "GiB"):
        number /= 1024
        if number < 1024:
            return f"{number:.1f} {unit}"
    return f"{number / 1024:.1f} TiB"


def printable(text: str) -> str:
    r"""Escape control characters, since the names in a checkpoint may come from anywhere.

    >>> print(printable("a\x1b[31m"))
    a\x1b[31m
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _show_key(key: Any) -> str:
    return printable(f'"{key}"' if isinstance(key, str) else str(key))
