/* host.h on Hexagon Linux without any C library: the entry point, the system calls, and the memory
 * functions a compiler may call on its own account.
 *
 * Compile each file, then link with -nostdlib -static. On a device under QuRT or Linux, where the SDK's
 * C library stands, this file is not needed.
 */
#include "host.h"

#include <stdint.h>

#define SYS_READ 63
#define SYS_WRITE 64
#define STDIN 0
#define STDOUT 1
#define EINTR 4

/* A compiler recognises a plain copying loop and replaces it by a call of memcpy, which here would
 * be a call of itself. An instruction it cannot see through keeps the loop a loop. */
#define KEEP_LOOP() __asm__ volatile("" ::: "memory")

int main(void);
void *memcpy(void *restrict to, const void *restrict from, size_t size);
void *memmove(void *to, const void *from, size_t size);
void *memset(void *to, int value, size_t size);
int memcmp(const void *a, const void *b, size_t size);
void *__hexagon_memcpy_likely_aligned_min32bytes_mult8bytes(void *to, const void *from, size_t size);

/* Vectors that a function spills must lie at multiples of 128; 94 is exit_group. */
__asm__(".text\n"
        ".p2align 2\n"
        ".global _start\n"
        ".type _start, @function\n"
        "_start:\n"
        "    { r29 = and(r29, #-128) }\n"
        "    { r30 = #0 }\n"
        "    { r31 = #0 }\n"
        "    { call main }\n"
        "    { r6 = #94 }\n"
        "    { trap0(#1) }\n"
        ".size _start, . - _start\n");

static long system_call(long number, long descriptor, const void *data, size_t size)
{
    register long r6 __asm__("r6") = number;
    register long r0 __asm__("r0") = descriptor;
    register const void *r1 __asm__("r1") = data;
    register size_t r2 __asm__("r2") = size;
    __asm__ volatile("trap0(#1)" : "+r"(r0) : "r"(r6), "r"(r1), "r"(r2) : "memory");
    return r0;
}

size_t host_read(void *data, size_t size)
{
    char *at = data;
    size_t left = size;
    while (left > 0) {
        long got = system_call(SYS_READ, STDIN, at, left);
        if (got > 0) {
            at += got;
            left -= (size_t)got;
        } else if (got != -EINTR) {
            break;
        }
    }
    return size - left;
}

int host_write(const void *data, size_t size)
{
    const char *at = data;
    size_t left = size;
    while (left > 0) {
        long put = system_call(SYS_WRITE, STDOUT, at, left);
        if (put > 0) {
            at += put;
            left -= (size_t)put;
        } else if (put != -EINTR) {
            return -1;
        }
    }
    return 0;
}

void *memcpy(void *restrict to, const void *restrict from, size_t size)
{
    unsigned char *d = to;
    const unsigned char *s = from;
    size_t i = 0;
    /* Words where both sides lie at one. */
    if (((uintptr_t)d | (uintptr_t)s) % sizeof(uint32_t) == 0) {
        for (; i + sizeof(uint32_t) <= size; i += sizeof(uint32_t)) {
            uint32_t word;
            __asm__("%0 = memw(%1)" : "=r"(word) : "r"(s + i) : "memory");
            __asm__ volatile("memw(%0) = %1" ::"r"(d + i), "r"(word) : "memory");
        }
    }
    for (; i < size; i++) {
        d[i] = s[i];
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
    for (size_t i = 0; i < size; i++) {
        d[i] = (unsigned char)value;
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

/* Clang calls this for copies of whole double words whose size it knows. */
void *__hexagon_memcpy_likely_aligned_min32bytes_mult8bytes(void *to, const void *from, size_t size)
{
    return memcpy(to, from, size);
}
