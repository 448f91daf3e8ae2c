/* tensorkv.compiled._tables: where the rows of a table are, and what they hold before their first push.
 *
 * Built for Python's stable ABI. Addresses are of memory that the caller keeps while a function runs; the lock of a
 * shard keeps other threads away from it.
 */
#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "_module.h"

/* So many rows, or elements, are worth giving up Python's lock for; what comes so much later is fetched into the cache,
 * at most so many bytes of a row. */
enum { WORTH_UNLOCKING = 1 << 14, AHEAD = 8, FETCHED_NBYTES = 1024, LINE_NBYTES = 64 };

/* ---------------------------------------------------------------- first values, as in docs/semantics.md */

/* Philox4x32-10: J. K. Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC'11. */
static inline void philox(uint32_t c[4], uint32_t k0, uint32_t k1) {
    for (int round = 0; round < 10; round++) {
        uint64_t first = (uint64_t)c[0] * 0xD2511F53u, second = (uint64_t)c[2] * 0xCD9E8D57u;
        c[0] = (uint32_t)(second >> 32) ^ c[1] ^ k0;
        c[1] = (uint32_t)second;
        c[2] = (uint32_t)(first >> 32) ^ c[3] ^ k1;
        c[3] = (uint32_t)first;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
}

static double logarithm(double number) {
    int exponent;
    double mantissa = frexp(number, &exponent);
    double t = (mantissa - 0.75) / (mantissa + 0.75), s = t * t;
    double series =
        t * (2 + s * (2.0 / 3 + s * (2.0 / 5 + s * (2.0 / 7 + s * (2.0 / 9 + s * (2.0 / 11))))));
    return (exponent * 0.6931471805599453 - 0.2876820724517809) + series;
}

/* The quantile of the standard normal distribution: M. J. Wichura, Algorithm AS 241, PPND7. */
static inline double normal(double uniform) {
    double centred = uniform - 0.5, size = fabs(centred), r, above, below;
    if (size <= 0.425) {
        r = 0.180625 - centred * centred;
        above = ((59.10937472 * r + 159.29113202) * r + 50.434271938) * r + 3.3871327179;
        below = ((67.1875636 * r + 78.757757664) * r + 17.895169469) * r + 1.0;
        return centred * above / below;
    }
    r = sqrt(-logarithm(0.5 - size)) - 1.6;
    above = ((0.17023821103 * r + 1.3067284816) * r + 2.75681539) * r + 1.4234372777;
    below = (0.12021132975 * r + 0.7370016425) * r + 1.0;
    return copysign(above / below, centred);
}

PyDoc_STRVAR(first_rows_doc,
             "first_rows(is_normal, x, y, key, ids, count, out, columns, is_double)\n--\n\n"
             "Write the first values of rows.\n\n"
             "x and y are mean and standard deviation, or the bounds of a uniform distribution; key is that of the\n"
             "generator; ids and out are addresses, of count int64 and of count * columns float64 or float32.");

static PyObject *first_rows(PyObject *module, PyObject *args) {
    int is_normal, is_double;
    double x, y;
    unsigned long long key, ids_at, out_at;
    Py_ssize_t count, columns;
    (void)module;
    if (!PyArg_ParseTuple(args, "pddKKnKnp", &is_normal, &x, &y, &key, &ids_at, &count, &out_at, &columns, &is_double))
        return NULL;
    const int64_t *ids = (const int64_t *)(uintptr_t)ids_at;
    float *single = (float *)(uintptr_t)out_at;
    double *wide = (double *)(uintptr_t)out_at;
    const double width = y - x;
    PyThreadState *state = count * columns >= WORTH_UNLOCKING ? PyEval_SaveThread() : NULL;
    for (Py_ssize_t row = 0; row < count; row++) {
        uint64_t id = (uint64_t)ids[row];
        for (Py_ssize_t column = 0; column < columns; column += 4) {
            uint64_t block = (uint64_t)column / 4;
            uint32_t words[4] = {(uint32_t)id, (uint32_t)(id >> 32), (uint32_t)block, (uint32_t)(block >> 32)};
            philox(words, (uint32_t)key, (uint32_t)(key >> 32));
            Py_ssize_t left = columns - column, at = row * columns + column;
            for (Py_ssize_t word = 0; word < (left < 4 ? left : 4); word++) {
                double uniform = (words[word] + 0.5) * 0x1p-32;
                double made = is_normal ? x + y * normal(uniform) : x + width * uniform;
                if (is_double)
                    wide[at + word] = made;
                else
                    single[at + word] = (float)made;
            }
        }
    }
    if (state != NULL) PyEval_RestoreThread(state);
    Py_RETURN_NONE;
}

/* ---------------------------------------------------------------- ids and places
 *
 * A hash table with open addressing: each slot holds the place of a row, or -1; the ids lie beside, by place.
 */

/* The finalizer of SplitMix64: G. L. Steele, D. Lea, C. H. Flood, "Fast Splittable Pseudorandom Number Generators",
 * OOPSLA 2014. */
static inline uint64_t hash_of(int64_t id) {
    uint64_t z = (uint64_t)id + 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

typedef struct {
    int64_t *slots;
    uint64_t mask; /* number of slots, a power of two, less one */
    int64_t *held; /* ids by place */
} Index;

/* The slot of an id, or the empty one where it belongs. */
static inline uint64_t slot_of(const Index *index, int64_t id) {
    uint64_t at = hash_of(id) & index->mask;
    while (index->slots[at] >= 0 && index->held[index->slots[at]] != id) at = (at + 1) & index->mask;
    return at;
}

static int parse(PyObject *args, Index *index, const int64_t **ids, Py_ssize_t *count, unsigned long long *last) {
    unsigned long long slots, held, ids_at;
    Py_ssize_t num_slots;
    if (!PyArg_ParseTuple(args, "KnKKnK", &slots, &num_slots, &held, &ids_at, count, last)) return -1;
    index->slots = (int64_t *)(uintptr_t)slots;
    index->mask = (uint64_t)num_slots - 1;
    index->held = (int64_t *)(uintptr_t)held;
    *ids = (const int64_t *)(uintptr_t)ids_at;
    return 0;
}

PyDoc_STRVAR(find_doc,
             "find(slots, num_slots, held, ids, count, places)\n--\n\n"
             "Write the places of ids, -1 for those that are not held; return how many are not.\n\n"
             "All but num_slots, a power of two, and count are addresses of int64.");

static PyObject *find(PyObject *module, PyObject *args) {
    Index index;
    const int64_t *ids;
    Py_ssize_t count, missing = 0;
    unsigned long long places_at;
    (void)module;
    if (parse(args, &index, &ids, &count, &places_at) < 0) return NULL;
    int64_t *places = (int64_t *)(uintptr_t)places_at;
    PyThreadState *state = count >= WORTH_UNLOCKING ? PyEval_SaveThread() : NULL;
    for (Py_ssize_t i = 0; i < count; i++) {
        if (i + 2 * AHEAD < count) __builtin_prefetch(&index.slots[hash_of(ids[i + 2 * AHEAD]) & index.mask]);
        if (i + AHEAD < count) {
            int64_t likely = index.slots[hash_of(ids[i + AHEAD]) & index.mask];
            if (likely >= 0) __builtin_prefetch(&index.held[likely]);
        }
        places[i] = index.slots[slot_of(&index, ids[i])];
        missing += places[i] < 0;
    }
    if (state != NULL) PyEval_RestoreThread(state);
    return PyLong_FromSsize_t(missing);
}

PyDoc_STRVAR(add_doc,
             "add(slots, num_slots, held, ids, count, first)\n--\n\n"
             "Hold ids, each of them new, at the places from first on.\n\n"
             "slots, held and ids are addresses of int64; there are empty slots for all, and room in held. Ids that lie\n"
             "in held at their places already are put into the slots alone.");

static PyObject *add(PyObject *module, PyObject *args) {
    Index index;
    const int64_t *ids;
    Py_ssize_t count;
    unsigned long long first;
    (void)module;
    if (parse(args, &index, &ids, &count, &first) < 0) return NULL;
    PyThreadState *state = count >= WORTH_UNLOCKING ? PyEval_SaveThread() : NULL;
    for (Py_ssize_t i = 0; i < count; i++) {
        int64_t place = (int64_t)first + i;
        index.slots[slot_of(&index, ids[i])] = place;
        index.held[place] = ids[i];
    }
    if (state != NULL) PyEval_RestoreThread(state);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(gather_doc,
             "gather(source, row_nbytes, places, count, out)\n--\n\n"
             "Copy rows one after another to out; those whose place is negative are left out.\n\n"
             "source, places (int64) and out are addresses.");

static PyObject *gather(PyObject *module, PyObject *args) {
    unsigned long long source_at, places_at, out_at;
    Py_ssize_t row_nbytes, count;
    (void)module;
    if (!PyArg_ParseTuple(args, "KnKnK", &source_at, &row_nbytes, &places_at, &count, &out_at)) return NULL;
    const char *source = (const char *)(uintptr_t)source_at;
    const int64_t *places = (const int64_t *)(uintptr_t)places_at;
    char *out = (char *)(uintptr_t)out_at;
    /* Rows without elements have no address. */
    if (row_nbytes == 0) Py_RETURN_NONE;
    Py_ssize_t fetched = row_nbytes < FETCHED_NBYTES ? row_nbytes : FETCHED_NBYTES;
    PyThreadState *state = count * row_nbytes >= WORTH_UNLOCKING ? PyEval_SaveThread() : NULL;
    for (Py_ssize_t i = 0; i < count; i++) {
        if (i + AHEAD < count && places[i + AHEAD] >= 0)
            for (Py_ssize_t at = 0; at < fetched; at += LINE_NBYTES)
                __builtin_prefetch(source + places[i + AHEAD] * row_nbytes + at);
        if (places[i] >= 0) memcpy(out + i * row_nbytes, source + places[i] * row_nbytes, (size_t)row_nbytes);
    }
    if (state != NULL) PyEval_RestoreThread(state);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(scan_doc,
             "scan(ids, count)\n--\n\n"
             "Return the least of some ids, the largest, and whether each is above the one before; count is at least 1.\n\n"
             "ids is an address of int64.");

static PyObject *scan(PyObject *module, PyObject *args) {
    unsigned long long ids_at;
    Py_ssize_t count;
    (void)module;
    if (!PyArg_ParseTuple(args, "Kn", &ids_at, &count)) return NULL;
    const int64_t *ids = (const int64_t *)(uintptr_t)ids_at;
    int64_t low = ids[0], high = ids[0];
    int falls = 0;
    for (Py_ssize_t i = 1; i < count; i++) {
        falls |= ids[i] <= ids[i - 1];
        if (ids[i] < low) low = ids[i];
        if (ids[i] > high) high = ids[i];
    }
    return Py_BuildValue("LLO", (long long)low, (long long)high, falls ? Py_False : Py_True);
}

static PyMethodDef methods[] = {
    {"first_rows", first_rows, METH_VARARGS, first_rows_doc},
    {"find", find, METH_VARARGS, find_doc},
    {"add", add, METH_VARARGS, add_doc},
    {"gather", gather, METH_VARARGS, gather_doc},
    {"scan", scan, METH_VARARGS, scan_doc},
    {NULL, NULL, 0, NULL},
};

MODULE(_tables, "Where the rows of a table are, and what they hold before their first push.")
