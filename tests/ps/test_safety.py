"""Who can reach a Ray cluster that holds a store: what listens, on which addresses, and who can read the token."""

import contextlib
import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import tensorkv
from tests.support import hosts
from tests.support.until import LIMIT_S, until

pytest.importorskip("ray")
from tensorkv.engines.ps.ray import cluster, safety

needs_hosts = pytest.mark.skipif(not hosts.CAN_MAKE, reason="makes network namespaces, which takes root and iproute2")
RAY = [sys.executable, "-m", "ray.scripts.scripts"]

HEADER = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
ROW = "   0: {}:1F90 00000000:0000 {} 00000000:00000000 00:00000000 00000000     0        0 4711 1\n"


# ---------------------------------------------------------------- what listens


@pytest.mark.skipif(sys.byteorder != "little", reason="the rows below are those of a little-endian host")
@pytest.mark.parametrize(
    ("address", "is_local"),
    [
        ("0100007F", True),
        ("0200007F", True),
        ("00000000", False),
        ("0107D50A", False),
        ("0000000000000000FFFF00000100007F", True),
        ("00000000000000000000000001000000", True),
        ("00000000000000000000000000000000", False),
        ("0000000000000000FFFF00000107D50A", False),
    ],
)
def test_listeners_on_each_kind_of_address(address, is_local, tmp_path, monkeypatch):
    table = tmp_path / "table"
    monkeypatch.setattr(safety, "_TABLES", (str(table),))
    table.write_text(HEADER + ROW.format(address, "0A") + ROW.format("00000000", "01"))
    (found,) = safety.listeners()
    assert (found.port, found.is_local) == (8080, is_local)
    assert safety.is_local(8080) is is_local
    # Several sockets may share a port; one that is open to others is enough.
    table.write_text(HEADER + ROW.format("0100007F", "0A") + ROW.format(address, "0A"))
    assert safety.is_local(8080) is is_local
    assert not safety.is_local(8081), "nothing listens there that could be looked at"


def test_a_kernel_that_does_not_tell_counts_as_open(tmp_path, monkeypatch):
    monkeypatch.setattr(safety, "_TABLES", (str(tmp_path / "missing"),))
    assert not safety.is_local(8080)


def test_a_cluster_is_open_if_one_of_its_ports_is(monkeypatch):
    local = {1, 2, 3}
    monkeypatch.setattr(safety, "is_local", lambda port: port in local)
    node = {"Alive": True, "NodeManagerAddress": "127.0.0.1", "NodeManagerPort": 2, "ObjectManagerPort": 3}
    assert safety.open_addresses("127.0.0.1:1", [node]) == []
    for port in (1, 2, 3):
        local.remove(port)
        assert safety.open_addresses("127.0.0.1:1", [node]) == [f"127.0.0.1:{port}"]
        local.add(port)
    elsewhere = {**node, "NodeManagerAddress": "10.1.2.3"}
    assert safety.open_addresses("127.0.0.1:1", [node, elsewhere]) == ["10.1.2.3:2", "10.1.2.3:3"]
    assert safety.open_addresses("127.0.0.1:1", [node, {**elsewhere, "Alive": False}]) == []


def process_tree(pid):
    """A process and all that it has started, directly or not."""
    parents = {}
    for each in os.listdir("/proc"):
        with contextlib.suppress(OSError, ValueError):
            parents[int(each)] = int(Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()[1])
    tree = {pid}
    while more := {child for child, parent in parents.items() if parent in tree} - tree:
        tree |= more
    return tree


def socket_inodes(pids):
    """The sockets that processes have open."""
    inodes = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for each in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    inodes |= set(re.findall(r"socket:\[(\d+)\]", os.readlink(f"/proc/{pid}/fd/{each}")))
    return inodes


def listening_sockets(pids):
    """The addresses and ports, as the kernel writes them, on which processes of one host listen."""
    (first, *_), inodes, tables = pids, socket_inodes(pids), ("tcp", "tcp6")
    rows = [line.split() for name in tables for line in Path(f"/proc/{first}/net/{name}").read_text().splitlines()]
    return [row[1].split(":") for row in rows if row[3] == "0A" and row[9] in inodes]


def unix_listeners(pids):
    """The names of the Unix sockets on which processes of one host listen; "@" begins those that are no files."""
    (first, *_), inodes = pids, socket_inodes(pids)
    rows = [line.split() for line in Path(f"/proc/{first}/net/unix").read_text().splitlines()[1:]]
    # Flags, of which one says that it accepts connections; inode; name.
    return [row[7] for row in rows if int(row[3], 16) & 0x10000 and row[6] in inodes and len(row) > 7]


