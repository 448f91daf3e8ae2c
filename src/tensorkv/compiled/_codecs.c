/* tensorkv.compiled._codecs: gradients of one, two, eight or sixteen bits an element, and what is left of them.
 *
 * Built for Python's stable ABI. Arrays come as contiguous buffers, of float32 or of bytes.
 */
#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#include "_halves.h"
#include "_module.h"

/* So many elements are worth giving up Python's lock for; words are of so many bytes; so many
 * elements are looked at together; so many have one scale. */
enum { WORTH_UNLOCKING = 1 << 14, WORD_NBYTES = 4, BLOCK = 64, SCALED = 1024 };

static PyObject *refuse(const char *function) {
    return PyErr_Format(PyExc_ValueError, "%s: the buffers do not fit together", function);
}

static Py_ssize_t num_scales(Py_ssize_t count) { return (count + SCALED - 1) / SCALED; }

static Py_ssize_t words_nbytes(Py_ssize_t count, int bits) {
    if (bits == 8) return 4 * num_scales(count) + count;
    if (bits == 16) return 2 * count;
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
    float parameter; /* a threshold, or the largest number of a dtype */
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

/* Encode in so many bits an element, from the high bits of each byte down. */
static inline __attribute__((always_inline)) uint32_t encode_bits(
    const Encoding *given, int bits, void (*take)(float *, uint32_t *, Py_ssize_t, float)) {
    uint32_t odd = 0;
    const int per_byte = 8 / bits;
    for (Py_ssize_t at = 0; at < given->count; at += BLOCK) {
        uint32_t codes[BLOCK] = {0};
        const Py_ssize_t left = given->count - at, count = left < BLOCK ? left : BLOCK;
        const float *residual = given->residual == NULL ? NULL : given->residual + at;
        uint8_t *words = given->words + at / per_byte;
        if (count == BLOCK) {
            odd |= owe(given->gradient + at, residual, given->owed + at, BLOCK);
            take(given->owed + at, codes, BLOCK, given->parameter);
        } else {
            odd |= owe(given->gradient + at, residual, given->owed + at, count);
            take(given->owed + at, codes, count, given->parameter);
        }
        for (Py_ssize_t byte = 0; byte < (count + per_byte - 1) / per_byte; byte++) {
            uint32_t found = 0;
            for (int i = 0; i < per_byte; i++) found |= codes[per_byte * byte + i] << (8 - bits - bits * i);
            words[byte] = (uint8_t)found;
        }
    }
    return odd;
}

FOR_EACH_CPU static uint32_t encode_two_bits(const Encoding *given) { return encode_bits(given, 2, take_two_bits); }

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

FOR_EACH_CPU static uint32_t encode_one_bit(const Encoding *given) { return encode_bits(given, 1, take_one_bit); }

FOR_EACH_CPU static void decode_one_bit(const uint8_t *words, float *out, Py_ssize_t count, float threshold) {
    (void)threshold;
    Py_ssize_t whole = count / 8;
    for (Py_ssize_t byte = 0; byte < whole; byte++)
        for (int i = 0; i < 8; i++) out[8 * byte + i] = (float)(int)(words[byte] >> (7 - i) & 1) * 2.0f - 1.0f;
    for (Py_ssize_t i = 8 * whole; i < count; i++) out[i] = (float)(int)(words[whole] >> (7 - i % 8) & 1) * 2.0f - 1.0f;
}

/* Numbers beyond the range of a dtype are sent as its largest. */
static inline __attribute__((always_inline)) uint32_t encode_halves(
    const Encoding *given, void (*narrow)(uint16_t *, const float *, size_t),
    void (*widen)(float *, const uint16_t *, size_t)) {
    uint32_t odd = 0;
    const float most = given->parameter;
    for (Py_ssize_t at = 0; at < given->count; at += SCALED) {
        float sent[SCALED];
        uint16_t words[SCALED];
        const Py_ssize_t left = given->count - at, count = left < SCALED ? left : SCALED;
        float *owed = given->owed + at;
        odd |= owe(given->gradient + at, given->residual == NULL ? NULL : given->residual + at, owed, count);
        for (Py_ssize_t i = 0; i < count; i++) {
            const float below = owed[i] < most ? owed[i] : most;
            sent[i] = below > -most ? below : -most;
        }
        narrow(words, sent, (size_t)count);
        widen(sent, words, (size_t)count);
        for (Py_ssize_t i = 0; i < count; i++) owed[i] -= sent[i];
        memcpy(given->words + 2 * at, words, 2 * (size_t)count);
    }
    return odd;
}

FOR_EACH_CPU static uint32_t encode_float16(const Encoding *given) {
    return encode_halves(given, narrow_float16, widen_float16);
}

FOR_EACH_CPU static uint32_t encode_bfloat16(const Encoding *given) {
    return encode_halves(given, narrow_bfloat16, widen_bfloat16);
}

static void decode_float16(const uint8_t *words, float *out, Py_ssize_t count, float parameter) {
    (void)parameter;
    widen_float16(out, (const uint16_t *)words, (size_t)count);
}

static void decode_bfloat16(const uint8_t *words, float *out, Py_ssize_t count, float parameter) {
    (void)parameter;
    widen_bfloat16(out, (const uint16_t *)words, (size_t)count);
}

/* Scales come first, a float32 for each block, then a byte for each element. */
FOR_EACH_CPU static uint32_t encode_bytes(const Encoding *given) {
    uint32_t odd = 0;
    uint8_t *scales = given->words;
    int8_t *bytes = (int8_t *)scales + 4 * num_scales(given->count);
    for (Py_ssize_t at = 0; at < given->count; at += SCALED) {
        const Py_ssize_t left = given->count - at, count = left < SCALED ? left : SCALED;
        float *owed = given->owed + at;
        odd |= owe(given->gradient + at, given->residual == NULL ? NULL : given->residual + at, owed, count);
        /* The bits of absolute values are in the order of these. */
        uint32_t most = 0;
        for (Py_ssize_t i = 0; i < count; i++) {
            const uint32_t bits = bits_of(owed[i]) & 0x7fffffff;
            most = bits > most ? bits : most;
        }
        const float scale = float_of(most) / 127.0f, unit = scale > 0 ? scale : float_of(0x7f800000);
        memcpy(scales + at / SCALED * 4, &scale, 4);
        float sent[SCALED];
        for (Py_ssize_t i = 0; i < count; i++) {
            /* The sum has no bits after the point: it rounds to the nearest whole number, ties to even. */
            const float rounded = (owed[i] / unit + 0x1.8p23f) - 0x1.8p23f;
            sent[i] = rounded >= -127.0f ? rounded <= 127.0f ? rounded : 127.0f : -127.0f;
            owed[i] -= sent[i] * scale;
        }
        for (Py_ssize_t i = 0; i < count; i++) bytes[at + i] = (int8_t)(int32_t)sent[i];
    }
    return odd;
}

FOR_EACH_CPU static void decode_bytes(const uint8_t *words, float *out, Py_ssize_t count, float parameter) {
    (void)parameter;
    const int8_t *bytes = (const int8_t *)words + 4 * num_scales(count);
    for (Py_ssize_t at = 0; at < count; at += SCALED) {
        const Py_ssize_t stop = count - at < SCALED ? count : at + SCALED;
        float scale;
        memcpy(&scale, words + at / SCALED * 4, 4);
        for (Py_ssize_t i = at; i < stop; i++) out[i] = (float)bytes[i] * scale;
    }
}

/* Parse a gradient, a residual or None, memory for what is owed, and for words unless bits is 0; run one of the above;
 * return whether all that was owed is finite. */
static PyObject *encode(PyObject *args, const char *function, const char *format, int bits,
                        uint32_t (*run)(const Encoding *)) {
    Py_buffer gradient, residual, owed, words = {0};
    Encoding given = {0};
    if (!PyArg_ParseTuple(args, format, &gradient, &residual, &owed, &words, &given.parameter)) return NULL;
    given.gradient = gradient.buf, given.residual = residual.buf, given.owed = owed.buf, given.words = words.buf;
    given.count = owed.len / (Py_ssize_t)sizeof(float);
    const int fits = gradient.len == owed.len && (residual.buf == NULL || residual.len == owed.len) &&
                     words.len == (bits == 0 ? 0 : words_nbytes(given.count, bits));
    uint32_t odd = 0;
    if (fits) {
        PyThreadState *state = given.count >= WORTH_UNLOCKING ? PyEval_SaveThread() : NULL;
        /* The last word of bits may be written in part. */
        if (words.len > 0 && bits < 8) memset(given.words + words.len - WORD_NBYTES, 0, WORD_NBYTES);
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

/* The functions of a codec, for Python. */
#define DEFINE_CODEC(NAME, BITS, ENCODE, DECODE)                                \
    static PyObject *encode_##NAME(PyObject *module, PyObject *args) {          \
        (void)module;                                                           \
        return encode(args, "encode_" #NAME, "y*z*w*w*f", BITS, ENCODE);        \
    }                                                                           \
    static PyObject *decode_##NAME(PyObject *module, PyObject *args) {          \
        (void)module;                                                           \
        return decode(args, "decode_" #NAME, "y*w*f", BITS, DECODE);            \
    }

DEFINE_CODEC(2bit, 2, encode_two_bits, decode_two_bits)
DEFINE_CODEC(1bit, 1, encode_one_bit, decode_one_bit)
DEFINE_CODEC(fp16, 16, encode_float16, decode_float16)
DEFINE_CODEC(bf16, 16, encode_bfloat16, decode_bfloat16)
DEFINE_CODEC(int8, 8, encode_bytes, decode_bytes)

static PyMethodDef methods[] = {
    {"add", add, METH_VARARGS, add_doc},
    {"encode_2bit", encode_2bit, METH_VARARGS,
     "encode_2bit(gradient, residual, owed, words, threshold)\n--\n\n"
     "Do as add, and write two bits for each float32, 16 in a word; what they do not send stays in owed."},
    {"decode_2bit", decode_2bit, METH_VARARGS,
     "decode_2bit(words, out, threshold)\n--\n\nWrite the float32 that two bits each stand for."},
    {"encode_1bit", encode_1bit, METH_VARARGS,
     "encode_1bit(gradient, residual, owed, words, threshold)\n--\n\n"
     "Do as add, and write a bit for each float32, 32 in a word; what it does not send stays in owed."},
    {"decode_1bit", decode_1bit, METH_VARARGS,
     "decode_1bit(words, out, threshold)\n--\n\nWrite the float32 that a bit each stand for."},
    {"encode_fp16", encode_fp16, METH_VARARGS,
     "encode_fp16(gradient, residual, owed, words, most)\n--\n\n"
     "Do as add, and write each float32 as float16, ``most`` at most; what is rounded away stays in owed."},
    {"decode_fp16", decode_fp16, METH_VARARGS,
     "decode_fp16(words, out, unused)\n--\n\nWrite the float32 that float16 stands for."},
    {"encode_bf16", encode_bf16, METH_VARARGS,
     "encode_bf16(gradient, residual, owed, words, most)\n--\n\n"
     "Do as add, and write each float32 as bfloat16, ``most`` at most; what is rounded away stays in owed."},
    {"decode_bf16", decode_bf16, METH_VARARGS,
     "decode_bf16(words, out, unused)\n--\n\nWrite the float32 that bfloat16 stands for."},
    {"encode_int8", encode_int8, METH_VARARGS,
     "encode_int8(gradient, residual, owed, words, unused)\n--\n\n"
     "Do as add, and write a scale for each 1024 float32, then a byte for each; what is rounded away stays in owed."},
    {"decode_int8", decode_int8, METH_VARARGS,
     "decode_int8(words, out, unused)\n--\n\nWrite the float32 that scales and bytes stand for."},
    {NULL, NULL, 0, NULL},
};

MODULE(_codecs, "Gradients of one, two, eight or sixteen bits an element, and what is left of them.")
