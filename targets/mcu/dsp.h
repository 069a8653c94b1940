/* Micro-kernels for Cortex-M cores with the DSP extension (M4, M7, M33).
 *
 * The inner loops are whole functions in assembly, so that no compiler can spoil their register use: r0-r12 and lr all
 * hold data. Widened activations lie in scratch as pairs of int16 in the order in which SXTB16 widens four bytes:
 * (0, 2), (1, 3); so the weights can stay bytes.
 */
#ifndef QCOMPILE_DSP_H
#define QCOMPILE_DSP_H

#include <stdint.h>

/* The compiler must not conclude anything from such a function's empty body: neither which parameters it reads nor
 * which registers it changes. */
#ifdef __clang__
#define DSP_ASM static __attribute__((naked, noinline, unused))
#else
#define DSP_ASM static __attribute__((naked, noinline, noipa, unused))
#endif

/* A naked function names its parameters for the reader: the assembly finds them in r0-r3 and on the stack. */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"

/* Writes `words` words of four activations as two pairs each, the pairs of one pixel `step` bytes apart, `offset` added
 * to both halves.
 *     to[0] = pair(from[0], from[2]); to[step] = pair(from[1], from[3]);
 * Returns where the next pair belongs. Activations need no alignment: LDR allows that, LDM and LDRD do not. */
#define DSP_SPREAD_BYTES(name, type, widen, step)                                                                      \
    DSP_ASM int32_t *name(int32_t *to, const type *from, int words, int offset)                                        \
    {                                                                                                                  \
        __asm__ volatile("push {r4}\n"                                                                                 \
                         "pkhbt r3, r3, r3, lsl #16\n"                                                                 \
                         "subs r2, #4\n"                                                                               \
                         "blt 2f\n"                                                                                    \
                         "1:\n"                                                                                        \
                         "ldr r4, [r1], #4\n" DSP_SPREAD_ONE(widen, "r4", step)                                        \
                         "ldr r4, [r1], #4\n" DSP_SPREAD_ONE(widen, "r4", step)                                        \
                         "ldr r4, [r1], #4\n" DSP_SPREAD_ONE(widen, "r4", step)                                        \
                         "ldr r4, [r1], #4\n" DSP_SPREAD_ONE(widen, "r4", step)                                        \
                         "subs r2, #4\n"                                                                               \
                         "bge 1b\n"                                                                                    \
                         "2:\n"                                                                                        \
                         "adds r2, #4\n"                                                                               \
                         "beq 4f\n"                                                                                    \
                         "3:\n"                                                                                        \
                         "ldr r4, [r1], #4\n" DSP_SPREAD_ONE(widen, "r4", step)                                        \
                         "subs r2, #1\n"                                                                               \
                         "bne 3b\n"                                                                                    \
                         "4:\n"                                                                                        \
                         "pop {r4}\n"                                                                                  \
                         "bx lr\n");                                                                                   \
    }

#define DSP_SPREAD_ONE(widen, word, step)                                                                              \
    widen " r12, r3, " word "\n" widen " " word ", r3, " word ", ror #8\n"                                             \
          "str r12, [r0], #" step "\n"                                                                                 \
          "str " word ", [r0], #" step "\n"

/* The same for int16 activations, which need no widening: only the pairs are formed; `offset` is 0. */
#define DSP_SPREAD_HALFWORDS(name, step)                                                                               \
    DSP_ASM int32_t *name(int32_t *to, const int16_t *from, int words, int offset)                                     \
    {                                                                                                                  \
        __asm__ volatile("push {r4}\n"                                                                                 \
                         "1:\n"                                                                                        \
                         "ldr r3, [r1], #4\n"                                                                          \
                         "ldr r4, [r1], #4\n"                                                                          \
                         "pkhbt r12, r3, r4, lsl #16\n"                                                                \
                         "pkhtb r4, r4, r3, asr #16\n"                                                                 \
                         "str r12, [r0], #" step "\n"                                                                  \
                         "str r4, [r0], #" step "\n"                                                                   \
                         "subs r2, #1\n"                                                                               \
                         "bne 1b\n"                                                                                    \
                         "pop {r4}\n"                                                                                  \
                         "bx lr\n");                                                                                   \
    }

