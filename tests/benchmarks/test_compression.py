"""The benchmark of compression works and notices wrong results. How fast anything is, is not tested."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.common import hosts as namespaces
from benchmarks.common.hosts import HostsError, hosts
from benchmarks.common.venvs import MXNET
from benchmarks.common.work import WrongResultError
from benchmarks.compression import contenders, works
from tests.conftest import ROOT
from tests.support.hosts import CAN_MAKE

needs_hosts = pytest.mark.skipif(not CAN_MAKE, reason="needs root and ip: it takes root")


def run(out, *arguments):
    return main(["compression", "--quick", "--out", str(out), *arguments])


@needs_hosts
def test_quick_run_writes_raw_times_tables_and_a_plot(tmp_path, capsys):
    out = tmp_path / "out"
    assert run(out, "--no-mxnet") == 0
    files = ["compression-digits.png", "compression.json", "compression.md", "compression.png"]
    assert sorted(path.name for path in out.iterdir()) == files
    assert (out / "compression.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((out / "compression.json").read_text())
    table = (out / "compression.md").read_text()
    assert table in capsys.readouterr().out
    assert result["missing"] == {"mxnet": "left out with --no-mxnet"}
    for topic, made, names in (
        ("codecs", works.codings(quick=True), {"encode", "decode", "copy"}),
        ("links", works.links(quick=True), {"none", *works.CODECS}),
        (
            "training",
            works.trainings(quick=True),
            {"none", "fp16", "2bit", "powersgd", "ddp", "ddp fp16", "ddp powersgd"},
        ),
    ):
        assert [each["name"] for each in result[topic]] == [each.name for each in made]
        for measured in result[topic]:
            times = measured["times_s"]["pushpull"]
            assert set(times) == names
            assert all(len(raw) == 2 and min(raw) > 0 for raw in times.values())
    sent = result["links"][0]["sent_nbytes"]
    # All that is on the cable counts, headers and the agreement of ranks included.
    for codec, least in (("bf16", 1.9), ("int8", 3.5), ("2bit", 12), ("1bit", 20)):
        assert sent["none"] / sent[codec] > least
    assert [list(each["accuracies"]) for each in result["digits"]] == [["tensorkv"]] * 2
    for head in ("Digits", "Codecs", "Exchanges over 1 Gbit/s", "A step of training over 1 Gbit/s", "Spread"):
        assert f"## {head}\n" in table


def test_digits_with_mxnet(tmp_path):
    if not Path(ROOT, MXNET.folder).exists():
        pytest.skip(f"{MXNET.folder} has not been made")
    assert run(tmp_path, "--only", "digits") == 0
    result = json.loads((tmp_path / "compression.json").read_text())
    assert not result["missing"]
    for learnt in result["digits"]:
        # The same rule for the same gradients, rounded by other libraries.
        accuracies = learnt["accuracies"]
        assert accuracies["mxnet"] == pytest.approx(accuracies["tensorkv"], abs=0.02)


@needs_hosts
def test_with_mxnet(tmp_path):
    if not Path(ROOT, MXNET.folder).exists():
        pytest.skip(f"{MXNET.folder} has not been made")
    assert run(tmp_path, "--only", "link 1gbit: 16 of") == 0
    result = json.loads((tmp_path / "compression.json").read_text())
    assert not result["missing"]
    assert {"mxnet", "mxnet 2bit"} <= set(result["links"][0]["times_s"]["pushpull"])


def test_without_root_codecs_are_measured_and_the_table_says_why_links_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(namespaces.os, "geteuid", lambda: 1000)
    assert run(tmp_path, "--no-mxnet", "--only", "16 of") == 0
    text = (tmp_path / "compression.md").read_text()
    assert "**hosts was not measured**: hosts are namespaces, which need root" in text
    assert "| codec 2bit: 16 of 40×40 |" in text


@needs_hosts
def test_a_rate_that_cannot_be_set_is_an_error(monkeypatch):
    with hosts(1) as [host]:
        with pytest.raises(HostsError, match="tbf rate fast"):
            host.limit("fast")
        monkeypatch.setattr(namespaces.shutil, "which", lambda *_, **__: None)
        with pytest.raises(HostsError, match="the command tc, from the package iproute2"):
            host.limit("1gbit")
        monkeypatch.undo()


@pytest.mark.parametrize("name", works.CODECS)
def test_a_codec_that_loses_something_is_noticed(name):
    coder = contenders.Encode(works.Coding(3, (40, 40), 1, codec=name))
    coder.check()
    codec = type(coder._codec)
    made = codec.decode

    def lose(self, words, out):
        made(self, words, out)
        out.reshape(-1)[7] += np.float32(1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codec, "decode", lose)
        with pytest.raises(WrongResultError, match="has lost something"):
            coder.check()


def test_works_are_those_that_were_asked_for():
    assert [work.name for work in works.links(quick=False)] == [
        "link 1gbit: one 5000×5000 key, 2 ranks on 2 hosts, SGD",
        "link 1gbit: 160 of 400×400, 2 ranks on 2 hosts, SGD",
        "link 1gbit: 1000 × 1000, 2 ranks on 2 hosts, SGD",
    ]
    assert len(works.codings(quick=False)) == 3 * len(works.CODECS)
