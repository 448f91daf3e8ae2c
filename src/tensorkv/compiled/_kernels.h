/* One pass over values: the sum of the parts, the step of an optimizer, the copies to the outputs.
 *
 * A block of a value stays in the first-level cache from the first part to the last output. Each operation on an
 * element is a single one of IEEE 754 (+ - * / sqrt), rounded once, in the order that docs/semantics.md lists; the
 * build turns the contraction of products and sums off. So the bits depend on neither blocks, threads, neighbours nor
 * the processor. float16 and bfloat16 are summed and stepped in float32, and rounded once.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif
#include "_halves.h"

enum { FLOAT32, FLOAT64, FLOAT16, BFLOAT16, INT8, INT16, INT32, INT64, BOOL, NUM_DTYPES };
enum { SGD, ADAM, ADAGRAD, RMSPROP, NUM_OPTIMIZERS };
/* States of a step: three of the optimizer, and the average of the values. */
enum { MAX_STATES = 4, BLOCK = 2048 };

static const unsigned char ITEMSIZES[NUM_DTYPES] = {4, 8, 2, 2, 1, 2, 4, 8, 1};

/* The numbers of an optimizer, as tensorkv.shard.fused packs them: doubles in this order. */
typedef struct {
    double optimizer, lr, weight_decay, is_decoupled, maximize, rescale_grad, clip_gradient;
    double momentum, dampening, nesterov;
    double beta1, beta2, eps, amsgrad;
    double lr_decay, alpha, centered;
    double average; /* the share of an average of the values that a step keeps; below 0: there is no average */
} Numbers;

/* The factors of one step: what the numbers come to at this count of steps. */
typedef struct {
    const Numbers *numbers;
    double rescale; /* of the sum: rescale_grad, times what brings the norm of all gradients within its bound */
    double size, root; /* adam: lr / (1 - beta1^t) and sqrt(1 - beta2^t); adagrad: lr / (1 + (t - 1) lr_decay) */
    int is_first;      /* sgd: the momentum buffer is new, and becomes the gradient */
} Step;

/* A product as the sum of two doubles, exactly (Dekker, 1971), by operations that each round once. */
static void multiply(double a, double b, double *product, double *rest) {
    double ca = 134217729.0 * a, cb = 134217729.0 * b;
    double a1 = ca - (ca - a), b1 = cb - (cb - b), a2 = a - a1, b2 = b - b1;
    *product = a * b;
    *rest = ((a1 * b1 - *product) + a1 * b2 + a2 * b1) + a2 * b2;
}

/* By squaring, in pairs of doubles: the same on every machine, and rounded to the nearest but for rare cases. */
static double power(double base, uint64_t exponent) {
    double high = 1, low = 0, square = base, rest = 0, product, error;
    for (; exponent; exponent >>= 1) {
        if (exponent & 1) {
            multiply(high, square, &product, &error);
            error += high * rest + low * square;
            high = product + error;
            low = error - (high - product);
        }
        multiply(square, square, &product, &error);
        error += 2 * (square * rest);
        square = product + error;
        rest = error - (square - product);
    }
    return high;
}

/* The place of the average among the states: after those of the optimizer; MAX_STATES: there is none. */
static int place_of_average(const Numbers *by) {
    if (by->average < 0) return MAX_STATES;
    if (by->optimizer == SGD) return by->momentum != 0;
    if (by->optimizer == ADAM) return 2 + (by->amsgrad != 0);
    return by->optimizer == ADAGRAD ? 1 : 1 + (by->momentum > 0) + (by->centered != 0);
}

static Step step_of(const Numbers *numbers, double scale, double count, int is_first) {
    Step step = {numbers, numbers->rescale_grad * scale, numbers->lr, 1, is_first};
    if (numbers->optimizer == ADAM) {
        step.size = numbers->lr / (1 - power(numbers->beta1, (uint64_t)count));
        step.root = sqrt(1 - power(numbers->beta2, (uint64_t)count));
    } else if (numbers->optimizer == ADAGRAD) {
        step.size = numbers->lr / (1 + (count - 1) * numbers->lr_decay);
    }
    return step;
}

/* ------------------------------------------------------------ sums and steps in float and double */

/* Elements whose squares are added in one order, wherever they are: a value is divided between groups. */
enum { GROUP = 64, LANES = 8 };
/* Bytes ahead that squares have the processor fetch, whose own guesses end with each page: a fifth less time. */
enum { SQUARES_AHEAD = 2048 };

