/* What the NEON layers share: rows between borders, a few bytes of a vector, rescaled sums. memcpy is model.c's. */
#ifndef QCOMPILE_NEON_H
#define QCOMPILE_NEON_H

#include <arm_neon.h>
#include <stddef.h>
#include <stdint.h>

/* The first `bytes` bytes, then zeros; nothing beyond them is read. */
static inline int8x16_t neon_load(const void *from, size_t bytes)
{
    int8_t all[16] = {0};
    if (bytes == 16) {
        return vld1q_s8((const int8_t *)from);
    }
    if (bytes == 8) {
        return vcombine_s8(vld1_s8((const int8_t *)from), vdup_n_s8(0));
    }
    if (bytes == 4) {
        int32_t word;
        memcpy(&word, from, sizeof word);
        return vreinterpretq_s8_s32(vsetq_lane_s32(word, vdupq_n_s32(0), 0));
    }
    memcpy(all, from, bytes);
    return vld1q_s8(all);
}

/* The first `bytes` bytes of a vector; nothing beyond them is written. */
static inline void neon_store(void *to, int8x16_t v, size_t bytes)
{
    int8_t all[16];
    if (bytes == 16) {
        vst1q_s8((int8_t *)to, v);
    } else if (bytes == 8) {
        vst1_s8((int8_t *)to, vget_low_s8(v));
    } else if (bytes == 4) {
        const int32_t word = vgetq_lane_s32(vreinterpretq_s32_s8(v), 0);
        memcpy(to, &word, sizeof word);
    } else {
        vst1q_s8(all, v);
        memcpy(to, all, bytes);
    }
}

static inline int8_t *neon_fill(int8_t *to, int value, size_t bytes)
{
    const int8x16_t v = vdupq_n_s8((int8_t)value);
    const int8x16x4_t four = {{v, v, v, v}};
    for (; bytes >= 64; bytes -= 64) {
        vst1q_s8_x4(to, four);
        to += 64;
    }
    for (; bytes >= 16; bytes -= 16) {
        vst1q_s8(to, v);
        to += 16;
    }
    for (; bytes > 0; --bytes) {
        *to++ = (int8_t)value;
    }
    return to;
}

static inline int8_t *neon_copy(int8_t *to, const int8_t *from, size_t bytes)
{
    for (; bytes >= 64; bytes -= 64) {
        vst1q_s8_x4(to, vld1q_s8_x4(from));
        from += 64;
        to += 64;
    }
    for (; bytes >= 16; bytes -= 16) {
        vst1q_s8(to, vld1q_s8(from));
        from += 16;
        to += 16;
    }
    for (; bytes > 0; --bytes) {
        *to++ = *from++;
    }
    return to;
}

/* A row of `row` bytes between `left` and `right` bytes of `value`. */
static inline void neon_row(int8_t *to, const int8_t *from, size_t left, size_t row, size_t right, int value)
{
    to = neon_fill(to, value, left);
    to = neon_copy(to, from, row);
    neon_fill(to, value, right);
}

/* Rows of `row` bytes, `pitch` apart, between borders: `before` bytes of `value`, `between` after each row, `after`
 * behind them all. */
static inline void neon_frame(int8_t *to, const int8_t *from, int rows, size_t row, size_t pitch, size_t before,
                              size_t between, size_t after, int value)
{
    to = neon_fill(to, value, before);
    for (int r = 0; r < rows; ++r) {
        to = neon_copy(to, from, row);
        to = neon_fill(to, value, between);
        from += pitch;
    }
    neon_fill(to, value, after);
}

/* Eight bytes of `a`, eight of `b`, and so on: the halves of every vector belong to two pixels. */
static inline int8_t *neon_pairs(int8_t *to, const int8_t *a, const int8_t *b, size_t bytes)
{
    for (; bytes >= 16; bytes -= 16) {
        const int64x2_t first = vreinterpretq_s64_s8(vld1q_s8(a));
        const int64x2_t second = vreinterpretq_s64_s8(vld1q_s8(b));
        vst1q_s8(to, vreinterpretq_s8_s64(vzip1q_s64(first, second)));
        vst1q_s8(to + 16, vreinterpretq_s8_s64(vzip2q_s64(first, second)));
        a += 16;
        b += 16;
        to += 32;
    }
    if (bytes > 0) {
        vst1q_s8(to, vcombine_s8(vld1_s8(a), vld1_s8(b)));
        to += 16;
    }
    return to;
}

/* Pairs of pixels `half` bytes apart, of `whole` bytes; the last pixel may have no other one. */
static inline void neon_flat_pairs(int8_t *to, const int8_t *from, size_t half, size_t whole)
{
    to = neon_pairs(to, from, from + half, whole - half);
    from += whole - half;
    neon_pairs(to, from, from, half + half - whole);
}

