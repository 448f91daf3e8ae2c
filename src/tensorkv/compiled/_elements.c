/* Elements of arrays that differ: finding them, writing them, and digests of what arrays hold.
 *
 * A digest is a sum over elements, modulo 2^64, of a hash of each element's bits and its place. So what a change does to
 * it depends on the elements that change alone. ``tensorkv/releases/elements.py`` has the same functions in NumPy.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>
#include <stdint.h>
#include <string.h>

#include "_cpus.h"
#include "_module.h"

/* With fewer bytes it takes longer to give Python's lock away than to do the work. */
enum { WORTH_UNLOCKING = 1 << 14, BLOCK = 64 };

/* ------------------------------------------------------------ digests */

#define BY_PLACE 0x9E3779B1u
#define BY_UPPER_PLACE 0x7FEB352Du

/* The finalizer of MurmurHash3 (Appleby, 2011). */
static inline uint32_t first_hash(uint32_t x) {
    x = (x ^ x >> 16) * 0x85EBCA6Bu;
    x = (x ^ x >> 13) * 0xC2B2AE35u;
    return x ^ x >> 16;
}

static inline uint32_t second_hash(uint32_t first) {
    uint32_t y = first * 0x27D4EB2Fu;
    return y ^ y >> 15;
}

/* The hash of a word and its place: the second hash is the upper half. */
static inline uint64_t hash_of(uint32_t word, uint64_t place) {
    uint32_t low = first_hash(word ^ (uint32_t)place * BY_PLACE ^ (uint32_t)(place >> 32) * BY_UPPER_PLACE);
    return (uint64_t)second_hash(low) << 32 | low;
}

/* The sum of hashes of numbers that lie one after another; ``first`` is the place of the first one. */
#define DEFINE_DIGEST(TYPE)                                                                                      \
    FOR_EACH_CPU static uint64_t digest_##TYPE(const char *at, uint64_t count, uint64_t first) {                 \
        uint64_t low = 0;                                                                                        \
        uint32_t high = 0;                                                                                       \
        for (uint64_t done = 0; done < count;) {                                                                 \
            /* Places of a run have the same upper half. */                                                      \
            uint64_t start = first + done, run = (uint64_t)UINT32_MAX + 1 - (uint32_t)start;                     \
            uint32_t length = (uint32_t)(count - done < run ? count - done : run > UINT32_MAX ? UINT32_MAX : run); \
            uint32_t upper = (uint32_t)(start >> 32) * BY_UPPER_PLACE, place = (uint32_t)start * BY_PLACE;       \
            const char *from = at + done * sizeof(TYPE);                                                         \
            for (uint32_t i = 0; i < length; i++) {                                                              \
                TYPE number;                                                                                     \
                memcpy(&number, from + (size_t)i * sizeof number, sizeof number);                                \
                uint32_t x = first_hash((uint32_t)number ^ (place + i * BY_PLACE) ^ upper);                      \
                low += x;                                                                                        \
                high += second_hash(x);                                                                          \
            }                                                                                                    \
            done += length;                                                                                      \
        }                                                                                                        \
        return low + ((uint64_t)high << 32);                                                                     \
    }

DEFINE_DIGEST(uint8_t)
DEFINE_DIGEST(uint16_t)
DEFINE_DIGEST(uint32_t)

static uint64_t digest_of(const char *at, uint64_t count, size_t itemsize, uint64_t first) {
    if (itemsize == 1) return digest_uint8_t(at, count, first);
    if (itemsize == 2) return digest_uint16_t(at, count, first);
    return digest_uint32_t(at, count * (itemsize / 4), first * (itemsize / 4));
}

/* The digest of one element. */
static inline uint64_t digest_one(const char *at, size_t itemsize, uint64_t place) {
    uint64_t sum = 0;
    uint32_t word = 0;
    if (itemsize < 4) {
        uint16_t two;
        if (itemsize == 1) return hash_of((uint8_t)*at, place);
        memcpy(&two, at, sizeof two);
        return hash_of(two, place);
    }
    for (size_t i = 0; i < itemsize / 4; i++) {
        memcpy(&word, at + 4 * i, sizeof word);
        sum += hash_of(word, place * (itemsize / 4) + i);
    }
    return sum;
}

