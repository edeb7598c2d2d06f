/* packed.c - packed files from Python: `Model.save`, `look_packed`, `open_packed` (csrc/model/packed.h). */
#include "python/common.h"

#include "model/packed.h"

/* ---- writing --------------------------------------------------------------------------------------------------- */

static int progress(void *arg, size_t done, size_t total)
{
    PyGILState_STATE gil = PyGILState_Ensure();
    PyObject *answer = arg ? PyObject_CallFunction(arg, "nn", (Py_ssize_t)done, (Py_ssize_t)total) : Py_NewRef(Py_None);
    int stop = !answer || PyErr_CheckSignals() != 0;
    Py_XDECREF(answer);
    PyGILState_Release(gil);
    return stop;
}

/* save(path, progress=None): progress(done, total) in bytes; an exception in it stops and is raised */
PyObject *ouro_model_save(PyObject *o, PyObject *args)
{
    model_object *self = (model_object *)o;
    PyObject *path = NULL, *call = Py_None;
    int status;
    if (!PyArg_ParseTuple(args, "O&|O", PyUnicode_FSConverter, &path, &call)) return NULL;
    if (!ouro_model_is_ready(self)) {
        Py_DECREF(path);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    status = ouro_packed_write(self->model, PyBytes_AS_STRING(path), progress, call == Py_None ? NULL : call);
    Py_END_ALLOW_THREADS
    Py_DECREF(path);
    if (status != OURO_OK) return ouro_raise(status);
    Py_RETURN_NONE;
}

/* ---- reading --------------------------------------------------------------------------------------------------- */

/* look_packed(path) -> sizes, compute and formats of the header, by the names of `Model` */
static PyObject *look_packed(PyObject *module, PyObject *arg)
{
    (void)module;
    PyObject *path;
    ouro_packed_facts f;
    if (!PyUnicode_FSConverter(arg, &path)) return NULL;
    int status = ouro_packed_look(PyBytes_AS_STRING(path), &f);
    Py_DECREF(path);
    if (status != OURO_OK) return ouro_raise(status);
    const ouro_config *c = &f.config;
    return Py_BuildValue(
        "{s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:f,s:d,s:O,s:s,s:s,s:s,s:s,s:s,s:s,s:n}", "n_layers", c->n_layers, "n_steps",
        c->n_steps, "n_heads", c->n_heads, "n_key_value_heads", c->n_kv_heads, "d_model", c->d_model, "d_head", c->d_head,
        "d_mlp", c->d_mlp, "d_vocab", c->d_vocab, "n_ctx", c->n_ctx, "eps", (double)c->eps, "rope_theta", c->rope_theta,
        "tie_word_embeddings", c->tied ? Py_True : Py_False, "compute", ouro_format_name((int)f.compute), "layers",
        ouro_format_name((int)f.formats.layers), "o", ouro_format_name((int)f.formats.o), "down",
        ouro_format_name((int)f.formats.down), "head", ouro_format_name((int)f.formats.head), "embed",
        ouro_format_name((int)f.formats.embed), "weight_bytes", (Py_ssize_t)f.arena_bytes);
}

/* open_packed(path, compute, isa, copy, verify, threads) -> Model that only lacks finish() */
static PyObject *open_packed(PyObject *module, PyObject *args)
{
    module_state *state = PyModule_GetState(module);
    PyObject *path = NULL;
    const char *compute, *isa;
    int copy, verify, threads;
    if (!PyArg_ParseTuple(args, "O&szppi", PyUnicode_FSConverter, &path, &compute, &isa, &copy, &verify, &threads)) return NULL;
    ouro_packed_options o = {.isa = isa, .compute = ouro_format_by_name(compute), .copy = copy, .skip_checksum = !verify,
                             .n_threads = threads};
    model_object *self = o.compute < 0 ? NULL : (model_object *)state->model_type->tp_alloc(state->model_type, 0);
    int status = OURO_ERR_MEMORY;
    if (self && (self->lock = PyThread_allocate_lock()) != NULL) {
        Py_BEGIN_ALLOW_THREADS
        status = ouro_packed_read(PyBytes_AS_STRING(path), &o, &self->model);
        Py_END_ALLOW_THREADS
    }
    Py_DECREF(path);
    if (self && status == OURO_OK) return (PyObject *)self;
    Py_XDECREF(self);
    return ouro_raise(status);
}

PyMethodDef ouro_packed_functions[] = {
    {"look_packed", look_packed, METH_O, "look_packed($module, path, /)\n--\n\nSizes, compute and formats of a packed file."},
    {"open_packed", open_packed, METH_VARARGS,
     "open_packed($module, path, compute, isa, copy, verify, threads, /)\n--\n\nA model from a packed file; call finish() next."},
    {NULL, NULL, 0, NULL},
};
