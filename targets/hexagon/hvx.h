/* Vectors of 128 bytes for the layers of a compiled network: moves, transpositions, rescaling.
 *
 * A column is a vector of one 32-bit word for each of 32 pixels: four channels of 8 bits, two of 16 or one of
 * 32. Whole vectors are read only where at least one of their aligned 128 bytes is known to be there, and no
 * byte outside a buffer is written.
 */
#ifndef QCOMPILE_HVX_H
#define QCOMPILE_HVX_H

#include <hexagon_types.h>
#include <hexagon_protos.h>
#include <hvx_hexagon_protos.h>
#include <stdint.h>

#define HVX_BYTES 128
#define HVX_WORDS 32

/* A vector anywhere in memory, whatever lies there. */
typedef HVX_Vector HvxAnywhere __attribute__((aligned(1), may_alias));

static inline HVX_Vector hvx_load(const void *from)
{
    return *(const HvxAnywhere *)from;
}

static inline void hvx_store(void *to, HVX_Vector v)
{
    *(HvxAnywhere *)to = v;
}

/* The same address, whose distance to others the compiler no longer knows: it would join neighbouring unaligned loads
 * and take more instructions for it. */
static inline const unsigned char *hvx_apart(const unsigned char *at)
{
    __asm__("" : "+r"(at));
    return at;
}

/* The first multiple of 128 from here on. */
static inline unsigned char *hvx_align(void *at)
{
    unsigned char *const bytes = (unsigned char *)at;
    return bytes + (-(uintptr_t)bytes & (HVX_BYTES - 1));
}

/* The first `count` bytes from here on, 1 <= count <= 128, and anything behind them. */
static inline HVX_Vector hvx_load_some(const unsigned char *from, int count)
{
    const uintptr_t mask = HVX_BYTES - 1;
    const unsigned char *const first = from - ((uintptr_t)from & mask);
    const unsigned char *const last = from + count - 1;
    const HVX_Vector low = hvx_load(first);
    const HVX_Vector high = hvx_load(last - ((uintptr_t)last & mask));
    return Q6_V_valign_VVR(high, low, (int32_t)(uintptr_t)from);
}

/* Stores the first `count` bytes, 1 <= count <= 128, and nothing else. */
static inline void hvx_store_some(unsigned char *to, HVX_Vector v, int count)
{
    const int32_t address = (int32_t)(uintptr_t)to;
    const int offset = address & (HVX_BYTES - 1);
    const int end = offset + count;
    HVX_Vector *const home = (HVX_Vector *)(void *)(to - offset);
    const HVX_Vector turned = Q6_V_vlalign_VVR(v, v, address);
    const HVX_VectorPred before = Q6_Q_vsetq_R(offset);
    HVX_VectorPred until = Q6_Q_vsetq2_R(end);
    if (end > HVX_BYTES) {
        Q6_vmem_QRIV(until, home + 1, turned);
        until = Q6_Q_vsetq2_R(HVX_BYTES);
    }
    Q6_vmem_QnRIV(Q6_Q_or_QQn(before, until), home, turned);
}

/* Stores as many of the first bytes as `count` says, 128 at most. */
static inline void hvx_store_part(unsigned char *to, HVX_Vector v, int count)
{
    if (count >= HVX_BYTES) {
        hvx_store(to, v);
    } else if (count > 0) {
        hvx_store_some(to, v, count);
    }
}

/* Copies exactly `count` bytes. */
static inline void hvx_copy(unsigned char *to, const unsigned char *from, int count)
{
    int i = 0;
    for (; i + HVX_BYTES <= count; i += HVX_BYTES) {
        hvx_store(to + i, hvx_load(from + i));
    }
    if (i < count) {
        hvx_store_some(to + i, hvx_load_some(from + i, count - i), count - i);
    }
}

/* Copies `count` pieces of `bytes` bytes from every `from_pitch` to every `to_pitch` bytes, first to last. `readable`
 * bytes are there from `from` on. Behind every piece up to 127 more bytes are written. */
