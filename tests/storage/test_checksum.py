"""The checksum is zlib's, on whatever way it is made."""

import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorkv.runtime import _native
from tensorkv.storage import checksum
from tensorkv.storage.checksum import crc32, known, recall

DATA = np.random.default_rng(0).integers(0, 256, 70_000, np.uint8)


@given(start=st.integers(0, 70), nbytes=st.integers(0, 66_000), before=st.integers(0, 2**32 - 1))
def test_it_is_that_of_zlib(start, nbytes, before):
    data = DATA[start : start + nbytes]
    assert crc32(data, before) == zlib.crc32(data, before)


@pytest.mark.parametrize("nbytes", [*range(64, 400), 4096, 4097, 65_536 + 15])
def test_the_compiled_one_is_that_of_zlib(nbytes):
    found = _native.crc32(DATA[:nbytes], 7)
    assert found in (None, zlib.crc32(DATA[:nbytes], 7))


def test_one_after_another_is_one_of_all():
    assert crc32(DATA[40_000:], crc32(DATA[:40_000])) == crc32(DATA) == zlib.crc32(DATA)


def test_elements_of_more_than_a_byte_and_read_only_data():
    assert crc32(DATA.view(np.float64)) == crc32(DATA.tobytes()) == zlib.crc32(DATA)


def test_without_the_compiled_part(monkeypatch):
    monkeypatch.setattr(checksum, "_native", None)
    assert crc32(DATA) == zlib.crc32(DATA)


def test_a_bit_changes_it():
    data = DATA.copy()
    for at in range(0, 70_000, 997):
        data[at] ^= 1 << at % 8
        assert crc32(data) != zlib.crc32(DATA)
        data[at] ^= 1 << at % 8


def test_what_is_known_is_recalled_of_just_these_bytes():
    data = DATA[:1000].copy()
    assert recall([data]) is None
    with known(data):
        assert recall([data]) == zlib.crc32(data)
        assert recall([data[:600].data, data[600:]]) == zlib.crc32(data)
        for others in ([data[:999]], [data[1:]], [data, data], [data[600:], data[:600]], [data.copy()], []):
            assert recall(others) is None
        with known(b"others"):
            assert recall([data]) is None
        assert recall([data]) == zlib.crc32(data)
    assert recall([data]) is None