HOLD = """
import sys
import numpy as np
import tensorkv
try:
    import jax.numpy as jnp
    # JAX's threads are there, and it warns of forks.
    jnp.ones(1) + 1
except ImportError:
    pass
kv = tensorkv.create("dist_async")
kv.init("w", np.arange(3.0))
print("ready", flush=True)
sys.stdin.read()
kv.close()
"""


@contextlib.contextmanager
def holding(tmp_path, *start, code=HOLD, **env):
    """A process with a store, until the end of the block; its home is new, and it says nothing on stderr."""
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
    env = {**os.environ, "HOME": str(home), **env}
    command = [*start, sys.executable, "-W", "error", "-c", code]
    with subprocess.Popen(command, env=env, stdin=-1, stdout=-1, stderr=-1, text=True) as process:
        try:
            said = process.stdout.readline()
            if said == "ready\n":
                yield process
            _, errors = process.communicate()
        finally:
            process.kill()
    assert (said, process.returncode, errors) == ("ready\n", 0, "")


CONNECT = """
import socket, sys
for port in sys.argv[2:]:
    try:
        socket.create_connection((sys.argv[1], int(port))).close()
        print("connected", port)
    except OSError as error:
        print("refused", port)
"""


def test_a_store_that_starts_ray_listens_on_loopback_alone_and_asks_for_a_token(tmp_path):
    """Whatever the environment says of tokens; another host, where one can be made, finds no port open."""
    with contextlib.ExitStack() as stack:
        start, address, start_other = [], None, []
        if hosts.CAN_MAKE:
            (start, address, _), (start_other, _, _) = stack.enter_context(hosts.two_hosts())
        stack.callback(os.umask, os.umask(0o022))
        process = stack.enter_context(holding(tmp_path, *start, RAY_AUTH_MODE="disabled"))
        tree = process_tree(process.pid)
        sockets = listening_sockets(tree)
        # The driver, the head, two of the raylet, a server.
        assert len(sockets) >= 5
        assert {address for address, _ in sockets} <= {"0100007F", "0000000000000000FFFF00000100007F"}
        # Ours is one, of the server, without a file; who is refused there is tested beside its code.
        (own,) = [name for name in unix_listeners(tree) if "/ray/" not in name]
        assert re.fullmatch("@tensorkv-[0-9a-f]{16}", own)
        token = tmp_path / "home" / ".ray" / "auth_token"
        assert stat.S_IMODE(token.stat().st_mode) == 0o600
        assert os.listdir(token.parent) == ["auth_token"]
        gcs = next(pid for pid in tree if "gcs_server" in Path(f"/proc/{pid}/cmdline").read_text())
        assert b"RAY_AUTH_MODE=token" in Path(f"/proc/{gcs}/environ").read_bytes().split(b"\0")
        if address is None:
            pytest.skip("only the sockets were looked at: another host takes root")
        # The wire itself works: a port that is open to others is found.
        listen = (
            "import socket, sys; s = socket.create_server((sys.argv[1], 1711)); print(flush=True); sys.stdin.read()"
        )
        opened = subprocess.Popen([*start, sys.executable, "-c", listen, address], stdin=-1, stdout=-1)
        stack.callback(opened.communicate)
        opened.stdout.readline()
        ports = ["1711", *(str(int(port, 16)) for _, port in sockets)]
        command = [*start_other, sys.executable, "-c", CONNECT, address, *ports]
        tried = subprocess.run(command, capture_output=True, text=True, check=True)
        assert tried.stdout.splitlines() == ["connected 1711", *(f"refused {port}" for port in ports[1:])]


# ---------------------------------------------------------------- clusters of others


@contextlib.contextmanager
def head(start, home, address, **env):
    """A Ray that somebody has started by hand on a host; its address."""
    folder = tempfile.mkdtemp(prefix="tkv", dir="/tmp")
    words = ["--node-ip-address", address, "--port", "6399", "--include-dashboard", "false", "--num-cpus", "1"]
    words += ["--object-store-memory", str(1 << 27), "--temp-dir", folder, "--block", "--disable-usage-stats"]
    env = {**os.environ, "HOME": str(home), **env}
    with open(f"{folder}/out", "w") as out:
        process = subprocess.Popen([*start, *RAY, "start", "--head", *words], env=env, stdout=out, stderr=out)
    try:
        until(lambda: "Ray runtime started" in Path(f"{folder}/out").read_text() or process.poll() is not None)
        assert process.poll() is None, Path(f"{folder}/out").read_text()
        yield f"{address}:6399"
    finally:
        tree = process_tree(process.pid)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        for pid in tree:
            with contextlib.suppress(OSError):
                os.kill(pid, 9)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def run(start, code, *args, home, **env):
    """Start a program on a host."""
    env = {**os.environ, "HOME": str(home), **env}
    command = [*start, sys.executable, *(["-c", code] if isinstance(code, str) else code), *args]
    return subprocess.Popen(command, stdout=-1, stderr=subprocess.STDOUT, text=True, env=env)


