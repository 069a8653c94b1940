/* Products of bytes with AVX-VNNI; vectors_ymm.h has the rest. */
#ifndef QCOMPILE_VECTORS_H
#define QCOMPILE_VECTORS_H

#include "vectors_ymm.h"

/* Adds four products of a, uint8, and b, int8, to each lane. Compilers spill around the intrinsic. */
#define DOT(sum, a, b) __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b))

/* The same with b in memory. Compilers load it ahead, and spill it, around an intrinsic or a register. */
#define DOT_AT(sum, a, b) \
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(a), "m"(*(const __m256i_u *)(const void *)(b)))

/* Adds two products of int16 to each lane. */
#define DOT_PAIRS(sum, a, b) __asm__("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b))

#endif