static inline void hvx_pieces(unsigned char *to, int to_pitch, const unsigned char *from, int from_pitch,
                              int bytes, int count, int readable)
{
    for (int i = 0; i < count; ++i) {
        const unsigned char *const source = from + i * from_pitch;
        unsigned char *const target = to + i * to_pitch;
        int at = 0;
        for (; at < bytes && i * from_pitch + at + HVX_BYTES <= readable; at += HVX_BYTES) {
            hvx_store(target + at, hvx_load(source + at));
        }
        for (; at < bytes; at += HVX_BYTES) {
            const int left = bytes - at < HVX_BYTES ? bytes - at : HVX_BYTES;
            hvx_store(target + at, hvx_load_some(source + at, left));
        }
    }
}

/* Fills `count` bytes, and up to 127 more behind them. */
static inline void hvx_fill(unsigned char *to, HVX_Vector v, int count)
{
    for (int i = 0; i < count; i += HVX_BYTES) {
        hvx_store(to + i, v);
    }
}

/* Of each word of a vector, the byte `place` of 0..3 as a number. */
static inline HVX_Vector hvx_signed(HVX_Vector v, int place)
{
    return Q6_Vw_vasr_VwR(Q6_Vw_vasl_VwR(v, 24 - 8 * place), 24);
}

static inline HVX_Vector hvx_unsigned(HVX_Vector v, int place)
{
    return Q6_Vuw_vlsr_VuwR(Q6_Vw_vasl_VwR(v, 24 - 8 * place), 24);
}

/* One turn of sorting k vectors of words: word n goes to part n % 2 of the result, in order; parts begin `part` bytes
 * apart, vectors of a part `pitch`. */
static inline void hvx_deal2(unsigned char *to, int pitch, int part, const unsigned char *from, int k, HVX_Vector flip)
{
    for (int i = 0; i < k; i += 2) {
        const HVX_Vector a = Q6_V_vxor_VV(hvx_load(from), flip);
        const HVX_Vector b = Q6_V_vxor_VV(hvx_load(from + HVX_BYTES), flip);
        const HVX_VectorPair words = Q6_W_vdeal_VVR(b, a, -4);
        hvx_store(to, Q6_V_lo_W(words));
        hvx_store(to + part, Q6_V_hi_W(words));
        from += 2 * HVX_BYTES;
        to += pitch;
    }
}

/* The same by n % 4. */
static inline void hvx_deal4(unsigned char *to, int pitch, int part, const unsigned char *from, int k, HVX_Vector flip)
{
    unsigned char *to2 = to + 2 * part;
    for (int i = 0; i < k; i += 4) {
        const HVX_Vector a = Q6_V_vxor_VV(hvx_load(from), flip);
        const HVX_Vector b = Q6_V_vxor_VV(hvx_load(from + HVX_BYTES), flip);
        const HVX_Vector c = Q6_V_vxor_VV(hvx_load(from + 2 * HVX_BYTES), flip);
        const HVX_Vector d = Q6_V_vxor_VV(hvx_load(from + 3 * HVX_BYTES), flip);
        const HVX_VectorPair p = Q6_W_vdeal_VVR(b, a, -4);
        const HVX_VectorPair q = Q6_W_vdeal_VVR(d, c, -4);
        const HVX_VectorPair even = Q6_W_vdeal_VVR(Q6_V_lo_W(q), Q6_V_lo_W(p), -4);
        const HVX_VectorPair odd = Q6_W_vdeal_VVR(Q6_V_hi_W(q), Q6_V_hi_W(p), -4);
        hvx_store(to, Q6_V_lo_W(even));
        hvx_store(to + part, Q6_V_lo_W(odd));
        hvx_store(to2, Q6_V_hi_W(even));
        hvx_store(to2 + part, Q6_V_hi_W(odd));
        from += 4 * HVX_BYTES;
        to += pitch;
        to2 += pitch;
    }
}

