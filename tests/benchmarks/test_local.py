"""The benchmark works and notices wrong results. How fast anything is, is not tested."""

from __future__ import annotations

import doctest
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import tensorkv
from benchmarks.__main__ import main
from benchmarks.common import launch, venvs, work
from benchmarks.common.report import ratios, spread
from benchmarks.common.venvs import MXNET, PeerError
from benchmarks.common.work import Work, WrongResultError
from benchmarks.local import bench, contenders, growth, memory
from tests.conftest import ROOT

MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in Path(ROOT, "benchmarks").rglob("*.py")
    if path.name != "__main__.py"
)
PEERS = {"torch": contenders.PlainTorch, "numpy": contenders.PlainNumPy}


def run(out, *arguments):
    return main(["local", "--quick", "--no-mxnet", "--out", str(out), *arguments])


def rows_of(table, title):
    section = table.split(f"## {title}\n", 1)[1].split("\n## ")[0]
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip("| ") for cell in row] for row in rows[2:]]


# ------------------------------------------------------------ a whole run


def test_quick_run_writes_raw_times_tables_and_plots(tmp_path, capsys):
    assert run(tmp_path / "out", "--growth") == 0
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["growth.png", "local.json", "local.md", "local.png"]
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in ("local.png", "growth.png"))
    result = json.loads((out / "local.json").read_text())
    check_schema(result)
    table = (out / "local.md").read_text()
    assert table in capsys.readouterr().out
    check_tables(table, result)


def check_schema(result):
    assert result["schema"] == 2
    assert result["quick"] is True
    assert set(result["versions"]) == {"python", "torch", "numpy", "tensorkv"}
    assert {"cpu", "cores", "memory_nbytes", "kernel", "load_before", "load_after"} <= set(result["machine"])
    assert result["missing"] == {"mxnet": "left out with --no-mxnet"}
    assert [work["name"] for work in result["works"]] == [each.name for each in bench.QUICK]
    for measured in result["works"]:
        assert set(measured["times_s"]) == {"push+pull", "pushpull"}
        for times in measured["times_s"].values():
            assert set(times) == {"tensorkv", "copy", *PEERS}
            assert all(len(raw) == 2 and min(raw) > 0 for raw in times.values())
        assert measured["limit"] == bench.limit(measured)
    assert {line["rule"] for line in result["growth"]} == {"assign", "momentum"}
    assert all(len(line["points"]) >= 3 for line in result["growth"])


def check_tables(table, result):
    names = [work["name"] for work in result["works"]]
    twice = [name for name in names for _ in range(2)]
    assert [row[0] for row in rows_of(table, "Beside the peers")] == twice
    assert [row[1] for row in rows_of(table, "Beside the peers")] == ["`push+pull`", "`pushpull`"] * len(names)
    assert [row[0] for row in rows_of(table, "Beside the limit of the memory")] == names
    assert len(rows_of(table, "Spread")) == len(twice) * 3
    assert len(rows_of(table, "How the cost grows")) == 6
    assert "MXNet was not measured**: left out" in table
    assert "quick run at toy sizes" in table


def test_only_some_works(tmp_path):
    assert run(tmp_path, "--only", "2×3", "--arrays", "torch", "--reps", "3") == 0
    result = json.loads((tmp_path / "local.json").read_text())
    assert [work["name"] for work in result["works"]] == ["one 2×3 key, 1 part, assign"]
    assert len(result["works"][0]["times_s"]["pushpull"]["tensorkv"]) == 3


def test_without_mxnet_the_table_says_why(tmp_path):
    missing = str(tmp_path / "nowhere" / "python")
    assert main(["local", "--quick", "--only", "2×3", "--out", str(tmp_path), "--mxnet-python", missing]) == 0
    assert f"MXNet was not measured**: there is no {missing}" in (tmp_path / "local.md").read_text()


@pytest.mark.skipif(not Path(ROOT, MXNET.folder).exists(), reason="MXNet's virtual environment has not been made")
def test_with_mxnet(tmp_path):
    assert main(["local", "--quick", "--only", "1 × 100k", "--only", "20 ×", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "local.json").read_text())
    assert result["versions"]["mxnet"] == "1.9.1"
    assert all("mxnet" in work["summary"]["pushpull"]["ratios"] for work in result["works"])
    assert "–" not in [cell for row in rows_of((tmp_path / "local.md").read_text(), "Beside the peers") for cell in row]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--reps", "3"], "fewer than 7"), (["--only", "nothing"], "1 × 25M, 4 parts, assign")],
)
def test_arguments_that_make_no_sense(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["local", *arguments])
    assert message in capsys.readouterr().err


