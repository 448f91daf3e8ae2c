/* tensorkv.compiled._native: sums and optimizer steps of plain arrays in one pass over memory.
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
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <structmember.h>

#include "_kernels.h"
#include "_words.h"

/* Keys that are fetched into the cache before their turn, and bytes of each. */
enum { MAX_COLUMNS = 256, FETCHED_AHEAD = 4, FETCHED_NBYTES = 1024, LINE_NBYTES = 64 };

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
    *step = step_of(numbers, 1, count, is_first);
    return (*num_columns = take_columns(buffers, listed, columns)) < 0 ? -1 : 0;
}

static inline void fetch_to_write(const char *address, size_t nbytes) {
    for (size_t at = 0; at < nbytes && at < FETCHED_NBYTES; at += LINE_NBYTES) __builtin_prefetch(address + at, 1);
}

static inline void fetch_to_read(const char *address, size_t nbytes) {
    for (size_t at = 0; at < nbytes && at < FETCHED_NBYTES; at += LINE_NBYTES) __builtin_prefetch(address + at);
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
        /* Rows of a table lie anywhere in memory. */
        for (Py_ssize_t i = 0; i < num_step_columns && key + FETCHED_AHEAD < keys; i++)
            fetch_to_write((const char *)(uintptr_t)step_columns[i][key + FETCHED_AHEAD],
                           (size_t)counts[key + FETCHED_AHEAD] * ITEMSIZES[dtype]);
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

/* ------------------------------------------------------------ memory */

/* Large blocks are kept for the next call: to get 6 MB from the kernel takes longer than to look at 40,000 arrays. */
enum { NUM_KEPT = 6, KEPT_NBYTES = 64 << 10, MAX_KEPT_NBYTES = 16 << 20 };

typedef struct {
    size_t nbytes, padding;
} Block;

static Block *kept_blocks[NUM_KEPT];

static void *new_memory(size_t nbytes) {
    Block **best = NULL, *block;
    for (int i = 0; i < NUM_KEPT && nbytes >= KEPT_NBYTES; i++) {
        block = kept_blocks[i];
        if (block == NULL || block->nbytes < nbytes || block->nbytes / 4 > nbytes) continue;
        if (best == NULL || block->nbytes < (*best)->nbytes) best = &kept_blocks[i];
    }
    if (best != NULL) {
        block = *best;
        *best = NULL;
        return block + 1;
    }
    if ((block = PyMem_Malloc(sizeof *block + nbytes)) == NULL) return NULL;
    block->nbytes = nbytes;
    return block + 1;
}

static void *new_zeros(size_t nbytes) {
    void *memory = new_memory(nbytes);
    return memory == NULL ? NULL : memset(memory, 0, nbytes);
}

static void free_memory(void *memory) {
    Block *block = memory == NULL ? NULL : (Block *)memory - 1, **least = &kept_blocks[0];
    if (block != NULL && block->nbytes >= KEPT_NBYTES && block->nbytes <= MAX_KEPT_NBYTES) {
        for (int i = 0; i < NUM_KEPT && *least != NULL; i++)
            if (kept_blocks[i] == NULL || kept_blocks[i]->nbytes < (*least)->nbytes) least = &kept_blocks[i];
        if (*least == NULL || (*least)->nbytes < block->nbytes) {
            Block *other = *least;
            *least = block;
            block = other;
        }
    }
    PyMem_Free(block);
}

static void *more_memory(void *memory, size_t nbytes) {
    size_t present = memory == NULL ? 0 : ((Block *)memory - 1)->nbytes;
    if (nbytes <= present) return memory;
    void *larger = new_memory(nbytes);
    if (larger == NULL) return NULL;
    if (memory != NULL) memcpy(larger, memory, present);
    free_memory(memory);
    return larger;
}

/* ------------------------------------------------------------ arrays */

/* As in DLPack 1.3, whose table of functions torch gives to C. */
typedef struct {
    void *data;
    int32_t device_type, device_id, ndim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
} DLTensor;

typedef struct {
    struct {
        uint32_t major, minor;
        void *previous;
    } header;
    void *allocate, *from_py_object, *to_py_object;
    int (*dltensor_from_py_object)(void *object, DLTensor *out);
    void *current_work_stream;
} ExchangeAPI;

enum { CPU = 1, MAX_DIMS = 16 };
enum { CODE_INT, CODE_UINT, CODE_FLOAT, CODE_BFLOAT = 4, CODE_BOOL = 6 };

static const ExchangeAPI *torch_api;
static PyObject *ndarray_type, *tensor_type, *parameter_type, *is_neg, *increment_version;
/* A set of the types of arrays that are looked at as buffers, which may let other threads run. */
static PyObject *viewed_types;

/* As in numpy/ndarraytypes.h, the same in NumPy 1 and 2, whose own macros read it. */
typedef struct {
    PyObject_HEAD
    char *data;
    int nd;
    int64_t *dimensions, *strides;
    PyObject *base, *descr;
    int flags;
} NumpyArray;

enum { NUMPY_C_CONTIGUOUS = 1, NUMPY_ALIGNED = 0x100, NUMPY_WRITEABLE = 0x400, NUMPY_WARNS_ON_WRITE = (int)0x80000000 };
enum { MAX_NUMPY_DTYPES = 16 };

/* NumPy's dtypes, float32 first; whether arrays are as above. */
static struct {
    PyObject *descr;
    unsigned char code, bits;
} numpy_dtypes[MAX_NUMPY_DTYPES];
static int num_numpy_dtypes, knows_numpy;

PyDoc_STRVAR(use_doc,
             "use(ndarray, tensor, parameter, api, is_neg, increment_version, viewed, samples, tensors, negated)\n--\n\n"
             "Tell which types of arrays there are, and what torch has for them: a capsule of DLPack's functions,\n"
             "whether a tensor is lazily negated, and what raises the versions of tensors.\n\n"
             "viewed: a set of other types of arrays, which are buffers and are only read; it may grow.\n"
             "samples: a list of NumPy arrays of two dimensions, one of each dtype, from which the rest is learned.\n"
             "tensors, negated: lists of tensors that are not lazily negated, and of such that are; likewise.");

static void learn_numpy(PyObject *samples);
static void learn_negated(PyObject *tensors, PyObject *negated);

static PyObject *use(PyObject *module, PyObject *args) {
    PyObject *given[7], *samples, *tensors, *negated;
    (void)module;
    if (!PyArg_ParseTuple(args, "OOOOOOO!O!O!O!", &given[0], &given[1], &given[2], &given[3], &given[4], &given[5],
                          &PySet_Type, &given[6], &PyList_Type, &samples, &PyList_Type, &tensors, &PyList_Type, &negated))
        return NULL;
    const ExchangeAPI *api = PyCapsule_GetPointer(given[3], "dlpack_exchange_api");
    if (api == NULL) return NULL;
    if (api->header.major != 1 || api->dltensor_from_py_object == NULL) {
        PyErr_SetString(PyExc_ValueError, "use: expected version 1 of DLPack, with its function for borrowed tensors");
        return NULL;
    }
    torch_api = api;
    PyObject **held[] = {&ndarray_type, &tensor_type, &parameter_type, NULL, &is_neg, &increment_version, &viewed_types};
    for (int i = 0; i < 7; i++)
        if (held[i] != NULL) {
            Py_XDECREF(*held[i]);
            *held[i] = Py_NewRef(given[i]);
        }
    learn_numpy(samples);
    learn_negated(tensors, negated);
    return Py_NewRef(Py_None);
}

/* One array whose elements lie side by side in the order of C, in this process's memory. */
typedef struct {
    char *address;
    int64_t numel;
    int ndim, dtype, kind; /* the kernels' dtype; DLPack's code and bits, which tell unsigned integers apart */
    int64_t shape[MAX_DIMS];
} Plain;

static int is_torch(PyObject *array) {
    PyObject *type = (PyObject *)Py_TYPE(array);
    return type == tensor_type || type == parameter_type;
}

static int dtype_of(int code, int bits) {
    if (code == CODE_FLOAT) return bits == 32 ? FLOAT32 : bits == 64 ? FLOAT64 : bits == 16 ? FLOAT16 : -1;
    if (code == CODE_BFLOAT) return bits == 16 ? BFLOAT16 : -1;
    if (code == CODE_BOOL) return bits == 8 ? BOOL : -1;
    if (code != CODE_INT && code != CODE_UINT) return -1;
    return bits == 8 ? INT8 : bits == 16 ? INT16 : bits == 32 ? INT32 : bits == 64 ? INT64 : -1;
}

/* Describe an array by what a library tells of it; whether it is plain. */
static int describe(Plain *plain, void *data, int ndim, const int64_t *shape, const int64_t *strides, int code,
                    int bits) {
    if (ndim > MAX_DIMS || (plain->dtype = dtype_of(code, bits)) < 0) return 0;
    plain->kind = code << 8 | bits;
    plain->ndim = ndim;
    plain->numel = 1;
    for (int i = ndim - 1; i >= 0; i--) {
        plain->shape[i] = shape[i];
        if (strides != NULL && shape[i] > 1 && strides[i] != plain->numel) return 0;
        plain->numel = (int64_t)((uint64_t)plain->numel * (uint64_t)shape[i]);
    }
    plain->address = data;
    /* Compilers may count on aligned elements. */
    return plain->numel == 0 || ((uintptr_t)data % ITEMSIZES[plain->dtype] == 0 && data != NULL);
}

static int look_at_torch(PyObject *array, Plain *plain) {
    DLTensor found;
    if (torch_api->dltensor_from_py_object(array, &found)) {
        PyErr_Clear();
        return 0;
    }
    if (found.device_type != CPU || found.lanes != 1 || (found.ndim && (found.shape == NULL || found.strides == NULL)))
        return 0;
    if (!describe(plain, (char *)found.data + found.byte_offset, found.ndim, found.shape, found.strides, found.code,
                  found.bits)) {
        /* Strides of an array without elements say nothing. */
        int64_t numel = 1;
        for (int i = 0; i < found.ndim; i++) numel = found.shape[i] == 0 ? 0 : numel;
        return numel == 0 && describe(plain, NULL, found.ndim, found.shape, NULL, found.code, found.bits);
    }
    return 1;
}

static int look_at_buffer(PyObject *array, Plain *plain, int writable) {
    static const char formats[] = "?bhilqBHILQefd";
    static const unsigned char codes[] = {CODE_BOOL, CODE_INT,  CODE_INT,  CODE_INT,  CODE_INT,  CODE_INT,   CODE_UINT,
                                          CODE_UINT, CODE_UINT, CODE_UINT, CODE_UINT, CODE_FLOAT, CODE_FLOAT, CODE_FLOAT};
    Py_buffer view;
    int fits = 0;
    if (PyObject_GetBuffer(array, &view, PyBUF_FORMAT | PyBUF_C_CONTIGUOUS | (writable ? PyBUF_WRITABLE : 0))) {
        PyErr_Clear();
        return 0;
    }
    const char *format = view.format == NULL ? "" : view.format;
    /* In the order of bytes of this processor; how many they are is told beside it. */
    if (*format == '=' || *format == '@') format++;
    const char *at = !format[0] || format[1] ? NULL : strchr(formats, format[0]);
    if (at != NULL && view.ndim <= MAX_DIMS) {
        int64_t shape[MAX_DIMS];
        for (int i = 0; i < view.ndim; i++) shape[i] = view.shape[i];
        fits = describe(plain, view.buf, view.ndim, shape, NULL, codes[at - formats], (int)view.itemsize * 8);
    }
    PyBuffer_Release(&view);
    return fits;
}

/* What the buffer protocol tells, of an array of NumPy's whose dtype is a usual one. */
static int look_at_numpy(PyObject *object, Plain *plain, int writable) {
    const NumpyArray *array = (const NumpyArray *)object;
    int dtype = 0, needed = NUMPY_C_CONTIGUOUS | NUMPY_ALIGNED | (writable ? NUMPY_WRITEABLE : 0);
    if (!knows_numpy || (array->flags & NUMPY_WARNS_ON_WRITE) || array->nd > MAX_DIMS)
        return look_at_buffer(object, plain, writable);
    while (dtype < num_numpy_dtypes && numpy_dtypes[dtype].descr != array->descr) dtype++;
    if (dtype == num_numpy_dtypes) return look_at_buffer(object, plain, writable);
    if ((array->flags & needed) != needed) return 0;
    return describe(plain, array->data, array->nd, array->dimensions, NULL, numpy_dtypes[dtype].code, numpy_dtypes[dtype].bits);
}

/* Learn NumPy's dtypes, and see that its arrays are as they are read here; else the buffer protocol does it all. */
static void learn_numpy(PyObject *samples) {
    Py_ssize_t count = PyList_Size(samples);
    knows_numpy = count <= MAX_NUMPY_DTYPES;
    num_numpy_dtypes = 0;
    for (Py_ssize_t i = 0; i < count && knows_numpy; i++) {
        PyObject *sample = PyList_GetItem(samples, i);
        const NumpyArray *array = (const NumpyArray *)sample;
        Plain plain;
        knows_numpy = (PyObject *)Py_TYPE(sample) == ndarray_type && look_at_buffer(sample, &plain, 1) && plain.ndim == 2 &&
                      array->data == plain.address && array->nd == 2 && array->dimensions[0] == plain.shape[0] &&
                      array->dimensions[1] == plain.shape[1] && array->base == NULL &&
                      (array->flags & NUMPY_WRITEABLE) && (array->flags & NUMPY_C_CONTIGUOUS);
        if (!knows_numpy) break;
        /* Held for as long as the process lives, as NumPy itself does. */
        numpy_dtypes[i].descr = Py_NewRef(array->descr);
        numpy_dtypes[i].code = (unsigned char)(plain.kind >> 8);
        numpy_dtypes[i].bits = (unsigned char)plain.kind;
        num_numpy_dtypes++;
    }
}

/* Where torch keeps that a tensor is lazily negated, which DLPack does not tell and which costs more to ask than all
 * else: the word of the object that points to what torch holds of it, and a bit of a word of that. */
enum { MAX_TENSOR_WORDS = 22, MIN_TENSOR_SAMPLES = 16 };

static struct {
    int pointer, word, is_known;
    uint64_t bit;
} negated_bit;

/* A word of what torch holds of a tensor; 0 where there is nothing. */
static uint64_t word_of_tensor(PyObject *tensor, int pointer, int word) {
    const uint64_t *inside = ((const uint64_t *const *)tensor)[pointer];
    return inside == NULL ? 0 : inside[word];
}

/* Learn the one bit that is set in just the samples that are negated; where there is none, torch is asked each time. */
static void learn_negated(PyObject *tensors, PyObject *negated) {
    int found = 0;
    negated_bit.is_known = 0;
    if (PyList_Size(tensors) < MIN_TENSOR_SAMPLES || PyList_Size(negated) < MIN_TENSOR_SAMPLES) return;
    for (Py_ssize_t i = 0; i < PyList_Size(tensors); i++)
        if (!is_torch(PyList_GetItem(tensors, i))) return;
    for (Py_ssize_t i = 0; i < PyList_Size(negated); i++)
        if (!is_torch(PyList_GetItem(negated, i))) return;
    for (int pointer = 2; pointer < 4; pointer++) {
        /* One of these words is a pointer in each tensor, and the other in none. */
        int points = 1;
        for (Py_ssize_t i = 0; i < PyList_Size(tensors); i++) {
            uintptr_t at = ((const uintptr_t *)PyList_GetItem(tensors, i))[pointer];
            points &= at > UINT16_MAX && at % 8 == 0;
        }
        for (int word = 0; word < MAX_TENSOR_WORDS && points; word++) {
            uint64_t never = UINT64_MAX, always = UINT64_MAX;
            for (Py_ssize_t i = 0; i < PyList_Size(tensors); i++)
                never &= ~word_of_tensor(PyList_GetItem(tensors, i), pointer, word);
            for (Py_ssize_t i = 0; i < PyList_Size(negated); i++)
                always &= word_of_tensor(PyList_GetItem(negated, i), pointer, word);
            uint64_t bits = never & always;
            if (bits == 0) continue;
            found += bits & (bits - 1) ? 2 : 1;
            negated_bit.pointer = pointer;
            negated_bit.word = word;
            negated_bit.bit = bits;
        }
        if (points) break;
    }
    negated_bit.is_known = found == 1;
}

/* Whether a tensor is lazily negated. If it has to be asked, this may let other threads run. */
static int is_negated(PyObject *tensor) {
    if (negated_bit.is_known)
        return (word_of_tensor(tensor, negated_bit.pointer, negated_bit.word) & negated_bit.bit) != 0;
    PyObject *found = PyObject_CallFunctionObjArgs(is_neg, tensor, NULL);
    Py_XDECREF(found);
    PyErr_Clear();
    return found != Py_False;
}

/* Whether an array is plain: exactly NumPy's or torch's, no subclass, or in place of one that is viewed, and its elements
 * as they count in memory. */
static int look_at(PyObject *array, Plain *plain, int writable) {
    if ((PyObject *)Py_TYPE(array) == ndarray_type) return look_at_numpy(array, plain, writable);
    if (PyMemoryView_Check(array)) return !writable && PySet_Size(viewed_types) > 0 && look_at_buffer(array, plain, 0);
    return is_torch(array) && !(negated_bit.is_known && is_negated(array)) && look_at_torch(array, plain);
}

/* Whether the bytes of bools are 0 and 1. Any other one is true for NumPy and torch as well, and no file and no message may
 * have it. */
static int has_clean_bools(const Plain *plain) {
    unsigned char all = 0;
    for (int64_t i = 0; i < plain->numel && plain->dtype == BOOL; i++) all |= (unsigned char)plain->address[i];
    return all <= 1;
}

static int is_alike(const Plain *left, const Plain *right) {
    return left->ndim == right->ndim && !memcmp(left->shape, right->shape, (size_t)left->ndim * sizeof *left->shape);
}

/* ------------------------------------------------------------ cells */

PyDoc_STRVAR(cell_doc, "What the compiled part reads and writes of a key: its value, state and version.");

typedef struct {
    PyObject_HEAD
    /* What every call reads comes first. */
    PyObject *value, *bound;
    unsigned long long named; /* by which call last */
    char is_plain, is_remote; /* remote: the value is only described, and is elsewhere */
    char is_new;              /* the state was made for the next step */
    int owner;                /* of the whole, if there is just one; else DIVIDED, or NOBODY of one without elements */
    PyObject *whole;          /* NULL or None: the value is not a part of another */
    PyObject *frozen;         /* what snapshots hold of the key as it is now; NULL or None: nothing */
    PyObject *incomplete;     /* slices of a push that has not come as a whole; NULL or None: there are none */
    size_t own_first, own_numel; /* the elements of the whole that are the value */
    long long version;
    unsigned long long digest; /* of the key */
    PyObject *state;
    PyObject *block; /* has the state, which is no dict yet: a tuple of the states' names and what makes the dict */
    char *state_addresses[MAX_STATES + 1]; /* of ``bound_states``, the last of which counts steps */
    Plain plain; /* of the whole, if ``is_plain``, as of when ``bound`` was the value */
    PyObject *borders, *spec, *bound_states[MAX_STATES + 1];
    size_t place, offset, placed_nbytes; /* in the block: which key, its first element, and the bytes of its value */
} Cell;

static PyTypeObject *cell_type;

/* Whether an attribute is set. */
static int is_there(PyObject *attribute) { return attribute != NULL && attribute != Py_None; }

static int cell_traverse(Cell *cell, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE((PyObject *)cell));
    Py_VISIT(cell->value);
    Py_VISIT(cell->state);
    Py_VISIT(cell->spec);
    Py_VISIT(cell->block);
    Py_VISIT(cell->bound);
    Py_VISIT(cell->whole);
    Py_VISIT(cell->borders);
    Py_VISIT(cell->frozen);
    Py_VISIT(cell->incomplete);
    for (int i = 0; i <= MAX_STATES; i++) Py_VISIT(cell->bound_states[i]);
    return 0;
}

