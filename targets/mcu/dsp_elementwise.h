/* Micro-kernels for tensors of bytes, element by element: four at a time, then the rest one by one.
 *
 * The four are read before any of them is written, so the result may be written over an operand.
 */
#ifndef QCOMPILE_DSP_ELEMENTWISE_H
#define QCOMPILE_DSP_ELEMENTWISE_H

#include "dsp.h"

/* One value, or two, rescaled. `load` reads them (ldrsb or ldrb); `saturate` and `bits` say the result's type (ssat or
 * usat); fraction and bits are literals.
 *     y[i] = saturate((constant + x[i] * factor) >> fraction); */
#define DSP_RESCALE(y, x, load, count, factor, constant, saturate, bits, fraction)                                     \
    do {                                                                                                               \
        int32_t left_ = (count), t0_, t1_, t2_, t3_;                                                                   \
        const void *x_ = (x);                                                                                          \
        void *y_ = (y);                                                                                                \
        __asm__ volatile("subs %[left], #4\n"                                                                          \
                         "blt 2f\n"                                                                                    \
                         "1:\n" load " %[t0], [%[a]], #4\n" load " %[t1], [%[a], #-3]\n"                               \
                         load " %[t2], [%[a], #-2]\n" load " %[t3], [%[a], #-1]\n"                                     \
                         "mla %[t0], %[t0], %[n], %[c]\n"                                                              \
                         "mla %[t1], %[t1], %[n], %[c]\n"                                                              \
                         "mla %[t2], %[t2], %[n], %[c]\n"                                                              \
                         "mla %[t3], %[t3], %[n], %[c]\n" DSP_STORE4(saturate, #bits, #fraction)                       \
                         "subs %[left], #4\n"                                                                          \
                         "bge 1b\n"                                                                                    \
                         "2:\n"                                                                                        \
                         "adds %[left], #4\n"                                                                          \
                         "beq 4f\n"                                                                                    \
                         "3:\n" load " %[t0], [%[a]], #1\n"                                                            \
                         "mla %[t0], %[t0], %[n], %[c]\n" DSP_STORE1(saturate, #bits, #fraction)                       \
                         "subs %[left], #1\n"                                                                          \
                         "bne 3b\n"                                                                                    \
                         "4:\n"                                                                                        \
                         : [left] "+r"(left_), [a] "+r"(x_), [to] "+r"(y_), [t0] "=&r"(t0_), [t1] "=&r"(t1_),          \
                           [t2] "=&r"(t2_), [t3] "=&r"(t3_)                                                            \
                         : [n] "r"(factor), [c] "r"(constant)                                                          \
                         : "cc", "memory");                                                                            \
    } while (0)

/* Saturates and writes four results, or one. */
#define DSP_STORE4(saturate, bits, fraction)                                                                           \
    saturate " %[t0], #" bits ", %[t0], asr #" fraction "\n"                                                           \
    saturate " %[t1], #" bits ", %[t1], asr #" fraction "\n"                                                           \
    saturate " %[t2], #" bits ", %[t2], asr #" fraction "\n"                                                           \
    saturate " %[t3], #" bits ", %[t3], asr #" fraction "\n"                                                           \
    "strb %[t0], [%[to]], #4\n"                                                                                        \
    "strb %[t1], [%[to], #-3]\n"                                                                                       \
    "strb %[t2], [%[to], #-2]\n"                                                                                       \
    "strb %[t3], [%[to], #-1]\n"
#define DSP_STORE1(saturate, bits, fraction)                                                                           \
    saturate " %[t0], #" bits ", %[t0], asr #" fraction "\n"                                                           \
    "strb %[t0], [%[to]], #1\n"

/*     y[i] = saturate((constant + x[i] * factor + other[i] * more) >> fraction); */
#define DSP_RESCALE2(y, x, load, other, load_other, count, factor, more, constant, saturate, bits, fraction)           \
    do {                                                                                                               \
        int32_t left_ = (count), t0_, t1_, t2_, t3_, u_;                                                               \
        const void *x_ = (x), *other_ = (other);                                                                       \
        void *y_ = (y);                                                                                                \
        __asm__ volatile("subs %[left], #4\n"                                                                          \
                         "blt 2f\n"                                                                                    \
                         "1:\n" load " %[t0], [%[a]], #4\n" load " %[t1], [%[a], #-3]\n"                               \
                         load " %[t2], [%[a], #-2]\n"                                                                  \
                         "mla %[t0], %[t0], %[n], %[c]\n"                                                              \
                         "mla %[t1], %[t1], %[n], %[c]\n"                                                              \
                         "mla %[t2], %[t2], %[n], %[c]\n" load_other " %[t3], [%[b]], #4\n"                            \
                         "mla %[t0], %[t3], %[m], %[t0]\n" load_other " %[t3], [%[b], #-3]\n"                          \
                         "mla %[t1], %[t3], %[m], %[t1]\n" load_other " %[t3], [%[b], #-2]\n"                          \
                         "mla %[t2], %[t3], %[m], %[t2]\n" load " %[t3], [%[a], #-1]\n"                                \
                         "mla %[t3], %[t3], %[n], %[c]\n" load_other " %[u], [%[b], #-1]\n"                            \
                         "mla %[t3], %[u], %[m], %[t3]\n" DSP_STORE4(saturate, #bits, #fraction)                       \
                         "subs %[left], #4\n"                                                                          \
                         "bge 1b\n"                                                                                    \
                         "2:\n"                                                                                        \
                         "adds %[left], #4\n"                                                                          \
                         "beq 4f\n"                                                                                    \
                         "3:\n" load " %[t0], [%[a]], #1\n" load_other " %[t1], [%[b]], #1\n"                          \
                         "mla %[t0], %[t0], %[n], %[c]\n"                                                              \
                         "mla %[t0], %[t1], %[m], %[t0]\n" DSP_STORE1(saturate, #bits, #fraction)                      \
                         "subs %[left], #1\n"                                                                          \
                         "bne 3b\n"                                                                                    \
                         "4:\n"                                                                                        \
                         : [left] "+r"(left_), [a] "+r"(x_), [b] "+r"(other_), [to] "+r"(y_), [t0] "=&r"(t0_),         \
                           [t1] "=&r"(t1_), [t2] "=&r"(t2_), [t3] "=&r"(t3_), [u] "=&r"(u_)                            \
                         : [n] "r"(factor), [m] "r"(more), [c] "r"(constant)                                           \
                         : "cc", "memory");                                                                            \
    } while (0)

/* The product of two values, rescaled; `lowest` and `other_lowest` are pairs of what is added to each.
 *     y[i] = saturate(zero_point + (((x[i] + lowest) * (other[i] + other_lowest) * multiplier + (1 << 31)) >> 32)); */
#define DSP_MUL(name, type, widen, other_type, widen_other, result, saturate)                                          \
    DSP_ASM void name(result *y, const type *x, const other_type *other, int count, int32_t lowest,                    \
                      int32_t other_lowest, int32_t multiplier, int32_t zero_point)                                    \
    {                                                                                                                  \
        __asm__ volatile("push {r4-r11, lr}\n"                                                                         \
                         "ldrd r8, r9, [sp, #36]\n"                                                                    \
                         "ldrd r10, r11, [sp, #44]\n"                                                                  \
                         "subs r3, #4\n"                                                                               \
                         "blt 2f\n"                                                                                    \
                         "1:\n"                                                                                        \
                         "ldr r4, [r1], #4\n"                                                                          \
                         "ldr r6, [r2], #4\n" widen " r5, r8, r4, ror #8\n" widen " r4, r8, r4\n"                      \
                         widen_other " r7, r9, r6, ror #8\n" widen_other " r6, r9, r6\n"                               \
                         "smulbb r12, r4, r6\n"                                                                        \
                         "smulbb lr, r5, r7\n"                                                                         \
                         "smultt r4, r4, r6\n"                                                                         \
                         "smultt r5, r5, r7\n"                                                                         \
                         "smmlar r12, r12, r10, r11\n"                                                                 \
                         "smmlar lr, lr, r10, r11\n"                                                                   \
                         "smmlar r4, r4, r10, r11\n"                                                                   \
                         "smmlar r5, r5, r10, r11\n" saturate " r12, #8, r12\n" saturate " lr, #8, lr\n"               \
                         saturate " r4, #8, r4\n" saturate " r5, #8, r5\n"                                             \
                         "strb r12, [r0], #4\n"                                                                        \
                         "strb lr, [r0, #-3]\n"                                                                        \
                         "strb r4, [r0, #-2]\n"                                                                        \
                         "strb r5, [r0, #-1]\n"                                                                        \
                         "subs r3, #4\n"                                                                               \
                         "bge 1b\n"                                                                                    \
                         "2:\n"                                                                                        \
                         "adds r3, #4\n"                                                                               \
                         "beq 4f\n"                                                                                    \
                         "3:\n"                                                                                        \
                         "ldrb r4, [r1], #1\n"                                                                         \
                         "ldrb r6, [r2], #1\n" widen " r4, r8, r4\n" widen_other " r6, r9, r6\n"                       \
                         "smulbb r4, r4, r6\n"                                                                         \
                         "smmlar r4, r4, r10, r11\n" saturate " r4, #8, r4\n"                                          \
                         "strb r4, [r0], #1\n"                                                                         \
                         "subs r3, #1\n"                                                                               \
                         "bne 3b\n"                                                                                    \
                         "4:\n"                                                                                        \
                         "pop {r4-r11, pc}\n");                                                                        \
    }

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"

DSP_MUL(dsp_mul_s8_s8_s8, int8_t, "sxtab16", int8_t, "sxtab16", int8_t, "ssat")
DSP_MUL(dsp_mul_s8_s8_u8, int8_t, "sxtab16", int8_t, "sxtab16", uint8_t, "usat")
DSP_MUL(dsp_mul_s8_u8_s8, int8_t, "sxtab16", uint8_t, "uxtab16", int8_t, "ssat")
DSP_MUL(dsp_mul_s8_u8_u8, int8_t, "sxtab16", uint8_t, "uxtab16", uint8_t, "usat")
DSP_MUL(dsp_mul_u8_s8_s8, uint8_t, "uxtab16", int8_t, "sxtab16", int8_t, "ssat")
DSP_MUL(dsp_mul_u8_s8_u8, uint8_t, "uxtab16", int8_t, "sxtab16", uint8_t, "usat")
DSP_MUL(dsp_mul_u8_u8_s8, uint8_t, "uxtab16", uint8_t, "uxtab16", int8_t, "ssat")
DSP_MUL(dsp_mul_u8_u8_u8, uint8_t, "uxtab16", uint8_t, "uxtab16", uint8_t, "usat")

#pragma GCC diagnostic pop

#endif
