/* Vectors of sixteen int32 numbers: AVX-512 with VNNI. */
#ifndef QCOMPILE_VECTORS_H
#define QCOMPILE_VECTORS_H

#include <immintrin.h>
#include <stdint.h>

#include "vectors_rows.h"

#define LANES 16

typedef __m512i vec;

static inline vec splat(int32_t a)
{
    return _mm512_set1_epi32(a);
}

static inline vec load(const int32_t *from)
{
    return _mm512_loadu_si512(from);
}

static inline void store(int32_t *to, vec a)
{
    _mm512_storeu_si512(to, a);
}

static inline void store_some(int32_t *to, vec a, int count)
{
    _mm512_mask_storeu_epi32(to, (__mmask16)((1u << count) - 1u), a);
}

/* Weights: four depths of every lane. */
static inline vec weights_of(const void *from)
{
    return _mm512_loadu_si512(from);
}

/* Four bytes in every lane. */
static inline vec four(const void *from)
{
    int32_t bytes;
    __builtin_memcpy(&bytes, from, sizeof bytes);
    return _mm512_set1_epi32(bytes);
}

/* The same, int8 to uint8: 128 more. */
static inline vec four_flipped(const void *from)
{
    return _mm512_xor_si512(four(from), _mm512_set1_epi32((int32_t)0x80808080u));
}

/* Adds four products of a, uint8, and b, int8, to each lane. Compilers spill around the intrinsic. */
#define DOT(sum, a, b) __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b))

/* The same with b in memory. Compilers load it ahead, and spill it, around an intrinsic or a register. */
#define DOT_AT(sum, a, b) \
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "m"(*(const __m512i_u *)(const void *)(b)))

/* Adds two products of int16 to each lane. */
#define DOT_PAIRS(sum, a, b) __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b))

static inline vec add(vec a, vec b)
{
    return _mm512_add_epi32(a, b);
}

static inline vec multiply(vec a, vec b)
{
    return _mm512_mullo_epi32(a, b);
}

static inline vec shift_left_each(vec a, vec places)
{
    return _mm512_sllv_epi32(a, places);
}

/* Upper halves of the 64-bit products. */
static inline vec high_multiply_each(vec a, vec b)
{
    const vec even = _mm512_mul_epi32(a, b);
    const vec odd = _mm512_mul_epi32(_mm512_srli_epi64(a, 32), _mm512_srli_epi64(b, 32));
    return _mm512_mask_shuffle_epi32(odd, 0x5555, even, (_MM_PERM_ENUM)0xf5);
}

/* a / 2^places, rounded to nearest, halves upward; `half` is 2^(places - 1). */
static inline vec round_shift_all(vec a, int places)
{
    return _mm512_srai_epi32(_mm512_add_epi32(a, _mm512_set1_epi32(1 << (places - 1))), (unsigned)places);
}

static inline vec round_shift_each(vec a, vec places)
{
    const vec half = _mm512_sllv_epi32(_mm512_set1_epi32(1), _mm512_sub_epi32(places, _mm512_set1_epi32(1)));
    return _mm512_srav_epi32(_mm512_add_epi32(a, half), places);
}

static inline vec clamp_all(vec a, int32_t lo, int32_t hi)
{
    return _mm512_max_epi32(_mm512_min_epi32(a, splat(hi)), splat(lo));
}

/* Lanes from memory; `count` of them where they are fewer than all. */
static inline vec load_i8(const int8_t *from, int count)
{
    return _mm512_cvtepi8_epi32(count >= LANES ? _mm_loadu_si128((const void *)from)
                                               : _mm_maskz_loadu_epi8((__mmask16)((1u << count) - 1u), from));
}

static inline vec load_u8(const uint8_t *from, int count)
{
    return _mm512_cvtepu8_epi32(count >= LANES ? _mm_loadu_si128((const void *)from)
                                               : _mm_maskz_loadu_epi8((__mmask16)((1u << count) - 1u), from));
}

