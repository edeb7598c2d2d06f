/* cache.c - see cache.h. */
#include "engine/cache.h"

#include <stdlib.h>
#include <string.h>

#include "ouro_status.h"

static ouro_page *page_new(ouro_page_budget *b)
{
    size_t bytes = b->layout->page_bytes;
    if (bytes > b->limit - b->bytes && !(b->make_room && b->make_room(b->make_room_arg, bytes))) {
        ouro_fail(OURO_ERR_MEMORY, "the key/value cache needs %zu more bytes, %zu of %zu are in use", bytes, b->bytes,
                  b->limit);
        return NULL;
    }
    ouro_page *p = malloc(sizeof *p);
    uint8_t *data = p ? ouro_stock_take(b->stock) : NULL;
    if (!data) {
        free(p);
        ouro_fail(OURO_ERR_MEMORY, "no memory for a key/value page of %zu bytes", bytes);
        return NULL;
    }
    *p = (ouro_page){1, data};
    b->bytes += bytes;
    b->peak = b->bytes > b->peak ? b->bytes : b->peak;
    return p;
}

ouro_page *ouro_page_share(ouro_page *p)
{
    p->refs++;
    return p;
}

void ouro_page_release(ouro_page_budget *b, ouro_page *p)
{
    if (!p || --p->refs > 0) return;
    ouro_stock_give(b->stock, p->data);
    b->bytes -= b->layout->page_bytes;
    free(p);
}

size_t ouro_cache_bytes(const ouro_kv_layout *y, int n, int n_steps)
{
    return ((size_t)n + OURO_BLOCK - 1) / OURO_BLOCK * (size_t)n_steps * y->page_bytes;
}

int ouro_sequence_init(ouro_sequence *s, ouro_page_budget *b, int n_steps, const int32_t *tokens, int n)
{
    *s = (ouro_sequence){.budget = b, .n_rows = n_steps, .token_capacity = n + 64};
    s->tokens = malloc((size_t)s->token_capacity * sizeof *s->tokens);
    if (!s->tokens) return ouro_fail(OURO_ERR_MEMORY, "no memory for %d tokens", n);
    memcpy(s->tokens, tokens, (size_t)n * sizeof *tokens);
    s->n_tokens = n;
    return OURO_OK;
}

void ouro_sequence_fini(ouro_sequence *s)
{
    for (int t = 0; t < s->n_rows && s->page; t++)
        for (int b = 0; b < s->n_blocks; b++)
            ouro_page_release(s->budget, s->page[(size_t)t * (size_t)s->block_capacity + (size_t)b]);
    free(s->page);
    free(s->data);
    free(s->tokens);
    memset(s, 0, sizeof *s);
}

/* Room for more page pointers; the pages stay where they are. */
static int widen(ouro_sequence *s, int capacity)
{
    size_t n = (size_t)s->n_rows * (size_t)capacity;
    ouro_page **page = calloc(n, sizeof *page);
    uint8_t **data = calloc(n, sizeof *data);
    if (!page || !data) {
        free(page);
        free(data);
        return ouro_fail(OURO_ERR_MEMORY, "no memory for a table of %zu pages", n);
    }
    for (int t = 0; t < s->n_rows && s->page; t++) {
        size_t from = (size_t)t * (size_t)s->block_capacity, to = (size_t)t * (size_t)capacity;
        memcpy(page + to, s->page + from, (size_t)s->n_blocks * sizeof *page);
        memcpy(data + to, s->data + from, (size_t)s->n_blocks * sizeof *data);
    }
    free(s->page);
    free(s->data);
    s->page = page;
    s->data = data;
    s->block_capacity = capacity;
    return OURO_OK;
}

