/* host.h on AArch64 Linux without any C library: the entry point, the system calls, and the four
 * memory functions a compiler may call on its own account.
 *
 * Compile each file, then link with -nostdlib -static.
 */
#include "host.h"
#include "host_bare.h"

#include <stdint.h>

int main(void);

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

#include "host_linux.h"
