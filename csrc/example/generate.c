/* generate.c - loads a packed model and continues a list of token ids, greedily: the C API in one page.
 *
 *   ouro quantize ouro-tiny tiny
 *   make -C csrc && csrc/build/generate tiny/model.ouro 40 455 288 571 500
 */
#include <stdio.h>
#include <stdlib.h>

#include "ouro.h"

static int fail(const char *what, int status)
{
    fprintf(stderr, "%s: %s: %s\n", what, ouro_status_name(status), ouro_last_error());
    return 1;
}

static int generate(ouro_engine *engine, const int32_t *tokens, int n, int n_steps)
{
    ouro_request_params p = {.max_new_tokens = 16, .n_steps = n_steps, .exit_at_step = -1, .speculate = OURO_SPECULATE_AUTO,
                             .sampling = {.top_p = 1.0f, .repetition_penalty = 1.0f}};
    int64_t id;
    int status = ouro_engine_submit(engine, tokens, n, &p, &id);
    while (status == OURO_OK && ouro_engine_pending(engine)) {
        const ouro_event *events;
        int count;
        status = ouro_engine_step(engine, NULL, NULL, &events, &count);
        for (int i = 0; status == OURO_OK && i < count; i++)
            if (events[i].token >= 0) printf("%d ", (int)events[i].token);
    }
    printf("\n");
    return status == OURO_OK ? 0 : fail("generate", status);
}

int main(int argc, char **argv)
{
    int32_t tokens[256];
    int n = argc - 2 < 256 ? argc - 2 : 256;
    if (n < 1) return fprintf(stderr, "usage: generate PACKED_MODEL TOKEN_ID...\n"), 2;
    for (int i = 0; i < n; i++) tokens[i] = (int32_t)strtol(argv[i + 2], NULL, 10);
    ouro_model *model;
    ouro_workspace *ws = NULL;
    ouro_engine *engine = NULL;
    int status = ouro_packed_read(argv[1], NULL, &model);
    if (status != OURO_OK) return fail(argv[1], status);
    status = ouro_workspace_new(model, model->compute == OURO_FLOAT32 ? OURO_KV_F32 : OURO_KV_BF16, 0, &ws);
    if (status == OURO_OK) status = ouro_engine_new(ws, &(ouro_engine_options){.max_lanes = 256}, &engine);
    int code = status == OURO_OK ? generate(engine, tokens, n, model->config.n_steps) : fail("engine", status);
    ouro_engine_free(engine);
    ouro_workspace_free(ws);
    ouro_model_free(model);
    return code;
}