static int cell_clear(Cell *cell) {
    Py_CLEAR(cell->value);
    Py_CLEAR(cell->state);
    Py_CLEAR(cell->spec);
    Py_CLEAR(cell->block);
    Py_CLEAR(cell->bound);
    Py_CLEAR(cell->whole);
    Py_CLEAR(cell->borders);
    Py_CLEAR(cell->frozen);
    Py_CLEAR(cell->incomplete);
    for (int i = 0; i <= MAX_STATES; i++) Py_CLEAR(cell->bound_states[i]);
    return 0;
}

static void cell_dealloc(Cell *cell) {
    PyTypeObject *type = Py_TYPE((PyObject *)cell);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    PyObject_GC_UnTrack(cell);
    cell_clear(cell);
    release(cell);
    Py_DECREF(type);
}

/* The state as a dict of tensors, which is made when it is first asked for. */
static PyObject *cell_state(Cell *cell, void *closure) {
    (void)closure;
    if (cell->state == NULL) {
        PyObject *made = cell->block == NULL ? PyDict_New()
                                             : PyObject_CallFunction(PyTuple_GetItem(cell->block, 1), "Onn", cell->value,
                                                                     (Py_ssize_t)cell->place, (Py_ssize_t)cell->offset);
        if (made == NULL) return NULL;
        /* Another thread may have made it meanwhile. */
        if (cell->state == NULL) {
            cell->state = made;
            Py_CLEAR(cell->block);
        } else {
            Py_DECREF(made);
        }
    }
    return Py_NewRef(cell->state);
}

static int set_cell_state(Cell *cell, PyObject *state, void *closure) {
    PyObject *old = cell->state;
    (void)closure;
    cell->state = Py_XNewRef(state);
    cell->is_new = 0;
    Py_XDECREF(old);
    Py_CLEAR(cell->block);
    for (int i = 0; i <= MAX_STATES; i++) Py_CLEAR(cell->bound_states[i]);
    return 0;
}

static PyObject *cell_is_blank(Cell *cell, void *closure) {
    (void)closure;
    int is_empty = cell->state == NULL || (PyDict_CheckExact(cell->state) && PyDict_Size(cell->state) == 0);
    return PyBool_FromLong(is_empty && cell->block == NULL);
}

