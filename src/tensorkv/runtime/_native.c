/* tensorkv.runtime._native: sums and optimizer steps of plain arrays in one pass over memory.
 *
 * torch adds two arrays a call, so that a sum of n parts passes n - 1 times over the result, and its stores first
 * read what they overwrite. Here a block of each part is added in the first-level cache, and the sum is stored once,
 * past the cache where it would not stay there. Additions are those of IEEE 754, in the order of the parts: the bits
 * are torch's.
 *
 * Built for Python's stable ABI. Addresses are trusted: callers have checked shape, dtype and layout.
 */
#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#include "_kernels.h"

enum { MAX_COLUMNS = 256 };

/* ------------------------------------------------------------ columns */

PyDoc_STRVAR(run_columns_doc,
             "run_columns(dtype, outs, parts, counts, past_cache, start, stop, step=None)\n--\n\n"
             "Sum the parts of each key in their order, step an optimizer with the sum, and fill the outs.\n\n"
             "Args:\n"
             "    dtype: a number of tensorkv.shard.native.DTYPES.\n"
             "    outs, parts: columns: buffers with a 64-bit address for each key. An out may be one of its key's\n"
             "        parts; other memory of parts it must not touch.\n"
             "    counts: a buffer with a 64-bit number of elements for each key.\n"
             "    past_cache: how many of the outs, the last ones, are stored past the processor's cache.\n"
             "    start, stop: which elements to do, counted through all keys.\n"
             "    step: None: the outs become the sums. Else (numbers, count, is_first, columns): the optimizer's\n"
             "        numbers, how many steps with this one, whether its state is new, and columns of the values and\n"
             "        of each state; the outs become the values.\n\n"
             "The interpreter's lock is not held, so that several threads can each do their own range.\n\n"
             "Raises:\n"
             "    ValueError: an unknown dtype, columns of unequal length, or too many of them.");

/* The buffers of a call, and the columns of addresses in them. */
typedef struct {
    Py_buffer views[MAX_COLUMNS + 2];
    Py_ssize_t held;
    Py_ssize_t nbytes;
} Buffers;

static const uint64_t *take_column(Buffers *buffers, PyObject *object) {
    if (buffers->held >= MAX_COLUMNS) {
        PyErr_SetString(PyExc_ValueError, "run_columns: too many columns");
        return NULL;
    }
    Py_buffer *view = &buffers->views[buffers->held];
    if (object == NULL || PyObject_GetBuffer(object, view, PyBUF_SIMPLE)) return NULL;
    buffers->held++;
    if (view->len != buffers->nbytes) {
        PyErr_SetString(PyExc_ValueError, "run_columns: columns of unequal length");
        return NULL;
    }
    return view->buf;
}

static Py_ssize_t take_columns(Buffers *buffers, PyObject *list, const uint64_t **columns) {
    Py_ssize_t count = PyList_Size(list);
    for (Py_ssize_t i = 0; i < count; i++)
        if ((columns[i] = take_column(buffers, PyList_GetItem(list, i))) == NULL) return -1;
    return count;
}

static int take_step(Buffers *buffers, PyObject *given, Numbers *numbers, Step *step, const uint64_t **columns,
                     Py_ssize_t *num_columns) {
    PyObject *packed, *listed;
    double count;
    int is_first;
    if (!PyArg_ParseTuple(given, "SdpO!", &packed, &count, &is_first, &PyList_Type, &listed)) return -1;
    Py_ssize_t size = PyList_Size(listed);
    if (PyBytes_Size(packed) != sizeof *numbers || size < 1 || size > 1 + MAX_STATES) {
        PyErr_SetString(PyExc_ValueError, "run_columns: a step that is none");
        return -1;
    }
    memcpy(numbers, PyBytes_AsString(packed), sizeof *numbers);
    *step = step_of(numbers, count, is_first);
    return (*num_columns = take_columns(buffers, listed, columns)) < 0 ? -1 : 0;
}