CREATE = """
import os, sys
os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
import numpy as np
import ray
import tensorkv
try:
    kv = tensorkv.create("dist_async", address=sys.argv[1])
    kv.init("w", np.arange(3.0))
    print(kv.pull("w").tolist())
    kv.close()
except tensorkv.TensorKVError as error:
    print(type(error).__name__, error)
print([each["name"] for each in ray.util.list_named_actors(all_namespaces=True)])
"""


@needs_hosts
def test_a_cluster_without_a_token_is_looked_at_not_believed(tmp_path):
    """Its node has an address of the loopback interface; Ray listens on every interface all the same."""
    env = {"home": tmp_path, "RAY_AUTH_MODE": "disabled"}
    with hosts.two_hosts() as ((start, _, _), _), head(start, tmp_path, "127.0.0.2", RAY_AUTH_MODE="disabled") as at:
        said, actors = run(start, CREATE, at, **env).communicate()[0].splitlines()
    assert said.startswith("ArgumentError create: the Ray cluster accepts connections from other hosts (at 127.0.0.2:")
    assert "and asks for no token" in said
    assert actors == "[]", "servers that were made for a store that was refused have ended"


STEAL = """
import json, os, sys
os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
import ray
from ray._raylet import GcsClient
seen = {}
try:
    client = GcsClient(address=sys.argv[1])
    seen["nodes"] = len(client.get_all_node_info(timeout=600))
except Exception as error:
    seen["error"] = type(error).__name__
print(json.dumps(seen))
"""


@needs_hosts
def test_without_the_token_another_host_can_neither_read_nor_join(tmp_path):
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    for home in (mine, theirs):
        home.mkdir()
        safety._make_token(home / ".ray" / "auth_token")
    with contextlib.ExitStack() as stack:
        (start, address, _), (start_other, other, _) = stack.enter_context(hosts.two_hosts())
        at = stack.enter_context(head(start, mine, address, RAY_AUTH_MODE="token"))
        join = [*RAY[1:], "start", "--address", at, "--node-ip-address", other]
        readers = [run(start_other, STEAL, at, home=theirs, RAY_AUTH_MODE=mode) for mode in ("disabled", "token")]
        # Who is refused would try again for 20 s.
        once = {"RAY_NUM_REDIS_GET_RETRIES": "1"}
        joining = [run(start_other, join, home=theirs, RAY_AUTH_MODE=mode, **once) for mode in ("disabled", "token")]
        # With the token one is let in: it is what keeps the others out.
        reader = run(start_other, STEAL, at, home=mine, RAY_AUTH_MODE="token")
        assert json.loads(reader.communicate()[0]) == {"nodes": 1}
        for each in readers:
            assert list(json.loads(each.communicate()[0])) == ["error"]
        for each in joining:
            said = each.communicate()[0]
            assert each.returncode != 0
            assert "token" in said, said


def commands(text, word):
    """The lines of the console block of a page in which a word is."""
    blocks = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    (block,) = [each for each in blocks if word in each]
    return [line.removeprefix("$ ") for line in block.splitlines()]


@needs_hosts
def test_the_commands_of_the_docs_start_a_cluster_with_a_token(tmp_path):
    """As a reader would type them: in an empty folder, with an empty home."""
    *first, last = commands(Path(__file__).parents[2].joinpath("docs", "servers.md").read_text(), "ray start --head")
    home, folder = tmp_path / "home", Path(tempfile.mkdtemp(prefix="tkv", dir="/tmp"))
    home.mkdir()
    (tmp_path / "worker.py").write_text(
        "import numpy as np, tensorkv\n"
        "kv = tensorkv.create('dist_async')\n"
        "kv.init('w', np.arange(3.0))\n"
        "print(kv.pull('w').tolist())\n"
        "kv.close()\n"
    )
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "HOME": str(home), "PATH": path, "RAY_TMPDIR": str(folder), "RAY_USAGE_STATS_ENABLED": "0"}
    env = {name: text for name, text in env.items() if not name.startswith("RAY_AUTH")}

    def type_in(command):
        ended = subprocess.run(
            [*start, "sh", "-c", command], env=env, cwd=tmp_path, stdout=-1, stderr=subprocess.STDOUT
        )
        assert ended.returncode == 0, ended.stdout.decode()
        return ended.stdout.decode()

    umask = os.umask(0o022)
    try:
        with hosts.two_hosts() as ((start, address, _), (_, other, _)):
            subprocess.run([*start, "ip", "route", "add", "default", "via", other], check=True)
            for command in first:
                type_in(command)
            assert stat.S_IMODE((home / ".ray" / "auth_token").stat().st_mode) == 0o600
            assert "HOST" in last
            assert type_in(last.replace("HOST", address)).endswith("[0.0, 1.0, 2.0]\n")
            thief = run(start, STEAL, f"{address}:6379", home=tmp_path, RAY_AUTH_MODE="disabled")
            assert list(json.loads(thief.communicate()[0])) == ["error"]
    finally:
        os.umask(umask)
        shutil.rmtree(folder, ignore_errors=True)