static PyGetSetDef cell_attributes[] = {
    {"state", (getter)cell_state, (setter)set_cell_state, "The optimizer's state, by name.", NULL},
    {"is_blank", (getter)cell_is_blank, NULL, "Whether there is no state.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef cell_members[] = {
    {"value", T_OBJECT_EX, offsetof(Cell, value), 0, "The value of the key."},
    {"spec", T_OBJECT_EX, offsetof(Cell, spec), 0, "What callers need to know of the key, which makes new arrays."},
    {"version", T_LONGLONG, offsetof(Cell, version), 0, "How many updates the key has had."},
    {"digest", T_ULONGLONG, offsetof(Cell, digest), 0, "A number that differs where keys differ."},
    {"whole", T_OBJECT, offsetof(Cell, whole), 0,
     "The tensor of which the value is some rows, None if it is not; parts and outs are as the whole."},
    {"borders", T_OBJECT, offsetof(Cell, borders), 0,
     "A list of where in the whole each owner's rows begin, and the number of rows last; set before the value."},
    {"frozen", T_OBJECT, offsetof(Cell, frozen), 0,
     "What snapshots hold of the key as it is now, None if there are none; a push has to see to it."},
    {"incomplete", T_OBJECT, offsetof(Cell, incomplete), 0,
     "Slices of a push that has not come as a whole, None if there are none; no call of such a key is plain."},
    {"is_new", T_BOOL, offsetof(Cell, is_new), 0,
     "Whether the state was made for the step that comes next; another state is not."},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot cell_slots[] = {
    {Py_tp_doc, (void *)cell_doc},   {Py_tp_members, cell_members},     {Py_tp_getset, cell_attributes},
    {Py_tp_clear, cell_clear},       {Py_tp_traverse, cell_traverse},   {Py_tp_dealloc, cell_dealloc},
    {0, NULL},
};

static PyType_Spec cell_spec = {"tensorkv.compiled._native.Cell", sizeof(Cell), 0,
                                Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC, cell_slots};

/* Describe a value that is elsewhere by a tuple: DLPack's code and bits, and its shape; whether it could be plain. */
static int look_at_description(PyObject *given, Plain *plain) {
    int code, bits;
    PyObject *shape;
    int64_t sizes[MAX_DIMS];
    if (!PyArg_ParseTuple(given, "iiO!", &code, &bits, &PyTuple_Type, &shape) || PyTuple_Size(shape) > MAX_DIMS) {
        PyErr_Clear();
        return 0;
    }
    int ndim = (int)PyTuple_Size(shape);
    for (int i = 0; i < ndim; i++)
        if ((sizes[i] = PyLong_AsLongLong(PyTuple_GetItem(shape, i))) < 0) {
            PyErr_Clear();
            return 0;
        }
    static char elsewhere[1] __attribute__((aligned(16)));
    return describe(plain, elsewhere, ndim, sizes, NULL, code, bits);
}

enum { DIVIDED = -1, NOBODY = -2 };

/* The row where an owner's part of a divided value begins; after the last owner, how many rows there are. */
static int64_t border_of(const Cell *cell, Py_ssize_t owner) {
    return PyLong_AsLongLong(PyList_GetItem(cell->borders, owner));
}

/* Find which part of the whole the value is, and who owns the parts; whether that can be told. */
static int bind_whole(Cell *cell) {
    Plain own;
    const Plain *whole = &cell->plain;
    if (!is_torch(cell->whole) || !look_at_torch(cell->whole, &cell->plain) || !is_torch(cell->value) ||
        !look_at_torch(cell->value, &own) || own.kind != whole->kind || !PyList_CheckExact(cell->borders))
        return 0;
    uintptr_t distance = (uintptr_t)own.address - (uintptr_t)whole->address;
    cell->own_numel = (size_t)own.numel;
    cell->own_first = own.numel ? distance / ITEMSIZES[own.dtype] : 0;
    if (cell->own_first + cell->own_numel > (size_t)whole->numel) return 0;
    cell->owner = NOBODY;
    for (Py_ssize_t i = 0; i + 1 < PyList_Size(cell->borders); i++) {
        int64_t first = border_of(cell, i), last = border_of(cell, i + 1);
        if (PyErr_Occurred() || first < 0 || first > last) return 0;
        if (first < last && whole->numel) cell->owner = cell->owner == NOBODY ? (int)i : DIVIDED;
    }
    return 1;
}

static int has_whole(const Cell *cell) { return is_there(cell->whole); }

/* The array that parts and outs of a cell are like: its value, or the whole of which that is a part; NULL if it is not
 * plain. */
static const Plain *plain_of(Cell *cell) {
    if (cell->value == NULL) return NULL;
    if (cell->bound != cell->value) {
        PyObject *old = cell->bound;
        cell->is_remote = (char)PyTuple_CheckExact(cell->value);
        if (has_whole(cell)) {
            cell->is_plain = (char)bind_whole(cell);
            PyErr_Clear();
        } else {
            cell->is_plain = (char)(cell->is_remote ? look_at_description(cell->value, &cell->plain)
                                                    : is_torch(cell->value) && look_at_torch(cell->value, &cell->plain));
            cell->own_first = 0;
            cell->own_numel = (size_t)cell->plain.numel;
        }
        cell->bound = Py_NewRef(cell->value);
        Py_XDECREF(old);
        for (int i = 0; i <= MAX_STATES; i++) Py_CLEAR(cell->bound_states[i]);
    }
    return cell->is_plain ? &cell->plain : NULL;
}

/* ------------------------------------------------------------ calls */

/* The work of one call for one key. What is read of cells again and again is repeated here: works lie one after another,
 * and the cells of many keys do not stay in the cache. */
typedef struct {
    PyObject *key;
    Cell *cell;
    const Numbers *numbers; /* of the optimizer; NULL: no step */
    char *value;            /* as the cell's ``plain``: of the whole */
    size_t numel, own_first, own_numel;
    uint32_t first_part, num_parts, first_out, num_outs; /* places in ``addresses`` and ``dtypes`` */
    int owner;
    unsigned char dtype, num_states, counts_steps;
} Work;

/* How many items ahead the processor is told what it will need, so that it does not wait for memory. */
enum { FEW = 8, AHEAD = 12 };

typedef struct {
    Work *works;
    char **addresses;
    unsigned char *dtypes;
    PyObject **arrays; /* the parts and outs; NULL for a piece of a flat array */
    size_t num_keys, num_addresses, room, total_nbytes;
    int averages; /* whether the sums of parts are divided by their number */
    /* Of a call of one key and few arrays. */
    Work few_works[1];
    char *few_addresses[FEW];
    unsigned char few_dtypes[FEW];
    PyObject *few_arrays[FEW];
} Calls;

static unsigned long long num_calls;

static size_t outs_end(const Work *work) { return (size_t)work->first_out + work->num_outs; }

/* Repeat what a cell that is plain has. */
static void take_value(Work *work) {
    const Cell *cell = work->cell;
    work->value = cell->plain.address;
    work->numel = (size_t)cell->plain.numel;
    work->dtype = (unsigned char)cell->plain.dtype;
    work->own_first = cell->own_first;
    work->own_numel = cell->own_numel;
    work->owner = cell->owner;
}

static char *counter_of(const Work *work) {
    return work->numbers != NULL && work->counts_steps ? work->cell->state_addresses[MAX_STATES] : NULL;
}

/* The work of a key as the kernels take it. Always inline: to copy what was just written keeps the processor waiting. */
__attribute__((always_inline)) static inline Item item_of_work(const Calls *calls, const Work *work) {
    Item item = {.value = work->value,
                 .parts = (const char *const *)calls->addresses + work->first_part,
                 .outs = calls->addresses + work->first_out,
                 .out_dtypes = calls->dtypes + work->first_out,
                 .num_parts = work->num_parts,
                 .num_outs = work->num_outs,
                 .divisor = calls->averages ? (double)work->num_parts : 0};
    /* Elements are counted from the beginning of the whole. */
    int dtype = work->dtype, place = work->numbers == NULL ? MAX_STATES : place_of_average(work->numbers);
    for (int i = 0; work->numbers != NULL && i < work->num_states; i++) {
        size_t itemsize = i == place && is_low(dtype) ? sizeof(float) : ITEMSIZES[dtype];
        item.states[i] = (char *)((uintptr_t)work->cell->state_addresses[i] - work->own_first * itemsize);
    }
    return item;
}

static int begin_calls(Calls *calls, size_t num_keys) {
    calls->works = num_keys > 1 ? new_zeros(num_keys * sizeof(Work)) : calls->few_works;
    calls->addresses = calls->few_addresses;
    calls->dtypes = calls->few_dtypes;
    calls->arrays = calls->few_arrays;
    calls->room = FEW;
    return calls->works != NULL;
}

static void free_calls(Calls *calls) {
    for (size_t i = 0; i < calls->num_addresses; i++) {
        if (i + AHEAD < calls->num_addresses) __builtin_prefetch(calls->arrays[i + AHEAD], 1);
        Py_XDECREF(calls->arrays[i]);
    }
    for (size_t i = 0; i < calls->num_keys; i++) {
        if (i + AHEAD < calls->num_keys) __builtin_prefetch(calls->works[i + AHEAD].cell, 1);
        Py_XDECREF(calls->works[i].key);
        Py_XDECREF((PyObject *)calls->works[i].cell);
    }
    if (calls->works != calls->few_works) free_memory(calls->works);
    if (calls->addresses != calls->few_addresses) free_memory(calls->addresses);
    if (calls->dtypes != calls->few_dtypes) free_memory(calls->dtypes);
    if (calls->arrays != calls->few_arrays) free_memory(calls->arrays);
}

/* Return memory for more elements, with those that there are; NULL if there is none. */
static void *grown(void *memory, void *few, size_t count, size_t room, size_t itemsize) {
    void *larger = more_memory(memory == few ? NULL : memory, room * itemsize);
    if (larger != NULL && memory == few) memcpy(larger, few, count * itemsize);
    return larger;
}

static int add_array(Calls *calls, PyObject *array, const Plain *plain) {
    size_t count = calls->num_addresses, room = 2 * calls->room;
    if (count == calls->room) {
        if (room > UINT32_MAX) return 0;
        void *addresses = grown(calls->addresses, calls->few_addresses, count, room, sizeof *calls->addresses);
        if (addresses != NULL) calls->addresses = addresses;
        void *dtypes = grown(calls->dtypes, calls->few_dtypes, count, room, 1);
        if (dtypes != NULL) calls->dtypes = dtypes;
        void *arrays = grown(calls->arrays, calls->few_arrays, count, room, sizeof *calls->arrays);
        if (arrays != NULL) calls->arrays = arrays;
        if (addresses == NULL || dtypes == NULL || arrays == NULL) return 0;
        calls->room = room;
    }
    calls->addresses[calls->num_addresses] = plain->address;
    calls->dtypes[calls->num_addresses] = (unsigned char)plain->dtype;
    Py_XINCREF(array);
    calls->arrays[calls->num_addresses++] = array;
    return 1;
}

/* Whether a floating value can be copied to an out of another dtype: from and to float64 beside float32 alone. */
static int can_convert(int from, int to) {
    if (from > BFLOAT16 || to > BFLOAT16) return 0;
    return from == FLOAT64 ? to == FLOAT32 : to != FLOAT64 || from == FLOAT32;
}

static PyObject *item_of(PyObject *list, Py_ssize_t index) {
    return PyList_Check(list) ? PyList_GetItem(list, index) : PyTuple_GetItem(list, index);
}

/* The length of an exact list or tuple; -1 for anything else. */
static Py_ssize_t length_of(PyObject *list) {
    if (PyList_CheckExact(list)) return PyList_Size(list);
    return PyTuple_CheckExact(list) ? PyTuple_Size(list) : -1;
}

/* An item of a list, which may have become shorter; NULL if it is not there. */
static PyObject *item_ahead(PyObject *list, Py_ssize_t index) {
    return index < length_of(list) ? item_of(list, index) : NULL;
}

/* Have the processor fetch what torch holds of a tensor: where that is, is only a guess, on which nothing but time
 * depends. */
static void fetch_tensor(PyObject *array) {
    for (int word = 2; word < 4; word++) {
        const char *inside = ((const char *const *)array)[word];
        for (int line = 0; line < 4 && inside != NULL; line++) __builtin_prefetch(inside + 64 * line);
    }
}

/* Have the processor fetch an array of a list that is looked at soon. */
static void fetch_array(PyObject *list, Py_ssize_t index) {
    const char *object = (const char *)item_ahead(list, index + AHEAD);
    for (int line = 0; line < 2 && object != NULL; line++) __builtin_prefetch(object + 64 * line);
    PyObject *array = item_ahead(list, index + AHEAD / 2);
    if (array == NULL) return;
    if (is_torch(array)) {
        fetch_tensor(array);
    } else if ((PyObject *)Py_TYPE(array) == ndarray_type) {
        __builtin_prefetch(((const NumpyArray *)array)->dimensions);
    }
}

/* Have the processor fetch the cell of a key that is looked at soon. */
static void fetch_cell(const Calls *calls, size_t index) {
    const char *cell = index < calls->num_keys ? (const char *)calls->works[index].cell : NULL;
    for (int line = 0; line < 4 && cell != NULL; line++) __builtin_prefetch(cell + 64 * line);
}

/* Have the processor fetch the beginning of a key's parts, which are soon read, and of its outs, which are written. */
static void fetch_arrays(const Calls *calls, size_t index, int reads, int writes) {
    const Work *work = index < calls->num_keys ? &calls->works[index] : NULL;
    if (work == NULL) return;
    size_t nbytes = work->numel * ITEMSIZES[work->dtype];
    for (size_t i = work->first_part; i < work->first_out && reads; i++) fetch_to_read(calls->addresses[i], nbytes);
    for (size_t i = work->first_out; i < outs_end(work) && writes; i++) fetch_to_write(calls->addresses[i], nbytes);
}

/* Whether no tensor in an array, a list, or a list of lists is lazily negated, if that has to be asked; ``look_at`` sees
 * it otherwise. This may let other threads run. */
static int is_direct(PyObject *given, int depth) {
    if (negated_bit.is_known) return 1;
    Py_ssize_t length = length_of(given);
    if (length < 0) {
        return !is_torch(given) || !is_negated(given);
    }
    for (Py_ssize_t i = 0; depth && i < length_of(given); i++) {
        fetch_array(given, i);
        /* Another thread may remove it from the list meanwhile. */
        PyObject *each = Py_NewRef(item_of(given, i));
        int direct = is_direct(each, depth - 1);
        Py_DECREF(each);
        if (!direct) return 0;
    }
    return 1;
}

static int is_viewed(PyObject *array) {
    /* Types stay in the set. */
    static PyObject *last;
    PyObject *type = (PyObject *)Py_TYPE(array);
    if (type == ndarray_type || type == tensor_type || type == parameter_type) return 0;
    if (type != last && PySet_Contains(viewed_types, type) == 1) last = type;
    return type == last;
}

/* A new list of the first items of a list or tuple. */
static PyObject *first_items(PyObject *given, Py_ssize_t count) {
    PyObject *slice = PySequence_GetSlice(given, 0, count), *list = slice == NULL ? NULL : PySequence_List(slice);
    Py_XDECREF(slice);
    return list;
}

/* An array, a list, or a list of lists, with a view in place of each array that is viewed; the same object if there are
 * none. NULL: an array has no buffer, or is a view already, which callers do not give. This lets other threads run. */
static PyObject *viewed(PyObject *given, int depth) {
    Py_ssize_t length = length_of(given);
    if (PySet_Size(viewed_types) == 0) return Py_NewRef(given);
    if (length < 0) {
        if (PyMemoryView_Check(given)) return NULL;
        return is_viewed(given) ? PyMemoryView_FromObject(given) : Py_NewRef(given);
    }
    PyObject *list = NULL;
    for (Py_ssize_t i = 0; depth && i < length; i++) {
        /* Another thread may have removed it from the list, or remove it meanwhile. */
        PyObject *each = Py_XNewRef(item_ahead(given, i)), *found = each == NULL ? NULL : viewed(each, depth - 1);
        if (found != NULL && found != each && list == NULL) list = first_items(given, i);
        if (found == NULL || (found != each && list == NULL) || (list != NULL && PyList_Append(list, found))) {
            Py_XDECREF(each);
            Py_XDECREF(found);
            Py_XDECREF(list);
            return NULL;
        }
        Py_DECREF(each);
        Py_DECREF(found);
    }
    return list == NULL ? Py_NewRef(given) : list;
}

/* The values of a call, viewed, where neither they nor the outs have a lazily negated tensor that ``look_at`` would not
 * see; NULL: the call is not plain. This lets other threads run. */
static PyObject *direct_values(PyObject *values, PyObject *outs, int depth, int has_new_outs) {
    PyObject *views = viewed(values, depth);
    if (views == NULL || !is_direct(views, depth) || (!has_new_outs && !is_direct(outs, depth))) {
        PyErr_Clear();
        Py_CLEAR(views);
    }
    return views;
}

/* Take the parts or outs of one key; how many, or -1 if one is not as the value asks for. */
static Py_ssize_t take_arrays(Calls *calls, PyObject *given, const Plain *value, int writable) {
    Py_ssize_t length = length_of(given), count = length < 0 ? 1 : length;
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *array = length < 0 ? given : item_of(given, i);
        Plain plain;
        if (array == NULL || !look_at(array, &plain, writable) || !is_alike(&plain, value)) return -1;
        if (plain.kind != value->kind && !(writable && can_convert(value->dtype, plain.dtype))) return -1;
        if ((!writable && !has_clean_bools(&plain)) || !add_array(calls, array, &plain)) return -1;
        calls->total_nbytes += (size_t)plain.numel * ITEMSIZES[plain.dtype];
    }
    return count ? count : -1;
}

/* Bytes in which the arrays of a call's keys lie one after another, each at the next multiple of its element's size. */
typedef struct {
    Plain plain;
    size_t at;
    int is_there;
} Flat;

static size_t nbytes_of(const Plain *plain) { return (size_t)plain->numel * ITEMSIZES[plain->dtype]; }

static size_t aligned(size_t at, const Plain *plain) { return at + -at % ITEMSIZES[plain->dtype]; }

/* Take a piece for the next key; how many arrays, or -1 if there is no such piece. */
static Py_ssize_t take_piece(Calls *calls, Flat *flat, const Plain *value) {
    Plain piece = *value;
    size_t at = aligned(flat->at, value), nbytes = nbytes_of(value);
    /* Bytes may be no bools. */
    if (at + nbytes > nbytes_of(&flat->plain) || value->dtype == BOOL) return -1;
    piece.address = flat->plain.address + at;
    if (nbytes && (uintptr_t)piece.address % ITEMSIZES[value->dtype]) return -1;
    flat->at = at + nbytes;
    calls->total_nbytes += nbytes;
    return add_array(calls, NULL, &piece) ? 1 : -1;
}

/* Whether an array has the shape of a cell's value. */
static int is_alike_own(const Plain *plain, const Cell *cell) {
    if (!has_whole(cell) || plain->ndim == 0) return is_alike(plain, &cell->plain);
    return plain->ndim == cell->plain.ndim && (size_t)plain->numel == cell->own_numel &&
           !memcmp(plain->shape + 1, cell->plain.shape + 1, (size_t)(plain->ndim - 1) * sizeof *plain->shape);
}

static size_t own_nbytes(const Cell *cell) { return cell->own_numel * ITEMSIZES[cell->plain.dtype]; }

/* Whether a state has the kind of a value, or is the average of a value of float16 or bfloat16, which is float32. */
static int is_state_of(const Plain *value, const Plain *state, PyObject *name) {
    int is_average = PyUnicode_CompareWithASCIIString(name, "ema") == 0 && is_low(value->dtype);
    return is_average ? state->dtype == FLOAT32 : state->kind == value->kind;
}

/* The memory of a state of a name, of the value's dtype and shape or a single float; NULL if it is not there as such. */
static char *state_of(Cell *cell, int place, PyObject *name) {
    PyObject *tensor = PyDict_GetItemWithError(cell->state, name);
    Plain plain;
    if (tensor == NULL) return NULL;
    if (cell->bound_states[place] == tensor) return cell->state_addresses[place];
    if (!is_torch(tensor) || !look_at_torch(tensor, &plain)) return NULL;
    if (place == MAX_STATES ? plain.dtype != FLOAT32 || plain.numel != 1
                            : !is_state_of(&cell->plain, &plain, name) || !is_alike_own(&plain, cell))
        return NULL;
    PyObject *old = cell->bound_states[place];
    cell->bound_states[place] = Py_NewRef(tensor);
    /* Without elements there is nothing to read. */
    cell->state_addresses[place] = plain.address == NULL ? (char *)cell : plain.address;
    Py_XDECREF(old);
    return cell->state_addresses[place];
}

/* Whether a block has the states of these names, for the value that there is. */
static int is_in_block(const Cell *cell, PyObject *names) {
    PyObject *held = PyTuple_GetItem(cell->block, 0);
    Py_ssize_t count = PyTuple_Size(names);
    int is_same = PyTuple_Size(held) == count && cell->placed_nbytes == own_nbytes(cell);
    for (Py_ssize_t i = 0; held != names && i < count && is_same; i++)
        is_same = PyUnicode_Compare(PyTuple_GetItem(held, i), PyTuple_GetItem(names, i)) == 0;
    return is_same;
}

PyDoc_STRVAR(place_states_doc,
             "place_states(cells, names, columns, steps, make)\n--\n\n"
             "Give values without a state theirs, whose elements lie key by key in columns.\n\n"
             "Args:\n"
             "    cells: of plain values of one dtype, one after another in the columns.\n"
             "    names: of the states, in a tuple.\n"
             "    columns: a tuple of flat tensors, one for each name.\n"
             "    steps: a tensor with a float32 for each cell that counts its steps, or None.\n"
             "    make: makes of a value, its place and its first element in the columns the state as a dict.\n\n"
             "Raises:\n"
             "    ValueError: a value that is not plain, or other columns.");

static PyObject *place_states(PyObject *module, PyObject *args) {
    PyObject *cells, *names, *columns, *steps, *make;
    Plain column[MAX_STATES], counted = {.numel = 0};
    size_t offset = 0;
    (void)module;
    if (!PyArg_ParseTuple(args, "O!O!O!OO", &PyList_Type, &cells, &PyTuple_Type, &names, &PyTuple_Type, &columns, &steps,
                          &make))
        return NULL;
    Py_ssize_t count = PyList_Size(cells), num_names = PyTuple_Size(names);
    int fits = torch_api != NULL && num_names <= MAX_STATES && PyTuple_Size(columns) == num_names;
    for (Py_ssize_t i = 0; i < num_names && fits; i++) {
        PyObject *tensor = PyTuple_GetItem(columns, i);
        fits = PyUnicode_Check(PyTuple_GetItem(names, i)) && is_torch(tensor) && look_at_torch(tensor, &column[i]);
    }
    if (fits && steps != Py_None)
        fits = is_torch(steps) && look_at_torch(steps, &counted) && counted.dtype == FLOAT32 && counted.numel == count;
    for (Py_ssize_t i = 0; i < count && fits; i++) {
        PyObject *cell = PyList_GetItem(cells, i);
        const Plain *plain = PyObject_TypeCheck(cell, cell_type) ? plain_of((Cell *)cell) : NULL;
        for (Py_ssize_t j = 0; j < num_names && fits; j++)
            fits = plain != NULL && is_state_of(plain, &column[j], PyTuple_GetItem(names, j)) &&
                   offset + ((Cell *)cell)->own_numel <= (size_t)column[j].numel;
        offset += plain == NULL ? 0 : ((Cell *)cell)->own_numel;
    }
    PyObject *block = fits ? PyTuple_Pack(2, names, make) : NULL;
    if (block == NULL) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "place_states: values that are not plain, or other columns");
        return NULL;
    }
    offset = 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        Cell *cell = (Cell *)PyList_GetItem(cells, i);
        for (Py_ssize_t j = 0; j < num_names; j++)
            /* Without elements there is nothing to read. */
            cell->state_addresses[j] = column[j].numel ? column[j].address + offset * ITEMSIZES[column[j].dtype] : (char *)cell;
        cell->state_addresses[MAX_STATES] = counted.address + (size_t)i * sizeof(float);
        set_cell_state(cell, NULL, NULL);
        cell->block = Py_NewRef(block);
        cell->place = (size_t)i;
        cell->offset = offset;
        cell->placed_nbytes = own_nbytes(cell);
        cell->is_new = 1;
        offset += cell->own_numel;
    }
    Py_DECREF(block);
    return Py_NewRef(Py_None);
}

