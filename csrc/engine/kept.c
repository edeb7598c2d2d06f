/* kept.c - see kept.h. */
#include "engine/kept.h"

#include <stdlib.h>

#include "ouro_status.h"

int ouro_kept_new(ouro_workspace *ws, int n, int n_turns, ouro_kept **out)
{
    if (!ws || !out) return ouro_fail(OURO_ERR_ARGUMENT, "workspace and out must not be NULL");
    if (n < 1 || n_turns < 1 || n_turns > OURO_MAX_STEPS)
        return ouro_fail(OURO_ERR_ARGUMENT, "pages for %d positions and %d passes, expected 1 or more and 1 to %d", n,
                         n_turns, OURO_MAX_STEPS);
    if (n > ws->model->config.n_ctx)
        return ouro_fail(OURO_ERR_CONTEXT, "%d positions exceed the context of %d", n, (int)ws->model->config.n_ctx);
    size_t need = ouro_cache_bytes(&ws->kv, n, n_turns), available = ouro_workspace_available(ws, need);
    if (need > available)
        return ouro_fail(OURO_ERR_MEMORY,
                         "the key/value cache of %d positions in %d passes needs %zu bytes, %zu are available", n,
                         n_turns, need, available);
    ouro_kept *k = calloc(1, sizeof *k);
    if (!k) return ouro_fail(OURO_ERR_MEMORY, "no memory for kept pages");
    k->most = n;
    k->budget = (ouro_page_budget){.layout = &ws->kv, .stock = &ws->pages, .limit = need};
    int status = ouro_sequence_init(&k->sequence, &k->budget, n_turns, &(int32_t){0}, 0);
    if (status == OURO_OK) *out = k;
    else ouro_kept_free(k);
    return status;
}

void ouro_kept_free(ouro_kept *k)
{
    if (!k) return;
    if (k->sequence.budget) ouro_sequence_fini(&k->sequence);
    free(k);
}
