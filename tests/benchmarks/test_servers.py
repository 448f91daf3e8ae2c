"""The benchmark of parameter servers works and notices wrong results. How fast anything is, is not tested."""

from __future__ import annotations

import importlib
import json
import os
import sys
import textwrap
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import tensorkv

pytest.importorskip("matplotlib")
pytest.importorskip("ray")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def load(name):
    if str(BENCHMARKS) not in sys.path:
        sys.path.append(str(BENCHMARKS))
    return importlib.import_module(name)


bench, compare, contenders, peers, report, servers_works, works = map(
    load,
    ("bench_servers", "servers_compare", "servers_contenders", "peers", "servers_report", "servers_works", "works"),
)
WrongResultError = works.WrongResultError
TINY = "MXNet: one 2×3 key"


def run(out, *arguments):
    return bench.main(["--quick", "--out", str(out), *arguments])


@pytest.fixture(scope="module")
def cluster():
    """One Ray for all tests: to start one takes seconds."""
    with warnings.catch_warnings():
        # Ray forks when it starts, of which JAX warns if another test has used it.
        warnings.simplefilter("ignore", RuntimeWarning)
        keeper = tensorkv.create("dist_async", name="keeper")
    yield
    keeper.close()


@pytest.fixture
def plant(tmp_path, monkeypatch):
    """Return what makes every process that is started run some code first."""

    def do(code):
        folder = tmp_path / "planted"
        folder.mkdir()
        head = f"import os, sys\nsys.path.append({str(BENCHMARKS)!r})\n"
        (folder / "sitecustomize.py").write_text(head + textwrap.dedent(code))
        monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)

    return do


# ------------------------------------------------------------ a whole run


