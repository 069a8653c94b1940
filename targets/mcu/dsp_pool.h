/* Micro-kernels for pooling: one pixel, all channels, a few channels at a time. Where these do not divide the channels,
 * the last few are computed with some of those before them again.
 *
 * Results go to `line`, from where dsp_copy takes them: the pixel may be written over one of its taps.
 */
#ifndef QCOMPILE_DSP_POOL_H
#define QCOMPILE_DSP_POOL_H

#include "dsp.h"

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"

/* Copies `count` bytes. */
DSP_ASM void dsp_copy(void *to, const void *from, int count)
{
    __asm__ volatile("subs r2, #4\n"
                     "blt 2f\n"
                     "1:\n"
                     "ldr r3, [r1], #4\n"
                     "str r3, [r0], #4\n"
                     "subs r2, #4\n"
                     "bge 1b\n"
                     "2:\n"
                     "adds r2, #4\n"
                     "beq 4f\n"
                     "3:\n"
                     "ldrb r3, [r1], #1\n"
                     "strb r3, [r0], #1\n"
                     "subs r2, #1\n"
                     "bne 3b\n"
                     "4:\n"
                     "bx lr\n");
}

/* The largest codes so far in r4, those of the tap at `pixel` compared. r12 first channel. */
#define DSP_MAX_TAP(compare, pixel)                                                                                    \
    "ldr " pixel ", [" pixel ", r12]\n" compare " lr, " pixel ", r4\n"                                                 \
    "sel r4, " pixel ", r4\n"

/* The largest of `count` taps, a multiple of `at_once`; there are at least four channels. `taps` points at the pixels
 * under the kernel, `shift` elements before them. */
#define DSP_MAX(name, type, lowest, registers, at_once)                                                                \
    DSP_ASM void name(type *line, const type *const *taps, int count, int shift, int channels)                         \
    {                                                                                                                  \
        __asm__ volatile("push {r4-r11, lr}\n"                                                                         \
                         "ldr r11, [sp, #36]\n"                                                                        \
                         "add r2, r1, r2, lsl #2\n"                                                                    \
                         "mov r10, #0\n"                                                                               \
                         "1:\n"                                                                                        \
                         "add r12, r3, r10\n"                                                                          \
                         "mov r4, #" lowest "\n"                                                                       \
                         "mov r5, r1\n"                                                                                \
                         "2:\n"                                                                                        \
                         "ldmia r5!, {" registers "}\n" at_once                                                        \
                         "cmp r5, r2\n"                                                                                \
                         "bne 2b\n"                                                                                    \
                         "str r4, [r0, r10]\n"                                                                         \
                         "add r10, r10, #4\n"                                                                          \
                         "cmp r10, r11\n"                                                                              \
                         "bge 4f\n"                                                                                    \
                         "sub r6, r11, #4\n"                                                                           \
                         "cmp r10, r6\n"                                                                               \
                         "ble 1b\n"                                                                                    \
                         "mov r10, r6\n"                                                                               \
                         "b 1b\n"                                                                                      \
                         "4:\n"                                                                                        \
                         "pop {r4-r11, pc}\n");                                                                        \
    }
#define DSP_MAX3(compare)                                                                                              \
    DSP_MAX_TAP(compare, "r6") DSP_MAX_TAP(compare, "r7") DSP_MAX_TAP(compare, "r8")
#define DSP_MAX4(compare) DSP_MAX3(compare) DSP_MAX_TAP(compare, "r9")

DSP_MAX(dsp_max3_s8, int8_t, "0x80808080", "r6-r8", DSP_MAX3("ssub8"))
DSP_MAX(dsp_max4_s8, int8_t, "0x80808080", "r6-r9", DSP_MAX4("ssub8"))
DSP_MAX(dsp_max3_u8, uint8_t, "0", "r6-r8", DSP_MAX3("usub8"))
DSP_MAX(dsp_max4_u8, uint8_t, "0", "r6-r9", DSP_MAX4("usub8"))

/* One tap added to the sums of eight channels: r0-r3 pairs of int16, r6 and lr the tap's first and fifth channel. */
#define DSP_SUM_TAP(widen, index)                                                                                      \
    "ldr r4, [r6" index "]\n"                                                                                          \
    "ldr r5, [lr" index "]\n" widen " r1, r1, r4, ror #8\n" widen " r0, r0, r4\n"                                      \
    widen " r3, r3, r5, ror #8\n" widen " r2, r2, r5\n"

/* Four channels from their sums, to r8. r9 multiplier, r10 addend, r12 shift, lr fraction. */
#define DSP_SUM_STORE(even, odd, saturate, store, step, third, second, first)                                          \
    "sxth r6, " even "\n"                                                                                              \
    "sxth r7, " odd "\n"                                                                                               \
    "asr " even ", " even ", #16\n"                                                                                    \
    "asr " odd ", " odd ", #16\n" DSP_SUM_SCALE("r6", saturate) DSP_SUM_SCALE("r7", saturate)                          \
    DSP_SUM_SCALE(even, saturate) DSP_SUM_SCALE(odd, saturate) store " r6, [r8], #" step "\n"                          \
    store " r7, [r8, #-" third "]\n" store " " even ", [r8, #-" second "]\n"                                           \
    store " " odd ", [r8, #-" first "]\n"

#define DSP_SUM_SCALE(sum, saturate)                                                                                   \
    "lsl " sum ", " sum ", r12\n"                                                                                      \
    "smmla " sum ", " sum ", r9, r10\n"                                                                                \
    "asr " sum ", " sum ", lr\n"                                                                                       \
    saturate(sum)
