"""Arrays of any library in and out: NumPy, PyTorch, JAX, CuPy and whatever speaks DLPack.

Inside the store there are only torch tensors. ``take`` turns a caller's array into a tensor that
shares its memory; ``target`` does the same for an array to be filled; ``give`` turns a tensor that
nothing else refers to into an array of the caller's library. This is the only file that imports JAX or CuPy,
and it does so only when the caller already has.
"""

from __future__ import annotations

import array as stdlib_array
import operator
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack

from tensorkv.errors import ArgumentError, ArrayTypeError, show
from tensorkv.runtime import _compat
from tensorkv.runtime.modes import outside_modes

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
LOW_PRECISION = (torch.float16, torch.bfloat16, *FLOAT8)
COMPLEX = (torch.complex64, torch.complex128)
SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
UNSIGNED = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)
DTYPES = frozenset((torch.bool, *SIGNED, *UNSIGNED, *FLOATS, *FLOAT8, *COMPLEX))

# How hard numpy.shares_memory may search for a common byte before two arrays count as overlapping.
_OVERLAP_WORK = 100_000
_PLAIN_TORCH = (torch.Tensor, torch.nn.Parameter)
# What NumPy has only with the package ml_dtypes, and dtypes of the same size that it has.
_ML_DTYPES = {torch.bfloat16: torch.int16, **dict.fromkeys(FLOAT8, torch.int8)}
_NUMPY_DTYPES = {dtype: np.dtype(str(dtype).removeprefix("torch.")) for dtype in DTYPES - _ML_DTYPES.keys()}


@dataclass(frozen=True, slots=True)
class Origin:
    """Which library an array came from, and the device it was on (None: the library's default)."""

    library: str
    device: Any = None

    def for_parts(self) -> Origin:
        """Return what makes arrays of other shapes: JAX's sharding of a value does not divide its parts."""
        if self.library != "jax" or self.device is None or _is_on_one_device(self.device):
            return self
        return Origin("jax")


NUMPY = Origin("numpy")


@lru_cache
def dtype_name(dtype: torch.dtype) -> str:
    """Return ``"float32"`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def take_dtype(verb: str, dtype: Any, known: Sequence[torch.dtype]) -> torch.dtype:
    """Return a dtype that is given as such, of torch or NumPy, or by its name.

    Raises:
        ArgumentError: none of those known.

    >>> take_dtype("init_tree", "float16", FLOATS), take_dtype("init_tree", np.float16, FLOATS)
    (torch.float16, torch.float16)
    """
    wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if isinstance(wanted, type) and issubclass(wanted, np.generic):
        wanted = _BY_NAME.get(wanted.__name__)
    elif not hasattr(wanted, "shape") and isinstance(of_numpy := getattr(wanted, "dtype", None), np.dtype):
        # JAX's own, such as jax.numpy.bfloat16.
        wanted = _BY_NAME.get(of_numpy.name)
    elif isinstance(wanted, np.dtype):
        wanted = _BY_NAME.get(wanted.name)
    if not isinstance(wanted, torch.dtype) or wanted not in known:
        names = ", ".join(sorted(map(dtype_name, known)))
        raise ArgumentError(f"{verb}: dtype is {show(dtype)}; expected one of {names}")
    return wanted


def family(dtype: torch.dtype) -> str:
    """Return the dtype's family: ``"bool"``, ``"int"``, ``"float"`` or ``"complex"``."""
    if dtype.is_floating_point:
        return "float"
    if dtype.is_complex:
        return "complex"
    return "bool" if dtype is torch.bool else "int"


def may_push(part: torch.dtype, value: torch.dtype) -> bool:
    """Return whether a part of one dtype may be summed into a value of another without silent loss."""
    if part is value:
        return True
    if family(part) != family(value) or value in FLOAT8:
        return False
    low = (*LOW_PRECISION, torch.float32)
    return (part in low and value in low) or _is_safe(part, value)