/* The step of an optimizer, as a tuple: its numbers in bytes, names of the states, whether it counts steps. */
static int bind_states(Work *work, PyObject *step) {
    static PyObject *step_name;
    PyObject *names = PyTuple_GetItem(step, 1);
    Cell *cell = work->cell;
    work->numbers = NULL;
    /* Another owner updates the value. */
    if (has_whole(cell) && !cell->own_numel) return 1;
    if (step_name == NULL) step_name = PyUnicode_InternFromString("step");
    work->numbers = (const Numbers *)PyBytes_AsString(PyTuple_GetItem(step, 0));
    work->counts_steps = PyTuple_GetItem(step, 2) == Py_True;
    Py_ssize_t count = PyTuple_Size(names);
    if (count > MAX_STATES) count = MAX_STATES;
    work->num_states = (unsigned char)count;
    if (cell->block != NULL) return is_in_block(cell, names);
    if (cell->state == NULL || !PyDict_CheckExact(cell->state))
        return cell->state == NULL && count == 0 && !work->counts_steps;
    for (Py_ssize_t i = 0; i < count; i++)
        if (state_of(cell, (int)i, PyTuple_GetItem(names, i)) == NULL) return 0;
    return !work->counts_steps || state_of(cell, MAX_STATES, step_name) != NULL;
}

