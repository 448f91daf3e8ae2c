"""Arrays go in and out without a copy where that is possible."""

import array as stdlib_array
from collections import deque

import numpy as np
import pytest
import torch
from torch import nn

import tensorkv
from tensorkv.arrays import interop
from tensorkv.errors import ArrayTypeError


class Series:
    """An array-like object, such as those of pandas."""

    def __array__(self, dtype=None, copy=None):
        return np.zeros(2)


@pytest.mark.parametrize("dtype", sorted(map(interop.dtype_name, interop.DTYPES)))
def test_numpy_shares_memory_both_ways(dtype):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    array = np.ones((2, 3), getattr(ml_dtypes, dtype, dtype))
    tensor = interop.take(array)
    assert tensor.data_ptr() == array.ctypes.data
    assert interop.dtype_name(tensor.dtype) == dtype
    back = interop.give(tensor, interop.NUMPY)
    assert back.ctypes.data == array.ctypes.data
    assert back.dtype == array.dtype


def test_read_only_numpy_shares_memory_without_a_warning():
    array = np.ones(3)
    array.flags.writeable = False
    assert interop.take(array).data_ptr() == array.ctypes.data


def test_torch_shares_memory():
    tensor = torch.ones(3, requires_grad=True)
    taken = interop.take(tensor)
    assert taken.data_ptr() == tensor.data_ptr()
    assert not taken.requires_grad
    assert interop.give(taken, interop.origin(tensor)) is taken


def test_jax_shares_memory_on_the_cpu():
    jnp = pytest.importorskip("jax.numpy")
    array = jnp.arange(4.0)
    assert interop.take(array).data_ptr() == array.unsafe_buffer_pointer()
    fresh = torch.arange(64.0)
    given = interop.give(fresh, interop.origin(array))
    assert given.unsafe_buffer_pointer() == fresh.data_ptr()


def test_views_of_jax_share_its_memory_and_hold_it():
    jax = pytest.importorskip("jax")
    array, other = jax.numpy.arange(4.0), np.ones(2)
    view = interop.jax_views(array)
    assert view.ctypes.data == array.unsafe_buffer_pointer()
    assert not view.flags.writeable
    nested = [(array, other), [other]]
    (first, same), [again] = interop.jax_views(nested)
    assert (first.ctypes.data, same, again) == (view.ctypes.data, other, other)
    untouched = [[other], (torch.ones(2), None, {"a": array})]
    assert interop.jax_views(untouched) is untouched
    array.delete()
    assert view.tolist() == [0, 1, 2, 3]


def test_a_view_of_jax_waits_for_the_result():
    jax = pytest.importorskip("jax")
    x = jax.jit(lambda x: x @ x)(jax.numpy.ones((500, 500)))
    view = interop.jax_views(x)
    assert x.is_ready()
    assert np.array_equal(view, np.asarray(x))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8", "bool", "complex64", "uint32"])
def test_jax_dtypes(dtype):
    jnp = pytest.importorskip("jax.numpy")
    array = jnp.array([1, 0, 1], dtype)
    tensor = interop.take(array)
    assert interop.dtype_name(tensor.dtype) == dtype
    back = interop.give(tensor.clone(), interop.origin(array))
    assert back.dtype == array.dtype
    assert (back == array).all()


def test_jax_arrays_without_numbers_are_refused():
    jax = pytest.importorskip("jax")
    with pytest.raises(ArrayTypeError, match="traced"):
        jax.jit(lambda x: interop.take(x))(jax.numpy.ones(2))
    gone = jax.numpy.ones(2)
    gone.delete()
    with pytest.raises(ArrayTypeError, match="deleted"):
        interop.take(gone)
    with pytest.raises(ArrayTypeError):
        interop.take(jax.random.key(0))


def test_a_jax_array_over_several_devices():
    jax = pytest.importorskip("jax")
    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    array = jax.device_put(jax.numpy.arange(6.0), sharding)
    assert len(array.devices()) == 3
    assert interop.take(array).tolist() == [0, 1, 2, 3, 4, 5]
    assert interop.give(torch.arange(6.0), interop.origin(array)).sharding == sharding


