/* Micro-kernels for weights of at most four bits, eight to a word.
 *
 * A nibble holds weight + 8, so that one AND unpacks two of them; to the sum of a channel -8 * the sum of the
 * activations is added. Bit 0 of a word is where weight 0 begins, then 1 (bit 4), 4, 5, 2, 3, 6, 7: pairs stand as
 * the activations do. Where the last word is half full its other nibbles are zero: what is read beside the last
 * activations counts for nothing.
 */
#ifndef QCOMPILE_DSP_NIBBLES_H
#define QCOMPILE_DSP_NIBBLES_H

#include "dsp.h"

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"

/* Two depths of one channel at five pixels. r0-r4 sums, r12 patch, r10 weights, of which the lowest nibbles count. */
#define DSP_NIBBLES5                                                                                                   \
    "ldmia r12!, {r5-r9}\n"                                                                                            \
    "and r11, r10, #0x000f000f\n"                                                                                      \
    "smlad r0, r5, r11, r0\n"                                                                                          \
    "smlad r1, r6, r11, r1\n"                                                                                          \
    "smlad r2, r7, r11, r2\n"                                                                                          \
    "smlad r3, r8, r11, r3\n"                                                                                          \
    "smlad r4, r9, r11, r4\n"

/* Eight depths: 40 products in 32 instructions of four bytes each. */
#define DSP_NIBBLE_BLOCK5                                                                                              \
    "ldr r10, [lr], #4\n" DSP_NIBBLES5                                                                                 \
    "lsr r10, r10, #4\n" DSP_NIBBLES5                                                                                  \
    "lsr r10, r10, #4\n" DSP_NIBBLES5                                                                                  \
    "lsr r10, r10, #4\n" DSP_NIBBLES5

/* Two activations of each pixel times r10. */
#define DSP_OFFSETS5                                                                                                   \
    "ldmia r12!, {r5-r9}\n"                                                                                            \
    "smlad r0, r5, r10, r0\n"                                                                                          \
    "smlad r1, r6, r10, r1\n"                                                                                          \
    "smlad r2, r7, r10, r2\n"                                                                                          \
    "smlad r3, r8, r10, r3\n"                                                                                          \
    "smlad r4, r9, r10, r4\n"

/* Behind the loop's entry the frame holds -8 * the sum of the activations of each pixel. */
#define DSP_NIBBLE_FRAME5 "32"

/* As DSP_ENTER5; `blocks` counts four depths each. */
#define DSP_NIBBLE_ENTER5(base)                                                                                        \
    "push {r4-r11, lr}\n"                                                                                              \
    "sub sp, #" base "+" DSP_NIBBLE_FRAME5 "\n"                                                                        \
    "add r11, sp, #" base "\n"                                                                                         \
    "str r2, [r11], #12\n"                                                                                             \
    "stmia r11, {r0, r1, r3}\n"                                                                                        \
    "mov r5, #40\n"                                                                                                    \
    "mla lr, r3, r5, r2\n"                                                                                             \
    "mov r12, r2\n"                                                                                                    \
    "mvn r10, #7\n"                                                                                                    \
    "pkhbt r10, r10, r10, lsl #16\n"                                                                                   \
    "movs r0, #0\n"                                                                                                    \
    "movs r1, #0\n"                                                                                                    \
    "movs r2, #0\n"                                                                                                    \
    "movs r3, #0\n"                                                                                                    \
    "movs r4, #0\n"                                                                                                    \
    "4:\n" DSP_OFFSETS5 DSP_OFFSETS5                                                                                   \
    "cmp r12, lr\n"                                                                                                    \
    "bne 4b\n"                                                                                                         \
    "ldmia r11, {r5-r7}\n"                                                                                             \
    "stmia r11, {r0-r4}\n"                                                                                             \
    "mov r0, r5\n"                                                                                                     \
    "mov lr, r6\n"                                                                                                     \
    "adds r7, #1\n"                                                                                                    \
    "lsrs r7, #1\n"                                                                                                    \
    "ldr r2, [sp, #" base "]\n"                                                                                        \
    "movs r5, #80\n"                                                                                                   \
    "mla r5, r7, r5, r2\n"                                                                                             \
    "str r5, [sp, #" base "+4]\n"                                                                                      \
    "subs r7, #1\n"                                                                                                    \
    "and r7, r7, #3\n"                                                                                                 \
    "adds r7, #1\n"                                                                                                    \
    "adr r5, 3f + 1\n"                                                                                                 \
    "sub r5, r5, r7, lsl #7\n"                                                                                         \
    "str r5, [sp, #" base "+8]\n"