# ------------------------------------------------------------ wrong results


def fails(tmp_path, capsys, only):
    assert run(tmp_path / "out", "--only", only) == 1
    assert not (tmp_path / "out").exists()
    error = capsys.readouterr().err
    assert "error: " in error
    assert "expected" in error
    return error


@pytest.mark.parametrize("only", [each.name for each in bench.QUICK])
@pytest.mark.parametrize("verb", ["pull", "pushpull"])
def test_a_wrong_pull_is_noticed(verb, only, tmp_path, capsys, monkeypatch):
    right = getattr(tensorkv.KVStore, verb)

    def wrong(self, key, *values, out):
        right(self, key, *values, out=out)
        np.asarray(out[-1] if type(out) is list else out).flat[-1] += 0.125

    monkeypatch.setattr(tensorkv.KVStore, verb, wrong)
    assert only in fails(tmp_path, capsys, only)


def test_a_push_that_stops_working_is_noticed(tmp_path, capsys, monkeypatch):
    push, done = tensorkv.KVStore.push, []

    def lazy(self, key, value):
        done.append(key)
        if len(done) <= 6:
            push(self, key, value)

    monkeypatch.setattr(tensorkv.KVStore, "push", lazy)
    fails(tmp_path, capsys, "16 × 1600, 4 parts")


def test_one_step_too_few_is_noticed(tmp_path, capsys, monkeypatch):
    push, done = tensorkv.KVStore.push, []

    def forgetful(self, key, value):
        done.append(key)
        if len(done) != 7:
            push(self, key, value)

    monkeypatch.setattr(tensorkv.KVStore, "push", forgetful)
    fails(tmp_path, capsys, "1 × 100k, 4 parts, SGD")


def test_an_out_that_is_never_written_is_noticed(tmp_path, capsys, monkeypatch):
    pull, done = tensorkv.KVStore.pull, []

    def lazy(self, key, out):
        done.append(key)
        if len(done) <= 6:
            pull(self, key, out=out)

    monkeypatch.setattr(tensorkv.KVStore, "pull", lazy)
    assert "nan" in fails(tmp_path, capsys, "20 × 100, 1 part")


@pytest.mark.parametrize("who", ["PlainTorch", "PlainNumPy"])
def test_a_wrong_peer_is_noticed(who, tmp_path, capsys, monkeypatch):
    contender = getattr(contenders, who)
    time = contender.time

    def wrong(self, verb, calls):
        seconds = time(self, verb, calls)
        self.outs[0][-1] += 0.125
        return seconds

    monkeypatch.setattr(contender, "time", wrong)
    fails(tmp_path, capsys, "1 × 100k, 4 parts, assign")


# ------------------------------------------------------------ contenders and processes


def test_rounding_is_no_wrong_result_and_a_missing_step_is():
    # Momentum by hand, in float32 as everybody computes it; the smallest gradient crosses zero after 409 steps.
    momentum_work = Work(1, (97,), 1, "momentum")
    ((gradient,),) = work.make_parts(momentum_work, [0])
    value, velocity = work.first_values(momentum_work)[0].copy(), np.zeros(97, np.float32)
    worst = 0.0
    for step in range(1, 601):
        before = value.copy()
        velocity = np.float32(work.MOMENTUM) * velocity + gradient
        value -= np.float32(work.LR) * velocity
        work.check(momentum_work, step, 1, lambda _: value)  # noqa: B023 - called at once
        with pytest.raises(WrongResultError):
            work.check(momentum_work, step, 1, lambda _: before)  # noqa: B023
        (_, right), *_ = work.right_slices(momentum_work, 0, step, 1)
        at = int(np.argmin(np.abs(right)))
        worst = max(worst, abs(float(value[at]) - right[at]) / max(abs(right[at]), work.LR))
    # So near zero roundings are more than a ten-thousandth, of the result or of the rate.
    assert worst > work.TOLERANCE


