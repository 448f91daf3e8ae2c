"""The benchmark of weights works and notices wrong results. How fast anything is, is not tested."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.common.work import WrongResultError
from benchmarks.weights.works import Publishing, publishings

NAMES = {"pull", "changes", "torch", "safetensors", "ray"}


def run(out, *arguments):
    return main(["weights", "--quick", "--no-redis", "--out", str(out), *arguments])


def test_quick_run_writes_raw_times_tables_and_a_plot(tmp_path, capsys):
    out = tmp_path / "out"
    assert run(out) == 0
    assert sorted(path.name for path in out.iterdir()) == ["weights.json", "weights.md", "weights.png"]
    assert (out / "weights.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((out / "weights.json").read_text())
    table = (out / "weights.md").read_text()
    assert table in capsys.readouterr().out
    assert result["missing"] == {"redis": "left out with --no-redis"}
    assert [each["name"] for each in result["works"]] == [each.name for each in publishings(quick=True)]
    for work in result["works"]:
        assert set(work["times_s"]["pushpull"]) == NAMES | {"copy"}
        assert set(work["found"]) == NAMES
        for found in work["found"].values():
            # Two repetitions; a phase of readers has a time of each.
            counts = {name: len(times) for name, times in found["phases_ms"].items()}
            assert counts["push"] == counts["publish"] >= 2
            assert counts["visible"] == counts["fetch"] == counts["pause"] == 2 * counts["push"]
            assert min(found["phases_ms"]["pause"]) > 0
        few = work["found"]["changes"]["received_nbytes"] / work["value_nbytes"]
        assert few == 1 if work["changed"] == 1 else few <= 2 * work["changed"]
    for head in ("From the publisher to all readers", "Phases", "Goals", "Memory", "Spread"):
        assert f"## {head}\n" in table


@pytest.mark.parametrize("changed", [0.01, 1.0])
def test_wrong_weights_are_noticed(changed):
    work = Publishing(3, (40, 5), 1, changed)
    values = work.first()
    work.check(values, 0)
    before = [value.copy() for value in values]
    for version in (1, 2):
        work.change(values, version)
        work.check(values, version)
    assert sum(int((old != new).sum()) for old, new in zip(before, values, strict=True)) >= changed * 600
    with pytest.raises(WrongResultError, match="in version 3"):
        work.check(values, 3)
    for wrong in (np.float32(-1), np.nextafter(values[1][7, 3], np.float32(9))):
        kept, values[1][7, 3] = values[1][7, 3], wrong
        with pytest.raises(WrongResultError, match="element 38 of key 1"):
            work.check(values, 2)
        values[1][7, 3] = kept