/* Undoes hvx_deal2 with a pitch of 128. */
static inline void hvx_shuffle2(unsigned char *to, const unsigned char *from, int k)
{
    const int part = k / 2 * HVX_BYTES;
    for (int i = 0; i < k; i += 2) {
        const HVX_VectorPair words = Q6_W_vshuff_VVR(hvx_load(from + part), hvx_load(from), -4);
        hvx_store(to, Q6_V_lo_W(words));
        hvx_store(to + HVX_BYTES, Q6_V_hi_W(words));
        from += HVX_BYTES;
        to += 2 * HVX_BYTES;
    }
}

/* Undoes hvx_deal4 with a pitch of 128. */
static inline void hvx_shuffle4(unsigned char *to, const unsigned char *from, int k)
{
    const int part = k / 4 * HVX_BYTES;
    const unsigned char *from2 = from + 2 * part;
    for (int i = 0; i < k; i += 4) {
        const HVX_VectorPair even = Q6_W_vshuff_VVR(hvx_load(from2), hvx_load(from), -4);
        const HVX_VectorPair odd = Q6_W_vshuff_VVR(hvx_load(from2 + part), hvx_load(from + part), -4);
        const HVX_VectorPair p = Q6_W_vshuff_VVR(Q6_V_lo_W(odd), Q6_V_lo_W(even), -4);
        const HVX_VectorPair q = Q6_W_vshuff_VVR(Q6_V_hi_W(odd), Q6_V_hi_W(even), -4);
        hvx_store(to, Q6_V_lo_W(p));
        hvx_store(to + HVX_BYTES, Q6_V_hi_W(p));
        hvx_store(to + 2 * HVX_BYTES, Q6_V_lo_W(q));
        hvx_store(to + 3 * HVX_BYTES, Q6_V_hi_W(q));
        from += HVX_BYTES;
        from2 += HVX_BYTES;
        to += 4 * HVX_BYTES;
    }
}

/* 32 pixels of k words become k columns, `pitch` bytes apart; k is a power of two. Every byte is xored with `flip`;
 * `spare` holds 2 * k vectors. */
static inline void hvx_columns(unsigned char *to, int pitch, const unsigned char *from, int k, HVX_Vector flip,
                               unsigned char *spare)
{
    unsigned char *next = spare;
    unsigned char *after = spare + k * HVX_BYTES;
    if (k == 1) {
        hvx_store(to, Q6_V_vxor_VV(hvx_load(from), flip));
    }
    for (int left = k; left > 1;) {
        const int by = left % 4 == 0 ? 4 : 2;
        left /= by;
        unsigned char *const target = left == 1 ? to : next;
        const int apart = left == 1 ? pitch : HVX_BYTES;
        if (by == 4) {
            hvx_deal4(target, apart, k / 4 * apart, from, k, flip);
        } else {
            hvx_deal2(target, apart, k / 2 * apart, from, k, flip);
        }
        flip = Q6_V_vzero();
        from = next;
        next = after;
        after = target;
    }
}

/* k columns, one after the other, become 32 pixels of k words; undoes hvx_columns. */
static inline void hvx_pixels(unsigned char *to, const unsigned char *from, int k, unsigned char *spare)
{
    unsigned char *next = spare;
    unsigned char *after = spare + k * HVX_BYTES;
    if (k == 1) {
        hvx_store(to, hvx_load(from));
    }
    for (int left = k; left > 1;) {
        const int by = left % 4 == 0 ? 4 : 2;
        left /= by;
        unsigned char *const target = left == 1 ? to : next;
        if (by == 4) {
            hvx_shuffle4(target, from, k);
        } else {
            hvx_shuffle2(target, from, k);
        }
        from = next;
        next = after;
        after = target;
    }
}

/* `count` pixels of `bytes` bytes become k columns, k the next power of two to the words of a pixel. `pieces` holds
 * 32 * k words and 128 bytes, `spare` 2 * k vectors. */
