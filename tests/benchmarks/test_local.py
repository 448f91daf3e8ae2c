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

pytest.importorskip("matplotlib")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
MODULES = sorted(path.stem for path in BENCHMARKS.glob("*.py"))
PEERS = ("torch", "numpy")


def load(name):
    if str(BENCHMARKS) not in sys.path:
        sys.path.append(str(BENCHMARKS))
    return importlib.import_module(name)


bench, contenders, growth, memory, peers, report, works = map(
    load, ("bench_local", "contenders", "growth", "memory", "peers", "report", "works")
)


def run(out, *arguments):
    return bench.main(["--quick", "--no-mxnet", "--out", str(out), *arguments])


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
    assert result["schema"] == 1
    assert result["quick"] is True
    assert set(result["versions"]) == {"python", "torch", "numpy", "tensorkv"}
    assert {"cpu", "cores", "memory_nbytes", "kernel", "load_before", "load_after"} <= set(result["machine"])
    assert result["missing"] == {"mxnet": "left out with --no-mxnet"}
    assert [work["name"] for work in result["works"]] == [work.name for work in works.QUICK]
    for work in result["works"]:
        assert set(work["times_s"]) == {"push+pull", "pushpull"}
        for times in work["times_s"].values():
            assert set(times) == {"tensorkv", "copy", *PEERS}
            assert all(len(raw) == 2 and min(raw) > 0 for raw in times.values())
        assert work["summary"] == report.summarize(work)
    assert {line["rule"] for line in result["growth"]} == {"assign", "sgd"}
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
    assert bench.main(["--quick", "--only", "2×3", "--out", str(tmp_path), "--mxnet-python", missing]) == 0
    assert f"MXNet was not measured**: there is no {missing}" in (tmp_path / "local.md").read_text()


@pytest.mark.skipif(not peers.MXNET_VENV.exists(), reason="MXNet's virtual environment has not been made")
def test_with_mxnet(tmp_path):
    assert bench.main(["--quick", "--only", "1 × 100k", "--only", "20 ×", "--out", str(tmp_path)]) == 0
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
        bench.main(arguments)
    assert message in capsys.readouterr().err


# ------------------------------------------------------------ wrong results


def fails(tmp_path, capsys, only):
    assert run(tmp_path / "out", "--only", only) == 1
    assert not (tmp_path / "out").exists()
    error = capsys.readouterr().err
    assert "error: " in error
    assert "expected" in error
    return error


@pytest.mark.parametrize("only", [work.name for work in works.QUICK])
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
    work = works.Work(1, (97,), 1, "sgd")
    ((gradient,),) = works.make_parts(work)
    value, velocity = works.first_values(work)[0].copy(), np.zeros(97, np.float32)
    worst = 0.0
    for step in range(1, 601):
        before = value.copy()
        velocity = np.float32(works.MOMENTUM) * velocity + gradient
        value -= np.float32(works.LR) * velocity
        works.check(work, step, 1, lambda _: value)  # noqa: B023 - called at once
        with pytest.raises(works.WrongResultError):
            works.check(work, step, 1, lambda _: before)  # noqa: B023
        (_, right), *_ = works.right_slices(work, 0, step, 1)
        at = int(np.argmin(np.abs(right)))
        worst = max(worst, abs(float(value[at]) - right[at]) / max(abs(right[at]), works.LR))
    # So near zero roundings are more than a ten-thousandth, of the result or of the rate.
    assert worst > works.TOLERANCE


@pytest.mark.parametrize("rule", ["assign", "sgd"])
@pytest.mark.parametrize("name", ["tensorkv", *PEERS])
@pytest.mark.parametrize("verb", works.VERBS)
def test_contenders_compute_what_torch_does(name, rule, verb):
    work = works.Work(3, (5, 50), 3, rule)
    contender = contenders.build(name, work)
    values = [torch.full(work.shape, 0.5, dtype=torch.float64) for _ in range(work.keys)]
    optimizer = torch.optim.SGD(values, lr=works.LR, momentum=works.MOMENTUM)
    for _ in range(4):
        for value, parts in zip(values, works.make_parts(work), strict=True):
            value.grad = sum(torch.from_numpy(part) for part in parts).double()
        optimizer.step()
    assert contender.time(verb, 4) > 0
    contender.check()
    for value, out in zip(values, contender.outs, strict=True):
        np.testing.assert_allclose(out, value.grad if rule == "assign" else value, rtol=1e-5, atol=1e-7)
    contender.close()