def may_pull(value: torch.dtype, out: torch.dtype) -> bool:
    """Return whether a value may be cast to ``out``'s dtype: the same family, or a safe cast.

    Float8 is cast to nothing, and nothing to it: most such numbers mean nothing without the scale of their block.
    """
    if value in FLOAT8 or out in FLOAT8:
        return value is out
    return family(value) == family(out) or _is_safe(value, out)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that sums of values of a dtype are made in: at least float32 for floats."""
    return torch.float32 if dtype in LOW_PRECISION else dtype


_SIGNED_TWIN = {
    torch.uint16: torch.int16,
    torch.uint32: torch.int32,
    torch.uint64: torch.int64,
    **dict.fromkeys(FLOAT8, torch.int8),
}


def signed(tensor: torch.Tensor) -> torch.Tensor:
    """View as signed integers what torch cannot index; the sums of those that are integers have the same bits."""
    twin = _SIGNED_TWIN.get(tensor.dtype)
    return tensor if twin is None else tensor.view(twin)


def divide(total: torch.Tensor, divisor: int) -> None:
    """Divide a sum of floating-point or complex numbers in place, each number by one division."""
    real = torch.view_as_real(total) if total.is_complex() else total
    # A number, or a tensor of one on the CPU, would make torch multiply by its reciprocal on CUDA.
    real.div_(torch.full((), divisor, dtype=real.dtype, device=real.device))


def _is_safe(source: torch.dtype, target: torch.dtype) -> bool:
    if source in FLOAT8:
        return target in (*FLOATS, *COMPLEX)
    if source in _ML_DTYPES or target in _ML_DTYPES:
        # bfloat16 has eight significant bits.
        return source in (torch.bool, torch.int8, torch.uint8) or (
            source is torch.bfloat16 and target in (*FLOATS[2:], *COMPLEX)
        )
    if source in (torch.int64, torch.uint64) and (target.is_floating_point or target.is_complex):
        # NumPy calls these casts safe, though float64 holds integers up to 2^53 alone.
        return False
    return bool(np.can_cast(_NUMPY_DTYPES[source], _NUMPY_DTYPES[target], "safe"))


# ---------------------------------------------------------------- in


def take(array: Any) -> torch.Tensor:
    """Return a strided tensor that shares the array's memory where its layout allows.

    Args:
        array: an array of NumPy, PyTorch, JAX, CuPy or any library with ``__dlpack__``; any shape.

    Returns:
        A tensor for reading only: the memory belongs to the caller.

    Raises:
        ArrayTypeError: not an array, or one without plain numbers in memory (meta, quantized,
            nested, sparse, object, str, masked).

    >>> take(np.arange(3)).tolist()
    [0, 1, 2]
    """
    kind = type(array)
    if kind is np.ndarray and array.flags.writeable:
        try:
            return torch.from_numpy(array)
        except (TypeError, ValueError):
            return _take_numpy(array)
    if kind in _PLAIN_TORCH:
        return _take_torch(array)
    if isinstance(array, np.ndarray | np.generic):
        return _take_numpy(array)
    if isinstance(array, torch.Tensor):
        return _take_torch(array)
    return _take_dlpack(array)


def is_dense(array: Any) -> bool:
    """Tell whether an array is of NumPy or dense and of torch, and of no subclass: neither a slice nor rows."""
    kind = type(array)
    return kind is np.ndarray or (kind in _PLAIN_TORCH and array.layout is torch.strided)


def clean(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor whose bools have the bytes 0 and 1, as a store keeps them; the same one if they do.

    NumPy and torch take every other byte for true as well: a mask of 0 and 255 that is viewed as bool, for example.
    """
    if tensor.dtype is not torch.bool:
        return tensor
    numbers = tensor.view(torch.uint8)
    return numbers != 0 if bool((numbers > 1).any()) else tensor


