/* tensorkv.compiled._codecs: gradients of one or two bits an element, and what is left of them.
 *
 * Built for Python's stable ABI. Arrays come as contiguous buffers, of float32 or of bytes.
 */
#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#include "_cpus.h"

/* So many elements are worth giving up Python's lock for; words are of so many bytes; so many
 * elements are looked at together. */
enum { WORTH_UNLOCKING = 1 << 14, WORD_NBYTES = 4, BLOCK = 64 };

static PyObject *refuse(const char *function) {
    return PyErr_Format(PyExc_ValueError, "%s: the buffers do not fit together", function);
}

static Py_ssize_t words_nbytes(Py_ssize_t count, int bits) {
    Py_ssize_t per_word = 8 * WORD_NBYTES / bits;
    return (count + per_word - 1) / per_word * WORD_NBYTES;
}

/* Write what is owed of a block: its gradient and its residual, if there is one; return whether a number is NaN or Inf. */
static inline uint32_t owe(const float *gradient, const float *residual, float *owed, Py_ssize_t count) {
    uint32_t odd = 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        uint32_t bits;
        owed[i] = residual == NULL ? gradient[i] : gradient[i] + residual[i];
        memcpy(&bits, &owed[i], sizeof bits);
        odd |= (bits & 0x7F800000u) == 0x7F800000u;
    }
    return odd;
}

/* What is encoded, and what is written. */
typedef struct {
    const float *gradient, *residual;
    float *owed;
    uint8_t *words;
    Py_ssize_t count;
    float threshold;
} Encoding;

FOR_EACH_CPU static uint32_t add_all(const Encoding *given) {
    return owe(given->gradient, given->residual, given->owed, given->count);
}

/* The codes of elements that are owed: 11 for +threshold, 10 for -threshold, 00 for nothing; they are less that after.
 * Nothing here branches, so that the compiler takes several elements at a time. */
static inline void take_two_bits(float *owed, uint32_t *codes, Py_ssize_t count, float threshold) {
    for (Py_ssize_t i = 0; i < count; i++) {
        const float value = owed[i];
        const uint32_t above = value >= threshold ? 3 : 0, below = value <= -threshold ? 2 : 0;
        const float more = value >= threshold ? threshold : 0.0f, less = value <= -threshold ? threshold : 0.0f;
        codes[i] = above | below;
        owed[i] = value - (more - less);
    }
}

FOR_EACH_CPU static uint32_t encode_two_bits(const Encoding *given) {
    uint32_t odd = 0;
    for (Py_ssize_t at = 0; at < given->count; at += BLOCK) {
        uint32_t codes[BLOCK] = {0};
        const Py_ssize_t left = given->count - at, count = left < BLOCK ? left : BLOCK;
        const float *residual = given->residual == NULL ? NULL : given->residual + at;
        uint8_t *words = given->words + at / 4;
        if (count == BLOCK) {
            odd |= owe(given->gradient + at, residual, given->owed + at, BLOCK);
            take_two_bits(given->owed + at, codes, BLOCK, given->threshold);
        } else {
            odd |= owe(given->gradient + at, residual, given->owed + at, count);
            take_two_bits(given->owed + at, codes, count, given->threshold);
        }
        for (Py_ssize_t byte = 0; byte < (count + 3) / 4; byte++)
            words[byte] = (uint8_t)(codes[4 * byte] << 6 | codes[4 * byte + 1] << 4 | codes[4 * byte + 2] << 2 |
                                    codes[4 * byte + 3]);
    }
    return odd;
}

FOR_EACH_CPU static void decode_two_bits(const uint8_t *words, float *out, Py_ssize_t count, float threshold) {
    const float of_code[4] = {0.0f, 0.0f, -threshold, threshold};
    float of_byte[256][4];
    for (int byte = 0; byte < 256; byte++)
        for (int i = 0; i < 4; i++) of_byte[byte][i] = of_code[byte >> (6 - 2 * i) & 3];
    for (Py_ssize_t at = 0; at < count; at += 4)
        memcpy(out + at, of_byte[words[at / 4]], sizeof(float) * (size_t)(count - at < 4 ? count - at : 4));
}

/* The codes of elements that are owed: 1 for +1, 0 for -1; they are less that after. */
static inline void take_one_bit(float *owed, uint32_t *codes, Py_ssize_t count, float threshold) {
    for (Py_ssize_t i = 0; i < count; i++) {
        const float value = owed[i];
        codes[i] = value > threshold;
        owed[i] = value - (value > threshold ? 1.0f : -1.0f);
    }
}

FOR_EACH_CPU static uint32_t encode_one_bit(const Encoding *given) {
    uint32_t odd = 0;
    for (Py_ssize_t at = 0; at < given->count; at += BLOCK) {
        uint32_t codes[BLOCK] = {0};
        const Py_ssize_t left = given->count - at, count = left < BLOCK ? left : BLOCK;
        const float *residual = given->residual == NULL ? NULL : given->residual + at;
        uint8_t *words = given->words + at / 8;
        if (count == BLOCK) {
            odd |= owe(given->gradient + at, residual, given->owed + at, BLOCK);
            take_one_bit(given->owed + at, codes, BLOCK, given->threshold);
        } else {
            odd |= owe(given->gradient + at, residual, given->owed + at, count);
            take_one_bit(given->owed + at, codes, count, given->threshold);
        }
        for (Py_ssize_t byte = 0; byte < (count + 7) / 8; byte++) {
            uint32_t found = 0;
            for (int i = 0; i < 8; i++) found |= codes[8 * byte + i] << (7 - i);
            words[byte] = (uint8_t)found;
        }
    }
    return odd;
}