/* Rows of `row` bytes, `pitch` apart, each first copied between the borders of `line`, then to pairs of pixels
 * `distance` bytes apart, `paired` bytes of each; `top` and `bottom` rows are all border. */
static inline void neon_framed_pairs(int8_t *to, int8_t *line, const int8_t *from, int rows, size_t row, size_t pitch,
                                     size_t left, size_t whole, size_t distance, size_t paired, int top, int bottom,
                                     int value)
{
    neon_fill(line, value, whole);
    for (int r = 0; r < top; ++r) {
        to = neon_pairs(to, line, line + distance, paired);
    }
    for (int r = 0; r < rows; ++r) {
        neon_copy(line + left, from, row);
        to = neon_pairs(to, line, line + distance, paired);
        from += pitch;
    }
    neon_fill(line, value, whole);
    for (int r = 0; r < bottom; ++r) {
        to = neon_pairs(to, line, line + distance, paired);
    }
}

/* Sums of two pixels by two channels, twice: those of four channels of one pixel. */
static inline int32x4_t neon_first_pixel(int32x4_t a, int32x4_t b)
{
    return vreinterpretq_s32_s64(vzip1q_s64(vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(b)));
}

static inline int32x4_t neon_second_pixel(int32x4_t a, int32x4_t b)
{
    return vreinterpretq_s32_s64(vzip2q_s64(vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(b)));
}

/* Products stay in the order in which they are written, and later loads through `w` behind them: compilers that may
 * move them load more vectors at once than there are registers. */
#define NEON_IN_ORDER(sum, w) __asm__("" : "+w"(sum), "+r"(w))

/* sum += the dot products of b's fours with one four of a. */
#define NEON_DOT(sum, b, a, lane, w)                                                                                   \
    do {                                                                                                               \
        sum = vdotq_laneq_s32(sum, b, a, lane);                                                                        \
        NEON_IN_ORDER(sum, w);                                                                                         \
    } while (0)

/* sum += the dot products of b's fours with a's. */
#define NEON_TAPS(sum, b, a, w)                                                                                        \
    do {                                                                                                               \
        sum = vdotq_s32(sum, b, a);                                                                                    \
        NEON_IN_ORDER(sum, w);                                                                                         \
    } while (0)

/* sum += two pixels by two channels, eight depths of each. */
#define NEON_MATRIX(sum, a, b, w)                                                                                      \
    do {                                                                                                               \
        sum = vmmlaq_s32(sum, a, b);                                                                                   \
        NEON_IN_ORDER(sum, w);                                                                                         \
    } while (0)

/* Sixteen channels of four columns: four columns of each channel, four channels in a vector. */
static inline int8x16x4_t neon_taps(int8x16_t a, int8x16_t b, int8x16_t c, int8x16_t d)
{
    const int16x8_t low = vreinterpretq_s16_s8(vzip1q_s8(a, b)), high = vreinterpretq_s16_s8(vzip2q_s8(a, b));
    const int16x8_t low2 = vreinterpretq_s16_s8(vzip1q_s8(c, d)), high2 = vreinterpretq_s16_s8(vzip2q_s8(c, d));
    const int8x16x4_t taps = {{
        vreinterpretq_s8_s16(vzip1q_s16(low, low2)),
        vreinterpretq_s8_s16(vzip2q_s16(low, low2)),
        vreinterpretq_s8_s16(vzip1q_s16(high, high2)),
        vreinterpretq_s8_s16(vzip2q_s16(high, high2)),
    }};
    return taps;
}

/* The sum of each. */
static inline int32x4_t neon_sums(int32x4_t a, int32x4_t b, int32x4_t c, int32x4_t d)
{
    return vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d));
}

/* high_multiply, four at a time, for any multiplier; an even one's half goes to vqdmulhq_s32, which doubles. */
static inline int32x4_t neon_high_multiply(int32x4_t a, int32x4_t b)
{
    const int64x2_t low = vmull_s32(vget_low_s32(a), vget_low_s32(b));
    const int64x2_t high = vmull_high_s32(a, b);
    return vuzp2q_s32(vreinterpretq_s32_s64(low), vreinterpretq_s32_s64(high));
}

static inline int16x8_t neon_halves(int32x4_t a, int32x4_t b)
{
    return vqmovn_high_s32(vqmovn_s32(a), b);
}

/* With a zero point: what saturates in 16 bits, before or after it is added, saturates in eight bits too. */
static inline int16x8_t neon_moved(int32x4_t a, int32x4_t b, int16_t zero)
{
    return vqaddq_s16(neon_halves(a, b), vdupq_n_s16(zero));
}

static inline int8x16_t neon_signed_bytes(int16x8_t a, int16x8_t b)
{
    return vqmovn_high_s16(vqmovn_s16(a), b);
}

static inline uint8x16_t neon_unsigned_bytes(int16x8_t a, int16x8_t b)
{
    return vqmovun_high_s16(vqmovun_s16(a), b);
}

#endif
