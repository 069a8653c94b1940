/* Micro-kernels for Armv8.1-M with Helium (MVE): products of bytes, rescaling, and the copies around them.
 *
 * Products. Eight dot products at a time fill the eight registers that VMLADAVA can add to: two pixels by four channels,
 * or one pixel by eight. Weights are one stream of words: for each block of channels its biases, then for each chunk of
 * 16 bytes of depth (of 8 elements where activations have 16 bits) that chunk of every channel. Compilers spill in such
 * loops, so they are written in assembly: four chunks a turn, the first turn entered where the number of chunks wants it.
 * A block's sums are stored together: acc[pair][block][2 pixels][4 channels], or acc[block][8 channels]. Weights of at most
 * four bits stand two channels a byte, the second one's bias 16 times; these sums stay below 2 to the 27th.
 *
 * Rescaling. y = clamp(((T + (1 << (f - 1))) >> f) + zero), T = ((a << p) * m) >> 32, as in arith.h; shift holds -f. Sixteen
 * channels at a time lie as 0 4 8 12, 2 6 10 14, 1 5 9 13, 3 7 11 15 in four vectors: narrowing then restores their order. So
 * do their parameters; multipliers there have 16 bits and stand for m >> 15.
 */
#ifndef QCOMPILE_MVE_H
#define QCOMPILE_MVE_H

#include <arm_mve.h>
#include <stdint.h>

/* One copy, however many layers call it; none where no layer does. */
#define MVE_SHARED static __attribute__((noinline, unused))

/* ---------------------------------------------------------------------------------------------------------- products */

struct mve_products {
    const void *x0;         /*  0: where the next pixel's bytes begin */
    const void *x1;         /*  4: and its neighbour's */
    const int32_t *weights; /*  8 */
    const int32_t *end;     /* 12: of the weights */
    int32_t *acc;           /* 16 */
    uint32_t turns;         /* 20 */
    uint32_t skipped;       /* 24: bytes of code that the first turn leaves out */
    int step;               /* 28: bytes from one pair of pixels to the next */
    int pairs;              /* 32 */
    uint32_t entry;         /* 36: where the first turn begins */
};

/* Computes where the first turn begins, as an address to jump to. */
#define MVE_ENTRY \
    "ldr r0, [r11, #24]\n" \
    "adr.w r1, 3f\n" \
    "add r0, r0, r1\n" \
    "orr r0, r0, #1\n" \
    "str r0, [r11, #36]\n"

#define MVE_CLOBBERED \
    "r0", "r1", "r2", "r3", "r4", "r5", "r6", "r8", "r9", "r10", "r12", "lr", "q0", "q1", "q2", "q3", "cc", "memory"

/* Sums: r0 r2 r4 r6 and r8 r10 r12 lr; bytes of the two pixels: r1 r3; weights: r5. */
#define MVE_CHUNK_2X4(x, w, type, bytes, back1, back2, back3) \
    x " q0, [r1], #16\n" \
    w " q2, [r5], #" bytes "\n" \
    x " q1, [r3], #16\n" \
    "vmladava." type " r0, q0, q2\n" \
    w " q3, [r5, #-" back1 "]\n" \
    "vmladava." type " r8, q1, q2\n" \
    "vmladava." type " r2, q0, q3\n" \
    w " q2, [r5, #-" back2 "]\n" \
    "vmladava." type " r10, q1, q3\n" \
    "vmladava." type " r4, q0, q2\n" \
    w " q3, [r5, #-" back3 "]\n" \
    "vmladava." type " r12, q1, q2\n" \
    "vmladava." type " r6, q0, q3\n" \
    "vmladava." type " lr, q1, q3\n"