static inline vec load_i16(const int16_t *from, int count)
{
    return _mm512_cvtepi16_epi32(count >= LANES ? _mm256_loadu_si256((const void *)from)
                                                : _mm256_maskz_loadu_epi16((__mmask16)((1u << count) - 1u), from));
}

static inline vec load_i32(const int32_t *from, int count)
{
    return count >= LANES ? load(from) : _mm512_maskz_loadu_epi32((__mmask16)((1u << count) - 1u), from);
}

/* Stores the first `count` of 64 results: a + zero, between lo and hi. */
static inline void store4_i8(int8_t *to, int count, vec a, vec b, vec c, vec d, int zero, int lo, int hi)
{
    const vec z = _mm512_set1_epi16((short)zero);
    const vec ab = _mm512_adds_epi16(_mm512_packs_epi32(a, b), z);
    const vec cd = _mm512_adds_epi16(_mm512_packs_epi32(c, d), z);
    const vec order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    vec y = _mm512_permutexvar_epi32(order, _mm512_packs_epi16(ab, cd));
    if (lo > -128) {
        y = _mm512_max_epi8(y, _mm512_set1_epi8((char)lo));
    }
    if (hi < 127) {
        y = _mm512_min_epi8(y, _mm512_set1_epi8((char)hi));
    }
    if (count >= 4 * LANES) {
        _mm512_storeu_si512(to, y);
    } else {
        _mm512_mask_storeu_epi8(to, (UINT64_C(1) << count) - 1u, y);
    }
}

static inline void store4_u8(uint8_t *to, int count, vec a, vec b, vec c, vec d, int zero, int lo, int hi)
{
    const vec z = _mm512_set1_epi16((short)zero);
    const vec ab = _mm512_adds_epi16(_mm512_packs_epi32(a, b), z);
    const vec cd = _mm512_adds_epi16(_mm512_packs_epi32(c, d), z);
    const vec order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    vec y = _mm512_permutexvar_epi32(order, _mm512_packus_epi16(ab, cd));
    if (lo > 0) {
        y = _mm512_max_epu8(y, _mm512_set1_epi8((char)lo));
    }
    if (hi < 255) {
        y = _mm512_min_epu8(y, _mm512_set1_epi8((char)hi));
    }
    if (count >= 4 * LANES) {
        _mm512_storeu_si512(to, y);
    } else {
        _mm512_mask_storeu_epi8(to, (UINT64_C(1) << count) - 1u, y);
    }
}

/* The first `count` of 32 results. */
static inline void store2_i8(int8_t *to, int count, vec a, vec b, int zero, int lo, int hi)
{
    const vec order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    const vec ab = _mm512_adds_epi16(_mm512_packs_epi32(a, b), _mm512_set1_epi16((short)zero));
    __m256i y = _mm512_cvtsepi16_epi8(_mm512_permutexvar_epi64(order, ab));
    if (lo > -128) {
        y = _mm256_max_epi8(y, _mm256_set1_epi8((char)lo));
    }
    if (hi < 127) {
        y = _mm256_min_epi8(y, _mm256_set1_epi8((char)hi));
    }
    if (count >= 2 * LANES) {
        _mm256_storeu_si256((void *)to, y);
    } else {
        _mm256_mask_storeu_epi8(to, (1u << count) - 1u, y);
    }
}

static inline void store2_u8(uint8_t *to, int count, vec a, vec b, int zero, int lo, int hi)
{
    const vec order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    const vec ab = _mm512_adds_epi16(_mm512_packs_epi32(a, b), _mm512_set1_epi16((short)zero));
    const vec positive = _mm512_max_epi16(_mm512_permutexvar_epi64(order, ab), _mm512_setzero_si512());
    __m256i y = _mm512_cvtusepi16_epi8(positive);
    if (lo > 0) {
        y = _mm256_max_epu8(y, _mm256_set1_epi8((char)lo));
    }
    if (hi < 255) {
        y = _mm256_min_epu8(y, _mm256_set1_epi8((char)hi));
    }
    if (count >= 2 * LANES) {
        _mm256_storeu_si256((void *)to, y);
    } else {
        _mm256_mask_storeu_epi8(to, (1u << count) - 1u, y);
    }
}