/* ------------------------------------------------------------ elements that differ */

typedef struct {
    char *indices, *values;
    size_t index_size;
    Py_ssize_t count, room;
    uint64_t gone, come;
    int is_counted; /* whether there is known to be room for all */
} Found;

#define DEFINE_COUNT(word)                                                                                            \
    static inline size_t count_##word(const char *left, const char *right, size_t count) {                           \
        uint32_t sum = 0;                                                                                             \
        for (size_t i = 0; i < count; i++) {                                                                          \
            word a, b;                                                                                                \
            memcpy(&a, left + i * sizeof a, sizeof a);                                                                \
            memcpy(&b, right + i * sizeof b, sizeof b);                                                               \
            sum += a != b;                                                                                            \
        }                                                                                                             \
        return sum;                                                                                                   \
    }

DEFINE_COUNT(uint8_t)
DEFINE_COUNT(uint16_t)
DEFINE_COUNT(uint32_t)
DEFINE_COUNT(uint64_t)

/* So many elements are counted at a time. */
enum { COUNTED = 4096 };

/* How many elements differ, or some number above the most that are asked for. */
FOR_EACH_CPU static size_t count_differing(const char *old, const char *now, size_t count, size_t itemsize, size_t most) {
    size_t sum = 0;
    for (size_t i = 0; i < count && sum <= most; i += COUNTED) {
        const char *left = old + i * itemsize, *right = now + i * itemsize;
        size_t length = i + COUNTED < count ? COUNTED : count - i;
        if (itemsize == 1) sum += count_uint8_t(left, right, length);
        else if (itemsize == 2) sum += count_uint16_t(left, right, length);
        else if (itemsize == 4) sum += count_uint32_t(left, right, length);
        else if (itemsize == 8) sum += count_uint64_t(left, right, length);
        else
            for (size_t j = 0; j < length; j++) sum += memcmp(left + 16 * j, right + 16 * j, 16) != 0;
    }
    return sum;
}

/* After so many elements, of as many as there is room for, it is worth counting the rest, which is ten times as fast. */
static inline int is_worth_counting(const Found *found) {
    return !found->is_counted && found->count > found->room / 32 && found->count > COUNTED / 8;
}

static inline void write_index(char *at, size_t size, uint64_t index) {
    uint32_t narrow = (uint32_t)index;
    memcpy(at, size == 4 ? (void *)&narrow : (void *)&index, size);
}

static inline uint64_t read_index(const char *at, size_t size) {
    uint64_t index = 0;
    uint32_t narrow;
    if (size == 8) {
        memcpy(&index, at, sizeof index);
        return index;
    }
    memcpy(&narrow, at, sizeof narrow);
    return narrow;
}

/* Whether two blocks have the same bits. */
static inline int are_equal(const char *left, const char *right) {
    uint64_t a[BLOCK / 8], b[BLOCK / 8], differing = 0;
    memcpy(a, left, BLOCK);
    memcpy(b, right, BLOCK);
    for (int i = 0; i < BLOCK / 8; i++) differing |= a[i] ^ b[i];
    return differing == 0;
}

/* Which elements of two blocks differ, a bit for each. */
static inline uint64_t differing_in(const char *left, const char *right, size_t count, size_t itemsize) {
    uint64_t bits = 0;
    for (size_t i = 0; i < count; i++)
        bits |= (uint64_t)(memcmp(left + i * itemsize, right + i * itemsize, itemsize) != 0) << i;
    return bits;
}

