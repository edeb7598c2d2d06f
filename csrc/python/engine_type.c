/* engine_type.c - `_core.Engine`: submitting requests, stepping, events as tuples. */
#include "python/common.h"

#include "engine/engine.h"

typedef struct engine_object {
    PyObject_HEAD
    model_object *model;
    ouro_engine *engine;
    PyObject *rules;                 /* {request id: callable} of custom exit rules */
    int stepping;                    /* one step at a time */
} engine_object;

static PyObject *engine_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"model", "max_lanes", "max_cache_bytes", NULL};
    PyObject *module = PyType_GetModuleByDef(type, &ouro_core_module);
    if (!module) return NULL;
    module_state *state = PyModule_GetState(module);
    model_object *model;
    int max_lanes;
    Py_ssize_t max_cache = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!i|n", names, state->model_type, &model, &max_lanes, &max_cache)
        || !ouro_model_is_ready(model))
        return NULL;
    if (max_cache < 0) return PyErr_Format(PyExc_ValueError, "max_cache_bytes is %zd, expected 0 or more", max_cache);
    engine_object *self = (engine_object *)type->tp_alloc(type, 0);
    if (!self) return NULL;
    self->model = (model_object *)Py_NewRef((PyObject *)model);
    self->rules = PyDict_New();
    int status = self->rules ? ouro_engine_new(model->ws, max_lanes, (size_t)max_cache, &self->engine) : OURO_ERR_MEMORY;
    if (status == OURO_OK) return (PyObject *)self;
    Py_DECREF(self);
    return ouro_raise(status);
}

static int engine_traverse(PyObject *o, visitproc visit, void *arg)
{
    Py_VISIT(((engine_object *)o)->rules);
    Py_VISIT(Py_TYPE(o));
    return 0;
}

static int engine_clear(PyObject *o)
{
    Py_CLEAR(((engine_object *)o)->rules);
    return 0;
}

static void engine_dealloc(PyObject *o)
{
    engine_object *self = (engine_object *)o;
    PyTypeObject *type = Py_TYPE(o);
    PyObject_GC_UnTrack(o);
    ouro_engine_free(self->engine);
    Py_XDECREF(self->model);
    Py_XDECREF(self->rules);
    type->tp_free(o);
    Py_DECREF(type);
}

/* A custom exit rule: rule(signal dict) -> bool. Called while a step runs, without the GIL. */
static int call_rule(void *arg, const ouro_exit_signal *s)
{
    PyGILState_STATE gil = PyGILState_Ensure();
    int answer = -1;
    PyObject *signal = Py_BuildValue("{s:i,s:i,s:f,s:f,s:f,s:f,s:f,s:f,s:f,s:f,s:f,s:i,s:i}", "step", s->step, "n_steps",
                                     s->n_steps, "exit_lambda", s->exit_lambda, "exit_pdf", s->exit_pdf, "exit_cdf",
                                     s->exit_cdf, "state_delta", s->state_delta, "state_relative", s->state_relative,
                                     "acceleration", s->acceleration, "kl", s->kl, "entropy", s->entropy, "confidence",
                                     s->confidence, "top_token", s->top_token, "previous_top_token", s->previous_top_token);
    PyObject *result = signal && !PyErr_Occurred() ? PyObject_CallOneArg(arg, signal) : NULL;
    if (result) answer = PyObject_IsTrue(result);
    Py_XDECREF(signal);
    Py_XDECREF(result);
    PyGILState_Release(gil);
    return answer;
}

