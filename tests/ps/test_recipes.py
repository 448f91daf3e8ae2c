"""The ways back that the page on servers tells of, where what breaks is Ray itself or a folder."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tensorkv
from tests.support.until import LIMIT_S

pytest.importorskip("ray")

pytestmark = pytest.mark.usefixtures("ray_store")

WORK = """
import os, sys
import numpy as np
import tensorkv
kv = tensorkv.create("dist_async", path=sys.argv[1])
if "n" not in kv:
    kv.init("n", np.zeros(3, np.float32))
    kv.set_optimizer("sgd", lr=1.0, maximize=True)
print(kv.pull("n")[0], flush=True)
for line in sys.stdin:
    kv.push("n", np.ones(3, np.float32))
    print(kv.pull("n")[0], flush=True)
kv.close()
"""


class Job:
    """A process that has a store in a folder and pushes once for each call of ``push``; a context manager."""

    def __init__(self, folder):
        # Ray gives up after a minute without its head.
        env = {**os.environ, "RAY_gcs_rpc_server_reconnect_timeout_s": "5"}
        env = {name: text for name, text in env.items() if name not in ("RANK", "WORLD_SIZE", "RAY_ADDRESS")}
        command = [sys.executable, "-c", WORK, str(folder)]
        self.process = subprocess.Popen(
            command, env=env, stdin=-1, stdout=-1, stderr=subprocess.DEVNULL, text=True, bufsize=1
        )
        self.value = self._read()

    def _read(self):
        return float(self.process.stdout.readline())

    def push(self):
        self.process.stdin.write("\n")
        self.value = self._read()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        # Not until its output ends: what is left of a Ray has it open, too.
        try:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
            self.process.wait(LIMIT_S)
        finally:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()


def child_of(pid, name):
    """The process of a name that another has started."""
    for each in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            after_name = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
            if int(after_name[1]) == pid and name in Path(f"/proc/{each}/cmdline").read_text():
                return int(each)
    raise AssertionError(f"{pid} has started no {name}")


@pytest.mark.parametrize("lost", ["the process that has started Ray", "Ray's head"])
def test_a_store_in_a_folder_is_created_again_when_its_ray_has_ended(lost, tmp_path):
    with Job(tmp_path / "store") as job:
        for _ in range(5):
            job.push()
        if lost == "Ray's head":
            os.kill(child_of(job.process.pid, "gcs_server"), signal.SIGKILL)
            # Pushes and pulls go on, until Ray ends every process of the cluster.
            job.push()
            job.process.wait(LIMIT_S)
            assert job.process.returncode != 0
        else:
            job.process.kill()
            job.process.wait()
        value = job.value
    assert value == 5 + (lost == "Ray's head")
    with tensorkv.create("dist_async", name="again", path=tmp_path / "store") as again:
        assert again.pull("n").tolist() == [value] * 3
        again.push("n", np.ones(3, np.float32))
        assert again.pull("n").tolist() == [value + 1] * 3


def test_a_damaged_folder_is_named_when_the_store_is_created(tmp_path):
    with tensorkv.create("dist_async", name="damaged", path=tmp_path / "store") as kv:
        for key in ("a", "b", "c"):
            kv.init(key, np.ones(64))
    (log,) = [each for each in (tmp_path / "store" / "server-0").iterdir() if each.name.startswith("log-")]
    data = bytearray(log.read_bytes())
    data[200] ^= 1
    log.write_bytes(data)
    with pytest.raises(tensorkv.StorageError, match=rf"{log.name}.*record"):
        tensorkv.create("dist_async", name="damaged", path=tmp_path / "store")
