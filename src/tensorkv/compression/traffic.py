"""How many bytes compression saves."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(slots=True)
class Traffic:
    """How many bytes compressed arrays had on their way, and how many they have without compression ("raw").

    >>> traffic = Traffic()
    >>> traffic.add_sent(4, 64)
    >>> traffic.stats()["compression"]["sent_raw_nbytes"]
    64
    """

    sent_nbytes: int = 0
    sent_raw_nbytes: int = 0
    received_nbytes: int = 0
    received_raw_nbytes: int = 0

    def add_sent(self, nbytes: int, raw_nbytes: int) -> None:
        """Count arrays that were sent; negative numbers take them back."""
        self.sent_nbytes += nbytes
        self.sent_raw_nbytes += raw_nbytes

    def add_received(self, nbytes: int, raw_nbytes: int) -> None:
        """Count arrays that were received."""
        self.received_nbytes += nbytes
        self.received_raw_nbytes += raw_nbytes

    def stats(self) -> dict[str, dict[str, int]]:
        """Return the counts for ``KVStore.stats``, nothing before the first array."""
        return {"compression": asdict(self)} if self.sent_raw_nbytes or self.received_raw_nbytes else {}