def _take_torch(array: torch.Tensor) -> torch.Tensor:
    if type(array) not in _PLAIN_TORCH:
        if torch.nn.parameter.is_lazy(array):
            raise ArrayTypeError("is a parameter of a lazy module, without a shape yet; run the module once first")
        if _dispatches(array):
            raise ArrayTypeError(
                f"is a {type(array).__name__}, a tensor that keeps no plain numbers of its own; "
                "give a plain torch.Tensor (a DTensor's local one is .to_local())"
            )
    if array.layout is not torch.strided:
        raise ArrayTypeError(
            f"is a torch tensor of layout {array.layout}; give a dense tensor, Rows, "
            "or a sparse COO tensor with one sparse dimension"
        )
    if _compat.is_inside_transform(array):
        raise ArrayTypeError(
            "is a tensor inside of a function that torch.func or torch.vmap transforms; call the store outside of it"
        )
    if array.is_meta or array.is_quantized or array.is_nested:
        kind = "meta" if array.is_meta else "quantized" if array.is_quantized else "nested"
        raise ArrayTypeError(f"is a {kind} tensor; give a dense tensor with numbers in memory")
    if array.dtype not in DTYPES:
        raise ArrayTypeError(_bad_dtype(dtype_name(array.dtype)))
    if array.requires_grad:
        array = array.detach()
    if array.is_conj() or array.is_neg():
        array = array.resolve_conj().resolve_neg()
    return array


def _dispatches(array: torch.Tensor) -> bool:
    return type(array).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__


def _take_numpy(array: Any) -> torch.Tensor:
    if isinstance(array, np.ma.MaskedArray):
        raise ArrayTypeError("is a masked array, whose mask a store cannot keep; fill it first: x.filled(0)")
    array = np.asarray(array)
    dtype = _BY_NAME.get(array.dtype.name)
    if dtype in _ML_DTYPES:
        return _take_numpy(array.view(_NUMPY_DTYPES[_ML_DTYPES[dtype]])).view(dtype)
    if array.dtype.newbyteorder("=") not in _NUMPY_DTYPES.values():
        raise ArrayTypeError(_bad_dtype(array.dtype.name))
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if any(step < 0 or step % array.itemsize for step in array.strides):
        array = array.copy()
    if not array.flags.writeable:
        array = np.asarray(_Writable(array))
    return torch.from_numpy(array)


class _Writable:
    """Show a read-only array as a writable one: torch warns about read-only ones, and it is not written."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        interface = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface
        self._keep_alive = array


def _take_dlpack(array: Any) -> torch.Tensor:
    if is_jax(array):
        return _take_jax(array)
    if isinstance(array, type) or not hasattr(array, "__dlpack__"):
        hint = ""
        if array is None:
            hint = "; leave out keys that have no array, such as parameters without a gradient"
        elif isinstance(array, int | float | complex | list | tuple):
            hint = "; wrap numbers with numpy.asarray(x, dtype)"
        elif _is_array_like(array):
            hint = "; give numpy.asarray(x)"
        raise ArrayTypeError(f"is {show(array)}, not an array{hint}")
    try:
        tensor = torch.utils.dlpack.from_dlpack(array)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise ArrayTypeError(f"is {show(array)} that DLPack cannot pass on: {error}") from error
    return _take_torch(tensor)


def _is_array_like(thing: Any) -> bool:
    """Return whether NumPy can convert something that is not an array to one."""
    if isinstance(thing, type):
        return False
    return hasattr(thing, "__array__") or isinstance(thing, memoryview | stdlib_array.array | deque)


def _take_jax(array: Any) -> torch.Tensor:
    jax = sys.modules["jax"]
    if isinstance(array, jax.core.Tracer):
        raise ArrayTypeError("is a traced JAX array, which has no numbers yet; call the store outside of jit")
    if not jax.numpy.issubdtype(array.dtype, jax.numpy.number) and array.dtype != bool:
        is_key = jax.numpy.issubdtype(array.dtype, jax.dtypes.prng_key)
        hint = "; of a key store jax.random.key_data(x)" if is_key else ""
        raise ArrayTypeError(_bad_dtype(str(array.dtype)) + hint)
    if array.is_deleted():
        raise ArrayTypeError("is a JAX array that was deleted or donated, and has no elements any more")
    if array.is_fully_replicated:
        # Each device has all of it. Not by NumPy, whose view JAX would keep, so that the array could not be donated.
        array = array.addressable_data(0)
    elif not array.is_fully_addressable:
        raise ArrayTypeError(
            "is a JAX array of which other processes hold parts; gather it first, such as with "
            "jax.experimental.multihost_utils.process_allgather"
        )
    if len(array.devices()) > 1 or array.dtype.name not in _BY_NAME:
        return _take_numpy(np.asarray(array))
    try:
        tensor = torch.utils.dlpack.from_dlpack(array)
    except (BufferError, RuntimeError, TypeError, ValueError):
        # On a device that DLPack or this torch does not have, such as a TPU.
        return _take_numpy(np.asarray(array))
    return _take_torch(tensor)


_BY_NAME = {dtype_name(dtype): dtype for dtype in DTYPES}


def _bad_dtype(name: str) -> str:
    known = ", ".join(sorted(dtype_name(dtype) for dtype in DTYPES))
    return f"has dtype {name}, which a store cannot hold; it holds {known}"


jax_classes: set[type] = set()
"""Classes of JAX's arrays, as far as they have been met: it takes long to ask JAX. The compiled part reads it."""


