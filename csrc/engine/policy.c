/* policy.c - the cache policies; see policy.h. */
#include "engine/policy.h"

#include "model/config.h"
#include "ouro_status.h"

size_t ouro_policy_rest_bytes(ouro_kv_policy p, const ouro_kv_layout *y, int n_total, int depth)
{
    return ouro_cache_bytes(y, n_total, ouro_policy_folds(p) ? 1 : depth);
}

size_t ouro_policy_peak_bytes(ouro_kv_policy p, const ouro_kv_layout *y, int n_prompt, int n_total, int depth)
{
    size_t rest = ouro_policy_rest_bytes(p, y, n_total, depth), prompt = ouro_cache_bytes(y, n_prompt, depth);
    return rest > prompt ? rest : prompt;
}

/* The means of every block go to the first step's pages, or to new ones where those are shared. */
static int fold_means(ouro_sequence *s)
{
    for (int b = 0; b < s->n_blocks; b++) {
        uint8_t *pages[OURO_MAX_STEPS];
        for (int t = 0; t < s->n_rows; t++) pages[t] = ouro_sequence_pages(s, t)[b];
        int status = ouro_sequence_own(s, 0, b);
        if (status != OURO_OK) return status;
        ouro_page_mean(s->budget->layout, pages, s->n_rows, ouro_sequence_pages(s, 0)[b]);
    }
    return OURO_OK;
}

int ouro_policy_fold(ouro_kv_policy p, ouro_sequence *s)
{
    int keep = p == OURO_POLICY_LAST_STEP ? s->n_rows - 1 : 0;
    int status = p == OURO_POLICY_AVERAGE ? fold_means(s) : OURO_OK;
    if (status == OURO_OK) ouro_sequence_keep_row(s, keep);
    return status;
}

void ouro_policy_keep(ouro_kv_policy p, ouro_sequence *s, int pos, uint8_t *const *sides, int ran, int depth)
{
    const ouro_kv_layout *y = s->budget->layout;
    switch (p) {
    case OURO_POLICY_LAST_STEP:
        ouro_sequence_put(s, 0, pos, sides[ran - 1]);
        break;
    case OURO_POLICY_AVERAGE:
        ouro_side_mean(y, sides, ran, sides[0]);
        ouro_sequence_put(s, 0, pos, sides[0]);
        break;
    case OURO_POLICY_FIRST_STEP:
        ouro_sequence_put(s, 0, pos, sides[0]);
        break;
    default:
        for (int t = 0; t < depth; t++) ouro_sequence_put(s, t, pos, sides[t < ran ? t : ran - 1]);
    }
}
