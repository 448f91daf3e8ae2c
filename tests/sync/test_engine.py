"""Workers in step: the contract, the local store's bits, and an error instead of every hang."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import tensorkv
from tensorkv.testing.releases import ReleaseContract
from tests.support.amount import ALL, amount, each_pair
from tests.support.hosts import CAN_MAKE, cut, two_hosts
from tests.support.processes import call
from tests.support.until import until
from tests.support.workers import Team, free_port, run
from tests.sync.dist_programs import EQUAL, PAIRS, PHASES, RAISED, REFUSED

PROGRAMS = "tests.sync.dist_programs"
ROOT = Path(__file__).parents[2]


def errors_of(text):
    """The kinds of errors that a worker has printed."""
    return re.findall(r"^(\w+) \|", text, re.MULTILINE)


# Where two calls differ first.
FIRST = {
    ("push a", "push a, b"): 'first at keys[1] (rank 0: nothing, rank 1: "b")',
    ("push rows", "push dense c"): 'first at rows[0] of "c" (rank 0: true, rank 1: false)',
    ("init d", "init another d"): 'first at values[0][0][1] of "d" (rank 0: nothing, rank 1: 2)',
    ("push a", "push slices of a"): 'first at slices (rank 0: nothing, rank 1: ["a"])',
    ("push slices of a", "pushpull slices of a"): 'rank 1: pushpull {"slices": ["a"], "keys": ["a"]}',
    ("load if it is there", "load"): "first at missing_ok (rank 0: true, rank 1: nothing)",
    ("load", "load states"): 'rank 1: load_optimizer_states {"path": "/nowhere"}',
    ("sgd", "sgd with another lr"): "first at numbers.lr (rank 0: 0.1, rank 1: 0.2)",
}


# ---------------------------------------------------------------- the contract


# What of the contract runs without shared memory, and with another number of workers than two: each verb, kind of array
# and kind of error once; in ``make test`` with one of a test's parameters. Which worker runs an update function depends
# on the key, so the test that counts its calls is not among them.
FEW = (
    "test_key_and_value",
    "test_parts_are_summed",
    "test_lists_of_keys",
    "test_mappings",
    "test_init_is_all_or_nothing",
    "test_a_dtype_that_fits",
    "test_a_dtype_that_would_lose_numbers",
    "test_low_precision_is_summed_in_float32_and_rounded_once",
    "test_the_sum_is_left_to_right",
    "test_integers_wrap_and_bool_adds_by_or",
    "test_an_optimizer_steps_on_the_sum",
    "test_an_update_depends_on_no_other_key",
    "test_pull_casts_within_a_family_or_safely",
    "test_pull_into_any_strides",
    "test_pushpull_is_push_then_pull",
    "test_pushpull_in_place",
    "test_broadcast",
    "test_trees_are_pushed_and_pulled",
    "test_rows_of_several_parts_and_sparse_tensors",
    "test_rows_start_as_init_says",
    "test_rows_step_lazily",
    "test_row_sparse_pull",
    "test_bad_row_ids",
    "test_arrays_of_any_layout",
    "test_hundreds_of_parts_and_outs",
    "test_many_empty_keys",
    "test_delete",
    "test_hyperparameters_change_while_running",
    "test_save_and_load",
    "test_a_checkpoint_that_may_be_missing",
    "test_verbs_from_several_threads",
    "test_nonfinite_raise",
    "test_nonfinite_skip",
    "test_an_updater_that_raises_leaves_its_key",
    "test_a_pushpull_whose_updater_raises_writes_no_out",
    "test_an_updater_cannot_call_its_store",
)


def names_in(text, name_of_class):
    """The tests of a class in what pytest has printed."""
    found = re.findall(rf"::{name_of_class}::(.+)$", text, re.MULTILINE)
    return sorted(name.replace(r"\\", "\\") for name in found)


@cache
def contract():
    """The tests of the contract, as the local engine has them, but for releases, which it has alone."""
    module = Path(__file__).parents[1] / "engines" / "test_local.py"
    status, text = call("pytest", "--collect-only", "-q", "-p", "no:cacheprovider", module, "-k", "TestLocal")
    assert status == 0, text
    return [name for name in names_in(text, "TestLocal") if name.partition("[")[0] not in vars(ReleaseContract)]


@pytest.mark.parametrize(
    ("workers", "chosen", "is_whole"),
    [
        (2, "TestDist", True),
        (4, "TestDist", ALL),
        (amount(2, 3), "TestGloo", False),
        # One worker has a local store.
        *([(1, "TestDist", True), (2, "TestGloo", False)] if ALL else []),
    ],
)
def test_the_contract(workers, chosen, is_whole, tmp_path):
    wanted, module = contract(), Path(__file__).with_name("dist_contract.py")
    words = [module, "-k", chosen]
    if not is_whole:
        found = {name: [each for each in wanted if each.partition("[")[0] == name] for name in FEW}
        assert all(found.values())
        wanted = [name for names in found.values() for name in (names if ALL else names[-1:])]
        words = [f"{module}::{chosen}::{name}" for name in wanted]
    # Each pytest has folders of its own, since one that ends removes those of others that have ended.
    env = {"TENSORKV_TEST_FOLDER": str(tmp_path), "PYTEST_ADDOPTS": f"--basetemp {tmp_path}/pytest-{{rank}}"}
    words = ["-q", "-rp", "-p", "no:cacheprovider", *words]
    for text in run(workers, "pytest", *words, env=env):
        assert set(names_in(text, chosen)) >= set(wanted)


# ---------------------------------------------------------------- bits


@pytest.mark.parametrize(
    ("workers", "count", "seed", "shared_memory"),
    [(2, 80, 0, True), (3, 40, 1000, True), (4, 40, 2000, True), (2, 40, 3000, False)],
)
def test_random_programs_give_the_bits_of_the_local_store(workers, count, seed, shared_memory):
    count = amount(count // 8, count)
    for text in run(workers, PROGRAMS, "programs", count, seed, shared_memory):
        assert "same bits" in text


@pytest.mark.parametrize(
    ("workers", "count", "shared_memory", "compiled"),
    [
        (2, amount(12, 40), True, True),
        (3, 6, True, True),
        (2, 6, False, True),
        (2, 4, True, False),
        (2, 3, False, False),
    ],
)
def test_calls_of_every_form_give_the_bits_of_the_local_store(workers, count, shared_memory, compiled):
    for text in run(workers, PROGRAMS, "forms", count, 0, shared_memory, compiled):
        assert text == "same bits\n"


def test_contents_of_rank_0_leave_each_worker_its_library():
    for text in run(2, PROGRAMS, "own_libraries"):
        assert text == "as before\n"


def test_a_host_may_have_more_workers_than_share_memory():
    for text in run(3, PROGRAMS, "crowd"):
        assert text == "same bits\n"


def test_keys_and_rules_that_change_while_a_call_begins():
    for text in run(2, PROGRAMS, "other_keys"):
        assert text == "as they are now\n"


@pytest.mark.parametrize(
    ("overlap", "update_on_store", "shared_memory"), each_pair([True, False], [True, False], [True, False])
)
def test_a_trainer_over_workers_equals_one_over_replicas(overlap, update_on_store, shared_memory):
    for text in run(2, PROGRAMS, "train", overlap, update_on_store, shared_memory):
        assert "same weights" in text
        assert "same after load_state_dict" in text
        assert ("twice Trainer: backward has computed" in text) == overlap


# ---------------------------------------------------------------- errors instead of hangs


@pytest.mark.parametrize("shared_memory", [True, False])
def test_a_mismatch_is_an_error_on_every_worker(shared_memory):
    """Never a hang, an abort or a wrong number."""
    for rank, text in enumerate(run(2, PROGRAMS, "mismatches", shared_memory)):
        cases = dict(zip(PAIRS + EQUAL, text.split("===")[1:], strict=True))
        for pair in EQUAL:
            assert errors_of(cases.pop(pair)) == ["NoneType"]
        for pair, said in cases.items():
            (kind,) = errors_of(said)
            if rank == 1 and pair[1] in REFUSED:
                assert kind == REFUSED[pair[1]], said
                continue
            assert kind == "WorkerMismatchError", said
            assert FIRST.get(pair, "") in said
            assert "rank 0" in said
            assert "rank 1" in said
            assert re.search("refuses (WorkerMismatch|StoreClosed)Error", said), said


def test_a_mismatch_in_a_long_list_names_the_key():
    """Also where the text of the call is longer than what workers tell each other of each."""
    for text in run(3, PROGRAMS, "long_lists", True):
        said = [line for line in text.splitlines() if "|" in line]
        assert len(said) == 6
        for line in said:
            count, at = map(int, line.partition("|")[0].split())
            other = f'"layer.{at + 1:04}.weight"' if at + 1 < count else "nothing"
            assert f'first at keys[{at}] (rank 0: "layer.{at:04}.weight", rank 2: {other})' in line
            assert "ranks 0, 1: push" in line


def test_a_mismatch_in_a_long_list_over_hosts_tells_where_it_is():
    for text in run(2, PROGRAMS, "long_lists", False):
        said = [line for line in text.splitlines() if "|" in line]
        assert len(said) == 6
        for line in said[:2]:
            assert "first at character" in line
            assert "layer.0041.weight" in line
        for line in said[2:]:
            assert "after the first" in line
            assert "ranks 0, 1: push" in line


@pytest.mark.parametrize("shared_memory", [True, False])
def test_a_refused_call_is_told_to_the_others(shared_memory):
    texts = run(3, PROGRAMS, "mismatch", "push a", "push more elements", shared_memory)
    # Over hosts the one before the worker that refused has found out.
    assert ("ranks 0, 1: push" if shared_memory else "rank 1: push") in texts[0]
    assert "rank 2: push refused" in texts[0]
    assert "part 0 has shape (4,), the key was initialised with (3,)" in texts[0]
    assert "ValueMismatchError" in texts[2]


@pytest.mark.parametrize("repeat", range(amount(1, 5)))
@pytest.mark.parametrize("phase", PHASES)
def test_a_killed_worker_is_named(phase, repeat):
    with Team(3, PROGRAMS, "lost", phase, "kill", repeat) as team:
        codes = team.wait()
        texts = [team.text(rank) for rank in range(3)]
    assert codes == [0, 0, -signal.SIGKILL]
    assert "fault fired" in texts[2]
    for text in texts[:2]:
        assert errors_of(text) == ["RankDeadError"], text
        assert "rank 2 died or ended early" in text
        assert "refuses RankDeadError" in text
        assert "Traceback" not in text, "what runs at exit, after close"


def test_a_worker_that_ends_early_is_named():
    with Team(2, PROGRAMS, "lost", "between", "exit", 0) as team:
        assert team.wait() == [0, 3]
        assert "RankDeadError | pushpull" in team.text(0)
        assert "rank 1 died or ended early" in team.text(0)


@pytest.mark.parametrize("phase", ["between", "summed", "background"])
def test_a_stopped_worker_is_named_after_the_timeout(phase, tmp_path):
    env = {"STOPPED": str(tmp_path / "stopped")}
    with Team(3, PROGRAMS, "lost", phase, "stop", 0, env=env) as team:
        codes = [program.wait() for program in team.programs[:2]]
        texts = [team.text(rank) for rank in range(3)]
    assert codes == [0, 0]
    assert "fault fired" in texts[2]
    for text in texts[:2]:
        assert errors_of(text) == ["RankDeadError"], text
        assert "rank 2 did not respond within 300 s" in text


def test_ctrl_c_ends_the_call_of_every_worker(tmp_path):
    with Team(2, PROGRAMS, "interrupted", tmp_path) as team:
        team.programs[1].wait_for("waits")
        team.processes[1].send_signal(signal.SIGINT)
        assert team.wait() == [0, 0], team.printed()
        assert "interrupted" in team.text(1).splitlines()
        assert errors_of(team.text(0)) == ["WorkerError"]
        assert "rank 1 broke off" in team.text(0)


def segments_of(pids):
    """Return the inodes of the shared memory of tensorkv that processes have mapped."""
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/maps") as lines:
            found.update(line.split()[4] for line in lines if "memfd:tensorkv" in line)
    return found


def test_nothing_is_left_in_shared_memory():
    """Segments have no names, and end with the last process that has mapped them."""
    before = set(os.listdir("/dev/shm"))
    with Team(2, PROGRAMS, "lost", "between", "stop", 0) as team:
        until(lambda: "fault fired" in team.text(1))
        during = segments_of(process.pid for process in team.processes)
        assert during
        assert {name for name in os.listdir("/dev/shm") if "tensorkv" in name} <= before
        for process in team.processes:
            process.kill()
        team.wait()
        assert not during & segments_of(filter(str.isdigit, os.listdir("/proc")))
    assert {name for name in os.listdir("/dev/shm") if "tensorkv" in name} <= before


@pytest.mark.parametrize("workers", [2, 3])
def test_what_an_updater_raises_reaches_every_worker(workers):
    for text in run(workers, PROGRAMS, "updater_raises"):
        assert text.count("raised") == 3
        assert "nothing raised" not in text
        assert "goes on" in text


@pytest.mark.parametrize("workers", [2, 3])
def test_what_an_updater_raises_has_its_type_where_that_can_be_made(workers):
    texts = run(workers, PROGRAMS, "updater_raises_types")
    assert all("goes on" in text for text in texts)
    found = [line.split() for text in texts for line in text.splitlines() if line != "goes on"]
    assert len(found) == workers * len(RAISED) * 6
    for name, how, where, kind in found:
        elsewhere = "StopIteration" if name == "stop" else "WorkerError"
        assert kind == (type(RAISED[name]()).__name__ if where == "here" else elsewhere), (name, how, where)
    assert {(name, where) for name, _, where, _ in found} == {(n, w) for n in RAISED for w in ("here", "there")}


def test_two_threads_may_close_a_store():
    for text in run(2, PROGRAMS, "closed_by_two_threads"):
        assert text.splitlines() == ["second waits", "closed [None]"], text


@pytest.mark.parametrize("repeat", range(amount(1, 3)))
def test_a_process_may_end_without_close(repeat):
    for text in run(2, PROGRAMS, "forgotten_close"):
        assert "the end" in text
        assert "terminate called" not in text


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_may_be_far_ahead(workers):
    for text in run(workers, PROGRAMS, "ahead"):
        assert "all there" in text


@pytest.mark.parametrize(("workers", "shared_memory"), [(2, True), (3, False)])
def test_a_push_creates_the_keys_of_trees(workers, shared_memory):
    for text in run(workers, PROGRAMS, "new_trees", shared_memory):
        assert "all there" in text, text


def test_a_checkpoint_with_releases_is_refused(tmp_path):
    with tensorkv.create() as kv:
        kv.init("w", np.ones(2))
        kv.publish("one")
        kv.save(tmp_path / "saved", releases=True)
    for text in run(2, PROGRAMS, "load_releases", tmp_path / "saved"):
        assert "all there" in text, text


@pytest.mark.parametrize("workers", [2, 3])
def test_stages_of_many_lists_of_keys_are_bounded(workers):
    for text in run(workers, PROGRAMS, "many_lists"):
        assert "bounded" in text, text
        assert "same bits" in text


@pytest.mark.parametrize("limit", ["bytes", "lists"])
def test_workers_that_make_calls_in_other_forms_drop_the_same_stages(limit):
    assert run(2, PROGRAMS, "lists_in_other_forms", limit) == ["the same buffers\n"] * 2


@pytest.mark.parametrize("workers", [2, 3])
def test_what_all_sums_decide_on_is_as_in_the_local_store(workers):
    for text in run(workers, PROGRAMS, "decided", 0, amount(20, 200)):
        assert "same bits" in text


def test_an_installation_without_compiled_parts_gives_the_same_bits(tmp_path):
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    env = {**os.environ, "PYTHONPATH": f"{tmp_path / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *torchrun, PROGRAMS, "decided", "0", "4"]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert ended.stdout.count("same bits, compiled: False") == 2, ended.stdout + ended.stderr


@pytest.mark.parametrize(("keys", "shared_memory"), [(300, True), (40, False)])
def test_small_keys_that_are_pushed_alone_share_a_stage(keys, shared_memory):
    for text in run(2, PROGRAMS, "key_by_key", keys, shared_memory):
        stages, nbytes = map(int, re.search(r"stages: (\d+) nbytes: (\d+)", text).groups())
        assert stages == 2
        assert nbytes < 32 << 20 if shared_memory else nbytes < 128 << 20


@pytest.mark.parametrize("compiled", [True, False])
def test_workers_may_give_plain_arrays_or_not(compiled):
    assert all("same bits" in text for text in run(3, PROGRAMS, "some_plain", compiled))


def test_an_interrupted_pull_is_asked_again(tmp_path):
    texts = run(2, PROGRAMS, "interrupted_pull", env={"INTERRUPTED": str(tmp_path / "interrupted")})
    assert "interrupted" in texts[0]
    assert all("new values" in text for text in texts)


@pytest.mark.parametrize("what", ["plain", "refused"])
def test_an_interrupted_wait_for_an_earlier_push_ends_the_store(what, tmp_path):
    texts = run(2, PROGRAMS, "interrupted_before", what, env={"INTERRUPTED": str(tmp_path / "interrupted")})
    for text, kind in zip(texts, ["KeyboardInterrupt", "WorkerError"], strict=True):
        assert text.splitlines()[0] == kind, texts
        assert "rank 0 broke off: Interrupted" in text, texts


@pytest.mark.parametrize("options", [("nonfinite", "skip", "raise"), ("reduce", "sum", "mean")])
def test_options_are_compared(options):
    for text in run(2, PROGRAMS, "other_options", *options):
        assert "create: the options of rank 0 are" in text
        assert "those of rank 1" in text


# ---------------------------------------------------------------- unequal batches, checkpoints


def test_owners_and_state_stay():
    for text in run(2, PROGRAMS, "state_stays"):
        assert "same state" in text


def test_state_that_was_loaded_is_held_where_values_are_updated(tmp_path):
    loads = ["load", "load_optimizer_states", "restore"]
    for rank, text in enumerate(run(2, PROGRAMS, "loaded_state", tmp_path)):
        expected = {
            **dict.fromkeys(["a push", *loads], rank == 1),
            "load with a codec": True,
            "load without it": rank == 1,
        }
        assert text == f"{expected}\n"


def test_state_of_other_shapes_is_saved(tmp_path):
    for text in run(2, PROGRAMS, "saved_state", tmp_path):
        assert "same after load" in text


def test_averages_go_to_whole_outs_and_to_parts():
    assert run(2, PROGRAMS, "averages", "parts") == ["the same calls\n"] * 2


def test_a_step_is_named_in_a_mismatch():
    for text in run(2, PROGRAMS, "step_or_barrier"):
        assert "rank 0: Trainer.step; rank 1: barrier" in text, text


def test_averages_of_other_keys_are_a_mismatch():
    for text in run(2, PROGRAMS, "averages", "keys"):
        assert 'rank 0: pull_ema {"what": ["w"]}; rank 1: pull_ema {"what": ["v"]}' in text, text


def test_leave_with_long_names_and_a_refused_call():
    texts = run(2, PROGRAMS, "leave_with_long_names")
    assert "refused" in texts[0]
    assert all("left" in text for text in texts)


@pytest.mark.parametrize("optimizer", ["assign", "adam", "nadam"])
def test_leave(optimizer):
    for text in run(3, PROGRAMS, "leave", optimizer):
        assert "left and back" in text


def test_others_may_only_push_and_pull_while_one_has_left():
    for text in run(2, PROGRAMS, "left_and_barrier"):
        assert "rank 0 has left" in text


@pytest.mark.parametrize("optimizer", ["adam", "nadam"])
def test_checkpoints_go_to_another_number_of_workers(optimizer, tmp_path):
    """Saved by 4, loaded by 2 and by one: the same weights after more steps."""
    run(4, PROGRAMS, "save", tmp_path / "saved", optimizer)
    files = list((tmp_path / "saved").glob("data-*"))
    assert len(files) > 1, "workers write in parallel"
    results = []
    for workers in (1, 2, 4):
        run(workers, PROGRAMS, "load", tmp_path / "saved", tmp_path / f"{workers}.npz")
        with np.load(tmp_path / f"{workers}.npz") as loaded:
            results.append({key: loaded[key] for key in loaded})
    for other in results[1:]:
        for key, value in results[0].items():
            assert torch.allclose(torch.from_numpy(value), torch.from_numpy(other[key]), atol=1e-5), key


def test_workers_that_do_not_find_one_checkpoint_get_an_error(tmp_path):
    """Else training would begin again on some, and its first checkpoint would replace one, or values would differ."""
    for text in run(3, PROGRAMS, "own_folders", tmp_path):
        assert "refused | /proc/self/cwd/saved: a checkpoint is there on rank 2, and none on ranks 0, 1;" in text, text
        # Another one than on rank 0, although it fits.
        assert text.count("differs | /proc/self/cwd/saved: ranks 1, 2 found another checkpoint") == 2, text
        assert "goes on" in text


def test_more_workers_than_file_numbers_save_what_can_be_loaded(tmp_path):
    for text in run(3, PROGRAMS, "save_by_many", tmp_path / "saved"):
        assert "same after load ['00000.safetensors', '50000.safetensors']" in text, text


# ---------------------------------------------------------------- the demo


def apart(text):
    return float(re.search(r"the two loss curves are at most (\S+) apart", text)[1])


def test_the_demo_over_workers(tmp_path):
    command = [
        sys.executable,
        "-m",
        "tensorkv",
        "demo",
        "--store",
        "dist_sync",
        "--workers",
        str(amount(2, 4)),
        "--epochs",
        "2",
    ]
    shown = subprocess.run([*command, "--out", str(tmp_path / "demo.png")], capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr[-3000:]
    assert shown.stdout.count("curves: ") == 1, "rank 0 alone speaks"
    assert f"{amount(2, 4)} replicas: test accuracy" in shown.stdout
    assert apart(shown.stdout) < 1e-5
    assert (tmp_path / "demo.png").stat().st_size > 10_000


def test_the_demo_goes_on_from_the_last_checkpoint(tmp_path):
    """When all workers are started again, as torchrun does it after one was killed."""
    with Team(2, PROGRAMS, "demo_killed", tmp_path, env={"TORCHELASTIC_RESTART_COUNT": "0"}) as team:
        assert team.wait() == [1, -signal.SIGKILL]
        assert "fault fired" in team.text(1)
    texts = run(2, PROGRAMS, "demo_killed", tmp_path, env={"TORCHELASTIC_RESTART_COUNT": "1"})
    for rank, text in enumerate(texts):
        assert f"rank {rank} made epochs 3 to 4" in text
    assert apart(texts[0]) < 1e-5, "as if nobody had been killed"


# ---------------------------------------------------------------- joining


def test_a_process_group_that_exists_is_used_and_stays():
    for text in run(2, PROGRAMS, "existing_group"):
        assert "still there" in text


def test_everything_stays_on_loopback():
    for text in run(2, PROGRAMS, "addresses"):
        lines = [line.split() for line in text.splitlines() if line.startswith("tcp")]
        assert lines
        for table, local, remote, state in lines:
            host = local.partition(":")[0]
            assert host.endswith("0100007F"), (table, local, remote, state)


def test_where_memory_cannot_be_shared_gloo_takes_over_with_one_warning():
    texts = run(3, PROGRAMS, "no_sharing")
    assert ["fault fired" in text for text in texts] == [False, False, True]
    # It names the line of the program that called ``create``.
    warned = [re.findall(r"(\w+\.py): [^:]*they use Gloo instead", text) for text in texts]
    assert warned == [["dist_programs.py"], [], []]


def test_one_worker_is_a_local_store(caplog):
    caplog.set_level("INFO", "tensorkv")
    for name in ("dist", "dist_sync", "dist_device_sync", "dist_sync_device"):
        with tensorkv.create(name) as kv:
            assert (kv.type, kv.rank, kv.num_workers) == (name, 0, 1)
            kv.init("w", torch.zeros(2))
            assert kv.pushpull("w", torch.ones(2)).tolist() == [1, 1]
            kv.leave()
    assert "one worker" in caplog.text
    with tensorkv.create("dist_sync", nonfinite="raise") as kv:
        kv.init("w", torch.zeros(2))
        with pytest.raises(tensorkv.NonFiniteError):
            kv.push("w", torch.tensor([1, float("nan")]))


@pytest.mark.parametrize("timeout_s", [0, -1, "60", True, None, float("inf")])
def test_bad_timeouts(timeout_s):
    with pytest.raises(tensorkv.ArgumentError, match="timeout_s"):
        tensorkv.create("dist_sync", timeout_s=timeout_s)


def test_workers_that_do_not_come_are_an_error():
    """One of two is never started."""
    env = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    env["MASTER_PORT"] = str(free_port())
    code = (
        "import tensorkv\ntry: tensorkv.create('dist_sync', timeout_s=1)\nexcept tensorkv.RankDeadError as e: print(e)"
    )
    shown = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert "rank 1 of 2 did not join within 1 s" in shown.stdout


# ---------------------------------------------------------------- hosts

needs_hosts = pytest.mark.skipif(not CAN_MAKE, reason="network namespaces take root and iproute2")


@needs_hosts
@pytest.mark.parametrize("per_host", [(1, 1), (2, 2), (1, 3)], ids=str)
def test_hosts_give_the_bits_of_the_local_store(per_host):
    """Two hosts joined by a wire, with equal and unequal numbers of workers."""
    with two_hosts() as hosts:
        placed = [hosts[0]] * per_host[0] + [hosts[1]] * per_host[1]
        for text in run(sum(per_host), PROGRAMS, "programs", amount(5, 15), 5000, True, hosts=placed):
            assert "same bits" in text


@needs_hosts
def test_a_wire_that_breaks_is_an_error_on_both_hosts():
    with two_hosts() as hosts, Team(2, PROGRAMS, "endless", hosts=hosts) as team:
        for rank, process in enumerate(team.processes):
            # On a machine that stands still for seconds, the wire is as good as broken before.
            until(lambda rank=rank, process=process: "in a hurry" in team.text(rank) or process.poll() is not None)
        cut(hosts[1])
        assert team.wait() == [0, 0]
        for rank in range(2):
            assert "turn 20" in team.text(rank)
            assert errors_of(team.text(rank)) == ["RankDeadError"], team.text(rank)
            assert f"rank {1 - rank}" in team.text(rank)
