/* memory.h - aligned and huge-page allocation, and how much memory there is. */
#ifndef OURO_BASE_MEMORY_H
#define OURO_BASE_MEMORY_H

#include <stddef.h>

/* 64-byte aligned, uninitialised; NULL when there is none (or bytes overflowed). Free with ouro_free. */
void *ouro_alloc(size_t bytes);
void ouro_free(void *p);

/* Zeroed pages straight from the system, 2 MiB aligned, huge pages asked for. Untouched pages cost nothing. */
void *ouro_big_alloc(size_t bytes);
void ouro_big_free(void *p, size_t bytes);

/* Bytes that can still be used without swapping or hitting a limit: the least of the system's available memory, the
 * control group's remainder and RLIMIT_AS's remainder. SIZE_MAX / 2 when nothing is known. */
size_t ouro_available_memory(void);
/* Resident bytes of this process; 0 when unknown. */
size_t ouro_resident_memory(void);

#endif
