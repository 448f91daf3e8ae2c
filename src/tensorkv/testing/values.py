"""Arrays that the contract uses, and what a store holds."""

import numpy as np
import torch

from tensorkv.shard.optimizers import ROWWISE

F32 = np.float32


def workers_of_a_sum(kv):
    """Return of how many workers a sum has parts; the others of a store push nothing to it."""
    return 1 if kv._engine.joins_workers == "alone" else kv.num_workers


VIEWS = {
    "steps": lambda base: base[::2, ::3],
    "negative steps": lambda base: base[::-2, ::-3],
    "transposed": lambda base: base.T[:6:3, :4:2].T,
    "Fortran order": lambda base: np.asfortranarray(base)[:2, :2],
}

LAYOUTS = {
    "one element without a stride": lambda: np.broadcast_to(F32(3), ())[None],
    "one element of a broadcast tensor": lambda: torch.ones(()).expand(1),
    "0-d": lambda: np.array(2, F32),
    "empty": lambda: np.zeros((0, 3), F32),
    "strided and flipped": lambda: np.arange(12, dtype=F32).reshape(3, 4)[::2, ::-1],
    "broadcast": lambda: np.broadcast_to(F32(3), (4, 5)),
    "Fortran order": lambda: np.asfortranarray(np.arange(6, dtype=F32).reshape(2, 3)),
    "big-endian": lambda: np.arange(6, dtype=">f4"),
    "NumPy scalar": lambda: np.float64(3),
    "transposed": lambda: torch.arange(6.0).reshape(2, 3).t(),
    "expanded": lambda: torch.ones(1, 3).expand(2, 3),
    "requires grad": lambda: torch.ones(3, requires_grad=True),
    "parameter": lambda: torch.nn.Parameter(torch.ones(3)),
    "conjugated": lambda: torch.arange(3).to(torch.complex64).conj(),
    "0-d bool": lambda: torch.ones((), dtype=torch.bool),
}
NO_ARRAYS = {
    "none": lambda: None,
    "text": lambda: "text",
    "int": lambda: 3,
    "float": lambda: 2.5,
    "list": lambda: [1.0, 2.0],
    "array of str": lambda: np.array(["a"]),
    "array of objects": lambda: np.array([object()]),
    "datetime": lambda: np.array([1], "datetime64[s]"),
    "masked": lambda: np.ma.masked_array([1.0], [True]),
    "structured": lambda: np.array([(1, 2.0)], "i4,f4"),
    "longdouble": lambda: np.array([1], np.longdouble),
    "meta": lambda: torch.empty(2, device="meta"),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged),
    "csr": lambda: torch.ones(2, 2).to_sparse_csr(),
    "coo with two sparse dimensions": lambda: torch.ones(2, 2).to_sparse(2),
    "float8 without a sign": lambda: torch.ones(2).to(torch.float8_e8m0fnu),
    "a class": lambda: np.ndarray,
    "object": lambda: object(),
}

# How a table starts, and the bits of its rows 0, 7 and 10**12 - 1, of five columns: docs/semantics.md has the steps.
FIRST_ROWS = {
    "normal": (
        "normal",
        {"std": 0.1, "seed": 5},
        torch.float32,
        "5aab9fbc5b70b5bd0ed5283eeb92a1bdd8e38ebc4131493db101643dbcf876bd093a05befd18ca3b669a1cbd2c2554bde610"
        "a8bc3929313da4c7d5bd",
    ),
    "uniform": (
        "uniform",
        {"a": -1, "b": 3, "seed": 5},
        torch.float32,
        "1f2271bf589e204044952d402e8c733ed782b43fd72cf4be9c7a1f3fa8dace3f002d6bbfb7ca074050a107bc03ba013f82d6"
        "35bf193b3f4039270ebf",
    ),
    "float64": (
        "normal",
        {"mean": 2.0},
        torch.float64,
        "184d98cae92ad8bf68c171f3f8f5c33fdd2f9e3c139bf93f2801ade66ef9f73fc1c1e0cdaf460540919737ade41106408831"
        "eec8d1600840360f73d3610bfa3fd5e0b0cd45c80940f2c4d1e2e564ff3f9120e3052ce9054010b2bddd8869054039265a50"
        "9436f53f2051d1dde9b40e40007d2fa1ea660740",
    ),
    "bfloat16": (
        "normal",
        {},
        torch.bfloat16,
        "29401bbffa3fa4bef53e833d2f3e0cc036bf1b3f7e3fa53f97be513e3640",
    ),
    "a number": (
        0.25,
        {},
        torch.float16,
        "003400340034003400340034003400340034003400340034003400340034",
    ),
}


