"""The command line: what it prints, its exit statuses, and errors of one line."""

import importlib.metadata
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("rich")
import tensorkv
from tensorkv.cli import inspect, main, tutorial


def run(capsys, *arguments):
    status = main.main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


def error_of(capsys, *arguments, status):
    found, out, err = run(capsys, *arguments)
    assert found == status
    assert out == ""
    assert err.startswith("tensorkv: error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err


# ---------------------------------------------------------------- help, version, usage


def test_without_arguments_it_prints_help(capsys):
    status, out, err = run(capsys)
    assert (status, err) == (0, "")
    for command in ("demo", "tutorial", "inspect", "top", "--version"):
        assert command in out
    assert run(capsys, "--help")[1] == out


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"tensorkv {importlib.metadata.version('tensorkv')}\n", "")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            "demo",
            "--replicas --epochs --batch-size --lr --optimizer --seed --store --out --min-accuracy --quiet --workers "
            "--servers --mode --staleness --compression powersgd "
            "tensorkv-demo.png (4) (20) (64) (adam; with --compression: sgd) (local) examples: '.[examples]'",
        ),
        ("tutorial", "--arrays numpy torch jax examples: '.[jax]'"),
        ("inspect", "CHECKPOINT --json --verify examples:"),
        ("top", "--name --address --every --once --json (tensorkv) (1.0) RAY_ADDRESS examples: '.[ray]'"),
    ],
)
def test_help_of_a_command_names_its_options_and_defaults(capsys, monkeypatch, command, words):
    monkeypatch.setenv("COLUMNS", "200")
    status, out, err = run(capsys, command, "--help")
    assert (status, err) == (0, "")
    assert [word for word in words.split() if word not in out] == []


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["nope"], "invalid choice: 'nope'"),
        (["--frob"], "--frob"),
        (["demo", "--epoch", "3"], "--epoch"),  # options are not abbreviated
        (["demo", "--epochs", "0"], "--epochs: expected a whole number from 1, not '0'"),
        (["demo", "--replicas", "two"], "--replicas: expected a whole number from 1, not 'two'"),
        (["demo", "--batch-size", "-1"], "--batch-size: expected a whole number from 1, not '-1'"),
        (["demo", "--lr", "nan"], "--lr: expected a number above 0, not 'nan'"),
        (["demo", "--seed", str(1 << 64)], "--seed: expected a whole number from 0"),
        (["demo", "--min-accuracy", "96"], "--min-accuracy: expected a number from 0 to 1, not '96'"),
        (["demo", "--store", "lokal"], """no store type 'lokal' (did you mean "local"?); there are device, dist,"""),
        (["demo", "--optimizer", "sdg"], """no optimizer 'sdg' (did you mean "sgd"?)"""),
        (["demo", "--compression", "3bit"], """no codec '3bit' (did you mean "2bit"?)"""),
        (["tutorial", "--arrays", "fortran"], "invalid choice: 'fortran'"),
        (["inspect"], "CHECKPOINT"),
        (["top", "--every", "0"], "--every: expected a number of seconds above 0, at most 86400, not '0'"),
        (["top", "--every", "1e10"], "--every: expected a number of seconds above 0, at most 86400, not '1e10'"),
        (["inspect", "a", "b"], "unrecognized arguments: b"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(capsys, arguments, part):
    err = error_of(capsys, *arguments, status=2)
    assert part in err
    assert "--help)" in err


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--out", "no/such/folder/a.png"], "no/such/folder does not exist"),
        (["--out", "."], "is a directory"),
        (["--out", "locked/a.png"], "locked cannot be written"),
        (["--checkpoint", "file"], "file is a file; name a directory"),
        (["--checkpoint", "file/below"], "file is a file; name a directory"),
        (["--checkpoint", "locked/new"], "locked cannot be written"),
    ],
)
@pytest.mark.parametrize("store", [["local"], ["dist_sync", "--workers", "2"]], ids=["local", "dist_sync"])
def test_demo_says_before_training_where_it_cannot_write(capsys, monkeypatch, tmp_path, arguments, part, store):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "locked").mkdir()
    (tmp_path / "file").touch()
    # Root may write everywhere, but for file systems that are read-only.
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path))
    monkeypatch.setattr(main.demo, "run", lambda *_, **__: pytest.fail("trained"))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("started workers"))
    assert part in error_of(capsys, "demo", "--store", *store, *arguments, status=1)


