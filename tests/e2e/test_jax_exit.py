"""A process that has given values to JAX ends with status 0, whatever JAX still does with them."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from tensorkv.arrays import interop
from tests.support.amount import amount

# Python's main thread keeps the lock while it ends, so that XLA's threads come too late for it.
PROGRAM = """
import os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=3"
import jax, jax.numpy as jnp, numpy as np, tensorkv
sys.setswitchinterval(100)
like = jax.device_put(jnp.zeros(1), jax.devices()[2])
kv = tensorkv.create("local")
kv.init("w", np.ones(2_000_000, np.float32))
kv.pull("w", like=like)
"""


def test_a_process_that_used_jax_ends_well():
    pytest.importorskip("jax")
    for _ in range(amount(1, 3)):
        ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
        assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex64])
def test_what_jax_gets_is_held_by_numpy(dtype, monkeypatch):
    """What torch's DLPack gives out is let go of with Python's lock, in whatever thread."""
    jax = pytest.importorskip("jax")
    monkeypatch.setattr(torch.Tensor, "__dlpack__", None)
    for origin in (interop.Origin("jax"), interop.origin(jax.device_put(np.ones(1), jax.devices()[-1]))):
        given = interop.give(torch.ones(3, dtype=dtype), origin)
        assert isinstance(given, jax.Array)
        assert (given.dtype.name, given.tolist()) == (str(dtype).removeprefix("torch."), [1, 1, 1])
        assert origin.device in (None, given.sharding)


def test_another_library_gets_a_copy():
    asked = {}

    class Namespace:
        def asarray(self, array, copy):
            asked.update(array=array, copy=copy)
            return array

    given = interop.give(torch.ones(2), interop.Origin("array-api", Namespace()))
    assert given is asked["array"]
    assert type(given) is np.ndarray
    assert asked["copy"]