DTYPES = [
    torch.bool,
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.complex64, torch.complex128),
]
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def kind_of(dtype):
    """Return the kind of number of a dtype, within which a pull may round."""
    if dtype.is_complex:
        return "complex"
    return "float" if dtype.is_floating_point else "bool" if dtype is torch.bool else "integer"


def extremes(dtype):
    """Return four numbers of a dtype, not all of which a dtype can hold that does not hold every number of it."""
    if kind_of(dtype) == "bool":
        return torch.tensor([False, True, True, False])
    if kind_of(dtype) == "integer":
        info = torch.iinfo(dtype)
        return torch.tensor([info.min, info.max, info.max - 1, 1], dtype=dtype)
    info = torch.finfo(dtype)
    reals = torch.tensor([-info.max, info.tiny, 1 + info.eps, 0.5], dtype=torch.float64)
    return (torch.complex(reals, reals.flip(0)) if dtype.is_complex else reals).to(dtype)


def can_hold(out, dtype):
    """Return whether one dtype can hold every number of another."""
    value = extremes(dtype)
    if dtype.is_complex and not out.is_complex:
        return False
    return _exact(value.to(out)) == _exact(value)


def _exact(tensor):
    """Return the numbers of a tensor, which Python compares exactly whatever their types are."""
    if tensor.is_complex():
        return tensor.to(torch.complex128).tolist()
    return (tensor.double() if tensor.is_floating_point() else tensor).tolist()


def raw(tensor):
    """Return the bytes of a tensor."""
    return tensor.contiguous().view(torch.uint8)


def counts_since(before, kv):
    """Return how often a store has refused NaN or Inf, or left them out, since it has told of it before."""
    return {what: count - before["nonfinite"][what] for what, count in kv.stats()["nonfinite"].items()}


def ones(*shape, dtype=F32):
    return np.ones(shape, dtype)


def state(kv, row_ids=None):
    """Return everything that a store holds, as bytes: to see that a failed call changed nothing.

    Args:
        kv: the store.
        row_ids: of tables of more than 100,000 rows, the rows to read; other tables are read as a whole.
    """
    held = {}
    for key in kv.keys():
        info = kv.info(key)
        if info.kind == "rows":
            is_small = info.shape[0] <= 100_000
            assert is_small or row_ids is not None, "a table that is too large to be read as a whole"
            seen = kv.row_sparse_pull(key, row_ids=np.arange(info.shape[0]) if is_small else row_ids)
            held[key] = (info, np.asarray(seen.values).tobytes())
        else:
            value = torch.empty(info.shape, dtype=getattr(torch, info.dtype))
            kv.pull(key, out=value)
            held[key] = (info, value.flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return held


def check_neighbours(kv, name, shapes, **numbers):
    """Check that each key has the bits that it has when it is pushed alone, whatever is pushed in the same call."""
    dtypes = [torch.bfloat16, torch.float32, torch.float64, torch.float16]
    dtypes += [torch.complex64] if name in ROWWISE else []
    kinds = [(shape, dtype) for dtype in dtypes for shape in shapes if name != "muon" or len(shape) == 2]
    torch.manual_seed(5)
    first = [torch.randn(shape, dtype=dtype) for shape, dtype in kinds]
    pushed = [[torch.randn(shape, dtype=dtype) * 1e-3 for shape, dtype in kinds] for _ in range(2)]
    keys = [[f"{each}-{index}" for index in range(len(kinds))] for each in ("alone", "together")]
    for own in keys:
        kv.init(own, first)
    kv.set_optimizer(name, **{"lr": 0.01, **numbers})
    for grads in pushed:
        for key, grad in zip(keys[0], grads, strict=True):
            kv.push(key, grad)
        kv.push(keys[1], grads)
    for kind, alone, together in zip(kinds, *map(kv.pull, keys), strict=True):
        torch.testing.assert_close(together, alone, rtol=0, atol=0, equal_nan=True, msg=f"{kind}")
