"""What tests of all benchmarks share."""

import os
import textwrap

import pytest

from tests.conftest import ROOT

pytest.importorskip("matplotlib")


@pytest.fixture
def plant(tmp_path, monkeypatch):
    """Return what makes every process that is started run some code first."""

    def do(code):
        folder = tmp_path / "planted"
        folder.mkdir()
        head = f"import os, sys\nsys.path.append({ROOT!r})\n"
        (folder / "sitecustomize.py").write_text(head + textwrap.dedent(code))
        monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)

    return do