#define DEFINE_FLOATING(T, SQRT)                                                                                      \
    FOR_EACH_CPU static void add_##T(T *out, const T *a, const T *b, size_t n) {                                      \
        _Pragma("GCC ivdep") EACH out[i] = a[i] + b[i];                                                               \
    }                                                                                                                 \
                                                                                                                      \
    /* The squares of each group of elements, scaled before, added in this order of double precision. */              \
    FOR_EACH_CPU static void square_##T(double *restrict out, const T *restrict from, double factor, size_t groups) { \
        const T scale = (T)factor;                                                                                    \
        for (size_t group = 0; group < groups; group++, from += GROUP) {                                              \
            double lanes[LANES] = {0};                                                                                \
            for (size_t at = 0; at < GROUP * sizeof(T); at += 64)                                                     \
                __builtin_prefetch((const void *)((uintptr_t)from + SQUARES_AHEAD + at));                             \
            for (int i = 0; i < GROUP; i += LANES)                                                                    \
                for (int lane = 0; lane < LANES; lane++) {                                                            \
                    double each = (double)(T)(from[i + lane] * scale);                                                \
                    lanes[lane] += each * each;                                                                       \
                }                                                                                                     \
            out[group] = ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7])); \
        }                                                                                                             \
    }                                                                                                                 \
                                                                                                                      \
    FOR_EACH_CPU static void divide_##T(T *out, const T *a, double divisor, size_t n) {                               \
        const T by = (T)divisor;                                                                                      \
        _Pragma("GCC ivdep") EACH out[i] = a[i] / by;                                                                 \
    }                                                                                                                 \
                                                                                                                      \
    FOR_EACH_CPU static void average_##T(T *restrict average, const T *restrict value, double keep, size_t n) {       \
        const T fresh = (T)(1 - keep);                                                                                \
        EACH average[i] += fresh * (value[i] - average[i]);                                                           \
    }                                                                                                                 \
                                                                                                                      \
    FOR_EACH_CPU static void prepare_##T(const Step *step, const T *restrict value, T *restrict grad, size_t n) {     \
        const Numbers *by = step->numbers;                                                                            \
        const T scale = (T)step->rescale, most = (T)by->clip_gradient, decay = (T)by->weight_decay;                \
        if (step->rescale != 1) EACH grad[i] *= scale;                                                                \
        if (by->clip_gradient > 0)                                                                                    \
            EACH grad[i] = grad[i] < -most ? -most : (grad[i] > most ? most : grad[i]);                               \
        if (by->maximize != 0) EACH grad[i] = -grad[i];                                                               \
        if (by->weight_decay != 0 && by->is_decoupled == 0) EACH grad[i] += decay * value[i];                         \
    }                                                                                                                 \
                                                                                                                      \
    FOR_EACH_CPU static void step_##T(const Step *step, T *restrict value, T *restrict grad, T *restrict first,       \
                                      T *restrict second, T *restrict third, size_t n) {                              \
        const Numbers *by = step->numbers;                                                                            \
        const T size = (T)step->size, root = (T)step->root, eps = (T)by->eps;                                         \
        prepare_##T(step, value, grad, n);                                                                            \
        if (by->optimizer == SGD) {                                                                                   \
            const T momentum = (T)by->momentum, fresh = (T)(1 - by->dampening);                                       \
            if (by->momentum != 0) {                                                                                  \
                if (step->is_first)                                                                                   \
                    memcpy(first, grad, n * sizeof(T));                                                               \
                else                                                                                                  \
                    EACH first[i] = momentum * first[i] + fresh * grad[i];                                            \
                if (by->nesterov != 0)                                                                                \
                    EACH grad[i] += momentum * first[i];                                                              \
                else                                                                                                  \
                    memcpy(grad, first, n * sizeof(T));                                                               \
            }                                                                                                         \
            EACH value[i] -= size * grad[i];                                                                          \
        } else if (by->optimizer == ADAM) {                                                                           \
            const T keep = (T)(1 - by->lr * by->weight_decay), beta2 = (T)by->beta2;                                  \
            const T fresh1 = (T)(1 - by->beta1), fresh2 = (T)(1 - by->beta2);                                         \
            T *restrict square = second;                                                                              \
            if (by->weight_decay != 0 && by->is_decoupled != 0) EACH value[i] *= keep;                                \
            EACH first[i] += fresh1 * (grad[i] - first[i]);                                                           \
            EACH second[i] = beta2 * second[i] + (fresh2 * grad[i]) * grad[i];                                        \
            if (by->amsgrad != 0) {                                                                                   \
                EACH third[i] = third[i] >= second[i] || third[i] != third[i] ? third[i] : second[i];                 \
                square = third;                                                                                       \
            }                                                                                                         \
            EACH value[i] -= (size * first[i]) / (SQRT(square[i]) / root + eps);                                      \
        } else if (by->optimizer == ADAGRAD) {                                                                        \
            EACH first[i] += grad[i] * grad[i];                                                                       \
            EACH value[i] -= (size * grad[i]) / (SQRT(first[i]) + eps);                                               \
        } else {                                                                                                      \
            const T alpha = (T)by->alpha, fresh = (T)(1 - by->alpha), momentum = (T)by->momentum;                     \
            T *restrict mean = by->momentum > 0 ? third : second;                                                     \
            EACH first[i] = alpha * first[i] + (fresh * grad[i]) * grad[i];                                           \
            if (by->centered != 0) EACH mean[i] += fresh * (grad[i] - mean[i]);                                       \
            if (by->momentum <= 0) EACH grad[i] *= size;                                                              \
            if (by->centered != 0)                                                                                    \
                EACH grad[i] /= SQRT(first[i] - mean[i] * mean[i]) + eps;                                             \
            else                                                                                                      \
                EACH grad[i] /= SQRT(first[i]) + eps;                                                                 \
            if (by->momentum > 0) {                                                                                   \
                EACH second[i] = momentum * second[i] + grad[i];                                                      \
                EACH value[i] -= size * second[i];                                                                    \
            } else {                                                                                                  \
                EACH value[i] -= grad[i];                                                                             \
            }                                                                                                         \
        }                                                                                                             \
    }

