/* host.h on Hexagon Linux without any C library: the entry point, the system calls, and the memory
 * functions a compiler may call on its own account.
 *
 * Compile each file, then link with -nostdlib -static. On a device under QuRT or Linux, where the SDK's
 * C library stands, this file is not needed.
 */
#include "host.h"
#include "host_bare.h"

#include <stdint.h>

int main(void);
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

#include "host_linux.h"

/* Clang calls this for copies of whole double words whose size it knows. */
void *__hexagon_memcpy_likely_aligned_min32bytes_mult8bytes(void *to, const void *from, size_t size)
{
    return memcpy(to, from, size);
}
