"""The examples run from their files, and end with what they promise."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import tensorkv
from tests.support.amount import amount
from tests.support.hosts import CAN_MAKE
from tests.support.workers import free_port

ray = pytest.importorskip("ray")
pytest.importorskip("sklearn")

ROOT = Path(__file__).resolve().parents[2]


def run(name, tmp_path, *arguments, launcher=(), **sizes):
    """Run an example with some of its constants set, in a folder of its own; return the lines that it prints."""
    text = (ROOT / "examples" / name).read_text()
    for constant, size in sizes.items():
        text, count = re.subn(rf"^{constant} = \d+$", f"{constant} = {size}", text, flags=re.MULTILINE)
        assert count == 1, f"{name} has no {constant}"
    # Nothing may be left behind, and nothing found here.
    file = tmp_path.with_name(f"{tmp_path.name}-{name}")
    file.write_text(text)
    command = [sys.executable, *launcher, str(file), *map(str, arguments)]
    environment = {key: text for key, text in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "RAY_ADDRESS")}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout.splitlines()


def test_every_example_is_tested():
    assert {path.name for path in (ROOT / "examples").iterdir() if path.is_file()} == {
        "compression.py",
        "diloco.py",
        "embeddings.py",
        "gpt.py",
        "jax_digits.py",
        "publish_weights.py",
        "recommender.py",
        "rl_weights.py",
        "two_hosts.sh",
    }


ON_A_HOST = """
import os, numpy, tensorkv
kv = tensorkv.create("dist_async", num_servers=2, mode="sync")
kv.init("w", numpy.zeros(3))
total = kv.pushpull("w", numpy.full(3, kv.rank + 1.0))
with tensorkv.create("dist_sync") as both:
    both.init("w", numpy.zeros(3))
    assert both.pushpull("w", numpy.full(3, both.rank + 1.0)).tolist() == total.tolist()
