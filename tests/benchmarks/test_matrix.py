"""The matrix covers every form, library, rule and engine, and notices wrong results."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import tensorkv
from benchmarks.__main__ import main
from benchmarks.common import work
from benchmarks.common.work import RULES, WrongResultError
from benchmarks.matrix import contenders
from benchmarks.matrix.works import ARRAYS, ENGINES, FORMS, SIZES, cell, cells
from tests.benchmarks.test_local import rows_of

SMALL = "5 odd shapes"
OPTIMIZERS = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "adagrad": torch.optim.Adagrad}


def run(out, *arguments):
    return main(["matrix", "--quick", "--no-mxnet", "--no-mpi", "--out", str(out), *arguments])


def test_every_combination_is_a_cell():
    names = {each.name for each in cells(ENGINES, quick=False)}
    assert len(names) == len(ENGINES) * len(SIZES) * len(RULES) * len(ARRAYS) * len(FORMS)


def test_a_run_writes_raw_times_tables_and_a_plot(tmp_path):
    assert run(tmp_path, "--engines", "local", "--only", f"{SMALL}, numpy", "--only", "tiny, torch, list") == 0
    result = json.loads((tmp_path / "matrix.json").read_text())
    assert (tmp_path / "matrix.png").read_bytes().startswith(b"\x89PNG")
    assert len(result["cells"]) == len(RULES) * (len(FORMS) + 1)
    for each in result["cells"]:
        peer = "plain" if each["rule"] == "assign" else "fused"
        assert set(each["times_s"]) == {"first", "pushpull", *(["changing"] if each["size"] == SMALL else [])}
        assert set(each["times_s"]["pushpull"]) == {"tensorkv", peer, "copy"}
        assert all(len(raw) == 2 for own in each["times_s"].values() for raw in own.values())
    table = (tmp_path / "matrix.md").read_text()
    rows = rows_of(table, "`local`, numpy")
    assert [row[1] for row in rows] == [name for name, *_ in RULES.values()]
    assert all(cell_text.count("·") == 2 for row in rows for cell_text in row[2:])
    assert len(rows_of(table, "`local`, lists of NumPy arrays, beside every peer")) == len(RULES)


def test_cells_of_earlier_runs_are_kept(tmp_path):
    first, second = (["--engines", "local", "--only", f"tiny, {arrays}, list, assign"] for arrays in ("torch", "numpy"))
    assert run(tmp_path, *first) == 0
    [earlier] = json.loads((tmp_path / "matrix.json").read_text())["cells"]
    assert run(tmp_path, *second, "--keep") == 0
    found = json.loads((tmp_path / "matrix.json").read_text())["cells"]
    # In the order of the matrix, not of the runs.
    assert [each["arrays"] for each in found] == ["numpy", "torch"]
    assert found[1] == earlier
    assert run(tmp_path, *second) == 0
    assert len(json.loads((tmp_path / "matrix.json").read_text())["cells"]) == 1


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_a_run_with_processes(engine, tmp_path):
    only = [f"{SMALL}, mixed, nested, AdamW", f"{SMALL}, numpy, list, assign", f"{SMALL}, jax, no out, SGD momentum"]
    assert run(tmp_path, "--engines", engine, *(word for name in only for word in ("--only", name))) == 0
    found = json.loads((tmp_path / "matrix.json").read_text())
    assert {each["name"].partition(": ")[2].removesuffix(" 0.9") for each in found["cells"]} == set(only)
    assert found["missing"] == {"mxnet": "left out with --no-mxnet", "mpi": "left out with --no-mpi"}


def test_an_engine_that_there_is_not(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["matrix", "--engines", "local,nowhere"])
    assert "expected some of local,dist_sync,dist_async" in capsys.readouterr().err


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("arrays", ARRAYS)
@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (contenders.Plain, "assign"),
        *((make, rule) for make in (contenders.TensorKV, contenders.Torch) for rule in RULES),
    ],
)
def test_contenders_compute_what_torch_does(make, rule, arrays, form):
    small = cell("local", SMALL, arrays, form, rule)
    contender = make(small)
    contender.open(0)
    contender.prepare("pushpull", 3)
    assert contender.time("pushpull", 3) > 0
    contender.check()
    if rule != "assign":
        _, name, options = RULES[rule]
        values = [torch.full(shape, work.FIRST, dtype=torch.float64) for shape in small.shapes]
        optimizer = OPTIMIZERS[name](values, **options)
        for _ in range(3):
            for value, parts in zip(values, work.make_parts(small, range(small.parts)), strict=True):
                value.grad = sum(torch.from_numpy(part) for part in parts).double()
            optimizer.step()
        for key, value in enumerate(values):
            np.testing.assert_allclose(contender.out(key), value, rtol=1e-5, atol=1e-7)
    contender.renew()
    with pytest.raises(WrongResultError):
        contender.check()
    contender.close()


@pytest.mark.parametrize("verb", ["first", "changing"])
def test_first_and_changing_calls_reach_every_key(verb):
    contender = contenders.TensorKV(cell("local", SMALL, "numpy", "list", "momentum"))
    contender.open(0)
    for _ in range(3):
        contender.prepare(verb, 1)
        contender.time(verb, 1)
    assert contender.steps == (1 if verb == "first" else 3)
    contender.check()
    contender.close()


@pytest.mark.parametrize("form", FORMS)
def test_a_wrong_result_is_noticed(form, tmp_path, capsys, monkeypatch):
    right = tensorkv.KVStore.pushpull

    def wrong(self, key, value=None, **options):
        found = right(self, key, value, **options)
        out = options.get("out", found)
        while isinstance(out, list | dict):
            out = list(out.values() if isinstance(out, dict) else out)[-1]
        out.flat[-1] += 0.125
        return found

    monkeypatch.setattr(tensorkv.KVStore, "pushpull", wrong)
    assert run(tmp_path / "out", "--engines", "local", "--only", f"{SMALL}, numpy, {form}, assign") == 1
    assert not (tmp_path / "out").exists()
    assert f"{SMALL}, numpy, {form}, assign" in capsys.readouterr().err
