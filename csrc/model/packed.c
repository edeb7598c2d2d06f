/* packed.c - see packed.h. Numbers are little-endian, as every machine this runs on has them. */
#include "model/packed.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/memory.h"
#include "ouro_status.h"

#define MAGIC "OUROPACK"
#define HEADER_BYTES 4096
#define WRITE_BYTES ((size_t)8 << 20)    /* between two questions of progress */

typedef struct header {
    char magic[8];
    uint32_t version, header_bytes;
    int32_t n_layers, n_steps, n_heads, n_kv_heads, d_model, d_head, d_mlp, d_vocab, n_ctx, tied;
    float eps, exit_b;
    double rope_theta;
    int32_t compute, formats[5];         /* layers, o, down, head, embed */
    uint64_t arena_bytes, arena_hash;
    uint64_t header_hash;                /* of the bytes before it */
    uint8_t zero[HEADER_BYTES - 128];
    uint64_t reserved;                   /* 0 */
} header;

_Static_assert(sizeof(header) == HEADER_BYTES && offsetof(header, header_hash) == 112, "the header has no holes");

/* ---- writing --------------------------------------------------------------------------------------------------- */

static int header_of(const ouro_model *m, header *h)
{
    const ouro_config *c = &m->config;
    memset(h, 0, sizeof *h);
    memcpy(h->magic, MAGIC, sizeof h->magic);
    h->version = OURO_PACKED_VERSION, h->header_bytes = HEADER_BYTES;
    h->n_layers = c->n_layers, h->n_steps = c->n_steps, h->n_heads = c->n_heads, h->n_kv_heads = c->n_kv_heads;
    h->d_model = c->d_model, h->d_head = c->d_head, h->d_mlp = c->d_mlp, h->d_vocab = c->d_vocab, h->n_ctx = c->n_ctx;
    h->tied = c->tied, h->eps = c->eps, h->exit_b = m->exit_b, h->rope_theta = c->rope_theta;
    h->compute = (int32_t)m->compute;
    const ouro_format f[5] = {m->formats.layers, m->formats.o, m->formats.down, m->formats.head, m->formats.embed};
    for (int i = 0; i < 5; i++) h->formats[i] = (int32_t)f[i];
    h->arena_bytes = m->arena_bytes;
    int status = ouro_hash_parallel(m->arena, m->arena_bytes, 0, &h->arena_hash);
    h->header_hash = ouro_hash(h, offsetof(header, header_hash), 0);
    return status;
}

static int write_all(int fd, const void *data, size_t n)
{
    const uint8_t *p = data;
    while (n) {
        ssize_t done = write(fd, p, n);
        if (done < 0 && errno == EINTR) continue;
        if (done < 0) return ouro_fail(OURO_ERR_SYSTEM, "cannot write: %s", strerror(errno));
        p += done;
        n -= (size_t)done;
    }
    return OURO_OK;
}

static int write_model(int fd, const ouro_model *m, ouro_progress_fn progress, void *arg)
{
    header *h = malloc(sizeof *h);
    if (!h) return ouro_fail(OURO_ERR_MEMORY, "no memory for a header");
    int status = header_of(m, h);
    if (status == OURO_OK) status = write_all(fd, h, sizeof *h);
    free(h);
    for (size_t at = 0; status == OURO_OK && at < m->arena_bytes; at += WRITE_BYTES) {
        size_t left = m->arena_bytes - at, n = left < WRITE_BYTES ? left : WRITE_BYTES;
        status = write_all(fd, m->arena + at, n);
        if (status == OURO_OK && progress && progress(arg, at + n, m->arena_bytes))
            status = ouro_fail(OURO_ERR_CANCELLED, "writing was cancelled");
    }
    if (status == OURO_OK && fsync(fd)) status = ouro_fail(OURO_ERR_SYSTEM, "cannot write: %s", strerror(errno));
    return status;
}

