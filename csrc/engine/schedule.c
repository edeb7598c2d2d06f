/* schedule.c - which lanes ride in the next pass; see engine.h. No arithmetic. */
#include "engine/inside.h"

#include <string.h>

#include "ouro_status.h"

static int add_lane(ouro_engine *e, ouro_request *r, ouro_node *n, int row, int pos, int step, float *h)
{
    int capacity = e->capacity;
    int status = ouro_grow(&e->lanes, &capacity, e->n_lanes + 1, sizeof *e->lanes);
    if (status == OURO_OK) status = ouro_grow(&e->riders, &e->capacity, e->n_lanes + 1, sizeof *e->riders);
    if (status != OURO_OK) return status;
    e->lanes[e->n_lanes] = (ouro_lane){.pos = pos, .step = step, .h = h, .pages = ouro_sequence_pages(&r->seq, step),
                                       .side = n && n->rows ? &n->side[step] : NULL,
                                       .observer = r->params.observer};
    e->riders[e->n_lanes++] = (ouro_rider){r, n, row};
    return OURO_OK;
}

static void remember_states(ouro_node *n, int d)
{
    if (!n->before || n->step == 0) return;
    memcpy(n->before2, n->before, (size_t)d * sizeof(float));
    memcpy(n->before, n->h, (size_t)d * sizeof(float));
}

int ouro_note(ouro_engine *e, ouro_line_kind kind, int64_t request, int pos, int step, int32_t token)
{
    if (!e->options.record) return OURO_OK;
    int status = ouro_grow(&e->lines, &e->line_capacity, e->n_lines + 1, sizeof *e->lines);
    if (status == OURO_OK) e->lines[e->n_lines++] = (ouro_line){request, (int32_t)kind, pos, step, token, 0};
    return status;
}

/* FNV-1a over the bits of a state, a word at a time. */
static uint32_t checksum(const float *h, int d)
{
    uint64_t sum = 0xcbf29ce484222325u;
    for (int i = 0; i < d; i++) {
        uint32_t bits;
        memcpy(&bits, &h[i], sizeof bits);
        sum = (sum ^ bits) * 0x100000001b3u;
    }
    return (uint32_t)(sum ^ sum >> 32);
}

void ouro_note_states(ouro_engine *e)
{
    if (!e->options.record) return;
    ouro_line *rows = e->lines + e->n_lines - e->n_lanes;        /* the rows of the pass were noted last, in its order */
    for (int i = 0; i < e->n_lanes; i++) rows[i].state = checksum(e->lanes[i].h, e->ws->model->config.d_model);
}

/* Whether nobody looks at the states that a chunk has behind its next step: its last, which only keys and values outlive,
 * unless it is observed or the states go into a log. */
static bool leaves_keys_only(const ouro_engine *e, const ouro_request *r)
{
    return r->chunk.step == r->depth - 1 && !r->params.observer && !e->options.record;
}

static int gather_chunk(ouro_engine *e, ouro_request *r)
{
    int d = e->ws->model->config.d_model, status = OURO_OK;
    const ouro_chunk *c = &r->chunk;
    bool keys_only = leaves_keys_only(e, r);
    for (int i = 0; status == OURO_OK && i < c->n; i++) {
        status = add_lane(e, r, NULL, i, c->pos + i, c->step, c->h + (size_t)i * (size_t)d);
        if (status == OURO_OK) e->lanes[e->n_lanes - 1].keys_only = keys_only;
        if (status == OURO_OK)
            status = ouro_note(e, OURO_LINE_PROMPT, r->id, c->pos + i, c->step, r->seq.tokens[c->pos + i]);
    }
    return status;
}

static int gather_request(ouro_engine *e, ouro_request *r)
{
    int status = leaves_keys_only(e, r) ? OURO_OK : gather_chunk(e, r);
    for (ouro_node *n = r->nodes; status == OURO_OK && n; n = n->next) {
        if (n->step >= r->depth) continue;
        remember_states(n, e->ws->model->config.d_model);
        status = add_lane(e, r, n, 0, n->pos, n->step, n->h);
        ouro_line_kind kind = n->speculative ? OURO_LINE_GUESS : n == r->lead ? OURO_LINE_LEAD : OURO_LINE_LATE;
        if (status == OURO_OK) status = ouro_note(e, kind, r->id, n->pos, n->step, n->token);
    }
    r->stats.passes += ouro_request_lanes(r) > 0;
    return status;
}