/* Find elements that differ; returns 0 where there are more than there is room for. */
static inline int find_sized(const char *old, const char *now, size_t count, size_t itemsize, uint64_t first, Found *found) {
    const size_t whole = BLOCK / itemsize;
    for (size_t i = 0; i < count; i += whole) {
        const char *before = old + i * itemsize, *after = now + i * itemsize;
        size_t length = i + whole < count ? whole : count - i;
        if (length == whole && are_equal(before, after)) continue;
        if (is_worth_counting(found)) {
            size_t left = (size_t)(found->room - found->count);
            if (count_differing(before, after, count - i, itemsize, left) > left) return 0;
            found->is_counted = 1;
        }
        for (uint64_t bits = differing_in(before, after, length, itemsize); bits; bits &= bits - 1) {
            size_t j = (size_t)__builtin_ctzll(bits);
            if (found->count == found->room) return 0;
            uint64_t place = first + i + j;
            write_index(found->indices + (size_t)found->count * found->index_size, found->index_size, place);
            memcpy(found->values + (size_t)found->count * itemsize, after + j * itemsize, itemsize);
            found->gone += digest_one(before + j * itemsize, itemsize, place);
            found->come += digest_one(after + j * itemsize, itemsize, place);
            found->count++;
        }
    }
    return 1;
}

/* The same where the compiler knows the size. */
FOR_EACH_CPU static int find_all(const char *old, const char *now, size_t count, size_t itemsize, uint64_t first,
                                 Found *found) {
    if (itemsize == 1) return find_sized(old, now, count, 1, first, found);
    if (itemsize == 2) return find_sized(old, now, count, 2, first, found);
    if (itemsize == 4) return find_sized(old, now, count, 4, first, found);
    if (itemsize == 8) return find_sized(old, now, count, 8, first, found);
    return find_sized(old, now, count, 16, first, found);
}

/* ------------------------------------------------------------ for Python */

static int is_size(Py_ssize_t itemsize) {
    return itemsize == 1 || itemsize == 2 || itemsize == 4 || itemsize == 8 || itemsize == 16;
}

static PyObject *refuse(const char *what) {
    PyErr_SetString(PyExc_ValueError, what);
    return NULL;
}

PyDoc_STRVAR(digest_doc, "digest(values, itemsize, first)\n--\n\n"
                         "Return the digest of elements that lie one after another; the first one's place is ``first``.");

static PyObject *digest(PyObject *module, PyObject *args) {
    Py_buffer values;
    Py_ssize_t itemsize;
    unsigned long long first;
    (void)module;
    if (!PyArg_ParseTuple(args, "y*nK", &values, &itemsize, &first)) return NULL;
    int fits = is_size(itemsize) && values.len % itemsize == 0;
    uint64_t sum = 0;
    if (fits) {
        PyThreadState *state = values.len >= WORTH_UNLOCKING ? PyEval_SaveThread() : NULL;
        sum = digest_of(values.buf, (uint64_t)(values.len / itemsize), (size_t)itemsize, first);
        if (state != NULL) PyEval_RestoreThread(state);
    }
    PyBuffer_Release(&values);
    return fits ? PyLong_FromUnsignedLongLong(sum) : refuse("digest: bytes that are not whole elements");
}

PyDoc_STRVAR(find_doc,
             "find(old, new, itemsize, first, indices, values, index_size)\n--\n\n"
             "Find the elements whose bits differ; write their places and what they are now.\n\n"
             "Args:\n"
             "    old, new: bytes of as many elements.\n"
             "    itemsize: of an element.\n"
             "    first: the place of the first element.\n"
             "    indices, values: memory for as many places and elements.\n"
             "    index_size: of a place, 4 or 8.\n\n"
             "Returns:\n"
             "    how many, and the digests of what they were and of what they are; None if there is no room for all.");

