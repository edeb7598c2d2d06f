/* memory.c - see memory.h. Linux knows all three limits; elsewhere the allocations work and the limits are unknown. */
#include "base/memory.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#define HUGE_PAGE ((size_t)2 << 20)

void *ouro_alloc(size_t bytes)
{
    void *p = NULL;
    if (bytes > SIZE_MAX / 2) return NULL;
    return posix_memalign(&p, 64, bytes ? bytes : 64) == 0 ? p : NULL;
}

void ouro_free(void *p) { free(p); }

/* Maps 2 MiB more than asked and gives the ends back, so that the start is aligned. */
void *ouro_big_alloc(size_t bytes)
{
    if (bytes == 0 || bytes > SIZE_MAX / 2) return NULL;
    size_t page = (size_t)sysconf(_SC_PAGESIZE), whole = (bytes + page - 1) / page * page;
    size_t align = whole >= HUGE_PAGE ? HUGE_PAGE : page;
    uint8_t *raw = mmap(NULL, whole + align, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (raw == MAP_FAILED) return NULL;
    uint8_t *p = (uint8_t *)(((uintptr_t)raw + align - 1) / align * align);
    if (p > raw) munmap(raw, (size_t)(p - raw));
    size_t behind = (size_t)(raw + whole + align - (p + whole));
    if (behind) munmap(p + whole, behind);
#ifdef MADV_HUGEPAGE
    if (align == HUGE_PAGE) (void)madvise(p, whole, MADV_HUGEPAGE);
#endif
    return p;
}

void ouro_big_free(void *p, size_t bytes)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    if (p) munmap(p, (bytes + page - 1) / page * page);
}

/* ---- limits -------------------------------------------------------------------------------------------------- */

/* A number in a file, after `key` when that is not NULL; -1 when there is none. */
static long long number_in(const char *path, const char *key)
{
    char line[256];
    long long value = -1;
    FILE *f = fopen(path, "r");
    if (!f) return -1;
    while (value < 0 && fgets(line, sizeof line, f)) {
        const char *at = !key || strncmp(line, key, strlen(key)) == 0 ? line : NULL;
        if (at && sscanf(at + (key ? strlen(key) : 0), "%lld", &value) != 1) value = -1;
        if (!key) break;
    }
    fclose(f);
    return value;
}

static size_t least(size_t a, long long limit, long long used)
{
    if (limit < 0 || used < 0 || limit > (1LL << 60)) return a;
    size_t rest = limit > used ? (size_t)(limit - used) : 0;
    return rest < a ? rest : a;
}

/* What is left of a control group. Its usage counts cached file pages, which the system takes back when it needs
 * them: reading a checkpoint must not make memory look full. */
static size_t least_of_group(size_t a, const char *limit, const char *usage, const char *stat)
{
    long long used = number_in(usage, NULL);
    long long active = number_in(stat, "active_file "), idle = number_in(stat, "inactive_file ");
    if (used >= 0) used -= (active > 0 ? active : 0) + (idle > 0 ? idle : 0);
    return least(a, number_in(limit, NULL), used < 0 ? -1 : used);
}

size_t ouro_available_memory(void)
{
    size_t best = SIZE_MAX / 2;
    long long kib = number_in("/proc/meminfo", "MemAvailable:");
    if (kib >= 0) best = (size_t)kib * 1024;
    best = least_of_group(best, "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat");
    best = least_of_group(best, "/sys/fs/cgroup/memory/memory.limit_in_bytes",
                          "/sys/fs/cgroup/memory/memory.usage_in_bytes", "/sys/fs/cgroup/memory/memory.stat");
    struct rlimit r;
    if (getrlimit(RLIMIT_AS, &r) == 0 && r.rlim_cur != RLIM_INFINITY) {
        long long pages = number_in("/proc/self/statm", NULL);
        best = least(best, (long long)r.rlim_cur, pages * (long long)sysconf(_SC_PAGESIZE));
    }
    return best;
}

size_t ouro_resident_memory(void)
{
    long long kib = number_in("/proc/self/status", "VmRSS:");
    return kib < 0 ? 0 : (size_t)kib * 1024;
}
