/* float16 and bfloat16, to and from float32: rounded to the nearest, ties to even, on every processor alike. */
#include <stdint.h>
#include <string.h>

#include "_cpus.h"

#define EACH for (size_t i = 0; i < n; i++)

static inline uint32_t bits_of(float number) {
    uint32_t bits;
    memcpy(&bits, &number, 4);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float number;
    memcpy(&number, &bits, 4);
    return number;
}

FOR_EACH_CPU static void widen_bfloat16(float *restrict out, const uint16_t *restrict from, size_t n) {
    EACH out[i] = float_of((uint32_t)from[i] << 16);
}

FOR_EACH_CPU static void narrow_bfloat16(uint16_t *restrict out, const float *restrict from, size_t n) {
    EACH {
        uint32_t bits = bits_of(from[i]);
        uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        out[i] = (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
    }
}

FOR_EACH_CPU static void widen_float16(float *restrict out, const uint16_t *restrict from, size_t n) {
    EACH {
        uint32_t magnitude = (uint32_t)(from[i] & 0x7fff) << 13, sign = (uint32_t)(from[i] & 0x8000) << 16;
        /* The exponent's bias is 112 less. The difference is exact, and of normal numbers: others take much longer. */
        uint32_t normal = magnitude + (112u << 23), other = magnitude | 0x7f800000;
        uint32_t subnormal = bits_of(float_of(normal + (1u << 23)) - 0x1p-14f);
        out[i] = float_of(sign | (magnitude >= 0x0f800000 ? other : magnitude < 1u << 23 ? subnormal : normal));
    }
}

FOR_EACH_CPU static void narrow_float16(uint16_t *restrict out, const float *restrict from, size_t n) {
    EACH {
        uint32_t bits = bits_of(from[i]) & 0x7fffffff, sign = bits_of(from[i]) >> 16 & 0x8000;
        uint32_t normal = (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
        /* The sum rounds to a multiple of the smallest subnormal number. */
        uint32_t subnormal = bits_of(float_of(bits) + 0.5f) - bits_of(0.5f);
        uint32_t large = bits > 0x7f800000 ? 0x7e00 : 0x7c00;
        out[i] = (uint16_t)(sign | (bits >= 143u << 23 ? large : (bits < 113u << 23 ? subnormal : normal)));
    }
}
