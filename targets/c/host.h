/* What the self-test and the runner ask of the machine they run on: bytes in and bytes out. */
#ifndef QCOMPILE_HOST_H
#define QCOMPILE_HOST_H

#include <stddef.h>

/* Reads up to `size` bytes from standard input; returns fewer only where the input ends. */
size_t host_read(void *data, size_t size);

/* Writes `size` bytes to standard output; returns 0, or -1 if they could not all be written. */
int host_write(const void *data, size_t size);

#endif