def test_numpy_bfloat16():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    array = np.array([1.5, 2.0], ml_dtypes.bfloat16)
    tensor = interop.take(array)
    assert tensor.dtype is torch.bfloat16
    assert tensor.tolist() == [1.5, 2]
    given = interop.give(tensor, interop.origin(array))
    assert given.dtype == array.dtype
    out = np.zeros(4, ml_dtypes.bfloat16)[::-2]
    written, finish = interop.target(out)
    written.copy_(tensor)
    if finish:
        finish()
    assert out.tolist() == [1.5, 2]


def test_numpy_bfloat16_without_ml_dtypes(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ml_dtypes", None)
    with pytest.raises(ArrayTypeError, match="ml_dtypes"):
        interop.give(torch.ones(1, dtype=torch.bfloat16), interop.NUMPY)


class Foreign:
    """An array of a library that only speaks DLPack."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_anything_that_speaks_dlpack():
    array = np.arange(3.0)
    foreign = Foreign(array)
    tensor = interop.take(foreign)
    assert tensor.data_ptr() == array.ctypes.data
    assert interop.origin(foreign) == interop.Origin("torch")
    written, _ = interop.target(foreign)
    written.fill_(7)
    assert array.tolist() == [7, 7, 7]


def test_a_library_of_the_array_api_gets_its_own_arrays_back():
    class Namespaced(Foreign):
        def __array_namespace__(self):
            return np

    given = interop.give(torch.ones(2), interop.origin(Namespaced(np.ones(2))))
    assert type(given) is np.ndarray


def test_dlpack_that_fails_is_a_typed_error():
    class Broken(Foreign):
        def __dlpack__(self, **options):
            raise BufferError("no")

    with pytest.raises(ArrayTypeError, match="no"):
        interop.take(Broken(np.ones(1)))


def test_a_tensor_subclass_without_numbers_of_its_own():
    class Wrapper(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            raise AssertionError

    wrapped = torch.Tensor._make_wrapper_subclass(Wrapper, (2,))
    with pytest.raises(ArrayTypeError, match="Wrapper"):
        interop.take(wrapped)

    class Plain(torch.Tensor):
        pass

    assert interop.take(torch.ones(2).as_subclass(Plain)).tolist() == [1, 1]


def test_lazy_views_are_read_and_refused_as_outs():
    conjugate = torch.tensor([1 + 2j]).conj()
    assert interop.take(conjugate).tolist() == [1 - 2j]
    with pytest.raises(ArrayTypeError, match="conjugated"):
        interop.target(conjugate)
    with pytest.raises(ArrayTypeError, match="negated"):
        interop.target(conjugate.imag)


def test_which_dtypes_may_be_pushed_and_pulled():
    for dtype in interop.DTYPES:
        assert interop.may_push(dtype, dtype)
        assert interop.may_pull(dtype, dtype)
        for other in interop.DTYPES:
            if interop.may_push(dtype, other):
                assert interop.family(dtype) == interop.family(other)
                # Float8 is cast to nothing without a scale, but it is a part of wider sums.
                assert interop.may_pull(dtype, other) or (dtype in interop.FLOAT8 and other not in interop.FLOAT8)
            if interop.family(dtype) == interop.family(other) == "int" and interop.may_push(dtype, other):
                assert torch.iinfo(dtype).min >= torch.iinfo(other).min
                assert torch.iinfo(dtype).max <= torch.iinfo(other).max


def test_overlap_is_found_by_elements():
    base = torch.zeros(10, 10)
    apart = [base[:5], base[5:], torch.zeros(3)]
    assert interop.overlapping(apart) is None
    assert interop.overlapping([base[:, ::2], base[:, 1::2]]) is None
    assert interop.overlapping([base[:6], torch.zeros(3), base[5:]]) == (0, 2)
    assert interop.overlapping([base, base[2, 2:4], base[9, 9:]]) == (0, 1)
    array = np.zeros(10)
    assert interop.overlapping([array[::-1], torch.from_numpy(array)[3:4]]) == (0, 1)
    assert interop.overlapping([torch.zeros(0), torch.zeros(0)]) is None


class OnDevice(torch.Tensor):
    """Memory of the CPU that says that it is of a GPU."""

    device = torch.device("cuda", 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.bfloat16, torch.float8_e4m3fn, torch.complex128])
@pytest.mark.parametrize("kind", [torch.Tensor, OnDevice])
def test_overlap_is_found_by_elements_on_every_device(kind, dtype):
    base = torch.zeros(4, 12, dtype=dtype).as_subclass(kind)
    assert interop.overlapping(list(base.chunk(3, dim=1))) is None
    assert interop.overlapping([base[:, ::2], base[:, 1::2], base[:0]]) is None
    assert interop.overlapping([base[:, ::2], base[:, 1:4]]) == (0, 1)
    assert interop.overlapping([base[:, :5], base[:, 4:]]) == (0, 1)
    assert interop.overlapping([base[:, :2], torch.zeros(4, dtype=dtype), base[3, 1:]]) == (0, 2)


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (None, "is None, not an array; leave out keys that have no array, such as parameters without a gradient"),
        (3.0, r"is 3.0, not an array; wrap numbers with numpy.asarray\(x, dtype\)"),
        (object(), "is an object, not an array"),
        (Series(), r"is a Series, not an array; give numpy.asarray\(x\)"),
        (Series, "is the class Series, not an array"),
        (stdlib_array.array("f", [1.0]), r"is array.*, not an array; give numpy.asarray\(x\)"),
        (deque([1.0]), r"is deque\(\[1.0\]\), not an array; give numpy.asarray\(x\)"),
        (nn.LazyLinear(2).weight, "is a parameter of a lazy module, without a shape yet; run the module once first"),
    ],
)
def test_what_is_not_an_array_is_named_with_a_hint(thing, message):
    with pytest.raises(ArrayTypeError, match=f"^{message}$"):
        interop.take(thing)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap, torch.func.functionalize])
def test_tensors_inside_of_transforms_are_refused(transform):
    """Each verb that takes arrays; nothing has changed."""
    kv = tensorkv.create()
    kv.init("w", np.zeros(2, np.float32))
    calls = (
        lambda x: kv.init("x", x),
        lambda x: kv.push("w", x),
        lambda x: kv.pushpull(["w"], [x]),
        lambda x: kv.pull("w", out=x),
    )
    raised = []

    def function(x):
        for call in calls:
            with pytest.raises(
                tensorkv.ArrayTypeError, match=r"torch.func or torch.vmap transforms; call the store"
            ) as e:
                call(x)
            raised.append(e)
        return x.sum()

    transform(function)(torch.ones(2, 2) if transform is torch.func.vmap else torch.ones(2))
    assert len(raised) == len(calls)
    assert kv.keys() == ["w"]
    assert (kv.pull("w").tolist(), kv.info("w").version) == ([0, 0], 0)


@pytest.mark.parametrize("error", [BufferError("platform: tpu"), RuntimeError("no CUDA"), ValueError("stream")])
def test_jax_arrays_on_devices_that_torch_does_not_have(error, monkeypatch):
    jnp = pytest.importorskip("jax.numpy")
    fired = []

    def refuse(array):
        fired.append(array)
        raise error

    monkeypatch.setattr(torch.utils.dlpack, "from_dlpack", refuse)
    for dtype in ("float32", "bfloat16"):
        assert interop.take(jnp.arange(3, dtype=dtype)).tolist() == [0, 1, 2]
    assert len(fired) == 2


def test_a_random_key_of_jax_is_refused_with_a_hint():
    jax = pytest.importorskip("jax")
    with pytest.raises(ArrayTypeError, match=r"dtype key<.*; of a key store jax\.random\.key_data\(x\)$"):
        interop.take(jax.random.key(0))
