/* mapping.h - a regular file mapped read only, which notices when the file behind it changes.
 *
 * Pages come from the page cache: processes that map one file share them, and the system can take them back. A file
 * that is cut short while it is mapped makes a read of the lost pages fatal (SIGBUS), so users ask ouro_map_check before
 * each piece of work; what happens in the microseconds behind the question no one can catch.
 */
#ifndef OURO_BASE_MAPPING_H
#define OURO_BASE_MAPPING_H

#include <stddef.h>
#include <stdint.h>
#include <time.h>

typedef struct ouro_map {
    int fd;                      /* kept open for the questions; -1: nothing is mapped */
    uint8_t *data;               /* [bytes], NULL until ouro_map_pages; at a 2 MiB boundary where there is room */
    size_t bytes;                /* of the file when it was opened */
    struct timespec modified;
} ouro_map;

/* Opens without mapping: `bytes` is known, ouro_map_read works. OURO_ERR_SYSTEM with the system's words when it can not
 * be opened, OURO_ERR_FORMAT when it is no regular file. */
int ouro_map_open(ouro_map *m, const char *path);
/* n bytes at an offset into dst, by reading; OURO_ERR_FORMAT when the file ends before them */
int ouro_map_read(const ouro_map *m, size_t offset, void *dst, size_t n);
int ouro_map_pages(ouro_map *m);
/* OURO_OK while the file has the length and the time of change that it was opened with, else OURO_ERR_FORMAT */
int ouro_map_check(const ouro_map *m);
void ouro_map_close(ouro_map *m);

/* A hash of n bytes for finding damage, not for keeping out forgers: FNV-1a's shape over 64-bit words with a rotation, in
 * 8 independent lanes so that it runs at the speed of memory. The last word is padded with zeros. */
uint64_t ouro_hash(const void *data, size_t n, uint64_t seed);
/* The same over pieces of 1 MiB, each seeded with its number, by n_threads (0: all processors); then of their hashes. */
int ouro_hash_parallel(const void *data, size_t n, int n_threads, uint64_t *hash);

#endif