/* The same from nibbles: a byte holds the weights of two channels, the first one's above. `low` makes 16 times the second. */
#define MVE_NIBBLES_2X4(x, w, type, bytes, back, low2, low3) \
    x " q0, [r1], #16\n" \
    w " q2, [r5], #" bytes "\n" \
    x " q1, [r3], #16\n" \
    "vshr." type " q3, q2, #4\n" \
    "vmladava." type " r0, q0, q3\n" \
    low2 \
    "vmladava." type " r8, q1, q3\n" \
    w " q3, [r5, #-" back "]\n" \
    "vmladava." type " r2, q0, q2\n" \
    "vmladava." type " r10, q1, q2\n" \
    "vshr." type " q2, q3, #4\n" \
    "vmladava." type " r4, q0, q2\n" \
    low3 \
    "vmladava." type " r12, q1, q2\n" \
    "vmladava." type " r6, q0, q3\n" \
    "vmladava." type " lr, q1, q3\n"
#define MVE_LOW_S8(q) "vshl.i8 " q ", " q ", #4\n"
#define MVE_LOW_S16(q) "vshl.i16 " q ", " q ", #12\n" "vshr.s16 " q ", " q ", #8\n"

/* Sums of second channels, which were made of 16 times their weights. */
#define MVE_SIXTEENTHS "asr.w r2, r2, #4\n" "asr.w r6, r6, #4\n" "asr.w r10, r10, #4\n" "asr.w lr, lr, #4\n"

/* Sums of `pixels` neighbours `step` elements apart; the last of an odd number is computed twice. Some compilers keep r7 for
 * themselves, so it is saved by hand. */
#define MVE_PRODUCTS_2X4(name, element, code, chunk, after) \
MVE_SHARED void name(const element *x, int step, int pixels, int chunks, const int32_t *weights, int words, int32_t *acc) \
{ \
    struct mve_products job = { \
        x, x + step, weights, weights + words, acc, ((uint32_t)chunks + 3u) / 4u, \
        (0u - (uint32_t)chunks) % 4u * (code), 2 * step * (int)sizeof *x, 0, 0u \
    }; \
    for (int left = pixels; left > 0; left = left > 1 ? left % 2 : 0) { \
        job.pairs = left > 1 ? left / 2 : 1; \
        job.x1 = left > 1 ? job.x1 : job.x0; \
        register struct mve_products *work __asm__("r11") = &job; \
        __asm__ volatile( \
            "push {r7}\n" \
            MVE_ENTRY \
            "ldr r7, [r11, #16]\n" \
            "1:\n" \
            "ldr r5, [r11, #8]\n" \
            "2:\n" \
            "ldm.w r5, {r0, r2, r4, r6}\n" \
            "ldm.w r5!, {r8, r10, r12, lr}\n" \
            "ldrd r1, r3, [r11]\n" \
            "ldr r9, [r11, #20]\n" \
            "ldr pc, [r11, #36]\n" \
            ".p2align 2\n" \
            "3:\n" \
            chunk chunk chunk chunk \
            "subs.w r9, r9, #1\n" \
            "bne 3b\n" \
            after \
            "stm.w r7!, {r0, r2, r4, r6, r8, r10, r12, lr}\n" \
            "ldr r9, [r11, #12]\n" \
            "cmp r5, r9\n" \
            "bne 2b\n" \
            "ldrd r1, r3, [r11]\n" \
            "ldrd r5, r9, [r11, #28]\n" \
            "add r1, r1, r5\n" \
            "add r3, r3, r5\n" \
            "strd r1, r3, [r11]\n" \
            "subs.w r9, r9, #1\n" \
            "str r9, [r11, #32]\n" \
            "bne 1b\n" \
            "str r7, [r11, #16]\n" \
            "pop {r7}\n" \
            : "+r"(work) : : MVE_CLOBBERED); \
    } \
}

/* Sums: r0 r2 r4 r6 r8 r10 r12 lr; the pixel's bytes: r1; weights: r5. */
#define MVE_CHUNK_1X8(x, w, type, bytes, back1, back2, back3, back4, back5, back6, back7) \
    x " q0, [r1], #16\n" \
    w " q1, [r5], #" bytes "\n" \
    w " q2, [r5, #-" back1 "]\n" \
    "vmladava." type " r0, q0, q1\n" \
    w " q3, [r5, #-" back2 "]\n" \
    "vmladava." type " r2, q0, q2\n" \
    w " q1, [r5, #-" back3 "]\n" \
    "vmladava." type " r4, q0, q3\n" \
    w " q2, [r5, #-" back4 "]\n" \
    "vmladava." type " r6, q0, q1\n" \
    w " q3, [r5, #-" back5 "]\n" \
    "vmladava." type " r8, q0, q2\n" \
    w " q1, [r5, #-" back6 "]\n" \
    "vmladava." type " r10, q0, q3\n" \
    w " q2, [r5, #-" back7 "]\n" \
    "vmladava." type " r12, q0, q1\n" \
    "vmladava." type " lr, q0, q2\n"