static PyObject *run_columns(PyObject *module, PyObject *args) {
    PyObject *outs, *parts, *given = Py_None, *result = NULL;
    const uint64_t *out_columns[MAX_COLUMNS], *part_columns[MAX_COLUMNS], *step_columns[1 + MAX_STATES];
    Py_ssize_t start, stop, num_outs, num_parts, num_step_columns = 0, past_cache;
    int dtype;
    Numbers numbers;
    Step step;
    Buffers buffers;
    (void)module;
    if (!PyArg_ParseTuple(args, "iO!O!y*nnn|O", &dtype, &PyList_Type, &outs, &PyList_Type, &parts, &buffers.views[0],
                          &past_cache, &start, &stop, &given))
        return NULL;
    buffers.held = 1;
    buffers.nbytes = buffers.views[0].len;
    if (dtype < 0 || dtype >= NUM_DTYPES || PyList_Size(outs) > MAX_COLUMNS || PyList_Size(parts) > MAX_COLUMNS ||
        PyList_Size(parts) < 1) {
        PyErr_SetString(PyExc_ValueError, "run_columns: an unknown dtype, too many columns, or no parts");
        goto done;
    }
    if ((num_outs = take_columns(&buffers, outs, out_columns)) < 0) goto done;
    if ((num_parts = take_columns(&buffers, parts, part_columns)) < 0) goto done;
    if (given != Py_None && take_step(&buffers, given, &numbers, &step, step_columns, &num_step_columns)) goto done;
    Py_BEGIN_ALLOW_THREADS;
    const int64_t *counts = buffers.views[0].buf;
    Py_ssize_t keys = buffers.nbytes / 8, before = 0;
    const char *part_addresses[MAX_COLUMNS];
    char *out_addresses[MAX_COLUMNS];
    Item item = {.parts = part_addresses, .outs = out_addresses, .num_parts = (size_t)num_parts,
                 .num_outs = (size_t)num_outs, .num_past_cache = (size_t)past_cache};
    for (Py_ssize_t key = 0; key < keys && before < stop; before += counts[key++]) {
        Py_ssize_t first = start > before ? start - before : 0;
        Py_ssize_t last = stop - before < counts[key] ? stop - before : counts[key];
        if (first >= last) continue;
        for (Py_ssize_t i = 0; i < num_parts; i++) part_addresses[i] = (const char *)(uintptr_t)part_columns[i][key];
        for (Py_ssize_t i = 0; i < num_outs; i++) out_addresses[i] = (char *)(uintptr_t)out_columns[i][key];
        if (num_step_columns) item.value = (char *)(uintptr_t)step_columns[0][key];
        for (Py_ssize_t i = 1; i < num_step_columns; i++) item.states[i - 1] = (char *)(uintptr_t)step_columns[i][key];
        run_item(&item, dtype, num_step_columns ? &step : NULL, (size_t)first, (size_t)last);
    }
#if defined(__x86_64__)
    if (past_cache) _mm_sfence();
#endif
    Py_END_ALLOW_THREADS;
    result = Py_NewRef(Py_None);
done:
    while (buffers.held) PyBuffer_Release(&buffers.views[--buffers.held]);
    return result;
}

/* ------------------------------------------------------------ addresses */

PyDoc_STRVAR(addresses_doc,
             "addresses(arrays, type, format, shapes, writable)\n--\n\n"
             "Return a column of addresses, or None if an array is not exactly what is asked for.\n\n"
             "Args:\n"
             "    arrays: a list or tuple.\n"
             "    type: of every array; no subclass.\n"
             "    format: of every element, in the letters of ``struct``.\n"
             "    shapes: a list of tuples, one for each array.\n"
             "    writable: whether arrays must be.\n\n"
             "Arrays whose elements do not lie side by side in the order of C are not what is asked for.");

static int has_shape(const Py_buffer *view, PyObject *shape) {
    if (!PyTuple_Check(shape) || PyTuple_Size(shape) != view->ndim) return 0;
    for (int i = 0; i < view->ndim; i++)
        if (PyLong_AsSsize_t(PyTuple_GetItem(shape, i)) != view->shape[i]) return 0;
    return 1;
}

static PyObject *addresses(PyObject *module, PyObject *args) {
    PyObject *arrays, *type, *shapes;
    const char *format;
    int writable;
    (void)module;
    if (!PyArg_ParseTuple(args, "OOsO!p", &arrays, &type, &format, &PyList_Type, &shapes, &writable)) return NULL;
    Py_ssize_t count = PyList_Size(shapes);
    if (PySequence_Size(arrays) != count) {
        PyErr_Clear();
        return Py_NewRef(Py_None);
    }
    PyObject *column = PyBytes_FromStringAndSize(NULL, 8 * count);
    uint64_t *at = column == NULL ? NULL : (uint64_t *)PyBytes_AsString(column);
    if (at == NULL) return NULL;
    int flags = PyBUF_FORMAT | PyBUF_C_CONTIGUOUS | (writable ? PyBUF_WRITABLE : 0);
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *array = PySequence_GetItem(arrays, i);
        Py_buffer view;
        int fits = 0;
        if (array != NULL && (PyObject *)Py_TYPE(array) == type && !PyObject_GetBuffer(array, &view, flags)) {
            fits = view.format != NULL && !strcmp(view.format, format) && has_shape(&view, PyList_GetItem(shapes, i));
            at[i] = (uint64_t)(uintptr_t)view.buf;
            PyBuffer_Release(&view);
        }
        Py_XDECREF(array);
        if (!fits) {
            PyErr_Clear();
            Py_DECREF(column);
            return Py_NewRef(Py_None);
        }
    }
    return column;
}

