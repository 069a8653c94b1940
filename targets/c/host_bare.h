/* What a program without a C library has to bring itself: the four memory functions that a compiler
 * may call on its own account. The one host file of such a program includes this.
 */
#ifndef QCOMPILE_HOST_BARE_H
#define QCOMPILE_HOST_BARE_H

#include <stddef.h>
#include <stdint.h>

/* A compiler recognises a plain copying loop and replaces it by a call of memcpy, which here would
 * be a call of itself. An instruction it cannot see through keeps the loop a loop. */
#define KEEP_LOOP() __asm__ volatile("" ::: "memory")

/* Four bytes in one access: at any address where the machine can do that, else at multiples of four. */
#ifdef __ARM_FEATURE_UNALIGNED
typedef struct __attribute__((packed, may_alias)) {
    uint32_t bits;
} word;
#define IN_WORDS(addresses) 1
#else
typedef struct __attribute__((may_alias)) {
    uint32_t bits;
} word;
#define IN_WORDS(addresses) ((addresses) % sizeof(word) == 0)
#endif

void *memcpy(void *restrict to, const void *restrict from, size_t size);
void *memmove(void *to, const void *from, size_t size);
void *memset(void *to, int value, size_t size);
int memcmp(const void *a, const void *b, size_t size);

void *memcpy(void *restrict to, const void *restrict from, size_t size)
{
    unsigned char *d = to;
    const unsigned char *s = from;
    if (IN_WORDS((uintptr_t)d | (uintptr_t)s)) {
        for (; size >= sizeof(word); size -= sizeof(word)) {
            ((word *)(void *)d)->bits = ((const word *)(const void *)s)->bits;
            d += sizeof(word);
            s += sizeof(word);
            KEEP_LOOP();
        }
    }
    for (; size > 0; size--) {
        *d++ = *s++;
        KEEP_LOOP();
    }
    return to;
}

void *memmove(void *to, const void *from, size_t size)
{
    unsigned char *d = to;
    const unsigned char *s = from;
    if ((uintptr_t)d < (uintptr_t)s) {
        for (size_t i = 0; i < size; i++) {
            d[i] = s[i];
            KEEP_LOOP();
        }
    } else {
        for (size_t i = size; i > 0; i--) {
            d[i - 1] = s[i - 1];
            KEEP_LOOP();
        }
    }
    return to;
}

void *memset(void *to, int value, size_t size)
{
    unsigned char *d = to;
    const uint32_t bits = (uint32_t)(unsigned char)value * 0x01010101u;
    if (IN_WORDS((uintptr_t)d)) {
        for (; size >= sizeof(word); size -= sizeof(word)) {
            ((word *)(void *)d)->bits = bits;
            d += sizeof(word);
            KEEP_LOOP();
        }
    }
    for (; size > 0; size--) {
        *d++ = (unsigned char)value;
        KEEP_LOOP();
    }
    return to;
}

int memcmp(const void *a, const void *b, size_t size)
{
    const unsigned char *x = a;
    const unsigned char *y = b;
    for (size_t i = 0; i < size; i++) {
        if (x[i] != y[i]) {
            return x[i] < y[i] ? -1 : 1;
        }
        KEEP_LOOP();
    }
    return 0;
}

#endif