def is_jax(array: Any) -> bool:
    """Return whether this is a JAX array, without importing JAX."""
    if type(array) in jax_classes:
        return True
    jax = sys.modules.get("jax")
    if jax is None or not isinstance(array, jax.Array):
        return False
    jax_classes.add(type(array))
    return True


def jax_views(given: Any) -> Any:
    """Return arrays with views of NumPy or torch in place of JAX's arrays.

    Args:
        given: an array, or a list or tuple of arrays or of such lists.

    Returns:
        ``given`` itself where it has no such arrays. Arrays that cannot be viewed stay as they are; those that are
        sharded over several devices are gathered.
    """
    if type(given) in (list, tuple) and "jax" in sys.modules:
        viewed = [jax_views(each) for each in given]
        return viewed if any(map(operator.is_not, viewed, given)) else given
    if not is_jax(given):
        return given
    try:
        return np.asarray(memoryview(given))
    except (BufferError, NotImplementedError, RuntimeError, TypeError, ValueError):
        # Elsewhere, on several devices, deleted, traced, or of a dtype that buffers do not have.
        with suppress(ArrayTypeError):
            return _take_jax(given)
    return given


def is_sparse_tensor(array: Any) -> bool:
    """Return whether this is a torch tensor of a sparse layout."""
    return isinstance(array, torch.Tensor) and array.layout is not torch.strided


# ---------------------------------------------------------------- out


def origin(array: Any) -> Origin:
    """Return the library and device that ``give`` needs to make an array like this one."""
    if isinstance(array, torch.Tensor):
        return _torch_origin(array.device)
    if isinstance(array, np.ndarray | np.generic):
        return NUMPY
    if is_jax(array) or _is_jax_struct(array):
        # An array without a device of its own stays one: JAX moves it to those of the arrays it is used with.
        return Origin("jax", array.sharding if getattr(array, "committed", True) else None)
    if type(array).__module__.partition(".")[0] == "cupy":
        return Origin("cupy", array.device)
    if isinstance(array, type):
        raise ArrayTypeError(f"is {show(array)}, not an array")
    if hasattr(array, "__array_namespace__"):
        return Origin("array-api", array.__array_namespace__())
    if hasattr(array, "__dlpack__"):
        return Origin("torch")
    raise ArrayTypeError(f"is {show(array)}, not an array")


@lru_cache
def _torch_origin(device: torch.device) -> Origin:
    return Origin("torch", device)


