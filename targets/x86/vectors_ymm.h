/* Vectors of eight int32 numbers: AVX2. The header that comes with it multiplies bytes. */
#ifndef QCOMPILE_VECTORS_YMM_H
#define QCOMPILE_VECTORS_YMM_H

#include <immintrin.h>
#include <stdint.h>

#include "vectors_rows.h"

#define LANES 8

typedef __m256i vec;

static inline vec splat(int32_t a)
{
    return _mm256_set1_epi32(a);
}

static inline vec load(const int32_t *from)
{
    return _mm256_loadu_si256((const void *)from);
}

static inline void store(int32_t *to, vec a)
{
    _mm256_storeu_si256((void *)to, a);
}

/* The first bytes of a vector. */
static inline void store_bytes(void *to, vec a, int bytes)
{
    if (bytes >= 32) {
        _mm256_storeu_si256(to, a);
    } else {
        uint8_t all[32];
        _mm256_storeu_si256((void *)all, a);
        __builtin_memcpy(to, all, (size_t)bytes);
    }
}

static inline void store_some(int32_t *to, vec a, int count)
{
    store_bytes(to, a, 4 * count);
}

/* Weights: four depths of every lane. */
static inline vec weights_of(const void *from)
{
    return _mm256_loadu_si256(from);
}

/* Four bytes in every lane. */
static inline vec four(const void *from)
{
    int32_t bytes;
    __builtin_memcpy(&bytes, from, sizeof bytes);
    return _mm256_set1_epi32(bytes);
}

/* The same, int8 to uint8: 128 more. */
static inline vec four_flipped(const void *from)
{
    return _mm256_xor_si256(four(from), _mm256_set1_epi32((int32_t)0x80808080u));
}

static inline vec add(vec a, vec b)
{
    return _mm256_add_epi32(a, b);
}

static inline vec multiply(vec a, vec b)
{
    return _mm256_mullo_epi32(a, b);
}

static inline vec shift_left_each(vec a, vec places)
{
    return _mm256_sllv_epi32(a, places);
}

/* Upper halves of the 64-bit products. */
static inline vec high_multiply_each(vec a, vec b)
{
    const vec even = _mm256_mul_epi32(a, b);
    const vec odd = _mm256_mul_epi32(_mm256_srli_epi64(a, 32), _mm256_srli_epi64(b, 32));
    return _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
}

/* a / 2^places, rounded to nearest, halves upward; `half` is 2^(places - 1). */
static inline vec round_shift_all(vec a, int places)
{
    return _mm256_srai_epi32(_mm256_add_epi32(a, _mm256_set1_epi32(1 << (places - 1))), places);
}

static inline vec round_shift_each(vec a, vec places)
{
    const vec half = _mm256_sllv_epi32(_mm256_set1_epi32(1), _mm256_sub_epi32(places, _mm256_set1_epi32(1)));
    return _mm256_srav_epi32(_mm256_add_epi32(a, half), places);
}

static inline vec clamp_all(vec a, int32_t lo, int32_t hi)
{
    return _mm256_max_epi32(_mm256_min_epi32(a, splat(hi)), splat(lo));
}

/* Up to sixteen bytes, the rest zero. */
static inline __m128i load_bytes(const void *from, int bytes)
{
    uint8_t all[16] = {0};
    __builtin_memcpy(all, from, (size_t)bytes);
    return _mm_loadu_si128((const void *)all);
}

/* Lanes from memory; `count` of them where they are fewer than all. */
static inline vec load_i8(const int8_t *from, int count)
{
    return _mm256_cvtepi8_epi32(count >= LANES ? _mm_loadl_epi64((const void *)from) : load_bytes(from, count));
}

static inline vec load_u8(const uint8_t *from, int count)
{
    return _mm256_cvtepu8_epi32(count >= LANES ? _mm_loadl_epi64((const void *)from) : load_bytes(from, count));
}

static inline vec load_i16(const int16_t *from, int count)
{
    return _mm256_cvtepi16_epi32(count >= LANES ? _mm_loadu_si128((const void *)from) : load_bytes(from, 2 * count));
}

static inline vec load_i32(const int32_t *from, int count)
{
    int32_t all[LANES] = {0};
    if (count >= LANES) {
        return load(from);
    }
    __builtin_memcpy(all, from, (size_t)(4 * count));
    return load(all);
}

/* 32 sums of a and zero as 16 bits, those of each half of a register together. */
static inline vec words_of(vec a, vec b, int zero)
{
    return _mm256_adds_epi16(_mm256_packs_epi32(a, b), _mm256_set1_epi16((short)zero));
}

