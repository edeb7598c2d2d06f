/* forks_type.c - `_core.Forks`: a base run, and variants of it that share passes (engine/forks.h). */
#include "python/common.h"

#include "engine/forks.h"

typedef struct forks_object {
    PyObject_HEAD
    model_object *model;
    ouro_forks *forks;
    int n, n_steps;
} forks_object;

/* embeddings: None, or [n][d_model] float32; 0 and an exception otherwise */
static int embeddings_of(PyObject *given, const ouro_config *c, npy_intp n, PyArrayObject **out)
{
    *out = NULL;
    if (given == Py_None) return 1;
    *out = (PyArrayObject *)PyArray_FROMANY(given, NPY_FLOAT32, 2, 2, NPY_ARRAY_IN_ARRAY);
    if (!*out) return 0;
    if (PyArray_DIM(*out, 0) == n && PyArray_DIM(*out, 1) == c->d_model) return 1;
    PyErr_Format(PyExc_ValueError, "embeddings have shape [%zd, %zd], expected [%zd, %d]", (Py_ssize_t)PyArray_DIM(*out, 0),
                 (Py_ssize_t)PyArray_DIM(*out, 1), (Py_ssize_t)n, (int)c->d_model);
    Py_CLEAR(*out);
    return 0;
}

static PyObject *forks_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"model", "tokens", "n_steps", "embeddings", "max_lanes", NULL};
    PyObject *module = PyType_GetModuleByDef(type, &ouro_core_module), *tokens_in, *embeddings_in;
    if (!module) return NULL;
    module_state *state = PyModule_GetState(module);
    model_object *model;
    int n_steps, max_lanes;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!OiOi", names, state->model_type, &model, &tokens_in, &n_steps,
                                     &embeddings_in, &max_lanes)
        || !ouro_model_is_ready(model))
        return NULL;
    PyArrayObject *tokens = (PyArrayObject *)PyArray_FROMANY(tokens_in, NPY_INT32, 1, 1, NPY_ARRAY_IN_ARRAY), *embeddings;
    if (!tokens) return NULL;
    npy_intp n = PyArray_SIZE(tokens) < INT32_MAX ? PyArray_SIZE(tokens) : INT32_MAX;
    if (!embeddings_of(embeddings_in, &model->model->config, n, &embeddings)) {
        Py_DECREF(tokens);
        return NULL;
    }
    ouro_forks *forks = NULL;
    poll_clock clock = {0};
    int status;
    ouro_model_lock(model);
    Py_BEGIN_ALLOW_THREADS
    status = ouro_forks_new(model->ws, PyArray_DATA(tokens), (int)n, n_steps, embeddings ? PyArray_DATA(embeddings) : NULL,
                            max_lanes, ouro_poll_signals, &clock, &forks);
    Py_END_ALLOW_THREADS
    ouro_model_unlock(model);
    Py_DECREF(tokens);
    Py_XDECREF(embeddings);
    if (status != OURO_OK) return ouro_raise(status);
    forks_object *self = (forks_object *)type->tp_alloc(type, 0);
    if (!self) {
        ouro_forks_free(forks);
        return NULL;
    }
    self->model = (model_object *)Py_NewRef((PyObject *)model);
    self->forks = forks;
    self->n = (int)n;
    self->n_steps = n_steps;
    return (PyObject *)self;
}

static void forks_dealloc(PyObject *o)
{
    forks_object *self = (forks_object *)o;
    PyTypeObject *type = Py_TYPE(o);
    ouro_forks_free(self->forks);
    Py_XDECREF(self->model);
    type->tp_free(o);
    Py_DECREF(type);
}

static PyObject *forks_states(PyObject *o, PyObject *unused)
{
    (void)unused;
    forks_object *self = (forks_object *)o;
    npy_intp shape[3] = {self->n_steps, self->n, self->model->model->config.d_model};
    PyObject *array = ouro_new_floats(3, shape, 0);
    if (array)
        memcpy(PyArray_DATA((PyArrayObject *)array), ouro_forks_states(self->forks), (size_t)PyArray_NBYTES((PyArrayObject *)array));
    return array;
}

