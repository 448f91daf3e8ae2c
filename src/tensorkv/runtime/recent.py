"""Recent: what has been worked out for lists of keys, where a program may name other keys at every step."""

from __future__ import annotations

from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")

# What is remembered of a list takes some 200 bytes for each key.
_MOST_KEYS, _LEAST_LISTS = 1 << 17, 4
# Lists that name each key of a store so often together are remembered, however many keys it has.
_MOST_NAMED = 4


class Recent(Generic[K, V]):
    """What has been worked out for lists of keys. When it becomes too much, all is dropped, and made again when needed.

    Threads use it without a lock: what two of them have worked out at once, either may find.

    Args:
        most: how many lists are remembered; fewer if they are long, but at least four.

    >>> recent = Recent[str, int](most=2)
    >>> for name in ("a", "b", "c"):
    ...     recent.keep(name, ord(name), num_keys=1)
    >>> recent.get("a"), recent.get("c")
    (None, 99)
    """

    def __init__(self, most: int) -> None:
        self._most, self._found, self._sizes, self._num_keys = most, dict[K, V](), dict[K, int](), 0
        self.get = self._found.get
        """Returns what was kept of a list; None: nothing."""

    def __len__(self) -> int:
        return len(self._found)

    def keep(self, name: K, found: V, num_keys: int, held: int = 0) -> None:
        """Remember what was worked out for a list.

        Args:
            name: of the list.
            found: for it.
            num_keys: for how many keys, or pieces of their values.
            held: how many keys the store has, where that is known.
        """
        self._num_keys += num_keys - self._sizes.get(name, 0)
        is_long = self._num_keys > max(_MOST_KEYS, _MOST_NAMED * held)
        if name not in self._found and (len(self) >= self._most or (is_long and len(self) >= _LEAST_LISTS)):
            self.clear()
            self._num_keys = num_keys
        self._found[name], self._sizes[name] = found, num_keys

    def clear(self) -> None:
        """Forget everything."""
        self._found.clear()
        self._sizes.clear()
        self._num_keys = 0
