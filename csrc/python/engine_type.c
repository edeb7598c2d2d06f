/* engine_type.c - `_core.Engine`: submitting requests, stepping, events as tuples. */
#include "python/common.h"
#include "python/exits.h"

#include <stdatomic.h>

#include "engine/engine.h"

typedef struct engine_object {
    PyObject_HEAD
    model_object *model;
    ouro_engine *engine;
    PyObject *rules;                 /* {request id: [callable, exception or None]} of custom exit rules */
    int stepping;                    /* one step at a time */
    atomic_int interrupted;          /* a thread wants the step to end */
} engine_object;

static PyObject *engine_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"model", "max_lanes", "max_cache_bytes", "prefix_cache_bytes", "prefill_lanes", "max_queue",
                            "record", NULL};
    PyObject *module = PyType_GetModuleByDef(type, &ouro_core_module);
    if (!module) return NULL;
    module_state *state = PyModule_GetState(module);
    model_object *model;
    ouro_engine_options options = {0};
    Py_ssize_t max_cache = 0, prefix = 0;
    int record = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!i|nniip", names, state->model_type, &model, &options.max_lanes,
                                     &max_cache, &prefix, &options.prefill_lanes, &options.max_queue, &record)
        || !ouro_model_is_ready(model))
        return NULL;
    if (max_cache < 0 || prefix < 0)
        return PyErr_Format(PyExc_ValueError, "max_cache_bytes is %zd and prefix_cache_bytes %zd, expected 0 or more",
                            max_cache, prefix);
    options.max_cache_bytes = (size_t)max_cache;
    options.prefix_cache_bytes = (size_t)prefix;
    options.record = record;
    engine_object *self = (engine_object *)type->tp_alloc(type, 0);
    if (!self) return NULL;
    self->model = (model_object *)Py_NewRef((PyObject *)model);
    self->rules = PyDict_New();
    int status = self->rules ? ouro_engine_new(model->ws, &options, &self->engine) : OURO_ERR_MEMORY;
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

/* The id of a new request. Its rule is stored before anything asks it, for which the GIL is needed. */
static PyObject *queue_request(engine_object *self, const int32_t *tokens, npy_intp n, const ouro_request_params *p,
                               PyObject *slot)
{
    int64_t id;
    int status = n > INT32_MAX / 2 ? ouro_fail(OURO_ERR_CONTEXT, "the prompt is too long")
                                   : ouro_engine_submit(self->engine, tokens, (int)n, p, &id);
    if (status != OURO_OK) return ouro_raise(status);
    PyObject *result = PyLong_FromLongLong(id);
    if (!result || (slot && PyDict_SetItem(self->rules, result, slot) < 0)) {
        Py_XINCREF(slot);                            /* the request may still look at it */
        ouro_engine_cancel(self->engine, id);
        Py_CLEAR(result);
    }
    return result;
}

static PyObject *engine_submit(PyObject *o, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"tokens", "max_new_tokens", "n_steps", "exit_at_step", "weighted_exit", "exit_kind",
                            "exit_threshold", "exit_min_steps", "exit_delay", "exit_rule", "temperature", "top_k",
                            "top_p", "min_p", "repetition_penalty", "seed", "stream", "stop_ids", "n_top", "speculate",
                            "kv_policy", "follow", "plan", NULL};
    engine_object *self = (engine_object *)o;
    PyObject *tokens_in, *stop_in, *follow_in = NULL, *rule = Py_None, *plan = Py_None;
    ouro_request_params p = {0};
    int speculate, policy = OURO_POLICY_FULL;
    unsigned long long seed;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OiiipsfiiOfifffKIOii|iOO", names, &tokens_in, &p.max_new_tokens,
                                     &p.n_steps, &p.exit_at_step, &p.weighted_exit, &p.exit.name, &p.exit.threshold,
                                     &p.exit.min_steps, &p.exit.delay, &rule, &p.sampling.temperature, &p.sampling.top_k,
                                     &p.sampling.top_p, &p.sampling.min_p, &p.sampling.repetition_penalty, &seed,
                                     &p.sampling.stream, &stop_in, &p.n_top, &speculate, &policy,
                                     &follow_in, &plan)
        || !ouro_plan_of(self->model, plan, &p.observer))
        return NULL;
    p.sampling.seed = seed;
    p.speculate = (ouro_speculate)speculate;
    p.kv_policy = (ouro_kv_policy)policy;
    bool keeps = rule != Py_None || plan != Py_None;
    PyObject *slot = keeps ? Py_BuildValue("[OOO]", rule, Py_None, plan) : NULL;
    if (keeps && !slot) return NULL;
    if (rule != Py_None) p.exit.custom = ouro_call_rule, p.exit.custom_arg = slot;
    PyArrayObject *tokens = (PyArrayObject *)PyArray_FROMANY(tokens_in, NPY_INT32, 1, 1, NPY_ARRAY_IN_ARRAY);
    PyArrayObject *stop = tokens ? (PyArrayObject *)PyArray_FROMANY(stop_in, NPY_INT32, 1, 1, NPY_ARRAY_IN_ARRAY) : NULL;
    PyArrayObject *follow = NULL;
    if (stop && follow_in) follow = (PyArrayObject *)PyArray_FROMANY(follow_in, NPY_INT32, 1, 1, NPY_ARRAY_IN_ARRAY);
    PyObject *result = NULL;
    if (stop && (follow || !follow_in)) {
        p.follow = follow ? PyArray_DATA(follow) : NULL;
        p.n_follow = follow ? (int)PyArray_SIZE(follow) : 0;
        p.stop_ids = PyArray_DATA(stop);
        p.n_stop_ids = (int)PyArray_SIZE(stop);
        result = queue_request(self, PyArray_DATA(tokens), PyArray_SIZE(tokens), &p, slot);
    }
    Py_XDECREF(slot);
    Py_XDECREF(tokens);
    Py_XDECREF(stop);
    Py_XDECREF(follow);
    return result;
}