/* Nibbles, two channels a byte: q1 and q2 in turn hold four pairs. */
#define MVE_PAIR_1X8(q, type, low, first, second) \
    "vshr." type " q3, " q ", #4\n" \
    "vmladava." type " " first ", q0, q3\n" \
    low \
    "vmladava." type " " second ", q0, " q "\n"
#define MVE_NIBBLES_1X8(x, w, type, bytes, back1, back2, back3, low1, low2) \
    x " q0, [r1], #16\n" \
    w " q1, [r5], #" bytes "\n" \
    w " q2, [r5, #-" back1 "]\n" \
    MVE_PAIR_1X8("q1", type, low1, "r0", "r2") \
    w " q1, [r5, #-" back2 "]\n" \
    MVE_PAIR_1X8("q2", type, low2, "r4", "r6") \
    w " q2, [r5, #-" back3 "]\n" \
    MVE_PAIR_1X8("q1", type, low1, "r8", "r10") \
    MVE_PAIR_1X8("q2", type, low2, "r12", "lr")

#define MVE_PRODUCTS_1X8(name, element, code, chunk, after) \
MVE_SHARED void name(const element *x, int chunks, const int32_t *weights, int words, int32_t *acc) \
{ \
    struct mve_products job = { \
        x, x, weights, weights + words, acc, ((uint32_t)chunks + 3u) / 4u, \
        (0u - (uint32_t)chunks) % 4u * (code), 0, 1, 0u \
    }; \
    register struct mve_products *work __asm__("r11") = &job; \
    __asm__ volatile( \
        MVE_ENTRY \
        "ldr r3, [r11, #16]\n" \
        "ldr r5, [r11, #8]\n" \
        "2:\n" \
        "ldm.w r5!, {r0, r2, r4, r6, r8, r10, r12, lr}\n" \
        "ldr r1, [r11]\n" \
        "ldr r9, [r11, #20]\n" \
        "ldr pc, [r11, #36]\n" \
        ".p2align 2\n" \
        "3:\n" \
        chunk chunk chunk chunk \
        "subs.w r9, r9, #1\n" \
        "bne 3b\n" \
        after \
        "stm.w r3!, {r0, r2, r4, r6, r8, r10, r12, lr}\n" \
        "ldr r9, [r11, #12]\n" \
        "cmp r5, r9\n" \
        "bne 2b\n" \
        : "+r"(work) : : MVE_CLOBBERED); \
}

MVE_PRODUCTS_2X4(mve_products_2x4_s8, int8_t, 56u, MVE_CHUNK_2X4("vldrb.u8", "vldrw.u32", "s8", "64", "48", "32", "16"), "")
MVE_PRODUCTS_2X4(mve_products_2x4_s16, int16_t, 56u, MVE_CHUNK_2X4("vldrh.u16", "vldrb.s16", "s16", "32", "24", "16", "8"), "")
MVE_PRODUCTS_2X4(
    mve_products_2x4_s8_nibbles, int8_t, 64u,
    MVE_NIBBLES_2X4("vldrb.u8", "vldrw.u32", "s8", "32", "16", MVE_LOW_S8("q2"), MVE_LOW_S8("q3")), MVE_SIXTEENTHS)
MVE_PRODUCTS_2X4(
    mve_products_2x4_s16_nibbles, int16_t, 72u,
    MVE_NIBBLES_2X4("vldrh.u16", "vldrb.s16", "s16", "16", "8", MVE_LOW_S16("q2"), MVE_LOW_S16("q3")), MVE_SIXTEENTHS)