DEFINE_FLOATING(float, sqrtf)
DEFINE_FLOATING(double, sqrt)

#define DEFINE_INTEGER(T, OP)                                                                                         \
    FOR_EACH_CPU static void add_##T(T *out, const T *a, const T *b, size_t n) {                                      \
        _Pragma("GCC ivdep") EACH out[i] = (T)(a[i] OP b[i]);                                                         \
    }

typedef unsigned char bool8;
DEFINE_INTEGER(uint8_t, +)
DEFINE_INTEGER(uint16_t, +)
DEFINE_INTEGER(uint32_t, +)
DEFINE_INTEGER(uint64_t, +)
DEFINE_INTEGER(bool8, |)

FOR_EACH_CPU static void widen_float(double *restrict out, const float *restrict from, size_t n) {
    EACH out[i] = from[i];
}

FOR_EACH_CPU static void narrow_double(float *restrict out, const double *restrict from, size_t n) {
    EACH out[i] = (float)from[i];
}

/* Return elements as the numbers that are added: themselves, or float32 in the buffer. */
static const void *widened(const char *from, int dtype, float *buffer, size_t n) {
    if (dtype == FLOAT16)
        widen_float16(buffer, (const uint16_t *)from, n);
    else if (dtype == BFLOAT16)
        widen_bfloat16(buffer, (const uint16_t *)from, n);
    else
        return from;
    return buffer;
}

static void narrow(char *out, int dtype, const float *from, size_t n) {
    if (dtype == FLOAT16)
        narrow_float16((uint16_t *)out, from, n);
    else
        narrow_bfloat16((uint16_t *)out, from, n);
}

static int is_low(int dtype) { return dtype == FLOAT16 || dtype == BFLOAT16; }

static void add(int dtype, void *out, const void *a, const void *b, size_t n) {
    switch (dtype) {
    case FLOAT64: add_double(out, a, b, n); break;
    case INT8: add_uint8_t(out, a, b, n); break;
    case INT16: add_uint16_t(out, a, b, n); break;
    case INT32: add_uint32_t(out, a, b, n); break;
    case INT64: add_uint64_t(out, a, b, n); break;
    case BOOL: add_bool8(out, a, b, n); break;
    default: add_float(out, a, b, n);
    }
}

/* Divide a sum of floating-point numbers. */
static void divide(int dtype, void *out, const void *a, double divisor, size_t n) {
    if (dtype == FLOAT64)
        divide_double(out, a, divisor, n);
    else
        divide_float(out, a, divisor, n);
}

/* ------------------------------------------------------------ outputs */

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
    memmove(out, from, nbytes);
}

static void copy_out(char *out, int to, const char *from, int dtype, size_t n, int past_cache) {
    float buffer[BLOCK];
    if (to == dtype)
        copy_block(out, from, n * ITEMSIZES[dtype], past_cache);
    else if (to == FLOAT64)
        widen_float((double *)out, widened(from, dtype, buffer, n), n);
    else if (dtype == FLOAT64)
        narrow_double((float *)out, (const double *)from, n);
    else if (to == FLOAT32)
        widened(from, dtype, (float *)out, n);
    else
        narrow(out, to, widened(from, dtype, buffer, n), n);
}

/* ------------------------------------------------------------ one key */

