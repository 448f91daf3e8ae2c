"""The releases of a shard as plain data and named tensors, as a snapshot of a folder has them, and back."""

from __future__ import annotations

from typing import Any

from tensorkv.errors import StorageError
from tensorkv.shard.entry import FrozenEntry
from tensorkv.shard.releases import HeldRelease
from tensorkv.shard.rules import Assign
from tensorkv.shard.shard import Shard, ShardSnapshot

from . import manifest


def describe(shard: Shard) -> tuple[dict[str, Any], manifest.Tensors]:
    """Return the releases of a shard, and the values that only they hold; a value that has not changed is not repeated.

    Returns:
        ``{"numbers": of each name, "generation", "copies": manifests and notes, "held": releases}``. A release has,
        for each key, the place of its copy, None if its value is the present one. Tensors are named as in a manifest,
        after ``release/`` and the place of the copy.
    """
    copies: dict[int, int] = {}
    bodies: list[Any] = []
    tensors: manifest.Tensors = {}
    held = []
    for release in shard.releases.lasting():
        keys: list[list[Any]] = []
        for key, entry in release.snapshot.held.items():
            if shard.shares(entry):
                keys.append([key, None])
                continue
            place = copies.setdefault(id(entry), len(bodies))
            if place == len(bodies):
                body, own = manifest.describe("store", [entry], Assign())
                bodies.append({"body": body, "note": entry.note})
                tensors |= {f"{manifest.RELEASE}{place}/{name}": tensor for name, tensor in own.items()}
            keys.append([key, place])
        held.append(
            {
                "name": release.name,
                "number": release.number,
                "is_visible": release.is_visible,
                "owner": release.owner,
                "attempt": release.attempt,
                "keys": keys,
            }
        )
    of_all = {"numbers": shard.releases.numbers, "generation": shard.releases.generation}
    return {**of_all, "copies": bodies, "held": held}, tensors


def take_tensors(tensors: manifest.Tensors) -> list[manifest.Tensors]:
    """Remove the tensors of releases from those of a snapshot, and return them by the place of the copy."""
    found = manifest.take_copies(tensors)
    return [found.get(str(place), {}) for place in range(len(found))]


def restore(shard: Shard, data: Any, tensors: list[manifest.Tensors]) -> None:
    """Hold the releases that ``describe`` has described, beside the values of a shard that were restored.

    Raises:
        StorageError, LookupError, TypeError, ValueError: they are malformed.
    """
    bodies = data["copies"]
    if len(bodies) != len(tensors):
        raise StorageError("the copies of releases do not fit their tensors")
    copies = []
    for each, own in zip(bodies, tensors, strict=True):
        (entry,) = manifest.restore(each["body"], own).entries
        copies.append(FrozenEntry(entry))
        copies[-1].note = each["note"]
    held = []
    for each in data["held"]:
        present = {entry.key: entry for entry in shard.freeze([key for key, place in each["keys"] if place is None])}
        frozen: list[FrozenEntry] = []
        for key, place in each["keys"]:
            frozen.append(present[key] if place is None else copies[place])
            frozen[-1].holders += place is not None
        snapshot = ShardSnapshot(shard, frozen)
        owner, attempt = str(each["owner"]), str(each["attempt"])
        is_visible = bool(each["is_visible"])
        held.append(HeldRelease(str(each["name"]), int(each["number"]), snapshot, owner, attempt, is_visible))
    numbers = {str(name): int(number) for name, number in data["numbers"].items()}
    shard.releases.restore(numbers, held, str(data.get("generation", "")))