def test_quick_run_writes_raw_times_tables_and_a_plot(cluster, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(out, "--no-mxnet") == 0
    assert sorted(path.name for path in out.iterdir()) == ["servers.json", "servers.md", "servers.png"]
    assert (out / "servers.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((out / "servers.json").read_text())
    table = (out / "servers.md").read_text()
    assert table in capsys.readouterr().out
    check_result(result)
    for head in ("Beside MXNet", "Single calls", "Durability", "Workers and servers", "Readers", "Recovery", "Spread"):
        assert f"## {head}\n" in table
    assert "MXNet was not measured**: left out" in table
    assert "at toy sizes" in table
    assert "RAY_ADDRESS" not in os.environ


def check_result(result):
    assert result["schema"] == 1
    assert result["quick"] is True
    assert result["missing"] == {"mxnet": "left out with --no-mxnet"}
    for topic, names, summarize in (
        ("works", {"tensorkv1"}, compare.summarize),
        ("durability", {"tensorkv1", "process"}, compare.summarize_durability),
    ):
        assert [work["name"] for work in result[topic]] == [
            work.name
            for work in (servers_works.beside_peers if topic == "works" else servers_works.durability)(quick=True)
        ]
        for work in result[topic]:
            assert set(work["times_s"]) == set(work["found"]) == names
            assert all(len(raw) == 2 and min(raw) > 0 for raw in work["times_s"].values())
            assert work["summary"] == summarize(work["times_s"])
    found = result["works"][1]["found"]["tensorkv1"]
    assert 0 < found["p50_ms"] <= found["p90_ms"] <= found["p99_ms"]
    journals = result["durability"][0]["found"]
    assert journals["tensorkv1"] is None
    assert journals["process"]["records"] > 16
    assert [(point["workers"], point["servers"]) for point in result["growth"]] == [(1, 2)]
    [readers] = result["readers"]
    assert readers["copies"] == 1
    assert readers["copies_while_timed"] == 0
    assert readers["pulls"] > 15
    assert [len(point["times_s"]) for point in readers["points"]] == [5, 10]
    [recovery] = result["recovery"]
    assert len(recovery["times_s"]) == 1
    assert recovery["log_nbytes"] > recovery["value_nbytes"]


def test_with_mxnet(cluster, tmp_path):
    if not peers.MXNET_VENV.exists():
        pytest.skip(f"{peers.MXNET_VENV.name} has not been made")
    assert run(tmp_path, "--only", TINY) == 0
    result = json.loads((tmp_path / "servers.json").read_text())
    assert set(result["works"][0]["summary"]["ratios"]) == {"mxnet1"}
    assert result["missing"] == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reps", "3"], "fewer than 7"),
        (["--only", "nothing"], "MXNet: 1 × 25M, 2 workers, SGD momentum 0.9"),
        (["--workers", "0"], "0 is not at least 1"),
        (["--readers", "two"], "not numbers"),
    ],
)
def test_arguments_that_make_no_sense(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main(arguments)
    assert message in capsys.readouterr().err


# ------------------------------------------------------------ wrong results

PLANTED = {
    "a step too few": (
        TINY,
        "tensorkv1: MXNet: one 2×3 key, 2 workers, SGD momentum 0.9: at the end: element 0 of key 0",
        """
        import servers_contenders
        right = servers_contenders.Servers.exchange

        def forgetful(self):
            (right if self.rank == 0 or len(self.laps) != 7 else servers_contenders.Servers.pull)(self)

        servers_contenders.Servers.exchange = forgetful
        """,
    ),
}


@pytest.mark.parametrize("what", PLANTED)
def test_what_is_wrong_is_noticed(what, cluster, tmp_path, capsys, plant):
    only, message, code = PLANTED[what]
    plant(code)
    assert run(tmp_path / "out", "--no-mxnet", "--only", only) == 1
    assert not (tmp_path / "out").exists()
    error = capsys.readouterr().err
    assert f"error: {message}" in error
    assert "expected" in error


class Fake(contenders.Worker):
    """Servers in this process: two workers, of which the other is always just behind."""

    def __init__(self, work):
        super().__init__(work, 0)
        self.value = [np.full(work.shape, works.FIRST, np.float32) for _ in range(work.keys)]
        self.momentum = [np.zeros(work.shape, np.float32) for _ in range(work.keys)]

    def step(self):
        for value, momentum, [part] in zip(self.value, self.momentum, self.parts, strict=True):
            momentum[...] = works.MOMENTUM * momentum + part
            value -= works.LR * momentum

    def exchange(self):
        self.step()
        self.pull()
        self.step()

    def pull(self):
        for out, value in zip(self.outs, self.value, strict=True):
            out[...] = value


def test_what_the_same_gradients_give_in_any_order():
    work = servers_works.Serving(3, (200,), 2, "sgd")
    fake = Fake(work)
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
    work = servers_works.Serving(1, (97,), 2, "sgd")
    fake = Fake(work)
    for _ in range(10):
        fake.step()
    fake.pull()
    servers_works.check(work, fake.out, 10, 10)
    servers_works.check(work, fake.out, 5, 12)
    for least, most in ((11, 20), (5, 9)):
        with pytest.raises(WrongResultError, match=f"that is {least} to {most} steps"):
            servers_works.check(work, fake.out, least, most)
    with pytest.raises(WrongResultError, match="float64"):
        servers_works.check(work, lambda key: np.zeros(97), 1, 1)


# ------------------------------------------------------------ numbers


def test_every_goal_is_of_a_work():
    names = {work.name for work in [*servers_works.beside_peers(quick=False), *servers_works.durability(quick=False)]}
    assert set(servers_works.GOALS) == names
    work = servers_works.beside_peers(quick=False)[0]
    assert replace(work, topic="").name == "1 × 25M, 2 workers, SGD momentum 0.9"


def test_summaries_of_known_times():
    times = {"tensorkv1": [1.0, 2.0, 3.0], "tensorkv2": [2.0] * 3, "mxnet1": [4.0, 2.0, 12.0], "mxnet2": [4.0] * 3}
    found = compare.summarize(times)["ratios"]
    assert found["mxnet1"] == {"median": 2.0, "min": 1.0, "max": 4.0}
    assert found["mxnet2"]["median"] == 2.0
    summary = compare.summarize_durability({"tensorkv1": [1.0] * 4, "process": [1.0, 1.0, 1.0, 5.0]})
    assert summary["ratios"]["process"]["median"] == 1.0
    assert summary["of_means"] == {"process": 2.0}
    assert summary["spread"]["process"]["mean_ms"] == 2e3


def test_goals_are_beside_what_was_measured():
    [work] = [{"name": name} for name in servers_works.GOALS if "160" in name]
    assert report._goal(work["name"]) == "≥ 2.5"
    assert report._goal("durability: 1 × 25M, 2 workers, SGD momentum 0.9") == "≤ 2"
    assert report._goal("durability: 1 × 1000, 2 workers, SGD momentum 0.9") == "–"