/* ---- prompts ------------------------------------------------------------------------------------------------------ */

/* A running request whose prompt has positions that no chunk has taken yet. */
static bool has_prompt(const ouro_request *r) { return r->running && !r->lead; }

/* Whether q is computing a block that r's prompt could take over next. */
static bool computes_for(const ouro_request *q, const ouro_request *r)
{
    if (!q->running || !q->shares || q->depth < r->depth) return false;
    int n = q->n_prompt < r->n_prompt - 1 ? q->n_prompt : r->n_prompt - 1, same = 0;
    while (same < n && q->seq.tokens[same] == r->seq.tokens[same]) same++;
    same -= same % OURO_BLOCK;
    return same > r->prefilled && same > ouro_request_complete(q);
}

/* Before its first own chunk a prompt takes over the blocks that are kept, and waits for those that an older request is
 * computing. The oldest waits for nobody, so somebody always goes on. */
static void take_prefix(ouro_engine *e, ouro_request *r)
{
    r->waits = false;
    if (!e->prefix.limit || !r->shares || !has_prompt(r) || r->began) return;
    int kept = ouro_prefix_adopt(&e->prefix, &r->seq, r->n_prompt - 1);
    r->stats.prefix_tokens += kept - r->prefilled;
    r->prefilled = kept;
    for (const ouro_request *q = e->requests; q != r && !r->waits; q = q->next) r->waits = computes_for(q, r);
}

/* The prompt that has waited longest for a chunk, or NULL. */
static ouro_request *next_prompt(const ouro_engine *e)
{
    ouro_request *first = NULL;
    for (ouro_request *r = e->requests; r; r = r->next)
        if (has_prompt(r) && !r->chunk.n && !r->waits && (!first || r->turn < first->turn)) first = r;
    return first;
}

/* Rows that chunks may still take in this pass. While something decodes, prompts get prefill_lanes in all; a few rows
 * they always get, however much decodes. The lead behind a last chunk is one row more: kept free in every chunk, its place
 * would cost 512 positions a third sweep of all steps. */
static int room_for_prompts(const ouro_engine *e)
{
    int lanes = 0, prompts = 0, most = e->options.max_lanes, least = most < 8 ? most : 8;
    bool decoding = false;
    for (const ouro_request *r = e->requests; r; r = r->next) {
        if (!r->running) continue;
        lanes += ouro_request_lanes(r);
        prompts += r->chunk.n;
        decoding |= r->lead != NULL;
    }
    int room = most - lanes;
    if (decoding && room > e->options.prefill_lanes - prompts) room = e->options.prefill_lanes - prompts;
    return room < least - prompts ? least - prompts : room;
}

/* Starts chunks, each prompt in its turn. */
static void begin_chunks(ouro_engine *e)
{
    for (ouro_request *r = e->requests; r; r = r->next) take_prefix(e, r);
    int room = room_for_prompts(e);
    for (ouro_request *r; room > 0 && (r = next_prompt(e));) {
        r->turn = ++e->turn;
        r->began = true;
        int status = ouro_request_advance(r, e->ws->model, room);
        room -= r->chunk.n;
        if (status != OURO_OK) ouro_end_request(e, r, OURO_FINISH_FAILED, status);
    }
}

int ouro_gather(ouro_engine *e)
{
    int status = OURO_OK;
    e->n_lanes = 0;
    begin_chunks(e);
    for (ouro_request *r = e->requests; status == OURO_OK && r; r = r->next)
        if (r->running) status = gather_request(e, r);
    for (ouro_request *r = e->requests; status == OURO_OK && r; r = r->next)     /* these stand behind all others */
        if (r->running && leaves_keys_only(e, r)) status = gather_chunk(e, r);
    return status;
}
