"""The compiled sum gives torch's bits, whatever is cut where, and everything works without it."""

import threading

import numpy as np
import pytest
import torch

import tensorkv
from tensorkv.arrays import interop
from tensorkv.shard import native
from tensorkv.shard.native import Pass, column_beside, column_of, is_plain

DTYPES = [torch.float32, torch.float64]


@pytest.fixture(autouse=True)
def compiled():
    """The suite is to run with the compiled part; where it could not be built, that is a failure."""
    assert native._native is not None


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(jobs):
    for job in jobs:
        job()


def left_to_right(parts):
    total = parts[0].clone()
    for part in parts[1:]:
        total = total + part
    return total


@pytest.mark.parametrize("past_cache", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 5, 16])
def test_sums_have_torchs_bits(count, dtype, past_cache):
    # Around borders of the kernel's blocks (8 KiB), of vectors, and of cache lines.
    for size in (1, 3, 15, 63, 64, 65, 1023, 1024, 1025, 2047, 2048, 2049, 5000):
        parts = [randn(size + 1, dtype=dtype, seed=i)[1:] for i in range(count)]
        outs = [torch.full((size + 3,), torch.nan, dtype=dtype) for _ in range(2)]
        columns = [column_of([out[i + 1 : i + 1 + size]]) for i, out in enumerate(outs)]
        run(Pass(columns, [column_of([part]) for part in parts], [size], dtype).jobs(1, past_cache=past_cache))
        for i, out in enumerate(outs):
            assert torch.equal(out[i + 1 : i + 1 + size], left_to_right(parts))
            rest = torch.cat([out[: i + 1], out[i + 1 + size :]])
            assert rest.isnan().all(), "wrote beside the out"


@pytest.mark.parametrize("threads", [1, 2, 3, 4, 7])
def test_keys_of_any_size_are_shared_between_threads(threads):
    sizes = [1, 0, 100, 64, 3000, 5, 0, 777]
    parts = [[randn(size, seed=10 * i + k) for k, size in enumerate(sizes)] for i in range(3)]
    outs = [torch.full((size,), torch.nan) for size in sizes]
    jobs = Pass([column_of(outs)], [column_of(column) for column in parts], sizes, torch.float32).jobs(threads)
    assert len(jobs) == threads
    run(jobs[::-1])
    for out, *key_parts in zip(outs, *parts, strict=True):
        assert torch.equal(out, left_to_right(key_parts))


def test_special_numbers_are_torchs():
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45, 3.4e38, 1.0])
    left, right = (grid.flatten().contiguous() for grid in torch.meshgrid(special, special, indexing="ij"))
    out = torch.empty_like(left)
    run(Pass([column_of([out])], [column_of([left]), column_of([right])], [len(left)], torch.float32).jobs(1))
    expected = left + right
    assert torch.equal(out.isnan(), expected.isnan())
    kept = ~out.isnan()
    assert torch.equal(out.view(torch.int32)[kept], expected.view(torch.int32)[kept])


@pytest.mark.parametrize("own", [0, 1, 2])
def test_an_out_may_be_a_part_of_its_key(own):
    parts = [randn(9000, seed=i) for i in range(3)]
    expected = left_to_right(parts)
    value = torch.empty(9000)
    run(
        Pass([column_of([value]), column_of([parts[own]])], [column_of([p]) for p in parts], [9000], value.dtype).jobs(
            1
        )
    )
    assert torch.equal(value, expected)
    assert torch.equal(parts[own], expected)


def test_bad_columns_are_refused():
    four, three, step = bytes(32), bytes(24), (bytes(17 * 8), 1.0, False)
    for dtype, outs, parts, own in (
        (0, [four], [three], None),
        (0, [four], [], None),
        (0, [four] * 200, [four] * 57, None),
        (9, [four], [four], None),
        (0, [], [four], (*step, [])),
        (0, [], [four], (*step, [four] * 5)),
        (0, [], [four], (*step, [three])),
        (0, [], [four], (b"", 1.0, False, [four])),
    ):
        with pytest.raises(ValueError, match="run_columns"):
            native._native.run_columns(dtype, outs, parts, four, 0, 0, 0, own)
    with pytest.raises(TypeError):
        native._native.run_columns(0, [4], [four], four, 0, 0, 0)


@pytest.fixture(params=["learned", "asked"])
def negation(request):
    """How the compiled part finds out that a tensor is lazily negated; without samples it asks torch."""
    if request.param == "asked":
        use = native._native.use
        native._native.use = lambda *args: use(*args[:-2], [], [])
        try:
            assert native._show_libraries()
        finally:
            native._native.use = use
    yield request.param
    assert native._show_libraries()


@pytest.mark.usefixtures("negation")
def test_a_tensor_is_found_negated_whatever_it_was_made_of():
    made = torch.complex(randn(1, 1), randn(1, 1))
    tensors = [made.conj().imag, torch._neg_view(randn(3)), torch.nn.Parameter(torch._neg_view(randn(3, 2)))]
    tensors += [tensor.detach() for tensor in tensors]
    plain = [made.imag, randn(3), torch.nn.Parameter(randn(3, 2)), *(tensor.resolve_neg() for tensor in tensors)]
    changed = randn(3)
    changed.data = tensors[1].detach()
    for tensor in [*tensors, changed, *plain]:
        cell = native.Cell()
        cell.value = torch.zeros(tensor.shape)
        batch = native.look({0: cell}, 0, tensor, None, None, None)
        assert (batch is None) == tensor.is_neg(), tensor


