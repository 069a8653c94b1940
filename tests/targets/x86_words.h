/* The words of the x86 vector headers in plain C: what each means, and what runs where a processor lacks the vectors.
 * LANES is defined by whoever compiles it; x86_dot.h has the product. */
#ifndef X86_WORDS_H
#define X86_WORDS_H

#include <stdint.h>
#include <string.h>

/* Calls compile faster than copies. */
#define WORD static __attribute__((noinline, unused))
#define EACH for (int i = 0; i < LANES; ++i)

typedef struct {
    int32_t lane[LANES];
} vec;

WORD vec load_i32(const int32_t *from, int count)
{
    vec y;
    EACH y.lane[i] = i < count ? from[i] : 0;
    return y;
}

WORD vec load(const int32_t *from)
{
    return load_i32(from, LANES);
}

WORD void store(int32_t *to, vec a)
{
    memcpy(to, &a, sizeof a);
}

WORD void store_some(int32_t *to, vec a, int count)
{
    memcpy(to, &a, (size_t)count * sizeof *to);
}

WORD vec clamp_all(vec a, int32_t lo, int32_t hi)
{
    EACH a.lane[i] = a.lane[i] < lo ? lo : (a.lane[i] > hi ? hi : a.lane[i]);
    return a;
}

WORD vec splat(int32_t a)
{
    vec y;
    EACH y.lane[i] = a;
    return y;
}

WORD vec weights_of(const void *from)
{
    vec y;
    memcpy(&y, from, sizeof y);
    return y;
}

WORD vec four(const void *from)
{
    int32_t bytes;
    memcpy(&bytes, from, sizeof bytes);
    return splat(bytes);
}

WORD vec four_flipped(const void *from)
{
    uint8_t bytes[4];
    memcpy(bytes, from, sizeof bytes);
    for (int i = 0; i < 4; ++i) bytes[i] = (uint8_t)(bytes[i] + 128);
    return four(bytes);
}

WORD int32_t sum_of(int64_t a, int64_t b)
{
    return (int32_t)(uint32_t)(uint64_t)(a + b);
}

WORD vec add(vec a, vec b)
{
    EACH a.lane[i] = sum_of(a.lane[i], b.lane[i]);
    return a;
}

WORD vec multiply(vec a, vec b)
{
    EACH a.lane[i] = sum_of((int64_t)a.lane[i] * b.lane[i], 0);
    return a;
}

WORD vec shift_left_each(vec a, vec places)
{
    EACH a.lane[i] = sum_of((int64_t)a.lane[i] * (INT64_C(1) << places.lane[i]), 0);
    return a;
}

WORD vec high_multiply_each(vec a, vec b)
{
    EACH a.lane[i] = (int32_t)(((int64_t)a.lane[i] * b.lane[i]) >> 32);
    return a;
}

WORD vec round_shift_each(vec a, vec places)
{
    EACH a.lane[i] = (int32_t)((a.lane[i] + (INT64_C(1) << (places.lane[i] - 1))) >> places.lane[i]);
    return a;
}

WORD vec round_shift_all(vec a, int places)
{
    return round_shift_each(a, splat(places));
}

#define LOAD(name, type)                                                                                               \
    WORD vec load_##name(const type *from, int count)                                                         \
    {                                                                                                                  \
        vec y;                                                                                                         \
        EACH y.lane[i] = i < count ? from[i] : 0;                                                                      \
        return y;                                                                                                      \
    }
LOAD(i8, int8_t)
LOAD(u8, uint8_t)
LOAD(i16, int16_t)

#define STORE(name, type)                                                                                              \
    WORD void store1_##name(type *to, int count, vec a, int zero, int lo, int hi)                             \
    {                                                                                                                  \
        for (int i = 0; i < count && i < LANES; ++i) {                                                                 \
            const int64_t y = (int64_t)a.lane[i] + zero;                                                               \
            to[i] = (type)(y < lo ? lo : (y > hi ? hi : y));                                                             \
        }                                                                                                              \
    }
STORE(i8, int8_t)
STORE(u8, uint8_t)
STORE(i16, int16_t)
STORE(i32, int32_t)

