"""The contract, run by every worker of a team: rank 0 pushes what a test says, the others push nothing to it.

Not collected by itself: ``test_engines_dist`` starts it in each worker of a team.
"""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tensorkv import Rows, TensorKVError, TensorSlice
from tensorkv.arrays.slices import join_slices, take_slice
from tensorkv.testing import Contract

RANK = int(os.environ.get("RANK", "0"))


def nothing(value):
    """The same form with nothing in it: adding it changes no bit."""
    if isinstance(value, Rows):
        return Rows(value.ids, nothing(value.values), value.num_rows, init=value.init)
    if isinstance(value, TensorSlice):
        return TensorSlice(value.array[:0], [0] * len(value.offsets), value.global_shape)
    if isinstance(value, dict):
        return {key: nothing(each) for key, each in value.items()}
    if isinstance(value, list) and value and all(isinstance(each, TensorSlice) for each in value):
        try:
            join_slices("push", list(map(take_slice, value)))
        except TensorKVError:
            # What cannot be pushed is refused on every rank.
            return value
    if isinstance(value, list | tuple):
        return type(value)([nothing(each) for each in value])
    if isinstance(value, torch.Tensor):
        return _torch_nothing(value)
    if type(value) in (np.ndarray, np.float64, np.float32) and value.dtype.kind in "biufcV":
        zero = 0 if value.dtype.kind in "biu" else -0.0  # ml_dtypes' bfloat16 is "V"
        return np.full_like(value, zero) if isinstance(value, np.ndarray) else type(value)(zero)
    if type(value).__module__.startswith("jax") and hasattr(value, "dtype") and not value.is_deleted():
        return value * 0 if value.dtype != bool else value & False
    return value


def _torch_nothing(value):
    if value.is_meta or value.is_quantized or value.is_nested or value.dtype is torch.float8_e8m0fnu:
        return value
    if value.layout is not torch.strided:
        return value * 0
    with torch.no_grad():
        made = value.detach().clone()
        return made.fill_(-0.0 if made.is_floating_point() or made.is_complex() else 0)


def quiet(method):
    def call(key, value=None, *args, **kwargs):
        if isinstance(key, dict):
            return method(nothing(key), value, *args, **kwargs)
        if isinstance(key, list) and isinstance(value, list):
            return method(key, [nothing(each) for each in value], *args, **kwargs)
        return method(key, nothing(value), *args, **kwargs)

    return call


class TestDist(Contract):
    TYPE = "dist_sync"
    RUNS_UPDATERS = RANK == 0
    SLICES_TOGETHER = True
    PLACE = (RANK, int(os.environ.get("WORLD_SIZE", "1")))

    @pytest.fixture
    def tmp_path(self, request, tmp_path):
        """A folder that all workers see."""
        shared = os.environ.get("TENSORKV_TEST_FOLDER")
        if not shared:
            return tmp_path
        folder = Path(shared) / re.sub(r"\W", "_", request.node.nodeid)
        folder.mkdir(exist_ok=True)
        return folder

    def create(self, **options):
        store = super().create(**options)
        if RANK:
            store.push, store.pushpull = quiet(store.push), quiet(store.pushpull)
        return store


class TestGloo(TestDist):
    """Without shared memory: through Gloo alone."""

    OPTIONS = {"shared_memory": False}