DSP_SPREAD_BYTES(dsp_spread5_s8, int8_t, "sxtab16", "20")
DSP_SPREAD_BYTES(dsp_spread5_u8, uint8_t, "uxtab16", "20")
DSP_SPREAD_HALFWORDS(dsp_spread5_s16, "20")
DSP_SPREAD_BYTES(dsp_spread_s8, int8_t, "sxtab16", "4")
DSP_SPREAD_BYTES(dsp_spread_u8, uint8_t, "uxtab16", "4")
DSP_SPREAD_HALFWORDS(dsp_spread_s16, "4")

/* Writes the pair (value, value) for `words` words of four activations. */
#define DSP_FILL(name, step)                                                                                           \
    DSP_ASM int32_t *name(int32_t *to, int value, int words)                                                           \
    {                                                                                                                  \
        __asm__ volatile("pkhbt r1, r1, r1, lsl #16\n"                                                                 \
                         "1:\n"                                                                                        \
                         "str r1, [r0], #" step "\n"                                                                   \
                         "str r1, [r0], #" step "\n"                                                                   \
                         "subs r2, #1\n"                                                                               \
                         "bne 1b\n"                                                                                    \
                         "bx lr\n");                                                                                   \
    }

DSP_FILL(dsp_fill5, "20")
DSP_FILL(dsp_fill, "4")

/* Four depths of one channel at five pixels: 20 products in 15 instructions.
 *     for (p = 0; p < 5; ++p) for (k = 0; k < 4; ++k) sum[p] += patch[p][k] * weights[k];
 * r0-r4 sums, r12 patch, lr weights. Every instruction has four bytes: the loop is entered at any of its blocks. */
#define DSP_BLOCK5                                                                                                     \
    "ldr r10, [lr], #4\n"                                                                                              \
    "ldmia r12!, {r5-r9}\n"                                                                                            \
    "sxtb16 r11, r10\n"                                                                                                \
    "smlad r0, r5, r11, r0\n"                                                                                          \
    "smlad r1, r6, r11, r1\n"                                                                                          \
    "smlad r2, r7, r11, r2\n"                                                                                          \
    "smlad r3, r8, r11, r3\n"                                                                                          \
    "smlad r4, r9, r11, r4\n"                                                                                          \
    "ldmia r12!, {r5-r9}\n"                                                                                            \
    "sxtb16 r10, r10, ror #8\n"                                                                                        \
    "smlad r0, r5, r10, r0\n"                                                                                          \
    "smlad r1, r6, r10, r1\n"                                                                                          \
    "smlad r2, r7, r10, r2\n"                                                                                          \
    "smlad r3, r8, r10, r3\n"                                                                                          \
    "smlad r4, r9, r10, r4\n"

/* The frame holds `base` bytes of the kernel's own; then patch, its end and the loop's entry. */
#define DSP_FRAME5 "12"

/* Saves registers, makes the frame and fills its last three words; lr then points at the weights. */
#define DSP_ENTER5(base)                                                                                               \
    "push {r4-r11, lr}\n"                                                                                              \
    "sub sp, #" base "+" DSP_FRAME5 "\n"                                                                               \
    "movs r5, #40\n"                                                                                                   \
    "mla r5, r3, r5, r2\n"                                                                                             \
    "str r2, [sp, #" base "]\n"                                                                                        \
    "str r5, [sp, #" base "+4]\n"                                                                                      \
    "subs r3, #1\n"                                                                                                    \
    "and r3, r3, #7\n"                                                                                                 \
    "adds r3, #1\n"                                                                                                    \
    "movs r5, #60\n"                                                                                                   \
    "muls r3, r5\n"                                                                                                    \
    "adr r5, 3f + 1\n"                                                                                                 \
    "subs r5, r5, r3\n"                                                                                                \
    "str r5, [sp, #" base "+8]\n"                                                                                      \
    "mov lr, r1\n"

/* The sums of one channel: from its bias through all blocks; lr is then behind its weights. */
#define DSP_SUM5(base)                                                                                                 \
    "1:\n"                                                                                                             \
    "ldr r0, [lr], #4\n"                                                                                               \
    "ldr r12, [sp, #" base "]\n"                                                                                       \
    "mov r1, r0\n"                                                                                                     \
    "mov r2, r0\n"                                                                                                     \
    "mov r3, r0\n"                                                                                                     \
    "mov r4, r0\n"                                                                                                     \
    "ldr pc, [sp, #" base "+8]\n"                                                                                      \
    ".p2align 2\n"                                                                                                     \
    "2:\n"                                                                                                             \
    ".rept 8\n" DSP_BLOCK5 ".endr\n"                                                                                   \
    "3:\n"                                                                                                             \
    "ldr r5, [sp, #" base "+4]\n"                                                                                      \
    "cmp r12, r5\n"                                                                                                    \
    "bne 2b\n"

