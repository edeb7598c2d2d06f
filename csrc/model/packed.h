/* packed.h - packed weights in a file of their own; layout in docs/format.md.
 *
 * One page of 4096 bytes with sizes, formats and checksums, then the arena of the model as it stands in memory, so a file
 * is used where it is mapped. The layout of the arena follows from the header alone: nothing in it needs an offset.
 */
#ifndef OURO_MODEL_PACKED_H
#define OURO_MODEL_PACKED_H

#include "model/model.h"

#define OURO_PACKED_VERSION 2u   /* raise it whenever the header or the layout of a tile or of the arena changes */

/* Asked now and then while writing; not 0 stops with OURO_ERR_CANCELLED. */
typedef int (*ouro_progress_fn)(void *arg, size_t done, size_t total);

/* Writes a finished model beside `path` and renames when all of it is on the disk: a reader never sees a part.
 * OURO_ERR_SYSTEM with the system's words when it can not be written. progress may be NULL. */
int ouro_packed_write(const ouro_model *m, const char *path, ouro_progress_fn progress, void *arg);

typedef struct ouro_packed_facts {
    ouro_config config;
    ouro_compute compute;        /* what it was packed for */
    ouro_formats formats;
    size_t arena_bytes;
} ouro_packed_facts;

/* The header, checked against itself and the length of the file; nothing of the weights is read. */
int ouro_packed_look(const char *path, ouro_packed_facts *facts);

typedef struct ouro_packed_options {
    const char *isa;             /* as in ouro_model_new */
    int compute;                 /* an ouro_compute that goes with the formats, or -1: what it was packed for */
    int copy;                    /* 0: use the mapped file; 1: read it into huge pages of our own */
    int skip_checksum;           /* 1: trust the weights; the header is always checked */
    int n_threads;               /* for the checksum; 0: all processors */
} ouro_packed_options;

/* Opens a model, ready to use; options NULL: {NULL, -1}. OURO_ERR_FORMAT names what does not fit: magic, version, sizes,
 * checksum, values that are not finite. The caller frees with ouro_model_free. */
int ouro_packed_read(const char *path, const ouro_packed_options *options, ouro_model **out);

#endif