/* ------------------------------------------------------------ memory that two arrays share */

typedef struct {
    uintptr_t start, stop;
    int is_out;
} Span;

/* Sort spans by where they start, by 11 bits at a time; returns which of the two arrays is sorted. */
static Span *sort_spans(Span *spans, Span *other, size_t count) {
    uintptr_t differing = 0;
    for (size_t i = 1; i < count; i++) differing |= spans[i].start ^ spans[0].start;
    for (unsigned shift = 0; shift < 64; shift += 11) {
        size_t places[2048] = {0}, before = 0;
        if (!(differing >> shift & 2047)) continue;
        for (size_t i = 0; i < count; i++) places[spans[i].start >> shift & 2047]++;
        for (size_t digit = 0; digit < 2048; digit++) {
            size_t number = places[digit];
            places[digit] = before;
            before += number;
        }
        for (size_t i = 0; i < count; i++) other[places[spans[i].start >> shift & 2047]++] = spans[i];
        Span *swapped = spans;
        spans = other;
        other = swapped;
    }
    return spans;
}

static Span *sort_few_or_many(Span *spans, Span *other, size_t count) {
    if (count > 64) return sort_spans(spans, other, count);
    for (size_t i = 1; i < count; i++) {
        Span span = spans[i];
        size_t j = i;
        for (; j && spans[j - 1].start > span.start; j--) spans[j] = spans[j - 1];
        spans[j] = span;
    }
    return spans;
}

/* Whether the outs can be filled key by key and block by block: an out may be a part of its key, element for element;
 * other memory of parts and outs it must not touch. -1: no memory. */
static int are_apart(const Calls *calls) {
    Span few[32], *spans = few;
    size_t count = 0, room = calls->num_addresses;
    int apart = 1;
    if (room > 16 && (spans = new_memory(2 * room * sizeof *spans)) == NULL) return -1;
    for (size_t key = 0; key < calls->num_keys; key++) {
        const Work *work = &calls->works[key];
        size_t end = outs_end(work);
        for (size_t i = work->first_part; i < end; i++) {
            int is_out = i >= work->first_out, is_own = 0;
            for (size_t j = work->first_out; !is_out && j < end; j++)
                is_own |= calls->addresses[j] == calls->addresses[i] && calls->dtypes[j] == calls->dtypes[i];
            size_t nbytes = work->numel * ITEMSIZES[calls->dtypes[i]];
            uintptr_t start = (uintptr_t)calls->addresses[i];
            if (nbytes && !is_own) spans[count++] = (Span){start, start + nbytes, is_out};
        }
    }
    const Span *sorted = count < 2 ? spans : sort_few_or_many(spans, spans + (spans == few ? 16 : room), count);
    uintptr_t any = 0, out = 0;
    for (size_t i = 0; i < count && apart; i++) {
        apart = sorted[i].start >= (sorted[i].is_out ? any : out);
        if (sorted[i].stop > any) any = sorted[i].stop;
        if (sorted[i].is_out && sorted[i].stop > out) out = sorted[i].stop;
    }
    if (spans != few) free_memory(spans);
    return apart;
}

/* ------------------------------------------------------------ batches */

PyDoc_STRVAR(batch_doc, "A call whose arrays are plain, with what it does for each key.");

typedef struct {
    PyObject_HEAD
    PyObject *entries, *step, *own_steps;
    PyObject *unready; /* a list of the cells whose states are to be completed first; NULL: there are none */
    PyObject *flat_values, *flat_outs; /* the arrays of ``values`` and ``outs``, if there are any */
    Calls calls;
    Flat values, outs;
    unsigned long long number;
    double scale;      /* of all gradients, beside rescale_grad */
    ExactSum *squares; /* of the sums; NULL: not asked for */
    int pushes, pulls, is_remote, has_wholes, is_frozen, has_new_outs, is_done;
    char past_cache;
} Batch;

static PyTypeObject *batch_type;

static void batch_dealloc(Batch *batch) {
    PyTypeObject *type = Py_TYPE((PyObject *)batch);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    free_calls(&batch->calls);
    PyMem_Free(batch->squares);
    Py_XDECREF(batch->entries);
    Py_XDECREF(batch->step);
    Py_XDECREF(batch->own_steps);
    Py_XDECREF(batch->unready);
    Py_XDECREF(batch->flat_values);
    Py_XDECREF(batch->flat_outs);
    release(batch);
    Py_DECREF(type);
}

/* Keys of other types are not plain: to look them up may run code of Python. */
static int is_key(PyObject *key) { return PyUnicode_CheckExact(key) || PyLong_CheckExact(key); }

/* Find what there is of a key; whether there is something. It is not held yet. */
static int find_key(Work *work, PyObject *entries, PyObject *key) {
    /* Lists may have become shorter while other threads ran. */
    if (key == NULL || !is_key(key)) return 0;
    work->key = key;
    work->cell = (Cell *)PyDict_GetItemWithError(entries, key);
    __builtin_prefetch(work->cell, 1);
    return work->cell != NULL;
}

/* Hold the key of the next work, and its cell; whether it is one. */
static int hold_key(Calls *calls) {
    Work *work = &calls->works[calls->num_keys];
    if (!PyObject_TypeCheck((PyObject *)work->cell, cell_type)) return 0;
    Py_INCREF(work->key);
    Py_INCREF((PyObject *)work->cell);
    calls->num_keys++;
    return 1;
}

/* Find and hold the cells of all keys; whether there is one for each. */
static int take_keys(Calls *calls, PyObject *entries, PyObject *keys) {
    Py_ssize_t length = length_of(keys), count = length < 0 ? 1 : length, behind = count < AHEAD ? count : AHEAD;
    /* A cell is held when it has come into the cache. No code of Python runs meanwhile. */
    for (Py_ssize_t i = 0; i < count + behind; i++) {
        if (length >= 0) __builtin_prefetch(item_ahead(keys, i + AHEAD));
        if (i < count && !find_key(&calls->works[i], entries, length < 0 ? keys : item_ahead(keys, i))) return 0;
        if (i >= behind && !hold_key(calls)) return 0;
    }
    return 1;
}

/* Take the arrays of a key; 1: taken, 0: not plain, 2: plain, but its state is to be completed. */
static int take_work(Batch *batch, Work *work, PyObject *value, PyObject *out, PyObject *step, PyObject *own_steps) {
    Calls *calls = &batch->calls;
    Cell *cell = work->cell;
    const Plain *plain = plain_of(cell);
    if (plain == NULL || cell->named == batch->number || is_there(cell->incomplete)) return 0;
    if ((batch->pushes && value == NULL) || (batch->pulls && out == NULL)) return 0;
    cell->named = batch->number;
    take_value(work);
    batch->is_remote |= cell->is_remote;
    batch->has_wholes &= has_whole(cell);
    batch->is_frozen |= is_there(cell->frozen);
    work->first_part = (uint32_t)calls->num_addresses;
    if (batch->pushes) {
        Py_ssize_t count =
            batch->values.is_there ? take_piece(calls, &batch->values, plain) : take_arrays(calls, value, plain, 0);
        if (count < 0) return 0;
        work->num_parts = (uint32_t)count;
    }
    work->first_out = (uint32_t)calls->num_addresses;
    if (batch->pulls) {
        Py_ssize_t count =
            batch->outs.is_there ? take_piece(calls, &batch->outs, plain) : take_arrays(calls, out, plain, 1);
        if (count < 0) return 0;
        work->num_outs = (uint32_t)count;
    }
    if (step == Py_None) return 1;
    if (plain->dtype > BFLOAT16) return 0;
    PyObject *own = own_steps == Py_None ? NULL : PyDict_GetItemWithError(own_steps, work->key);
    return bind_states(work, own == NULL ? step : own) ? 1 : 2;
}

/* Look at an array of bytes for the arrays of all keys, if there is one; whether that is plain. */
static int take_flat(Flat *flat, PyObject *given, int writable) {
    if (given == Py_None) return 1;
    flat->is_there = look_at(given, &flat->plain, writable) && flat->plain.kind == (CODE_UINT << 8 | 8) &&
                     flat->plain.ndim == 1;
    return flat->is_there;
}

/* Whether a flat array ends where the last piece does. */
static int is_full(const Flat *flat) { return !flat->is_there || flat->at == nbytes_of(&flat->plain); }