/* The first `count` of 16 results; sums of a and zero stay in 32 bits. */
static inline void store1_i8(int8_t *to, int count, vec a, int zero, int lo, int hi)
{
    const vec y = clamp_all(a, lo - zero, hi - zero);
    const __m128i bytes = _mm512_cvtepi32_epi8(add(y, splat(zero)));
    if (count >= LANES) {
        _mm_storeu_si128((void *)to, bytes);
    } else {
        _mm_mask_storeu_epi8(to, (__mmask16)((1u << count) - 1u), bytes);
    }
}

static inline void store1_u8(uint8_t *to, int count, vec a, int zero, int lo, int hi)
{
    store1_i8((int8_t *)to, count, a, zero, lo, hi);
}

static inline void store1_i16(int16_t *to, int count, vec a, int zero, int lo, int hi)
{
    const __m256i y = _mm512_cvtepi32_epi16(add(clamp_all(a, lo - zero, hi - zero), splat(zero)));
    if (count >= LANES) {
        _mm256_storeu_si256((void *)to, y);
    } else {
        _mm256_mask_storeu_epi16(to, (__mmask16)((1u << count) - 1u), y);
    }
}

static inline void store1_i32(int32_t *to, int count, vec a, int zero, int lo, int hi)
{
    vec y = add(a, splat(zero));
    if (lo > INT32_MIN || hi < INT32_MAX) {
        y = clamp_all(y, lo, hi);
    }
    if (count >= LANES) {
        store(to, y);
    } else {
        store_some(to, y, count);
    }
}

/* Rows of an image between `left` and `right` bytes of border, with 128 added to every byte where `flip` is 0x80. */
static inline void copy_row(uint8_t *to, const void *from, int bytes, int left, int right, uint8_t border, uint8_t flip)
{
    const uint8_t *const row = from;
    __builtin_memset(to, border, (size_t)left);
    if (flip) {
        const vec sign = _mm512_set1_epi8((char)0x80);
        int at = 0;
        for (; at + 64 <= bytes; at += 64) {
            _mm512_storeu_si512(to + left + at, _mm512_xor_si512(_mm512_loadu_si512(row + at), sign));
        }
        if (at < bytes) {
            const __mmask64 rest = (UINT64_C(1) << (bytes - at)) - 1u;
            _mm512_mask_storeu_epi8(to + left + at, rest,
                                    _mm512_xor_si512(_mm512_maskz_loadu_epi8(rest, row + at), sign));
        }
    } else {
        __builtin_memcpy(to + left, row, (size_t)bytes);
    }
    __builtin_memset(to + left + bytes, border, (size_t)right);
}

/* Hides where a pointer comes from: compilers would carry what a loop loads over to its next turn, and spill it. */
#define OPAQUE(pointer) __asm__("" : "+r"(pointer))

/* As many bytes as a register holds: one of each of 4 * LANES channels. */
static inline vec bytes_of(const uint8_t *from)
{
    return _mm512_loadu_si512(from);
}

/* Puts the bytes that four places have of a channel into one lane; the lanes come in the order of `store_woven`. */
static inline void weave(vec *a, vec *b, vec *c, vec *d)
{
    const vec ab = _mm512_unpacklo_epi8(*a, *b);
    const vec cd = _mm512_unpacklo_epi8(*c, *d);
    const vec ab_high = _mm512_unpackhi_epi8(*a, *b);
    const vec cd_high = _mm512_unpackhi_epi8(*c, *d);
    *a = _mm512_unpacklo_epi16(ab, cd);
    *b = _mm512_unpackhi_epi16(ab, cd);
    *c = _mm512_unpacklo_epi16(ab_high, cd_high);
    *d = _mm512_unpackhi_epi16(ab_high, cd_high);
}

