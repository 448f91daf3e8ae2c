"""Releases: snapshots of a shard that have a name and a number."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tensorkv.arrays.arguments import check_int
from tensorkv.errors import ArgumentError, ReleaseExistsError, ReleaseNotFoundError, quote, show, suggestion

if TYPE_CHECKING:
    from .entry import Entry
    from .shard import ShardSnapshot

# How long a name may be.
MAX_NAME = 255
# Names of releases that are gone, which cannot be used again.
_REMEMBERED_NAMES = 10_000


def check_name(verb: str, name: Any) -> str:
    """Return the name of a release.

    Raises:
        ArgumentError: not a str of 1 to 255 printable characters.
    """
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise ArgumentError(f"{verb}: the name is {show(name)}; expected a str of 1 to {MAX_NAME} printable characters")
    return name


def check_keep(verb: str, keep: Any) -> int | None:
    """Return how many releases are to stay.

    Raises:
        ArgumentError: not None or an int of at least 1.
    """
    return None if keep is None else check_int(f"{verb}: keep", keep, 1, ", or None")


@dataclass(frozen=True, slots=True)
class SavedRelease:
    """A release in a checkpoint, or in a snapshot of a log.

    Args:
        name, number: of the release.
        entries: of its keys. A value that has not changed since is the entry of the checkpoint itself, and the others
            are ``FrozenEntry``, one for all releases that share it.
        owner, attempt, is_visible: as of ``HeldRelease``.
    """

    name: str
    number: int
    entries: Sequence[Entry]
    owner: str = ""
    attempt: str = ""
    is_visible: bool = True


@dataclass(frozen=True, slots=True)
class SavedReleases:
    """The releases in a checkpoint, or in a snapshot of a log.

    Args:
        numbers: of each name that was used.
        held: the releases, from the oldest to the newest.
        generation: that they begin when they are loaded.
    """

    numbers: Mapping[str, int]
    held: Sequence[SavedRelease]
    generation: str = ""


@dataclass(slots=True)
class HeldRelease:
    """A release that a shard holds.

    Args:
        name, number: of the release.
        snapshot: its values.
        owner: who is to show it to readers.
        attempt: of the owner to publish it.
    """

    name: str
    number: int
    snapshot: ShardSnapshot
    owner: str = ""
    attempt: str = ""
    is_visible: bool = False
    """Whether readers see it."""
    is_kept: bool = True
    """Whether it stays without readers."""
    leases: dict[str, float] = field(default_factory=dict)
    """Of each reader: until when it may read the release though it is not kept."""
    waiting: Counter[str] = field(default_factory=Counter)
    """Of each reader: for how many comparisons of the release it waits, in which no lease ends."""


class Releases:
    """The releases of one shard, from the oldest to the newest.

    Args:
        now: a clock in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._held: dict[str, HeldRelease] = {}
        # By a load that may still be rolled back.
        self._replaced: list[HeldRelease] = []
        self._last_number = 0
        self.numbers: dict[str, int] = {}
        """Of each release that was seen by readers, those that are gone included."""
        self.generation = ""
        """Differs after a load, which may bring other releases of the same names and numbers."""

    @property
    def next_number(self) -> int:
        """The number of the next release."""
        return self._last_number + 1

    def __contains__(self, name: object) -> bool:
        return name in self._held

    def visible(self) -> list[HeldRelease]:
        """Return the releases that readers see."""
        self._drop_expired()
        return [held for held in list(self._held.values()) if held.is_visible and held.is_kept]

    def lasting(self) -> list[HeldRelease]:
        """Return the releases that stay without readers, those that they do not see yet included."""
        return [held for held in list(self._held.values()) if held.is_kept]

    def hidden(self) -> list[HeldRelease]:
        """Return the releases that readers do not see yet."""
        return [held for held in list(self._held.values()) if not held.is_visible]

    def newest(self, after: str | None) -> HeldRelease | None:
        """Return the newest release after another one (None: any), if there is one.

        Raises:
            ReleaseNotFoundError: there never was a release of that name.
        """
        number = 0 if after is None else self.number_of(after)
        found = [held for held in self.visible() if held.number > number]
        return found[-1] if found else None

    def number_of(self, name: str) -> int:
        """Return the number of a release that is here, or was.

        Raises:
            ReleaseNotFoundError: there never was a release of that name.
        """
        found = self.numbers.get(name)
        if found is None:
            near = suggestion(name, reversed(self.numbers))
            raise ReleaseNotFoundError(f"no release {quote(name)} was published{near}; {self._describe()}")
        return found

    def find(self, name: str) -> HeldRelease:
        """Return a release that readers see, or hold.

        Raises:
            ReleaseNotFoundError: it was dropped, or never published.
        """
        self._drop_expired()
        held = self._held.get(name)
        if held is None or not held.is_visible:
            self.number_of(name)
            raise ReleaseNotFoundError(f"the release {quote(name)} was dropped; {self._describe()}")
        return held

    def _describe(self) -> str:
        names = ", ".join(quote(held.name) for held in self.visible()[-4:])
        return f"the newest are {names}" if names else "there are no releases"

    # ------------------------------------------------------------ readers

    def hold(self, name: str, reader: str, lease_s: float) -> HeldRelease:
        """Return a release, which stays for a reader until its lease has ended; a new lease replaces the last.

        Raises:
            ReleaseNotFoundError: as ``find``.
        """
        held, now = self.find(name), self._now()
        held.leases = {each: until for each, until in held.leases.items() if until > now or held.waiting[each]}
        held.leases[reader] = now + lease_s
        return held

    def hold_all(self, reader: str, lease_s: float) -> None:
        """Hold every release for a reader, those that readers do not see yet included: others may have shown them."""
        for held in self._held.values():
            held.leases[reader] = self._now() + lease_s

    def has_lease(self, name: str, reader: str) -> bool:
        """Return whether a reader's lease goes on."""
        held = self._held.get(name)
        return held is not None and (held.leases.get(reader, 0.0) > self._now() or held.waiting[reader] > 0)

    def begin_comparison(self, name: str, reader: str, lease_s: float) -> None:
        """Hold a release for a reader until ``end_comparison``; arguments and errors as of ``hold``."""
        self.hold(name, reader, lease_s).waiting[reader] += 1

    def end_comparison(self, name: str, reader: str, lease_s: float) -> None:
        """Have a reader's lease begin again, unless the reader has let go or the release was replaced."""
        held = self._held.get(name)
        if held is not None and held.waiting[reader]:
            held.waiting -= Counter([reader])
            if reader in held.leases:
                held.leases[reader] = self._now() + lease_s
            self._drop_expired()

    def let_go(self, name: str, reader: str) -> None:
        """End a reader's lease."""
        held = self._held.get(name)
        if held is not None:
            held.leases.pop(reader, None)
            self._drop_expired()

    def _drop_expired(self) -> None:
        now = self._now()
        for held in list(self._held.values()):
            if not held.is_kept and not held.waiting and all(until <= now for until in held.leases.values()):
                self._drop(held.name)

    # ------------------------------------------------------------ changes

    def check_new(self, name: str) -> None:
        """Raise if there was a release of a name.

        Raises:
            ReleaseExistsError: there was.
        """
        if name in self._held or name in self.numbers:
            raise ReleaseExistsError(
                f"publish({quote(name)}): a release of this name was published before; names are not used again"
            )

    def add(self, name: str, number: int, snapshot: ShardSnapshot, owner: str, attempt: str) -> None:
        """Hold a release, which readers do not see yet, in place of one of this name that they never saw."""
        if name in self._held:
            self._drop(name)
        self._held[name] = HeldRelease(name, number, snapshot, owner, attempt)
        self._last_number = max(self._last_number, number)

    def reveal(self, name: str) -> None:
        """Let readers see a release, if it is here."""
        if name in self._held and not self._held[name].is_visible:
            self.show(name, None)

    def show(self, name: str, keep: int | None) -> None:
        """Let readers see a release, if it is here, and keep so many of the newest (None: all)."""
        shown = self._held.get(name)
        if shown is None:
            return
        shown.is_visible = True
        self.numbers[name] = shown.number
        if len(self.numbers) > _REMEMBERED_NAMES + len(self._held):
            gone = [each for each in self.numbers if each not in self._held]
            for each in gone[: len(self.numbers) - _REMEMBERED_NAMES]:
                del self.numbers[each]
        kept = [held for held in list(self._held.values()) if held.is_visible and held.is_kept]
        for held in kept[: -keep if keep is not None else 0]:
            held.is_kept = False
        self._drop_expired()

    def remove(self, name: str) -> None:
        """Drop a release, once nobody reads it any more."""
        held = self._held.get(name)
        if held is not None:
            held.is_kept = False
            self._drop_expired()

    def clear(self) -> None:
        """Hold nothing, as a new store; snapshots that readers have stay readable."""
        self.numbers, self.generation, self._last_number, self._held = {}, "", 0, {}

    def replace(self, numbers: Mapping[str, int], held: Sequence[HeldRelease], generation: str) -> None:
        """Hold other releases; ``drop_replaced`` drops those before. Names that were used stay used."""
        self._replaced = list(self._held.values())
        self.generation = generation
        self.numbers = {**self.numbers, **numbers}
        self._last_number = max(self._last_number, *numbers.values(), *(each.number for each in held), 0)
        self._held = {each.name: each for each in sorted(held, key=lambda each: each.number)}

    def drop_replaced(self) -> None:
        """Drop the releases that were replaced, those that are read included."""
        replaced, self._replaced = self._replaced, []
        for held in replaced:
            held.snapshot.close()

    def before_replace(self) -> list[HeldRelease]:
        """Return the releases that are held, or that were until ``replace``, which is rolled back."""
        if self._replaced:
            self.close()
            self._held, self._replaced = {each.name: each for each in self._replaced}, []
        return list(self._held.values())

    def take_readers(self, before: Sequence[HeldRelease]) -> None:
        """Let readers go on with the releases that were held before these ones were restored."""
        now = self._now()
        for old in before:
            held = self._held.get(old.name)
            if held is None and (old.waiting or any(until > now for until in old.leases.values())):
                old.is_kept = False
                self._held[old.name] = old
            elif held is not None and (held.number, held.attempt) == (old.number, old.attempt):
                held.snapshot.close()
                held.snapshot, held.leases, held.waiting = old.snapshot, old.leases, old.waiting
            else:
                old.snapshot.close()
        self._held = {each.name: each for each in sorted(self._held.values(), key=lambda each: each.number)}

    def close(self) -> None:
        """Drop everything."""
        for name in list(self._held):
            self._drop(name)

    def _drop(self, name: str) -> None:
        held = self._held.pop(name, None)
        if held is not None:
            held.snapshot.close()
