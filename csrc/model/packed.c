/* packed.c - see packed.h. Numbers are little-endian, as every machine this runs on has them. */
#include "model/packed.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "ouro_status.h"

#define MAGIC "OUROPACK"
#define VERSION 1u
#define HEADER_BYTES 4096

typedef struct header {
    char magic[8];
    uint32_t version, header_bytes;
    ouro_config config;
    int32_t compute, formats[5];         /* layers, o, down, head, embed */
    float exit_b;
    uint64_t arena_bytes, arena_checksum;
    uint64_t header_checksum;            /* of the bytes before it */
} header;

/* FNV-1a over 64-bit words; n is padded with zeros to a multiple of 8 */
static uint64_t checksum(const void *data, size_t n)
{
    const uint8_t *p = data;
    uint64_t h = 14695981039346656037u, word;
    for (size_t i = 0; i < n; i += 8) {
        word = 0;
        memcpy(&word, p + i, n - i < 8 ? n - i : 8);
        h = (h ^ word) * 1099511628211u;
    }
    return h;
}

static uint64_t header_sum(const header *h) { return checksum(h, offsetof(header, header_checksum)); }

static header header_of(const ouro_model *m)
{
    header h;
    memset(&h, 0, sizeof h);                             /* padding too: it is part of the checksum */
    memcpy(h.magic, MAGIC, sizeof h.magic);
    h.version = VERSION;
    h.header_bytes = HEADER_BYTES;
    h.config = m->config;
    h.compute = (int32_t)m->compute;
    const ouro_format f[5] = {m->formats.layers, m->formats.o, m->formats.down, m->formats.head, m->formats.embed};
    for (int i = 0; i < 5; i++) h.formats[i] = (int32_t)f[i];
    h.exit_b = m->exit_b;
    h.arena_bytes = m->arena_bytes;
    h.arena_checksum = checksum(m->arena, m->arena_bytes);
    h.header_checksum = header_sum(&h);
    return h;
}

static int write_all(int fd, const void *data, size_t n)
{
    const uint8_t *p = data;
    while (n) {
        ssize_t done = write(fd, p, n < (size_t)1 << 30 ? n : (size_t)1 << 30);
        if (done < 0 && errno == EINTR) continue;
        if (done <= 0) return -1;
        p += done;
        n -= (size_t)done;
    }
    return 0;
}

static int read_all(int fd, void *data, size_t n)
{
    uint8_t *p = data;
    while (n) {
        ssize_t done = read(fd, p, n < (size_t)1 << 30 ? n : (size_t)1 << 30);
        if (done < 0 && errno == EINTR) continue;
        if (done <= 0) return -1;
        p += done;
        n -= (size_t)done;
    }
    return 0;
}

int ouro_packed_write(const ouro_model *m, const char *path)
{
    if (!m || !path) return ouro_fail(OURO_ERR_ARGUMENT, "model and path must not be NULL");
    if (!m->ready) return ouro_fail(OURO_ERR_STATE, "the model's weights are not complete");
    uint8_t page[HEADER_BYTES] = {0};
    header h = header_of(m);
    memcpy(page, &h, sizeof h);
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd < 0) return ouro_fail(OURO_ERR_SYSTEM, "cannot create %s: %s", path, strerror(errno));
    int failed = write_all(fd, page, sizeof page) || write_all(fd, m->arena, m->arena_bytes) || fsync(fd);
    int reason = errno;
    failed |= close(fd) != 0;
    if (!failed) return OURO_OK;
    unlink(path);
    return ouro_fail(OURO_ERR_SYSTEM, "cannot write %s: %s", path, strerror(reason));
}

/* Everything the header claims, before memory is taken for it. */
static int check(const header *h, size_t file_bytes, const char *path)
{
    if (memcmp(h->magic, MAGIC, sizeof h->magic)) return ouro_fail(OURO_ERR_FORMAT, "%s is not a packed model", path);
    if (h->version != VERSION)
        return ouro_fail(OURO_ERR_FORMAT, "%s has version %u, expected %u", path, h->version, VERSION);
    if (h->header_checksum != header_sum(h)) return ouro_fail(OURO_ERR_FORMAT, "%s: the header is damaged", path);
    if (h->header_bytes != HEADER_BYTES || file_bytes != HEADER_BYTES + h->arena_bytes)
        return ouro_fail(OURO_ERR_FORMAT, "%s has %zu bytes, expected %llu", path, file_bytes,
                         (unsigned long long)(HEADER_BYTES + h->arena_bytes));
    for (int i = 0; i < 5; i++)
        if (h->formats[i] < 0 || h->formats[i] >= OURO_N_FORMATS)
            return ouro_fail(OURO_ERR_FORMAT, "%s: unknown weight format %d", path, (int)h->formats[i]);
    return OURO_OK;
}

static int read_open(int fd, const char *path, const char *isa, ouro_model **out)
{
    header h;
    struct stat st;
    if (fstat(fd, &st) != 0 || !S_ISREG(st.st_mode)) return ouro_fail(OURO_ERR_FORMAT, "%s is not a regular file", path);
    if (read_all(fd, &h, sizeof h)) return ouro_fail(OURO_ERR_FORMAT, "%s is too short for a packed model", path);
    int status = check(&h, (size_t)st.st_size, path);
    if (status != OURO_OK) return status;
    ouro_formats f = {(ouro_format)h.formats[0], (ouro_format)h.formats[1], (ouro_format)h.formats[2],
                      (ouro_format)h.formats[3], (ouro_format)h.formats[4]};
    ouro_model *m;
    status = ouro_model_new(&h.config, (ouro_compute)h.compute, &f, isa, &m);
    if (status != OURO_OK) return status;
    if (m->arena_bytes != h.arena_bytes)
        status = ouro_fail(OURO_ERR_FORMAT, "%s holds %llu bytes of weights, expected %zu", path,
                           (unsigned long long)h.arena_bytes, m->arena_bytes);
    else if (lseek(fd, HEADER_BYTES, SEEK_SET) < 0 || read_all(fd, m->arena, m->arena_bytes))
        status = ouro_fail(OURO_ERR_FORMAT, "%s ended early (did it shrink?)", path);
    else if (checksum(m->arena, m->arena_bytes) != h.arena_checksum)
        status = ouro_fail(OURO_ERR_FORMAT, "%s: the weights are damaged (checksum)", path);
    if (status != OURO_OK) {
        ouro_model_free(m);
        return status;
    }
    m->exit_b = h.exit_b;
    m->ready = 1;
    *out = m;
    return OURO_OK;
}

int ouro_packed_read(const char *path, const char *isa, ouro_model **out)
{
    if (!path || !out) return ouro_fail(OURO_ERR_ARGUMENT, "path and out must not be NULL");
    *out = NULL;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) return ouro_fail(OURO_ERR_SYSTEM, "cannot open %s: %s", path, strerror(errno));
    int status = read_open(fd, path, isa, out);
    close(fd);
    return status;
}
