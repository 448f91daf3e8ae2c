"""Name the compiled parts, and the C sources that each is built from. setup.py runs this file, without the package."""

from __future__ import annotations

from pathlib import Path
from zlib import crc32

PARTS = ("_codecs", "_elements", "_layouts", "_native", "_shared", "_signals", "_tables")

FOLDER = Path(__file__).parent


def checksum(part: str) -> str:
    """Return the CRC-32 of a part's C file and of all headers.

    Raises:
        OSError: a source cannot be read; an installation may lack them.
    """
    value = 0
    for path in (FOLDER / f"{part}.c", *sorted(FOLDER.glob("*.h"))):
        value = crc32(path.read_bytes(), value)
    return f"{value:08x}"
