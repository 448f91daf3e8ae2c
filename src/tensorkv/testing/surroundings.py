"""What a caller may have set around a call, and a program that shows whether it changes anything."""

from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

import tensorkv
from tensorkv import Rows


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def strict_numpy():
    with np.errstate(all="raise"), np.printoptions(precision=1, threshold=0):
        yield


SURROUNDINGS = {
    "a device": partial(torch.device, "meta"),
    "the default device": partial(default_device, "meta"),
    "float64": partial(default_dtype, torch.float64),
    "bfloat16": partial(default_dtype, torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "autocast": partial(torch.autocast, "cpu", dtype=torch.bfloat16),
    "deterministic algorithms": deterministic,
    "NumPy's errors and printing": strict_numpy,
}

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.int32, torch.bool]


def _tensor(shape, dtype, seed):
    made = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed), device="cpu") * 3
    return made.to(torch.int32).to(dtype) if dtype in (torch.int32, torch.bool) else made.to(dtype)


def _plain(pulled):
    """Return what was pulled as bytes, so that every bit counts."""
    if isinstance(pulled, list | tuple):
        return [_plain(each) for each in pulled]
    if isinstance(pulled, Rows):
        return [_plain(pulled.ids), _plain(pulled.values)]
    if isinstance(pulled, torch.Tensor):
        assert pulled.device.type == "cpu"
        return _plain((torch.view_as_real(pulled) if pulled.is_complex() else pulled).double().numpy())
    return np.asarray(pulled, order="C").tobytes()


def run(kv, folder, optimizer, around):
    """Use every verb within something that surrounds the calls, then go on without it; return all that was pulled."""
    arrays = [[_tensor((5, 3), dtype, 10 * seed + n) for n, dtype in enumerate(DTYPES)] for seed in range(4)]
    flat = [[_tensor((4,), torch.float16, 100 * seed + n) for n in range(9)] for seed in range(3)]
    large = [_tensor((90_000,), torch.float32, seed) for seed in range(3)]
    ids = torch.tensor([7, 2, 5])
    kinds = [f"{str(dtype).removeprefix('torch.')}" for dtype in DTYPES]
    small = [f"s{n}" for n in range(9)]
    floats = kinds[:5]
    found = []

    def step():
        """Push and pull in every form."""
        kv.push(floats, [list(parts) for parts in zip(*(each[:5] for each in arrays[1:]), strict=True)])
        kv.push("float16", [arrays[2][1].numpy(), arrays[3][1].numpy()])
        for _ in range(4):
            kv.pushpull(small, [list(parts) for parts in zip(flat[1], flat[2], strict=True)], out=outs)
        found.append(_plain(outs))
        kv.pushpull("large", large[1:], out=inference)
        found.append(_plain(inference))
        kv.push("table", Rows(ids, arrays[1][3][:3].float(), 1000))
        kv.push("float64", Rows(ids[1:2], arrays[1][3][1:2], 5))
        kv.pull("float32", out=wide)
        kv.pull("float16", out=swapped)
        kv.pull("float64", out=parameter)
        found.append(_plain([wide, swapped, parameter.detach()]))
        found.append(_plain(kv.row_sparse_pull(["table", "float32"], row_ids=[ids, ids[1:2]])))
        kv.push("empty", _tensor((0, 2), torch.float32, 0))
        found.append(_plain(kv.pull([*kinds, "large", "empty"])))

    outs = [np.zeros(4, np.float16) for _ in small]
    with torch.inference_mode():
        inference = torch.empty(90_000)
    wide, swapped = np.zeros((5, 3)), np.zeros((5, 3), ">f2")
    parameter = torch.nn.Parameter(torch.zeros(5, 3))
    with around():
        kv.init(kinds, arrays[0])
        kv.init([*small, "large"], [*flat[0], large[0]])
        kv.init("table", Rows(ids, arrays[0][0][:3], 1000))
        kv.init("empty", _tensor((0, 2), torch.float32, 0))
        found.append(_plain(kv.broadcast("more", arrays[0][1])))
        kv.push(["int32", "bool"], [arrays[1][5], arrays[1][6]])
        step()
        kv.set_optimizer(optimizer, lr=0.01, rescale_grad=0.5)
        step()
        kv.set_hyperparameters(lr=0.02, keys="float32")
        if folder is not None:
            kv.save(folder / "store")
            kv.load(folder / "store")
            kv.save_optimizer_states(folder / "states")
            kv.load_optimizer_states(folder / "states")
        kv.delete("more")
        step()
        if kv.is_capable("snapshot"):
            with kv.snapshot() as moment:
                moment.pull(kinds)
    step()
    if folder is not None:
        kv.load(folder / "store")
        step()
    return found


@cache
def expected(optimizer, with_folder):
    """Return what ``run`` returns where nothing surrounds the calls."""
    with TemporaryDirectory() as folder, tensorkv.create("local") as kv:
        return run(kv, Path(folder) if with_folder else None, optimizer, partial(torch.enable_grad))