def shape_and_dtype(array: Any) -> tuple[tuple[int, ...], torch.dtype]:
    """Return the shape and dtype of an array of any library, or of what describes one; its memory may be gone.

    Raises:
        ArrayTypeError: a dtype that no store holds.
    """
    if isinstance(array, torch.Tensor) and array.dtype in DTYPES:
        return array.shape, array.dtype
    if not hasattr(array, "dtype") or not hasattr(array, "shape"):
        taken = take(array)
        return taken.shape, taken.dtype
    return array.shape, _torch_dtype(array.dtype)


@lru_cache(maxsize=256)
def _torch_dtype(dtype: Any) -> torch.dtype:
    # NumPy's, in any order of bytes, as well as JAX's and CuPy's have a name; other libraries' have only their text.
    name = getattr(dtype, "name", None) or str(dtype).rpartition(".")[2]
    if name not in _BY_NAME:
        raise ArrayTypeError(_bad_dtype(name))
    return _BY_NAME[name]


def _is_jax_struct(array: Any) -> bool:
    """Return whether this describes a JAX array, as ``jax.eval_shape`` returns it."""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(array, jax.ShapeDtypeStruct)


def empty(shape: torch.Size, dtype: torch.dtype, origin: Origin) -> Any:
    """Return a new array to be filled: NumPy's for NumPy where it has the dtype, else a tensor for ``give``.

    Raises:
        ArrayTypeError: ``give`` could not return it.
    """
    if origin.library == "numpy" and dtype not in _ML_DTYPES:
        return np.empty(shape, _NUMPY_DTYPES[dtype])
    check_give(shape, dtype, origin)
    device = origin.device if origin.library == "torch" and origin.device is not None else "cpu"
    with outside_modes():
        return torch.empty(shape, dtype=dtype, device=device)


def check_give(shape: Sequence[int], dtype: torch.dtype, origin: Origin) -> None:
    """Raise what ``give`` would raise for a tensor of a shape and dtype.

    Raises:
        ArrayTypeError: as ``give``.
    """
    if dtype in _ML_DTYPES and origin.library in ("numpy", "jax", "array-api"):
        _ml_dtype(dtype_name(dtype))
    if origin.library != "jax":
        return
    import jax

    if not _jax_has(dtype):
        _check_cut(dtype, jax.device_put(np.empty(0, _NUMPY_DTYPES[dtype])))
    sharding = origin.device
    if sharding is None or _is_on_one_device(sharding):
        return
    try:
        fits = not isinstance(sharding, jax.sharding.NamedSharding) or len(sharding.spec) <= len(shape)
        sharding.shard_shape(tuple(shape))
    except (AssertionError, ValueError):
        fits = False
    if not fits:
        raise ArrayTypeError(
            f"has the shape {tuple(shape)}, which {sharding} does not divide; choose an array with another sharding"
        )


def _jax_has(dtype: torch.dtype) -> bool:
    """Return whether JAX makes arrays of a dtype in its present mode; those of 64 bits it has only on demand."""
    numpy_dtype = _NUMPY_DTYPES.get(dtype)
    return numpy_dtype is None or bool(sys.modules["jax"].dtypes.canonicalize_dtype(numpy_dtype) == numpy_dtype)


def _is_on_one_device(sharding: Any) -> bool:
    return isinstance(sharding, sys.modules["jax"].sharding.SingleDeviceSharding)


def give(tensor: torch.Tensor, origin: Origin) -> Any:
    """Return the tensor as an array of another library; torch, NumPy, JAX and CuPy need no copy where devices agree.

    Args:
        tensor: a tensor that nothing else refers to; the result may share its memory.
        origin: what to make of it.

    Raises:
        ArrayTypeError: the library is not installed, or has no such dtype.
    """
    if origin.library == "torch":
        return tensor if origin.device is None else tensor.to(origin.device)
    if origin.library == "numpy":
        return view(tensor.cpu(), origin)
    if origin.library == "jax":
        return _give_jax([tensor], origin.device)[0]
    if origin.library == "cupy":
        import cupy

        with origin.device:
            return cupy.from_dlpack(tensor.to(f"cuda:{origin.device.id}"))
    # A copy, which the library lets go of when and where it likes.
    return origin.device.asarray(view(tensor.cpu(), NUMPY), copy=True)