/* Stores the first `count` of 32 results: a + zero, between lo and hi. */
static inline void store4_i8(int8_t *to, int count, vec a, vec b, vec c, vec d, int zero, int lo, int hi)
{
    const vec order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    vec y = _mm256_packs_epi16(words_of(a, b, zero), words_of(c, d, zero));
    y = _mm256_permutevar8x32_epi32(y, order);
    if (lo > -128) {
        y = _mm256_max_epi8(y, _mm256_set1_epi8((char)lo));
    }
    if (hi < 127) {
        y = _mm256_min_epi8(y, _mm256_set1_epi8((char)hi));
    }
    store_bytes(to, y, count);
}

static inline void store4_u8(uint8_t *to, int count, vec a, vec b, vec c, vec d, int zero, int lo, int hi)
{
    const vec order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    vec y = _mm256_packus_epi16(words_of(a, b, zero), words_of(c, d, zero));
    y = _mm256_permutevar8x32_epi32(y, order);
    if (lo > 0) {
        y = _mm256_max_epu8(y, _mm256_set1_epi8((char)lo));
    }
    if (hi < 255) {
        y = _mm256_min_epu8(y, _mm256_set1_epi8((char)hi));
    }
    store_bytes(to, y, count);
}

/* The first bytes of half a vector. */
static inline void store_half(void *to, __m128i a, int bytes)
{
    if (bytes >= 16) {
        _mm_storeu_si128(to, a);
    } else {
        uint8_t all[16];
        _mm_storeu_si128((void *)all, a);
        __builtin_memcpy(to, all, (size_t)bytes);
    }
}

/* The first `count` of 16 results. */
static inline void store2_i8(int8_t *to, int count, vec a, vec b, int zero, int lo, int hi)
{
    const vec ab = _mm256_permute4x64_epi64(words_of(a, b, zero), 0xd8);
    __m128i y = _mm_packs_epi16(_mm256_castsi256_si128(ab), _mm256_extracti128_si256(ab, 1));
    if (lo > -128) {
        y = _mm_max_epi8(y, _mm_set1_epi8((char)lo));
    }
    if (hi < 127) {
        y = _mm_min_epi8(y, _mm_set1_epi8((char)hi));
    }
    store_half(to, y, count);
}

static inline void store2_u8(uint8_t *to, int count, vec a, vec b, int zero, int lo, int hi)
{
    const vec ab = _mm256_permute4x64_epi64(words_of(a, b, zero), 0xd8);
    __m128i y = _mm_packus_epi16(_mm256_castsi256_si128(ab), _mm256_extracti128_si256(ab, 1));
    if (lo > 0) {
        y = _mm_max_epu8(y, _mm_set1_epi8((char)lo));
    }
    if (hi < 255) {
        y = _mm_min_epu8(y, _mm_set1_epi8((char)hi));
    }
    store_half(to, y, count);
}

/* The first `count` of 8 results; sums of a and zero stay in 32 bits. */
static inline void store1_i8(int8_t *to, int count, vec a, int zero, int lo, int hi)
{
    const vec lowest = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8, 12, -1,
                                        -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    const vec y = _mm256_shuffle_epi8(add(clamp_all(a, lo - zero, hi - zero), splat(zero)), lowest);
    const __m128i bytes = _mm_unpacklo_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
    if (count >= LANES) {
        _mm_storel_epi64((void *)to, bytes);
    } else {
        store_half(to, bytes, count);
    }
}

static inline void store1_u8(uint8_t *to, int count, vec a, int zero, int lo, int hi)
{
    store1_i8((int8_t *)to, count, a, zero, lo, hi);
}

static inline void store1_i16(int16_t *to, int count, vec a, int zero, int lo, int hi)
{
    const vec y = add(clamp_all(a, lo - zero, hi - zero), splat(zero));
    store_half(to, _mm_packs_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1)), 2 * count);
}

static inline void store1_i32(int32_t *to, int count, vec a, int zero, int lo, int hi)
{
    vec y = add(a, splat(zero));
    if (lo > INT32_MIN || hi < INT32_MAX) {
        y = clamp_all(y, lo, hi);
    }
    store_bytes(to, y, 4 * count);
}