int ouro_packed_write(const ouro_model *m, const char *path, ouro_progress_fn progress, void *arg)
{
    if (!m || !path) return ouro_fail(OURO_ERR_ARGUMENT, "model and path must not be NULL");
    if (!m->ready) return ouro_fail(OURO_ERR_STATE, "the model's weights are not complete");
    size_t length = strlen(path) + 8;
    char *temporary = malloc(length);
    if (!temporary) return ouro_fail(OURO_ERR_MEMORY, "no memory for a file name");
    snprintf(temporary, length, "%s.XXXXXX", path);
    int fd = mkstemp(temporary), status;
    if (fd < 0) {
        status = ouro_fail(OURO_ERR_SYSTEM, "cannot create %s: %s", path, strerror(errno));
    } else {
        status = write_model(fd, m, progress, arg);
        mode_t mask = umask(0);
        umask(mask);
        (void)fchmod(fd, 0666 & ~mask);                  /* as if it had been created without mkstemp */
        if (close(fd) && status == OURO_OK) status = ouro_fail(OURO_ERR_SYSTEM, "cannot write: %s", strerror(errno));
        if (status == OURO_OK && rename(temporary, path))
            status = ouro_fail(OURO_ERR_SYSTEM, "cannot rename to %s: %s", path, strerror(errno));
        if (status != OURO_OK) unlink(temporary);
    }
    free(temporary);
    return status;
}

/* ---- reading --------------------------------------------------------------------------------------------------- */

static int all_zero(const uint8_t *p, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (p[i]) return 0;
    return 1;
}

/* Everything the header claims, before memory is taken for it. */
static int check_header(const header *h, size_t file_bytes)
{
    if (memcmp(h->magic, MAGIC, sizeof h->magic)) return ouro_fail(OURO_ERR_FORMAT, "not a packed model");
    if (h->version != OURO_PACKED_VERSION)
        return ouro_fail(OURO_ERR_FORMAT, "packed format version %u, expected %u: pack the checkpoint again", h->version,
                         OURO_PACKED_VERSION);
    if (h->header_bytes != HEADER_BYTES || h->header_hash != ouro_hash(h, offsetof(header, header_hash), 0)
        || !all_zero(h->zero, sizeof h->zero) || h->reserved)
        return ouro_fail(OURO_ERR_FORMAT, "the header is damaged (checksum)");
    if (h->arena_bytes > SIZE_MAX / 2 || file_bytes != HEADER_BYTES + h->arena_bytes)
        return ouro_fail(OURO_ERR_FORMAT, "the file has %zu bytes, expected %llu", file_bytes,
                         HEADER_BYTES + (unsigned long long)h->arena_bytes);
    for (int i = 0; i < 5; i++)
        if (h->formats[i] < 0 || h->formats[i] >= OURO_N_FORMATS)
            return ouro_fail(OURO_ERR_FORMAT, "unknown weight format %d", (int)h->formats[i]);
    if (h->compute < OURO_FLOAT32 || h->compute > OURO_COMPUTE_INT4)
        return ouro_fail(OURO_ERR_FORMAT, "unknown compute %d", (int)h->compute);
    return h->tied == 0 || h->tied == 1 ? OURO_OK : ouro_fail(OURO_ERR_FORMAT, "tied is %d, expected 0 or 1", (int)h->tied);
}

static int read_header(const ouro_map *map, header *h)
{
    if (map->bytes < HEADER_BYTES) return ouro_fail(OURO_ERR_FORMAT, "too short for a packed model (%zu bytes)", map->bytes);
    int status = ouro_map_read(map, 0, h, sizeof *h);
    return status == OURO_OK ? check_header(h, map->bytes) : status;
}

static ouro_packed_facts facts_of(const header *h)
{
    return (ouro_packed_facts){
        .config = {h->n_layers, h->n_steps, h->n_heads, h->n_kv_heads, h->d_model, h->d_head, h->d_mlp, h->d_vocab,
                   h->n_ctx, h->tied, h->eps, h->rope_theta},
        .compute = (ouro_compute)h->compute,
        .formats = {(ouro_format)h->formats[0], (ouro_format)h->formats[1], (ouro_format)h->formats[2],
                    (ouro_format)h->formats[3], (ouro_format)h->formats[4]},
        .arena_bytes = (size_t)h->arena_bytes,
    };
}