static PyObject *stats_dict(const ouro_stats *s)
{
    return Py_BuildValue("{s:L,s:L,s:L,s:L,s:L,s:L,s:L,s:L,s:L,s:L,s:L,s:L,s:L,s:L,s:L,s:d,s:d}", "passes", s->passes, "lanes",
                         s->lanes, "tokens", s->tokens, "prompt_tokens", s->prompt_tokens, "prefix_tokens",
                         s->prefix_tokens, "guesses", s->guesses, "kept", s->kept, "dropped", s->dropped, "lookups", s->lookups,
                         "lookups_kept", s->lookups_kept, "first_tried",
                         s->first_tried, "first_right", s->first_right, "second_tried", s->second_tried, "second_right",
                         s->second_right, "cache_bytes", s->cache_bytes, "prefill_seconds", s->prefill_seconds, "decode_seconds", s->decode_seconds);
}

/* Why a request failed: what its exit rule raised, or the exception that goes with its status. */
static PyObject *event_error(engine_object *self, const ouro_event *v)
{
    if (v->finish != OURO_FINISH_FAILED) return Py_NewRef(Py_None);
    PyObject *key = PyLong_FromLongLong(v->request), *slot = key ? PyDict_GetItem(self->rules, key) : NULL;
    Py_XDECREF(key);
    if (slot && PyList_GET_ITEM(slot, 1) != Py_None) return Py_NewRef(PyList_GET_ITEM(slot, 1));
    ouro_fail(v->status, "%s", v->detail);
    ouro_raise(v->status);
    return ouro_take_exception();
}

/* (id, token, logprob, exit_step, finish, exit_pdf tuple, top ids, top logprobs, stats or None, exception or None) */
static PyObject *event_tuple(engine_object *self, const ouro_event *v, int n_steps)
{
    PyObject *pdf = PyTuple_New(n_steps), *ids = PyTuple_New(v->n_top), *logprobs = PyTuple_New(v->n_top);
    PyObject *stats = v->finish == OURO_RUNNING ? Py_NewRef(Py_None) : stats_dict(&v->stats);
    PyObject *error = event_error(self, v);
    if (pdf && ids && logprobs && stats && error) {
        for (int t = 0; t < n_steps; t++) PyTuple_SET_ITEM(pdf, t, PyFloat_FromDouble((double)v->exit_pdf[t]));
        for (int i = 0; i < v->n_top; i++) {
            PyTuple_SET_ITEM(ids, i, PyLong_FromLong(v->top_ids[i]));
            PyTuple_SET_ITEM(logprobs, i, PyFloat_FromDouble((double)v->top_logprobs[i]));
        }
        if (!PyErr_Occurred())
            return Py_BuildValue("(LifiiNNNNN)", v->request, (int)v->token, (double)v->logprob, v->exit_step,
                                 (int)v->finish, pdf, ids, logprobs, stats, error);
    }
    Py_XDECREF(pdf);
    Py_XDECREF(ids);
    Py_XDECREF(logprobs);
    Py_XDECREF(stats);
    Py_XDECREF(error);
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
        PyObject *t = event_tuple(self, &events[i], OURO_MAX_STEPS);
        if (t) PyList_SET_ITEM(list, i, t);
        else Py_CLEAR(list);
        if (events[i].finish != OURO_RUNNING) forget_rule(self, events[i].request);
    }
    return list;
}

typedef struct step_poll { poll_clock clock; engine_object *engine; } step_poll;

static int poll_step(void *arg)
{
    step_poll *p = arg;
    return atomic_load(&p->engine->interrupted) || ouro_poll_signals(&p->clock);
}