/* How kernels for five pixels find their weights: `ENTER`, `SUM` and `FRAME` are DSP_ENTER5, DSP_SUM5 and DSP_FRAME5, or
 * those of another packing. */

/* Five pixels, all channels, to int8. `weights`: for each channel the bias, its weights, the multiplier.
 *     y[p * stride + channel] = saturate8(zero_point + ((sum[p] * multiplier + (1 << 31)) >> 32)); */
#define DSP_CONV5(name, ENTER, SUM, FRAME)                                                                             \
    DSP_ASM void name(int8_t *y, const int32_t *weights, const int32_t *patch, int blocks, int channels, int stride,   \
                      int zero_point)                                                                                  \
    {                                                                                                                  \
        __asm__ volatile(ENTER("16")                                                                                   \
                         "ldr r4, [sp, #52+" FRAME "]\n"                                                               \
                         "ldr r2, [sp, #56+" FRAME "]\n"                                                               \
                         "ldr r5, [sp, #60+" FRAME "]\n"                                                               \
                         "add r3, r0, r4\n"                                                                            \
                         "mov r1, r0\n"                                                                                \
                         "mov r0, r5\n"                                                                                \
                         "stmia sp, {r0-r3}\n" SUM("16")                                                               \
                         "ldr r5, [lr], #4\n"                                                                          \
                         "ldmia sp, {r6-r9}\n"                                                                         \
                         "smmlar r0, r0, r5, r6\n"                                                                     \
                         "smmlar r1, r1, r5, r6\n"                                                                     \
                         "smmlar r2, r2, r5, r6\n"                                                                     \
                         "smmlar r3, r3, r5, r6\n"                                                                     \
                         "smmlar r4, r4, r5, r6\n"                                                                     \
                         "ssat r0, #8, r0\n"                                                                           \
                         "ssat r1, #8, r1\n"                                                                           \
                         "ssat r2, #8, r2\n"                                                                           \
                         "ssat r3, #8, r3\n"                                                                           \
                         "ssat r4, #8, r4\n"                                                                           \
                         "strb r0, [r7]\n"                                                                             \
                         "strb r1, [r7, r8]\n"                                                                         \
                         "strb r2, [r7, r8, lsl #1]\n"                                                                 \
                         "strb r4, [r7, r8, lsl #2]\n"                                                                 \
                         "add r8, r8, r8, lsl #1\n"                                                                    \
                         "strb r3, [r7, r8]\n"                                                                         \
                         "adds r7, #1\n"                                                                               \
                         "str r7, [sp, #4]\n"                                                                          \
                         "cmp r7, r9\n"                                                                                \
                         "bne 1b\n"                                                                                    \
                         "add sp, #16+" FRAME "\n"                                                                     \
                         "pop {r4-r11, pc}\n");                                                                        \
    }

/* The same, with another int8 tensor added: `multiplier` holds m and, in its low five bits, the shift p.
 *     y[at] = saturate8((constant + x[at] * factor + (((sum[p] << shift) * m) >> 32)) >> fraction); */
