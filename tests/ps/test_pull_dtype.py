"""`pull_dtype`: values that are rounded for pulls, and nowhere else."""

import numpy as np
import pytest
import torch

import tensorkv
from tests.support.until import LIMIT_S

pytest.importorskip("ray")
pytestmark = pytest.mark.usefixtures("ray_store")

NARROW = {"bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "scalar": torch.float32,
    "large": torch.float32,
}
SHAPES = {"scalar": (), "large": (1200, 1000)}
RULE = {"lr": 0.1, "momentum": 0.9}


def values(seed=0):
    made = torch.Generator().manual_seed(seed)
    return {
        key: torch.randint(-99, 99, (7, 3), generator=made)
        if dtype is torch.int64
        else torch.randn(SHAPES.get(key, (7, 3)), generator=made, dtype=torch.float64).to(dtype)
        for key, dtype in DTYPES.items()
    }


def rounded(value, narrow):
    return value.to(narrow).to(value.dtype) if value.dtype in (torch.float32, torch.float64) else value


@pytest.fixture(params=NARROW)
def narrow(request):
    return request.param


@pytest.fixture(params=["async", "sync"])
def pair(request, narrow, server_pool):
    """A store with `pull_dtype`, and another one without: the same servers, two clients."""
    name = server_pool.name(mode=request.param, num_servers=2)
    with (
        tensorkv.create("dist_async", name=name, pull_dtype=narrow, timeout_s=LIMIT_S) as kv,
        tensorkv.create("dist_async", name=name, timeout_s=LIMIT_S) as reader,
    ):
        yield kv, reader


def check(kv, reader, narrow, key):
    """All forms of a pull have the rounded value, and that of the reader is whole."""
    whole, dtype = reader.pull(key), NARROW[narrow]
    right = rounded(whole, dtype)
    assert torch.equal(kv.pull(key), right), key
    out = torch.empty_like(whole)
    kv.pull(key, out=out)
    assert torch.equal(out, right), key
    assert torch.equal(kv.pull([key])[0], right)
    strided = torch.empty((*whole.shape, 2), dtype=whole.dtype)[..., 0]
    kv.pull([key], out=[strided])
    assert torch.equal(strided, right), key


def test_pulls_have_rounded_values_and_servers_whole_ones(pair, narrow):
    kv, reader = pair
    kv.init(values())
    for key, value in values().items():
        check(kv, reader, narrow, key)
        assert torch.equal(reader.pull(key), value), key


@pytest.mark.parametrize("rule", ["assign", "sgd"])
@pytest.mark.parametrize("compressed", [False, True], ids=["", "compressed"])
def test_pushpulls_of_all_forms(pair, narrow, rule, compressed):
    kv, reader = pair
    floats = {key: value for key, value in values().items() if value.is_floating_point()}
    if compressed:
        del floats["float64"]
    kv.init(floats)
    if rule == "sgd":
        kv.set_optimizer("sgd", **RULE)
    if compressed:
        kv.set_gradient_compression({"type": "fp16"})
    for turn, key in enumerate(floats):
        gradient, dtype = values(turn + 1)[key], NARROW[narrow]
        got = kv.pushpull(key, gradient)
        assert torch.equal(got, rounded(reader.pull(key), dtype)), key
        out = torch.empty_like(got)
        kv.pushpull([key], [gradient], out=[out])
        assert torch.equal(out, rounded(reader.pull(key), dtype)), key
    many = kv.pushpull(floats)
    for key, got in many.items():
        assert torch.equal(got, rounded(reader.pull(key), NARROW[narrow])), key


def test_numpy_and_outs_of_other_dtypes(pair, narrow):
    kv, reader = pair
    whole = np.random.default_rng(3).normal(size=(5, 4)).astype(np.float32)
    kv.init("w", whole)
    right = rounded(torch.from_numpy(whole), NARROW[narrow])
    assert np.array_equal(kv.pull("w"), right.numpy())
    assert np.array_equal(reader.pull("w"), whole)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        out = torch.empty(5, 4, dtype=dtype)
        kv.pull("w", out=out)
        assert torch.equal(out, right.to(dtype)), dtype


def test_jax_outputs(pair, narrow):
    jnp = pytest.importorskip("jax.numpy")
    kv, _ = pair
    whole = values()["float32"]
    kv.init("w", whole)
    assert np.array_equal(kv.pull("w", like=jnp.zeros(1)), rounded(whole, NARROW[narrow]).numpy())


def test_rows_snapshots_and_checkpoints(pair, narrow, tmp_path):
    kv, reader = pair
    dtype = NARROW[narrow]
    table = torch.randn(9, 4)
    kv.init("table", tensorkv.Rows(torch.arange(9), table, 9))
    kv.init("w", values()["float32"])
    ids = torch.tensor([1, 4, 8])
    for store, right in ((kv, rounded(table[ids], dtype)), (reader, table[ids])):
        assert torch.equal(store.row_sparse_pull("table", row_ids=ids).values, right)
        with store.snapshot() as snapshot:
            assert torch.equal(snapshot.row_sparse_pull("table", row_ids=ids).values, right)
            whole = values()["float32"]
            assert torch.equal(snapshot.pull("w"), rounded(whole, dtype) if store is kv else whole)
    kv.save(tmp_path / "checkpoint")
    with tensorkv.create() as local:
        local.load(tmp_path / "checkpoint")
        assert torch.equal(local.pull("w"), values()["float32"])
        assert torch.equal(local.row_sparse_pull("table", row_ids=ids).values, table[ids])


def test_half_of_the_bytes_travel(pair, narrow):
    kv, reader = pair
    # Small enough for the reader to have it in a reply, not to read it in place.
    key, value, nbytes = "w", torch.randn(400, 500), 400 * 500 * 4
    kv.init(key, value)
    first = kv.stats()["server_compression"]
    for store, expected in ((kv, nbytes // 2), (reader, nbytes)):
        before = store.stats()["server_verbs"].get("pull", {"nbytes": 0})["nbytes"]
        store.pull(key)
        assert store.stats()["server_verbs"]["pull"]["nbytes"] - before == expected
    counts = kv.stats()
    told = {"sent_nbytes": 0, "sent_raw_nbytes": 0, "received_nbytes": nbytes // 2, "received_raw_nbytes": nbytes}
    assert counts["compression"] == told
    assert "compression" not in reader.stats()
    # Other tests have used these servers.
    sent = {word: count - first[word] for word, count in counts["server_compression"].items()}
    assert (sent["sent_nbytes"], sent["sent_raw_nbytes"]) == (nbytes // 2, nbytes)
    kv.pushpull(key, value)
    assert kv.stats()["compression"]["received_nbytes"] == nbytes


def test_large_numbers_are_inf_in_fp16_alone(pair, narrow):
    kv, _ = pair
    kv.init("w", np.array([70000.0, 1.0], np.float32))
    assert kv.pull("w").tolist() == [np.inf if narrow == "fp16" else 70144.0, 1.0]


@pytest.mark.parametrize("given", ["float16", "", 3, ["bf16"]])
def test_other_dtypes_are_refused(given):
    with pytest.raises(tensorkv.ArgumentError, match=r"create: pull_dtype is .*; expected one of fp16, bf16"):
        tensorkv.create("dist_async", pull_dtype=given)