/* The run itself, once the arrays are known to be what they should be. */
static PyObject *run_forks(forks_object *self, PyArrayObject *forks, PyArrayObject *source, PyArrayObject *out_pos, int max_lanes,
                           size_t max_bytes)
{
    npy_intp shape[3] = {PyArray_DIM(forks, 0), PyArray_SIZE(out_pos), self->model->model->config.d_model}, *d = PyArray_DIMS(source);
    ouro_fork_source from = {PyArray_DATA(source), (int)d[0], (int)d[1], (int)d[2], (int)d[3], (int)d[4]};
    PyObject *states = ouro_new_floats(3, shape, 0);
    if (!states) return NULL;
    int64_t lane_layers = 0;
    poll_clock clock = {0};
    int status;
    ouro_model_lock(self->model);
    Py_BEGIN_ALLOW_THREADS
    status = ouro_forks_run(self->forks, PyArray_DATA(forks), (int)shape[0], &from, PyArray_DATA(out_pos), (int)shape[1], max_lanes,
                            max_bytes, PyArray_DATA((PyArrayObject *)states), &lane_layers, ouro_poll_signals, &clock);
    Py_END_ALLOW_THREADS
    ouro_model_unlock(self->model);
    if (status == OURO_OK) return Py_BuildValue("(NL)", states, (long long)lane_layers);
    Py_DECREF(states);
    return ouro_raise(status);
}

static PyObject *forks_run(PyObject *o, PyObject *args)
{
    PyObject *forks_in, *source_in, *out_in, *result = NULL;
    int max_lanes;
    Py_ssize_t max_bytes;
    if (!PyArg_ParseTuple(args, "OOOin", &forks_in, &source_in, &out_in, &max_lanes, &max_bytes)) return NULL;
    PyArrayObject *forks = (PyArrayObject *)PyArray_FROMANY(forks_in, NPY_INT32, 2, 2, NPY_ARRAY_IN_ARRAY);
    PyArrayObject *source = forks ? (PyArrayObject *)PyArray_FROMANY(source_in, NPY_FLOAT32, 5, 5, NPY_ARRAY_IN_ARRAY) : NULL;
    PyArrayObject *out_pos = source ? (PyArrayObject *)PyArray_FROMANY(out_in, NPY_INT32, 1, 1, NPY_ARRAY_IN_ARRAY) : NULL;
    if (out_pos && (PyArray_DIM(forks, 1) != 8 || PyArray_DIM(forks, 0) > INT32_MAX / 2 || max_bytes < 0))
        PyErr_Format(PyExc_ValueError, "forks have %zd numbers each, expected 8; max_bytes is %zd", (Py_ssize_t)PyArray_DIM(forks, 1),
                     max_bytes);
    else if (out_pos)
        result = run_forks((forks_object *)o, forks, source, out_pos, max_lanes, (size_t)max_bytes);
    Py_XDECREF(forks);
    Py_XDECREF(source);
    Py_XDECREF(out_pos);
    return result;
}

static PyMethodDef methods[] = {
    {"states", forks_states, METH_NOARGS, "states($self)\n--\n\nStates of the base run, [step, pos, d_model]."},
    {"run", forks_run, METH_VARARGS,
     "run($self, forks, source, positions, max_lanes, max_bytes, /)\n--\n\nRuns forks [n, 8] (point, step0, step1, layer0, layer1, pos0, "
     "pos1, head) with rows of source [step, layer, pos, head, col]; returns their last states [n, positions, d_model] and the lanes "
     "times layers that were run."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, (void *)forks_new},
    {Py_tp_dealloc, (void *)forks_dealloc},
    {Py_tp_methods, methods},
    {Py_tp_doc, (void *)"One run and its variants, which start where they first differ and share passes."},
    {0, NULL},
};

PyType_Spec ouro_forks_spec = {"ouro._core.Forks", sizeof(forks_object), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE, slots};