print(os.uname().nodename, total.tolist(), [server["host"] for server in kv.stats()["servers"]], flush=True)
kv.close()
"""


@pytest.mark.release
@pytest.mark.skipif(not CAN_MAKE, reason="needs root and ip")
def test_a_program_runs_on_hosts_of_one_machine(tmp_path):
    before = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    command = [ROOT / "examples" / "two_hosts.sh", "--hosts", "2", sys.executable, "-c", ON_A_HOST]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    lines = [line for line in ended.stdout.splitlines() if line.startswith("host")]
    assert sorted(lines) == [f"host{number} [3.0, 3.0, 3.0] ['host1', 'host2']" for number in (1, 2)]
    assert subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout == before
    failed = subprocess.run([*command[:5], "raise SystemExit(3)"], capture_output=True, check=False)
    assert failed.returncode == 3


@pytest.mark.release
def test_no_codec_costs_accuracy(tmp_path):
    assert run("compression.py", tmp_path)[-1] == "curves: compression.png"
    assert (tmp_path / "compression.png").stat().st_size > 10_000


# The guide to publishing weights, which runs in make test, has readers, too.
@pytest.mark.release
def test_readers_see_consistent_releases_each_newer_than_the_last(tmp_path):
    readers = amount(2, 3)
    lines = run("publish_weights.py", tmp_path, READERS=readers)
    assert lines[-1] == f"all {readers} readers saw consistent releases, each newer than the last, up to epoch-20"
    told = [re.fullmatch(r"reader (\d): \d+ releases, increasing, consistent: ([\d ]+)", line) for line in lines]
    seen = {int(match[1]): list(map(int, match[2].split())) for match in told if match}
    assert sorted(seen) == list(range(readers))
    for versions in seen.values():
        assert versions == sorted(set(versions))
        assert versions[-1] == 20
    assert not list(tmp_path.iterdir())


@pytest.mark.release
@pytest.mark.parametrize("policy", ["mlp", "transformer", "jax"])
def test_rollouts_see_whole_releases_though_one_is_killed(policy, tmp_path):
    if policy == "jax":
        pytest.importorskip("optax")
    lines = run("rl_weights.py", tmp_path, policy, UPDATES=30, KILLED_AT=10)
    assert lines[0] == "rollout process 0 was killed after update 10, and comes back"
    whole, changes = map(
        int, re.fullmatch(r"a whole policy has (\d+) bytes, changes had (\d+) on average", lines[1]).groups()
    )
    assert 0 < changes < whole
    assert lines[2] == "all 3 rollout processes saw whole releases only, up to update 30; curves: rl_weights.png"
    assert (tmp_path / "rl_weights.png").stat().st_size > 10_000


def test_diloco_learns_from_a_fraction_of_the_bytes(tmp_path):
    lines = run("diloco.py", tmp_path, STEPS=amount(200, 600))
    pattern = r"(.+): each worker has pushed ([\d.]+) MB, held-out loss ([\d.]+) to ([\d.]+)"
    told = [re.fullmatch(pattern, line) for line in lines[:-1]]
    assert [match[1] for match in told] == ["synchronous", "DiLoCo, every 10", "DiLoCo, every 50"]
    sent, first, last = ([float(match[column]) for match in told] for column in (2, 3, 4))
    assert [round(sent[0] / each) for each in sent] == [1, 10, 50]
    assert all(after < before / 2 for before, after in zip(first, last, strict=True))
    assert lines[-1] == "curves: diloco.png"
    assert [path.name for path in tmp_path.iterdir()] == ["diloco.png"]


def test_vectors_are_learned_though_a_server_is_killed(tmp_path):
    lines = run("embeddings.py", tmp_path, tmp_path / "store", EPOCHS=amount(2, 4))
    killed = next(re.fullmatch(r"server 1 \(process (\d+)\) was killed", line) for line in lines if "killed" in line)
    back = re.fullmatch(r"server 1 was restarted as process (\d+); (\d+) pushes, versions (\d+) and (\d+)", lines[-2])
    assert back[1] != killed[1]
    assert back[2] == back[3] == back[4]
    share = re.fullmatch(r"quality on held-out pairs: ([\d.]+) \(by word frequency: ([\d.]+)\)", lines[-1])
    assert float(share[1]) > 0.7
    assert float(share[2]) < 0.55
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["server-0", "server-1"]


def test_a_gpt_has_the_losses_of_ddp_with_every_store(tmp_path):
    lines = run("gpt.py", tmp_path, STEPS=amount(8, 100))
    told = [re.fullmatch(r"(\w+): loss ([\d.]+) to ([\d.]+), [\d.]+ ms a step", line) for line in lines[:3]]
    assert [match[1] for match in told] == ["local", "dist_sync", "ddp"]
    assert all(float(match[3]) < float(match[2]) for match in told)
    most = re.fullmatch(r"largest relative difference from DDP at any step: (\S+); plot: gpt.png", lines[-1])
    assert float(most[1]) <= 1e-5
    assert [path.name for path in tmp_path.iterdir()] == ["gpt.png"]


def test_a_gpt_whose_losses_differ_from_those_of_ddp_is_a_failure(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("gpt", ROOT / "examples" / "gpt.py")
    gpt = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpt)
    for loss, status in ((1.0, 0), (1.001, 1)):
        monkeypatch.setattr(
            gpt, "run", lambda way, loss=loss: {"losses": [2.0, loss if way == "local" else 1.0], "step_ms": 1.0}
        )
        assert gpt.main() == status
    assert capsys.readouterr().out.splitlines()[-1].startswith("largest relative difference from DDP")


def test_jax_learns_digits_with_the_same_losses_in_one_process_and_in_two(tmp_path):
    pytest.importorskip("jax")
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1")
    told = []
    for launcher in ((), (*torchrun, f"--master-port={free_port()}")):
        lines = run("jax_digits.py", tmp_path, launcher=launcher, EPOCHS=amount(3, 10))
        found = [re.fullmatch(r"epoch \d+: loss ([\d.]+), accuracy on test images ([\d.]+)", line) for line in lines]
        told.append([(float(match[1]), float(match[2])) for match in found])
    assert len(told[0]) == amount(3, 10)
    assert told[0][-1][0] < told[0][0][0] / 2
    assert told[0][-1][1] > 0.9
    assert [loss for loss, _ in told[1]] == pytest.approx([loss for loss, _ in told[0]], rel=1e-3)


# Tables on servers are tested beside the layers.
@pytest.mark.parametrize("kind", ["local", pytest.param("dist_async", marks=pytest.mark.release)])
def test_a_recommender_learns_in_one_process_and_on_servers(tmp_path, kind):
    users, items, error = run("recommender.py", tmp_path, kind, EPOCHS=8)
    for line in (users, items):
        rows, updates = map(int, re.fullmatch(r"\w+: (\d+) of 1099511627776 rows, (\d+) updates", line).groups())
        assert 250 < rows <= 1000
        # 36,000 ratings in batches of 512, for each of two workers if there are servers.
        assert updates == 8 * (71 if kind == "local" else 2 * 36)
    reached, constant = map(float, re.findall(r"\d\.\d+", error))
    assert reached < constant / 2
    assert not list(tmp_path.iterdir())


def test_an_example_that_fails_says_why(tmp_path, monkeypatch, capsys):
    """With workers that push nothing and say that they did, in a local store."""
    place = importlib.util.spec_from_file_location("embeddings", ROOT / "examples" / "embeddings.py")
    embeddings = importlib.util.module_from_spec(place)
    place.loader.exec_module(embeddings)
    kv = tensorkv.create("local")
    monkeypatch.setattr(kv, "stats", lambda: {"servers": [{"pid": 1}, {"pid": 2}]})
    monkeypatch.setattr(embeddings.tensorkv, "create", lambda *_, **__: kv)
    monkeypatch.setattr(embeddings, "learn", lambda worker: 7)
    options = {}

    def remote(**given):
        options.update(given)
        return lambda function: SimpleNamespace(remote=function)

    played = SimpleNamespace(remote=remote, wait=lambda *_, **__: ([], []), get=list, exceptions=ray.exceptions)
    monkeypatch.setattr(embeddings, "ray", played)
    assert embeddings.main(str(tmp_path)) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "failed: no server was killed: the workers finished before the first check"
    assert said[1] == "failed: 21 pushes were acknowledged, and the tables had [0, 0] updates"
    assert options["max_retries"] == 0, "Ray would run a worker again, and it would push again"