static int add_block(ouro_sequence *s)
{
    for (int t = 0; t < s->n_rows; t++) {
        ouro_page *p = page_new(s->budget);
        if (!p) {
            while (t-- > 0) ouro_page_release(s->budget, s->page[(size_t)t * (size_t)s->block_capacity + (size_t)s->n_blocks]);
            return OURO_ERR_MEMORY;
        }
        size_t at = (size_t)t * (size_t)s->block_capacity + (size_t)s->n_blocks;
        s->page[at] = p;
        s->data[at] = p->data;
    }
    s->n_blocks++;
    return OURO_OK;
}

int ouro_sequence_share(ouro_sequence *s, ouro_page *const *pages)
{
    if (s->n_blocks == s->block_capacity) {
        int status = widen(s, s->n_blocks ? 2 * s->n_blocks : 4);
        if (status != OURO_OK) return status;
    }
    for (int t = 0; t < s->n_rows; t++) {
        size_t at = (size_t)t * (size_t)s->block_capacity + (size_t)s->n_blocks;
        s->page[at] = ouro_page_share(pages[t]);
        s->data[at] = pages[t]->data;
    }
    s->n_blocks++;
    return OURO_OK;
}

static int more_tokens(ouro_sequence *s, int n)
{
    if (n <= s->token_capacity) return OURO_OK;
    int capacity = n > 2 * s->token_capacity ? n : 2 * s->token_capacity;
    int32_t *more = realloc(s->tokens, (size_t)capacity * sizeof *more);
    if (!more) return ouro_fail(OURO_ERR_MEMORY, "no memory for %d tokens", capacity);
    s->tokens = more;
    s->token_capacity = capacity;
    return OURO_OK;
}

int ouro_sequence_reserve(ouro_sequence *s, int n)
{
    int blocks = (n + OURO_BLOCK - 1) / OURO_BLOCK, status = more_tokens(s, n);
    if (status != OURO_OK) return status;
    if (blocks > s->block_capacity) status = widen(s, blocks > 2 * s->block_capacity ? blocks : 2 * s->block_capacity);
    while (status == OURO_OK && s->n_blocks < blocks) status = add_block(s);
    return status;
}

void ouro_sequence_keep_row(ouro_sequence *s, int row)
{
    for (int t = 0; t < s->n_rows; t++)
        for (int b = 0; t != row && b < s->n_blocks; b++)
            ouro_page_release(s->budget, s->page[(size_t)t * (size_t)s->block_capacity + (size_t)b]);
    size_t from = (size_t)row * (size_t)s->block_capacity;
    memmove(s->page, s->page + from, (size_t)s->n_blocks * sizeof *s->page);
    memmove(s->data, s->data + from, (size_t)s->n_blocks * sizeof *s->data);
    s->n_rows = 1;
}

int ouro_sequence_own(ouro_sequence *s, int row, int block)
{
    size_t at = (size_t)row * (size_t)s->block_capacity + (size_t)block;
    if (s->page[at]->refs == 1) return OURO_OK;
    ouro_page *p = page_new(s->budget);
    if (!p) return OURO_ERR_MEMORY;
    ouro_page_release(s->budget, s->page[at]);
    s->page[at] = p;
    s->data[at] = p->data;
    return OURO_OK;
}

void ouro_sequence_put(ouro_sequence *s, int step, int pos, const uint8_t *side)
{
    const ouro_kv_layout *y = s->budget->layout;
    uint8_t *page = ouro_sequence_pages(s, step)[pos / OURO_BLOCK];
    for (int l = 0; l < y->n_layers; l++)
        for (int h = 0; h < y->n_kv_heads; h++)
            ouro_side_to_block(y, ouro_kv_block(y, page, l, h), pos % OURO_BLOCK, ouro_side_row(y, side, l, h, 0),
                               ouro_side_row(y, side, l, h, 1));
}

int ouro_sequence_append(ouro_sequence *s, int32_t token)
{
    int status = more_tokens(s, s->n_tokens + 1);
    if (status == OURO_OK) s->tokens[s->n_tokens++] = token;
    return status;
}
