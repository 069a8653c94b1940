/* Writes what every word of a vector header makes of the same numbers; the compiler is told to include the header. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint32_t state = 1;

static uint32_t any(void)
{
    state ^= state << 13;
    state ^= state >> 17;
    state ^= state << 5;
    return state;
}

/* In [lo, hi], often at its ends. */
static int32_t between(int32_t lo, int32_t hi)
{
    const uint32_t which = any() % 8;
    const int64_t inside = lo + (int64_t)(any() % (uint64_t)((int64_t)hi - lo + 1));
    return which == 0 ? lo : which == 1 ? hi : (int32_t)inside;
}

static void put(vec a)
{
    int32_t lanes[LANES];
    store(lanes, a);
    fwrite(lanes, sizeof lanes, 1, stdout);
}

static vec numbers(int32_t lo, int32_t hi)
{
    int32_t lanes[LANES];
    for (int i = 0; i < LANES; ++i) lanes[i] = between(lo, hi);
    return load(lanes);
}

/* A copy of `count` bytes behind which nothing may be read. */
static void *exactly(const void *from, int count)
{
    void *const copy = malloc((size_t)count);
    memcpy(copy, from, (size_t)count);
    return copy;
}

#define LOADED(word, type)                                                                                             \
    {                                                                                                                  \
        const int count = between(1, LANES + 3);                                                                       \
        const int there = (count < LANES ? count : LANES) * (int)sizeof(type);                                         \
        type *const from = exactly(bytes, there);                                                                      \
        put(word(from, count));                                                                                        \
        free(from);                                                                                                    \
    }

#define STORED(word, type, most, least, greatest, reach, ...)                                                          \
    {                                                                                                                  \
        type to[4 * LANES];                                                                                            \
        const int count = between(1, (most) * LANES);                                                                  \
        const int low = between(least, greatest), zero = between(-(reach), reach);                                     \
        memset(to, 0x5a, sizeof to);                                                                                   \
        word(to, count, __VA_ARGS__, zero, any() % 2 ? low : least, any() % 2 ? between(low, greatest) : greatest);    \
        fwrite(to, sizeof to, 1, stdout);                                                                              \
    }

#define BYTES 4 * LANES

int main(void)
{
    for (int turn = 0; turn < 300; ++turn) {
        uint8_t bytes[8 * LANES], table[256], row[7 * LANES + 40];
        int16_t wide[7 * LANES + 40];
        for (int i = 0; i < 8 * LANES; ++i) bytes[i] = (uint8_t)between(0, 255);
        for (int i = 0; i < 256; ++i) table[i] = (uint8_t)any();
        vec a = numbers(INT32_MIN, INT32_MAX), b = numbers(INT32_MIN, INT32_MAX);
        vec c = numbers(-70000, 70000), d = numbers(-300, 300);
        const vec half = numbers(1 - (1 << 30), (1 << 30) - 1);

        put(splat(between(INT32_MIN, INT32_MAX)));
        put(weights_of(bytes));
        put(bytes_of(bytes));
        put(four(bytes + turn % 5));
        put(four_flipped(bytes + turn % 5));
        put(add(a, b));
        put(clamp_all(a, -1000000000, between(-1000000000, INT32_MAX)));
        put(multiply(a, b));
        put(high_multiply_each(a, b));
        put(shift_left_each(a, numbers(0, 31)));
        put(round_shift_each(half, numbers(1, 30)));
        put(round_shift_all(half, between(1, 30)));
        put(largest_i8(a, b));
        put(largest_u8(a, b));
        put(look_up(table, bytes_of(bytes)));
        vec sum = a;
        DOT(sum, weights_of(bytes), b);
        put(sum);
        DOT_PAIRS(sum, a, b);
        put(sum);

        LOADED(load_i8, int8_t)
        LOADED(load_u8, uint8_t)
        LOADED(load_i16, int16_t)
        LOADED(load_i32, int32_t)
        const int some = between(1, BYTES + 3);
        uint8_t *const from = exactly(bytes, some < BYTES ? some : BYTES);
        put(load_some(from, some));
        free(from);

        STORED(store4_i8, int8_t, 4, -128, 127, 255, a, b, c, d)
        STORED(store4_u8, uint8_t, 4, 0, 255, 255, d, c, b, a)
        STORED(store2_i8, int8_t, 2, -128, 127, 255, d, c)
        STORED(store2_u8, uint8_t, 2, 0, 255, 255, c, d)
        STORED(store1_i8, int8_t, 1, -128, 127, 255, c)
        STORED(store1_i8, int8_t, 1, -128, 127, 255, a)
        STORED(store1_u8, uint8_t, 1, 0, 255, 255, d)
        STORED(store1_i16, int16_t, 1, -32768, 32767, 1 << 29, a)
        STORED(store1_i16, int16_t, 1, -32768, 32767, 40000, c)
        STORED(store1_i32, int32_t, 1, INT32_MIN, INT32_MAX, 1 << 30, half)
        STORED(store_woven_i8, int8_t, 4, -128, 127, 255, d, c, b, a)
        STORED(store_woven_u8, uint8_t, 4, 0, 255, 255, a, b, c, d)
        STORED(store_woven_i16, int16_t, 4, -32768, 32767, 40000, a, b, c, d)

        int32_t sums[LANES] = {0};
        memset(table, 0x5a, sizeof table);
        store_bytes(table, a, between(1, BYTES));
        store_some(sums, a, between(1, LANES - 1));
        fwrite(table, sizeof table, 1, stdout);
        fwrite(sums, sizeof sums, 1, stdout);
        weave(&a, &b, &c, &d);
        put(a);
        put(b);
        put(c);
        put(d);

        memset(row, 0x5a, sizeof row);
        memset(wide, 0x5a, sizeof wide);
        const int left = between(0, 20), right = between(0, 20), count = between(0, 7 * LANES);
        copy_row(row, bytes, count, left, right, (uint8_t)any(), any() % 2 ? 128 : 0);
        copy_row_i16(wide, (const int16_t *)(const void *)bytes, count / 2, left, right, (int16_t)any());
        fwrite(row, sizeof row, 1, stdout);
        fwrite(wide, sizeof wide, 1, stdout);
    }
    return 0;
}