MVE_PRODUCTS_1X8(
    mve_products_1x8_s8, int8_t, 68u,
    MVE_CHUNK_1X8("vldrb.u8", "vldrw.u32", "s8", "128", "112", "96", "80", "64", "48", "32", "16"), "")
MVE_PRODUCTS_1X8(
    mve_products_1x8_s16, int16_t, 68u,
    MVE_CHUNK_1X8("vldrh.u16", "vldrb.s16", "s16", "64", "56", "48", "40", "32", "24", "16", "8"), "")
MVE_PRODUCTS_1X8(
    mve_products_1x8_s8_nibbles, int8_t, 84u,
    MVE_NIBBLES_1X8("vldrb.u8", "vldrw.u32", "s8", "64", "48", "32", "16", MVE_LOW_S8("q1"), MVE_LOW_S8("q2")), MVE_SIXTEENTHS)
MVE_PRODUCTS_1X8(
    mve_products_1x8_s16_nibbles, int16_t, 100u,
    MVE_NIBBLES_1X8("vldrh.u16", "vldrb.s16", "s16", "32", "24", "16", "8", MVE_LOW_S16("q1"), MVE_LOW_S16("q2")), MVE_SIXTEENTHS)

/* --------------------------------------------------------------------------------------------------------- rescaling */

/* Four multipliers of 16 bits, which are stored as they fit int16_t. */
static inline int32x4_t mve_multiplier(const int16_t *m)
{
    return vreinterpretq_s32_u32(vshlq_n_u32(vldrhq_u32((const uint16_t *)m), 15));
}

/* T at f fractional bits, rounded: the next four channels. */
static inline int32x4_t mve_scaled(int32x4_t a, int32x4_t multiplier, int32x4_t shift)
{
    return vrshlq_s32(vmulhq_s32(a, multiplier), shift);
}

/* Rescaled channels 0 4 8 12 and 2 6 10 14, or 1 5 9 13 and 3 7 11 15, as eight of 16 bits with the zero point added. */
static inline int16x8_t mve_narrowed(int32x4_t bottom, int32x4_t top, int16_t zero)
{
    const int16x8_t half = vqmovnbq_s32(vreinterpretq_s16_s32(bottom), bottom);
    return vqaddq_n_s16(vqmovntq_s32(half, top), zero);
}

/* Channels 0 .. 15 from the even and the odd ones. */
static inline int8x16_t mve_interleaved(int16x8_t even, int16x8_t odd)
{
    return vqmovntq_s16(vqmovnbq_s16(vreinterpretq_s8_s16(even), even), odd);
}

/* Sixteen channels at a time to int8, from sums in pairs of pixels. */
MVE_SHARED void mve_rescale_2x16(
    const int32_t *acc, int pixels, int channels, const int16_t *multiplier, const int8_t *shift, int zero, int8_t *y)
{
    const int16_t z = (int16_t)zero;
    for (int left = pixels; left > 0; left -= 2) {
        /* Without a second pixel its results go where the first one's then follow. */
        const int second = left > 1 ? channels : 0;
        const int16_t *m = multiplier;
        const int8_t *s = shift;
        for (int c = 0; c < channels; c += 16) {
            int32x4_t scale = mve_multiplier(m);
            int32x4_t places = vldrbq_s32(s);
            const int32x4_t a0 = mve_scaled(vldrwq_s32(acc), scale, places);
            const int32x4_t b0 = mve_scaled(vldrwq_s32(acc + 4), scale, places);
            scale = mve_multiplier(m + 4);
            places = vldrbq_s32(s + 4);
            const int16x8_t a_even = mve_narrowed(a0, mve_scaled(vldrwq_s32(acc + 8), scale, places), z);
            const int16x8_t b_even = mve_narrowed(b0, mve_scaled(vldrwq_s32(acc + 12), scale, places), z);
            scale = mve_multiplier(m + 8);
            places = vldrbq_s32(s + 8);
            const int32x4_t a2 = mve_scaled(vldrwq_s32(acc + 16), scale, places);
            const int32x4_t b2 = mve_scaled(vldrwq_s32(acc + 20), scale, places);
            scale = mve_multiplier(m + 12);
            places = vldrbq_s32(s + 12);
            const int16x8_t a_odd = mve_narrowed(a2, mve_scaled(vldrwq_s32(acc + 24), scale, places), z);
            const int16x8_t b_odd = mve_narrowed(b2, mve_scaled(vldrwq_s32(acc + 28), scale, places), z);
            vstrbq_s8(y + second, mve_interleaved(b_even, b_odd));
            vstrbq_s8(y, mve_interleaved(a_even, a_odd));
            y += 16;
            m += 16;
            s += 16;
            acc += 32;
        }
        y += second;
    }
}