/* What is done with one key; addresses are of the first element. */
typedef struct {
    char *value; /* NULL: only the outputs are written */
    char *states[MAX_STATES];
    const char *const *parts; /* of the value's dtype */
    char *const *outs;
    const unsigned char *out_dtypes; /* NULL: the value's */
    size_t num_parts, num_outs, num_past_cache;
    double divisor;     /* of the sum, which becomes a mean; 0 or 1: it stays as it is */
    int has_wide_parts; /* of a float16 or bfloat16 value: parts are float32 */
    int has_wide_outs;  /* likewise: outputs are float32, and get the sum before it is rounded */
} Item;

static void step_block(const Step *step, int dtype, const Item *item, size_t at, void *grad, size_t n) {
    size_t offset = at * ITEMSIZES[dtype];
    char *value = item->value + offset, *states[MAX_STATES];
    for (int i = 0; i < MAX_STATES; i++) states[i] = item->states[i] == NULL ? NULL : item->states[i] + offset;
    int place = place_of_average(step->numbers);
    char *average = NULL;
    if (place < MAX_STATES) {
        /* Of a float16 or bfloat16 value it is float32: smaller steps than those numbers can show add up in it. */
        average = is_low(dtype) ? item->states[place] + at * sizeof(float) : states[place];
        states[place] = NULL;
    }
    if (dtype == FLOAT64) {
        step_double(step, (double *)value, grad, (double *)states[0], (double *)states[1], (double *)states[2], n);
        if (average != NULL) average_double((double *)average, (double *)value, step->numbers->average, n);
    } else if (dtype == FLOAT32) {
        step_float(step, (float *)value, grad, (float *)states[0], (float *)states[1], (float *)states[2], n);
        if (average != NULL) average_float((float *)average, (float *)value, step->numbers->average, n);
    } else {
        float wide[1 + MAX_STATES][BLOCK];
        widened(value, dtype, wide[0], n);
        for (int i = 0; i < MAX_STATES; i++)
            if (states[i] != NULL) widened(states[i], dtype, wide[1 + i], n);
        step_float(step, wide[0], grad, wide[1], wide[2], wide[3], n);
        narrow(value, dtype, wide[0], n);
        for (int i = 0; i < MAX_STATES; i++)
            if (states[i] != NULL) narrow(states[i], dtype, wide[1 + i], n);
        if (average != NULL) {
            widened(value, dtype, wide[0], n);
            average_float((float *)average, wide[0], step->numbers->average, n);
        }
    }
}

/* Sum the parts of a block and divide the sum, in the precision of sums; in the buffer if ``is_copied``, else perhaps
 * where the only part is. ``is_rounded``: to the dtype of the value. */
static const void *sum_block(const Item *item, int dtype, size_t at, size_t n, void *buffer, float *wide, int is_copied,
                             int is_rounded) {
    int is_narrow = is_low(dtype), sum_dtype = is_narrow ? FLOAT32 : dtype;
    int part_dtype = item->has_wide_parts ? sum_dtype : dtype, is_divided = item->divisor > 1;
    size_t place = at * ITEMSIZES[part_dtype];
    const void *sum = widened(item->parts[0] + place, part_dtype, buffer, n);
    for (size_t i = 1; i < item->num_parts; i++) {
        add(sum_dtype, buffer, sum, widened(item->parts[i] + place, part_dtype, wide, n), n);
        sum = buffer;
    }
    if (is_divided) {
        divide(sum_dtype, buffer, sum, item->divisor, n);
        sum = buffer;
    }
    if (is_narrow && is_rounded && (item->num_parts > 1 || item->has_wide_parts || is_divided)) {
        narrow((char *)wide, dtype, sum, n);
        sum = widened((char *)wide, dtype, buffer, n);
    }
    if (is_copied && sum != buffer) memcpy(buffer, sum, n * ITEMSIZES[sum_dtype]);
    return is_copied ? buffer : sum;
}