FOR_EACH_CPU static void decode_one_bit(const uint8_t *words, float *out, Py_ssize_t count, float threshold) {
    (void)threshold;
    Py_ssize_t whole = count / 8;
    for (Py_ssize_t byte = 0; byte < whole; byte++)
        for (int i = 0; i < 8; i++) out[8 * byte + i] = (float)(int)(words[byte] >> (7 - i) & 1) * 2.0f - 1.0f;
    for (Py_ssize_t i = 8 * whole; i < count; i++) out[i] = (float)(int)(words[whole] >> (7 - i % 8) & 1) * 2.0f - 1.0f;
}

/* Parse a gradient, a residual or None, memory for what is owed, and for words unless bits is 0; run one of the above;
 * return whether all that was owed is finite. */
static PyObject *encode(PyObject *args, const char *function, const char *format, int bits,
                        uint32_t (*run)(const Encoding *)) {
    Py_buffer gradient, residual, owed, words = {0};
    Encoding given = {0};
    if (!PyArg_ParseTuple(args, format, &gradient, &residual, &owed, &words, &given.threshold)) return NULL;
    given.gradient = gradient.buf, given.residual = residual.buf, given.owed = owed.buf, given.words = words.buf;
    given.count = owed.len / (Py_ssize_t)sizeof(float);
    const int fits = gradient.len == owed.len && (residual.buf == NULL || residual.len == owed.len) &&
                     words.len == (bits == 0 ? 0 : words_nbytes(given.count, bits));
    uint32_t odd = 0;
    if (fits) {
        PyThreadState *state = given.count >= WORTH_UNLOCKING ? PyEval_SaveThread() : NULL;
        /* The last word may be written in part. */
        if (words.len > 0) memset(given.words + words.len - WORD_NBYTES, 0, WORD_NBYTES);
        odd = run(&given);
        if (state != NULL) PyEval_RestoreThread(state);
    }
    PyBuffer_Release(&gradient);
    if (residual.obj != NULL) PyBuffer_Release(&residual);
    PyBuffer_Release(&owed);
    if (words.obj != NULL) PyBuffer_Release(&words);
    return fits ? PyBool_FromLong(odd == 0) : refuse(function);
}

PyDoc_STRVAR(add_doc,
             "add(gradient, residual, owed)\n--\n\n"
             "Write the sum of two arrays of float32, the first one if the second is None; return whether all of it is "
             "finite.");

static PyObject *add(PyObject *module, PyObject *args) {
    (void)module;
    return encode(args, "add", "y*z*w*", 0, add_all);
}

static PyObject *decode(PyObject *args, const char *function, const char *format, int bits,
                        void (*run)(const uint8_t *, float *, Py_ssize_t, float)) {
    Py_buffer words, out;
    float threshold;
    if (!PyArg_ParseTuple(args, format, &words, &out, &threshold)) return NULL;
    const Py_ssize_t count = out.len / (Py_ssize_t)sizeof(float);
    const int fits = words.len == words_nbytes(count, bits);
    if (fits) {
        PyThreadState *state = count >= WORTH_UNLOCKING ? PyEval_SaveThread() : NULL;
        run(words.buf, out.buf, count, threshold);
        if (state != NULL) PyEval_RestoreThread(state);
    }
    PyBuffer_Release(&words);
    PyBuffer_Release(&out);
    if (!fits) return refuse(function);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(encode_2bit_doc,
             "encode_2bit(gradient, residual, owed, words, threshold)\n--\n\n"
             "Do as add, and write two bits for each float32, 16 in a word; what they do not send stays in owed.");

static PyObject *encode_2bit(PyObject *module, PyObject *args) {
    (void)module;
    return encode(args, "encode_2bit", "y*z*w*w*f", 2, encode_two_bits);
}

PyDoc_STRVAR(decode_2bit_doc, "decode_2bit(words, out, threshold)\n--\n\nWrite the float32 that two bits each stand for.");

static PyObject *decode_2bit(PyObject *module, PyObject *args) {
    (void)module;
    return decode(args, "decode_2bit", "y*w*f", 2, decode_two_bits);
}

PyDoc_STRVAR(encode_1bit_doc,
             "encode_1bit(gradient, residual, owed, words, threshold)\n--\n\n"
             "Do as add, and write a bit for each float32, 32 in a word; what it does not send stays in owed.");

static PyObject *encode_1bit(PyObject *module, PyObject *args) {
    (void)module;
    return encode(args, "encode_1bit", "y*z*w*w*f", 1, encode_one_bit);
}

PyDoc_STRVAR(decode_1bit_doc, "decode_1bit(words, out, threshold)\n--\n\nWrite the float32 that a bit each stands for.");

static PyObject *decode_1bit(PyObject *module, PyObject *args) {
    (void)module;
    return decode(args, "decode_1bit", "y*w*f", 1, decode_one_bit);
}

static PyMethodDef methods[] = {
    {"add", add, METH_VARARGS, add_doc},
    {"encode_2bit", encode_2bit, METH_VARARGS, encode_2bit_doc},
    {"decode_2bit", decode_2bit, METH_VARARGS, decode_2bit_doc},
    {"encode_1bit", encode_1bit, METH_VARARGS, encode_1bit_doc},
    {"decode_1bit", decode_1bit, METH_VARARGS, decode_1bit_doc},
    {NULL, NULL, 0, NULL},
};

static int add_sources(PyObject *module) { return PyModule_AddStringConstant(module, "SOURCES", SOURCES); }

static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, add_sources}, {0, NULL}};

static PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    "_codecs",
    "Gradients of one or two bits an element, and what is left of them.",
    0,
    methods,
    module_slots,
    NULL,
    NULL,
    NULL,
};

PyMODINIT_FUNC PyInit__codecs(void) { return PyModuleDef_Init(&module); }