#define DSP_SUM_INT8(sum) "ssat " sum ", #8, " sum "\n"
#define DSP_SUM_UINT8(sum) "usat " sum ", #8, " sum "\n"
#define DSP_SUM_INT16(sum) "ssat " sum ", #16, " sum "\n"

/* `rows` by `columns` taps; a step leads to the next of a row, the gap from behind its last to the next row, in bytes.
 * `start` is a pair of what is added to each sum, which int16 holds.
 *     line[c] = saturate((addend + ((((start + sum of the taps) << shift) * multiplier) >> 32)) >> fraction);
 * There are at least eight channels; r11 is the first of those in work. */
#define DSP_SUM(name, type, widen, result, index, saturate, ...)                                                       \
    DSP_ASM void name(result *line, const type *from, int rows, int columns, int gap, int step, int channels,          \
                      int32_t start, int32_t multiplier, int32_t addend, int shift, int fraction)                      \
    {                                                                                                                  \
        __asm__ volatile("push {r0-r11, lr}\n"                                                                         \
                         "mov r11, #0\n"                                                                               \
                         "1:\n"                                                                                        \
                         "ldrd r6, r10, [sp, #4]\n"                                                                    \
                         "ldr r7, [sp, #56]\n"                                                                         \
                         "ldr r0, [sp, #64]\n"                                                                         \
                         "add r6, r6, r11\n"                                                                           \
                         "add lr, r6, #4\n"                                                                            \
                         "add r8, r7, r7, lsl #1\n"                                                                    \
                         "mov r1, r0\n"                                                                                \
                         "mov r2, r0\n"                                                                                \
                         "mov r3, r0\n"                                                                                \
                         "2:\n"                                                                                        \
                         "ldr r9, [sp, #12]\n"                                                                         \
                         "subs r9, #4\n"                                                                               \
                         "blt 4f\n"                                                                                    \
                         "3:\n" DSP_SUM_TAP(widen, "") DSP_SUM_TAP(widen, ", r7")                                      \
                         DSP_SUM_TAP(widen, ", r7, lsl #1") DSP_SUM_TAP(widen, ", r8")                                 \
                         "add r6, r6, r7, lsl #2\n"                                                                    \
                         "add lr, lr, r7, lsl #2\n"                                                                    \
                         "subs r9, #4\n"                                                                               \
                         "bge 3b\n"                                                                                    \
                         "4:\n"                                                                                        \
                         "adds r9, #4\n"                                                                               \
                         "beq 6f\n"                                                                                    \
                         "5:\n" DSP_SUM_TAP(widen, "")                                                                 \
                         "add r6, r6, r7\n"                                                                            \
                         "add lr, lr, r7\n"                                                                            \
                         "subs r9, #1\n"                                                                               \
                         "bne 5b\n"                                                                                    \
                         "6:\n"                                                                                        \
                         "ldr r4, [sp, #52]\n"                                                                         \
                         "add r6, r6, r4\n"                                                                            \
                         "add lr, lr, r4\n"                                                                            \
                         "subs r10, #1\n"                                                                              \
                         "bne 2b\n"                                                                                    \
                         "ldr r8, [sp]\n"                                                                              \
                         "ldrd r9, r10, [sp, #68]\n"                                                                   \
                         "ldrd r12, lr, [sp, #76]\n"                                                                   \
                         "add r8, r8, r11" index "\n" DSP_SUM_STORE("r0", "r1", saturate, __VA_ARGS__)                 \
                         DSP_SUM_STORE("r2", "r3", saturate, __VA_ARGS__)                                              \
                         "ldr r4, [sp, #60]\n"                                                                         \
                         "add r11, r11, #8\n"                                                                          \
                         "cmp r11, r4\n"                                                                               \
                         "bge 7f\n"                                                                                    \
                         "sub r4, r4, #8\n"                                                                            \
                         "cmp r11, r4\n"                                                                               \
                         "ble 1b\n"                                                                                    \
                         "mov r11, r4\n"                                                                               \
                         "b 1b\n"                                                                                      \
                         "7:\n"                                                                                        \
                         "add sp, #16\n"                                                                               \
                         "pop {r4-r11, pc}\n");                                                                        \
    }
DSP_SUM(dsp_sum_s8_s8, int8_t, "sxtab16", int8_t, "", DSP_SUM_INT8, "strb", "4", "3", "2", "1")
DSP_SUM(dsp_sum_s8_u8, int8_t, "sxtab16", uint8_t, "", DSP_SUM_UINT8, "strb", "4", "3", "2", "1")
DSP_SUM(dsp_sum_s8_s16, int8_t, "sxtab16", int16_t, ", lsl #1", DSP_SUM_INT16, "strh", "8", "6", "4", "2")
DSP_SUM(dsp_sum_u8_s8, uint8_t, "uxtab16", int8_t, "", DSP_SUM_INT8, "strb", "4", "3", "2", "1")
DSP_SUM(dsp_sum_u8_u8, uint8_t, "uxtab16", uint8_t, "", DSP_SUM_UINT8, "strb", "4", "3", "2", "1")
DSP_SUM(dsp_sum_u8_s16, uint8_t, "uxtab16", int16_t, ", lsl #1", DSP_SUM_INT16, "strh", "8", "6", "4", "2")

#pragma GCC diagnostic pop

#endif