/* The same from the sums of one pixel. */
MVE_SHARED void mve_rescale_1x16(
    const int32_t *acc, int channels, const int16_t *multiplier, const int8_t *shift, int zero, int8_t *y)
{
    const int16_t z = (int16_t)zero;
    for (int c = 0; c < channels; c += 16) {
        int16x8_t half[2];
        for (int odd = 0; odd < 2; ++odd) {
            const int32x4_t a = mve_scaled(vldrwq_s32(acc), mve_multiplier(multiplier), vldrbq_s32(shift));
            const int32x4_t b = mve_scaled(vldrwq_s32(acc + 4), mve_multiplier(multiplier + 4), vldrbq_s32(shift + 4));
            half[odd] = mve_narrowed(a, b, z);
            acc += 8;
            multiplier += 8;
            shift += 8;
        }
        vstrbq_s8(y + c, mve_interleaved(half[0], half[1]));
    }
}

/* mve_rescale_2x16 with shifts to the left before the product, and with (x - x_zero) * factor added to T. */
#define MVE_SUMMED(plus, at, value) \
    vrshlq_s32( \
        plus(vmulhq_s32(vshlq_s32(vldrwq_s32(acc + 2 * (at)), vldrbq_s32(p + (at))), mve_multiplier(m + (at))), value, at), \
        vldrbq_s32(s + (at)))
#define MVE_RESCALE_SUM(name, type, plus) \
MVE_SHARED void name( \
    const int32_t *acc, int pixels, int channels, const int16_t *multiplier, const int8_t *before, const int8_t *shift, \
    const int8_t *x, int x_zero, type factor, int zero, int8_t *y) \
{ \
    for (int pixel = 0; pixel < pixels; ++pixel) { \
        const int16_t *m = multiplier; \
        const int8_t *p = before; \
        const int8_t *s = shift; \
        for (int c = 0; c < channels; c += 16) { \
            const int8x16_t value = vldrbq_s8(x); \
            int16x8_t even = vsubq_n_s16(vmovlbq_s8(value), (int16_t)x_zero); \
            int16x8_t odd = vsubq_n_s16(vmovltq_s8(value), (int16_t)x_zero); \
            const int32x4_t a0 = MVE_SUMMED(plus, 0, vmovlbq_s16(even)); \
            const int32x4_t a1 = MVE_SUMMED(plus, 4, vmovltq_s16(even)); \
            even = mve_narrowed(a0, a1, (int16_t)zero); \
            const int32x4_t a2 = MVE_SUMMED(plus, 8, vmovlbq_s16(odd)); \
            const int32x4_t a3 = MVE_SUMMED(plus, 12, vmovltq_s16(odd)); \
            odd = mve_narrowed(a2, a3, (int16_t)zero); \
            vstrbq_s8(y, mve_interleaved(even, odd)); \
            x += 16; \
            y += 16; \
            m += 16; \
            p += 16; \
            s += 16; \
            acc += 32; \
        } \
        /* From the first pixel of a pair to the second, from the second to the next pair. */ \
        acc += pixel % 2 == 0 ? 4 - 2 * channels : -4; \
    } \
}

#define MVE_PLUS(t, value, at) vmlaq_n_s32(t, value, factor)
#define MVE_PLUS_EACH(t, value, at) vaddq_s32(t, vmulq_s32(value, vldrwq_s32(factor + c + (at))))

MVE_RESCALE_SUM(mve_rescale_sum_2x16, int32_t, MVE_PLUS)
MVE_RESCALE_SUM(mve_rescale_sums_2x16, const int32_t *, MVE_PLUS_EACH)