@pytest.mark.parametrize(
    ("name", "extra", "store"),
    [
        ("sklearn", "examples", ["dist_sync", "--workers", "2"]),
        ("matplotlib", "examples", ["dist_async"]),
        ("ray", "ray", ["dist_async"]),
    ],
)
def test_demo_names_a_missing_extra_before_it_starts_workers(capsys, monkeypatch, tmp_path, name, extra, store):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("started workers"))
    error = error_of(capsys, "demo", "--store", *store, status=1)
    hint = f"in a checkout of tensorkv: pip install '.[{extra}]'"
    assert error == f"tensorkv: error: {name} is not installed; {hint}\n"


def launched(monkeypatch, status):
    """Let a launcher end with a status, without starting it; return the list of its command lines."""
    commands = []

    def run(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.delenv("RANK", raising=False)
    return commands


def test_workers_are_given_the_arguments_of_the_call(monkeypatch, tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    commands = launched(monkeypatch, 0)
    monkeypatch.setattr(sys, "argv", ["other", "words"])
    words = ["demo", "--store", "dist_sync", "--workers", "2", "--out", str(tmp_path / "a.png")]
    assert main.main(words) == 0
    assert commands[0][-len(words) - 2 :] == ["-m", "tensorkv", *words]


def test_a_launcher_that_is_killed_has_the_status_of_a_shell(monkeypatch, tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    launched(monkeypatch, -signal.SIGKILL)
    assert main.main(["demo", "--store", "dist_sync", "--workers", "2", "--out", str(tmp_path / "a.png")]) == 137


def test_a_worker_that_fails_is_told_without_the_launchers_traceback(tmp_path):
    words = ["demo", "--store", "dist_sync", "--workers", "2", "--optimizer", "muon", "--quiet"]
    command = [sys.executable, "-m", "tensorkv", *words]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")
    lines = ended.stderr.splitlines()
    assert 1 <= len(lines) <= 2
    assert all(line.startswith("tensorkv: error: ") and "muon" in line for line in lines), ended.stderr


def test_demo_names_the_picture_that_it_could_not_write(capsys):
    status, _, err = run(capsys, "demo", "--quiet", "--epochs", "1", "--out", "/dev/full")
    assert (status, err) == (1, "tensorkv: error: /dev/full: cannot be written: No space left on device\n")


def test_an_error_of_the_store_is_one_line(capsys, tmp_path):
    status, _, err = run(capsys, "demo", "--quiet", "--optimizer", "muon", "--out", tmp_path / "a.png")
    assert status == 1
    assert err.startswith("tensorkv: error: ")
    assert "muon" in err
    assert err.count("\n") == 1


# ---------------------------------------------------------------- stopping


def test_ctrl_c_is_status_130_without_a_traceback(capsys, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tutorial, "run", interrupted)
    assert run(capsys, "tutorial") == (130, "", "")


def test_an_interrupted_process_ends_with_130():
    code = (
        "import os, signal, sys, tensorkv.cli.main as cli\n"
        "cli.tutorial.run = lambda _: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.exit(cli.main(['tutorial']))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


# Interrupts itself when torch, and with it most of what takes long, begins to be imported.
INTERRUPTING = """
import os, runpy, signal, sys
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("interrupted", flush=True)
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
sys.argv = sys.argv[1:]
if sys.argv[0] == "-m":
    runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
else:
    from tensorkv.cli.main import main
    sys.exit(main())
"""


@pytest.mark.parametrize(
    "program",
    [["-m", "tensorkv"], ["-m", "tensorkv.cli.main"], ["/usr/bin/tensorkv"]],
    ids=["package", "module", "script"],
)
def test_ctrl_c_during_the_import_is_no_traceback(program):
    command = [sys.executable, "-c", INTERRUPTING, *program, "tutorial"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    # A shell shows the signal as 130.
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "interrupted\n", "")


def test_an_import_leaves_the_signals_of_a_program_alone():
    code = "import signal, tensorkv; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "True\n"


def test_the_package_is_a_command():
    command = [sys.executable, "-m", "tensorkv", "--version"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ended.stdout == f"tensorkv {tensorkv.__version__}\n"


def test_without_rich_the_command_says_what_to_install():
    code = "import sys; sys.modules['rich'] = None; import runpy; runpy.run_module('tensorkv', run_name='__main__')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    shown = "tensorkv: the command line needs rich; in a checkout of tensorkv: pip install '.[cli]'\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", shown)


def test_closed_standard_output_is_one_line():
    command = f"{shlex.quote(sys.executable)} -m tensorkv tutorial >&-"
    ended = subprocess.run(["bash", "-c", command], stderr=subprocess.PIPE, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (1, "tensorkv: error: standard output is closed\n")


def test_dir_of_the_package_shows_what_is_public():
    assert {name for name in dir(tensorkv) if not name.startswith("_")} == set(tensorkv.__all__) - {"__version__"}


@pytest.mark.parametrize("arguments", [["tutorial"], ["--help"]])
def test_a_reader_that_has_gone_is_no_traceback(arguments):
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONUNBUFFERED"}
    reader, writer = os.pipe()
    os.close(reader)
    try:
        command = [sys.executable, "-m", "tensorkv", *arguments]
        ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False, env=environment)
    finally:
        os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_a_missing_module_that_no_extra_brings_is_not_hidden(monkeypatch, tmp_path):
    def broken(*_, **__):
        raise ModuleNotFoundError("no module of ours")

    monkeypatch.setattr(inspect, "describe", broken)
    with pytest.raises(ModuleNotFoundError, match="no module of ours"):
        main.main(["inspect", str(tmp_path)])


def test_tutorial_without_jax_names_the_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)
    assert "in a checkout of tensorkv: pip install '.[jax]'" in error_of(
        capsys, "tutorial", "--arrays", "jax", status=1
    )


@pytest.mark.parametrize("call", ["tensorkv.create('dist_async')", "top.run('a', None, 1.0)"])
def test_without_ray_an_error_names_the_extra(call):
    code = f"import sys; sys.modules['ray'] = None; import tensorkv; from tensorkv.cli import top; {call}"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    *_, last = ended.stderr.splitlines()
    assert last.startswith("tensorkv.errors.EngineNotFoundError: ")
    assert last.endswith("; in a checkout of tensorkv: pip install '.[ray]'")


def test_the_console_script_runs_the_command_line(monkeypatch, capsys):
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="tensorkv")
    monkeypatch.setattr(sys, "argv", ["tensorkv", "--version"])
    assert script.load()() == 0
    assert capsys.readouterr().out.startswith(f"tensorkv {tensorkv.__version__}")


# ---------------------------------------------------------------- inspect


@pytest.fixture
def checkpoint(tmp_path):
    """A store with a dense key, a table and Adam's state of both."""
    with tensorkv.create() as kv:
        kv.init({"w": np.ones((300, 4), np.float32), "b": np.zeros((), np.float64)})
        kv.init("table", tensorkv.Rows(np.array([7, 9]), np.ones((2, 3), np.float32), num_rows=1_000_000))
        kv.set_optimizer("adam", lr=0.1)
        kv.push("w", np.ones((300, 4), np.float32))
        kv.push("w", np.ones((300, 4), np.float32))
        kv.push("table", tensorkv.Rows(np.array([7, 19]), np.ones((2, 3), np.float32), num_rows=1_000_000))
        kv.set_hyperparameters("w", lr=0.5)
        kv.save(tmp_path / "all")
        kv.save_optimizer_states(tmp_path / "states")
    return tmp_path / "all"


def data_file(checkpoint):
    (file,) = checkpoint.glob("data-*.safetensors")
    return file


def table_of(out):
    return out.split("\n\n")[1].splitlines()


def test_inspect_lists_keys_as_aligned_text(capsys, checkpoint):
    status, out, err = run(capsys, "inspect", checkpoint)
    assert (status, err) == (0, "")
    assert table_of(out) == [
        "key      kind   shape         dtype    version  rows     size  state size",
        '"w"      dense  (300, 4)      float32        2        4.7 KiB     9.4 KiB',
        '"b"      dense  ()            float64        0            8 B',
        '"table"  rows   (1000000, 3)  float32        1     3     60 B        76 B',
    ]


def test_inspect_tells_update_rule_size_and_files(capsys, checkpoint):
    first, keys, update, own, size, file = run(capsys, "inspect", checkpoint)[1].split("\n\n")[0].splitlines()
    assert first == f"{checkpoint}: checkpoint of a store: values, versions, update rule"
    assert keys == "keys:   3"
    assert update.startswith("update: optimizer adam(lr=0.1, betas=[0.9, 0.999], eps=1e-08, ")
    assert update.endswith("rescale_grad=1.0, clip_gradient=None)")
    assert own == '        lr=0.5: "w"'
    nbytes = inspect.size(data_file(checkpoint).stat().st_size)
    assert size == f"size:   {nbytes} in 1 data file (only the manifest checked; --verify reads everything)"
    assert file == f"file:   {data_file(checkpoint).name}  {nbytes}"


def test_inspect_as_json(capsys, checkpoint):
    status, out, err = run(capsys, "inspect", "--json", checkpoint)
    report = json.loads(out)
    assert (status, err) == (0, "")
    assert (report["path"], report["kind"], report["update"]) == (str(checkpoint), "store", "optimizer")
    assert (report["optimizer"]["name"], report["optimizer"]["numbers"]["lr"]) == ("adam", 0.1)
    assert report["optimizer"]["overrides"] == [["w", {"lr": 0.5}]]
    assert report["verified"] is False
    assert report["nbytes"] == data_file(checkpoint).stat().st_size
    assert [file["name"] for file in report["files"]] == [data_file(checkpoint).name]
    w, b, table = report["keys"]
    assert w == {
        "key": "w",
        "kind": "dense",
        "shape": [300, 4],
        "dtype": "float32",
        "version": 2,
        "library": "numpy",
        "device": None,
        "rows": None,
        "nbytes": 4800,
        "state": ["exp_avg", "exp_avg_sq", "step"],
        "state_nbytes": 9604,
    }
    assert (b["key"], b["shape"], b["nbytes"], b["state"], b["state_nbytes"]) == ("b", [], 8, [], 0)
    assert (table["kind"], table["rows"], table["shape"]) == ("rows", 3, [1_000_000, 3])
    assert table["nbytes"] == 3 * 8 + 3 * 3 * 4


def test_inspect_optimizer_states_have_no_values(capsys, checkpoint):
    folder = checkpoint.parent / "states"
    out = run(capsys, "inspect", folder)[1]
    assert out.startswith(f"{folder}: checkpoint of optimizer states, without values\n")
    report = json.loads(run(capsys, "inspect", "--json", folder)[1])
    assert report["kind"] == "optimizer-states"
    assert [(key["nbytes"], key["state_nbytes"]) for key in report["keys"]] == [(0, 9604), (0, 0), (24, 76)]


@pytest.mark.parametrize(
    ("updater", "line"),
    [
        (None, "update: assign"),
        (lambda *_: None, "update: an updater function, which is not saved; set it again"),
    ],
)
def test_inspect_stores_without_optimizer(capsys, tmp_path, updater, line):
    with tensorkv.create() as kv:
        kv.init([1, 22], [torch.ones(2), torch.ones(3, dtype=torch.complex64)])
        kv.set_updater(updater)
        kv.save(tmp_path)
    out = run(capsys, "inspect", tmp_path)[1]
    assert line in out.splitlines()
    assert table_of(out)[1:] == [
        "1    dense  (2,)   float32          0         8 B",
        "22   dense  (3,)   complex64        0        24 B",
    ]


def test_inspect_an_empty_store(capsys, tmp_path):
    with tensorkv.create() as kv:
        kv.save(tmp_path)
    status, out, _ = run(capsys, "inspect", tmp_path)
    assert status == 0
    assert "keys:   0" in out
    assert len(table_of(out)) == 1


def test_inspect_draws_a_table_for_a_terminal(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "200")
    with tensorkv.create() as kv:
        kv.init("[red]w", np.ones(2, np.float32))
        kv.save(tmp_path)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    status, out, _ = run(capsys, "inspect", tmp_path)
    assert status == 0
    assert "───" in out
    assert '"[red]w"' in out  # rich takes no key for markup


def test_inspect_never_sends_control_characters_of_a_checkpoint(capsys, tmp_path):
    with tensorkv.create() as kv:
        kv.init("a\x1b[31m\nb\x9b", np.ones(2, np.float32))
        kv.save(tmp_path)
    out = run(capsys, "inspect", tmp_path)[1]
    assert r'"a\x1b[31m\nb\x9b"' in out
    assert "\x1b" not in out
    assert "\x9b" not in out


def test_verify_reads_the_data(capsys, checkpoint):
    status, out, _ = run(capsys, "inspect", "--verify", checkpoint)
    assert status == 0
    assert "(every digest checked)" in out
    assert json.loads(run(capsys, "inspect", "--verify", "--json", checkpoint)[1])["verified"] is True
    data = bytearray(data_file(checkpoint).read_bytes())
    data[-1] ^= 1
    data_file(checkpoint).write_bytes(data)
    assert run(capsys, "inspect", checkpoint)[0] == 0
    assert "damaged" in error_of(capsys, "inspect", "--verify", checkpoint, status=1)


def with_head(file, change):
    """Change the head of a safetensors file."""
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    head = change(json.loads(whole[8 : 8 + length]))
    text = head.encode() if isinstance(head, str) else json.dumps(head).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])


def each_entry(**changed):
    return lambda head: {name: {**entry, **changed} for name, entry in head.items() if name != "__metadata__"}


@pytest.mark.parametrize(
    "change",
    [
        lambda head: [],
        lambda head: dict.fromkeys(head, 3),
        lambda head: "[" * 100_000,
        lambda head: {name: {"shape": [1]} for name in head},
        each_entry(data_offsets=[1]),
        each_entry(data_offsets=["0", "8"]),
        each_entry(data_offsets=[8, 0]),
        each_entry(shape=None),
        each_entry(shape=["a"]),
    ],
    ids=["list", "numbers", "deep", "no offsets", "one offset", "text", "negative", "no shape", "shape of text"],
)
def test_sizes_are_unknown_where_the_head_of_the_data_is_invalid(capsys, checkpoint, change):
    with_head(data_file(checkpoint), change)
    report = inspect_json(capsys, checkpoint)
    assert [(key["rows"], key["nbytes"]) for key in report["keys"]] == [(None, None)] * 3


def test_rows_are_unknown_where_the_ids_of_a_table_have_no_shape(capsys, checkpoint):
    with_head(data_file(checkpoint), each_entry(shape=[]))
    table = next(key for key in inspect_json(capsys, checkpoint)["keys"] if key["kind"] != "dense")
    assert (table["rows"], table["nbytes"]) == (None, None)


@pytest.mark.parametrize("damage", ["missing", "short", "link", "pipe", "junk", "huge head"])
def test_sizes_are_unknown_where_the_data_is_missing(capsys, checkpoint, damage):
    file = data_file(checkpoint)
    whole = file.read_bytes()
    file.unlink()
    if damage == "short":
        file.write_bytes(whole[:4])
    elif damage == "link":
        other = checkpoint.parent / "elsewhere"
        other.write_bytes(whole)
        file.symlink_to(other)
    elif damage == "pipe":
        os.mkfifo(file)
    elif damage == "junk":
        file.write_bytes((5).to_bytes(8, "little") + b"12345")
    elif damage == "huge head":
        file.write_bytes(b"\xff" * 100)
    status, out, err = run(capsys, "inspect", checkpoint)
    assert (status, err) == (0, "")
    assert table_of(out)[1] == '"w"      dense  (300, 4)      float32        2           ?           ?'
    report = json.loads(run(capsys, "inspect", "--json", checkpoint)[1])
    assert [(key["rows"], key["nbytes"]) for key in report["keys"]] == [(None, None)] * 3
    error_of(capsys, "inspect", "--verify", checkpoint, status=1)


def inspect_json(capsys, path):
    status, out, err = run(capsys, "inspect", "--json", path)
    assert (status, err) == (0, "")
    return json.loads(out)


# With a short log each push makes a snapshot.
@pytest.mark.parametrize(
    ("is_open", "log_nbytes"), [(True, None), (False, None), (False, 1)], ids=["open", "closed", "snapshots"]
)
def test_inspect_of_a_store_in_a_folder_tells_what_the_store_tells(capsys, tmp_path, is_open, log_nbytes):
    path = tmp_path / "store"
    kv = tensorkv.create("local", path=path, log_nbytes=log_nbytes)
    kv.init({"w": np.zeros((2, 3), np.float32), "n": np.array(1.5), "gone": np.zeros(1)})
    kv.init("t", tensorkv.Rows([3], np.ones((1, 2), np.float32), 1000))
    kv.set_optimizer("sgd", lr=0.5, momentum=0.9)
    kv.set_hyperparameters("w", lr=0.25)
    for _ in range(3):
        kv.push(["w", "n"], [np.ones((2, 3), np.float32), np.ones(())])
    kv.push("t", tensorkv.Rows([4, 5], np.ones((2, 2), np.float32), 1000))
    kv.delete("gone")
    kv.publish("first")
    kv.publish("second", keep=1)
    kv.set_hyperparameters(lr=0.125, max_grad_norm=0.5)
    # The log has its gradients and how they were scaled.
    kv.push("w", np.ones((2, 3), np.float32))
    kv.publish("third")
    kv.publish("fourth")
    kv.unpublish("fourth")
    infos, optimizer = {key: kv.info(key) for key in kv.keys()}, kv.optimizer
    if not is_open:
        kv.close()
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    report = inspect_json(capsys, path)
    text = run(capsys, "inspect", path)[1]
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    kv.close()
    assert (report["kind"], report["update"]) == ("folder", "optimizer")
    assert report["optimizer"]["numbers"]["lr"] == optimizer["lr"] == 0.125
    assert [key["key"] for key in report["keys"]] == list(infos)
    for key in report["keys"]:
        info = infos[key["key"]]
        assert (tuple(key["shape"]), key["dtype"], key["version"]) == (info.shape, info.dtype, info.version)
        assert key["kind"] == info.kind
        assert key["nbytes"] == info.nbytes or info.kind == "rows"
    assert text.startswith(f"{path}: a store in its folder, with {report['changes']} change")
    assert report["releases"] == ["second", "third"]
    assert "releases: second, third" in text


def test_inspect_says_where_in_a_folder_there_is_something(capsys, tmp_path):
    with tensorkv.create() as kv:
        kv.init("w", np.zeros(2))
        kv.save(tmp_path / "demo" / "store")
    with tensorkv.create("local", path=tmp_path / "servers" / "server-0") as kv:
        kv.init("w", np.zeros(2))
    for outer, inner in (("demo", "store"), ("servers", "server-0")):
        error = error_of(capsys, "inspect", tmp_path / outer, status=1)
        assert f"in {inner}; inspect {tmp_path / outer / inner}" in error


def test_inspect_of_a_damaged_store(capsys, tmp_path):
    with tensorkv.create("local", path=tmp_path / "store") as kv:
        kv.init("w", np.zeros(2))
        kv.push("w", np.ones(2))
    (log,) = (tmp_path / "store").glob("log-*.tkv")
    content = bytearray(log.read_bytes())
    content[60] ^= 1
    log.write_bytes(content)
    assert "damaged at byte 0" in error_of(capsys, "inspect", tmp_path / "store", status=1)


def cut_off_the_snapshot(path):
    (snapshot,) = path.glob("snapshot-*.tkv")
    content = snapshot.read_bytes()
    snapshot.write_bytes(content[: content.rindex(b"tkv1")])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: sorted(path.glob("log-*.tkv"))[1].unlink(), "record 3 is missing, 4 comes next"),
        (lambda path: sorted(path.glob("log-*.tkv"))[1].write_bytes(b""), "record 3 is missing, 4 comes next"),
        (cut_off_the_snapshot, "damaged: it ends early"),
    ],
    ids=["removed", "empty", "cut off"],
)
def test_inspect_refuses_a_folder_that_no_store_can_be_opened_from(damage, said, capsys, tmp_path):
    path = tmp_path / "store"
    for number in range(4):
        with tensorkv.create("local", path=path) as kv:
            if not number:
                kv.init("w", np.zeros(2))
                shard = kv._engine._shard
                assert shard.log.snapshot(shard)
            kv.push("w", np.ones(2))
    damage(path)
    assert said in error_of(capsys, "inspect", path, status=1)
    with pytest.raises(tensorkv.StorageError, match=said):
        tensorkv.create("local", path=path)


