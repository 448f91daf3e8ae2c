"""A store in a folder: the contract, and everything as it was when it is opened again."""

import tempfile

import pytest
from contract import Contract


class TestDurable(Contract):
    TYPE = "local"

    def create(self, **options):
        # A log that is short enough for snapshots to be made on the way.
        return super().create(path=tempfile.mkdtemp(dir=self.folder), log_nbytes=2000, **options)

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path):
        self.folder = tmp_path
