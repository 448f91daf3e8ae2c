/* tensorkv.runtime._native: sums of plain arrays in one pass over memory.
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

#if defined(__x86_64__)
#include <emmintrin.h>
#endif
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EACH_CPU
#endif

enum { BLOCK_NBYTES = 8192, MAX_COLUMNS = 256 };

/* ------------------------------------------------------------ one block */

FOR_EACH_CPU static void add_float(float *restrict out, const float *restrict a, const float *restrict b, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = a[i] + b[i];
}

FOR_EACH_CPU static void more_float(float *restrict out, const float *restrict a, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] += a[i];
}

FOR_EACH_CPU static void add_double(double *restrict out, const double *restrict a, const double *restrict b,
                                    size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = a[i] + b[i];
}

FOR_EACH_CPU static void more_double(double *restrict out, const double *restrict a, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] += a[i];
}

static void copy_block(char *out, const char *from, size_t nbytes, int past_cache) {
#if defined(__x86_64__)
    size_t head = -(uintptr_t)out & 15;
    if (past_cache && nbytes >= 64) {
        memcpy(out, from, head);
        out += head, from += head, nbytes -= head;
        for (; nbytes >= 16; out += 16, from += 16, nbytes -= 16)
            _mm_stream_si128((__m128i *)out, _mm_loadu_si128((const __m128i *)from));
    }
#else
    (void)past_cache;
#endif
    memcpy(out, from, nbytes);
}

/* Where the bytes of one key begin, in each of its outs and parts. */
typedef struct {
    const uint64_t *columns[MAX_COLUMNS];
    Py_ssize_t outs, parts;
    int itemsize, past_cache;
} Sum;

static void sum_range(const Sum *sum, Py_ssize_t key, size_t start, size_t stop) {
    _Alignas(64) char buffer[BLOCK_NBYTES];
    size_t most = BLOCK_NBYTES / sum->itemsize;
    const uint64_t *const *parts = sum->columns + sum->outs;
    for (size_t at = start; at < stop; at += most) {
        size_t n = stop - at < most ? stop - at : most, offset = at * sum->itemsize;
        const char *from = (const char *)(uintptr_t)parts[0][key] + offset;
        for (Py_ssize_t i = 1; i < sum->parts; i++) {
            const char *part = (const char *)(uintptr_t)parts[i][key] + offset;
            if (sum->itemsize == 4 && i == 1)
                add_float((float *)buffer, (const float *)from, (const float *)part, n);
            else if (sum->itemsize == 4)
                more_float((float *)buffer, (const float *)part, n);
            else if (i == 1)
                add_double((double *)buffer, (const double *)from, (const double *)part, n);
            else
                more_double((double *)buffer, (const double *)part, n);
        }
        if (sum->parts > 1) from = buffer;
        for (Py_ssize_t i = 0; i < sum->outs; i++) {
            char *out = (char *)(uintptr_t)sum->columns[i][key] + offset;
            /* An out may be the only part itself. */
            if (out != from) copy_block(out, from, n * sum->itemsize, i >= sum->outs - sum->past_cache);
        }
    }
}

/* ------------------------------------------------------------ sum */

PyDoc_STRVAR(sum_doc,
             "sum_columns(outs, parts, counts, itemsize, past_cache, start, stop)\n--\n\n"
             "Store the sums of parts, added in their order, in each of the outs.\n\n"
             "Args:\n"
             "    outs, parts: columns: buffers with a 64-bit address for each key. An out may be one of its key's\n"
             "        parts; other memory of parts it must not touch.\n"
             "    counts: a buffer with a 64-bit number of elements for each key.\n"
             "    itemsize: 4 for float32, 8 for float64.\n"
             "    past_cache: how many of the outs, the last ones, are stored past the processor's cache.\n"
             "    start, stop: which elements to do, counted through all keys.\n\n"
             "The interpreter's lock is not held, so that several threads can each do their own range.\n\n"
             "Raises:\n"
             "    ValueError: columns of unequal length, or too many of them.");

static PyObject *sum_columns(PyObject *module, PyObject *args) {
    PyObject *outs, *parts, *columns = NULL, *result = NULL;
    Py_buffer views[MAX_COLUMNS + 1];
    Py_ssize_t held = 0, start, stop;
    Sum sum;
    (void)module;
    if (!PyArg_ParseTuple(args, "O!O!y*iinn", &PyList_Type, &outs, &PyList_Type, &parts, &views[0], &sum.itemsize,
                          &sum.past_cache, &start, &stop))
        return NULL;
    held = 1;
    sum.outs = PyList_Size(outs);
    sum.parts = PyList_Size(parts);
    if (sum.outs + sum.parts > MAX_COLUMNS || sum.parts < 1 || (sum.itemsize != 4 && sum.itemsize != 8)) {
        PyErr_SetString(PyExc_ValueError, "sum_columns: too many columns, no parts, or an itemsize that is not 4 or 8");
        goto done;
    }
    for (; held <= sum.outs + sum.parts; held++) {
        Py_ssize_t i = held - 1;
        columns = i < sum.outs ? PyList_GetItem(outs, i) : PyList_GetItem(parts, i - sum.outs);
        if (columns == NULL || PyObject_GetBuffer(columns, &views[held], PyBUF_SIMPLE)) goto done;
        sum.columns[i] = views[held].buf;
        if (views[held].len != views[0].len) {
            held++;
            PyErr_SetString(PyExc_ValueError, "sum_columns: columns of unequal length");
            goto done;
        }
    }
    Py_BEGIN_ALLOW_THREADS;
    const int64_t *counts = views[0].buf;
    Py_ssize_t keys = views[0].len / 8, before = 0;
    for (Py_ssize_t key = 0; key < keys && before < stop; before += counts[key++]) {
        Py_ssize_t first = start > before ? start - before : 0;
        Py_ssize_t last = stop - before < counts[key] ? stop - before : counts[key];
        if (first < last) sum_range(&sum, key, first, last);
    }
#if defined(__x86_64__)
    if (sum.past_cache) _mm_sfence();
#endif
    Py_END_ALLOW_THREADS;
    result = Py_NewRef(Py_None);
done:
    while (held) PyBuffer_Release(&views[--held]);
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
    {"sum_columns", sum_columns, METH_VARARGS, sum_doc},
    {"addresses", addresses, METH_VARARGS, addresses_doc},
    {"exchange", exchange, METH_VARARGS, exchange_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "tensorkv.runtime._native", "Sums of plain arrays in one pass over memory.", 0, methods,
    NULL,                  NULL,               NULL,                                             NULL,
};

PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&definition); }
