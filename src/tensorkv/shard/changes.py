"""Changes: everything that can happen to a shard, as values.

``Shard.apply`` is the one place that makes them. A shard with a log hands each change to the log first, so that it is
written before it is applied; replaying the log applies the same changes again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tensorkv.arrays.arguments import Key
from tensorkv.arrays.slices import Slices

from . import native, nonfinite
from .entry import Entry
from .releases import SavedReleases
from .rules import Rule

RequestId = Sequence[Any]
"""Client and number of a request, and perhaps a dict of plain data that is logged with it."""
RequestIds = Sequence[RequestId]


@dataclass(slots=True, kw_only=True)
class Change:
    """A change that was checked against its shard, whose lock is held until the change is applied.

    Args:
        requests: ids of the requests that the change answers, for a log.
    """

    requests: RequestIds = ()

    def updated(self) -> list[Key]:
        """Return the keys that were pushed, whose rounds count."""
        return []


@dataclass(slots=True)
class Init(Change):
    """Add entries."""

    entries: Sequence[Entry]


@dataclass(frozen=True, slots=True)
class TakenSlices:
    """What a push of slices does to values that they do not make complete, or not alone.

    Args:
        kept: entries, and slices that are kept until the others come.
        ended: entries whose slices are all there, and which the push updates, or leaves out.
    """

    kept: Sequence[tuple[Entry, Slices]] = ()
    ended: Sequence[Entry] = ()


@dataclass(slots=True)
class Push(Change):
    """Sum the parts of each entry and apply the update rule, and copy the values to the outs where that is possible.

    Args:
        entries: of the keys.
        parts: of each.
        outs: of each, if there are any.
        scale: of all gradients, beside the optimizer's ``rescale_grad``.
        slices: of other values, and of those that are complete now.
        others: keys that were pushed and are not updated: sums that are not finite, slices without elements.
    """

    entries: Sequence[Entry]
    parts: Sequence[list[Any]]
    outs: Sequence[Sequence[torch.Tensor]] = ()
    scale: float = 1.0
    slices: TakenSlices = TakenSlices()
    others: Sequence[Key] = ()

    def summed(self) -> Push:
        """Return the same push with one part for each entry, the sum."""
        pairs = zip(self.entries, self.parts, strict=True)
        sums = [[nonfinite.total(entry, parts, may_share=True)] for entry, parts in pairs]
        return replace(self, parts=sums)

    def updated(self) -> list[Key]:
        return [*(entry.key for entry in self.entries), *(entry.key for entry, _ in self.slices.kept), *self.others]


@dataclass(slots=True)
class PlainPush(Change):
    """Do a batch that was begun, which sums, updates values and fills outs.

    Args:
        batch: of the compiled part, with the scale of all gradients.
        entries: of its keys.
        sums: the sums of all keys as bytes, one after another, for a log; without one, what the caller gave.
    """

    batch: native.Batch
    entries: Sequence[Entry]
    sums: Any

    def updated(self) -> list[Key]:
        return [entry.key for entry in self.entries]


@dataclass(slots=True)
class Put(Change):
    """Replace values, or rows of them, by what an updater has computed; ``slices`` are as of ``Push``."""

    entries: Sequence[Entry]
    values: Sequence[Any]
    slices: TakenSlices = TakenSlices()

    def updated(self) -> list[Key]:
        return [entry.key for entry in self.entries]


@dataclass(slots=True)
class Delete(Change):
    """Remove keys with their values and state."""

    keys: Sequence[Key]


@dataclass(slots=True)
class SetRule(Change):
    """Put an update rule in force; an optimizer goes on from the state of one of the same name."""

    rule: Rule


@dataclass(slots=True)
class Restore(Change):
    """Replace all entries, the rule, and the releases and notes (None: these stay)."""

    entries: Sequence[Entry]
    rule: Rule
    releases: SavedReleases | None = None
    notes: Mapping[str, Any] | None = None


@dataclass(slots=True)
class RestoreStates(Change):
    """Take over the optimizer states of entries, whose keys the shard has with the same shapes; drop other states."""

    entries: Sequence[Entry]
    rule: Rule


@dataclass(slots=True)
class SetNotes(Change):
    """Keep plain data, for JSON, beside the values, by name; None removes a note."""

    notes: Mapping[str, Any]


@dataclass(slots=True)
class Publish(Change):
    """Hold the present values as a release.

    Args:
        name, number: of the release.
        keys: of the values (None: all).
        is_visible: whether readers see it at once.
        keep: if so, how many releases to keep, this one included (None: all).
        owner, attempt: if not, who is to show it, and which attempt of the owner this is.
    """

    name: str
    number: int
    keys: Sequence[Key] | None = None
    is_visible: bool = True
    keep: int | None = None
    owner: str = ""
    attempt: str = ""


@dataclass(slots=True)
class ShowRelease(Change):
    """Let readers see a release, and keep so many (None: all)."""

    name: str
    keep: int | None = None


@dataclass(slots=True)
class Unpublish(Change):
    """Drop releases, which may be unknown."""

    names: Sequence[str]