def give_ids(ids: torch.Tensor, num_rows: int, origin: Origin) -> Any:
    """Return ids of rows as an array of another library; those of JAX are int32 where they fit, unless it has int64."""
    if origin.library == "jax" and (num_rows <= 1 << 31 or (not _jax_has(torch.int64) and bool((ids < 1 << 31).all()))):
        ids = ids.int()
    return give(ids, origin.for_parts())


def give_each(arrays: Sequence[Any], origins: Sequence[Origin]) -> list[Any]:
    """Return ``give`` of each tensor, others as they are; arrays of JAX are made together, which takes half as long."""
    given = list(arrays)
    by_device: dict[Any, list[int]] = {}
    for index, (array, origin) in enumerate(zip(arrays, origins, strict=True)):
        if not isinstance(array, torch.Tensor):
            continue
        if origin.library == "jax":
            by_device.setdefault(origin.device, []).append(index)
        else:
            given[index] = give(array, origin)
    for device, places in by_device.items():
        for index, array in zip(places, _give_jax([arrays[index] for index in places], device), strict=True):
            given[index] = array
    return given


def _give_jax(tensors: Sequence[torch.Tensor], device: Any) -> list[Any]:
    import jax

    # Not by DLPack: XLA's threads let go of its memory, which takes Python's lock where torch has made it, and
    # ends the process if Python has ended. Of NumPy's arrays JAX itself lets go, in a thread of Python.
    arrays: list[Any] = jax.device_put([view(tensor.cpu(), NUMPY) for tensor in tensors], device)
    for tensor, array in zip(tensors, arrays, strict=True):
        _check_cut(tensor.dtype, array)
    return arrays


def _check_cut(dtype: torch.dtype, array: Any) -> None:
    """Raise ArrayTypeError if JAX has made an array of another dtype than was asked for."""
    if array.dtype.name != dtype_name(dtype):
        raise ArrayTypeError(
            f"is {dtype_name(dtype)}, which JAX would cut down to {array.dtype.name}; "
            'call jax.config.update("jax_enable_x64", True) first, or pull into another library'
        )


def view(tensor: torch.Tensor, origin: Origin) -> Any:
    """Return an array that a function can change in place: torch for torch, CuPy for CuPy, else NumPy."""
    if origin.library == "torch" or (tensor.device.type != "cpu" and origin.library != "cupy"):
        return tensor
    if origin.library == "cupy" and tensor.is_cuda:
        import cupy

        return cupy.from_dlpack(tensor)
    if tensor.dtype in _ML_DTYPES:
        with outside_modes():
            return tensor.view(_ML_DTYPES[tensor.dtype]).numpy().view(_ml_dtype(dtype_name(tensor.dtype)))
    return tensor.numpy()


def _ml_dtype(name: str) -> Any:
    """Return a dtype of NumPy that the package ml_dtypes has."""
    try:
        import ml_dtypes
    except ModuleNotFoundError:
        raise ArrayTypeError(
            f"is {name}, which NumPy has only with the package ml_dtypes (JAX brings it); "
            "install it, or pull into a torch tensor or a float32 array"
        ) from None
    return np.dtype(getattr(ml_dtypes, name))


Finish = Callable[[], None]


