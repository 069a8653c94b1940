/* Products of bytes with AVX2, which multiplies pairs of 16 bits exactly; vectors_ymm.h has the rest. */
#ifndef QCOMPILE_VECTORS_H
#define QCOMPILE_VECTORS_H

#include "vectors_ymm.h"

/* Adds b to the sum. Compilers spill around the intrinsic. */
#define ADD_TO(sum, b) __asm__("vpaddd %1, %0, %0" : "+x"(sum) : "x"(b))

/* Adds four products of a, uint8, and b, int8, to each lane: two of even depths and two of odd ones. */
static inline vec dot(vec sum, vec a, vec b)
{
    const vec even = _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8);
    const vec odd = _mm256_srai_epi16(b, 8);
    ADD_TO(sum, _mm256_madd_epi16(_mm256_and_si256(a, _mm256_set1_epi16(0xff)), even));
    ADD_TO(sum, _mm256_madd_epi16(_mm256_srli_epi16(a, 8), odd));
    return sum;
}
#define DOT(sum, a, b) ((sum) = dot(sum, a, b))

/* The same with weights in memory as 16 bits: those of even depths of all lanes, then those of odd ones. */
#define DOT_AT(sum, a, b)                                                                                              \
    do {                                                                                                               \
        ADD_TO(sum, _mm256_madd_epi16(_mm256_and_si256(a, _mm256_set1_epi16(0xff)),                                    \
                                      _mm256_loadu_si256((const void *)(b))));                                         \
        ADD_TO(sum, _mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_loadu_si256((const void *)((b) + 2 * LANES))));  \
    } while (0)

/* The same where no sum of two neighbouring products leaves 16 bits: others would saturate. */
#define DOT_SMALL(sum, a, b) ADD_TO(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)))

/* Adds two products of int16 to each lane. */
#define DOT_PAIRS(sum, a, b) ADD_TO(sum, _mm256_madd_epi16(a, b))

#endif