/* As DSP_SUM5. */
#define DSP_NIBBLE_SUM5(base)                                                                                          \
    "1:\n"                                                                                                             \
    "add r5, sp, #" base "+12\n"                                                                                       \
    "ldmia r5, {r0-r4}\n"                                                                                              \
    "ldr r5, [lr], #4\n"                                                                                               \
    "ldr r12, [sp, #" base "]\n"                                                                                       \
    "adds r0, r0, r5\n"                                                                                                \
    "adds r1, r1, r5\n"                                                                                                \
    "adds r2, r2, r5\n"                                                                                                \
    "adds r3, r3, r5\n"                                                                                                \
    "adds r4, r4, r5\n"                                                                                                \
    "ldr pc, [sp, #" base "+8]\n"                                                                                      \
    ".p2align 2\n"                                                                                                     \
    "2:\n"                                                                                                             \
    ".rept 4\n" DSP_NIBBLE_BLOCK5 ".endr\n"                                                                            \
    "3:\n"                                                                                                             \
    "ldr r5, [sp, #" base "+4]\n"                                                                                      \
    "cmp r12, r5\n"                                                                                                    \
    "bne 2b\n"

DSP_CONV5(dsp_nibble_conv5, DSP_NIBBLE_ENTER5, DSP_NIBBLE_SUM5, DSP_NIBBLE_FRAME5)
DSP_CONV5_ADD(dsp_nibble_conv5_add, DSP_NIBBLE_ENTER5, DSP_NIBBLE_SUM5, DSP_NIBBLE_FRAME5)
DSP_SUMS5(dsp_nibble_sum5, DSP_NIBBLE_ENTER5, DSP_NIBBLE_SUM5, DSP_NIBBLE_FRAME5)

/* Four depths of one channel at one pixel. r9, r10 activations, lr mask. */
#define DSP_NIBBLE_DENSE(sum, word, first, second)                                                                     \
    "and r8, lr, " word first "\n"                                                                                     \
    "smlad " sum ", r8, r9, " sum "\n"                                                                                 \
    "and r8, lr, " word second "\n"                                                                                    \
    "smlad " sum ", r8, r10, " sum "\n"

/* Four depths of four channels. r0-r3 sums, r4-r7 weights, r11 patch. */
#define DSP_NIBBLE_DENSE4(first, second)                                                                               \
    "ldrd r9, r10, [r11], #8\n" DSP_NIBBLE_DENSE("r0", "r4", first, second)                                            \
        DSP_NIBBLE_DENSE("r1", "r5", first, second) DSP_NIBBLE_DENSE("r2", "r6", first, second)                        \
            DSP_NIBBLE_DENSE("r3", "r7", first, second)

/* As dsp_dense; `blocks` counts four depths each, `weights` holds a word of eight of each channel, group by group.
 * Eight depths of four channels: 32 products in 35 instructions. */
DSP_ASM const int32_t *dsp_nibble_dense(int32_t *sums, const int32_t *weights, const int32_t *patch, int blocks,
                                        int groups)
{
    __asm__ volatile("push {r4-r11, lr}\n"
                     "sub sp, #28\n"
                     "ldr r4, [sp, #64]\n"
                     "add r4, r0, r4, lsl #4\n"
                     "stmia sp, {r0, r4}\n"
                     "add r5, r2, r3, lsl #3\n"
                     "mov r11, r2\n"
                     "movs r6, #0\n"
                     "mvn r10, #7\n"
                     "pkhbt r10, r10, r10, lsl #16\n"
                     "4:\n"
                     "ldrd r7, r8, [r11], #8\n"
                     "smlad r6, r7, r10, r6\n"
                     "smlad r6, r8, r10, r6\n"
                     "cmp r11, r5\n"
                     "bne 4b\n"
                     "adds r3, #1\n"
                     "lsrs r3, #1\n"
                     "add r5, r2, r3, lsl #4\n"
                     "strd r6, r5, [sp, #16]\n"
                     "subs r3, #1\n"
                     "and r3, r3, #1\n"
                     "adds r3, #1\n"
                     "movs r5, #140\n"
                     "muls r3, r5\n"
                     "adr r5, 3f + 1\n"
                     "subs r3, r5, r3\n"
                     "strd r2, r3, [sp, #8]\n"
                     "mov r12, r1\n"
                     "mov lr, #0x000f000f\n"
                     "1:\n"
                     "ldr r0, [sp, #16]\n"
                     "mov r1, r0\n"
                     "mov r2, r0\n"
                     "mov r3, r0\n"
                     "ldr r11, [sp, #8]\n"
                     "ldr pc, [sp, #12]\n"
                     ".p2align 2\n"
                     "2:\n"
                     ".rept 2\n"
                     "ldmia r12!, {r4-r7}\n" DSP_NIBBLE_DENSE4("", ", lsr #4")
                         DSP_NIBBLE_DENSE4(", lsr #8", ", lsr #12") ".endr\n"
                     "3:\n"
                     "ldr r4, [sp, #20]\n"
                     "cmp r11, r4\n"
                     "bne 2b\n"
                     "ldrd r4, r5, [sp]\n"
                     "stmia r4!, {r0-r3}\n"
                     "str r4, [sp]\n"
                     "cmp r4, r5\n"
                     "bne 1b\n"
                     "mov r0, r12\n"
                     "add sp, #28\n"
                     "pop {r4-r11, pc}\n");
}

DSP_DENSE(dsp_nibble_dense_s8, int8_t, 8, dsp_nibble_dense)
DSP_DENSE(dsp_nibble_dense_s16, int16_t, 16, dsp_nibble_dense)

#pragma GCC diagnostic pop

#endif