@pytest.mark.usefixtures("negation")
def test_negated_views_are_pushed_as_the_numbers_that_they_show():
    keys = list(range(8))
    parts = [torch.complex(torch.ones(1), torch.full((1,), key + 1.0)).conj().imag for key in keys]
    assert all(part.is_neg() and part.is_contiguous() for part in parts)
    with tensorkv.create("local") as kv:
        kv.init(keys, [torch.zeros(1) for _ in keys])
        for _ in range(4):
            kv.push(keys, parts)
            assert [value.item() for value in kv.pull(keys)] == [-(key + 1.0) for key in keys]


def look_at(values, out=None, shape=(2, 3), dtype=torch.float32):
    """What the compiled part makes of a call of one key."""
    cell = native.Cell()
    cell.value = torch.zeros(shape, dtype=dtype)
    return native.look({0: cell}, 0, values, out, None, None)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int32", "bool"])
def test_arrays_of_jax_are_looked_at_as_buffers(dtype):
    jnp = pytest.importorskip("jax.numpy")
    array = jnp.arange(6).reshape(2, 3).astype(dtype)
    assert interop.is_jax(array)
    tensor = torch.from_numpy(np.array(array))
    for values in (array, [array], (array, tensor), [tensor.numpy(), array]):
        assert look_at(values, dtype=tensor.dtype) is not None
    assert look_at(array, dtype=torch.float64) is None
    assert look_at(array, shape=(3, 2), dtype=tensor.dtype) is None
    assert look_at(array.T, shape=(3, 2), dtype=tensor.dtype) is not None


def test_what_is_no_buffer_is_not_plain():
    jax = pytest.importorskip("jax")
    good, gone = jax.numpy.ones((2, 3)), jax.numpy.ones((2, 3))
    assert interop.is_jax(good)
    gone.delete()
    assert look_at(good) is not None
    for values in (gone, [good, gone], jax.numpy.ones((2, 3), jax.numpy.bfloat16), [good, [good]]):
        assert look_at(values) is None
    # A caller gives no views, and an array of JAX is never written.
    view = memoryview(np.ones((2, 3), np.float32))
    assert look_at(view) is look_at([good, view]) is look_at(good, out=view) is look_at(good, out=good) is None
    with tensorkv.create("local") as kv:
        kv.init("w", np.zeros((2, 3), np.float32))
        with pytest.raises(tensorkv.ArrayTypeError):
            kv.push("w", [good, view])


def test_an_array_of_jax_is_let_go_of_after_the_call():
    """JAX deletes a donated array only if nobody looks at it."""
    jax = pytest.importorskip("jax")
    double = jax.jit(lambda x: 2 * x, donate_argnums=0)
    with tensorkv.create("local") as kv:
        kv.init(["a", "b"], [np.zeros(1000, np.float32)] * 2)
        arrays = [jax.numpy.full(1000, 3.0), jax.numpy.full(1000, 4.0)]
        for _ in range(3):
            kv.push(["a", "b"], arrays)
            before, arrays = arrays, [double(each) for each in arrays]
            assert [each.is_deleted() for each in before] == [True, True]
        assert [value[0] for value in kv.pull(["a", "b"])] == [12, 16]


def test_lists_of_jax_that_become_shorter_while_they_are_looked_at_do_no_harm():
    """To look at a result that is still being computed lets other threads run."""
    jax = pytest.importorskip("jax")
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 30, lambda _, y: y @ y / 300, x))
    assert interop.is_jax(jax.numpy.ones(1))
    looked = 0
    for _ in range(20):
        values = [slow(jax.numpy.ones((300, 300))) for _ in range(3)]
        shortener = threading.Timer(0.002, values.clear)
        shortener.start()
        cells = {key: native.Cell() for key in range(3)}
        for cell in cells.values():
            cell.value = torch.zeros(300, 300)
        looked += native.look(cells, [0, 1, 2], values, None, None, None) is None
        shortener.join()
    assert looked, "no list became shorter in time"


def test_column_beside():
    flat = torch.zeros(10)
    assert column_beside(flat, [3, 2, 5]) == column_of([flat[:3], flat[3:5], flat[5:]])


def test_plain():
    assert is_plain([torch.zeros(3), torch.zeros(3)])
    assert not is_plain([torch.zeros(3), torch.zeros(3, dtype=torch.float64)])
    assert not is_plain([torch.zeros(3, 2).T])
    assert is_plain([torch.zeros(3, dtype=torch.int32)])
    assert not is_plain([torch.zeros(3, dtype=torch.complex64)])
    assert not is_plain([torch.from_numpy(np.zeros(7, np.uint8)[1:].view(np.float16))]), "not aligned"
    assert not is_plain([torch.zeros(3, device="meta")])
    assert not is_plain([torch.zeros(1)] * 257)


@pytest.mark.parametrize("optimizer", [None, "sgd", "adam"])
@pytest.mark.parametrize(("keys", "size"), [(1, 200_000), (20, 100), (12, 30_000)])
def test_without_the_compiled_part_the_bits_are_the_same(keys, size, optimizer, monkeypatch):
    def train():
        kv = tensorkv.create("local", threads=2)
        kv.init(list(range(keys)), [randn(size, seed=i).numpy() for i in range(keys)])
        if optimizer:
            kv.set_optimizer(optimizer, lr=0.1)
        outs = [np.zeros(size, np.float32) for _ in range(keys)]
        for turn in range(5):
            parts = [[randn(size, seed=100 * turn + 10 * i + k).numpy() for i in range(3)] for k in range(keys)]
            kv.pushpull(list(range(keys)), parts, out=outs)
        return outs

    compiled = train()
    monkeypatch.setattr(native, "_native", None)
    assert all(map(np.array_equal, compiled, train()))