def test_inspect_of_a_store_that_replaces_its_snapshot_meanwhile(capsys, tmp_path, monkeypatch):
    opened = []

    def open_file(folder, name, flags):
        opened.append(name)
        if len(opened) == 2:
            # The files were listed, and the next to be read is removed now.
            assert shard.log.snapshot(shard)
        return real(folder, name, flags)

    with tensorkv.create("local", path=tmp_path) as kv:
        kv.init("w", np.zeros(2))
        shard = kv._engine._shard
        assert shard.log.snapshot(shard)
        kv.push("w", np.ones(2))
        real = inspect.Folder.open
        monkeypatch.setattr(inspect, "Folder", type("Watched", (inspect.Folder,), {"open": open_file}))
        report = inspect_json(capsys, tmp_path)
    assert len(opened) > 2
    assert [(key["key"], key["version"]) for key in report["keys"]] == [("w", 1)]


@pytest.mark.parametrize("in_folder", [False, True])
def test_inspect_tells_the_sizes_of_all_tables_and_names(in_folder, capsys, tmp_path):
    values = {name: tensorkv.Rows([3], np.ones((1, 2), np.float32), 1000) for name in ("t", "back\\slash")}
    values["n"] = tensorkv.Rows([3], np.ones((1, 2), np.float32), 1000, init="normal")
    values |= {name: np.zeros(3, np.float32) for name in ("a\\b", "half \ud800", "ä")}
    with tensorkv.create("local", **({"path": tmp_path / "store"} if in_folder else {})) as kv:
        kv.init(values)
        if not in_folder:
            kv.save(tmp_path / "store")
    found = {key["key"]: (key["rows"], key["nbytes"]) for key in inspect_json(capsys, tmp_path / "store")["keys"]}
    assert found == {key: (1, 16) if isinstance(value, tensorkv.Rows) else (None, 12) for key, value in values.items()}