static PyObject *engine_submit(PyObject *o, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"tokens", "max_new_tokens", "n_steps", "exit_at_step", "weighted_exit", "exit_kind",
                            "exit_threshold", "exit_min_steps", "exit_delay", "exit_rule", "temperature", "top_k",
                            "top_p", "min_p", "repetition_penalty", "seed", "stream", "stop_ids", "n_top", "speculate",
                            "kv_policy", NULL};
    engine_object *self = (engine_object *)o;
    PyObject *tokens_in, *stop_in, *rule = Py_None;
    ouro_request_params p = {0};
    int kind, speculate, policy = OURO_POLICY_FULL;
    unsigned long long seed;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OiiipifiiOfifffKIOii|i", names, &tokens_in, &p.max_new_tokens,
                                     &p.n_steps, &p.exit_at_step, &p.weighted_exit, &kind, &p.exit.threshold,
                                     &p.exit.min_steps, &p.exit.delay, &rule, &p.sampling.temperature, &p.sampling.top_k,
                                     &p.sampling.top_p, &p.sampling.min_p, &p.sampling.repetition_penalty, &seed,
                                     &p.sampling.stream, &stop_in, &p.n_top, &speculate, &policy))
        return NULL;
    p.sampling.seed = seed;
    p.exit.kind = (ouro_exit_kind)kind;
    p.speculate = (ouro_speculate)speculate;
    p.kv_policy = (ouro_kv_policy)policy;
    if (rule != Py_None) p.exit.custom = call_rule, p.exit.custom_arg = rule;
    PyArrayObject *tokens = (PyArrayObject *)PyArray_FROMANY(tokens_in, NPY_INT32, 1, 1, NPY_ARRAY_IN_ARRAY);
    PyArrayObject *stop = tokens ? (PyArrayObject *)PyArray_FROMANY(stop_in, NPY_INT32, 1, 1, NPY_ARRAY_IN_ARRAY) : NULL;
    PyObject *result = NULL;
    if (stop) {
        int64_t id;
        p.stop_ids = PyArray_DATA(stop);
        p.n_stop_ids = (int)PyArray_SIZE(stop);
        int status = PyArray_SIZE(tokens) > INT32_MAX / 2 ? ouro_fail(OURO_ERR_CONTEXT, "the prompt is too long")
                                                          : ouro_engine_submit(self->engine, PyArray_DATA(tokens), (int)PyArray_SIZE(tokens), &p, &id);
        result = status == OURO_OK ? PyLong_FromLongLong(id) : ouro_raise(status);
    }
    if (result && rule != Py_None && PyDict_SetItem(self->rules, result, rule) < 0) Py_CLEAR(result);
    Py_XDECREF(tokens);
    Py_XDECREF(stop);
    return result;
}

static PyObject *stats_dict(const ouro_stats *s)
{
    return Py_BuildValue("{s:L,s:L,s:L,s:L,s:L,s:L,s:L,s:L,s:L,s:L,s:L,s:d,s:d}", "passes", s->passes, "lanes", s->lanes,
                         "tokens", s->tokens, "prompt_tokens", s->prompt_tokens, "guesses", s->guesses, "kept", s->kept,
                         "dropped", s->dropped, "first_tried", s->first_tried, "first_right", s->first_right,
                         "second_tried", s->second_tried, "second_right", s->second_right, "prefill_seconds",
                         s->prefill_seconds, "decode_seconds", s->decode_seconds);
}

/* (id, token, logprob, exit_step, finish, exit_pdf tuple, top ids, top logprobs, stats or None) */
static PyObject *event_tuple(const ouro_event *v, int n_steps)
{
    PyObject *pdf = PyTuple_New(n_steps), *ids = PyTuple_New(v->n_top), *logprobs = PyTuple_New(v->n_top);
    PyObject *stats = v->finish == OURO_RUNNING ? Py_NewRef(Py_None) : stats_dict(&v->stats);
    if (pdf && ids && logprobs && stats) {
        for (int t = 0; t < n_steps; t++) PyTuple_SET_ITEM(pdf, t, PyFloat_FromDouble((double)v->exit_pdf[t]));
        for (int i = 0; i < v->n_top; i++) {
            PyTuple_SET_ITEM(ids, i, PyLong_FromLong(v->top_ids[i]));
            PyTuple_SET_ITEM(logprobs, i, PyFloat_FromDouble((double)v->top_logprobs[i]));
        }
        if (!PyErr_Occurred())
            return Py_BuildValue("(LifiiNNNN)", v->request, (int)v->token, (double)v->logprob, v->exit_step,
                                 (int)v->finish, pdf, ids, logprobs, stats);
    }
    Py_XDECREF(pdf);
    Py_XDECREF(ids);
    Py_XDECREF(logprobs);
    Py_XDECREF(stats);
    return NULL;
}