static PyObject *find(PyObject *module, PyObject *args) {
    Py_buffer old, now, indices, values;
    Py_ssize_t itemsize, index_size;
    unsigned long long first;
    (void)module;
    if (!PyArg_ParseTuple(args, "y*y*nKw*w*n", &old, &now, &itemsize, &first, &indices, &values, &index_size)) return NULL;
    int fits = is_size(itemsize) && (index_size == 4 || index_size == 8) && old.len == now.len &&
               old.len % itemsize == 0 && indices.len % index_size == 0 &&
               indices.len / index_size == values.len / itemsize && values.len % itemsize == 0 &&
               (index_size == 8 || first + (uint64_t)(old.len / itemsize) <= (uint64_t)INT32_MAX + 1);
    Found found = {.indices = indices.buf, .values = values.buf, .index_size = (size_t)index_size};
    int is_whole = 0;
    if (fits) {
        found.room = indices.len / index_size;
        PyThreadState *state = old.len >= WORTH_UNLOCKING ? PyEval_SaveThread() : NULL;
        is_whole = find_all(old.buf, now.buf, (size_t)(old.len / itemsize), (size_t)itemsize, first, &found);
        if (state != NULL) PyEval_RestoreThread(state);
    }
    PyBuffer_Release(&old);
    PyBuffer_Release(&now);
    PyBuffer_Release(&indices);
    PyBuffer_Release(&values);
    if (!fits) return refuse("find: bytes that are not whole elements, or places that do not fit");
    if (!is_whole) Py_RETURN_NONE;
    return Py_BuildValue("nKK", found.count, (unsigned long long)found.gone, (unsigned long long)found.come);
}

/* So many elements ahead memory is fetched: places are far apart. */
enum { AHEAD = 24 };

/* Exchange elements of an array with others; returns the digest of what the array had. */
static uint64_t exchange_all(char *held, const char *indices, char *values, size_t count, size_t itemsize, size_t index_size) {
    uint64_t sum = 0;
    for (size_t i = 0; i < count; i++) {
        if (i + AHEAD < count)
            __builtin_prefetch(held + read_index(indices + (i + AHEAD) * index_size, index_size) * itemsize, 1);
        uint64_t place = read_index(indices + i * index_size, index_size);
        char *at = held + place * itemsize, *other = values + i * itemsize, kept[16];
        sum += digest_one(at, itemsize, place);
        memcpy(kept, at, itemsize);
        memcpy(at, other, itemsize);
        memcpy(other, kept, itemsize);
    }
    return sum;
}

/* The same where the compiler knows the sizes. */
static uint64_t exchange_any(char *held, const char *indices, char *values, size_t count, size_t itemsize, size_t index_size) {
    if (index_size == 4 && itemsize == 4) return exchange_all(held, indices, values, count, 4, 4);
    if (index_size == 4 && itemsize == 2) return exchange_all(held, indices, values, count, 2, 4);
    return exchange_all(held, indices, values, count, itemsize, index_size);
}

PyDoc_STRVAR(exchange_doc, "exchange(held, itemsize, indices, index_size, values)\n--\n\n"
                           "Exchange the elements of an array that are at some places with others; return the digest of\n"
                           "those that it had.");

static PyObject *exchange(PyObject *module, PyObject *args) {
    Py_buffer held, indices, values;
    Py_ssize_t itemsize, index_size;
    (void)module;
    if (!PyArg_ParseTuple(args, "w*ny*nw*", &held, &itemsize, &indices, &index_size, &values)) return NULL;
    int fits = is_size(itemsize) && (index_size == 4 || index_size == 8) && held.len % itemsize == 0 &&
               indices.len % index_size == 0 && indices.len / index_size * itemsize == values.len;
    uint64_t sum = 0;
    if (fits) {
        const size_t size = (size_t)itemsize, step = (size_t)index_size, count = (size_t)indices.len / step;
        const uint64_t room = (uint64_t)(held.len / itemsize);
        PyThreadState *state = indices.len >= WORTH_UNLOCKING ? PyEval_SaveThread() : NULL;
        for (size_t i = 0; i < count; i++) fits &= read_index((const char *)indices.buf + i * step, step) < room;
        if (fits) sum = exchange_any(held.buf, indices.buf, values.buf, count, size, step);
        if (state != NULL) PyEval_RestoreThread(state);
    }
    PyBuffer_Release(&held);
    PyBuffer_Release(&indices);
    PyBuffer_Release(&values);
    return fits ? PyLong_FromUnsignedLongLong(sum) : refuse("a place outside of the array, or bytes that are not whole elements");
}

/* ------------------------------------------------------------ many arrays */

/* Arrays by columns of 64-bit numbers: addresses, elements and bytes of an element; and where the first element is. */
typedef struct {
    const uint64_t *addresses, *others, *numels, *itemsizes, *firsts;
    size_t count;
} Arrays;