def test_a_contender_in_another_process():
    peer = peers.ProcessPeer("numpy")
    try:
        peer.build(works.Work(2, (10, 10), 2))
        assert peer.time("push+pull", 2) > 0
        peer.check()
        peer.renew()
        with pytest.raises(works.WrongResultError, match=r"numpy: .*nan"):
            peer.check()
        found = peer.memory()
        assert 0 < found["rss"] <= found["peak"]
        with pytest.raises(peers.PeerError, match="numpy: time: KeyError"):
            peer.time("nothing")
        peer.close()
    finally:
        peer.end()


def test_a_process_that_dies_is_an_error(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no luck today >&2\nexit 3\n")
    python.chmod(0o755)
    with pytest.raises(peers.PeerError, match="no luck today"):
        peers.ProcessPeer("mxnet", python)


def test_a_library_that_is_not_there_is_an_error():
    with pytest.raises(peers.PeerError, match="no_such_library"):
        peers.ProcessPeer("no_such_library")


def test_an_installation_that_fails_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "MXNET_VENV", tmp_path / "venv")
    monkeypatch.setattr(peers.sys, "version_info", (3, 12))
    monkeypatch.setattr(peers.shutil, "which", lambda name: None)
    with pytest.raises(peers.PeerError, match=r"python3\.11"):
        peers.start_mxnet(may_install=True)


def test_memory_of_one_push():
    found = memory.measure_one(works.Work(1, (262_144,), 4), "numpy", None)
    assert found["before_nbytes"] > 5 * found["value_nbytes"]
    # Two sums of parts are alive at once.
    assert found["added_nbytes"] > 1.5 * found["value_nbytes"]


# ------------------------------------------------------------ numbers


def test_works_are_those_that_were_asked_for():
    assert [work.name for work in works.WORKS] == [
        "1 × 25M, 4 parts, assign",
        "160 × 160k, 4 parts, assign",
        "1000 × 1000, 2 parts, assign",
        "one 2×3 key, 1 part, assign",
        "1 × 25M, 4 parts, SGD momentum 0.9",
        "160 × 160k, 1 part, SGD momentum 0.9",
        "1000 × 1000, 1 part, SGD momentum 0.9",
    ]


def test_bytes_to_move():
    assert works.Work(2, (10,), 4).moved_nbytes == (4 + 2) * 80
    assert works.Work(2, (10,), 4, "sgd").moved_nbytes == (4 + 5) * 80


def test_summary_of_known_times():
    times = {"tensorkv": [1.0, 2.0, 3.0], "numpy": [4.0, 2.0, 12.0], "copy": [2.0, 2.0, 2.0]}
    work = {"times_s": {"push+pull": times, "pushpull": times}, "copy_nbytes": 2e9, "moved_nbytes": 1e9}
    summary = report.summarize(work)
    assert summary["pushpull"]["ratios"] == {"numpy": {"median": 2.0, "min": 1.0, "max": 4.0}}
    assert summary["pushpull"]["spread"]["tensorkv"] == pytest.approx({"p50_ms": 2e3, "p90_ms": 2.8e3, "max_ms": 3e3})
    assert summary["copy_gb_per_s"] == 1
    assert summary["limit_ms"] == 1000
    assert summary["times_limit"]["pushpull"] == 2


def test_slope_of_the_upper_half():
    points = [{"x": x, "ms": max(10.0, x**2)} for x in (1, 2, 4, 8, 16)]
    assert growth.slope(points) == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    assert doctest.testmod(load(name)).failed == 0