static void forget_rule(engine_object *self, int64_t id)
{
    PyObject *key = PyLong_FromLongLong(id);
    if (key && PyDict_Contains(self->rules, key) == 1) PyDict_DelItem(self->rules, key);
    Py_XDECREF(key);
}

static PyObject *events_list(engine_object *self, const ouro_event *events, int n)
{
    PyObject *list = PyList_New(n);
    for (int i = 0; list && i < n; i++) {
        PyObject *t = event_tuple(&events[i], OURO_MAX_STEPS);
        if (t) PyList_SET_ITEM(list, i, t);
        else Py_CLEAR(list);
        if (events[i].finish != OURO_RUNNING) forget_rule(self, events[i].request);
    }
    return list;
}

static PyObject *engine_step(PyObject *o, PyObject *unused)
{
    (void)unused;
    engine_object *self = (engine_object *)o;
    const ouro_event *events;
    int n, status;
    poll_clock clock = {0};
    if (self->stepping) {
        PyErr_SetString(PyExc_RuntimeError, "another thread is stepping this engine");
        return NULL;
    }
    self->stepping = 1;
    ouro_model_lock(self->model);
    Py_BEGIN_ALLOW_THREADS
    status = ouro_engine_step(self->engine, ouro_poll_signals, &clock, &events, &n);
    Py_END_ALLOW_THREADS
    ouro_model_unlock(self->model);
    self->stepping = 0;
    if (status != OURO_OK) return ouro_raise(status);
    if (PyErr_Occurred()) return NULL;               /* a custom exit rule raised */
    return events_list(self, events, n);
}

static PyObject *engine_cancel(PyObject *o, PyObject *arg)
{
    long long id = PyLong_AsLongLong(arg);
    if (id == -1 && PyErr_Occurred()) return NULL;
    ouro_engine_cancel(((engine_object *)o)->engine, id);
    Py_RETURN_NONE;
}

static PyObject *engine_pending(PyObject *o, PyObject *unused)
{
    (void)unused;
    return PyLong_FromLong(ouro_engine_pending(((engine_object *)o)->engine));
}

static PyObject *engine_stats(PyObject *o, PyObject *unused)
{
    (void)unused;
    return stats_dict(ouro_engine_stats(((engine_object *)o)->engine));
}

static PyObject *engine_cache_bytes(PyObject *o, PyObject *unused)
{
    (void)unused;
    return PyLong_FromSize_t(ouro_engine_cache_bytes(((engine_object *)o)->engine));
}

static PyMethodDef methods[] = {
    {"submit", (PyCFunction)(void (*)(void))engine_submit, METH_VARARGS | METH_KEYWORDS,
     "submit($self, tokens, max_new_tokens, n_steps, exit_at_step, weighted_exit, exit_kind, exit_threshold, exit_min_steps, "
     "exit_delay, exit_rule, temperature, top_k, top_p, min_p, repetition_penalty, seed, stream, stop_ids, n_top, "
     "speculate, kv_policy=0)\n--\n\nQueues a request; returns its id."},
    {"step", engine_step, METH_NOARGS, "step($self)\n--\n\nRuns one pass; returns the events it caused."},
    {"cancel", engine_cancel, METH_O, "cancel($self, request, /)\n--\n\nEnds a request; its last event follows."},
    {"pending", engine_pending, METH_NOARGS, "pending($self)\n--\n\nRequests queued or running."},
    {"stats", engine_stats, METH_NOARGS, "stats($self)\n--\n\nCounts since the engine was made."},
    {"cache_bytes", engine_cache_bytes, METH_NOARGS, "cache_bytes($self)\n--\n\nBytes of keys and values held now."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, (void *)engine_new},
    {Py_tp_dealloc, (void *)engine_dealloc},
    {Py_tp_traverse, (void *)engine_traverse},
    {Py_tp_clear, (void *)engine_clear},
    {Py_tp_methods, methods},
    {Py_tp_doc, (void *)"Requests that share passes over the weights."},
    {0, NULL},
};

PyType_Spec ouro_engine_spec = {"ouro._core.Engine", sizeof(engine_object), 0,
                                Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE, slots};