/* Whether a buffer has a 64-bit number for each of so many arrays. */
static int is_column(const Py_buffer *buffer, size_t count) { return buffer->len == (Py_ssize_t)(8 * count); }

static int have_sizes(const Arrays *arrays) {
    int fits = 1;
    for (size_t i = 0; i < arrays->count; i++) fits &= is_size((Py_ssize_t)arrays->itemsizes[i]);
    return fits;
}

PyDoc_STRVAR(digest_many_doc, "digest_many(addresses, numels, itemsizes, firsts, digests)\n--\n\n"
                              "Write the digest of each of some arrays; all arguments are columns of 64-bit numbers.");

static PyObject *digest_many(PyObject *module, PyObject *args) {
    Py_buffer in[4], out;
    (void)module;
    if (!PyArg_ParseTuple(args, "y*y*y*y*w*", &in[0], &in[1], &in[2], &in[3], &out)) return NULL;
    size_t count = (size_t)in[0].len / 8;
    int fits = is_column(&out, count);
    for (int i = 0; i < 4; i++) fits &= is_column(&in[i], count);
    Arrays arrays = {in[0].buf, NULL, in[1].buf, in[2].buf, in[3].buf, count};
    fits = fits && have_sizes(&arrays);
    if (fits) {
        uint64_t *digests = out.buf;
        Py_BEGIN_ALLOW_THREADS;
        for (size_t i = 0; i < count; i++)
            digests[i] = digest_of((const char *)(uintptr_t)arrays.addresses[i], arrays.numels[i], arrays.itemsizes[i],
                                   arrays.firsts[i]);
        Py_END_ALLOW_THREADS;
    }
    for (int i = 0; i < 4; i++) PyBuffer_Release(&in[i]);
    PyBuffer_Release(&out);
    if (!fits) return refuse("digest_many: columns that do not fit together");
    Py_RETURN_NONE;
}

PyDoc_STRVAR(find_many_doc,
             "find_many(old, new, numels, itemsizes, firsts, counts, gone, come, indices, values)\n--\n\n"
             "Do as find for each of some arrays; places have four bytes.\n\n"
             "Args:\n"
             "    old, new: addresses.\n"
             "    numels, itemsizes, firsts: of each array.\n"
             "    counts, gone, come: columns that are written: what find returns; a count is -1 where more elements\n"
             "        differ than are worth finding, since the whole array is not larger.\n"
             "    indices, values: memory for what is found, one after another, half as large as all arrays.\n\n"
             "Returns:\n"
             "    how many bytes of indices and of values were written.");

static PyObject *find_many(PyObject *module, PyObject *args) {
    Py_buffer in[10];
    (void)module;
    if (!PyArg_ParseTuple(args, "y*y*y*y*y*w*w*w*w*w*", &in[0], &in[1], &in[2], &in[3], &in[4], &in[5], &in[6], &in[7],
                          &in[8], &in[9]))
        return NULL;
    size_t count = (size_t)in[0].len / 8;
    uint64_t need_indices = 0, need_values = 0, used_indices = 0, used_values = 0;
    int fits = 1;
    for (int i = 0; i < 8; i++) fits &= is_column(&in[i], count);
    Arrays arrays = {in[0].buf, in[1].buf, in[2].buf, in[3].buf, in[4].buf, count};
    fits = fits && have_sizes(&arrays);
    for (size_t i = 0; i < count && fits; i++) {
        uint64_t most = arrays.numels[i] * arrays.itemsizes[i] / (4 + arrays.itemsizes[i]);
        need_indices += 4 * most;
        need_values += arrays.itemsizes[i] * most;
        fits = arrays.firsts[i] + arrays.numels[i] <= (uint64_t)INT32_MAX + 1;
    }
    fits = fits && need_indices <= (uint64_t)in[8].len && need_values <= (uint64_t)in[9].len;
    if (fits) {
        int64_t *counts = in[5].buf;
        uint64_t *gone = in[6].buf, *come = in[7].buf;
        Py_BEGIN_ALLOW_THREADS;
        for (size_t i = 0; i < count; i++) {
            size_t itemsize = arrays.itemsizes[i];
            Found found = {.indices = (char *)in[8].buf + used_indices,
                           .values = (char *)in[9].buf + used_values,
                           .index_size = 4,
                           .room = (Py_ssize_t)(arrays.numels[i] * itemsize / (4 + itemsize))};
            if (find_all((const char *)(uintptr_t)arrays.addresses[i], (const char *)(uintptr_t)arrays.others[i],
                         arrays.numels[i], itemsize, arrays.firsts[i], &found)) {
                counts[i] = found.count;
                gone[i] = found.gone;
                come[i] = found.come;
                used_indices += 4 * (uint64_t)found.count;
                used_values += itemsize * (uint64_t)found.count;
            } else {
                counts[i] = -1;
            }
        }
        Py_END_ALLOW_THREADS;
    }
    for (int i = 0; i < 10; i++) PyBuffer_Release(&in[i]);
    if (!fits) return refuse("find_many: columns that do not fit together");
    return Py_BuildValue("KK", (unsigned long long)used_indices, (unsigned long long)used_values);
}

