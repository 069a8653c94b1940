/* host.h on a Cortex-M without any C library: vectors and reset, semihosting, and the four memory
 * functions a compiler may call on its own account.
 *
 * It serves the self-test and the runner, under an emulator or a debug probe that answers
 * semihosting; a product has its own start-up code and needs none of this. The linker script gives
 * stack_top and the bounds of .data and .bss. The command line's second word, where there is one,
 * names the file that host_read reads; without it, it reads the console.
 */
#include "host.h"
#include "host_bare.h"

#include <stdint.h>

#define SYS_OPEN 0x01
#define SYS_WRITE 0x05
#define SYS_READ 0x06
#define SYS_GET_CMDLINE 0x15
#define SYS_EXIT 0x18
#define SYS_EXIT_EXTENDED 0x20
#define MODE_READ_BINARY 1
#define MODE_WRITE_BINARY 5
#define APPLICATION_EXIT 0x20026u
#define RUN_TIME_ERROR 0x20023u
#define FAULT_STATUS 99

extern uint32_t stack_top, data_load, data_start, data_end, bss_start, bss_end;

int main(void);
void reset(void);
void start(void);
void fault(void);

static intptr_t semihosting(int operation, const void *argument)
{
    register intptr_t r0 __asm__("r0") = operation;
    register const void *r1 __asm__("r1") = argument;
    __asm__ volatile("bkpt 0xab" : "+r"(r0) : "r"(r1) : "memory", "cc");
    return r0;
}

static intptr_t open(const char *name, uintptr_t length, uintptr_t mode)
{
    const uintptr_t block[3] = {(uintptr_t)name, mode, length};
    return semihosting(SYS_OPEN, block);
}

static __attribute__((noreturn)) void stop(int status)
{
    const uint32_t block[2] = {APPLICATION_EXIT, (uint32_t)status};
    (void)semihosting(SYS_EXIT_EXTENDED, block);
    (void)semihosting(SYS_EXIT, (const void *)(uintptr_t)(status ? RUN_TIME_ERROR : APPLICATION_EXIT));
    for (;;) {
    }
}

/* The handle of the file that the command line names second, else of the console. */
static intptr_t open_input(void)
{
    static char line[256];
    uintptr_t block[2] = {(uintptr_t)line, sizeof line};
    if (semihosting(SYS_GET_CMDLINE, block) == 0) {
        const uintptr_t length = block[1];
        uintptr_t at = 0;
        while (at < length && line[at] != ' ') {
            at++;
        }
        if (at < length) {
            at++;
            return open(line + at, length - at, MODE_READ_BINARY);
        }
    }
    return open(":tt", 3, MODE_READ_BINARY);
}

size_t host_read(void *data, size_t size)
{
    static intptr_t input = -1;
    char *at = data;
    size_t left = size;
    if (input == -1) {
        input = open_input();
    }
    while (input != -1 && left > 0) {
        const uintptr_t block[3] = {(uintptr_t)input, (uintptr_t)at, left};
        const intptr_t unread = semihosting(SYS_READ, block);
        if (unread < 0 || (size_t)unread >= left) {
            break;
        }
        at += left - (size_t)unread;
        left = (size_t)unread;
    }
    return size - left;
}

int host_write(const void *data, size_t size)
{
    static intptr_t output = -1;
    const char *at = data;
    size_t left = size;
    if (output == -1) {
        output = open(":tt", 3, MODE_WRITE_BINARY);
    }
    while (output != -1 && left > 0) {
        const uintptr_t block[3] = {(uintptr_t)output, (uintptr_t)at, left};
        const intptr_t unwritten = semihosting(SYS_WRITE, block);
        if (unwritten < 0 || (size_t)unwritten >= left) {
            break;
        }
        at += left - (size_t)unwritten;
        left = (size_t)unwritten;
    }
    return left == 0 ? 0 : -1;
}

void fault(void)
{
    static const char text[] = "fault\n";
    (void)host_write(text, sizeof text - 1);
    stop(FAULT_STATUS);
}

#if defined(__ARM_FP) || defined(__ARM_FEATURE_MVE)
/* The vector unit is off after reset, and a compiler may use it in the first C function already. */
#define ENABLE_VECTORS                                                                             \
    "ldr r0, =0xE000ED88\n"                                                                        \
    "ldr r1, [r0]\n"                                                                               \
    "orr r1, r1, #0xF00000\n"                                                                      \
    "str r1, [r0]\n"                                                                               \
    "dsb\n"                                                                                        \
    "isb\n"
#else
#define ENABLE_VECTORS ""
#endif

#if __ARM_ARCH == 6 && !defined(__ARM_FEATURE_UNALIGNED)
/* Emulated on a larger core, which shall refuse unaligned access as this one does. */
#define REFUSE_UNALIGNED                                                                           \
    "ldr r0, =0xE000ED14\n"                                                                        \
    "ldr r1, [r0]\n"                                                                               \
    "movs r2, #8\n"                                                                                \
    "orrs r1, r2\n"                                                                                \
    "str r1, [r0]\n"
#else
#define REFUSE_UNALIGNED ""
#endif

__attribute__((naked, noreturn)) void reset(void)
{
    __asm__ volatile(".syntax unified\n" ENABLE_VECTORS REFUSE_UNALIGNED "ldr r0, =start\n"
                     "bx r0\n"
                     ".ltorg\n");
}

__attribute__((used, noreturn)) void start(void)
{
    const uint32_t *from = &data_load;
    for (uint32_t *to = &data_start; to < &data_end; to++) {
        *to = *from++;
        KEEP_LOOP();
    }
    for (uint32_t *to = &bss_start; to < &bss_end; to++) {
        *to = 0;
        KEEP_LOOP();
    }
    stop(main());
}

typedef void (*handler)(void);

__attribute__((section(".vectors"), used)) static const struct {
    uint32_t *stack;
    handler handlers[15];
} vectors = {&stack_top,
             {reset, fault, fault, fault, fault, fault, fault, 0, 0, 0, fault, fault, 0, fault, fault}};
