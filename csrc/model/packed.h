/* packed.h - packed weights in a file of their own, for programs without Python; layout in docs/packed.md.
 *
 * One header of 4096 bytes, then the arena of the model as it stands in memory. The layout of the arena follows from the
 * header alone, so nothing in it needs an offset.
 */
#ifndef OURO_MODEL_PACKED_H
#define OURO_MODEL_PACKED_H

#include "model/model.h"

/* Writes a finished model. OURO_ERR_SYSTEM with the system's words when the file can not be written; a file that was
 * begun and not finished is removed. */
int ouro_packed_write(const ouro_model *m, const char *path);

/* Reads a model back, ready to use; isa as in ouro_model_new. OURO_ERR_FORMAT names what does not fit: magic, version,
 * size, checksum. The caller frees with ouro_model_free. */
int ouro_packed_read(const char *path, const char *isa, ouro_model **out);

#endif
