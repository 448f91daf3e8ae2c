"""Recent: what has been worked out for lists of keys, where a program may name other keys at every step."""

from __future__ import annotations

from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")

# A key that is named takes up to 200 bytes in what is remembered of a list.
_MOST_KEYS, _LEAST_LISTS = 1 << 17, 4


class Recent(Generic[K, V]):
    """What has been worked out for lists of keys; all is forgotten when there is much of it, to be made again.

    Threads use it without a lock: what two of them have worked out at once, either may find.

    Args:
        most: how many lists are remembered; fewer if they name more than 131,072 keys together, but at least four.

    >>> recent = Recent[str, int](most=2)
    >>> for name in ("a", "b", "c"):
    ...     recent.keep(name, ord(name), num_keys=1)
    >>> recent.get("a"), recent.get("c")
    (None, 99)
    """

    def __init__(self, most: int) -> None:
        self._most, self._found, self._num_keys = most, dict[K, V](), 0
        self.get = self._found.get
        """Returns what was kept of a list; None: nothing."""

    def __len__(self) -> int:
        return len(self._found)

    def keep(self, name: K, found: V, num_keys: int) -> None:
        """Remember what was worked out for a list of so many keys."""
        self._num_keys += num_keys
        if len(self) >= self._most or (len(self) >= _LEAST_LISTS and self._num_keys > _MOST_KEYS):
            self.clear()
            self._num_keys = num_keys
        self._found[name] = found

    def clear(self) -> None:
        """Forget everything."""
        self._found.clear()
        self._num_keys = 0