#define STORES(name, type)                                                                                             \
    WORD void store2_##name(type *to, int count, vec a, vec b, int zero, int lo, int hi)                      \
    {                                                                                                                  \
        store1_##name(to, count, a, zero, lo, hi);                                                                     \
        store1_##name(to + LANES, count - LANES, b, zero, lo, hi);                                                     \
    }                                                                                                                  \
    WORD void store4_##name(type *to, int count, vec a, vec b, vec c, vec d, int zero, int lo, int hi)        \
    {                                                                                                                  \
        store2_##name(to, count, a, b, zero, lo, hi);                                                                  \
        store2_##name(to + 2 * LANES, count - 2 * LANES, c, d, zero, lo, hi);                                          \
    }
STORES(i8, int8_t)
STORES(u8, uint8_t)

WORD void copy_row(uint8_t *to, const void *from, int bytes, int left, int right, uint8_t border, uint8_t flip)
{
    const uint8_t *row = from;
    for (int i = 0; i < left; ++i) *to++ = border;
    for (int i = 0; i < bytes; ++i) *to++ = (uint8_t)(row[i] + flip);
    for (int i = 0; i < right; ++i) *to++ = border;
}

WORD vec load_some(const void *from, int bytes)
{
    vec y = {{0}};
    memcpy(&y, from, bytes < 4 * LANES ? (size_t)bytes : sizeof y);
    return y;
}

WORD void store_bytes(void *to, vec a, int bytes)
{
    memcpy(to, &a, bytes < 4 * LANES ? (size_t)bytes : sizeof a);
}

#define OPAQUE(pointer) (void)(pointer)

WORD vec bytes_of(const uint8_t *from)
{
    return load_some(from, 4 * LANES);
}

/* Channel p of sixteen at a time is lane p % 4 of register p / 4. */
WORD void weave(vec *a, vec *b, vec *c, vec *d)
{
    vec *const all[4] = {a, b, c, d};
    uint8_t from[4][4 * LANES], to[4][4 * LANES];
    for (int tap = 0; tap < 4; ++tap) memcpy(from[tap], all[tap], 4 * LANES);
    for (int p = 0; p < 4 * LANES; ++p)
        for (int tap = 0; tap < 4; ++tap) to[p % 16 / 4][(p / 16 * 4 + p % 4) * 4 + tap] = from[tap][p];
    for (int v = 0; v < 4; ++v) memcpy(all[v], to[v], 4 * LANES);
}

#define WOVEN(name, type)                                                                                              \
    WORD void store_woven_##name(type *to, int count, vec a, vec b, vec c, vec d, int zero, int lo, int hi)            \
    {                                                                                                                  \
        const vec all[4] = {a, b, c, d};                                                                               \
        for (int p = 0; p < count && p < 4 * LANES; ++p)                                                               \
            store1_##name(to + p, 1, splat(all[p % 16 / 4].lane[p / 16 * 4 + p % 4]), zero, lo, hi);                   \
    }
WOVEN(i8, int8_t)
WOVEN(u8, uint8_t)
WOVEN(i16, int16_t)

#define LARGEST(name, type)                                                                                            \
    WORD vec largest_##name(vec a, vec b)                                                                              \
    {                                                                                                                  \
        type x[4 * LANES], y[4 * LANES];                                                                               \
        memcpy(x, &a, sizeof x);                                                                                       \
        memcpy(y, &b, sizeof y);                                                                                       \
        for (int i = 0; i < 4 * LANES; ++i) x[i] = x[i] > y[i] ? x[i] : y[i];                                          \
        return load_some(x, sizeof x);                                                                                 \
    }
LARGEST(i8, int8_t)
LARGEST(u8, uint8_t)

WORD vec look_up(const uint8_t *table, vec codes)
{
    uint8_t x[4 * LANES];
    memcpy(x, &codes, sizeof x);
    for (int i = 0; i < 4 * LANES; ++i) x[i] = table[x[i]];
    return load_some(x, sizeof x);
}

WORD void copy_row_i16(int16_t *to, const int16_t *from, int count, int left, int right, int16_t border)
{
    for (int i = 0; i < left; ++i) *to++ = border;
    for (int i = 0; i < count; ++i) *to++ = from[i];
    for (int i = 0; i < right; ++i) *to++ = border;
}

WORD void transpose_tile(uint8_t *to, int to_pitch, const uint8_t *from, int from_pitch)
{
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 16; ++j) to[i * to_pitch + j] = from[j * from_pitch + i];
}

#endif