@pytest.mark.parametrize("rule", ["assign", "momentum"])
@pytest.mark.parametrize("make", [contenders.TensorKV, *PEERS.values()])
@pytest.mark.parametrize("verb", work.VERBS)
def test_contenders_compute_what_torch_does(make, rule, verb):
    small = Work(3, (5, 50), 3, rule)
    contender = make(small)
    values = [torch.full(small.shape, 0.5, dtype=torch.float64) for _ in range(small.keys)]
    optimizer = torch.optim.SGD(values, lr=work.LR, momentum=work.MOMENTUM)
    for _ in range(4):
        for value, parts in zip(values, work.make_parts(small, range(small.parts)), strict=True):
            value.grad = sum(torch.from_numpy(part) for part in parts).double()
        optimizer.step()
    assert contender.time(verb, 4) > 0
    contender.check()
    for value, out in zip(values, contender.outs, strict=True):
        np.testing.assert_allclose(out, value.grad if rule == "assign" else value, rtol=1e-5, atol=1e-7)
    contender.close()


def test_a_contender_in_another_process():
    peer = launch.alone("numpy", "benchmarks.local.contenders:PlainNumPy")
    try:
        peer.build(Work(2, (10, 10), 2))
        assert peer.time("push+pull", 2) > 0
        peer.check()
        peer.renew()
        with pytest.raises(WrongResultError, match=r"numpy: .*nan"):
            peer.check()
    finally:
        peer.end()
    peer = launch.alone("numpy", "benchmarks.local.contenders:PlainNumPy")
    try:
        peer.build(Work(2, (10, 10), 2))
        [found] = peer.ask("memory")
        assert 0 < found["rss"] <= found["peak"]
        with pytest.raises(PeerError, match="numpy: time: KeyError"):
            peer.time("nothing")
    finally:
        peer.end()


def program(tmp_path, lines):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{lines}\n")
    python.chmod(0o755)
    return str(python)


def test_a_process_that_dies_is_an_error(tmp_path):
    python = program(tmp_path, "echo no luck today >&2; exit 3")
    with pytest.raises(PeerError, match="no luck today"):
        launch.alone("mxnet", "benchmarks.local.contenders:MXNet", python)
    with pytest.raises(PeerError, match="no luck today"):
        MXNET.find(python, may_install=True)


def test_a_library_that_is_not_there_is_an_error():
    lost = venvs.Venv("lost", "no_such_library", ())
    with pytest.raises(PeerError, match="no_such_library"):
        lost.find(sys.executable, may_install=True)


def test_an_installation_that_fails_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(venvs, "ROOT", tmp_path)
    monkeypatch.setattr(venvs.sys, "version_info", (3, 12))
    monkeypatch.setattr(venvs.shutil, "which", lambda name: None)
    with pytest.raises(PeerError, match=r"python3\.11"):
        MXNET.find(may_install=True)


def test_memory_of_one_push():
    found = memory.measure_one(Work(1, (262_144,), 4), "numpy")
    assert found["before_nbytes"] > 5 * found["value_nbytes"]
    # Two sums of parts are alive at once.
    assert found["added_nbytes"] > 1.5 * found["value_nbytes"]


# ------------------------------------------------------------ numbers


def test_works_are_those_that_were_asked_for():
    assert [each.name for each in bench.WORKS] == [
        "1 × 25M, 4 parts, assign",
        "160 × 160k, 4 parts, assign",
        "1000 × 1000, 2 parts, assign",
        "one 2×3 key, 1 part, assign",
        "1 × 25M, 4 parts, SGD momentum 0.9",
        "160 × 160k, 1 part, SGD momentum 0.9",
        "1000 × 1000, 1 part, SGD momentum 0.9",
    ]


def test_bytes_to_move():
    assert Work(2, (10,), 4).moved_nbytes == (4 + 2) * 80
    assert Work(2, (10,), 4, "momentum").moved_nbytes == (4 + 5) * 80


def test_summary_of_known_times():
    times = {"tensorkv": [1.0, 2.0, 3.0], "numpy": [4.0, 2.0, 12.0], "copy": [2.0, 2.0, 2.0]}
    pairs = {"numpy": ("numpy", "tensorkv"), "torch": ("torch", "tensorkv")}
    assert ratios(times, pairs) == {"numpy": {"median": 2.0, "min": 1.0, "max": 4.0}}
    assert spread(times)["tensorkv"] == pytest.approx({"p50_ms": 2e3, "p90_ms": 2.8e3, "max_ms": 3e3})
    measured = {"times_s": {"push+pull": times, "pushpull": times}, "copy_nbytes": 2e9, "moved_nbytes": 1e9}
    found = bench.limit(measured)
    assert found["copy_gb_per_s"] == 1
    assert found["limit_ms"] == 1000
    assert found["times_limit"]["pushpull"] == 2


def test_slope_of_the_upper_half():
    points = [{"x": x, "ms": max(10.0, x**2)} for x in (1, 2, 4, 8, 16)]
    assert growth.slope(points) == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
