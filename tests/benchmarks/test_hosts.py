"""The benchmark of several hosts works and notices wrong results. How fast anything is, is not tested."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.common import hosts as namespaces
from benchmarks.common.hosts import HostsError, hosts
from benchmarks.common.ray_hosts import RayCluster
from benchmarks.common.venvs import MXNET
from benchmarks.hosts import works
from tests.conftest import ROOT
from tests.support.hosts import CAN_MAKE

pytest.importorskip("ray")
needs_hosts = pytest.mark.skipif(not CAN_MAKE, reason="needs root and ip")


def run(out, *arguments):
    return main(["hosts", "--quick", "--out", str(out), *arguments])


@needs_hosts
def test_quick_run_writes_raw_times_tables_and_a_plot(tmp_path, capsys):
    out = tmp_path / "out"
    before = namespaces._ip("netns", "list")
    assert run(out, "--no-mxnet") == 0
    assert namespaces._ip("netns", "list") == before
    assert sorted(path.name for path in out.iterdir()) == ["hosts.json", "hosts.md", "hosts.png"]
    assert (out / "hosts.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((out / "hosts.json").read_text())
    table = (out / "hosts.md").read_text()
    assert table in capsys.readouterr().out
    assert result["missing"] == {"mxnet": "left out with --no-mxnet"}
    for topic, made, names in (
        ("sync", works.exchanges(2, quick=True), {"tensorkv", "gloo"}),
        ("servers", works.servings(2, quick=True), {"servers"}),
        ("far", works.far(quick=True), {"far", "near", "stream", "actor"}),
    ):
        assert [each["name"] for each in result[topic]] == [each.name for each in made]
        for measured in result[topic]:
            times = measured["times_s"]["pushpull"]
            assert set(times) == names
            assert all(len(raw) == 2 and min(raw) > 0 for raw in times.values())
    for work in result["sync"]:
        # Each host needs at least half of what the other one has, and shared memory would send nothing at all.
        assert all(sent >= work["value_nbytes"] for sent in work["sent_nbytes"].values())
        assert min(each["before"]["ranks"] for each in work["memory_nbytes"].values()) > 1e6
    for head in ("In lock step", "A server on each host", "One worker, and its server on another host", "Spread"):
        assert f"## {head}\n" in table
    assert "| 1 × 100k, 2 ranks on 2 hosts, assign | " in table


@needs_hosts
def test_with_mxnet(tmp_path):
    if not Path(ROOT, MXNET.folder).exists():
        pytest.skip(f"{MXNET.folder} has not been made")
    assert run(tmp_path, "--only", "2×3") == 0
    result = json.loads((tmp_path / "hosts.json").read_text())
    assert not result["missing"]
    assert "mxnet_sync" in result["sync"][0]["times_s"]["pushpull"]
    assert "mxnet_async" in result["servers"][0]["times_s"]["pushpull"]


def test_without_root_there_are_no_hosts_and_the_table_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(namespaces.os, "geteuid", lambda: 1000)
    assert run(tmp_path, "--no-mxnet", "--only", "on 2 hosts") == 0
    said = "**hosts was not measured**: hosts are namespaces, which need root"
    assert said in (tmp_path / "hosts.md").read_text()


@needs_hosts
def test_a_host_that_cannot_be_made_leaves_nothing_behind(monkeypatch):
    before = namespaces._ip("netns", "list")
    made = namespaces._ip

    def fail(*words):
        if "mtu" in words and "host2" not in words and len(words) > 6 and words[1].endswith("2"):
            raise HostsError("no second host")
        return made(*words)

    monkeypatch.setattr(namespaces, "_ip", fail)
    with pytest.raises(HostsError, match="no second host"), hosts(2):
        pass
    assert made("netns", "list") == before


@needs_hosts
def test_a_node_of_ray_that_does_not_start_is_an_error_with_what_it_said(monkeypatch):
    with hosts(1) as made:
        monkeypatch.setattr("benchmarks.common.ray_hosts._RAY", ["sh", "-c", "echo no such node; exit 1"])
        cluster = RayCluster(made)
        with pytest.raises(HostsError, match=r"Ray does not start on host1: no such node"), cluster:
            pass
        assert not cluster._folder.exists()


def test_works_are_those_that_were_asked_for():
    assert [work.name for work in works.exchanges(2, quick=False)][:5] == [
        "1 × 25M, 2 ranks on 2 hosts, assign",
        "160 × 160k, 2 ranks on 2 hosts, assign",
        "1000 × 1000, 2 ranks on 2 hosts, assign",
        "one 2×3 key, 2 ranks on 2 hosts, assign",
        "1 × 25M, 4 ranks on 2 hosts, assign",
    ]
    assert {work.parts for work in works.exchanges(3, quick=False)} == {3}
    assert [work.name for work in works.servings(3, quick=False)][3] == (
        "servers on 3 hosts: one 2×3 key, 3 workers, SGD momentum 0.9"
    )
    assert next(work.name for work in works.far(quick=False)) == "another host: 1 × 25M, 1 worker, assign"