/* ------------------------------------------------------------ exchange */

PyDoc_STRVAR(exchange_doc,
             "exchange(lock, rule, shard, entry, tensor, address, nbytes, source, target)\n--\n\n"
             "Copy a source into a value, count the update, and copy the value into a target; False: nothing was done.\n\n"
             "Args:\n"
             "    lock: its ``depth`` must be 0: nobody is inside.\n"
             "    rule, shard: the shard's ``_rule`` must be this one.\n"
             "    entry, tensor: the entry's ``value`` must be this one; its ``version`` counts.\n"
             "    address, nbytes: of the value.\n"
             "    source, target: buffers or addresses of as many bytes, or None.\n\n"
             "The interpreter's lock is held all the time: no other thread and no signal handler runs in between.");

static int is_same(PyObject *object, const char *name, PyObject *expected) {
    PyObject *found = PyObject_GetAttrString(object, name);
    if (found == NULL) return -1;
    Py_DECREF(found);
    return found == expected;
}

/* The memory of a buffer of as many bytes, of an address, or NULL for None; -1: it is none of these. */
static int memory_of(PyObject *array, Py_buffer *view, int flags, Py_ssize_t nbytes, void **at) {
    view->obj = NULL;
    *at = NULL;
    if (array == Py_None) return 0;
    if (PyLong_Check(array)) {
        *at = PyLong_AsVoidPtr(array);
        return PyErr_Occurred() ? -1 : 0;
    }
    if (PyObject_GetBuffer(array, view, PyBUF_C_CONTIGUOUS | flags)) return -1;
    *at = view->buf;
    return view->len == nbytes ? 0 : -1;
}

static PyObject *exchange(PyObject *module, PyObject *args) {
    PyObject *lock, *rule, *shard, *entry, *tensor, *source, *target, *depth = NULL, *version = NULL, *one = NULL;
    Py_buffer from_view = {.obj = NULL}, to_view = {.obj = NULL};
    unsigned long long address;
    Py_ssize_t nbytes;
    void *from, *to;
    int done = 0;
    (void)module;
    if (!PyArg_ParseTuple(args, "OOOOOKnOO", &lock, &rule, &shard, &entry, &tensor, &address, &nbytes, &source, &target))
        return NULL;
    if ((depth = PyObject_GetAttrString(lock, "depth")) == NULL || PyObject_IsTrue(depth)) goto end;
    if (is_same(shard, "_rule", rule) != 1 || is_same(entry, "value", tensor) != 1) goto end;
    if (memory_of(source, &from_view, 0, nbytes, &from) || memory_of(target, &to_view, PyBUF_WRITABLE, nbytes, &to))
        goto end;
    void *value = (void *)(uintptr_t)address;
    if (source != Py_None) {
        PyObject *old = PyObject_GetAttrString(entry, "version");
        one = PyLong_FromLong(1);
        version = old == NULL || one == NULL ? NULL : PyNumber_Add(old, one);
        Py_XDECREF(old);
        if (version == NULL || PyObject_SetAttrString(entry, "version", version)) goto end;
        memmove(value, from, nbytes);
    }
    if (target != Py_None) memmove(to, value, nbytes);
    done = 1;
end:
    if (from_view.obj != NULL) PyBuffer_Release(&from_view);
    if (to_view.obj != NULL) PyBuffer_Release(&to_view);
    Py_XDECREF(depth);
    Py_XDECREF(version);
    Py_XDECREF(one);
    /* What does not fit goes the general way, which says so. */
    PyErr_Clear();
    return PyBool_FromLong(done);
}

static PyMethodDef methods[] = {
    {"run_columns", run_columns, METH_VARARGS, run_columns_doc},
    {"addresses", addresses, METH_VARARGS, addresses_doc},
    {"exchange", exchange, METH_VARARGS, exchange_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "tensorkv.runtime._native", "Sums of plain arrays in one pass over memory.", 0, methods,
    NULL,                  NULL,               NULL,                                             NULL,
};

PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&definition); }