/* Sum the parts, divide the sum, step or assign, and copy out, for the elements from start to stop. */
static void run_item(const Item *item, int dtype, const Step *step, size_t start, size_t stop) {
    _Alignas(64) double buffer[BLOCK];
    float wide[BLOCK];
    size_t itemsize = ITEMSIZES[dtype];
    int is_narrow = is_low(dtype), sum_dtype = is_narrow ? FLOAT32 : dtype;
    int is_divided = item->divisor > 1;
    int is_added = item->num_parts > 1 || step != NULL || item->has_wide_parts || item->has_wide_outs || is_divided;
    for (size_t at = start; at < stop; at += BLOCK) {
        size_t n = stop - at < BLOCK ? stop - at : BLOCK, offset = at * itemsize;
        const char *from = item->value == NULL ? NULL : item->value + offset;
        int from_dtype = dtype;
        if (item->num_parts) {
            int steps = step != NULL;
            const void *sum = is_added ? sum_block(item, dtype, at, n, buffer, wide, steps, steps) : item->parts[0] + offset;
            if (item->has_wide_outs) {
                from_dtype = sum_dtype;
            } else if (is_narrow && is_added && !steps) {
                narrow((char *)wide, dtype, sum, n);
                sum = wide;
            }
            if (step != NULL) {
                step_block(step, dtype, item, at, buffer, n);
            } else {
                if (item->value != NULL && sum != item->value + offset)
                    copy_block(item->value + offset, sum, n * itemsize, item->num_past_cache > item->num_outs);
                from = sum;
            }
        }
        for (size_t i = 0; i < item->num_outs; i++) {
            int to = item->has_wide_outs ? from_dtype : item->out_dtypes == NULL ? dtype : item->out_dtypes[i];
            char *out = item->outs[i] + at * ITEMSIZES[to];
            /* An output may be the only part itself. */
            if (out != from) copy_out(out, to, from, from_dtype, n, i + item->num_past_cache >= item->num_outs);
        }
    }
}

/* ------------------------------------------------------------ sums of squares */

/* A sum of doubles that are not negative, exact: 32 bits of its value in each limb, and room for 2^31 carries. */
enum { NUM_LIMBS = 68 };

typedef struct {
    uint64_t limbs[NUM_LIMBS]; /* in units of 2^-1074, the least first */
    double rest;               /* Inf and NaN among what was added; 0 without any */
} ExactSum;

static void add_exact(ExactSum *sum, const double *numbers, size_t n) {
    EACH {
        uint64_t bits;
        memcpy(&bits, &numbers[i], 8);
        unsigned exponent = (unsigned)(bits >> 52 & 0x7ff);
        if (exponent == 0x7ff) {
            sum->rest += numbers[i];
            continue;
        }
        uint64_t mantissa = (bits & 0xfffffffffffff) | (uint64_t)(exponent != 0) << 52;
        unsigned at = exponent ? exponent - 1 : 0, shift = at % 32;
        uint64_t low = mantissa << shift, *limb = &sum->limbs[at / 32];
        limb[0] += low & 0xffffffff;
        limb[1] += low >> 32;
        limb[2] += shift ? mantissa >> (64 - shift) : 0;
    }
}

/* Add another sum, and bring each limb to 32 bits. */
static void merge_exact(ExactSum *sum, const ExactSum *other) {
    uint64_t carry = 0;
    for (int i = 0; i < NUM_LIMBS; i++) {
        carry += sum->limbs[i] + other->limbs[i];
        sum->limbs[i] = carry & 0xffffffff;
        carry >>= 32;
    }
    sum->rest += other->rest;
}

/* Add the squares of the summed and rescaled parts for the elements from start to stop, whole groups. */
static void square_item(const Item *item, int dtype, double rescale, size_t start, size_t stop, ExactSum *total) {
    _Alignas(64) double buffer[BLOCK], squares[BLOCK / GROUP];
    float wide[BLOCK];
    for (size_t at = start; at < stop; at += BLOCK) {
        size_t n = stop - at < BLOCK ? stop - at : BLOCK, groups = (n + GROUP - 1) / GROUP;
        const void *sum = sum_block(item, dtype, at, n, buffer, wide, n % GROUP != 0, 1);
        if (dtype == FLOAT64) {
            if (n % GROUP) memset(buffer + n, 0, (groups * GROUP - n) * 8);
            square_double(squares, sum, rescale, groups);
        } else {
            if (n % GROUP) memset((float *)buffer + n, 0, (groups * GROUP - n) * 4);
            square_float(squares, sum, rescale, groups);
        }
        add_exact(total, squares, groups);
    }
}

/* How many elements of the summed parts are NaN or Inf, from start to stop. */
static size_t count_nonfinite(const Item *item, int dtype, size_t start, size_t stop) {
    _Alignas(64) double buffer[BLOCK];
    float wide[BLOCK];
    size_t count = 0;
    for (size_t at = start; at < stop; at += BLOCK) {
        size_t n = stop - at < BLOCK ? stop - at : BLOCK;
        const void *sum = sum_block(item, dtype, at, n, buffer, wide, 0, 1);
        for (size_t i = 0; i < n; i++)
            count += dtype == FLOAT64 ? !isfinite(((const double *)sum)[i]) : !isfinite(((const float *)sum)[i]);
    }
    return count;
}
