"""The files that this process has open."""

import os
from collections.abc import Iterator


def open_files(start: str) -> list[str]:
    """Return the targets that begin with `start`, one for each descriptor.

    Counted are those that a test knows, since threads and finalizers of other tests close theirs at any time.
    """
    return sorted(target for target in _targets() if target.startswith(start))


def _targets() -> Iterator[str]:
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            yield os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:
            # It was closed meanwhile.
            continue
