"""The benchmark of parameter servers works and notices wrong results. How fast anything is, is not tested."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import tensorkv
from benchmarks.__main__ import main
from benchmarks.common import work
from benchmarks.common.report import ratios
from benchmarks.common.venvs import MXNET, REDIS
from benchmarks.common.work import WrongResultError
from benchmarks.servers import bench, contenders, works
from tests.conftest import ROOT

pytest.importorskip("ray")

# Each test starts many processes, which takes long on a busy machine.
TINY = "MXNet: one 2×3 key"


def run(out, *arguments):
    return main(["servers", "--quick", "--out", str(out), *arguments])


@pytest.fixture(scope="module")
def cluster():
    """One Ray for all tests: to start one takes seconds."""
    with warnings.catch_warnings():
        # Ray forks when it starts, of which JAX warns if another test has used it.
        warnings.simplefilter("ignore", RuntimeWarning)
        keeper = tensorkv.create("dist_async", name="keeper")
    yield
    keeper.close()


# ------------------------------------------------------------ a whole run


def test_quick_run_writes_raw_times_tables_and_a_plot(cluster, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(out, "--no-mxnet", "--no-redis") == 0
    assert sorted(path.name for path in out.iterdir()) == ["servers.json", "servers.md", "servers.png"]
    assert (out / "servers.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((out / "servers.json").read_text())
    table = (out / "servers.md").read_text()
    assert table in capsys.readouterr().out
    check_result(result)
    for head in (
        "Beside MXNet",
        "Single calls",
        "Tables beside Redis",
        "Durability",
        "Workers and servers",
        "Readers",
        "Recovery",
        "Spread",
    ):
        assert f"## {head}\n" in table
    assert "MXNet was not measured**: left out" in table
    assert "at toy sizes" in table
    assert "RAY_ADDRESS" not in os.environ


def check_result(result):
    assert result["schema"] == 2
    assert result["quick"] is True
    assert result["missing"] == {"mxnet": "left out with --no-mxnet", "redis": "left out with --no-redis"}
    for topic, make, names in (
        ("works", works.beside_peers, {"tensorkv1"}),
        ("tables", works.tables, {"rows", "embedding"}),
        ("durability", works.durability, {"tensorkv1", "process"}),
    ):
        made = make(quick=True)
        assert [each["name"] for each in result[topic]] == [each.name for each in made]
        for measured in result[topic]:
            times = measured["times_s"]["pushpull"]
            assert set(times) == set(measured["summary"]["pushpull"]["spread"]) == names
            assert topic == "tables" or set(measured["found"]) == names
            assert all(len(raw) == 2 and min(raw) > 0 for raw in times.values())
    assert set(result["durability"][0]["of_means"]) == {"process"}
    found = result["works"][1]["found"]["tensorkv1"]
    assert 0 < found["p50_ms"] <= found["p90_ms"] <= found["p99_ms"]
    logs = result["durability"][0]["found"]
    assert logs["tensorkv1"] is None
    assert logs["process"]["records"] > 16
    assert [(point["workers"], point["servers"]) for point in result["growth"]] == [(1, 2)]
    [readers] = result["readers"]
    # Readers copy the value from where it is.
    assert readers["copies"] == 0
    assert readers["copies_while_timed"] == 0
    assert readers["pulls"] > 15
    assert [len(point["times_s"]) for point in readers["points"]] == [5, 10]
    assert [each["spare"] for each in result["recovery"]] == [False, True]
    for recovery in result["recovery"]:
        assert len(recovery["times_s"]) == 1
        assert recovery["log_nbytes"] > recovery["value_nbytes"]


def test_with_mxnet(cluster, tmp_path):
    if not Path(ROOT, MXNET.folder).exists():
        pytest.skip(f"{MXNET.folder} has not been made")
    assert run(tmp_path, "--only", TINY) == 0
    result = json.loads((tmp_path / "servers.json").read_text())
    assert set(result["works"][0]["summary"]["pushpull"]["ratios"]) == {"mxnet1"}
    assert result["missing"] == {}


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server has not been made available")
def test_with_redis(cluster, tmp_path):
    if not Path(ROOT, REDIS.folder).exists():
        pytest.skip(f"{REDIS.folder} has not been made")
    assert run(tmp_path, "--no-mxnet", "--only", "tables") == 0
    result = json.loads((tmp_path / "servers.json").read_text())
    assert set(result["tables"][0]["summary"]["pushpull"]["ratios"]) == {"rows", "embedding"}
    assert set(result["missing"]) == {"mxnet"}


def test_without_redis_the_tables_say_why(cluster, tmp_path):
    assert run(tmp_path, "--no-mxnet", "--only", "tables", "--redis-server", str(tmp_path / "none")) == 0
    result = json.loads((tmp_path / "servers.json").read_text())
    assert not {"out", "folder", "redis_server"} & result["arguments"].keys(), "a path of this machine"
    [work] = result["tables"]
    assert set(work["times_s"]["pushpull"]) == {"rows", "embedding"}
    assert f"Redis was not measured**: there is no {tmp_path / 'none'}" in (tmp_path / "servers.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reps", "3"], "fewer than 7"),
        (["--only", "nothing"], "MXNet: 1 × 25M, 2 workers, SGD momentum 0.9"),
        (["--workers", "0"], "expected at least 1 worker, got 0"),
        (["--readers", "two"], "expected numbers separated by commas"),
    ],
)
def test_arguments_that_make_no_sense(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["servers", *arguments])
    assert message in capsys.readouterr().err


# ------------------------------------------------------------ wrong results

PLANTED = {
    "a step too few": (
        TINY,
        "tensorkv1: MXNet: one 2×3 key, 2 workers, SGD momentum 0.9: at the end: element 0 of key 0",
        """
        from benchmarks.servers import contenders
        right = contenders.Servers.exchange

        def forgetful(self):
            (right if self.rank == 0 or len(self.laps) != 7 else contenders.Servers.pull)(self)

        contenders.Servers.exchange = forgetful
        """,
    ),
    "rows that are not stepped": (
        "tables",
        "rows: tables: 100 of 1000 rows of 4, SGD: at the end: row ",
        """
        from benchmarks.servers import contenders
        right = contenders.Rows.step

        def forgetful(self, ids, gradients):
            return right(self, ids, gradients) if self._done != 5 else self.pull(ids)

        contenders.Rows.step = forgetful
        """,
    ),
}


@pytest.mark.parametrize("what", PLANTED)
def test_what_is_wrong_is_noticed(what, cluster, tmp_path, capsys, plant):
    only, message, code = PLANTED[what]
    plant(code)
    assert run(tmp_path / "out", "--no-mxnet", "--no-redis", "--only", only) == 1
    assert not (tmp_path / "out").exists()
    error = capsys.readouterr().err
    assert f"error: {message}" in error
    assert "expected" in error


class Fake(contenders.Worker):
    """Servers in this process: two workers, of which the other is always just behind."""

    def __init__(self, served):
        super().__init__(served, 0)
        self.value = [np.full(served.shape, work.FIRST, np.float32) for _ in range(served.keys)]
        self.momentum = [np.zeros(served.shape, np.float32) for _ in range(served.keys)]

    def step(self):
        for value, momentum, [part] in zip(self.value, self.momentum, self.parts, strict=True):
            momentum[...] = work.MOMENTUM * momentum + part
            value -= work.LR * momentum

    def exchange(self):
        self.step()
        self.pull()
        self.step()

    def pull(self):
        for out, value in zip(self.outs, self.value, strict=True):
            out[...] = value


def test_what_the_same_gradients_give_in_any_order():
    served = works.Serving(3, (200,), 2, "momentum")
    fake = Fake(served)
    fake.time("pushpull", 6)
    fake.renew()
    assert all(np.isnan(out).all() for out in fake.outs)
    with pytest.raises(WrongResultError, match=r"the last call: element 0 of key 0 is np\.float32\(nan"):
        fake.check()
    fake.time("pushpull", 4)
    assert len(fake.laps) == 4
    fake.check()
    fake.time("pushpull")
    fake.value[2][199] += 0.001
    with pytest.raises(WrongResultError, match="at the end: element 199 of key 2"):
        fake.check()


def test_steps_too_many_and_too_few():
    served = works.Serving(1, (97,), 2, "momentum")
    fake = Fake(served)
    for _ in range(10):
        fake.step()
    fake.pull()
    works.check(served, fake.out, 10, 10)
    works.check(served, fake.out, 5, 12)
    for least, most in ((11, 20), (5, 9)):
        with pytest.raises(WrongResultError, match=f"that is {least} to {most} steps"):
            works.check(served, fake.out, least, most)
    with pytest.raises(WrongResultError, match="float64"):
        works.check(served, lambda key: np.zeros(97), 1, 1)


def test_rows_that_are_not_those_of_so_many_calls():
    table = works.Table(1000, 4, 100)
    ids = np.arange(1000)
    rows = np.full((1000, 4), work.FIRST, np.float32)
    for number in range(25):
        batch = table.ids(number % works.BATCHES)
        assert len(set(batch.tolist())) == 100
        rows[batch] -= np.float32(works.TABLE_LR) * table.gradients(batch)
    table.check(rows, ids, 25, "now")
    for calls in (24, 26):
        with pytest.raises(WrongResultError, match=r"tables: 100 of 1000 rows of 4, SGD: now: row \d+ is"):
            table.check(rows, ids, calls, "now")
    rows[7, 3] = np.nan
    with pytest.raises(WrongResultError, match=r"now: row 7 is .*nan.*, expected"):
        table.check(rows, ids, 25, "now")
    with pytest.raises(WrongResultError, match="float64"):
        table.check(rows.astype(np.float64), ids, 25, "now")


# ------------------------------------------------------------ numbers


def test_every_goal_is_of_a_work():
    names = {work.name for make in (works.beside_peers, works.durability, works.tables) for work in make(quick=False)}
    assert set(works.GOALS) == names
    first = works.beside_peers(quick=False)[0]
    assert replace(first, topic="").name == "1 × 25M, 2 workers, SGD momentum 0.9"


def test_ratios_are_of_as_many_servers():
    times = {"tensorkv1": [1.0, 2.0, 3.0], "tensorkv2": [2.0] * 3, "mxnet1": [4.0, 2.0, 12.0], "mxnet2": [4.0] * 3}
    found = ratios(times, bench.PAIRS)
    assert found["mxnet1"] == {"median": 2.0, "min": 1.0, "max": 4.0}
    assert found["mxnet2"]["median"] == 2.0


def test_means_of_known_times():
    times = {"tensorkv1": [1.0] * 4, "process": [1.0, 1.0, 1.0, 5.0]}
    summary = {"spread": {name: {} for name in times}, "ratios": ratios(times, bench.DURABILITY_PAIRS)}
    found = bench.with_means({"times_s": {"pushpull": times}, "summary": {"pushpull": summary}})
    assert summary["ratios"]["process"]["median"] == 1.0
    assert found["of_means"] == {"process": 2.0}
    assert summary["spread"]["process"]["mean_ms"] == 2e3


def test_goals_are_beside_what_was_measured():
    [name] = [name for name in works.GOALS if "160" in name]
    assert bench._goal(name) == "≥ 2.5"
    assert bench._goal("durability: 1 × 25M, 2 workers, SGD momentum 0.9") == "≤ 2"
    assert bench._goal("durability: 1 × 1000, 2 workers, SGD momentum 0.9") == "–"