def target(out: Any) -> tuple[torch.Tensor, Finish | None]:
    """Return a tensor to write, and what to call once it is written (None: nothing).

    Args:
        out: a writable array, any strides, any device.

    Raises:
        ArrayTypeError: not an array, or one that cannot be written (read-only, JAX, overlapping itself).
    """
    if type(out) is np.ndarray:
        if not out.flags.writeable:
            raise ArrayTypeError("is read-only; give an array that can be written")
        try:
            return _no_overlap(torch.from_numpy(out)), None
        except (TypeError, ValueError):
            return _numpy_target(out)
    if is_sparse_tensor(out):
        raise ArrayTypeError("is sparse, and a plain pull fills dense arrays; use row_sparse_pull for rows")
    if isinstance(out, torch.Tensor):
        tensor = _take_torch(out)
        if tensor.data_ptr() != out.data_ptr():
            raise ArrayTypeError("is a lazily conjugated or negated view; give the tensor it views")
        _no_overlap(tensor)
        # torch writes no inference tensor outside of torch.inference_mode, but another tensor of the same memory.
        return torch.utils.dlpack.from_dlpack(tensor) if tensor.is_inference() else tensor, None
    if isinstance(out, np.ndarray):
        return target(out.view(np.ndarray)) if not isinstance(out, np.ma.MaskedArray) else _refuse_masked()
    if is_jax(out):
        raise ArrayTypeError("is a JAX array, which cannot be written; use what the call returns: like=x")
    tensor = _take_dlpack(out)
    return _no_overlap(tensor), (partial(torch.cuda.synchronize, tensor.device) if tensor.is_cuda else None)


def _refuse_masked() -> Any:
    raise ArrayTypeError("is a masked array; give its data: x.data")


def _numpy_target(out: np.ndarray[Any, Any]) -> tuple[torch.Tensor, Finish | None]:
    dtype = _BY_NAME.get(out.dtype.name)
    if dtype in _ML_DTYPES:
        tensor, finish = target(out.view(_NUMPY_DTYPES[_ML_DTYPES[dtype]]))
        return tensor.view(dtype), finish
    source = _take_numpy(np.empty(0, out.dtype))  # raises for dtypes that a store cannot hold
    written = torch.empty(out.shape, dtype=source.dtype, device="cpu")
    return written, lambda: np.copyto(out, written.numpy())


def _no_overlap(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_contiguous() and any(
        step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)
    ):
        raise ArrayTypeError("is expanded: several of its elements share one place in memory; give a plain array")
    return tensor


def overlapping(outs: Sequence[Any]) -> tuple[int, int] | None:
    """Return the indices of two outs that share memory, where the one filled last would spoil the other.

    Args:
        outs: what will be written: tensors, or NumPy arrays that torch cannot view.
    """
    spans = []
    for index, out in enumerate(outs):
        if isinstance(out, torch.Tensor) and out.is_contiguous():
            start = out.data_ptr()
            spans.append((start, start + out.nbytes, index))
        elif out.size if isinstance(out, np.ndarray) else out.numel():
            spans.append((*_bounds(out), index))
    spans.sort()
    active: list[tuple[int, int, int]] = []
    for span in spans:
        active = [other for other in active if other[1] > span[0]]
        for *_, earlier in active:
            if _share(outs[earlier], outs[span[2]]):
                return earlier, span[2]
        active.append(span)
    return None


def _bounds(out: Any) -> tuple[int, int]:
    if isinstance(out, np.ndarray):
        return np.lib.array_utils.byte_bounds(out)
    reach = sum((size - 1) * step for size, step in zip(out.shape, out.stride(), strict=True)) + 1
    start = out.data_ptr()
    return start, start + reach * out.element_size()


def _share(left: Any, right: Any) -> bool:
    devices = [out.device if isinstance(out, torch.Tensor) else torch.device("cpu") for out in (left, right)]
    if devices[0] != devices[1]:
        return False
    views = [out if isinstance(out, np.ndarray) else np.asarray(_Addresses(out)) for out in (left, right)]
    try:
        return bool(np.shares_memory(views[0], views[1], max_work=_OVERLAP_WORK))  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


class _Addresses:
    """Show where a tensor's elements are, on any device; what is made of it must not be read."""

    def __init__(self, tensor: torch.Tensor) -> None:
        size = tensor.element_size()
        self.__array_interface__ = {
            "version": 3,
            "data": (tensor.data_ptr(), False),
            "typestr": f"|V{size}",
            "shape": tuple(tensor.shape),
            "strides": tuple(step * size for step in tensor.stride()),
        }