# ---------------------------------------------------------------- the token


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A new home directory in which Ray looks for its token."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o755)
    monkeypatch.setenv("HOME", str(folder))
    yield folder
    shutil.rmtree(folder)


def test_a_token_is_made_once_and_for_this_user_alone(home):
    safety.ensure_token()
    token = home / ".ray" / "auth_token"
    first = token.read_text()
    assert (len(first), stat.S_IMODE(token.stat().st_mode)) == (64, 0o600)
    assert stat.S_IMODE(token.parent.stat().st_mode) == 0o700
    # What another process has made in the meantime stays.
    safety._make_token(token)
    safety.ensure_token()
    safety.check_token()
    assert token.read_text() == first
    assert os.listdir(token.parent) == ["auth_token"]


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620, 0o602])
def test_a_token_that_others_can_read_is_refused_before_anything_is_started(home, mode):
    token = home / ".ray" / "auth_token"
    token.parent.mkdir(mode=0o755)
    token.write_text("0" * 64)
    token.chmod(mode)
    with pytest.raises(tensorkv.ArgumentError, match=rf"chmod 600 {token}"):
        safety.check_token()
    # A folder that no other user can enter protects it as well.
    home.chmod(0o700)
    safety.check_token()
    home.chmod(0o755)
    token.chmod(0o600)
    safety.check_token()


@pytest.mark.parametrize("is_running", [True, False])
def test_a_ray_that_is_late_is_a_typed_error(is_running, home, monkeypatch):
    import ray

    def init(**_):
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}" if is_running else None
        with pytest.raises(tensorkv.ServerDeadError, match="The current node timed out during startup"):
            cluster.enter(address, 1)
    assert "RAY_AUTH_MODE" not in os.environ


def test_workers_learn_at_once_that_rank_0_cannot_start_ray(home, monkeypatch):
    import ray
    import torch.distributed as dist

    def init(**_):
        raise Exception("The current node timed out during startup.")

    rendezvous, ended = dist.HashStore(), []
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(cluster, "connect", lambda _: (rendezvous, 0, 2))
    monkeypatch.setattr(cluster._compat, "shutdown", lambda: ended.append("a half-started node"))
    with ThreadPoolExecutor() as threads:
        workers = [threads.submit(cluster._start_together, rank, 2 * LIMIT_S) for rank in (0, 1)]
        for worker in workers:
            with pytest.raises(tensorkv.ServerDeadError, match="The current node timed out during startup"):
                worker.result(LIMIT_S)
    assert ended == ["a half-started node"]


@pytest.mark.parametrize("address", [None, "127.0.0.1:1"])
def test_create_looks_at_the_token(home, address, monkeypatch):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("0" * 64)
    (home / ".ray" / "auth_token").chmod(0o644)
    with pytest.raises(tensorkv.ArgumentError, match="can read or replace Ray's token"):
        cluster.enter(address, 1)


def test_a_home_that_cannot_be_written_is_an_error_that_says_so(home, monkeypatch):
    # Nobody can make a folder in a file, not even root.
    (home / "file").write_text("")
    monkeypatch.setenv("HOME", str(home / "file"))
    with pytest.raises(tensorkv.ArgumentError, match=r"its file cannot be written.*file/\.ray.*set HOME"):
        safety.ensure_token()
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a secret")
    safety.ensure_token()
    safety.check_token()


def test_a_ray_that_does_not_start_is_a_typed_error(tmp_path):
    """Sockets have short names, and Ray's lie in the directory for temporary files."""
    code = """
import tensorkv
try:
    tensorkv.create("dist_async")
except tensorkv.ServerDeadError as error:
    print(error)
"""
    folder = tmp_path / ("long" * 25)
    folder.mkdir()
    env = {**os.environ, "HOME": str(tmp_path), "TMPDIR": str(folder)}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert shown.returncode == 0, shown.stderr[-2000:]
    assert "Ray could not be started" in shown.stdout
    assert "set TMPDIR to a shorter path" in shown.stdout