PyDoc_STRVAR(look_doc,
             "look(entries, keys, values, outs, step, own_steps, flat=False)\n--\n\n"
             "Return a batch of what a call does, without doing it.\n\n"
             "Args:\n"
             "    entries: a dict of key to Cell.\n"
             "    keys: one key, or a list or tuple of them.\n"
             "    values: None, an array or a list of parts; of a list of keys, a list of these.\n"
             "    outs: likewise.\n"
             "    flat: values and outs are each one array of bytes, in which the arrays of a list of keys lie one\n"
             "        after another, each at the next multiple of its element's size.\n"
             "    step: None, or the optimizer's step: (numbers, names of the states, whether it counts steps).\n"
             "    own_steps: None, or a dict of steps of single keys.\n\n"
             "Returns:\n"
             "    a Batch; None if an array, or a value, is not plain.");

/* What ``look`` returns, its arguments being: where no tensor is lazily negated. No other thread runs meanwhile, but
 * for what Python's garbage collector may call. */
static PyObject *new_batch(PyObject *entries, PyObject *keys, PyObject *values, PyObject *outs, PyObject *step,
                           PyObject *own_steps, int is_flat) {
    Py_ssize_t length = length_of(keys), count = length < 0 ? 1 : length;
    Flat value_flat = {.is_there = 0}, out_flat = {.is_there = 0};
    if (is_flat) {
        if (length < 0 || !take_flat(&value_flat, values, 0) || !take_flat(&out_flat, outs, 1)) return Py_NewRef(Py_None);
    } else if (length >= 0 && ((values != Py_None && length_of(values) != length) ||
                               (outs != Py_None && length_of(outs) != length)))
        return Py_NewRef(Py_None);
    static allocfunc allocate;
    if (allocate == NULL) allocate = (allocfunc)PyType_GetSlot(batch_type, Py_tp_alloc);
    Batch *batch = (Batch *)allocate(batch_type, 0);
    if (batch == NULL) return NULL;
    if (!begin_calls(&batch->calls, (size_t)count)) {
        Py_DECREF(batch);
        return PyErr_NoMemory();
    }
    batch->entries = Py_NewRef(entries);
    batch->step = Py_NewRef(step);
    batch->own_steps = Py_NewRef(own_steps);
    if (is_flat) {
        batch->flat_values = Py_NewRef(values);
        batch->flat_outs = Py_NewRef(outs);
    }
    batch->scale = 1;
    batch->has_wholes = 1;
    batch->pushes = values != Py_None;
    batch->pulls = outs != Py_None;
    batch->values = value_flat;
    batch->outs = out_flat;
    batch->number = ++num_calls;
    if (!take_keys(&batch->calls, entries, keys)) goto not_plain;
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *value = length < 0 || is_flat || !batch->pushes ? values : item_ahead(values, i);
        PyObject *out = length < 0 || is_flat || !batch->pulls ? outs : item_ahead(outs, i);
        fetch_cell(&batch->calls, (size_t)i + AHEAD);
        if (length >= 0 && !is_flat && batch->pushes) fetch_array(values, i);
        if (length >= 0 && !is_flat && batch->pulls) fetch_array(outs, i);
        Work *work = &batch->calls.works[i];
        int taken = take_work(batch, work, value, out, step, own_steps);
        if (taken == 2) {
            if (batch->unready == NULL) batch->unready = PyList_New(0);
            if (batch->unready == NULL || PyList_Append(batch->unready, (PyObject *)work->cell)) taken = 0;
        }
        if (!taken) goto not_plain;
    }
    if (!is_full(&batch->values) || !is_full(&batch->outs)) goto not_plain;
    if (batch->pulls && are_apart(&batch->calls) != 1) goto not_plain;
    return (PyObject *)batch;
not_plain:
    Py_DECREF(batch);
    PyErr_Clear();
    return Py_NewRef(Py_None);
}

static PyObject *look(PyObject *module, PyObject *args) {
    PyObject *entries, *keys, *values, *outs, *step, *own_steps;
    int is_flat = 0;
    (void)module;
    if (!PyArg_ParseTuple(args, "O!OOOOO|p", &PyDict_Type, &entries, &keys, &values, &outs, &step, &own_steps, &is_flat))
        return NULL;
    int depth = length_of(keys) < 0 ? 1 : 2;
    PyObject *views = torch_api == NULL ? NULL : direct_values(values, outs, depth, 0);
    if (views == NULL) return Py_NewRef(Py_None);
    PyObject *found = new_batch(entries, keys, views, outs, step, own_steps, is_flat);
    Py_DECREF(views);
    return found;
}

/* Whether values and states are those that ``look`` has seen, and are here. */
static int is_current(Batch *batch) {
    if (batch->is_remote) return 0;
    for (size_t i = 0; i < batch->calls.num_keys; i++) {
        Work *work = &batch->calls.works[i];
        if (PyDict_GetItemWithError(batch->entries, work->key) != (PyObject *)work->cell) return 0;
        if (work->cell->value != work->cell->bound || is_there(work->cell->incomplete)) return 0;
        take_value(work);
        if (batch->step == Py_None) continue;
        PyObject *own = batch->own_steps == Py_None ? NULL : PyDict_GetItemWithError(batch->own_steps, work->key);
        if (!bind_states(work, own == NULL ? batch->step : own)) return 0;
    }
    return 1;
}

/* The step of a key, if there is one. */
static const Step *step_for(const Batch *batch, const Work *work, Step *step) {
    if (work->numbers == NULL) return NULL;
    const float *counter = (const float *)counter_of(work);
    *step = step_of(work->numbers, batch->scale, counter == NULL ? 1 : (double)*counter + 1, work->cell->is_new);
    return step;
}

/* Do the elements from start to stop, counted through all keys. */
static void run_range(Batch *batch, size_t start, size_t stop) {
    size_t before = 0;
    for (size_t i = 0; i < batch->calls.num_keys && before < stop; i++) {
        const Work *work = &batch->calls.works[i];
        size_t numel = work->numel;
        size_t first = start > before ? start - before : 0, last = stop - before < numel ? stop - before : numel;
        before += numel;
        if (first >= last) continue;
        fetch_cell(&batch->calls, i + AHEAD);
        fetch_arrays(&batch->calls, i + FETCHED_AHEAD, 1, !batch->past_cache);
        Step step;
        Item item = item_of_work(&batch->calls, work);
        /* The value, too. */
        item.num_past_cache = batch->past_cache ? item.num_outs + 1 : 0;
        run_item(&item, work->dtype, step_for(batch, work, &step), first, last);
    }
#if defined(__x86_64__)
    if (batch->past_cache) _mm_sfence();
#endif
}

/* Raise the versions of torch's outs, so many at a time that they are still in the cache when torch sees them: autograd
 * has to know that an array is not what it was. */
static void raise_versions(const Calls *calls) {
    enum { AT_A_TIME = 64 };
    PyObject *written = NULL;
    for (size_t i = 0; i <= calls->num_keys; i++) {
        if (written != NULL && (i == calls->num_keys || PyList_Size(written) >= AT_A_TIME)) {
            Py_XDECREF(PyObject_CallFunctionObjArgs(increment_version, written, NULL));
            Py_CLEAR(written);
        }
        const Work *work = i < calls->num_keys ? &calls->works[i] : NULL;
        for (size_t j = work == NULL ? 0 : work->first_out; work != NULL && j < outs_end(work); j++) {
            if (calls->arrays[j] == NULL || !is_torch(calls->arrays[j])) continue;
            fetch_tensor(calls->arrays[j]);
            if (written == NULL) written = PyList_New(0);
            if (written != NULL) PyList_Append(written, calls->arrays[j]);
        }
    }
    PyErr_Clear();
}

/* Count what was done: versions of keys and steps of optimizers if values were updated, and versions of torch's outs.
 * ``left_out``: for each key whether its value was left as it was; NULL: none was. */
static void count_done(Batch *batch, int is_update, const char *left_out) {
    batch->is_done = 1;
    for (size_t i = 0; i < batch->calls.num_keys; i++) {
        const Work *work = &batch->calls.works[i];
        fetch_cell(&batch->calls, i + AHEAD);
        if (!is_update || (left_out != NULL && left_out[i])) continue;
        float *counter = (float *)counter_of(work);
        work->cell->version++;
        if (work->numbers != NULL) work->cell->is_new = 0;
        if (counter != NULL) *counter += 1;
    }
    if (batch->pulls && !batch->has_new_outs) raise_versions(&batch->calls);
}

/* The bytes of the arrays of a key. */
static size_t moved_by(const Calls *calls, const Work *work) {
    size_t nbytes = 0;
    for (size_t i = work->first_part; i < outs_end(work); i++) nbytes += work->numel * ITEMSIZES[calls->dtypes[i]];
    return nbytes;
}

static PyObject *batch_unready(Batch *batch, void *closure) {
    (void)closure;
    return Py_NewRef(batch->unready == NULL ? Py_None : batch->unready);
}

static PyObject *batch_keys(Batch *batch, void *closure) {
    PyObject *keys = PyTuple_New((Py_ssize_t)batch->calls.num_keys);
    (void)closure;
    for (size_t i = 0; i < batch->calls.num_keys && keys != NULL; i++)
        PyTuple_SetItem(keys, (Py_ssize_t)i, Py_NewRef(batch->calls.works[i].key));
    return keys;
}

static PyObject *batch_cells(Batch *batch, void *closure) {
    PyObject *cells = PyList_New((Py_ssize_t)batch->calls.num_keys);
    (void)closure;
    for (size_t i = 0; i < batch->calls.num_keys && cells != NULL; i++)
        PyList_SetItem(cells, (Py_ssize_t)i, Py_NewRef((PyObject *)batch->calls.works[i].cell));
    return cells;
}

/* The array that is the sum of all keys, if there is just one, and not only a view of it. */
static PyObject *batch_sums(Batch *batch, void *closure) {
    PyObject *sums = batch->flat_values;
    (void)closure;
    if (sums == NULL && batch->calls.num_keys == 1 && batch->calls.works[0].num_parts == 1)
        sums = batch->calls.arrays[batch->calls.works[0].first_part];
    return Py_NewRef(sums == NULL || PyMemoryView_Check(sums) ? Py_None : sums);
}

static PyObject *batch_numel(Batch *batch, void *closure) {
    size_t numel = 0;
    (void)closure;
    for (size_t i = 0; i < batch->calls.num_keys; i++) numel += batch->calls.works[i].numel;
    return PyLong_FromSize_t(numel);
}

static PyObject *batch_nbytes(Batch *batch, void *closure) {
    (void)closure;
    return PyLong_FromSize_t(batch->calls.total_nbytes);
}

static PyObject *batch_run(Batch *batch, PyObject *args) {
    Py_ssize_t start, stop;
    if (!PyArg_ParseTuple(args, "nn", &start, &stop)) return NULL;
    Py_BEGIN_ALLOW_THREADS;
    run_range(batch, (size_t)start, (size_t)stop);
    Py_END_ALLOW_THREADS;
    return Py_NewRef(Py_None);
}

/* Make means of the sums: each is divided by the number of its parts; whether all are of floating-point numbers. */
static int average(Batch *batch) {
    for (size_t i = 0; i < batch->calls.num_keys; i++)
        if (batch->calls.works[i].dtype > BFLOAT16) return 0;
    return batch->calls.averages = 1;
}

static PyObject *batch_average(Batch *batch, PyObject *none) {
    (void)none;
    return PyBool_FromLong(average(batch));
}