/* Stores the first `count` of 64 results whose lanes `weave` ordered: packing undoes it. */
static inline void store_woven_i8(int8_t *to, int count, vec a, vec b, vec c, vec d, int zero, int lo, int hi)
{
    const vec z = _mm512_set1_epi16((short)zero);
    const vec ab = _mm512_adds_epi16(_mm512_packs_epi32(a, b), z);
    const vec cd = _mm512_adds_epi16(_mm512_packs_epi32(c, d), z);
    vec y = _mm512_packs_epi16(ab, cd);
    if (lo > -128) {
        y = _mm512_max_epi8(y, _mm512_set1_epi8((char)lo));
    }
    if (hi < 127) {
        y = _mm512_min_epi8(y, _mm512_set1_epi8((char)hi));
    }
    if (count >= 4 * LANES) {
        _mm512_storeu_si512(to, y);
    } else {
        _mm512_mask_storeu_epi8(to, (UINT64_C(1) << count) - 1u, y);
    }
}

static inline void store_woven_u8(uint8_t *to, int count, vec a, vec b, vec c, vec d, int zero, int lo, int hi)
{
    const vec z = _mm512_set1_epi16((short)zero);
    const vec ab = _mm512_adds_epi16(_mm512_packs_epi32(a, b), z);
    const vec cd = _mm512_adds_epi16(_mm512_packs_epi32(c, d), z);
    vec y = _mm512_packus_epi16(ab, cd);
    if (lo > 0) {
        y = _mm512_max_epu8(y, _mm512_set1_epi8((char)lo));
    }
    if (hi < 255) {
        y = _mm512_min_epu8(y, _mm512_set1_epi8((char)hi));
    }
    if (count >= 4 * LANES) {
        _mm512_storeu_si512(to, y);
    } else {
        _mm512_mask_storeu_epi8(to, (UINT64_C(1) << count) - 1u, y);
    }
}

/* The first bytes of a vector. */
static inline void store_bytes(void *to, vec a, int bytes)
{
    if (bytes >= 64) {
        _mm512_storeu_si512(to, a);
    } else {
        _mm512_mask_storeu_epi8(to, (UINT64_C(1) << bytes) - 1u, a);
    }
}

/* A sum and zero, between lo and hi; neither leaves 32 bits. */
static inline vec bounded(vec a, int zero, int lo, int hi)
{
    return add(clamp_all(a, lo - zero, hi - zero), splat(zero));
}

static inline void store_woven_i16(int16_t *to, int count, vec a, vec b, vec c, vec d, int zero, int lo, int hi)
{
    const vec ab = _mm512_packs_epi32(bounded(a, zero, lo, hi), bounded(b, zero, lo, hi));
    const vec cd = _mm512_packs_epi32(bounded(c, zero, lo, hi), bounded(d, zero, lo, hi));
    const vec first = _mm512_permutex2var_epi64(ab, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), cd);
    const vec second = _mm512_permutex2var_epi64(ab, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), cd);
    store_bytes(to, first, 2 * count);
    if (count > 2 * LANES) {
        store_bytes(to + 2 * LANES, second, 2 * count - 4 * LANES);
    }
}

/* The larger byte of each two. */
static inline vec largest_i8(vec a, vec b)
{
    return _mm512_max_epi8(a, b);
}

static inline vec largest_u8(vec a, vec b)
{
    return _mm512_max_epu8(a, b);
}

/* For every byte of `codes`, uint8, that entry of a table of 256: sixteen entries at a time. */
static inline vec look_up(const uint8_t *table, vec codes)
{
    const vec low = _mm512_set1_epi8(0x0f);
    const vec high = _mm512_andnot_si512(low, codes);
    const vec within = _mm512_and_si512(low, codes);
    vec found = _mm512_setzero_si512();
    for (int row = 0; row < 16; ++row) {
        const vec entries = _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)(table + 16 * row)));
        const __mmask64 here = _mm512_cmpeq_epi8_mask(high, _mm512_set1_epi8((char)(16 * row)));
        found = _mm512_mask_shuffle_epi8(found, here, entries, within);
    }
    return found;
}

/* The first bytes of a vector from memory; what comes behind them is not read. */
static inline vec load_some(const void *from, int bytes)
{
    return bytes >= 64 ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8((UINT64_C(1) << bytes) - 1u, from);
}

#endif
