"""What ``tensorkv inspect`` tells of a checkpoint: from its manifest and the heads of its data files."""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import checkpoint
from .errors import CheckpointError

# The head of a safetensors file is a length in 8 bytes and JSON; the format allows no more than this.
_HEAD_BYTES = 100_000_000

_KINDS = {"store": "a store: values, versions, update rule", "optimizer-states": "optimizer states, without values"}
COLUMNS = ("key", "kind", "shape", "dtype", "version", "rows", "size", "state size")
_RIGHT = frozenset({"version", "rows", "size", "state size"})


def describe(path: str, *, verify: bool = False) -> dict[str, Any]:
    """Return what a checkpoint holds, as JSON can hold it.

    Args:
        path: a directory that ``KVStore.save`` or ``save_optimizer_states`` wrote.
        verify: read all data and check it against its digests; else only the manifest's digest is checked,
            and sizes of single keys are None where a data file is missing or damaged.

    Raises:
        CheckpointError: missing, foreign or damaged.
    """
    if verify:
        checkpoint.read(path)
    body = checkpoint.read_manifest(path)
    try:
        if body["kind"] not in _KINDS:
            raise ValueError(f"kind {body['kind']!r}")
        tensors = _tensors(Path(path), body["files"])
        return {
            "path": path,
            "kind": body["kind"],
            "update": body["update"],
            "optimizer": body["optimizer"],
            "nbytes": sum(file["nbytes"] for file in body["files"]),
            "verified": verify,
            "keys": [_describe_key(body["kind"], each, tensors) for each in body["keys"]],
            "files": [{name: file[name] for name in ("name", "nbytes", "sha256")} for file in body["files"]],
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: the manifest is not what a save writes: {error!r}") from None


def _describe_key(kind: str, described: dict[str, Any], tensors: dict[str, Any] | None) -> dict[str, Any]:
    key, is_rows = described["key"], described["kind"] == "rows"
    state = [f"state/{name}/{key}" for name in described["state"]]
    state += [f"column/{name}/{key}" for name in described["columns"]]
    value = [f"value/{key}"] if kind == "store" else []
    ids = f"ids/{key}"
    known = tensors is not None and all(name in tensors for name in [*state, *value, *([ids] if is_rows else [])])
    sizes = {name: head["data_offsets"][1] - head["data_offsets"][0] for name, head in (tensors or {}).items()}
    return {
        **{name: described[name] for name in ("key", "kind", "shape", "dtype", "version", "library", "device")},
        "rows": tensors[ids]["shape"][0] if is_rows and known and tensors else None,
        "nbytes": sum(sizes[name] for name in [*value, *([ids] if is_rows else [])]) if known else None,
        "state": sorted([*described["state"], *described["columns"]]),
        "state_nbytes": sum(sizes[name] for name in state) if known else None,
    }


def _tensors(folder: Path, files: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return name to shape and place of every tensor, None if a file does not tell."""
    heads: dict[str, Any] = {}
    try:
        for file in files:
            if Path(file["name"]).name != file["name"]:
                return None
            heads |= _read_head(folder / file["name"])
    except (OSError, ValueError, TypeError, struct.error):
        return None
    heads.pop("__metadata__", None)
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
    return head


# ---------------------------------------------------------------- for people


def summary(report: dict[str, Any]) -> list[str]:
    """Return the lines that stand above the table of keys."""
    count, files = len(report["keys"]), len(report["files"])
    checked = "every digest checked" if report["verified"] else "only the manifest checked; --verify reads everything"
    lines = [
        f"{printable(report['path'])}: checkpoint of {_KINDS[report['kind']]}",
        f"keys:   {count}",
        f"update: {_update(report)}",
        f"size:   {size(report['nbytes'])} in {files} data file{'' if files == 1 else 's'} ({checked})",
    ]
    return lines + [f"file:   {printable(file['name'])}  {size(file['nbytes'])}" for file in report["files"]]


def _update(report: dict[str, Any]) -> str:
    optimizer = report["optimizer"]
    if report["update"] == "updater":
        return "an updater function, which a checkpoint cannot hold; set it again after load"
    if optimizer is None:
        return "assign"
    try:
        numbers = {key: optimizer[key] for key in ("rescale_grad", "clip_gradient")}
        text = f"optimizer {optimizer['name']}({_numbers(optimizer['numbers'] | numbers)})"
        own = [f"{_show_key(key)} has {_numbers(changed)}" for key, changed in optimizer["overrides"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{report['path']}: the optimizer is not what a save writes: {error!r}") from None
    return printable("; ".join([text, *own]))


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
            size(key["state_nbytes"]) if key["state"] else "",
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
    """Show bytes as people read them, ``?`` for None.

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
    r"""Escape what a terminal would obey: a checkpoint may come from anywhere.

    >>> print(printable("a\x1b[31m"))
    a\x1b[31m
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _show_key(key: Any) -> str:
    return printable(f'"{key}"' if isinstance(key, str) else str(key))