/* Rows of an image between `left` and `right` bytes of border, with 128 added to every byte where `flip` is 0x80. */
static inline void copy_row(uint8_t *to, const void *from, int bytes, int left, int right, uint8_t border, uint8_t flip)
{
    const uint8_t *const row = from;
    __builtin_memset(to, border, (size_t)left);
    if (flip) {
        const vec sign = _mm256_set1_epi8((char)0x80);
        int at = 0;
        for (; at + 32 <= bytes; at += 32) {
            const vec x = _mm256_loadu_si256((const void *)(row + at));
            _mm256_storeu_si256((void *)(to + left + at), _mm256_xor_si256(x, sign));
        }
        for (; at < bytes; ++at) {
            to[left + at] = (uint8_t)(row[at] ^ 0x80);
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
    return _mm256_loadu_si256((const void *)from);
}

/* Puts the bytes that four places have of a channel into one lane; the lanes come in the order of `store_woven`. */
static inline void weave(vec *a, vec *b, vec *c, vec *d)
{
    const vec ab = _mm256_unpacklo_epi8(*a, *b);
    const vec cd = _mm256_unpacklo_epi8(*c, *d);
    const vec ab_high = _mm256_unpackhi_epi8(*a, *b);
    const vec cd_high = _mm256_unpackhi_epi8(*c, *d);
    *a = _mm256_unpacklo_epi16(ab, cd);
    *b = _mm256_unpackhi_epi16(ab, cd);
    *c = _mm256_unpacklo_epi16(ab_high, cd_high);
    *d = _mm256_unpackhi_epi16(ab_high, cd_high);
}

/* Stores the first `count` of 32 results whose lanes `weave` ordered: packing undoes it. */
static inline void store_woven_i8(int8_t *to, int count, vec a, vec b, vec c, vec d, int zero, int lo, int hi)
{
    vec y = _mm256_packs_epi16(words_of(a, b, zero), words_of(c, d, zero));
    if (lo > -128) {
        y = _mm256_max_epi8(y, _mm256_set1_epi8((char)lo));
    }
    if (hi < 127) {
        y = _mm256_min_epi8(y, _mm256_set1_epi8((char)hi));
    }
    store_bytes(to, y, count);
}

static inline void store_woven_u8(uint8_t *to, int count, vec a, vec b, vec c, vec d, int zero, int lo, int hi)
{
    vec y = _mm256_packus_epi16(words_of(a, b, zero), words_of(c, d, zero));
    if (lo > 0) {
        y = _mm256_max_epu8(y, _mm256_set1_epi8((char)lo));
    }
    if (hi < 255) {
        y = _mm256_min_epu8(y, _mm256_set1_epi8((char)hi));
    }
    store_bytes(to, y, count);
}

/* A sum and zero, between lo and hi; neither leaves 32 bits. */
static inline vec bounded(vec a, int zero, int lo, int hi)
{
    return add(clamp_all(a, lo - zero, hi - zero), splat(zero));
}

static inline void store_woven_i16(int16_t *to, int count, vec a, vec b, vec c, vec d, int zero, int lo, int hi)
{
    const vec ab = _mm256_packs_epi32(bounded(a, zero, lo, hi), bounded(b, zero, lo, hi));
    const vec cd = _mm256_packs_epi32(bounded(c, zero, lo, hi), bounded(d, zero, lo, hi));
    store_bytes(to, _mm256_permute2x128_si256(ab, cd, 0x20), 2 * count);
    if (count > 2 * LANES) {
        store_bytes(to + 2 * LANES, _mm256_permute2x128_si256(ab, cd, 0x31), 2 * count - 4 * LANES);
    }
}

/* The larger byte of each two. */
static inline vec largest_i8(vec a, vec b)
{
    return _mm256_max_epi8(a, b);
}

static inline vec largest_u8(vec a, vec b)
{
    return _mm256_max_epu8(a, b);
}

/* For every byte of `codes`, uint8, that entry of a table of 256: sixteen entries at a time. */
static inline vec look_up(const uint8_t *table, vec codes)
{
    vec found = _mm256_setzero_si256();
    for (int row = 0; row < 16; ++row) {
        const vec entries = _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)(table + 16 * row)));
        const vec within = _mm256_sub_epi8(codes, _mm256_set1_epi8((char)(16 * row)));
        /* where 0 to 15, those; else 128 and more, for which the shuffle gives 0 */
        const vec places = _mm256_adds_epu8(within, _mm256_set1_epi8(0x70));
        found = _mm256_or_si256(found, _mm256_shuffle_epi8(entries, places));
    }
    return found;
}

/* The first bytes of a vector from memory; what comes behind them is not read. */
static inline vec load_some(const void *from, int bytes)
{
    uint8_t all[32] = {0};
    if (bytes >= 32) {
        return _mm256_loadu_si256(from);
    }
    __builtin_memcpy(all, from, (size_t)bytes);
    return _mm256_loadu_si256((const void *)all);
}

#endif
