/* Sums of pooling windows for Armv8.1-M with Helium (MVE): all channels side by side. */
#ifndef QCOMPILE_MVE_POOL_H
#define QCOMPILE_MVE_POOL_H

#include <arm_mve.h>
#include <stdint.h>

/* Sums of bytes over at most 256 pixels, which 16 bits hold, less `less`: `rows` by `columns` pixels, rows `pitch` elements
 * apart; acc has room for whole vectors of eight. A pixel alone takes the inline one, many take the function. */
#define MVE_SUMS(name, element, vector, load, load_some, add, zero, low, high, as_signed) \
static inline void name##_eight(vector sum, int32_t less, int32_t *acc) \
{ \
    int32x4x2_t pair; \
    pair.val[0] = vsubq_n_s32(as_signed(low(sum)), less); \
    pair.val[1] = vsubq_n_s32(as_signed(high(sum)), less); \
    vst2q_s32(acc, pair); \
} \
static inline void name( \
    const element *x, int rows, int columns, int pitch, int channels, int32_t less, int32_t *acc) \
{ \
    int c = 0; \
    for (; c + 32 <= channels; c += 32) { \
        vector sum0 = zero; \
        vector sum1 = zero; \
        vector sum2 = zero; \
        vector sum3 = zero; \
        const element *row = x + c; \
        for (int r = rows; r > 0; --r) { \
            const element *from = row; \
            for (int k = columns; k > 0; --k) { \
                sum0 = add(sum0, load(from)); \
                sum1 = add(sum1, load(from + 8)); \
                sum2 = add(sum2, load(from + 16)); \
                sum3 = add(sum3, load(from + 24)); \
                from += channels; \
            } \
            row += pitch; \
        } \
        name##_eight(sum0, less, acc + c); \
        name##_eight(sum1, less, acc + c + 8); \
        name##_eight(sum2, less, acc + c + 16); \
        name##_eight(sum3, less, acc + c + 24); \
    } \
    for (; c < channels; c += 8) { \
        const mve_pred16_t lanes = vctp16q((uint32_t)(channels - c)); \
        vector sum = zero; \
        const element *row = x + c; \
        for (int r = rows; r > 0; --r) { \
            const element *from = row; \
            for (int k = columns; k > 0; --k) { \
                sum = add(sum, load_some(from, lanes)); \
                from += channels; \
            } \
            row += pitch; \
        } \
        name##_eight(sum, less, acc + c); \
    } \
} \
static __attribute__((noinline, unused)) void name##_of( \
    const element *x, int rows, int columns, int pitch, int channels, int32_t less, int32_t *acc) \
{ \
    name(x, rows, columns, pitch, channels, less, acc); \
}

#define MVE_AS_IT_IS(vector) (vector)
MVE_SUMS(
    mve_sums_s8, int8_t, int16x8_t, vldrbq_s16, vldrbq_z_s16, vaddq_s16, vdupq_n_s16(0), vmovlbq_s16, vmovltq_s16,
    MVE_AS_IT_IS)
MVE_SUMS(
    mve_sums_u8, uint8_t, uint16x8_t, vldrbq_u16, vldrbq_z_u16, vaddq_u16, vdupq_n_u16(0), vmovlbq_u16, vmovltq_u16,
    vreinterpretq_s32_u32)

#endif
