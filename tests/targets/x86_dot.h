/* The product of the x86 vector headers in plain C, on any vector of LANES int32 numbers. */
#ifndef X86_DOT_H
#define X86_DOT_H

#include <stdint.h>
#include <string.h>

/* Calls compile faster than copies. */
#define WORD static __attribute__((noinline, unused))

WORD vec dot_in_c(vec sum, vec a, vec b)
{
    uint32_t sums[LANES];
    uint8_t x[4 * LANES];
    int8_t w[4 * LANES];
    memcpy(sums, &sum, sizeof sums);
    memcpy(x, &a, sizeof x);
    memcpy(w, &b, sizeof w);
    for (int d = 0; d < 4 * LANES; ++d) {
        sums[d / 4] += (uint32_t)(x[d] * w[d]);
    }
    memcpy(&sum, sums, sizeof sums);
    return sum;
}
#define DOT(sum, a, b) ((sum) = dot_in_c(sum, a, b))
#define DOT_AT(sum, a, b) DOT(sum, a, weights_of(b))

WORD vec dot_pairs_in_c(vec sum, vec a, vec b)
{
    uint32_t sums[LANES];
    int16_t x[2 * LANES], w[2 * LANES];
    memcpy(sums, &sum, sizeof sums);
    memcpy(x, &a, sizeof x);
    memcpy(w, &b, sizeof w);
    for (int d = 0; d < 2 * LANES; ++d) {
        sums[d / 2] += (uint32_t)(x[d] * w[d]);
    }
    memcpy(&sum, sums, sizeof sums);
    return sum;
}
#define DOT_PAIRS(sum, a, b) ((sum) = dot_pairs_in_c(sum, a, b))

#endif