static inline void hvx_operand(unsigned char *to, const unsigned char *from, int k, int bytes, int count,
                               unsigned char *pieces, unsigned char *spare)
{
    if (count < HVX_WORDS || bytes != 4 * k) {
        hvx_pieces(pieces, 4 * k, from, bytes, bytes, count, count * bytes);
        from = pieces;
    }
    hvx_columns(to, HVX_BYTES, from, k, Q6_V_vzero(), spare);
}

/* Undoes hvx_operand; of the pixels no byte more than theirs is written. `pieces` holds 64 * k words and 128 bytes. */
static inline void hvx_result(unsigned char *to, const unsigned char *from, int k, int bytes, int count,
                              unsigned char *pieces, unsigned char *spare)
{
    if (count == HVX_WORDS && bytes == 4 * k) {
        hvx_pixels(to, from, k, spare);
        return;
    }
    hvx_pixels(pieces, from, k, spare);
    if (bytes != 4 * k) {
        unsigned char *const dense = pieces + k * HVX_BYTES;
        hvx_pieces(dense, bytes, pieces, 4 * k, bytes, count, (count + HVX_WORDS) * 4 * k);
        pieces = dense;
    }
    hvx_copy(to, pieces, count * bytes);
}

/* Writes `rows` rows of `width` words one after the other. Of the rows `top` <= r < `bottom`, the words
 * `left` <= x < `right` are those at `from + (r - top) * pitch + 4 * x`; all others are `pad`. Up to 124 bytes behind the end are
 * written, up to 128 bytes around the words are read. */
static inline void hvx_frame(unsigned char *to, int width, int rows, const unsigned char *from, int pitch, int top,
                             int bottom, int left, int right, HVX_Vector pad)
{
    static const int32_t lanes[HVX_WORDS] __attribute__((aligned(128))) = {
        0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
        16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31,
    };
    const HVX_Vector first = Q6_V_vsplat_R(left - 1);
    const HVX_Vector last = Q6_V_vsplat_R(right);
    const HVX_Vector step = Q6_V_vsplat_R(HVX_WORDS);
    for (int r = 0; r < rows; ++r) {
        HVX_Vector x = hvx_load(lanes);
        const unsigned char *source = from + (r - top) * pitch;
        unsigned char *target = to;
        if (r < top || r >= bottom) {
            for (int done = 0; done < width; done += HVX_WORDS) {
                hvx_store(target, pad);
                target += HVX_BYTES;
            }
        } else {
            for (int done = 0; done < width; done += HVX_WORDS) {
                const HVX_VectorPred inside =
                    Q6_Q_and_QQ(Q6_Q_vcmp_gt_VwVw(x, first), Q6_Q_vcmp_gt_VwVw(last, x));
                hvx_store(target, Q6_V_vmux_QVV(inside, hvx_load(source), pad));
                x = Q6_Vw_vadd_VwVw(x, step);
                source += HVX_BYTES;
                target += HVX_BYTES;
            }
        }
        to += 4 * width;
    }
}

/* floor(a * m / 2^31) of words; the multipliers have up to 16 bits, m = 2^15 * multiplier. */
static inline HVX_Vector hvx_scale16(HVX_Vector a, HVX_Vector multiplier)
{
    return Q6_Vw_vmpye_VwVuh(a, multiplier);
}

/* floor(a * m / 2^31) of words. */
static inline HVX_Vector hvx_scale32(HVX_Vector a, HVX_Vector m)
{
    return Q6_Vw_vmpyoacc_VwVwVh_s1_sat_shift(Q6_Vw_vmpye_VwVuh(a, m), a, m);
}

/* The lower half of the 64-bit products of words. */
static inline HVX_Vector hvx_multiply(HVX_Vector a, HVX_Vector b)
{
    const HVX_Vector high = Q6_Vw_vasl_VwR(Q6_Vw_vmpyio_VwVh(a, b), 16);
    return Q6_Vw_vmpyieacc_VwVwVuh(high, a, b);
}

#endif