#define DSP_CONV5_ADD(name, ENTER, SUM, FRAME)                                                                         \
    DSP_ASM void name(int8_t *y, const int32_t *weights, const int32_t *patch, int blocks, int channels, int stride,   \
                      const int8_t *x, int factor, int constant, int fraction)                                         \
    {                                                                                                                  \
        __asm__ volatile(ENTER("28")                                                                                   \
                         "ldr r4, [sp, #64+" FRAME "]\n"                                                               \
                         "add r5, r0, r4\n"                                                                            \
                         "str r5, [sp, #24]\n"                                                                         \
                         "add r5, sp, #68+" FRAME "\n"                                                                 \
                         "ldmia r5, {r4-r8}\n"                                                                         \
                         "subs r5, r5, r0\n"                                                                           \
                         "mov r9, r0\n"                                                                                \
                         "mov r10, r4\n"                                                                               \
                         "mov r11, r5\n"                                                                               \
                         "stmia sp, {r6-r11}\n" SUM("28")                                                              \
                         "ldr r5, [lr], #4\n"                                                                          \
                         "and r6, r5, #31\n"                                                                           \
                         "bic r5, r5, #31\n"                                                                           \
                         "lsl r0, r0, r6\n"                                                                            \
                         "lsl r1, r1, r6\n"                                                                            \
                         "lsl r2, r2, r6\n"                                                                            \
                         "lsl r3, r3, r6\n"                                                                            \
                         "lsl r4, r4, r6\n"                                                                            \
                         "ldmia sp, {r7-r12}\n"                                                                        \
                         "add r12, r12, r10\n"                                                                         \
                         DSP_ADD("r0", "") DSP_ADD("r1", ", r11") DSP_ADD("r2", ", r11, lsl #1")                       \
                         DSP_ADD("r4", ", r11, lsl #2")                                                                \
                         "add r11, r11, r11, lsl #1\n" DSP_ADD("r3", ", r11")                                          \
                         "adds r10, #1\n"                                                                              \
                         "str r10, [sp, #12]\n"                                                                        \
                         "ldr r6, [sp, #24]\n"                                                                         \
                         "cmp r10, r6\n"                                                                               \
                         "bne 1b\n"                                                                                    \
                         "add sp, #28+" FRAME "\n"                                                                     \
                         "pop {r4-r11, pc}\n");                                                                        \
    }

/* One result of DSP_CONV5_ADD. */
#define DSP_ADD(sum, index)                                                                                            \
    "ldrsb r6, [r12" index "]\n"                                                                                       \
    "mla r6, r6, r7, r8\n"                                                                                             \
    "smmla " sum ", " sum ", r5, r6\n"                                                                                 \
    "asr " sum ", " sum ", r9\n"                                                                                       \
    "ssat " sum ", #8, " sum "\n"                                                                                      \
    "strb " sum ", [r10" index "]\n"

/* The same, only the sums; no multiplier follows the weights.
 *     sums[p * channels + channel] = sum[p]; */
#define DSP_SUMS5(name, ENTER, SUM, FRAME)                                                                             \
    DSP_ASM void name(int32_t *sums, const int32_t *weights, const int32_t *patch, int blocks, int channels)           \
    {                                                                                                                  \
        __asm__ volatile(ENTER("16")                                                                                   \
                         "ldr r4, [sp, #52+" FRAME "]\n"                                                               \
                         "lsls r2, r4, #2\n"                                                                           \
                         "adds r3, r0, r2\n"                                                                           \
                         "stmia sp, {r1-r3}\n"                                                                         \
                         "str r0, [sp]\n" SUM("16")                                                                    \
                         "ldm sp, {r7-r9}\n"                                                                           \
                         "str r0, [r7]\n"                                                                              \
                         "str r1, [r7, r8]\n"                                                                          \
                         "str r2, [r7, r8, lsl #1]\n"                                                                  \
                         "str r4, [r7, r8, lsl #2]\n"                                                                  \
                         "add r8, r8, r8, lsl #1\n"                                                                    \
                         "str r3, [r7, r8]\n"                                                                          \
                         "adds r7, #4\n"                                                                               \
                         "str r7, [sp]\n"                                                                              \
                         "cmp r7, r9\n"                                                                                \
                         "bne 1b\n"                                                                                    \
                         "add sp, #16+" FRAME "\n"                                                                     \
                         "pop {r4-r11, pc}\n");                                                                        \
    }

DSP_CONV5(dsp_conv5, DSP_ENTER5, DSP_SUM5, DSP_FRAME5)
DSP_CONV5_ADD(dsp_conv5_add, DSP_ENTER5, DSP_SUM5, DSP_FRAME5)
DSP_SUMS5(dsp_sum5, DSP_ENTER5, DSP_SUM5, DSP_FRAME5)

/* Four depths of four channels at one pixel: 16 products in 18 instructions. r0-r3 sums, r11 patch, r12 weights. */
#define DSP_DENSE_ONE(sum, word)                                                                                       \
    "sxtb16 r8, " word "\n"                                                                                            \
    "smlad " sum ", r8, r9, " sum "\n"                                                                                 \
    "sxtb16 " word ", " word ", ror #8\n"                                                                              \
    "smlad " sum ", " word ", r10, " sum "\n"

/* One pixel, `groups` times four channels. `weights`: `blocks` times a word of each channel, group by group.
 *     sums[channel] = sum over k of patch[k] * weights[channel][k];
 * Returns what follows the weights. */
