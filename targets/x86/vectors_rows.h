/* What moves bytes in the same way whatever the vectors are. */
#ifndef QCOMPILE_VECTORS_ROWS_H
#define QCOMPILE_VECTORS_ROWS_H

#include <immintrin.h>
#include <stdint.h>

/* A row of int16 between `left` and `right` elements of border. */
static inline void copy_row_i16(int16_t *to, const int16_t *from, int count, int left, int right, int16_t border)
{
    for (int i = 0; i < left; ++i) {
        to[i] = border;
    }
    __builtin_memcpy(to + left, from, (size_t)count * sizeof *to);
    for (int i = 0; i < right; ++i) {
        to[left + count + i] = border;
    }
}

/* Sixteen by sixteen bytes, rows to columns; rows are so many bytes apart. */
static inline void transpose_tile(uint8_t *to, int to_pitch, const uint8_t *from, int from_pitch)
{
    __m128i a[16], b[16];
    for (int i = 0; i < 16; ++i) {
        a[i] = _mm_loadu_si128((const void *)(from + i * from_pitch));
    }
    for (int i = 0; i < 8; ++i) {
        b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 8]);
        b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 8]);
    }
    for (int i = 0; i < 8; ++i) {
        a[2 * i] = _mm_unpacklo_epi8(b[i], b[i + 8]);
        a[2 * i + 1] = _mm_unpackhi_epi8(b[i], b[i + 8]);
    }
    for (int i = 0; i < 8; ++i) {
        b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 8]);
        b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 8]);
    }
    for (int i = 0; i < 8; ++i) {
        _mm_storeu_si128((void *)(to + 2 * i * to_pitch), _mm_unpacklo_epi8(b[i], b[i + 8]));
        _mm_storeu_si128((void *)(to + (2 * i + 1) * to_pitch), _mm_unpackhi_epi8(b[i], b[i + 8]));
    }
}

#endif