/* How many parts each key has, as 64-bit numbers. */
static PyObject *batch_part_counts(Batch *batch, void *closure) {
    PyObject *counts = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(8 * batch->calls.num_keys));
    (void)closure;
    int64_t *at = counts == NULL ? NULL : (int64_t *)PyBytes_AsString(counts);
    for (size_t i = 0; i < batch->calls.num_keys && at != NULL; i++)
        at[i] = (int64_t)batch->calls.works[i].num_parts;
    return counts;
}

/* The next beginning of a group of a key's elements, or the end of them. */
static size_t group_from(size_t at, size_t numel) {
    size_t up = (at + GROUP - 1) / GROUP * GROUP;
    return up < numel ? up : numel;
}

static PyObject *batch_add_squares(Batch *batch, PyObject *args) {
    double rescale;
    Py_ssize_t start, stop;
    if (!PyArg_ParseTuple(args, "dnn", &rescale, &start, &stop)) return NULL;
    if (batch->squares == NULL && (batch->squares = PyMem_Calloc(1, sizeof *batch->squares)) == NULL) return PyErr_NoMemory();
    ExactSum own;
    memset(&own, 0, sizeof own);
    Py_BEGIN_ALLOW_THREADS;
    size_t before = 0, from = (size_t)start, to = (size_t)stop;
    for (size_t i = 0; i < batch->calls.num_keys && before < to; i++) {
        const Work *work = &batch->calls.works[i];
        size_t numel = work->numel;
        size_t first = from > before ? group_from(from - before, numel) : 0;
        size_t last = to - before < numel ? group_from(to - before, numel) : numel;
        before += numel;
        if (first >= last || work->dtype > BFLOAT16) continue;
        Item item = item_of_work(&batch->calls, work);
        square_item(&item, work->dtype, rescale, first, last, &own);
    }
    Py_END_ALLOW_THREADS;
    merge_exact(batch->squares, &own);
    return Py_NewRef(Py_None);
}

/* A sum whose limbs have 32 bits each, as little-endian bytes, and the rest. */
static PyObject *pack_exact(const ExactSum *sum) {
    unsigned char bytes[4 * NUM_LIMBS];
    for (int i = 0; i < 4 * NUM_LIMBS; i++) bytes[i] = (unsigned char)(sum->limbs[i / 4] >> 8 * (i % 4));
    return Py_BuildValue("y#d", bytes, (Py_ssize_t)sizeof bytes, sum->rest);
}

static PyObject *batch_squares(Batch *batch, void *closure) {
    static const ExactSum nothing;
    (void)closure;
    return pack_exact(batch->squares == NULL ? &nothing : batch->squares);
}

static PyObject *batch_begin(Batch *batch, PyObject *args) {
    PyObject *entries = NULL, *step = NULL;
    int past_cache;
    if (!PyArg_ParseTuple(args, "p|OO", &past_cache, &entries, &step)) return NULL;
    batch->past_cache = (char)past_cache;
    int is_of = (entries == NULL || entries == batch->entries) && (step == NULL || step == batch->step);
    return PyBool_FromLong(is_of && is_current(batch));
}

static PyObject *batch_finish(Batch *batch, PyObject *args) {
    int is_update = batch->pushes || !batch->pulls;
    if (!PyArg_ParseTuple(args, "|p", &is_update)) return NULL;
    count_done(batch, is_update, NULL);
    return Py_NewRef(Py_None);
}

/* ------------------------------------------------------------ batches by pieces */

/* A piece of a key's value: its place in the call, and which elements. */
typedef struct {
    int64_t key, first, count;
} Piece;

/* An address such that the elements of a piece, counted from the beginning of the key's value, are where they are. */
static char *before(uint64_t address, const Piece *piece, int dtype) {
    return (char *)((uintptr_t)address - (uintptr_t)piece->first * ITEMSIZES[dtype]);
}

static int sum_dtype_of(int dtype) { return is_low(dtype) ? FLOAT32 : dtype; }

/* To stage is to sum for others, who add sums of theirs before they divide. */
enum { SUM_PIECES, STAGE_PIECES, COPY_PIECES, UPDATE_PIECES };

/* How columns hold the numbers of values: as these do, or those of float16 and bfloat16 as float32, or those of float32
 * and float64 as FLOAT16 or BFLOAT16. */
enum { AS_VALUES, WIDE };

static int column_dtype_of(int dtype, int columns_as) {
    if (columns_as == AS_VALUES) return dtype;
    if (columns_as == WIDE) return sum_dtype_of(dtype);
    return dtype == FLOAT32 || dtype == FLOAT64 ? columns_as : dtype;
}

static void run_piece(Batch *batch, const Piece *piece, const uint64_t *addresses, size_t count, double divisor,
                      int64_t from, int64_t to, int columns_as, int mode) {
    const Work *work = &batch->calls.works[piece->key];
    int dtype = work->dtype, other = column_dtype_of(dtype, columns_as);
    const char *parts[MAX_COLUMNS];
    char *target;
    Item item = item_of_work(&batch->calls, work);
    Step space;
    const Step *step = NULL;
    if (mode == SUM_PIECES || mode == STAGE_PIECES) {
        target = before(addresses[0], piece, other);
        item.value = NULL;
        item.outs = &target;
        item.out_dtypes = NULL;
        item.num_outs = 1;
        item.num_past_cache = 0;
        if (mode == STAGE_PIECES) item.divisor = 0;
        item.has_wide_outs = other != dtype;
    } else {
        for (size_t i = 0; i < count; i++) parts[i] = before(addresses[i], piece, other);
        item.parts = parts;
        item.num_parts = count;
        item.divisor = divisor;
        item.has_wide_parts = columns_as == WIDE && other != dtype;
        item.num_past_cache = batch->past_cache ? item.num_outs : 0;
        if (mode == COPY_PIECES) {
            item.value = NULL;
        } else {
            item.num_outs = item.num_past_cache = 0;
            step = step_for(batch, work, &space);
        }
    }
    /* Narrow numbers are copied to the outs, which may be of another dtype. */
    int copied = mode == COPY_PIECES && columns_as > WIDE ? other : dtype;
    run_item(&item, copied, step, (size_t)(piece->first + from), (size_t)(piece->first + to));
}

static PyObject *run_by_pieces(Batch *batch, PyObject *pieces, PyObject *columns, PyObject *divisors, Py_ssize_t start,
                               Py_ssize_t stop, int columns_as, int mode) {
    const uint64_t *found[MAX_COLUMNS];
    Py_ssize_t num_columns = PyList_Size(columns), nbytes = PyBytes_Size(pieces), count = nbytes / (Py_ssize_t)sizeof(Piece);
    const Piece *all = (const Piece *)PyBytes_AsString(pieces);
    int fits = num_columns > 0 && num_columns <= MAX_COLUMNS && nbytes % (Py_ssize_t)sizeof(Piece) == 0;
    for (Py_ssize_t i = 0; i < num_columns && fits; i++) {
        PyObject *column = PyList_GetItem(columns, i);
        fits = PyBytes_Check(column) && PyBytes_Size(column) == 8 * count;
        found[i] = fits ? (const uint64_t *)PyBytes_AsString(column) : NULL;
    }
    const double *divided = NULL;
    if (divisors != Py_None && fits) {
        fits = PyBytes_Check(divisors) && PyBytes_Size(divisors) == 8 * count;
        divided = fits ? (const double *)PyBytes_AsString(divisors) : NULL;
    }
    for (Py_ssize_t i = 0; i < count && fits; i++)
        fits = all[i].key >= 0 && all[i].key < (int64_t)batch->calls.num_keys && all[i].first >= 0 && all[i].count >= 0 &&
               all[i].first <= (int64_t)batch->calls.works[all[i].key].numel - all[i].count;
    if (!fits || (mode == UPDATE_PIECES && batch->is_remote)) {
        PyErr_SetString(PyExc_ValueError, "a piece outside of its value, or columns of another length");
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS;
    Py_ssize_t done = 0;
    uint64_t addresses[MAX_COLUMNS];
    for (Py_ssize_t i = 0; i < count && done < stop; done += (Py_ssize_t)all[i++].count) {
        int64_t from = start > done ? start - done : 0, to = stop - done < all[i].count ? stop - done : all[i].count;
        double divisor = divided == NULL ? 0 : divided[i];
        for (Py_ssize_t j = 0; j < num_columns && from < to; j++) addresses[j] = found[j][i];
        if (from < to) run_piece(batch, &all[i], addresses, (size_t)num_columns, divisor, from, to, columns_as, mode);
    }
#if defined(__x86_64__)
    if (batch->past_cache) _mm_sfence();
#endif
    Py_END_ALLOW_THREADS;
    return Py_NewRef(Py_None);
}

static PyObject *by_pieces(Batch *batch, PyObject *args, int mode) {
    PyObject *pieces, *columns, *divisors = Py_None;
    Py_ssize_t start = 0, stop = PY_SSIZE_T_MAX;
    int columns_as = AS_VALUES;
    int fits = mode == UPDATE_PIECES
                   ? PyArg_ParseTuple(args, "SO!|iO", &pieces, &PyList_Type, &columns, &columns_as, &divisors)
                   : PyArg_ParseTuple(args, "SO!|inn", &pieces, &PyList_Type, &columns, &columns_as, &start, &stop);
    if (!fits) return NULL;
    int is_narrow = columns_as != AS_VALUES && columns_as != WIDE;
    if (is_narrow && (mode != COPY_PIECES || !is_low(columns_as) || PyList_Size(columns) != 1)) {
        PyErr_SetString(PyExc_ValueError, "expected numbers as values have them, or wide; a copy may be of narrow ones");
        return NULL;
    }
    return run_by_pieces(batch, pieces, columns, divisors, start, stop, columns_as, mode);
}

static PyObject *batch_sum_pieces(Batch *batch, PyObject *args) { return by_pieces(batch, args, SUM_PIECES); }

static PyObject *batch_copy_pieces(Batch *batch, PyObject *args) { return by_pieces(batch, args, COPY_PIECES); }

static PyObject *batch_update_pieces(Batch *batch, PyObject *args) { return by_pieces(batch, args, UPDATE_PIECES); }

static PyObject *batch_part_column(Batch *batch, PyObject *pieces) {
    Py_ssize_t count = PyBytes_Check(pieces) ? PyBytes_Size(pieces) / (Py_ssize_t)sizeof(Piece) : 0;
    const Piece *all = count ? (const Piece *)PyBytes_AsString(pieces) : NULL;
    PyObject *column = PyBytes_FromStringAndSize(NULL, 8 * count);
    uint64_t *at = column == NULL ? NULL : (uint64_t *)PyBytes_AsString(column);
    for (Py_ssize_t i = 0; i < count && at != NULL; i++) {
        const Work *work = (size_t)all[i].key < batch->calls.num_keys ? &batch->calls.works[all[i].key] : NULL;
        if (work == NULL || work->num_parts != 1) {
            Py_DECREF(column);
            return Py_NewRef(Py_None);
        }
        at[i] = (uint64_t)(uintptr_t)(batch->calls.addresses[work->first_part] +
                                       (size_t)all[i].first * ITEMSIZES[work->dtype]);
    }
    return column;
}

/* Text of at most so many bytes; ``at`` is how many it would have. */
typedef struct {
    char *text;
    size_t at, most;
} Text;

static void add_text(Text *text, const char *more, size_t length) {
    if (text->at < text->most) memcpy(text->text + text->at, more, length < text->most - text->at ? length : text->most - text->at);
    text->at += length;
}

/* Add a key as JSON has it; whether it is a short number, or a str of characters that stand for themselves. */
static int add_key(Text *text, PyObject *key) {
    if (PyLong_CheckExact(key)) {
        int overflow;
        char digits[32];
        long long number = PyLong_AsLongLongAndOverflow(key, &overflow);
        if (!overflow) add_text(text, digits, (size_t)PyOS_snprintf(digits, sizeof digits, "%lld", number));
        return !overflow;
    }
    Py_ssize_t length;
    const char *found = PyUnicode_AsUTF8AndSize(key, &length);
    for (Py_ssize_t i = 0; found != NULL && i < length; i++)
        if (found[i] < ' ' || found[i] > '~' || found[i] == '"' || found[i] == '\\') found = NULL;
    if (found == NULL) return 0;
    add_text(text, "\"", 1);
    add_text(text, found, (size_t)length);
    add_text(text, "\"", 1);
    return 1;
}

static PyObject *batch_describe(Batch *batch, PyObject *args) {
    unsigned long long digest;
    const char *begin;
    Py_ssize_t begin_length, most;
    if (!PyArg_ParseTuple(args, "Ks#n", &digest, &begin, &begin_length, &most)) return NULL;
    PyObject *described = PyBytes_FromStringAndSize(NULL, most);
    if (described == NULL) return NULL;
    Text text = {PyBytes_AsString(described), 0, (size_t)most};
    add_text(&text, begin, (size_t)begin_length);
    int is_plain = 1;
    for (size_t i = 0; i < batch->calls.num_keys; i++) {
        const Work *work = &batch->calls.works[i];
        fetch_cell(&batch->calls, i + AHEAD);
        digest = (digest ^ work->cell->digest) * 0x9E3779B97F4A7C15u;
        digest ^= digest >> 32;
        if (text.at >= text.most || !is_plain) continue;
        if (i) add_text(&text, ", ", 2);
        is_plain = add_key(&text, work->key);
    }
    add_text(&text, "]}", 2);
    PyErr_Clear();
    PyObject *result = is_plain ? Py_BuildValue("Ky#", digest, text.text, (Py_ssize_t)(text.at < text.most ? text.at : text.most))
                                : Py_BuildValue("KO", digest, Py_None);
    Py_DECREF(described);
    return result;
}

/* Where the values of all keys lie one after another, and the bytes of all; or their pieces, each a whole value. */
static PyObject *batch_packed(Batch *batch, PyObject *none) {
    size_t at = 0, count = batch->calls.num_keys;
    (void)none;
    PyObject *pieces = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(count * sizeof(Piece)));
    PyObject *places = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(8 * count));
    if (pieces != NULL && places != NULL) {
        Piece *each = (Piece *)PyBytes_AsString(pieces);
        uint64_t *place = (uint64_t *)PyBytes_AsString(places);
        for (size_t i = 0; i < count; i++) {
            const Plain *plain = &batch->calls.works[i].cell->plain;
            each[i] = (Piece){(int64_t)i, 0, plain->numel};
            place[i] = at = aligned(at, plain);
            at += nbytes_of(plain);
        }
    }
    PyObject *result = pieces == NULL || places == NULL ? NULL : Py_BuildValue("OOn", pieces, places, (Py_ssize_t)at);
    Py_XDECREF(pieces);
    Py_XDECREF(places);
    return result;
}