DSP_ASM const int32_t *dsp_dense(int32_t *sums, const int32_t *weights, const int32_t *patch, int blocks, int groups)
{
    __asm__ volatile("push {r4-r11, lr}\n"
                     "sub sp, #20\n"
                     "ldr r4, [sp, #56]\n"
                     "add r4, r0, r4, lsl #4\n"
                     "add lr, r2, r3, lsl #3\n"
                     "subs r3, #1\n"
                     "and r3, r3, #3\n"
                     "adds r3, #1\n"
                     "movs r5, #72\n"
                     "muls r3, r5\n"
                     "adr r5, 3f + 1\n"
                     "subs r3, r5, r3\n"
                     "mov r12, r1\n"
                     "stmia sp, {r0, r4}\n"
                     "strd r2, r3, [sp, #8]\n"
                     "1:\n"
                     "movs r0, #0\n"
                     "movs r1, #0\n"
                     "movs r2, #0\n"
                     "movs r3, #0\n"
                     "ldr r11, [sp, #8]\n"
                     "ldr pc, [sp, #12]\n"
                     ".p2align 2\n"
                     "2:\n"
                     ".rept 4\n"
                     "ldmia r12!, {r4-r7}\n"
                     "ldrd r9, r10, [r11], #8\n" DSP_DENSE_ONE("r0", "r4") DSP_DENSE_ONE("r1", "r5")
                         DSP_DENSE_ONE("r2", "r6") DSP_DENSE_ONE("r3", "r7")
                     ".endr\n"
                     "3:\n"
                     "cmp r11, lr\n"
                     "bne 2b\n"
                     "ldrd r4, r5, [sp]\n"
                     "stmia r4!, {r0-r3}\n"
                     "str r4, [sp]\n"
                     "cmp r4, r5\n"
                     "bne 1b\n"
                     "mov r0, r12\n"
                     "add sp, #20\n"
                     "pop {r4-r11, pc}\n");
}

/* addend + the upper half of sum * multiplier. */
static inline int32_t dsp_scale(int32_t sum, int32_t multiplier, int32_t addend)
{
    int32_t y;
    __asm__("smmla %0, %1, %2, %3" : "=r"(y) : "r"(sum), "r"(multiplier), "r"(addend));
    return y;
}

/* `width` bits, at most 25, from bit `from` on. */
static inline int32_t dsp_bits(const uint8_t *bytes, uint32_t from, uint32_t width)
{
    uint32_t word;
    __asm__("ldr %0, [%1]" : "=r"(word) : "r"(bytes + (from >> 3)), "m"(*(const uint8_t(*)[4])(bytes + (from >> 3))));
    word = (word >> (from & 7u)) & ((1u << width) - 1u);
    return (int32_t)word;
}

/* How a layer's constants are packed, bit after bit: for each channel the bias less `bias_low`, the multiplier's left
 * shift less `shift_low`, and the multiplier below its leading one. The sum is shifted left by `left` bits first, the
 * product right by `fraction` bits. */
struct dsp_fields {
    int32_t bias_low;
    uint8_t bias_bits;
    uint8_t shift_bits;
    uint8_t shift_low;
    uint8_t multiplier_bits;
    uint8_t left;
    uint8_t fraction;
};

/* One pixel, all channels, rescaled to a type of `bits` bits: constants are packed as `fields` says, which the compiler
 * knows where this is called and inlined. */