/* Any number of channels in their own order, four at a time; `stride` words from four sums to the next four. Here shift holds
 * p - f, of which one shift is to the left at most: p > 0 only where f is 1. */
#define MVE_RESCALE_4(name, element, store) \
MVE_SHARED void name( \
    const int32_t *acc, int stride, int channels, const int32_t *multiplier, const int8_t *shift, int zero, int lo, int hi, \
    element *y) \
{ \
    const int32x4_t lowest = vdupq_n_s32(lo); \
    const int32x4_t highest = vdupq_n_s32(hi); \
    for (int left = channels; left > 0; left -= 4) { \
        const mve_pred16_t lanes = vctp32q((uint32_t)left); \
        const int32x4_t places = vldrbq_z_s32(shift, lanes); \
        const int32x4_t before = vmaxq_s32(vaddq_n_s32(places, 1), vdupq_n_s32(0)); \
        const int32x4_t a = vshlq_s32(vldrwq_s32(acc), before); \
        const int32x4_t t = vmulhq_s32(a, vldrwq_z_s32(multiplier, lanes)); \
        const int32x4_t r = vaddq_n_s32(vrshlq_s32(t, vsubq_s32(places, before)), zero); \
        store(y, vminq_s32(vmaxq_s32(r, lowest), highest), lanes); \
        acc += stride; \
        multiplier += 4; \
        shift += 4; \
        y += 4; \
    } \
}

MVE_RESCALE_4(mve_rescale_4_s8, int8_t, vstrbq_p_s32)
MVE_RESCALE_4(mve_rescale_4_s16, int16_t, vstrhq_p_s32)

/* --------------------------------------------------------------------------------------------------------- depthwise */

/* Products of sixteen channels of one tap, added to the even and to the odd ones. */
static inline int16x8_t mve_even(int16x8_t sum, int8x16_t x, int8x16_t w)
{
    return vaddq_s16(sum, vmullbq_int_s8(x, w));
}

static inline int16x8_t mve_odd(int16x8_t sum, int8x16_t x, int8x16_t w)
{
    return vaddq_s16(sum, vmulltq_int_s8(x, w));
}

/* ------------------------------------------------------------------------------------------------------------ copies */

/* Columns of `bytes` each, `from_step` and `to_step` bytes apart; `flip` turns uint8 into int8 less 128. */
MVE_SHARED void mve_columns(
    void *to, int to_step, const void *from, int from_step, int columns, int bytes, uint8_t flip)
{
    uint8_t *t = (uint8_t *)to;
    const uint8_t *f = (const uint8_t *)from;
    const uint8x16_t sign = vdupq_n_u8(flip);
    for (int column = 0; column < columns; ++column) {
        for (int i = 0; i < bytes; i += 16) {
            const mve_pred16_t lanes = vctp8q((uint32_t)(bytes - i));
            vstrbq_p_u8(t + i, veorq_u8(vldrbq_z_u8(f + i, lanes), sign), lanes);
        }
        t += to_step;
        f += from_step;
    }
}

/* Single bytes from_step apart, which is 0 or 1, to places to_step apart. */
MVE_SHARED void mve_bytes(void *to, int to_step, const void *from, int from_step, int columns, uint8_t flip)
{
    uint8_t *t = (uint8_t *)to;
    const uint8_t *f = (const uint8_t *)from;
    const uint16x8_t lane = vidupq_n_u16(0u, 1);
    const uint16x8_t places = vmulq_n_u16(lane, (uint16_t)to_step);
    const uint16x8_t sources = vmulq_n_u16(lane, (uint16_t)from_step);
    for (int left = columns; left > 0; left -= 8) {
        const mve_pred16_t lanes = vctp16q((uint32_t)left);
        const uint16x8_t v = veorq_u16(vldrbq_gather_offset_z_u16(f, sources, lanes), vdupq_n_u16(flip));
        vstrbq_scatter_offset_p_u16(t, places, v, lanes);
        t += 8 * to_step;
        f += 8 * from_step;
    }
}

#endif