PyDoc_STRVAR(exchange_many_doc,
             "exchange_many(addresses, numels, itemsizes, counts, index_places, value_places, indices, values, gone)\n--\n\n"
             "Do as exchange for each of some arrays; places have four bytes.\n\n"
             "Args:\n"
             "    addresses, numels, itemsizes: of each array.\n"
             "    counts: how many elements of each.\n"
             "    index_places, value_places: where in ``indices`` and ``values`` those of each array begin.\n"
             "    gone: a column that is written: what exchange returns.");

static PyObject *exchange_many(PyObject *module, PyObject *args) {
    Py_buffer in[9];
    (void)module;
    if (!PyArg_ParseTuple(args, "y*y*y*y*y*y*y*w*w*", &in[0], &in[1], &in[2], &in[3], &in[4], &in[5], &in[6], &in[7], &in[8]))
        return NULL;
    size_t count = (size_t)in[0].len / 8;
    int fits = is_column(&in[8], count);
    for (int i = 0; i < 6; i++) fits &= is_column(&in[i], count);
    Arrays arrays = {in[0].buf, NULL, in[1].buf, in[2].buf, NULL, count};
    const uint64_t *counts = in[3].buf, *index_places = in[4].buf, *value_places = in[5].buf;
    const uint64_t room = (uint64_t)in[6].len, value_room = (uint64_t)in[7].len;
    const char *indices = in[6].buf;
    fits = fits && have_sizes(&arrays);
    for (size_t i = 0; i < count && fits; i++) {
        fits = index_places[i] <= room && counts[i] <= (room - index_places[i]) / 4 && value_places[i] <= value_room &&
               counts[i] <= (value_room - value_places[i]) / arrays.itemsizes[i];
        for (uint64_t j = 0; fits && j < counts[i]; j++)
            fits = read_index(indices + index_places[i] + 4 * j, 4) < arrays.numels[i];
    }
    if (fits) {
        uint64_t *gone = in[8].buf;
        Py_BEGIN_ALLOW_THREADS;
        for (size_t i = 0; i < count; i++)
            gone[i] = exchange_any((char *)(uintptr_t)arrays.addresses[i], indices + index_places[i],
                                   (char *)in[7].buf + value_places[i], counts[i], arrays.itemsizes[i], 4);
        Py_END_ALLOW_THREADS;
    }
    for (int i = 0; i < 9; i++) PyBuffer_Release(&in[i]);
    if (!fits) return refuse("exchange_many: columns that do not fit together, or a place outside of its array");
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"digest", digest, METH_VARARGS, digest_doc},
    {"find", find, METH_VARARGS, find_doc},
    {"exchange", exchange, METH_VARARGS, exchange_doc},
    {"digest_many", digest_many, METH_VARARGS, digest_many_doc},
    {"find_many", find_many, METH_VARARGS, find_many_doc},
    {"exchange_many", exchange_many, METH_VARARGS, exchange_many_doc},
    {NULL, NULL, 0, NULL},
};

MODULE(_elements, "Elements that differ, and digests.")