int ouro_packed_look(const char *path, ouro_packed_facts *facts)
{
    if (!path || !facts) return ouro_fail(OURO_ERR_ARGUMENT, "path and facts must not be NULL");
    ouro_map map;
    int status = ouro_map_open(&map, path);
    if (status != OURO_OK) return status;
    header *h = malloc(sizeof *h);
    status = h ? read_header(&map, h) : ouro_fail(OURO_ERR_MEMORY, "no memory for a header");
    if (status == OURO_OK) *facts = facts_of(h);
    free(h);
    ouro_map_close(&map);
    return status;
}

/* One value that is not finite in a norm or the gate would poison every token silently. */
static int check_vectors(const ouro_model *m)
{
    size_t d = (size_t)m->config.d_model, bad = !isfinite(m->exit_b);
    for (int l = -1; l < m->config.n_layers; l++) {
        const float *vector[4] = {m->norm, m->exit_w, NULL, NULL};
        if (l >= 0) vector[0] = m->layers[l].ln1, vector[1] = m->layers[l].ln1_post;
        if (l >= 0) vector[2] = m->layers[l].ln2, vector[3] = m->layers[l].ln2_post;
        for (int v = 0; v < 4; v++)
            for (size_t i = 0; vector[v] && i < d; i++) bad += !isfinite(vector[v][i]);
    }
    return bad ? ouro_fail(OURO_ERR_FORMAT, "%zu values of norms and gate are not finite", bad) : OURO_OK;
}

static int place_arena(ouro_model *m, const ouro_packed_options *o, const header *h)
{
    int status;
    if (!o->copy) {
        status = ouro_map_pages(&m->map);
        if (status == OURO_OK) ouro_model_place(m, m->map.data + HEADER_BYTES);
    } else {
        uint8_t *arena = ouro_big_alloc(m->arena_bytes);
        if (!arena)
            return ouro_fail(OURO_ERR_MEMORY, "the packed weights need %zu bytes, %zu are free", m->arena_bytes,
                             ouro_available_memory());
        ouro_model_place(m, arena);
        status = ouro_map_read(&m->map, HEADER_BYTES, arena, m->arena_bytes);
        ouro_map_close(&m->map);
    }
    uint64_t hash;
    if (status != OURO_OK || o->skip_checksum) return status;
    status = ouro_hash_parallel(m->arena, m->arena_bytes, o->n_threads, &hash);
    if (status == OURO_OK && hash != h->arena_hash) status = ouro_fail(OURO_ERR_FORMAT, "the weights are damaged (checksum)");
    return status;
}

/* Takes over the map. */
static int read_model(ouro_map *map, const ouro_packed_options *o, header *h, ouro_model **out)
{
    ouro_model *m = NULL;
    int status = read_header(map, h);
    if (status == OURO_OK) {
        ouro_packed_facts f = facts_of(h);
        status = ouro_model_shape(&f.config, o->compute < 0 ? f.compute : (ouro_compute)o->compute, &f.formats, o->isa, &m);
        if (status == OURO_ERR_ARGUMENT && o->compute < 0) status = OURO_ERR_FORMAT;     /* it is the header that is wrong */
    }
    if (status != OURO_OK) {
        ouro_map_close(map);
        return status;
    }
    m->map = *map;
    m->exit_b = h->exit_b;
    if (m->arena_bytes != h->arena_bytes)
        status = ouro_fail(OURO_ERR_FORMAT, "the header claims %llu bytes of weights, its sizes make %zu",
                           (unsigned long long)h->arena_bytes, m->arena_bytes);
    if (status == OURO_OK) status = place_arena(m, o, h);
    if (status == OURO_OK) status = check_vectors(m);
    m->ready = status == OURO_OK;
    if (m->ready) *out = m;
    else ouro_model_free(m);
    return status;
}

int ouro_packed_read(const char *path, const ouro_packed_options *options, ouro_model **out)
{
    const ouro_packed_options plain = {.compute = -1};
    if (!path || !out) return ouro_fail(OURO_ERR_ARGUMENT, "path and out must not be NULL");
    *out = NULL;
    ouro_map map;
    int status = ouro_map_open(&map, path);
    if (status != OURO_OK) return status;
    header *h = malloc(sizeof *h);
    if (h) {
        status = read_model(&map, options ? options : &plain, h, out);
    } else {
        ouro_map_close(&map);
        status = ouro_fail(OURO_ERR_MEMORY, "no memory for a header");
    }
    free(h);
    return status;
}
