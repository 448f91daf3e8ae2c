"""The benchmark of processes works and notices wrong results. How fast anything is, is not tested."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.common import launch
from benchmarks.common.report import ratios
from benchmarks.common.team import Process, Team
from benchmarks.common.venvs import MPI, MXNET, PeerError
from benchmarks.common.work import WrongResultError
from benchmarks.sync import bench, works
from tests.conftest import ROOT

# Each test starts many processes, which takes long on a busy machine.
GLOO = "benchmarks.sync.contenders:Gloo"


def run(out, *arguments):
    return main(["sync", "--quick", "--out", str(out), *arguments])


# ------------------------------------------------------------ a whole run


def test_quick_run_writes_raw_times_tables_and_a_plot(tmp_path, capsys):
    assert run(tmp_path / "out", "--no-mxnet", "--no-mpi") == 0
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["sync.json", "sync.md", "sync.png"]
    assert (out / "sync.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((out / "sync.json").read_text())
    table = (out / "sync.md").read_text()
    assert table in capsys.readouterr().out
    check_result(result)
    check_table(table, result)


def check_result(result):
    assert result["schema"] == 2
    assert result["quick"] is True
    assert result["missing"] == {"mxnet": "left out with --no-mxnet", "mpi": "left out with --no-mpi"}
    assert [work["name"] for work in result["works"]] == [work.name for work in works.exchanges(2, quick=True)]
    for work in result["works"]:
        times = work["times_s"]["pushpull"]
        assert set(times) == {"tensorkv", *(["gloo"] if work["rule"] == "assign" else [])}
        assert all(len(raw) == 2 and min(raw) > 0 for raw in times.values())
        assert set(work["summary"]["pushpull"]["ratios"]) == set(times) - {"tensorkv"}
        for found in work["memory_nbytes"].values():
            assert min(found[when]["ranks"] for when in ("before", "most", "after")) > 1e6
    assert [work["optimizer"] for work in result["training"]] == ["sgd", "adamw"]
    for training, falls_to in zip(result["training"], (0.9, 0.999), strict=True):
        assert {"tensorkv", "ddp"} <= set(training["times_s"]["pushpull"])
        assert all(losses[-1] < falls_to * losses[0] for ranks in training["losses"].values() for losses in ranks)


def check_table(table, result):
    for work in result["works"]:
        assert f"| {work['name']} | tensorkv |" in table
    for head in ("## Exchanges", "## A step of training", "MXNet was not measured**: left out", "at toy sizes"):
        assert head in table
    # Values this small are not what a process has most of.
    assert "## Memory" not in table


@pytest.mark.parametrize("name", ["mxnet", "mpi"])
def test_with_a_peer_that_has_an_environment_of_its_own(name, tmp_path):
    folder = {"mxnet": MXNET, "mpi": MPI}[name].folder
    if not Path(ROOT, folder).exists():
        pytest.skip(f"{folder} has not been made")
    others = [f"--no-{other}" for other in ("mxnet", "mpi") if other != name]
    assert run(tmp_path, "--only", "16 × 1600, 2 ranks, assign", *others) == 0
    result = json.loads((tmp_path / "sync.json").read_text())
    found = {"mxnet": {"mxnet1", "mxnet2"}, "mpi": {"mpi"}}[name]
    assert set(result["works"][0]["summary"]["pushpull"]["ratios"]) == {"gloo", *found}
    assert set(result["missing"]) == {"mxnet", "mpi"} - {name}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reps", "3"], "fewer than 7"),
        (["--only", "nothing"], "1 × 25M, 2 ranks, assign"),
        (["--ranks", "1"], "expected at least 2 ranks, got 1"),
        (["--ranks", "two"], "expected numbers separated by commas"),
    ],
)
def test_arguments_that_make_no_sense(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["sync", *arguments])
    assert message in capsys.readouterr().err


def test_who_cannot_start_is_missing_with_the_reason(tmp_path, plant):
    plant("""
        import tensorkv

        def refuse(*arguments):
            raise RuntimeError("no luck\\ntoday")

        tensorkv.create = refuse
        """)
    assert run(tmp_path / "out", "--no-mxnet", "--no-mpi", "--only", "2×3") == 0
    result = json.loads((tmp_path / "out" / "sync.json").read_text())
    assert result["missing"]["tensorkv"] == "tensorkv: open: RuntimeError: no luck today"
    assert list(result["works"][0]["times_s"]["pushpull"]) == ["gloo"]
    table = (tmp_path / "out" / "sync.md").read_text()
    assert "**tensorkv was not measured**: tensorkv: open: RuntimeError: no luck today" in table
    assert "| one 2×3 key, 2 ranks, assign | – | – | – | – | – |" in table


# ------------------------------------------------------------ wrong results

PLANTED = {
    "one rank of a peer is wrong": (
        "2×3",
        "gloo: one 2×3 key, 2 ranks, assign: element 5",
        """
        from benchmarks.sync import contenders
        right = contenders.Gloo.exchange

        def wrong(self):
            right(self)
            if self.rank == 1:
                self.outs[-1].flat[-1] += 0.125

        contenders.Gloo.exchange = wrong
        """,
    ),
    "an out that is not written any more": (
        "20 × 100",
        "tensorkv: 20 × 100, 2 ranks, assign: element 0 of key 0 is np.float32(nan)",
        """
        import tensorkv
        right, done = tensorkv.KVStore.pushpull, []

        def lazy(self, key, value, out):
            done.append(key)
            if len(done) <= 6:
                right(self, key, value, out=out)

        tensorkv.KVStore.pushpull = lazy
        """,
    ),
    "a step too few": (
        "1 × 100k, 2 ranks, SGD",
        "tensorkv: 1 × 100k, 2 ranks, SGD momentum 0.9: element 0",
        """
        import tensorkv
        right, done = tensorkv.KVStore.pushpull, []

        def forgetful(self, key, value, out):
            done.append(key)
            if len(done) != 7:
                right(self, key, value, out=out)

        tensorkv.KVStore.pushpull = forgetful
        """,
    ),
    "another training": (
        "training",
        "training 12,480 parameters, 2 ranks: the loss of rank 0 at step 2",
        """
        from benchmarks.sync import training
        right = training.Trained.__init__

        def other(self, work, rank):
            right(self, work, rank)
            if type(self) is not training.DDP:
                training._NUMBERS["sgd"]["momentum"] = 0.8

        training.Trained.__init__ = other
        """,
    ),
}


@pytest.mark.parametrize("what", PLANTED)
def test_what_is_wrong_is_noticed(what, tmp_path, capsys, plant):
    only, message, code = PLANTED[what]
    plant(code)
    assert run(tmp_path / "out", "--no-mxnet", "--no-mpi", "--only", only) == 1
    assert not (tmp_path / "out").exists()
    error = capsys.readouterr().err
    assert f"error: {message}" in error
    assert "expected" in error


def test_losses_that_differ_or_do_not_fall():
    work = works.Training(2, 8, 2)
    works.check_losses(work, [[2, 1], [3, 2]], [[2, 1.000001], [3, 2]])
    with pytest.raises(WrongResultError, match=r"rank 0 at step 1 is 1, expected 1\.0001"):
        works.check_losses(work, [[2, 1], [3, 2]], [[2, 1.0001], [3, 2]])
    with pytest.raises(WrongResultError, match="rank 1 at step 1 is nan, expected 2"):
        works.check_losses(work, [[2, 1], [3, float("nan")]], [[2, 1], [3, 2]])
    with pytest.raises(WrongResultError, match="rank 0 went from 1 to 1"):
        works.check_losses(work, [[1, 1]], [[1, 1]])


# ------------------------------------------------------------ teams


def test_a_team_that_is_asked_and_ends():
    team = launch.torchrun("gloo", 2, GLOO)
    try:
        team.build(works.Exchange(3, (10, 10), 2))
        team.open()
        before = team.memory()
        assert team.warm_up("pushpull", 2)["ranks"] > 0.5 * before["ranks"] > 0
        assert before["helpers"] == 0
        assert team.time("pushpull", 2) > 0
        team.ask("check")
        team.ask("renew")
        with pytest.raises(WrongResultError, match=r"gloo: .*nan"):
            team.ask("check")
        with pytest.raises(PeerError, match="this team has failed before"):
            team.ask("check")
    finally:
        team.end()
    assert all(process.returncode is not None for process in team._processes)


def test_a_rank_that_dies_is_an_error(plant):
    plant("""
        from benchmarks.sync import contenders

        def die(self):
            print("no luck today", flush=True)
            os._exit(3)

        contenders.Gloo.exchange = die
        """)
    team = launch.torchrun("gloo", 2, GLOO)
    try:
        team.build(works.Exchange(1, (10,), 2))
        with pytest.raises(PeerError, match=r"gloo: a rank ended at 'time'(.|\n)*no luck today"):
            team.time("pushpull")
    finally:
        team.end()


def test_processes_that_do_not_come_are_an_error():
    start = Process(["sh", "-c", "echo no luck today; exit 3"], {})
    with pytest.raises(PeerError, match=r"x: a process ended at its start\nno luck today"):
        Team("x", 1, [start])
    with pytest.raises(PeerError, match="x: /no/such/program: No such file"):
        Team("x", 1, [Process(["/no/such/program"], {})])


# ------------------------------------------------------------ numbers


def test_works_are_those_that_were_asked_for():
    assert [work.name for work in works.exchanges(4, quick=False)] == [
        "1 × 25M, 4 ranks, assign",
        "160 × 160k, 4 ranks, assign",
        "1000 × 1000, 4 ranks, assign",
        "one 2×3 key, 4 ranks, assign",
        "1 × 25M, 4 ranks, SGD momentum 0.9",
        "160 × 160k, 4 ranks, SGD momentum 0.9",
    ]


def test_ratios_of_training():
    times = {"tensorkv": [1.0, 2.0, 3.0], "overlap": [1.0] * 3, "ddp": [4.0, 2.0, 12.0]}
    assert ratios(times, bench._TRAINING_PAIRS) == {
        "ddp": {"median": 2.0, "min": 1.0, "max": 4.0},
        "ddp beside overlap": {"median": 4.0, "min": 2.0, "max": 12.0},
    }
    assert ratios({"gloo": [1.0]}, bench._PAIRS) == {}


def test_memory_is_what_was_added_in_multiples_of_the_values():
    found = {"before": {"ranks": 100e6, "helpers": 5e6}, "most": {"ranks": 400e6, "helpers": 205e6}}
    work = {"name": "w", "keys": 1, "parts": 2, "value_nbytes": 100e6, "memory_nbytes": {"mxnet1": found}}
    assert bench.memory_section([work])[-1] == "| w | MXNet, 1 server | 150 MB | 1.50 | 2.00 |"
    assert bench.memory_section([{**work, "value_nbytes": 1e6}]) == []


def test_memory_of_training_is_that_of_a_rank():
    found = {"before": {"ranks": 100e6}, "most": {"ranks": 700e6}, "after": {"ranks": 500e6}}
    work = {"name": "w", "ranks": 2, "value_nbytes": 100e6, "memory_nbytes": {"ddp": found}}
    assert bench.training_memory_section([work])[-1] == "| w | PyTorch DDP | 200 MB | 2.00 | 300 MB | 3.00 |"
    assert bench.training_memory_section([{**work, "value_nbytes": 1e6}]) == []