#define DSP_DENSE(name, type, bits, dense)                                                                             \
    static inline __attribute__((always_inline)) void name(type *y, const int32_t *weights, const int32_t *patch,      \
                                                       int blocks, int channels, const uint8_t *constants,             \
                                                       int32_t addend, struct dsp_fields fields)                       \
    {                                                                                                                  \
        const uint32_t scale_bits = (uint32_t)fields.shift_bits + fields.multiplier_bits;                              \
        uint32_t from = 0;                                                                                             \
        for (int first = 0; first < channels; first += 32) {                                                           \
            int32_t sums[32];                                                                                          \
            const int count = channels - first < 32 ? channels - first : 32;                                           \
            weights = dense(sums, weights, patch, blocks, (count + 3) >> 2);                                           \
            for (int c = 0; c < count; ++c) {                                                                          \
                const int32_t bias = dsp_bits(constants, from, fields.bias_bits) + fields.bias_low;                    \
                const int32_t scale = dsp_bits(constants, from + fields.bias_bits, scale_bits);                        \
                const int32_t multiplier = ((scale >> fields.shift_bits) | (1 << fields.multiplier_bits))              \
                                           << ((scale & ((1 << fields.shift_bits) - 1)) + fields.shift_low);           \
                const int32_t sum = (int32_t)((uint32_t)(sums[c] + bias) << fields.left);                              \
                int32_t t = dsp_scale(sum, multiplier, addend) >> fields.fraction;                                     \
                __asm__("ssat %0, #" #bits ", %0" : "+r"(t));                                                          \
                y[first + c] = (type)t;                                                                                \
                from += fields.bias_bits + scale_bits;                                                                 \
            }                                                                                                          \
        }                                                                                                              \
    }

DSP_DENSE(dsp_dense_s8, int8_t, 8, dsp_dense)
DSP_DENSE(dsp_dense_s16, int16_t, 16, dsp_dense)

/* Three taps of four channels: 12 products in 25 instructions. r0-r3 sums, r8 taps, r9 weights, r10 first channel. */
#define DSP_TAP(pixel)                                                                                                 \
    "ldr r4, [" pixel ", r10]\n"                                                                                       \
    "ldrd r6, r7, [r9], #8\n"                                                                                          \
    "sxtb16 r5, r4, ror #8\n"                                                                                          \
    "sxtb16 r4, r4\n"                                                                                                  \
    "smlabb r0, r4, r6, r0\n"                                                                                          \
    "smlatt r2, r4, r6, r2\n"                                                                                          \
    "smlabb r1, r5, r7, r1\n"                                                                                          \
    "smlatt r3, r5, r7, r3\n"

/* One pixel of a depthwise convolution, all channels, four at once.
 * `weights`: for each four channels their biases, for each tap the pairs of int16 weights (0, 2), (1, 3), then the
 * multipliers. `taps` points at the pixels under the kernel; there are `count` of them, a multiple of three.
 *     y[channel] = saturate8(zero_point + ((sum * multiplier + (1 << 31)) >> 32));
 * Results wait in `line` until the last channel is read: the pixel may be written over one of its taps. */
DSP_ASM void dsp_depthwise(int8_t *y, const int32_t *weights, const int8_t *const *taps, int count, int channels,
                           int zero_point, int8_t *line)
{
    __asm__ volatile("push {r4-r11, lr}\n"
                     "sub sp, #28\n"
                     "ldrd r4, r5, [sp, #64]\n"
                     "ldr r6, [sp, #72]\n"
                     "add r3, r2, r3, lsl #2\n"
                     "strd r2, r3, [sp]\n"
                     "strd r6, r5, [sp, #8]\n"
                     "strd r0, r4, [sp, #16]\n"
                     "mov r9, r1\n"
                     "mov r10, #0\n"
                     "1:\n"
                     "ldmia r9!, {r0-r3}\n"
                     "ldr r8, [sp]\n"
                     "2:\n"
                     "ldmia r8!, {r11, r12, lr}\n" DSP_TAP("r11") DSP_TAP("r12") DSP_TAP("lr")
                     "ldr r4, [sp, #4]\n"
                     "cmp r8, r4\n"
                     "bne 2b\n"
                     "ldmia r9!, {r4-r7}\n"
                     "ldrd r11, r12, [sp, #8]\n"
                     "smmlar r0, r0, r4, r12\n"
                     "smmlar r1, r1, r5, r12\n"
                     "smmlar r2, r2, r6, r12\n"
                     "smmlar r3, r3, r7, r12\n"
                     "ssat r0, #8, r0\n"
                     "ssat r1, #8, r1\n"
                     "ssat r2, #8, r2\n"
                     "ssat r3, #8, r3\n"
                     "add r11, r11, r10\n"
                     "strb r0, [r11]\n"
                     "strb r1, [r11, #1]\n"
                     "strb r2, [r11, #2]\n"
                     "strb r3, [r11, #3]\n"
                     "ldr r4, [sp, #20]\n"
                     "add r10, r10, #4\n"
                     "cmp r10, r4\n"
                     "bne 1b\n"
                     "ldr r5, [sp, #8]\n"
                     "ldr r6, [sp, #16]\n"
                     "3:\n"
                     "ldr r7, [r5], #4\n"
                     "str r7, [r6], #4\n"
                     "subs r4, #4\n"
                     "bne 3b\n"
                     "add sp, #28\n"
                     "pop {r4-r11, pc}\n");
}

#pragma GCC diagnostic pop

#endif
