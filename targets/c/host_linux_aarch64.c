/* host.h on AArch64 Linux without any C library: the entry point, the system calls, and the four
 * memory functions a compiler may call on its own account.
 *
 * Compile each file, then link with -nostdlib -static.
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

/* The kernel enters with the stack aligned; a zero frame and return address end every backtrace.
 * 94 is exit_group. */
__asm__(".text\n"
        ".global _start\n"
        ".type _start, %function\n"
        "_start:\n"
        "    mov x29, #0\n"
        "    mov x30, #0\n"
        "    bl main\n"
        "    mov x8, #94\n"
        "    svc #0\n"
        ".size _start, . - _start\n");

static long system_call(long number, long descriptor, const void *data, size_t size)
{
    register long x8 __asm__("x8") = number;
    register long x0 __asm__("x0") = descriptor;
    register const void *x1 __asm__("x1") = data;
    register size_t x2 __asm__("x2") = size;
    __asm__ volatile("svc #0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2) : "memory");
    return x0;
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
    for (size_t i = 0; i < size; i++) {
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