static PyObject *engine_step(PyObject *o, PyObject *unused)
{
    (void)unused;
    engine_object *self = (engine_object *)o;
    const ouro_event *events;
    int n, status;
    step_poll poll = {.engine = self};
    if (self->stepping) {
        PyErr_SetString(PyExc_RuntimeError, "another thread is stepping this engine");
        return NULL;
    }
    self->stepping = 1;
    if (!ouro_model_lock(self->model)) {
        self->stepping = 0;
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    status = ouro_engine_step(self->engine, poll_step, &poll, &events, &n);
    Py_END_ALLOW_THREADS
    ouro_model_unlock(self->model);
    PyObject *list = NULL;
    if (PyErr_Occurred() || (status != OURO_OK && n == 0)) ouro_raise(status);      /* Ctrl-C; or nobody to tell it to */
    else list = events_list(self, events, n);
    self->stepping = 0;
    return list;
}

static PyObject *engine_interrupt(PyObject *o, PyObject *unused)
{
    (void)unused;
    atomic_store(&((engine_object *)o)->interrupted, 1);
    Py_RETURN_NONE;
}

static PyObject *engine_cancel(PyObject *o, PyObject *arg)
{
    long long id = PyLong_AsLongLong(arg);
    if (id == -1 && PyErr_Occurred()) return NULL;
    int status = ouro_engine_cancel(((engine_object *)o)->engine, id);
    return status == OURO_OK ? Py_NewRef(Py_None) : ouro_raise(status);
}

static PyObject *engine_pending(PyObject *o, PyObject *unused)
{
    (void)unused;
    return PyLong_FromLong(ouro_engine_pending(((engine_object *)o)->engine));
}

static PyObject *engine_stats(PyObject *o, PyObject *unused)
{
    (void)unused;
    ouro_engine_status now;
    ouro_engine_look(((engine_object *)o)->engine, &now);
    PyObject *d = stats_dict(&now.stats);
    PyObject *more = Py_BuildValue("{s:i,s:i,s:n,s:n,s:n,s:n,s:n}", "waiting", now.waiting, "running", now.running,
                                   "cache_bytes", (Py_ssize_t)now.cache_bytes, "cache_peak", (Py_ssize_t)now.cache_peak,
                                   "cache_limit", (Py_ssize_t)now.cache_limit, "prefix_bytes",
                                   (Py_ssize_t)now.prefix_bytes, "prefix_limit", (Py_ssize_t)now.prefix_limit);
    if (!d || !more || PyDict_Update(d, more) < 0) Py_CLEAR(d);
    Py_XDECREF(more);
    return d;
}

/* [(request, kind, pos, step, token, checksum of the state)] of the last step */
static PyObject *engine_record(PyObject *o, PyObject *unused)
{
    (void)unused;
    engine_object *self = (engine_object *)o;
    if (self->stepping) {
        PyErr_SetString(PyExc_RuntimeError, "the engine is stepping");
        return NULL;
    }
    int n;
    const ouro_line *lines = ouro_engine_record(self->engine, &n);
    PyObject *list = PyList_New(n);
    for (int i = 0; list && i < n; i++) {
        PyObject *t = Py_BuildValue("(LiiiiI)", lines[i].request, (int)lines[i].kind, (int)lines[i].pos,
                                    (int)lines[i].step, (int)lines[i].token, (unsigned)lines[i].state);
        if (t) PyList_SET_ITEM(list, i, t);
        else Py_CLEAR(list);
    }
    return list;
}

static PyMethodDef methods[] = {
    {"submit", (PyCFunction)(void (*)(void))engine_submit, METH_VARARGS | METH_KEYWORDS,
     "submit($self, tokens, max_new_tokens, n_steps, exit_at_step, weighted_exit, exit_kind, exit_threshold, exit_min_steps, "
     "exit_delay, exit_rule, temperature, top_k, top_p, min_p, repetition_penalty, seed, stream, stop_ids, n_top, "
     "speculate, kv_policy=0, follow=(), plan=None)\n--\n\nQueues a request; returns its id."},
    {"step", engine_step, METH_NOARGS, "step($self)\n--\n\nRuns one pass; returns the events it caused."},
    {"cancel", engine_cancel, METH_O, "cancel($self, request, /)\n--\n\nEnds a request; its last event follows."},
    {"pending", engine_pending, METH_NOARGS, "pending($self)\n--\n\nRequests queued or running."},
    {"interrupt", engine_interrupt, METH_NOARGS, "interrupt($self)\n--\n\nEnds the step under way, and every later one."},
    {"record", engine_record, METH_NOARGS,
     "record($self)\n--\n\nSchedule of the last step: (request, kind, pos, step, token) rows."},
    {"stats", engine_stats, METH_NOARGS, "stats($self)\n--\n\nCounts since the engine was made, and what it holds now."},
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