def test_inspect_does_not_guess_what_pushes_have_added_to_a_table(capsys, tmp_path):
    with tensorkv.create("local", path=tmp_path) as kv:
        kv.init("t", tensorkv.Rows([3], np.ones((1, 2), np.float32), 1000, init="normal"))
        kv.push("t", tensorkv.Rows([4], np.ones((1, 2), np.float32), 1000))
    (key,) = inspect_json(capsys, tmp_path)["keys"]
    assert (key["rows"], key["nbytes"], key["version"]) == (None, None, 1)


def test_inspect_names_keys_with_the_same_numbers_in_one_line(capsys, tmp_path):
    with tensorkv.create() as kv:
        names = [f"layer{index}" for index in range(20)]
        kv.init(names, [np.zeros(1)] * 20)
        kv.set_optimizer("adamw", weight_decay=0.5)
        kv.set_hyperparameters(names[:18], weight_decay=0.0)
        kv.set_hyperparameters("layer19", lr=1.0)
        kv.save(tmp_path)
    lines = run(capsys, "inspect", tmp_path)[1].splitlines()
    assert lines[3] == '        weight_decay=0.0: "layer0", "layer1", "layer2" and 15 more'
    assert lines[4] == '        lr=1.0: "layer19"'


def test_inspect_of_no_checkpoint(capsys, tmp_path):
    assert "no checkpoint here" in error_of(capsys, "inspect", tmp_path / "nope", status=1)
    assert "no checkpoint here" in error_of(capsys, "inspect", tmp_path, status=1)
    file = tmp_path / "file"
    file.write_text("text")
    assert str(file) in error_of(capsys, "inspect", file, status=1)
    (tmp_path / "manifest.json").write_text('{"name": "a web page"}')
    assert "not a tensorkv-checkpoint" in error_of(capsys, "inspect", tmp_path, status=1)


