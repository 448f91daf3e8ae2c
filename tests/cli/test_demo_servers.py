"""The demo on parameter servers: it learns in every mode, and names the PNG."""

import copy
import os
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("ray")
pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
from tensorkv.cli import demo, demo_servers, main
from tensorkv.cli.demo_servers import AccuracyCurve, Consistency
from tests.support.amount import amount
from tests.support.fake_servers import Cluster, together

PNG = b"\x89PNG\r\n\x1a\n"


def run_demo(tmp_path, *options):
    command = [sys.executable, "-m", "tensorkv", "demo", "--store", "dist_async", *map(str, options)]
    environment = {name: text for name, text in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "RAY_ADDRESS")}
    # As for somebody who has just installed it: Ray and matplotlib find nothing of theirs, and make it.
    (tmp_path / "home").mkdir()
    environment["HOME"] = str(tmp_path / "home")
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)


def test_the_demo_reaches_its_accuracy_and_names_the_png_last(tmp_path):
    servers, workers, (epochs, least) = amount(1, 2), amount(2, 4), amount((4, 0.93), (8, 0.95))
    options = [
        "--workers",
        workers,
        "--staleness",
        2,
        "--servers",
        servers,
        "--epochs",
        epochs,
        "--min-accuracy",
        least,
    ]
    ended = run_demo(tmp_path, *options)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    first, *modes, last = ended.stdout.splitlines()[-5:]
    assert last == "accuracy against time: tensorkv-demo.png"
    assert (tmp_path / "tensorkv-demo.png").read_bytes().startswith(PNG)
    trained = f"{epochs} epochs, adam on {servers} server{'s' * (servers > 1)}; {workers} workers, "
    assert first.startswith(f"1347 training images, 450 test images, {trained}")
    found = [re.match(r"(.+): test accuracy (0\.\d+) after [\d.]+ s, 90% after [\d.]+ s$", line) for line in modes]
    assert [match[1] for match in found] == ["sync", "async", "staleness 2"]
    assert all(float(match[2]) >= least for match in found)
    steps = 22 * epochs
    for word in ("sync", "async", "staleness 2", f"{steps}/{steps}", f"{steps * workers}/{steps * workers}"):
        assert word in ended.stderr


def test_one_mode_alone_and_quiet_prints_only_the_line_with_the_png(ray_store, tmp_path, monkeypatch, capsys):
    """As the only worker that torchrun has started."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(demo_servers, "SLEEP_S", 0.0)
    out = tmp_path / "one.png"
    options = ["--store", "dist_async", "--mode", "async", "--epochs", "1", "--quiet", "--out", str(out)]
    assert main.main(["demo", *options]) == 0
    assert capsys.readouterr() == (f"accuracy against time: {out}\n", "")
    assert out.read_bytes().startswith(PNG)


def test_one_worker_trains_in_this_process(server_pool, monkeypatch):
    monkeypatch.setattr(demo_servers, "SLEEP_S", 0.0)
    digits, told = demo.load_digits(), []
    settings = demo.Settings(epochs=2, store="dist_async")
    with server_pool.create() as kv:
        curve = demo_servers.train(
            digits, settings, kv, averages=False, progress=lambda updates, share: told.append(updates)
        )
    assert curve.accuracies[-1] > 0.7
    assert told[-1] == 2 * 22
    assert curve.seconds == sorted(curve.seconds)
    assert len(curve.seconds) == len(curve.accuracies) == len(told)


def weights_after(workers, settings, digits, *, mode):
    """Train with some workers; return the weights in the store, and how often they were updated."""
    with Cluster(mode=mode, num_workers=workers) as cluster:
        stores = cluster.stores(workers)

        def train(kv):
            demo_servers.train(digits, settings, kv, averages=mode == "sync")

        together(*(lambda kv=kv: train(kv) for kv in stores))
        return stores[0].pull("1.weight"), stores[0].info("1.weight").version


@pytest.mark.parametrize("batch_size", [4, 2])
def test_workers_in_lock_step_learn_what_one_learns_from_whole_batches(monkeypatch, batch_size):
    """Also where the last batch, or every batch, has fewer images than there are workers."""
    all_digits, first = demo.load_digits(), demo.network(0)
    digits = demo.Digits(*(each[:9] for each in vars(all_digits).values()))
    monkeypatch.setattr(demo_servers, "SLEEP_S", 0.0)
    # Workers of this test are threads, which share the generator of random numbers.
    monkeypatch.setattr(demo_servers, "network", lambda seed: copy.deepcopy(first))
    settings = demo.Settings(epochs=2, batch_size=batch_size, optimizer="sgd", store="dist_async")
    one, steps = weights_after(1, settings, digits, mode="sync")
    four, steps_of_four = weights_after(4, settings, digits, mode="sync")
    assert steps == steps_of_four
    torch.testing.assert_close(four, one, rtol=1e-5, atol=1e-6)
    _, steps_apart = weights_after(4, settings, digits, mode="async")
    assert steps_apart == 4 * steps


def test_paces_are_the_one_asked_for_or_three():
    assert demo_servers.consistency_models("sync", None) == [Consistency("sync")]
    assert demo_servers.consistency_models("async", 3) == [Consistency("async", 3)]
    assert demo_servers.consistency_models(None, 0)[-1] == Consistency("async", 0)


def test_the_picture_has_a_line_for_each_pace():
    curves = {"sync": AccuracyCurve([0.1, 0.2], [0.1, 0.5]), "async": AccuracyCurve([0.1, 0.2], [0.4, 0.9])}
    drawn = demo_servers.figure(curves, demo.Settings(), 4, 2)
    (axes,) = drawn.axes
    assert [list(line.get_ydata()) for line in axes.get_lines()] == [[0.1, 0.5], [0.4, 0.9]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["sync", "async"]
    assert "adam on 2 servers: 4 workers, one slowed" in axes.get_title()
    assert axes.get_xlabel().startswith("seconds")


def test_an_accuracy_that_was_never_reached_has_no_time():
    assert AccuracyCurve([0.1], [0.5]).seconds_to(0.9) is None


WITHOUT_COMPRESSION = "--compression is for stores without servers, and cannot be resumed from a --checkpoint"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--servers", "2"], "--servers is for stores of type dist_async, not local"),
        (["--mode", "sync"], "--mode is for stores of type dist_async, not local"),
        (["--staleness", "0"], "--staleness is for stores of type dist_async, not local"),
        (["--workers", "2"], "--workers is for stores of type dist_sync or dist_async, not local"),
        (["--store", "dist_async", "--mode", "sync", "--staleness", "1"], "--staleness is for --mode async"),
        (["--store", "dist_async", "--checkpoint", "a"], "--checkpoint is for stores without servers"),
        (["--store", "dist_async", "--compression", "2bit"], WITHOUT_COMPRESSION),
        (["--compression", "2bit", "--checkpoint", "a"], WITHOUT_COMPRESSION),
    ],
)
def test_options_that_do_not_go_together_are_wrong_usage(capsys, options, problem):
    assert main.main(["demo", *options]) == 2
    assert capsys.readouterr().err == f"tensorkv: error: demo: {problem}\n"


@pytest.mark.parametrize(("options", "status"), [([], 1), (["--epochs", "1"], 0), (["--min-accuracy", "0.9"], 0)])
def test_only_the_demos_own_training_is_held_to_its_accuracy(tmp_path, monkeypatch, options, status):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(demo_servers, "run", lambda *_, **__: 0.94)
    out = str(tmp_path / "a.png")
    assert main.main(["demo", "--store", "dist_async", "--out", out, *options]) == status