/* Have one part for each key: a piece of a flat array. */
static PyObject *batch_take_sums(Batch *batch, PyObject *given) {
    Flat flat = {.is_there = 0};
    size_t at = 0;
    int fits = batch->pushes && take_flat(&flat, given, 0) && flat.is_there;
    for (size_t i = 0; i < batch->calls.num_keys && fits; i++) {
        const Work *work = &batch->calls.works[i];
        at = aligned(at, &work->cell->plain);
        fits = at + nbytes_of(&work->cell->plain) <= nbytes_of(&flat.plain);
        at += nbytes_of(&work->cell->plain);
    }
    if (!fits || at != nbytes_of(&flat.plain)) {
        PyErr_SetString(PyExc_ValueError, "take_sums: expected one array of the bytes of all values");
        return NULL;
    }
    at = 0;
    for (size_t i = 0; i < batch->calls.num_keys; i++) {
        Work *work = &batch->calls.works[i];
        at = aligned(at, &work->cell->plain);
        batch->calls.addresses[work->first_part] = flat.plain.address + at;
        work->num_parts = 1;
        at += nbytes_of(&work->cell->plain);
    }
    PyObject *old = batch->flat_values;
    batch->flat_values = Py_NewRef(given);
    Py_XDECREF(old);
    return Py_NewRef(Py_None);
}

static PyMethodDef batch_methods[] = {
    {"begin", (PyCFunction)batch_begin, METH_VARARGS,
     "begin(past_cache, entries=..., step=...)\n--\n\n"
     "Return whether keys, and the entries and the step if given, are those that were looked at.\n\n"
     "Outs may be stored past the cache."},
    {"run", (PyCFunction)batch_run, METH_VARARGS,
     "run(start, stop)\n--\n\nDo some elements, counted through all keys, without the interpreter's lock."},
    {"add_squares", (PyCFunction)batch_add_squares, METH_VARARGS,
     "add_squares(rescale, start, stop)\n--\n\n"
     "Add the squares of some rescaled sums to ``squares``, without the interpreter's lock.\n\n"
     "Which elements are counted through all keys; whole groups of 64 of a key, each by the range with its beginning."},
    {"finish", (PyCFunction)batch_finish, METH_VARARGS,
     "finish(is_update=...)\n--\n\n"
     "Count what ``run`` has done: an update of all values, unless it was a pull or something else counts that."},
    {"sum_pieces", (PyCFunction)batch_sum_pieces, METH_VARARGS,
     "sum_pieces(pieces, targets, wide=False, start=0, stop=...)\n--\n\n"
     "Write the sums of pieces of the parts elsewhere, without the interpreter's lock.\n\n"
     "Args:\n"
     "    pieces: for each, three 64-bit numbers: the place of its key in the call, its first element, how many.\n"
     "    targets: a list of one column: for each piece a 64-bit address.\n"
     "    wide: sums of float16 and bfloat16 are written as float32, before they are rounded.\n"
     "    start, stop: which elements to do, counted through all pieces."},
    {"copy_pieces", (PyCFunction)batch_copy_pieces, METH_VARARGS,
     "copy_pieces(pieces, sources, columns_as=0, start=0, stop=...)\n--\n\n"
     "Write the sums of columns to pieces of the outs, as ``sum_pieces``.\n\n"
     "Args:\n"
     "    columns_as: 0: sources are of the dtypes of values; 1: those of float16 and bfloat16 are float32; the number of\n"
     "        float16 or bfloat16: those of float32 and float64 are of that dtype, and there is one column."},
    {"update_pieces", (PyCFunction)batch_update_pieces, METH_VARARGS,
     "update_pieces(pieces, parts, wide=False, divisors=None)\n--\n\n"
     "Assign the sums of columns to pieces of the values, or step with them, after ``begin``, as ``sum_pieces``.\n\n"
     "Args:\n"
     "    wide: the parts of float16 and bfloat16 are float32.\n"
     "    divisors: a buffer with a double for each piece, by which its sum is divided."},
    {"average", (PyCFunction)batch_average, METH_NOARGS,
     "average()\n--\n\n"
     "Divide each sum by the number of its parts from now on; return whether all are of floating-point numbers."},
    {"part_column", (PyCFunction)batch_part_column, METH_O,
     "part_column(pieces)\n--\n\nReturn the address of each piece of the parts; None if a key has not just one."},
    {"describe", (PyCFunction)batch_describe, METH_VARARGS,
     "describe(seed, begin, most)\n--\n\n"
     "Return a number that differs where the keys or the seed differ, and the keys as JSON.\n\n"
     "Args:\n"
     "    seed: such a number, of the verb.\n"
     "    begin: the text before the keys; after them comes ``]}``.\n"
     "    most: the bytes of text to return.\n\n"
     "Returns:\n"
     "    The number, and the text; None for a key that JSON writes in another way."},
    {"packed", (PyCFunction)batch_packed, METH_NOARGS,
     "packed()\n--\n\n"
     "Return a piece for each whole value, where they lie one after another, and how many bytes that takes."},
    {"take_sums", (PyCFunction)batch_take_sums, METH_O,
     "take_sums(flat)\n--\n\nHave one part for each key: its piece of an array of bytes, which lie as ``packed`` says."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef batch_attributes[] = {
    {"numel", (getter)batch_numel, NULL, "Elements of all values.", NULL},
    {"nbytes", (getter)batch_nbytes, NULL, "Bytes of all arrays.", NULL},
    {"unready", (getter)batch_unready, NULL, "What is held of keys whose states are to be completed before ``begin``.",
     NULL},
    {"keys", (getter)batch_keys, NULL, "The keys, in a tuple.", NULL},
    {"cells", (getter)batch_cells, NULL, "What is held of each key.", NULL},
    {"part_counts", (getter)batch_part_counts, NULL, "How many parts each key has, as 64-bit numbers in bytes.", NULL},
    {"squares", (getter)batch_squares, NULL,
     "The finite part of what ``add_squares`` has added, in units of 2**-1074 as little-endian bytes, and the rest.", NULL},
    {"sums", (getter)batch_sums, NULL, "The array that is the sum of all keys, None if there is none.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef batch_members[] = {
    {"past_cache", T_BOOL, offsetof(Batch, past_cache), 0, "Whether outs are stored past the processor's cache."},
    {"scale", T_DOUBLE, offsetof(Batch, scale), 0, "A factor on all gradients, beside the optimizer's rescale_grad."},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot batch_slots[] = {
    {Py_tp_doc, (void *)batch_doc},
    {Py_tp_members, batch_members},
    {Py_tp_methods, batch_methods},
    {Py_tp_getset, batch_attributes},
    {Py_tp_dealloc, batch_dealloc},
    {0, NULL},
};

static PyType_Spec batch_spec = {"tensorkv.compiled._native.Batch", sizeof(Batch), 0,
                                 Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, batch_slots};

#include "_calls.h"
#include "_reduce.h"

static PyMethodDef methods[] = {
    {"run_columns", run_columns, METH_VARARGS, run_columns_doc},
    {"use", use, METH_VARARGS, use_doc},
    {"look", look, METH_VARARGS, look_doc},
    {"place_states", place_states, METH_VARARGS, place_states_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "tensorkv.compiled._native", "Sums of plain arrays in one pass over memory.", 0, methods,
    NULL,                  NULL,               NULL,                                             NULL,
};

PyMODINIT_FUNC PyInit__native(void) {
    PyObject *module = PyModule_Create(&definition);
    struct {
        PyTypeObject **type;
        PyType_Spec *spec;
    } types[] = {{&cell_type, &cell_spec},
                 {&batch_type, &batch_spec},
                 {&record_type, &record_spec},
                 {&fields_type, &fields_spec},
                 {&call_type, &call_spec},
                 {&reduce_type, &reduce_spec}};
    for (size_t i = 0; i < sizeof types / sizeof *types && module != NULL; i++) {
        *types[i].type = (PyTypeObject *)PyType_FromSpec(types[i].spec);
        if (*types[i].type == NULL || PyModule_AddType(module, *types[i].type)) Py_CLEAR(module);
    }
    if (module != NULL && PyModule_AddStringConstant(module, "SOURCES", SOURCES)) Py_CLEAR(module);
    return module;
}