def test_inspect_of_a_damaged_manifest(capsys, checkpoint):
    manifest = checkpoint / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"version": 2', '"version": 3'))
    assert "damaged" in error_of(capsys, "inspect", checkpoint, status=1)
    manifest.write_text(text[:100])
    assert "not JSON" in error_of(capsys, "inspect", checkpoint, status=1)


@pytest.mark.parametrize(
    "change",
    [
        {"keys": None},
        {"keys": [{"key": "w"}]},
        {"files": [7]},
        {"kind": ["store"]},
        {"optimizer": {"name": "adam"}},
        {"optimizer": {"name": "adam", "numbers": 3, "rescale_grad": 1, "clip_gradient": 1, "overrides": []}},
        {"optimizer": 3},
    ],
)
def test_inspect_of_a_manifest_that_no_save_wrote(capsys, checkpoint, monkeypatch, change):
    # With a right digest, as someone who writes manifests could make it.
    body = {**tensorkv.storage.checkpoint.read_manifest(str(checkpoint)), **change}
    monkeypatch.setattr(inspect.checkpoint, "read_manifest", lambda _: body)
    assert str(checkpoint) in error_of(capsys, "inspect", checkpoint, status=1)


def test_inspect_reads_no_file_outside_of_the_checkpoint(capsys, checkpoint, monkeypatch):
    shutil.copy(data_file(checkpoint), checkpoint.parent / "outside.safetensors")
    body = tensorkv.storage.checkpoint.read_manifest(str(checkpoint))
    body["files"][0]["name"] = "../outside.safetensors"
    monkeypatch.setattr(inspect.checkpoint, "read_manifest", lambda _: body)
    report = json.loads(run(capsys, "inspect", "--json", checkpoint)[1])
    assert [key["nbytes"] for key in report["keys"]] == [None] * 3


# ---------------------------------------------------------------- make


def test_constraints_pin_what_the_tests_run_with():
    root = Path(__file__).parents[2]
    lines = [line for line in (root / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    assert pins["torch"] == "2.13.0"
    assert not [name for name, version in pins.items() if "+" in version]
    for name in ("torch", "numpy", "rich", "safetensors", "pytest", "ruff", "mypy"):
        assert importlib.metadata.version(name).partition("+")[0] == pins[name], name


def test_inspect_lists_the_releases_of_a_checkpoint(tmp_path, capsys):
    with tensorkv.create() as kv:
        kv.init("w", np.zeros(2))
        for name in ("first", "second"):
            kv.publish(name)
            kv.push("w", np.ones(2))
        kv.save(tmp_path / "with", releases=True)
        kv.save(tmp_path / "without")
    report = json.loads(run(capsys, "inspect", "--verify", "--json", str(tmp_path / "with"))[1])
    assert report["releases"] == ["first", "second"]
    assert "releases: first, second" in run(capsys, "inspect", str(tmp_path / "with"))[1]
    assert "releases" not in run(capsys, "inspect", str(tmp_path / "without"))[1]
